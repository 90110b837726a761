"""DICOM files: the standard's rendering, refusals by name, guards against hostile ones."""

from __future__ import annotations

import io
import random
import re
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread, uid
from pydicom._uid_dict import UID_dictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from pg_siamese_server.encoding import dicom, windows
from pg_siamese_server.encoding.dicom import file, frames, tags
from pg_siamese_server.encoding.identifying import IDENTIFYING
from pg_siamese_server.encoding.images import (
    MAX_FRAMES,
    decode_frames,
    decode_image,
    render_image,
)
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError, SiameseError
from tests import damaged_dicom as damaged
from tests import dicom_files as made
from tests.support import encode
from tools.project import ROOT

REAL = ROOT.parent / "shared" / "data" / "dicom"
SERIES = ROOT.parent / "shared" / "data" / "dicom_series" / "covid19_ny_sbu"
SIDE = 32
SPEC = InputSpec(SIDE, SIDE, channels=1)
REFUSED = {
    "pm_float": "parametric map",
    "rtdose_32bit_multiframe": "RT dose grid",
    "seg_1bit_not_byte_aligned": "segmentation",
    "seg_labelmap": "label map segmentation",
    "sm_tiled_full_multiframe": "slide of 25 tiles",
}
LOSSY = ("baseline", "extended", "lossy", "near", "ict", "ybr", "photo", "colour", "tile")


def shown(data: bytes, spec: InputSpec = SPEC) -> NDArray[np.int64]:
    return decode_image(data, spec)[..., 0].astype(np.int64)


def ramp(low: int, high: int, dtype: Any = np.int16) -> NDArray[Any]:
    return np.linspace(low, high, SIDE * SIDE).round().astype(dtype).reshape(SIDE, SIDE)


@pytest.mark.parametrize("name", sorted(path.stem for path in REAL.glob("*.dcm")) or [None])
def test_reference_renderings(name: str | None) -> None:
    if name is None:
        pytest.skip("needs the DICOM files beside the project (shared/data/dicom)")
    data = (REAL / f"{name}.dcm").read_bytes()
    spec = InputSpec(224, 224)
    if name in REFUSED:
        with pytest.raises(ImageError, match=REFUSED[name]):
            decode_image(data, spec)
        return
    reference = decode_image((REAL / "ref" / f"{name}.png").read_bytes(), spec)
    shown = decode_image(data, spec, frame=1)  # what the references show
    difference = np.abs(shown.astype(int) - reference).mean()
    assert difference <= (1.5 if any(kind in name for kind in LOSSY) else 1.0)


def test_window() -> None:
    values = ramp(-1000, 1000)
    elements = {"RescaleSlope": "2", "RescaleIntercept": "-50"}
    data = made.image(values, WindowCenter=["40", "300"], WindowWidth=["400", "1500"], **elements)
    assert np.array_equal(shown(data), made.windowed(values * 2 - 50, 40, 400))


def test_window_functions() -> None:
    values = ramp(0, 4000, np.uint16)
    window = {"WindowCenter": "2000", "WindowWidth": "1000"}
    sigmoid = shown(made.image(values, VOILUTFunction="SIGMOID", **window))
    expected = 255 / (1 + np.exp(-4 * (values.astype(float) - 2000) / 1000))
    assert np.array_equal(sigmoid, np.floor(expected + 0.5))
    exact = shown(made.image(values, VOILUTFunction="LINEAR_EXACT", **window))
    expected = np.clip((values.astype(float) - 2000) / 1000 + 0.5, 0, 1) * 255
    assert np.array_equal(exact, np.floor(expected + 0.5))


@pytest.mark.parametrize("width", ["0", "-5", ""])
def test_window_without_width_is_none(width: str) -> None:
    values = ramp(100, 900, np.uint16)
    expected = shown(made.image(values))
    assert expected.min() == 0 and expected.max() == 255
    assert np.array_equal(shown(made.image(values, WindowCenter="3", WindowWidth=width)), expected)


def test_padding_is_no_part_of_the_range() -> None:
    values = ramp(0, 1000)
    expected = shown(made.image(values))
    padded = values.copy()
    padded[:4] = -2000
    found = shown(made.image(padded, PixelPaddingValue=-2000))
    assert not found[:4].any()
    share = (values[4:] - values[4:].min()) / (values[4:].max() - values[4:].min())
    assert np.array_equal(found[4:], np.floor(share * 255 + 0.5))
    assert np.abs(found[4:] - expected[4:]).max() < 40


@pytest.mark.parametrize(
    ("dtype", "bits", "stored", "vr", "value"),
    [
        (np.int16, 16, -2000, "SS", -2000),
        (np.int16, 16, -2000, "US", 63536),
        (np.int16, 12, -2000, "US", 2096),
        (np.int16, 12, -2000, "US", 63536),
        (np.uint16, 16, 63536, "US", 63536),
        (np.uint16, 16, 63536, "SS", -2000),
    ],
)
def test_padding_in_other_words(dtype: Any, bits: int, stored: int, vr: str, value: int) -> None:
    """Whether its value is written with a sign or without says nothing of what is stored."""
    values = ramp(0, 1000, dtype)
    values[:4] = stored
    dataset = made.dataset(values, BitsStored=bits)
    dataset.add_new("PixelPaddingValue", vr, value)
    shares = (values[4:] - float(values[4:].min())) / (values[4:].max() - values[4:].min())
    found = shown(made.written(dataset))
    assert np.array_equal(found[4:], np.floor(shares * 255 + 0.5))


@pytest.mark.parametrize("syntax", made.SYNTAXES[:2])
@pytest.mark.parametrize(("vr", "first"), [("SS", -1024), ("US", 64512)])
def test_a_voi_table_of_negative_values(syntax: str, vr: str, first: int) -> None:
    """Its input can be negative although the stored values are not."""
    values = ramp(0, 4095, np.uint16)
    table = np.linspace(65535, 0, 4096).round().astype("<u2")
    item = Dataset()
    item.add_new("LUTDescriptor", vr, [4096, first, 16])
    item.add_new("LUTData", "OW", table.tobytes())
    found = shown(
        made.image(
            values,
            syntax,
            BitsStored=12,
            RescaleIntercept="-1024",
            RescaleSlope="1",
            VOILUTSequence=Sequence([item]),
        )
    )
    assert np.array_equal(found, np.floor(table[values] * (255 / 65535) + 0.5))


def test_range_of_the_encoder_serves_files_without_a_window() -> None:
    values = ramp(0, 2000)
    spec = InputSpec(SIDE, SIDE, channels=1, input_range=(0.0, 4000.0))
    assert shown(made.image(values), spec).max() == 128
    data = made.image(values, WindowCenter="1000", WindowWidth="2000")
    assert shown(data, spec).max() == 255


def test_voi_and_modality_tables() -> None:
    values = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
    item = Dataset()
    item.LUTDescriptor = [256, 0, 16]
    table = np.array([65535 - 257 * value for value in range(256)], dtype="<u2")
    item.add_new("LUTData", "OW", table.tobytes())
    assert np.array_equal(
        shown(made.image(values, VOILUTSequence=Sequence([item]))), 255 - values.astype(int)
    )
    item.ModalityLUTType = "US"
    found = shown(
        made.image(
            values, ModalityLUTSequence=Sequence([item]), WindowCenter="32768", WindowWidth="65536"
        )
    )
    assert np.abs(found - (255 - values.astype(int))).max() <= 1


@pytest.mark.parametrize("name", list(made.twins()))
def test_the_same_picture_in_other_words(name: str) -> None:
    values = ramp(0, 4095, np.uint16)
    expected = made.windowed(values, 2048, 4096)
    found = shown(made.twins()[name](values))
    assert np.abs(found - expected).max() <= 1


def test_colour() -> None:
    generator = np.random.default_rng(0)
    rgb = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    spec = InputSpec(SIDE, SIDE)
    assert np.array_equal(decode_image(made.image(rgb), spec), rgb)
    planes = made.image(rgb, PlanarConfiguration=1, PixelData=rgb.transpose(2, 0, 1).tobytes())
    assert np.array_equal(decode_image(planes, spec), rgb)
    deep = made.image(rgb.astype(np.uint16) * 257)
    assert np.array_equal(decode_image(deep, spec), rgb)
    # A rescale of colour has no meaning.
    assert np.array_equal(decode_image(made.image(rgb, RescaleIntercept="-1024"), spec), rgb)
    grey = np.stack([ramp(0, 255, np.uint8), *[np.full((SIDE, SIDE), 128, np.uint8)] * 2], axis=-1)
    found = decode_image(made.image(grey, PhotometricInterpretation="YBR_FULL"), spec)
    assert np.abs(found.astype(int) - grey[..., :1]).max() <= 1


def frame_values(count: int) -> list[NDArray[np.uint8]]:
    return [np.full((SIDE, SIDE), 10 * number, np.uint8) for number in range(1, count + 1)]


def test_frames() -> None:
    parts = frame_values(5)
    together = b"".join(part.tobytes() for part in parts)
    window = {"WindowCenter": "128", "WindowWidth": "256"}
    many = {"NumberOfFrames": 5, "PixelData": together, **window}
    assert shown(made.image(parts[0], **many))[0, 0] == 30  # the middle one
    data = made.image(parts[0], RepresentativeFrameNumber=2, **many)
    assert shown(data)[0, 0] == 20
    streams = [imagecodecs.jpegls_encode(part) for part in parts]
    for has_table in (True, False):
        data = made.compressed(streams, parts[0], uid.JPEGLSLossless, has_table, **window)
        assert shown(data)[0, 0] == 30


def test_all_frames_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = frame_values(5)
    window = {"WindowCenter": "128", "WindowWidth": "256"}
    streams = [imagecodecs.jpegls_encode(part) for part in parts]
    native = made.frames(np.stack(parts), RepresentativeFrameNumber=2, **window)
    for data, chosen in (
        (native, 2),
        (made.compressed(streams, parts[0], uid.JPEGLSLossless, False, **window), 3),
        (made.compressed(streams, parts[0], uid.JPEGLSLossless, True, **window), 3),
    ):
        found = decode_frames(data, SPEC)
        assert (found.count, found.representative) == (5, chosen)
        for number, pixels in enumerate(found.pixels, 1):
            assert np.array_equal(pixels, decode_image(data, SPEC, frame=number))
            assert pixels[0, 0] == 10 * number
        assert number == 5

    decoded: list[int] = []
    decode = dicom.decode

    def note(file: Any, frame: int, *arguments: Any, **options: Any) -> Any:
        decoded.append(frame)
        return decode(file, frame, *arguments, **options)

    monkeypatch.setattr(dicom, "decode", note)
    found = decode_frames(native, SPEC)
    assert decoded == []
    next(found.pixels)
    assert decoded == [0]


@pytest.mark.parametrize(
    "name", sorted({path.stem for path in REAL.glob("*.dcm")} - set(REFUSED)) or [None]
)
def test_frames_of_real_files(name: str | None) -> None:
    if name is None:
        pytest.skip("needs the DICOM files beside the project (shared/data/dicom)")
    data = (REAL / f"{name}.dcm").read_bytes()
    found = decode_frames(data, SPEC)
    pixels = list(found.pixels)
    assert len(pixels) == found.count
    for number in {1, found.count // 2 + 1, found.count}:
        assert np.array_equal(pixels[number - 1], decode_image(data, SPEC, frame=number))
    assert np.array_equal(pixels[found.representative - 1], decode_image(data, SPEC))


def test_other_formats_have_one_frame() -> None:
    target = io.BytesIO()
    pages = [Image.fromarray(part) for part in frame_values(3)]
    pages[0].save(target, "GIF", save_all=True, append_images=pages[1:])
    found = decode_frames(target.getvalue(), SPEC)
    assert (found.count, found.representative) == (1, 1)
    (pixels,) = found.pixels
    assert np.array_equal(pixels, decode_image(target.getvalue(), SPEC, frame=1))
    with pytest.raises(ImageError, match="frame 2 is out of range") as caught:
        decode_image(target.getvalue(), SPEC, frame=2)
    assert caught.value.detail == "The image has 1 frame."


def test_frames_out_of_range() -> None:
    data = made.frames(np.stack(frame_values(5)))
    for number in (6, -1):
        with pytest.raises(ImageError, match=f"frame {number} is out of range") as caught:
            decode_image(data, SPEC, frame=number)
        assert caught.value.detail == "The image has 5 frames."
        assert caught.value.sqlstate == "22023"


def test_too_many_frames() -> None:
    data = made.image(np.zeros((1, 1), np.uint8), NumberOfFrames=MAX_FRAMES + 1)
    with pytest.raises(ImageError, match=f"has {MAX_FRAMES + 1} frames") as caught:
        decode_frames(data, SPEC)
    assert caught.value.sqlstate == "54000"


def test_a_frame_that_is_cut_short() -> None:
    values = np.stack(frame_values(5))
    found = decode_frames(made.frames(values, PixelData=values[:4].tobytes()), SPEC)
    for _ in range(4):
        next(found.pixels)
    with pytest.raises(ImageError, match="cannot be decoded") as caught:
        next(found.pixels)
    assert "cut short" in str(caught.value.detail)


def encapsulated(table: bytes, fragments: list[bytes], **elements: Any) -> bytes:
    """Return a file of three frames of JPEG-LS, with an offset table and fragments as given."""
    items = [
        b"\xfe\xff\x00\xe0" + struct.pack("<I", len(each)) + each for each in (table, *fragments)
    ]
    dataset = made.dataset(np.zeros((SIDE, SIDE), np.uint8), NumberOfFrames=3, **elements)
    dataset["PixelData"].value = b"".join(items) + b"\xfe\xff\xdd\xe0\0\0\0\0"
    dataset["PixelData"].is_undefined_length = True
    return made.written(dataset, uid.JPEGLSLossless)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("padding", [0, 2, 6])
@pytest.mark.parametrize("table", ["right", "none", "zeros", "after items", "backwards", "nowhere"])
def test_offset_tables_that_are_wrong(table: str, padding: int, parts: int) -> None:
    """Frames are found without the table, and after padding of any length."""
    shown_as = {"WindowCenter": "128", "WindowWidth": "256"}
    pictures = [ramp(0, top, np.uint8) for top in (50, 150, 250)]
    streams = [bytes(imagecodecs.jpegls_encode(picture)) for picture in pictures]
    streams = [each + bytes(len(each) % 2 + padding) for each in streams]
    cuts = [len(each) // 4 * 2 if parts == 2 else len(each) for each in streams]
    pairs = zip(streams, cuts, strict=True)
    fragments = [part for each, cut in pairs for part in (each[:cut], each[cut:]) if part]
    sizes = [len(each) + 8 * parts for each in streams]
    right = [0, sizes[0], sizes[0] + sizes[1]]
    offsets = {
        "right": right,
        "none": [],
        "zeros": [0, 0, 0],
        "after items": [each + 8 for each in right],
        "backwards": right[::-1],
        "nowhere": [0, 10, 20],
    }[table]
    basic = encapsulated(struct.pack(f"<{len(offsets)}I", *offsets), fragments, **shown_as)
    extended = {"ExtendedOffsetTable": struct.pack(f"<{len(offsets)}Q", *offsets)}
    for data in (basic, encapsulated(b"", fragments, **shown_as, **extended)):
        for number, picture in enumerate(pictures, 1):
            found = decode_image(data, SPEC, frame=number)[..., 0]
            assert np.array_equal(found, made.windowed(picture, 128, 256))


def test_chroma_of_two_pixels() -> None:
    """Frames in fragments can share it, too, and some native ones only say so."""
    spec = InputSpec(SIDE, SIDE)
    pairs = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE // 2, 4)).astype(np.uint8)
    pixels = np.stack(
        [pairs[:, :, :2].reshape(SIDE, SIDE), *np.repeat(pairs[:, :, 2:], 2, 1).transpose(2, 0, 1)],
        axis=-1,
    )
    expected = decode_image(made.image(pixels, PhotometricInterpretation="YBR_FULL"), spec)
    says = {"PhotometricInterpretation": "YBR_FULL_422"}
    shared = pairs.tobytes()
    for data in (
        made.image(pixels, PixelData=shared, **says),
        made.image(pixels, **says),
        made.compressed([shared], pixels, made.ENCAPSULATED, **says),
        made.compressed([made.deflated(shared)], pixels, made.DEFLATED_FRAME, **says),
    ):
        assert np.array_equal(decode_image(data, spec), expected)


@pytest.mark.parametrize("says", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("transform", [0, 1])
def test_a_jpeg_that_says_its_colours(transform: int, says: str) -> None:
    """Adobe's marker counts more than the tag, as for every reader of JPEG."""
    ramps = [ramp(0, 255, np.uint8), ramp(255, 0, np.uint8), ramp(90, 160, np.uint8).T]
    pixels = np.ascontiguousarray(np.stack(ramps, axis=-1))
    space = "YCBCR" if transform else "RGB"
    stream = imagecodecs.jpeg8_encode(
        pixels, level=100, colorspace="RGB", outcolorspace=space, subsampling="444"
    )
    for place in (b"\xff\xe0", b"\xff\xee"):  # markers that the encoder wrote
        if (start := stream.find(place, 0, 40)) >= 0:
            length = struct.unpack_from(">H", stream, start + 2)[0]
            stream = stream[:start] + stream[start + 2 + length :]
    named = stream.replace(b"R\x11\0G\x11\0B\x11", b"\1\x11\0\2\x11\0\3\x11")
    named = named.replace(b"\x03R\0G\0B\0", b"\x03\1\0\2\0\3\0")
    marker = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])
    data = made.compressed(
        [named[:2] + marker + named[2:]],
        pixels,
        uid.JPEGBaseline8Bit,
        PhotometricInterpretation=says,
    )
    found = decode_image(data, InputSpec(SIDE, SIDE)).astype(int)
    assert np.abs(found - pixels).max() <= 6


@pytest.mark.parametrize("is_signed", [False, True])
def test_a_stream_with_room_for_more_bits(is_signed: bool) -> None:
    """The sign is where the file says, if nothing is above it."""
    stored = ramp(0, 4095, np.uint16)
    values = stored.astype(int) - 4096 * (is_signed & (stored > 2047))
    for syntax, codec in (
        (uid.JPEGLSLossless, imagecodecs.jpegls_encode),
        (uid.JPEG2000Lossless, partial(imagecodecs.jpeg2k_encode, level=0, codecformat="j2k")),
    ):
        data = made.compressed(
            [codec(stored)],
            stored,
            syntax,
            BitsStored=12,
            PixelRepresentation=int(is_signed),
            WindowCenter="100",
            WindowWidth="3000",
        )
        assert np.array_equal(shown(data), made.windowed(values, 100, 3000))


def test_windows_of_frames() -> None:
    parts = [ramp(0, 1000, np.uint16)] * 3
    groups = []
    for centre in (100, 500, 900):
        item, window = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = str(centre), "100"
        item.FrameVOILUTSequence = Sequence([window])
        groups.append(item)
    data = made.image(
        parts[0],
        NumberOfFrames=3,
        PixelData=b"".join(part.tobytes() for part in parts),
        PerFrameFunctionalGroupsSequence=Sequence(groups),
        WindowCenter="1",
        WindowWidth="2",
    )
    assert np.array_equal(shown(data), made.windowed(parts[0], 500, 100))


def test_pixels_that_are_not_square() -> None:
    values = ramp(0, 255, np.uint8)
    data = made.image(values, PixelAspectRatio=["4", "2"])
    assert render_image(data, 64).shape == (64, 32, 3)
    assert np.array_equal(shown(data), shown(made.image(values)))  # stretched, they are square
    padded = decode_image(data, InputSpec(SIDE, SIDE, channels=1, resize="pad"))
    assert not padded[:, : SIDE // 4].any() and padded[:, SIDE // 2].any()


def test_without_preamble() -> None:
    whole = made.image(ramp(0, 255, np.uint8))
    expected = shown(whole)
    assert np.array_equal(shown(whole[132:]), expected)
    start = whole.index(b"\x08\0\x16\0")
    assert np.array_equal(shown(whole[start:]), expected)
    implicit = made.image(ramp(0, 255, np.uint8), uid.ImplicitVRLittleEndian)
    assert np.array_equal(shown(implicit[implicit.index(b"\x08\0\x16\0") :]), expected)


@pytest.mark.parametrize("side", [SIDE, 8 * SIDE])
def test_elements_that_are_not_as_their_syntax_says(side: int) -> None:
    """Some files have value representations against their transfer syntax, and the reverse."""
    implicit, explicit = made.SYNTAXES[:2]
    values = np.tile(ramp(0, 4095, np.uint16), (side // SIDE, side // SIDE))
    spec = InputSpec(side, side, channels=1)
    expected = shown(made.image(values), spec)
    for written, named in ((implicit, explicit), (explicit, implicit)):
        data = made.with_syntax(made.image(values, written), named)
        assert np.array_equal(shown(data, spec), expected)


def test_preamble_of_a_tiff() -> None:
    data = made.image(ramp(0, 255, np.uint8))
    assert np.array_equal(shown(b"II*\0" + data[4:]), shown(data))


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


def renamed(syntax: str) -> bytes:
    return made.with_syntax(grey(), syntax)


def report() -> bytes:
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.104.1", "1.2.3"
    return made.written(data)


def cut_off(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def jpegls_file(**elements: Any) -> bytes:
    values = np.random.default_rng(1).integers(0, 255, (SIDE, SIDE), dtype=np.uint8)
    return made.compressed(
        [imagecodecs.jpegls_encode(values)], values, uid.JPEGLSLossless, **elements
    )


def grey(**elements: Any) -> bytes:
    return made.image(ramp(0, 255, np.uint8), **elements)


@pytest.mark.parametrize(
    ("data", "sqlstate", "message", "detail"),
    [
        (
            lambda: made.with_syntax(grey(), "1.2.840.10008.1.2.4.102"),
            "22P03",
            r"4\.102 \(MPEG-4",
            "video",
        ),
        (
            lambda: made.with_syntax(grey(), "1.2.840.10008.1.2.4.110"),
            "22P03",
            "JPEG XL Lossless",
            "",
        ),
        (lambda: made.with_syntax(grey(), "1.2.3.4"), "22P03", r"1\.2\.3\.4 \(unknown\)", ""),
        (report, "22P03", "without pixels: Encapsulated PDF Storage", ""),
        (lambda: cut_off(grey(), 0.9), "22P03", "DICOM", "cut short"),
        (lambda: cut_off(grey(), 0.3), "22P03", "DICOM", ""),
        (lambda: cut_off(jpegls_file(), 0.9), "22P03", "DICOM", "cut short"),
        (lambda: jpegls_file(Rows=16), "22P03", "DICOM", "32 x 32 pixels and 1 samples, not 32"),
        (lambda: grey(Rows=60000, Columns=60000), "54000", "60000 x 60000", ""),
        (lambda: grey(PhotometricInterpretation="YBR_PARTIAL_420"), "22P03", "PARTIAL_420", ""),
        (
            lambda: grey().replace(b"MONOCHROME2", b"MON\0CHROM\xc02"),
            "22P03",
            "DICOM",
            "no valid term",
        ),
        (lambda: grey()[:132] + damaged.nested(3000), "22P03", "DICOM", ""),
    ],
)
def test_refused(data: Callable[[], bytes], sqlstate: str, message: str, detail: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        decode_image(data(), SPEC)
    assert caught.value.sqlstate == sqlstate
    assert detail in (caught.value.detail or "")


@pytest.mark.parametrize(
    ("name", "sqlstate", "message", "detail"),
    [
        ("deflated data set", "54000", "deflated DICOM file is too large", "33554432 bytes"),
        ("RLE", "54000", "60000 x 60000 pixels is too large", ""),
        ("sequences", "54000", "nested too deeply", ""),
        ("elements", "54000", "too many elements", "200000"),
        ("fragments", "54000", "too many fragments", "200000"),
        ("frames", "22P03", "DICOM image cannot be decoded", "cut short"),
    ],
)
def test_bombs(name: str, sqlstate: str, message: str, detail: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        decode_image(damaged.BOMBS[name](), SPEC)
    assert caught.value.sqlstate == sqlstate
    assert detail in (caught.value.detail or "")


def test_a_frame_is_inflated_to_its_size() -> None:
    assert not shown(damaged.BOMBS["deflated frame"]()).any()


def test_leaves_when_asked() -> None:
    class Cancelled(BaseException):
        pass

    def poll() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        decode_image(made.image(ramp(0, 255, np.uint8)), SPEC, poll)


def test_mutated_files() -> None:
    generator = random.Random(7)
    values = ramp(0, 4095, np.uint16)
    files = [make(values) for make in made.twins().values()]
    files += [path.read_bytes() for path in sorted(REAL.glob("mr_small*.dcm"))]
    refused = 0
    for _ in range(400):
        try:
            decode_image(damaged.mutated(generator.choice(files), generator), SPEC)
        except ImageError as error:
            assert error.sqlstate in ("22P03", "54000")
            refused += 1
    assert 50 < refused < 400


# What the documentation calls the decoders.
@pytest.mark.parametrize("syntax", [made.ENCAPSULATED, made.DEFLATED_FRAME])
def test_frames_that_are_not_compressed_by_a_codec(syntax: uid.UID) -> None:
    def packed(values: NDArray[Any]) -> bytes:
        plain = values.tobytes()
        return made.deflated(plain) if syntax == made.DEFLATED_FRAME else plain

    colour = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    expected = shown(made.image(colour))
    data = made.compressed([packed(colour)], colour, syntax)
    assert np.array_equal(shown(data), expected)
    planes = packed(colour.transpose(2, 0, 1))
    data = made.compressed([planes], colour, syntax, PlanarConfiguration=1)
    assert np.array_equal(shown(data), expected)
    black = np.zeros((SIDE, SIDE), np.uint8)
    half = black.copy()
    half[:, : SIDE // 2] = 255
    bits = np.packbits(half > 0, bitorder="little")
    one_bit = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
    data = made.compressed([packed(bits)], black, syntax, **one_bit)
    assert np.array_equal(shown(data), half)
    data = made.compressed([packed(black), packed(half)], black, syntax)
    assert np.array_equal(decode_image(data, SPEC, frame=2)[..., 0], half)
    with pytest.raises(ImageError) as error:
        decode_image(made.compressed([packed(half[2:])], half, syntax), SPEC)
    assert "Its pixels are cut short." in str(error.value.detail)


DECODERS = {
    "imagecodecs (PackBits)": "_rle",
    "imagecodecs (libjpeg-turbo)": "_jpeg",
    "imagecodecs (CharLS)": "_jpegls",
    "imagecodecs (OpenJPEG)": "_jpeg2000",
    "zlib": "_deflated",
    "NumPy": None,
    "NumPy, frame by frame": "_uncompressed",
}


def documented_syntaxes() -> dict[str, str]:
    """The table of transfer syntaxes in docs/dicom.md: what decodes each, or why it is refused."""
    text = (ROOT / "docs" / "dicom.md").read_text()
    found: dict[str, str] = {}
    for cell, decoder in re.findall(r"^\| [^|]+ \| (1\.[^|]+) \| ([^|]+) \|$", text, re.M):
        numbers = re.findall(r"\b1\.[\d.]*\d", cell)
        if " to " in cell:
            (stem, first), (_, last) = (each.rsplit(".", 1) for each in numbers[-2:])
            numbers += [f"{stem}.{number}" for number in range(int(first), int(last) + 1)]
        if "a further .1" in cell:
            numbers += [f"{each}.1" for each in numbers]
        found |= {f"1.2.840.10008.{number}": decoder for number in numbers}
    return found


def test_the_documentation_of_transfer_syntaxes() -> None:
    documented = documented_syntaxes()
    decoded = {syntax for syntax, by in documented.items() if not by.startswith("refused: ")}
    assert decoded == file.SUPPORTED
    for syntax in decoded:
        by = documented[syntax]
        by = by if by in DECODERS else by.split(",")[0]
        codec = frames._CODECS.get(syntax)
        assert (codec and codec.__name__) == DECODERS[by], syntax
    standard = {number for number, entry in UID_dictionary.items() if entry[1] == "Transfer Syntax"}
    assert standard | set(file._NEWER) <= set(documented)
    for syntax in set(documented) - decoded:
        with pytest.raises(ImageError, match=f"{re.escape(syntax)} .* is not supported"):
            decode_image(renamed(syntax), SPEC)


def test_other_formats_load_no_pydicom() -> None:
    program = (
        "import io, sys; import numpy as np; from PIL import Image;"
        "from pg_siamese_server.encoding.images import decode_image;"
        "from pg_siamese_server.encoding.specification import InputSpec;"
        "b = io.BytesIO(); Image.fromarray(np.zeros((8, 8), np.uint8)).save(b, 'PNG');"
        "decode_image(b.getvalue(), InputSpec(8, 8));"
        "print([m for m in ('pydicom', 'imagecodecs') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_keywords_are_those_of_the_standard() -> None:
    for keyword in (*tags.KEYWORDS, *IDENTIFYING):
        tags.check_keyword(keyword)
    assert not IDENTIFYING & set(tags.KEYWORDS)


def test_a_directory_of_media_is_no_picture() -> None:
    directory = made.report(1)
    directory.SOPClassUID = uid.MediaStorageDirectoryStorage
    named = made.filed(directory)
    del named.SOPClassUID
    target = io.BytesIO()
    named.save_as(target)
    with pytest.raises(ImageError, match="without pixels: Media Storage Directory Storage"):
        decode_image(target.getvalue(), SPEC)


def test_values_stay_out_of_the_log() -> None:
    """A warning of pydicom would quote them."""
    data = made.image(ramp(0, 4095), StudyDate="20240229")
    data = data.replace(b"20240229", b"tomorrow").replace(made.CT.encode(), b"CT".ljust(25, b"?"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tags.read(data, ["StudyDate"], lambda: None)
        assert found == {"StudyDate": "tomorrow"}
        file.read(data, SPEC, lambda: None)


# --- windows by argument -------------------------------------------------------------------------


def asked(window: str) -> InputSpec:
    return replace(SPEC, dicom_window=window)


def ct(values: NDArray[Any], **elements: Any) -> bytes:
    """Return a CT image in Hounsfield units, with two windows of its own."""
    given = {
        "Modality": "CT",
        "RescaleIntercept": "-1000",
        "RescaleSlope": "1",
        "WindowCenter": ["0", "300"],
        "WindowWidth": ["3000", "700"],
        "WindowCenterWidthExplanation": ["WIDE", "Vessels"],
    }
    return made.image(values, **given | elements)


HOUNSFIELD = ramp(0, 3000, np.uint16)
UNITS = HOUNSFIELD.astype(np.int64) - 1000


@pytest.mark.parametrize(
    ("window", "centre", "width"),
    [
        *((name, *window) for name, window in windows.PRESETS.items()),
        ("LUNG ", -600, 1500),
        ("40/400", 40, 400),
        (" -12.5 / 1e2 ", -12.5, 100),
        ("1", 0, 3000),
        ("2", 300, 700),
        ("explanation:vessels", 300, 700),
    ],
)
def test_a_window_by_argument(window: str, centre: float, width: float) -> None:
    expected = made.windowed(UNITS, centre, width)
    assert np.array_equal(shown(ct(HOUNSFIELD), asked(window)), expected)
    assert not np.array_equal(expected, shown(ct(HOUNSFIELD))) or window == "1"


def test_presets_of_real_slices() -> None:
    """Of two scanners, with four windows and three ways to name the unit."""
    paths = sorted(SERIES.rglob("*.dcm"))
    if not paths:
        pytest.skip("needs the DICOM series beside the project (shared/data/dicom_series)")
    for path in paths:
        file = dcmread(path)
        values = file.pixel_array * float(file.RescaleSlope) + float(file.RescaleIntercept)
        spec = InputSpec(file.Columns, file.Rows, channels=1, dicom_window="lung")
        assert np.array_equal(shown(path.read_bytes(), spec), made.windowed(values, -600, 1500)), (
            path
        )


def test_a_window_that_the_file_does_not_have_leaves_its_own() -> None:
    own = shown(ct(HOUNSFIELD))
    for window in ("3", "explanation:lung"):
        assert np.array_equal(shown(ct(HOUNSFIELD), asked(window)), own)
    zero = ct(HOUNSFIELD, WindowWidth=["3000", "0"])
    assert np.array_equal(shown(zero, asked("2")), own)


def test_presets_are_for_hounsfield_units() -> None:
    lung = made.windowed(UNITS, *windows.PRESETS["lung"])
    for elements, is_hounsfield in (
        ({"RescaleType": "HU"}, True),
        ({"RescaleType": "Houndsfield Unit"}, True),
        ({"RescaleType": "hounsfield units"}, True),
        ({"RescaleType": "HUE"}, False),
        ({"RescaleType": "US"}, False),
        ({"Modality": "MR"}, False),
        ({"Modality": "MR", "RescaleType": "HU"}, True),
        ({"Modality": None}, False),
    ):
        data = ct(HOUNSFIELD, **elements)
        assert np.array_equal(shown(data, asked("lung")), lung) == is_hounsfield, elements
        # A pair of numbers needs no unit.
        assert np.array_equal(shown(data, asked("-600/1500")), lung), elements
    unscaled = ct(HOUNSFIELD, RescaleIntercept=None, RescaleSlope=None)
    assert np.array_equal(shown(unscaled, asked("lung")), shown(unscaled))


def test_a_window_by_argument_comes_before_tables_and_groups() -> None:
    item = Dataset()
    item.LUTDescriptor = [2, 0, 8]
    item.LUTData = [0, 255]
    item["LUTData"].VR = "US"
    data = ct(HOUNSFIELD, VOILUTSequence=Sequence([item]))
    assert np.array_equal(shown(data, asked("2")), made.windowed(UNITS, 300, 700))
    frame = Dataset()
    frame.WindowCenter, frame.WindowWidth = ["10", "20"], ["100", "200"]
    groups = Dataset()
    groups.FrameVOILUTSequence = Sequence([frame])
    data = ct(HOUNSFIELD, SharedFunctionalGroupsSequence=Sequence([groups]))
    assert np.array_equal(shown(data, asked("2")), made.windowed(UNITS, 20, 200))
    assert np.array_equal(shown(data, asked("brain")), made.windowed(UNITS, 40, 80))


def test_a_window_leaves_presentation_and_other_images_alone() -> None:
    inverted = ct(HOUNSFIELD, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(shown(inverted, asked("bone")), 255 - made.windowed(UNITS, 400, 1800))
    colour = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    data = made.image(colour)
    assert np.array_equal(shown(data, asked("40/400")), shown(data))
    picture = encode(colour, "PNG")
    assert np.array_equal(shown(picture, asked("40/400")), shown(picture))


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("lungs", 'unknown window "lungs"'),
        ("0", 'unknown window "0"'),
        ("-1", 'unknown window "-1"'),
        ("explanation: ", "unknown window"),
        ("40/400/1", "unknown window"),
        ("40/0", "out of range"),
        ("40/-5", "out of range"),
        ("1e999/5", "out of range"),
        ("5/1e999", "out of range"),
    ],
)
def test_windows_that_are_none(window: str, message: str) -> None:
    with pytest.raises(SiameseError, match=re.escape(message)) as caught:
        windows.parse(window)
    assert caught.value.sqlstate == "22023"
    if "unknown" in message:
        assert "bone, brain, liver, lung" in str(caught.value.detail)


@pytest.mark.parametrize("text", ["1", "1/1", "-.1", "1e1", " ", "1 "])
def test_a_long_text_that_is_no_window_is_refused_at_once(text: str) -> None:
    """Nothing can cancel a search with a pattern, so its time must not grow with the square."""
    began = time.process_time()
    with pytest.raises(SiameseError, match="unknown window"):
        windows.parse(text + 20_000 * text[-1] + "x")
    assert time.process_time() - began < 1


def test_a_window_is_no_part_of_a_model() -> None:
    assert InputSpec.from_json(asked("lung").to_json() | {"dicom_window": "lung"}) == SPEC
