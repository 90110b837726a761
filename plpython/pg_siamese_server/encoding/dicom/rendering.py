"""From stored values to 8 bits: modality, VOI, presentation (DICOM PS3.3 C.7.6.3, C.11)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut, convert_color_space

from pg_siamese_server.encoding import windows
from pg_siamese_server.encoding.dicom.file import File
from pg_siamese_server.encoding.dicom.frames import Pixels
from pg_siamese_server.encoding.opened import damaged
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError

Numbers = NDArray[np.float64]
# Values at a time of images that are too deep for a table of all values.
BLOCK = 1 << 20
# Around the padding value of lossy images: this share of the range is padding, too.
LOSSY_PADDING = 0.01
MAX_ASPECT = 16.0
# The standard's term, and what scanners write instead, spelt so.
_HOUNSFIELD = re.compile(r"HU|Hound?sfield( Units?)?", re.I)
# A coded string (PS3.5 section 6.2).
_TERM = re.compile(r"[A-Z0-9_ ]{1,16}")
_LOSSY = (
    uid.JPEGBaseline8Bit,
    uid.JPEGExtended12Bit,
    uid.JPEGLSNearLossless,
    uid.JPEG2000,
    uid.HTJ2K,
)


def render(file: File, frame: int, pixels: Pixels, spec: InputSpec) -> NDArray[np.uint8]:
    """Render stored values; uint8 (rows, columns) or (rows, columns, 3)."""
    if pixels.photometric == "PALETTE COLOR":
        return _palette(file, pixels)
    if pixels.values.ndim == 3:
        return _colour(pixels)
    if pixels.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise _unsupported(pixels)
    return _Grey(file, frame, pixels, spec).render()


def aspect(file: File, frame: int) -> float:
    """Return how many times as high as wide a pixel is (PS3.3 C.7.6.3.1.7, 10.7.1.3)."""
    measures = file.group("PixelMeasuresSequence", frame)
    for keyword, source in (
        ("PixelAspectRatio", None),
        ("PixelSpacing", measures),
        ("PixelSpacing", None),
        ("ImagerPixelSpacing", None),
        ("NominalScannedPixelSpacing", None),
    ):
        found = file.numbers(keyword, source)
        if len(found) == 2 and min(found) > 0 and math.isfinite(sum(found)):
            result = found[0] / found[1]
            return result if 1 / MAX_ASPECT <= result <= MAX_ASPECT else 1.0
    return 1.0


def _colour(pixels: Pixels) -> NDArray[np.uint8]:
    """Convert three samples to RGB (PS3.3 C.7.6.3.1.2); modality and VOI are for grey images."""
    values = pixels.values
    if pixels.bits > 8:
        values = (values & ((1 << pixels.bits) - 1)) >> (pixels.bits - 8)
    eight = np.ascontiguousarray(values, dtype=np.uint8)
    if pixels.photometric in ("YBR_FULL", "YBR_FULL_422"):
        eight = convert_color_space(eight, "YBR_FULL", "RGB")
    elif pixels.photometric != "RGB":
        raise _unsupported(pixels)
    return eight


def _unsupported(pixels: Pixels) -> ImageError:
    term = pixels.photometric
    if not _TERM.fullmatch(term):
        return damaged("DICOM", "Its PhotometricInterpretation is no valid term.")
    return ImageError(f'DICOM image of photometric interpretation "{term}" is not supported')


def _palette(file: File, pixels: Pixels) -> NDArray[np.uint8]:
    """Apply the palette (PS3.3 C.7.6.3.1.5), tables in segments included (C.7.9.2)."""
    elements = file.elements
    if file.byte_order == ">":
        elements = _swapped(elements)
    indices = _masked(pixels)
    if file.is_signed:
        indices = _signed(indices, pixels.bits)
    try:
        found = apply_color_lut(indices, elements)
    except Exception as error:
        raise damaged("DICOM", f"Its palette: {str(error)[:200].rstrip('.')}.") from None
    deep = file.numbers("RedPaletteColorLookupTableDescriptor")
    if found.dtype.itemsize > 1 and deep[-1:] != [8.0]:
        found = found >> 8
    return np.ascontiguousarray(found[..., :3], dtype=np.uint8)


def _swapped(elements: Dataset) -> Dataset:
    """Return the elements with the tables of a big-endian palette turned."""
    result = Dataset()
    result.update(elements)
    for colour in ("Red", "Green", "Blue"):
        for keyword in (
            f"{colour}PaletteColorLookupTableData",
            f"Segmented{colour}PaletteColorLookupTableData",
        ):
            data = elements.get(keyword)
            if isinstance(data, bytes):
                words = np.frombuffer(data[: len(data) // 2 * 2], np.uint16)
                setattr(result, keyword, words.byteswap().tobytes())
    return result


def _masked(pixels: Pixels) -> NDArray[Any]:
    """Return the bits that count: overlays and garbage may be above them (PS3.5 8.1.1)."""
    if pixels.values.dtype.kind == "f" or pixels.bits == 8 * pixels.values.dtype.itemsize:
        return pixels.values
    masked: NDArray[Any] = pixels.values & pixels.values.dtype.type((1 << pixels.bits) - 1)
    return masked


def _signed(values: NDArray[Any], bits: int) -> NDArray[np.int64]:
    result = values.astype(np.int64)
    return result - ((result >> (bits - 1)) << bits)


class _Grey:
    """The pipeline of a grey image."""

    def __init__(self, file: File, frame: int, pixels: Pixels, spec: InputSpec) -> None:
        self.file, self.frame, self.spec = file, frame, spec
        self.pixels = pixels
        self.values = _masked(pixels)
        self.is_table = self.values.dtype.kind == "u" and self.values.dtype.itemsize <= 2
        self.padding = self._padding()

    def render(self) -> NDArray[np.uint8]:
        """Render by a table of all possible values if there are few, else block by block."""
        show = self._voi()
        if self.is_table:
            table = show(self._stored(np.arange(1 << self.pixels.bits)))
            return np.asarray(table[self.values], dtype=np.uint8)
        result = np.empty(self.values.shape, np.uint8)
        flat, shown = self.values.reshape(-1), result.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            part = slice(start, start + BLOCK)
            shown[part] = show(self._stored(flat[part]))
        return result

    def _stored(self, values: NDArray[Any]) -> Numbers:
        """Return stored values as numbers, with their sign."""
        if self.file.is_signed and values.dtype.kind != "f":
            values = _signed(values, self.pixels.bits)
        return values.astype(np.float64)

    def _range(self) -> tuple[float, float]:
        """Return the least and the largest number that a stored value can be."""
        bits = self.pixels.bits
        if self.values.dtype.kind == "f":
            return -math.inf, math.inf
        if self.file.is_signed:
            return float(-(1 << bits - 1)), float((1 << bits - 1) - 1)
        return 0.0, float((1 << bits) - 1)

    def _voi(self) -> Callable[[Numbers], NDArray[np.uint8]]:
        """Return what turns stored values into 8 bits."""
        modality = self._modality()
        voi = self._asked() or self._lut(modality) or self._window(0) or self._own_range(modality)
        inverse = str(self.file.value("PresentationLUTShape") or "").strip().upper() == "INVERSE"
        is_inverted = self.pixels.photometric == "MONOCHROME1" or inverse

        def show(stored: Numbers) -> NDArray[np.uint8]:
            shown = np.floor(np.clip(voi(modality(stored)), 0, 255) + 0.5)
            if is_inverted:
                shown = 255 - shown
            return np.nan_to_num(shown).astype(np.uint8)

        return show

    def _modality(self) -> Callable[[Numbers], Numbers]:
        """Return the modality transformation (PS3.3 C.7.6.16.2.9, C.11.1)."""
        file = self.file
        group = file.group("PixelValueTransformationSequence", self.frame)
        lut = None if group else file.item("ModalityLUTSequence")
        table = None if lut is None else self._table(lut, *self._range())
        if table is not None:
            return lambda stored: _looked_up(table, stored)
        slope = (file.numbers("RescaleSlope", group) or [1.0])[0]
        intercept = (file.numbers("RescaleIntercept", group) or [0.0])[0]
        if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
            slope, intercept = 1.0, 0.0
        return lambda stored: stored * slope + intercept

    def _asked(self) -> Callable[[Numbers], Numbers] | None:
        """Return the window that was asked for. None if it has no meaning for this file."""
        if self.spec.dicom_window is None:
            return None
        match windows.parse(self.spec.dicom_window):
            case windows.Fixed(centre, width, is_preset):
                return None if is_preset and not self._is_hounsfield() else _linear(centre, width)
            case windows.Numbered(number):
                return self._window(number - 1)
            case windows.Explained(explanation):
                group = self.file.group("FrameVOILUTSequence", self.frame)
                texts = self.file.texts("WindowCenterWidthExplanation", group)
                names = [text.casefold() for text in texts]
                return self._window(names.index(explanation)) if explanation in names else None

    def _is_hounsfield(self) -> bool:
        """Return whether modality values are Hounsfield units (PS3.3 C.8.2.1, C.11.1.1.2)."""
        file = self.file
        group = file.group("PixelValueTransformationSequence", self.frame)
        lut = file.item("ModalityLUTSequence")
        unit = file.texts("RescaleType", group) or file.texts("ModalityLUTType", lut)
        if unit:
            return _HOUNSFIELD.fullmatch(unit[0]) is not None
        # A CT image has to name its unit unless it is this one.
        return file.texts("Modality") == ["CT"] and bool(file.numbers("RescaleIntercept", group))

    def _lut(self, modality: Callable[[Numbers], Numbers]) -> Callable[[Numbers], Numbers] | None:
        """Return the first VOI LUT (PS3.3 C.11.2.1.1)."""
        if self.file.group("FrameVOILUTSequence", self.frame) is not None:
            return None
        item = self.file.item("VOILUTSequence")
        ends = modality(np.asarray(self._range()))
        table = None if item is None else self._table(item, float(ends.min()), float(ends.max()))
        if item is None or table is None:
            return None
        bits = self._descriptor(item)[2]
        largest = float((1 << bits) - 1)
        return lambda values: _looked_up(table, values) * (255 / largest)

    def _descriptor(self, item: Dataset) -> tuple[int, int, int]:
        numbers = self.file.numbers("LUTDescriptor", item)
        if len(numbers) != 3:
            return 0, 0, 0
        count, first, bits = (int(number) for number in numbers)
        return count % 65536 or 65536, first, bits

    def _table(self, item: Dataset, low: float, high: float) -> tuple[int, Numbers] | None:
        """Return a table's first value and entries, or None if it has no valid ones.

        The first value has a sign if the table's input, from ``low`` to ``high``, has one. The
        input of a VOI LUT can be negative although no stored value is (PS3.3 C.11.2.1.1).
        """
        count, first, bits = self._descriptor(item)
        if first > 32767 and low < 0 and first > high:
            first -= 65536
        data = self.file.value("LUTData", item)
        if not 1 <= bits <= 16 or data is None:
            return None
        if isinstance(data, bytes):
            order = self.file.byte_order
            wide = len(data) >= 2 * count
            entries = np.frombuffer(data[: count * (2 if wide else 1)], f"{order}u{1 + wide}")
        else:
            entries = np.asarray(data)
        if entries.ndim != 1 or not len(entries) or entries.dtype.kind not in "ui":
            return None
        return first, (entries[:count].astype(np.int64) & 0xFFFF).astype(np.float64)

    def _window(self, place: int) -> Callable[[Numbers], Numbers] | None:
        """Return one of the file's windows (PS3.3 C.11.2.1.2, C.7.6.16.2.10).

        None if there is none at this place, or if it has no width.
        """
        group = self.file.group("FrameVOILUTSequence", self.frame)
        centres = self.file.numbers("WindowCenter", group)
        widths = self.file.numbers("WindowWidth", group)
        if place >= min(len(centres), len(widths)):
            return None
        centre, width = centres[place], widths[place]
        if not (math.isfinite(centre) and math.isfinite(width)) or width <= 0:
            return None
        function = str(self.file.value("VOILUTFunction", group) or "LINEAR").strip().upper()
        if function == "SIGMOID":
            return lambda values: (
                255 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
            )
        return _linear(centre, width, is_exact=function == "LINEAR_EXACT")

    def _own_range(self, modality: Callable[[Numbers], Numbers]) -> Callable[[Numbers], Numbers]:
        """Return the range of a file without VOI: the encoder's, else that of the picture."""
        if self.spec.input_range is not None:
            low, high = self.spec.input_range
        else:
            low, high = self._extremes(modality)
        if low == high:
            return np.zeros_like
        return lambda values: (values - low) * (255 / (high - low))

    def _extremes(self, modality: Callable[[Numbers], Numbers]) -> tuple[float, float]:
        """Return the least and the largest modality value, padding left out."""
        if self.is_table:
            counts = np.bincount(self.values.reshape(-1), minlength=1 << self.pixels.bits)
            stored = self._stored(np.flatnonzero(counts))
        else:
            stored = self._stored(self.values.reshape(-1))
            stored = stored[np.isfinite(stored)]
        if not len(stored):
            return 0.0, 0.0
        if self.padding is not None:
            low, high = self.padding
            if self._is_lossy():
                margin = LOSSY_PADDING * (float(stored.max()) - float(stored.min()))
                low, high = low - margin, high + margin
            kept = stored[(stored < low) | (stored > high)]
            stored = kept if len(kept) else stored
        shown = modality(np.asarray([stored.min(), stored.max()]) if len(stored) else stored)
        return float(shown.min()), float(shown.max())

    def _padding(self) -> tuple[float, float] | None:
        """Return the range of stored values that is padding (PS3.3 C.7.5.1.1.2)."""
        found = [
            numbers[0]
            for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")
            if (numbers := self.file.numbers(keyword))
        ]
        if not found:
            return None
        bits = self.pixels.bits
        low, high = self._range()
        # Some write -2000 as 63536, or as 2096 of 12 bits, and 63536 as -2000.
        width = 2 ** (16 if bits <= 16 else 32)
        turns = (0, -width, width, -(2**bits))
        found = [
            next((value + turn for turn in turns if low <= value + turn <= high), value)
            for value in found
        ]
        return min(found), max(found)

    def _is_lossy(self) -> bool:
        return (
            self.file.syntax in _LOSSY
            or str(self.file.value("LossyImageCompression") or "").strip() == "01"
        )


def _linear(centre: float, width: float, *, is_exact: bool = False) -> Callable[[Numbers], Numbers]:
    """Return the function LINEAR or LINEAR_EXACT (PS3.3 C.11.2.1.2.1, C.11.2.1.3.2)."""
    if is_exact or width < 1:
        return lambda values: ((values - centre) / width + 0.5) * 255
    if width == 1:
        return lambda values: np.where(values > centre - 0.5, 255.0, 0.0)
    return lambda values: ((values - (centre - 0.5)) / (width - 1) + 0.5) * 255


def _looked_up(table: tuple[int, Numbers], values: Numbers) -> Numbers:
    """Return entries of a table; values beyond its ends get the first and the last one."""
    first, entries = table
    places = np.clip(np.nan_to_num(values) - first, 0, len(entries) - 1)
    return np.asarray(entries[places.astype(np.int64)])
