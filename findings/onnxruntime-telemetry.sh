#!/usr/bin/env bash
# Claim: importing ONNX Runtime on Linux makes a device id and an upload queue in the user's cache folder. With CI set in
#   the environment it doesn't, so that a test in a CI system can't see it. ORT_DISABLE_TELEMETRY=1 prevents it, 0 and 2
#   don't, and disable_telemetry_events() after the import comes too late.
# Versions: onnxruntime 1.31.1, Python 3.11. Its Privacy.md describes the telemetry, on by default since 1.29.
# Why it matters: inside a database server the folder is that of the user postgres, and a green CI proves nothing.
# Seen: as claimed. It runs without a network (unshare), so nothing is sent meanwhile.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.31.1
late='import onnxruntime; onnxruntime.disable_telemetry_events()'
# name, the environment, the program, whether files are expected
while IFS='|' read -r name variables program expected; do
    home="$folder/$name"
    mkdir "$home"
    # shellcheck disable=SC2086
    env -i HOME="$home" PATH="$PATH" $variables unshare --net --map-root-user "$folder/venv/bin/python" -c "$program"
    found=$(find "$home" -path '*.onnxruntime*' -type f | wc -l)
    echo "$name: $found files"
    if [ "$expected" = some ]; then test "$found" -gt 0; else test "$found" -eq 0; fi
done <<CASES
default||import onnxruntime|some
in-ci|CI=true|import onnxruntime|none
off|ORT_DISABLE_TELEMETRY=1|import onnxruntime|none
zero|ORT_DISABLE_TELEMETRY=0|import onnxruntime|some
two|ORT_DISABLE_TELEMETRY=2|import onnxruntime|some
too-late||$late|some
CASES
