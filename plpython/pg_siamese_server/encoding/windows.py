"""Windows that a caller or a collection asks for when DICOM images are rendered.

This needs no DICOM library, since texts are checked before any image is read.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

from pg_siamese_server.errors import SiameseError

# Centre and width in Hounsfield units, from Radiopaedia, "Windowing (CT)", section "Typical window
# width and level values" (https://radiopaedia.org/articles/windowing-ct). The abdomen's is that of
# its soft tissues, the stroke's is the wider of the two.
PRESETS = {
    "abdomen": (50.0, 400.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "liver": (30.0, 150.0),
    "lung": (-600.0, 1500.0),
    "mediastinum": (50.0, 350.0),
    "stroke": (40.0, 40.0),
}
EXPLANATION = "explanation:"
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
_PAIR = re.compile(rf"\s*({_NUMBER})\s*/\s*({_NUMBER})\s*", re.ASCII | re.I)


class Fixed(NamedTuple):
    """A window of its own, whatever the file says. Presets are for Hounsfield units only."""

    centre: float
    width: float
    is_preset: bool = False


class Numbered(NamedTuple):
    """One of the file's own windows, from 1."""

    number: int


class Explained(NamedTuple):
    """The file's own window with this Window Center & Width Explanation (0028,1055)."""

    explanation: str


Window = Fixed | Numbered | Explained


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Window:
    """Return the window that a text names.

    Args:
        text: a name of ``PRESETS``, ``CENTER/WIDTH``, the number of one of the file's windows, or
            ``explanation:`` and the explanation of one. Capitals do not matter.

    Raises:
        SiameseError: 22023, it names none.
    """
    name = text.strip().casefold()
    if name in PRESETS:
        return Fixed(*PRESETS[name], is_preset=True)
    if pair := _PAIR.fullmatch(text):
        centre, width = float(pair[1]), float(pair[2])
        if not math.isfinite(centre) or not 0 < width < math.inf:
            raise SiameseError(
                f'window "{text}" is out of range',
                hint="Give a center and a width above 0, such as 40/400.",
            )
        return Fixed(centre, width)
    if re.fullmatch(r"[1-9]\d{0,3}", name, re.ASCII):
        return Numbered(int(name))
    explanation = name.removeprefix(EXPLANATION).strip()
    if name.startswith(EXPLANATION) and explanation:
        return Explained(explanation)
    raise SiameseError(
        f'unknown window "{text}"',
        detail=f"Presets are {', '.join(PRESETS)}.",
        hint="Give a preset, CENTER/WIDTH such as 40/400, the number of one of the file's own"
        f" windows, or {EXPLANATION}TEXT.",
    )
