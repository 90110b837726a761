"""Cells of vectors: each vector belongs to the nearest of some centres."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
from numpy.typing import NDArray

from pg_siamese_server.index.threads import threads

# Rounds that move the centres to the middle of their vectors, and vectors of a cell that decide.
ROUNDS, SAMPLE = 2, 50
# Multiplications of one call of FAISS, about 50 ms.
PRODUCTS = 500_000_000


def nearest(
    matrix: NDArray[np.float32],
    centres: NDArray[np.float32],
    thread_count: int,
    poll: Callable[[], None],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the squared distance to the nearest centre of each vector, and its number."""
    squared = np.empty(len(matrix), dtype=np.float32)
    numbers = np.empty(len(matrix), dtype=np.int64)
    block = max(1_000, PRODUCTS // centres.size)
    for start in range(0, len(matrix), block):
        part = slice(start, start + block)
        with threads(thread_count):
            found = faiss.knn(matrix[part], centres, 1)
        squared[part], numbers[part] = found[0][:, 0], found[1][:, 0]
        poll()
    return squared, numbers


def moved_centres(
    sample: NDArray[np.float32], count: int, thread_count: int, poll: Callable[[], None]
) -> NDArray[np.float32]:
    """Return centres, float32 (count, dimension): k-means of a sample, in random order."""
    centres = sample[:count].copy()
    for _ in range(ROUNDS if count > 1 else 0):
        own = nearest(sample, centres, thread_count, poll)[1]
        sums = np.zeros_like(centres)
        np.add.at(sums, own, sample)
        counts = np.bincount(own, minlength=count)
        filled = counts > 0
        centres[filled] = sums[filled] / counts[filled, None]
    return centres


def along_a_path(centres: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return centres in an order in which each is followed by the nearest one that is left."""
    left = np.ones(len(centres), dtype=bool)
    path = np.zeros(len(centres), dtype=np.int64)
    for place in range(1, len(centres)):
        left[path[place - 1]] = False
        squared = np.square(centres - centres[path[place - 1]]).sum(axis=1)
        path[place] = np.where(left, squared, np.inf).argmin()
    return centres[path]
