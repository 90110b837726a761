"""TIFF files of every kind, written by hand: what their samples are is known from the start."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import imagecodecs
import numpy as np

from tests.support import Array

CODECS = {"none": 1, "lzw": 5, "deflate": 8, "old deflate": 32946, "packbits": 32773, "zstd": 50000}
SHORT, LONG, LONG8 = 3, 4, 16


@dataclass(frozen=True)
class Tiff:
    """How a page is stored; ``samples`` are (height, width, channels) as they mean."""

    samples: Array
    bits: int
    order: str = "<"
    photometric: int = 1
    codec: str = "none"
    planar: bool = False
    predictor: int = 1
    tile: tuple[int, int] | None = None  # height, width
    rows_per_strip: int = 3
    fill_order: int = 1
    big: bool = False
    tags: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def format(self) -> int:
        return {"u": 1, "i": 2, "f": 3}[self.samples.dtype.kind]

    def file(self) -> bytes:
        return join([self], self.order, self.big)

    def parts(self) -> list[bytes]:
        planes = (
            [self.samples[..., i : i + 1] for i in range(self.samples.shape[2])]
            if self.planar
            else [self.samples]
        )
        return [self._packed(block) for plane in planes for block in self._blocks(plane)]

    def _blocks(self, plane: Array) -> list[Array]:
        height, width = plane.shape[:2]
        if self.tile is None:
            return [
                plane[y : y + self.rows_per_strip] for y in range(0, height, self.rows_per_strip)
            ]
        rows, columns = self.tile
        padded = np.pad(plane, ((0, -height % rows), (0, -width % columns), (0, 0)), mode="edge")
        return [
            padded[y : y + rows, x : x + columns]
            for y in range(0, height, rows)
            for x in range(0, width, columns)
        ]

    def _packed(self, block: Array) -> bytes:
        data: bytes
        rows = len(block)
        if self.bits in (8, 16, 32, 64):
            values = np.ascontiguousarray(block)
            if self.predictor == 2:
                values = imagecodecs.delta_encode(values, axis=1)
            if self.predictor == 3:
                dtype = np.dtype(f"{self.order}f{self.bits // 8}")
                coded = imagecodecs.floatpred_encode(values.astype(dtype), axis=-2)
                data = np.asarray(coded).tobytes()
            else:
                code = f"{self.order}{block.dtype.kind}{self.bits // 8}"
                data = values.astype(code).tobytes()
        else:
            shifts = np.arange(self.bits - 1, -1, -1)
            single = (block.reshape(rows, -1, 1).astype(np.int64) >> shifts) & 1
            data = np.packbits(single.reshape(rows, -1).astype(np.uint8), axis=1).tobytes()
        packed: dict[str, Callable[..., Any]] = {
            "none": bytes,
            "lzw": imagecodecs.lzw_encode,
            "deflate": imagecodecs.zlib_encode,
            "old deflate": imagecodecs.zlib_encode,
            "zstd": imagecodecs.zstd_encode,
        }
        if self.codec == "packbits":
            size = len(data) // rows  # no run crosses a row
            data = b"".join(
                imagecodecs.packbits_encode(data[i : i + size]) for i in range(0, len(data), size)
            )
        else:
            data = bytes(packed[self.codec](data))
        if self.fill_order == 2:
            data = bytes(imagecodecs.bitorder_encode(data))
        return data

    def entries(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        height, width, channels = self.samples.shape
        found: dict[int, tuple[int, tuple[int, ...]]] = {
            256: (LONG, (width,)),
            257: (LONG, (height,)),
            258: (SHORT, (self.bits,) * channels),
            259: (SHORT, (CODECS[self.codec],)),
            262: (SHORT, (self.photometric,)),
            277: (SHORT, (channels,)),
            284: (SHORT, (2 if self.planar else 1,)),
            339: (SHORT, (self.format,) * channels),
        }
        colours = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}[self.photometric]
        if channels > colours:
            found[338] = (SHORT, (2,) * (channels - colours))
        if self.predictor != 1:
            found[317] = (SHORT, (self.predictor,))
        if self.fill_order != 1:
            found[266] = (SHORT, (self.fill_order,))
        if self.tile:
            found |= {322: (LONG, (self.tile[1],)), 323: (LONG, (self.tile[0],))}
        else:
            found[278] = (LONG, (self.rows_per_strip,))
        return found | self.tags


def join(pages: list[Any], order: str = "<", big: bool = False) -> bytes:
    """Put pages into one file, in this order."""
    mark = b"II" if order == "<" else b"MM"
    header, word = (16, "Q") if big else (8, "I")
    body = b""
    directories = []
    for page in pages:
        offsets, counts = [], []
        for part in page.parts():
            offsets.append(header + len(body))
            counts.append(len(part))
            body += part + b"\0" * (len(part) % 2)
        entries = page.entries()
        kind = LONG8 if big else LONG
        entries[324 if page.tile else 273] = (kind, tuple(offsets))
        entries[325 if page.tile else 279] = (kind, tuple(counts))
        directories.append(sorted(entries.items()))
    start = header + len(body)
    written = b""
    for number, entries in enumerate(directories):
        place = start + len(written)
        size = (8 if big else 2) + (20 if big else 12) * len(entries) + (8 if big else 4)
        extra, lines = b"", b""
        for tag, (kind, values) in entries:
            letter = {SHORT: "H", LONG: "I", 7: "B", LONG8: "Q"}[kind]
            content = struct.pack(f"{order}{len(values)}{letter}", *values)
            lines += struct.pack(f"{order}HH{word}", tag, kind, len(values))
            if len(content) > struct.calcsize(word):
                lines += struct.pack(f"{order}{word}", place + size + len(extra))
                extra += content + b"\0" * (len(content) % 2)
            else:
                lines += content.ljust(8 if big else 4, b"\0")
        following = place + size + len(extra) if number + 1 < len(directories) else 0
        written += struct.pack(f"{order}{'Q' if big else 'H'}", len(entries)) + lines
        written += struct.pack(f"{order}{word}", following) + extra
    if big:
        return mark + struct.pack(f"{order}HHHQ", 43, 8, 0, start) + body + written
    return mark + struct.pack(f"{order}HI", 42, start) + body + written
