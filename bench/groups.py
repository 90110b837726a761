"""Make columns to filter by: groups of equal size, by chance or by place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bench.exact import Vectors

# Groups of 10, 1, 0.1 and 0.01 % of all rows.
SHARES = {10: "10 %", 100: "1 %", 1_000: "0.1 %", 10_000: "0.01 %"}
RANDOM, PLACE = "random", "place"


def column(kind: str, count: int) -> str:
    """Return the name of the column with ``count`` groups of a kind."""
    return f"{kind}_{count}"


def draw(vectors: Vectors, seed: int = 5) -> dict[str, NDArray[np.int32]]:
    """Return the columns, int32 (rows,) each.

    Groups by chance say nothing of distance. Those by place are cells of the space, each cut into
    ten along the next principal direction. The rows of a query's own cell are its nearest ones.
    Those of a cell at the other end are its farthest.
    """
    generator = np.random.default_rng(seed)
    rows = len(vectors.ids)
    sample = vectors.matrix[generator.choice(rows, min(rows, 20_000), replace=False)]
    directions = np.linalg.svd(sample - sample.mean(axis=0), full_matrices=False)[2]
    columns: dict[str, NDArray[np.int32]] = {}
    cells = np.zeros(rows, dtype=np.int64)
    for depth, count in enumerate(SHARES):
        columns[column(RANDOM, count)] = generator.permutation(
            np.arange(rows, dtype=np.int32) % count
        )
        order = np.lexsort((vectors.matrix @ directions[depth], cells))
        _, starts, sizes = np.unique(cells[order], return_index=True, return_counts=True)
        rank = np.arange(rows) - np.repeat(starts, sizes)
        cells[order] = cells[order] * 10 + rank * 10 // np.repeat(sizes, sizes)
        columns[column(PLACE, count)] = cells.astype(np.int32)
    return columns


def farthest(
    vectors: Vectors, groups: NDArray[np.int32], queries: NDArray[np.float32]
) -> NDArray[np.int32]:
    """Return for each query the group with the farthest rows on average, int32 (queries,)."""
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(groups.max() + 1))
    sums = np.add.reduceat(vectors.matrix[order].astype(np.float64), starts)
    centres = sums / np.bincount(groups)[:, None]
    result: NDArray[np.int32] = (queries @ centres.T).argmin(axis=1).astype(np.int32)
    return result
