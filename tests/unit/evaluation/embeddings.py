"""Embeddings written by hand."""

from __future__ import annotations

import numpy as np

from pg_siamese.evaluation.retrieval import Embedded


def vectors(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float32)


def embedded(rows: np.ndarray, labels: list[int], sets: list[int] | None = None) -> Embedded:
    return Embedded(rows, np.array(labels), np.array(sets or [0] * len(labels)))
