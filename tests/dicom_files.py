"""DICOM files made for tests, byte by byte where the file is to be wrong."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

CT = "1.2.840.10008.5.1.4.1.1.2"
# Later than pydicom's dictionary.
DEFLATED_FRAME = uid.UID("1.2.840.10008.1.2.8.1")
ENCAPSULATED = uid.UID("1.2.840.10008.1.2.1.98")
SYNTAXES = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGBaseline8Bit,
    uid.JPEGExtended12Bit,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
    uid.HTJ2K,
    DEFLATED_FRAME,
    ENCAPSULATED,
)


def written(dataset: Dataset, syntax: str = uid.ExplicitVRLittleEndian) -> bytes:
    """Return a data set as the bytes of a DICOM file."""
    target = io.BytesIO()
    filed(dataset, syntax).save_as(target, enforce_file_format=True)
    return target.getvalue()


def filed(dataset: Dataset, syntax: str = uid.ExplicitVRLittleEndian) -> Dataset:
    """Return a data set with what a file says of itself."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.UID(syntax)
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta = meta
    return dataset


def dataset(pixels: NDArray[Any], **elements: Any) -> Dataset:
    """Return an image of stored values: (rows, columns), or (rows, columns, 3)."""
    result = Dataset()
    result.SOPClassUID, result.SOPInstanceUID = CT, "1.2.3.4"
    result.Rows, result.Columns = pixels.shape[:2]
    result.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    if pixels.ndim == 3:
        result.PlanarConfiguration = 0
    bits = 8 * pixels.dtype.itemsize
    result.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    result.BitsAllocated, result.BitsStored, result.HighBit = bits, bits, bits - 1
    result.PixelRepresentation = int(pixels.dtype.kind == "i")
    result["PixelData"] = _pixel_data(pixels.tobytes())
    for keyword, value in elements.items():
        setattr(result, keyword, value)
    if "BitsStored" in elements:
        result.HighBit = elements["BitsStored"] - 1
    return result


def image(
    pixels: NDArray[Any], syntax: str = uid.ExplicitVRLittleEndian, /, **elements: Any
) -> bytes:
    """Return an uncompressed DICOM file."""
    return written(dataset(pixels, **elements), syntax)


def instance(number: int, *, patient: str = "p 1", **elements: Any) -> Dataset:
    """Return a picture with what archives ask for: one patient, study and series."""
    place = np.arange(32)
    blob = np.exp(-((place[:, None] - number % 32) ** 2 + (place - number // 32 % 32) ** 2) / 60)
    given = {
        "SOPInstanceUID": f"1.2.826.0.1.{number}",
        "PatientID": patient,
        "PatientName": f"Name^of {patient}",
        "StudyInstanceUID": f"1.2.826.0.2.{patient.split()[-1]}",
        "SeriesInstanceUID": f"1.2.826.0.3.{patient.split()[-1]}",
        "StudyID": "1",
        "StudyDate": "20240229",
        "StudyTime": "101530",
        "SeriesNumber": "1",
        "InstanceNumber": str(number),
        "Modality": "CT",
        "BodyPartExamined": "CHEST",
        "Manufacturer": "Maker",
        "ManufacturerModelName": "Model 7",
    }
    return dataset((4095 * blob).astype(np.uint16), **given | elements)


def report(number: int) -> Dataset:
    """Return a structured report: an instance without pixels."""
    result = Dataset()
    result.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    result.SOPInstanceUID = f"1.2.826.0.4.{number}"
    return result


def frames(
    stack: NDArray[Any], syntax: str = uid.ExplicitVRLittleEndian, /, **elements: Any
) -> bytes:
    """Return an uncompressed DICOM file of several frames: (frames, rows, columns)."""
    values = {"NumberOfFrames": len(stack), "PixelData": stack.tobytes(), **elements}
    return image(stack[0], syntax, **values)


def compressed(
    frames: Sequence[bytes | bytearray],
    like: NDArray[Any],
    syntax: str,
    has_table: bool = True,
    /,
    **elements: Any,
) -> bytes:
    """Return a DICOM file of compressed frames; ``like`` is one of them, decoded."""
    result = dataset(like, **elements)
    result["PixelData"] = _pixel_data(
        encapsulate([bytes(frame) for frame in frames], has_bot=has_table)
    )
    result["PixelData"].is_undefined_length = True
    if len(frames) > 1:
        result.NumberOfFrames = len(frames)
    if syntax in (DEFLATED_FRAME, ENCAPSULATED):  # pydicom would not write these
        return with_syntax(written(result, uid.RLELossless), syntax)
    return written(result, syntax)


def rle(pixels: NDArray[Any]) -> bytes:
    """Encode a grey frame (PS3.5 annex G)."""
    size = pixels.dtype.itemsize
    planes = pixels.astype(f">u{size}").view(np.uint8).reshape(-1, size).T
    segments = [imagecodecs.packbits_encode(plane.tobytes()) for plane in planes]
    segments = [segment + b"\0" * (len(segment) % 2) for segment in segments]
    offsets = np.cumsum([64, *map(len, segments[:-1])]).tolist()
    header = struct.pack("<16I", len(segments), *offsets, *[0] * (15 - len(segments)))
    return header + b"".join(segments)


def with_syntax(data: bytes, syntax: str) -> bytes:
    """Return a file that names another transfer syntax than that of its pixels."""
    place = data.find(b"1.2.840.10008.1.2", 132)
    if place < 0:
        return data
    (length,) = struct.unpack_from("<H", data, place - 2)
    name = syntax.encode() + b"\0" * (len(syntax) % 2)
    return data[: place - 2] + struct.pack("<H", len(name)) + name + data[place + length :]


def deflated(data: bytes) -> bytes:
    """Deflate bytes, without a header."""
    return zlib.compress(data, 9, -zlib.MAX_WBITS)


def windowed(values: NDArray[Any], centre: float, width: float) -> NDArray[np.int64]:
    """Return the standard's LINEAR function, written out (PS3.3 C.11.2.1.2.1)."""
    shares = (values - (centre - 0.5)) / (width - 1) + 0.5
    return np.floor(np.clip(shares, 0, 1) * 255 + 0.5).astype(np.int64)


def twins() -> dict[str, Callable[[NDArray[np.uint16]], bytes]]:
    """Return makers of files that show the same picture of 12 bits in other ways."""
    window = {"WindowCenter": "2048", "WindowWidth": "4096"}

    def palette(values: NDArray[np.uint16]) -> bytes:
        entries = windowed(np.arange(4096), 2048, 4096).astype("<u2") * 257
        tables = {
            f"{colour}PaletteColorLookupTable{part}": value
            for colour in ("Red", "Green", "Blue")
            for part, value in (("Descriptor", [4096, 0, 16]), ("Data", entries.tobytes()))
        }
        return image(values, PhotometricInterpretation="PALETTE COLOR", BitsStored=12, **tables)

    def encoded(syntax: str, encode: Callable[..., bytes | bytearray], **options: Any) -> Any:
        return lambda values: compressed(
            [encode(values, **options)], values, syntax, BitsStored=12, **window
        )

    return {
        "12 bits in 16": lambda v: image(v, BitsStored=12, **window),
        "garbage above": lambda v: image(v | np.uint16(0xA000), BitsStored=12, **window),
        "signed": lambda v: image(v.astype(np.int16) - 2048, WindowCenter="0", WindowWidth="4096"),
        "intercept": lambda v: image(
            v, RescaleIntercept="-1024", WindowCenter="1024", WindowWidth="4096"
        ),
        "MONOCHROME1": lambda v: image(
            4095 - v,
            PhotometricInterpretation="MONOCHROME1",
            WindowCenter="2048",
            WindowWidth="4096",
        ),
        "32 bits": lambda v: image(v.astype(np.uint32), **window),
        "palette": palette,
        **{
            str(syntax.name): (lambda v, syntax=syntax: image(v, syntax, BitsStored=12, **window))
            for syntax in SYNTAXES[:2] + SYNTAXES[3:4]
        },
        "RLE": encoded(uid.RLELossless, rle),
        "Deflated Image Frame": encoded(DEFLATED_FRAME, lambda v: deflated(v.tobytes())),
        "Encapsulated Uncompressed": encoded(ENCAPSULATED, lambda v: v.tobytes()),
        "JPEG lossless": encoded(
            uid.JPEGLosslessSV1,
            imagecodecs.jpeg8_encode,
            lossless=True,
            bitspersample=12,
            predictor=1,
        ),
        "JPEG-LS": encoded(uid.JPEGLSLossless, imagecodecs.jpegls_encode),
        "JPEG 2000": encoded(
            uid.JPEG2000Lossless,
            imagecodecs.jpeg2k_encode,
            level=0,
            codecformat="j2k",
            bitspersample=12,
        ),
    }


def _pixel_data(value: bytes) -> Any:
    from pydicom.dataelem import DataElement

    return DataElement(0x7FE00010, "OW", value + b"\0" * (len(value) % 2))
