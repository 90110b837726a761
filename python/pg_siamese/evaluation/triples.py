"""Do at least two of three images match? Triples half and half, decided by their least distance."""

from __future__ import annotations

import numpy as np

from pg_siamese.evaluation.pairs import Flags
from pg_siamese.evaluation.retrieval import Embedded, Floats, Integers, distances


def balanced_triples(
    labels: Integers, count: int, seed: int, groups: Integers | None = None
) -> tuple[Integers, Flags]:
    """Draw ``count`` triples of images: in half of them two match, in the others none do.

    Labels are drawn uniformly, so that rare classes count as much as others. If two match, the
    third is of another label: three of one label would be easier.

    Args:
        labels: labels (N,).
        count: number of triples.
        seed: seed of the draw.
        groups: groups (N,), such as patients, or None. Two that match are of two groups.

    Returns:
        Indices (count, 3), in random order within a triple, and whether two match (count,).

    Raises:
        ValueError: there are fewer than three labels, or no label with two images. Of three images
            of two classes, two always match.
    """
    random = np.random.default_rng(seed)
    members = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
    if len(members) < 3:
        raise ValueError("triples without a match need at least three classes")
    known = np.array(list(members))
    apart = np.arange(len(labels)) if groups is None else groups
    paired = np.array(
        [label for label, found in members.items() if len(np.unique(apart[found])) > 1]
    )
    if not len(paired):
        reason = "" if groups is None else " in two groups"
        raise ValueError(f"no pair of one class among these images{reason}")
    match = np.arange(count) % 2 == 0
    triples = np.empty((count, 3), np.int64)
    for i in range(count):
        if match[i]:
            label = int(random.choice(paired))
            other = int(random.choice(known[known != label]))
            found = members[label]
            if groups is None:
                both = random.choice(found, 2, replace=False)
            else:
                one = int(random.choice(found))
                both = np.array([one, random.choice(found[groups[found] != groups[one]])])
            triple = np.append(both, random.choice(members[other]))
        else:
            chosen = random.choice(known, 3, replace=False)
            triple = np.array([random.choice(members[int(label)]) for label in chosen])
        triples[i] = random.permutation(triple)
    return triples, match


def least_distances(embedded: Embedded, triples: Integers, metric: str = "cosine") -> Floats:
    """Return the least of the three distances (T,) within each triple (T, 3)."""
    vectors = embedded.vectors
    sides = [
        distances(vectors[triples[:, a]], vectors[triples[:, b]], metric)
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    least: Floats = np.minimum.reduce(sides)
    return least


def triple_distances(
    embedded: Embedded, count: int, seed: int, metric: str = "cosine"
) -> tuple[Floats, Flags]:
    """Draw triples, half and half: return their least distances and whether two match."""
    triples, match = balanced_triples(embedded.labels, count, seed, embedded.groups)
    return least_distances(embedded, triples, metric), match
