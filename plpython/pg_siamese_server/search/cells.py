"""Divide vectors into cells, to compare only those that can be near each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Fewer vectors are one cell.
SINGLE = 4_096
# Distances that are looked at in one go, and most vectors of one go.
VALUES, PORTION = 2_000_000, 16_384
# Vectors of other cells that may be in memory for cells in one batch, and most cells of it.
OTHERS, BATCH = 2_000_000, 256
# Largest error of squared distances by matrix products, as a share of the squared lengths.
ROUNDING = 2e-6

Read = Callable[[NDArray[np.int64]], NDArray[np.float32]]


class Cell(NamedTuple):
    """Some vectors, by their numbers.

    Attributes:
        members: int64 (members,), ascending: those of the cell.
        others: int64 (others,), ascending: those of later cells that may be within reach of a
            member.
    """

    members: NDArray[np.int64]
    others: NDArray[np.int64]


class Cells:
    """Vectors in cells: each belongs to the nearest of some centres.

    A plane halfway between two centres divides their cells. A vector that is farther from it than
    the reach is out of reach of the whole other cell (generalised hyperplanes: Uhlmann 1991,
    "Satisfying general proximity/similarity queries with metric trees"). So no pair is missed.

    Args:
        read: returns vectors by their numbers, float32 (numbers, dimension).
        total: how many vectors there are.
        reach: the largest distance of interest, not squared.
        thread_count: of FAISS.
        poll: called between pieces of work, may raise to stop.
    """

    def __init__(
        self,
        read: Read,
        total: int,
        reach: float,
        thread_count: int,
        poll: Callable[[], None],
    ) -> None:
        from pg_siamese_server.index import cells

        self.read, self.reach, self.poll = read, reach, poll
        self.thread_count = thread_count
        self.centres = self._centres(total)
        # The cell of each vector, and its squared length less its squared distance to the centre.
        self.own = np.empty(total, dtype=np.int32)
        self.surplus = np.empty(total, dtype=np.float32)
        self.longest = squared_lengths(self.centres).max(initial=0)
        for part in self._portions(np.arange(total), PORTION):
            matrix = read(part)
            squared, self.own[part] = cells.nearest(matrix, self.centres, thread_count, poll)
            lengths = squared_lengths(matrix)
            self.surplus[part] = lengths - squared
            self.longest = max(self.longest, lengths.max())
        self.order = np.argsort(self.own, kind="stable")
        self.starts = np.searchsorted(self.own[self.order], np.arange(len(self.centres) + 1))

    def __iter__(self) -> Iterator[Cell]:
        first, size = 0, 1
        while first < len(self.centres):
            last = min(len(self.centres), first + size)
            cells, numbers = self._others(first, last)
            ends = np.searchsorted(cells, np.arange(first, last), side="right").tolist()
            start = 0
            for cell, end in zip(range(first, last), ends, strict=True):
                members = self.order[self.starts[cell] : self.starts[cell + 1]]
                if len(members):
                    yield Cell(members, np.sort(numbers[start:end]))
                start = end
            fitting = (last - first) * OTHERS // max(1, len(numbers))
            first, size = last, max(1, min(4 * size, fitting, BATCH))

    def _centres(self, total: int) -> NDArray[np.float32]:
        """Return the centres, float32 (cells, dimension)."""
        from pg_siamese_server.index import cells

        count = math.isqrt(total) if total > SINGLE and math.isfinite(self.reach) else 1
        generator = np.random.default_rng(0)
        chosen = generator.choice(total, min(total, cells.SAMPLE * count), replace=False)
        return cells.moved_centres(self.read(chosen), count, self.thread_count, self.poll)

    def _portions(self, numbers: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
        size = max(1, min(size, PORTION))
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]
            self.poll()

    def _others(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return cells of a range, ascending, and vectors of later cells within their reach."""
        found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        later = self.order[self.starts[first + 1] :]
        if not len(later):
            return found[0]
        batch = self.centres[first:last]
        lengths = squared_lengths(batch)
        # |y - c|² - |y - own|² = |c|² - 2 yc + surplus, which is at most 2 reach |c - own|.
        most = squared_lengths(self.centres)[:, None] + lengths - 2 * self.centres @ batch.T
        most = 2 * self.reach * np.sqrt(np.maximum(most, 0)) - lengths
        most += 4 * ROUNDING * self.longest
        most[np.arange(len(most))[:, None] <= np.arange(first, last)] = -np.inf
        most = most.astype(np.float32)
        for part in self._portions(later, VALUES // len(batch)):
            values = self.read(part) @ (-2 * batch.T)
            values += self.surplus[part, None]
            vectors, near = np.nonzero(values <= most[self.own[part]])
            found.append((near, part[vectors]))
        near, numbers = (np.concatenate(column) for column in zip(*found, strict=True))
        by_cell = np.argsort(near, kind="stable")
        return near[by_cell] + first, numbers[by_cell]


def squared_lengths(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the squared length of each vector."""
    lengths: NDArray[np.float32] = np.einsum("ij,ij->i", matrix, matrix)
    return lengths
