"""DICOM files made for tests, byte by byte where the file is to be wrong."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Sequence
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

CT = "1.2.840.10008.5.1.4.1.1.2"
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
    uid.UID("1.2.840.10008.1.2.8.1"),
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


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Return a file with something wrong: bytes, lengths, its syntax, its end, nested sequences."""
    result = bytearray(data)
    header = min(len(result), 3000)
    match generator.randrange(7):
        case 0:
            for _ in range(generator.randrange(1, 40)):
                result[generator.randrange(len(result))] = generator.randrange(256)
        case 1:
            del result[generator.randrange(len(result)) :]
        case 2:
            for _ in range(generator.randrange(1, 12)):
                result[generator.randrange(header)] = generator.randrange(256)
        case 3:
            length = generator.choice([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(result)])
            struct.pack_into("<I", result, generator.randrange(132, header - 4), length)
        case 4:
            place = result.find(b"1.2.840.10008.1.2", 132)
            if place > 0:
                (length,) = struct.unpack_from("<H", result, place - 2)
                syntax = generator.choice(SYNTAXES).encode()
                syntax += b"\0" * (len(syntax) % 2)
                result[place - 2 : place + length] = struct.pack("<H", len(syntax)) + syntax
        case 5:
            place = generator.randrange(132, header)
            result[place:place] = nested(generator.choice([10, 100, 2000]))
        case _:
            place, other = generator.randrange(len(result)), generator.randrange(len(result))
            result[place : place + 100] = result[other : other + 100]
    return bytes(result)


def nested(depth: int) -> bytes:
    """Return the beginning of sequences in sequences, of explicit value representation."""
    sequence = struct.pack("<HH2sHI", 8, 0x1115, b"SQ", 0, 0xFFFFFFFF)
    return (sequence + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)) * depth


def _pixel_data(value: bytes) -> Any:
    from pydicom.dataelem import DataElement

    return DataElement(0x7FE00010, "OW", value + b"\0" * (len(value) % 2))
