"""Nothing leaves the server: ONNX Runtime's telemetry, off before it is imported.

Since version 1.29 its Linux builds collect usage data. The import alone makes a device id and an
upload queue in the user's cache folder and starts threads that send it over HTTPS. The variable
below prevents all of that, but only before the import: the API call after it comes too late.

Imported by the package itself, so the standard library's ``os`` and ``sys`` are all it needs.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "ORT_DISABLE_TELEMETRY"
# Of the values that ONNX Runtime 1.31 was tried with, these switch it off. "0" and "2" don't.
_OFF = ("1", "true", "yes")
_FOLDER = ("Microsoft", "DeveloperTools", ".onnxruntime")

_started = False


def switch_off() -> None:
    """Switch telemetry off, for this process and those that it starts.

    An inherited value is overwritten: there is no reason to let data out of a database server.
    """
    global _started
    off = os.environ.get(VARIABLE, "").lower() in _OFF
    _started = _started or ("onnxruntime" in sys.modules and not off)
    os.environ[VARIABLE] = "1"


def queue_folder() -> str:
    """Return the folder in which ONNX Runtime's telemetry keeps its device id and its queue."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, *_FOLDER)


def check() -> tuple[bool, str]:
    """Tell whether telemetry is off, and what to do where it is not, or was not once."""
    if _started:
        return False, (
            "ONNX Runtime was imported before pg_siamese in this session, with its telemetry on;"
            f" set {VARIABLE}=1 in the server's environment and restart the server"
        )
    folder = queue_folder()
    if os.path.lexists(folder):
        return False, (
            f'off, but an earlier version or another program left data to be sent in "{folder}";'
            " remove that directory"
        )
    return True, "off"
