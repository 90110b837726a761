"""Elements of a DICOM file as JSON: values of the types that they have, and never pixels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import PersonName

from pg_siamese_server.encoding.dicom import file
from pg_siamese_server.encoding.kinds import supported
from pg_siamese_server.encoding.opened import Poll
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import SiameseError, is_database_error

# How an image was made, and nothing of whom it shows (PS3.15 annex E keeps most of it).
KEYWORDS = (
    "SOPClassUID",
    "Modality",
    "BodyPartExamined",
    "AnatomicRegionSequence",
    "Laterality",
    "ImageLaterality",
    "ViewPosition",
    "PatientPosition",
    "PatientOrientation",
    "ImageType",
    "PresentationIntentType",
    "Manufacturer",
    "ManufacturerModelName",
    "MagneticFieldStrength",
    "ScanningSequence",
    "SequenceVariant",
    "RepetitionTime",
    "EchoTime",
    "KVP",
    "ConvolutionKernel",
    "ContrastBolusAgent",
    "SliceThickness",
    "SpacingBetweenSlices",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "PixelAspectRatio",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsStored",
    "WindowCenter",
    "WindowWidth",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "BurnedInAnnotation",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
)
# Bytes that are no text, and pixels among them.
_BINARY = frozenset(("OB", "OD", "OF", "OL", "OV", "OW", "UN", "OB or OW", "US or OW"))
_DATE = re.compile(r"(\d{4})\.?(\d{2})\.?(\d{2})")
_TIME = re.compile(r"(\d{2}):?(\d{2})?:?(\d{2})?(\.\d{1,6})?")
_DEEPEST = 4


def check_keyword(keyword: str) -> None:
    """Refuse what is no keyword of the standard (PS3.6)."""
    if tag_for_keyword(keyword) is None:
        raise SiameseError(
            f'"{keyword}" is not a DICOM keyword',
            hint="Keywords are listed in DICOM PS3.6, such as StudyDate or BodyPartExamined.",
        )


def read(data: bytes | None, keywords: Iterable[str], poll: Poll) -> dict[str, Any] | None:
    """Read elements by keyword.

    Args:
        data: an image file of any kind.
        keywords: of the standard. Those that the file lacks are left out, and so are bytes.
        poll: called while the file is read. May raise to leave.

    Returns:
        JSON values by keyword: numbers as numbers, dates and times as ISO 8601 text, person names
        as an object of their component groups, several values as an array, sequences as arrays of
        objects. None if the file is not DICOM, or not readable as such.
    """
    if data is None or supported(data) != "DICOM":
        return None
    try:
        _, elements, _, _ = file.read_elements(data, InputSpec(1, 1), poll)
    except SiameseError:
        return None
    except Exception as error:  # whatever pydicom meets in a damaged file, but not a cancel
        if is_database_error(error):
            raise
        return None
    return values(elements, keywords)


@file.quiet()
def values(elements: Dataset, keywords: Iterable[str]) -> dict[str, Any]:
    """Return elements of a data set that was read as JSON values by keyword, as ``read`` does."""
    return _object(elements, keywords)


def _object(
    elements: Dataset, keywords: Iterable[str] | None = None, depth: int = 0
) -> dict[str, Any]:
    result = {}
    names = [e.keyword for e in elements if not e.tag.is_private] if keywords is None else keywords
    for name in names:
        try:
            element = elements[name] if name and name in elements else None
            value = None if element is None else _value(element, depth)
        except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, LookupError):
            continue  # not of the type that it claims
        if value is not None:
            result[name] = value
    return result


def _value(element: DataElement, depth: int) -> Any:
    if element.VR in _BINARY or element.is_empty:
        return None
    if element.VR == "SQ":
        if depth == _DEEPEST:
            return None
        return [_object(item, depth=depth + 1) for item in element.value]
    if isinstance(element.value, MultiValue | list):
        return [_single(element.VR, value) for value in element.value]
    return _single(element.VR, element.value)


def _single(vr: str, value: Any) -> Any:
    if vr in ("IS", "SL", "SS", "SV", "UL", "US", "UV"):
        return int(value)
    if vr in ("DS", "FD", "FL"):
        number = float(value)
        if not math.isfinite(number):
            return None
        return int(number) if number == int(number) else number
    if vr == "PN":
        return _name(value)
    text = str(value).replace("\0", "").strip()
    if vr == "DA" and (found := _DATE.fullmatch(text)):
        return "-".join(found.groups())
    if vr == "TM" and (found := _TIME.fullmatch(text)):
        hour, minute, second, fraction = found.groups()
        return f"{hour}:{minute or '00'}:{second or '00'}{fraction or ''}"
    if vr == "DT" and (found := re.fullmatch(r"(\d{8})(\d{6})?(\.\d{1,6})?([+-]\d{4})?", text)):
        day, time, fraction, zone = found.groups()
        shown = f"{day[:4]}-{day[4:6]}-{day[6:]}"
        if time:
            shown += f"T{time[:2]}:{time[2:4]}:{time[4:]}{fraction or ''}"
        return shown + (f"{zone[:3]}:{zone[3:]}" if zone and time else "")
    return text


def _name(value: PersonName | str) -> dict[str, str]:
    """Return the component groups of a name that are there (PS3.5 section 6.2.1)."""
    name = value if isinstance(value, PersonName) else PersonName(str(value))
    groups = {
        "Alphabetic": name.alphabetic,
        "Ideographic": name.ideographic,
        "Phonetic": name.phonetic,
    }
    return {kind: str(text) for kind, text in groups.items() if text}
