#!/usr/bin/env bash
# Claim: imagecodecs.htj2k_decode (OpenJPH) turns white into black, and black into white, in lossy HTJ2K of 8 bits. The same
#   stream is right by jpeg2k_decode (OpenJPEG), which reads HTJ2K as well, though its name says JPEG 2000.
# Versions: imagecodecs 2026.3.6, numpy 2.4.6, Python 3.11.
# Why it matters: HTJ2K is a DICOM transfer syntax (1.2.840.10008.1.2.4.203). Whoever takes the decoder of that name shows
#   saturated parts of a picture inverted. Values beyond 0 to 255, which lossy coding makes, wrap around instead of being cut.
# Seen: at level 0.01, 772 of 65,536 pixels are off by up to 255 with htj2k_decode, none by more than 4 with jpeg2k_decode.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check imagecodecs==2026.3.6 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import imagecodecs
import numpy as np

y, x = np.mgrid[:256, :256]
picture = np.clip(128 + 203 * np.sin(x / 20) * np.cos(y / 15), 0, 255).astype(np.uint8)
picture[:64] = 255
stream = imagecodecs.htj2k_encode(picture, level=0.01, reversible=False)
errors = {}
for decode in (imagecodecs.htj2k_decode, imagecodecs.jpeg2k_decode):
    difference = np.abs(decode(stream).astype(int) - picture)
    errors[decode.__name__] = difference.max()
    print(f"{decode.__name__}: largest error {difference.max()}, pixels off by more than 128: {(difference > 128).sum()}")
assert errors["htj2k_decode"] == 255 and errors["jpeg2k_decode"] <= 5
PYTHON
