"""ICC profiles made by hand: of screens (primaries and a gamma) and of printing (a table)."""

from __future__ import annotations

import struct

import numpy as np

from tests.support import Array

# Colorants adapted to D50, as these profiles hold them: columns red, green, blue.
SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169],
     [0.0139322, 0.0971045, 0.7141733]]
)  # fmt: skip
DISPLAY_P3 = np.array(
    [[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]]
)
ADOBE_RGB = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
D50 = (0.9642, 1.0, 0.8249)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _text(text: bytes) -> bytes:
    return b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" + bytes(78)


def profile(space: bytes, pcs: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": _text(b"test"), b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(D50), **tags}
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content
    header = (
        b"\0\0\0\0" b"lcms" + b"\x02\x40\0\0" + kind + space + pcs
        + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(24) + b"\0\0\0\0"
        + b"".join(map(_fixed, D50))
    )  # fmt: skip
    header = header.ljust(128, b"\0")
    whole = header + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def screen(colorants: Array, curve: float | tuple[float, ...]) -> bytes:
    """A profile of three primaries with one curve: a gamma, or the parameters of sRGB's."""
    if isinstance(curve, tuple):
        trc = b"para\0\0\0\0\0\3\0\0" + b"".join(map(_fixed, curve))
    else:
        trc = b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(curve * 256))
    tags = {
        name: _xyz(tuple(colorants[:, i])) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))
    }
    return profile(
        b"RGB ", b"XYZ ", b"mntr", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), trc)
    )


def grey(gamma: float) -> bytes:
    trc = b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(gamma * 256))
    return profile(b"GRAY", b"XYZ ", b"mntr", {b"kTRC": trc})


def press(paper: int) -> bytes:
    """A CMYK profile of two points an ink: its paper is as light (L of 0 to 255) as said."""
    inks = np.stack(np.meshgrid(*[(0, 1)] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    light = np.round(paper * (1 - inks[:, 3]) * (1 - inks[:, :3].mean(axis=1) * 0.6))
    a = 128 + np.round((inks[:, 1] - inks[:, 0]) * 60 * (1 - inks[:, 3]))
    b = 128 + np.round((inks[:, 2] - inks[:, 0]) * 60 * (1 - inks[:, 3]))
    table = np.stack([light, a, b], axis=1).astype(np.uint8).tobytes()
    matrix = b"".join(_fixed(float(i in (0, 4, 8))) for i in range(9))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + table + ramp * 3
    return profile(b"CMYK", b"Lab ", b"prtr", {b"A2B0": lut})


def converted(pixels: Array, colorants: Array, gamma: float | None) -> Array:
    """What sRGB has for these colours, by the formulas: float, not cut off."""
    values = pixels / 255.0
    if gamma is None:
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    else:
        linear = values**gamma
    light = linear @ (np.linalg.inv(SRGB) @ colorants).T
    light = np.clip(light, 0, 1)
    found: Array = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return found * 255
