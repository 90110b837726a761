"""DICOM files: the standard's rendering, refusals by name, guards against hostile ones."""

from __future__ import annotations

import io
import random
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread, uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from pg_siamese_server.encoding import dicom, windows
from pg_siamese_server.encoding.dicom import file, tags
from pg_siamese_server.encoding.images import (
    MAX_FRAMES,
    decode_frames,
    decode_image,
    render_image,
)
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError, SiameseError
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


def windowed(values: NDArray[Any], centre: float, width: float) -> NDArray[np.int64]:
    """The standard's LINEAR function, written out (PS3.3 C.11.2.1.2.1)."""
    shares = (values - (centre - 0.5)) / (width - 1) + 0.5
    return np.floor(np.clip(shares, 0, 1) * 255 + 0.5).astype(np.int64)


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
    assert np.array_equal(shown(data), windowed(values * 2 - 50, 40, 400))


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


def twins() -> dict[str, Callable[[NDArray[np.uint16]], bytes]]:
    """Files that say the same in other ways as an unsigned one of 12 bits."""
    window = {"WindowCenter": "2048", "WindowWidth": "4096"}

    def palette(values: NDArray[np.uint16]) -> bytes:
        entries = windowed(np.arange(4096), 2048, 4096).astype("<u2") * 257
        tables = {
            f"{colour}PaletteColorLookupTable{part}": value
            for colour in ("Red", "Green", "Blue")
            for part, value in (("Descriptor", [4096, 0, 16]), ("Data", entries.tobytes()))
        }
        return made.image(
            values, PhotometricInterpretation="PALETTE COLOR", BitsStored=12, **tables
        )

    def encoded(syntax: str, encode: Callable[..., bytes | bytearray], **options: Any) -> Any:
        return lambda values: made.compressed(
            [encode(values, **options)], values, syntax, BitsStored=12, **window
        )

    def written(syntax: str, values: NDArray[np.uint16]) -> bytes:
        return made.image(values, syntax, BitsStored=12, **window)

    return {
        "12 bits in 16": lambda v: made.image(v, BitsStored=12, **window),
        "garbage above": lambda v: made.image(v | np.uint16(0xA000), BitsStored=12, **window),
        "signed": lambda v: made.image(
            v.astype(np.int16) - 2048, WindowCenter="0", WindowWidth="4096"
        ),
        "intercept": lambda v: made.image(
            v, RescaleIntercept="-1024", WindowCenter="1024", WindowWidth="4096"
        ),
        "MONOCHROME1": lambda v: made.image(
            4095 - v,
            PhotometricInterpretation="MONOCHROME1",
            WindowCenter="2048",
            WindowWidth="4096",
        ),
        "32 bits": lambda v: made.image(v.astype(np.uint32), **window),
        "palette": palette,
        **{
            str(syntax.name): (
                lambda v, syntax=syntax: made.image(v, syntax, BitsStored=12, **window)
            )
            for syntax in made.SYNTAXES[:2] + made.SYNTAXES[3:4]
        },
        "RLE": encoded(uid.RLELossless, made.rle),
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


@pytest.mark.parametrize("name", list(twins()))
def test_the_same_picture_in_other_words(name: str) -> None:
    values = ramp(0, 4095, np.uint16)
    expected = windowed(values, 2048, 4096)
    found = shown(twins()[name](values))
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
    assert np.array_equal(shown(data), windowed(parts[0], 500, 100))


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


def test_preamble_of_a_tiff() -> None:
    data = made.image(ramp(0, 255, np.uint8))
    assert np.array_equal(shown(b"II*\0" + data[4:]), shown(data))


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


def renamed(syntax: str) -> bytes:
    """A file that names another transfer syntax."""
    data = made.image(ramp(0, 255, np.uint8))
    old, new = uid.ExplicitVRLittleEndian.encode() + b"\0", syntax.encode()
    new += b"\0" * (len(new) % 2)
    place = data.index(old)
    return data[: place - 2] + struct.pack("<H", len(new)) + new + data[place + len(old) :]


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


def bomb() -> bytes:
    data = made.image(ramp(0, 255, np.uint8), uid.DeflatedExplicitVRLittleEndian)
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    start = data.index(b"1.2.840.10008.1.2.1.99") + 22
    while data[start : start + 2] == b"\2\0":  # the rest of the meta information
        start += 8 + struct.unpack_from("<H", data, start + 6)[0]
    element = struct.pack("<HH2sHI", 9, 0x1010, b"OB", 0, 200_000_000)
    return data[:start] + deflater.compress(element + bytes(200_000_000)) + deflater.flush()


@pytest.mark.parametrize(
    ("data", "sqlstate", "message", "detail"),
    [
        (lambda: renamed("1.2.840.10008.1.2.4.102"), "22P03", r"4\.102 \(MPEG-4", "video"),
        (lambda: renamed("1.2.840.10008.1.2.4.110"), "22P03", "JPEG XL Lossless", ""),
        (lambda: renamed("1.2.3.4"), "22P03", r"1\.2\.3\.4 \(unknown\)", ""),
        (report, "22P03", "without pixels: Encapsulated PDF Storage", ""),
        (lambda: cut_off(grey(), 0.9), "22P03", "DICOM", "cut short"),
        (lambda: cut_off(grey(), 0.3), "22P03", "DICOM", ""),
        (lambda: cut_off(jpegls_file(), 0.9), "22P03", "DICOM", "cut short"),
        (lambda: jpegls_file(Rows=16), "22P03", "DICOM", "32 x 32 pixels and 1 samples, not 32"),
        (lambda: grey(Rows=60000, Columns=60000), "54000", "60000 x 60000", ""),
        (lambda: grey(PhotometricInterpretation="YBR_PARTIAL_420"), "22P03", "PARTIAL_420", ""),
        (bomb, "54000", "deflated DICOM file is too large", "33554432 bytes"),
        (lambda: grey()[:132] + made.nested(3000), "22P03", "DICOM", ""),
    ],
)
def test_refused(data: Callable[[], bytes], sqlstate: str, message: str, detail: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        decode_image(data(), SPEC)
    assert caught.value.sqlstate == sqlstate
    assert detail in (caught.value.detail or "")


def test_nested_too_deeply() -> None:
    data = made.image(ramp(0, 255, np.uint8))
    place = data.index(b"\x28\0\2\0")
    with pytest.raises(ImageError, match="nested too deeply"):
        decode_image(data[:place] + made.nested(3000), SPEC)


def test_too_many_elements() -> None:
    data = made.image(ramp(0, 255, np.uint8))
    place = data.index(b"\x28\0\2\0")
    element = struct.pack("<HH2sH", 9, 0x1010, b"SH", 0)
    with pytest.raises(ImageError, match="too many elements") as caught:
        decode_image(data[:place] + element * 500_000, SPEC)
    assert caught.value.sqlstate == "54000"


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
    files = [make(values) for make in twins().values()]
    files += [path.read_bytes() for path in sorted(REAL.glob("mr_small*.dcm"))]
    refused = 0
    for _ in range(400):
        try:
            decode_image(made.mutated(generator.choice(files), generator), SPEC)
        except ImageError as error:
            assert error.sqlstate in ("22P03", "54000")
            refused += 1
    assert 50 < refused < 400


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
    for keyword in (*tags.KEYWORDS, *tags.IDENTIFYING):
        tags.check_keyword(keyword)
    assert not tags.IDENTIFYING & set(tags.KEYWORDS)


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
    expected = windowed(UNITS, centre, width)
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
        assert np.array_equal(shown(path.read_bytes(), spec), windowed(values, -600, 1500)), path


def test_a_window_that_the_file_does_not_have_leaves_its_own() -> None:
    own = shown(ct(HOUNSFIELD))
    for window in ("3", "explanation:lung"):
        assert np.array_equal(shown(ct(HOUNSFIELD), asked(window)), own)
    zero = ct(HOUNSFIELD, WindowWidth=["3000", "0"])
    assert np.array_equal(shown(zero, asked("2")), own)


def test_presets_are_for_hounsfield_units() -> None:
    lung = windowed(UNITS, *windows.PRESETS["lung"])
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
    assert np.array_equal(shown(data, asked("2")), windowed(UNITS, 300, 700))
    frame = Dataset()
    frame.WindowCenter, frame.WindowWidth = ["10", "20"], ["100", "200"]
    groups = Dataset()
    groups.FrameVOILUTSequence = Sequence([frame])
    data = ct(HOUNSFIELD, SharedFunctionalGroupsSequence=Sequence([groups]))
    assert np.array_equal(shown(data, asked("2")), windowed(UNITS, 20, 200))
    assert np.array_equal(shown(data, asked("brain")), windowed(UNITS, 40, 80))


def test_a_window_leaves_presentation_and_other_images_alone() -> None:
    inverted = ct(HOUNSFIELD, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(shown(inverted, asked("bone")), 255 - windowed(UNITS, 400, 1800))
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


def test_a_window_is_no_part_of_a_model() -> None:
    assert InputSpec.from_json(asked("lung").to_json() | {"dicom_window": "lung"}) == SPEC
