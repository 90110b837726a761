"""Switch ONNX Runtime's telemetry off before it is imported, so that nothing leaves the server.

Since version 1.29 its Linux builds collect usage data. The import alone creates a device ID and an
upload queue in the user's cache folder. It also starts threads that send them over HTTPS. The
variable below prevents all of that, but only before the import. The API call comes too late.

The package itself imports this module, so it uses ``os`` and ``sys`` only.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "ORT_DISABLE_TELEMETRY"
# ONNX Runtime 1.31 accepts these values, of those that were tried. "0" and "2" don't work.
_OFF = ("1", "true", "yes")
_FOLDER = ("Microsoft", "DeveloperTools", ".onnxruntime")

_started = False


def switch_off() -> None:
    """Switch telemetry off, for this process and those that it starts.

    An inherited value is overwritten. There is no reason to let data out of a database server.
    """
    global _started
    off = os.environ.get(VARIABLE, "").lower() in _OFF
    _started = _started or ("onnxruntime" in sys.modules and not off)
    os.environ[VARIABLE] = "1"


def queue_folder() -> str:
    """Return the folder of ONNX Runtime's telemetry, with its device ID and queue."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, *_FOLDER)


def check() -> tuple[bool, str]:
    """Return whether telemetry is off, with what to do if it is not, or if it once was on."""
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
