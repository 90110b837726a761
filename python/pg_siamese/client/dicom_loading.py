"""Loading DICOM instances into a table: with columns from their tags, and each of them once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import psycopg

from pg_siamese.client.dicom_sources import Instance
from pg_siamese.client.loading import LoadReport, Target


@dataclass
class DicomReport(LoadReport):
    """What a load of DICOM instances did."""


def load_instances(
    connection: psycopg.Connection[Any],
    target: Target,
    instances: Iterable[Instance],
    *,
    report: DicomReport | None = None,
    skip_rejected: bool = False,
    advance: Callable[[int], object] = lambda count: None,
) -> DicomReport:
    """Insert the instances whose SOP Instance UID is not stored yet.

    Args:
        connection: in autocommit mode.
        target: the table, by ``find_target``.
        instances: in any order. They are taken in portions, and read one by one.
        report: to add to.
        skip_rejected: leave out rows that a constraint of the table rejects, too.
        advance: called with the number of instances that it dealt with.

    Returns:
        What happened.

    Raises:
        CommandError: the load failed or was interrupted. The message says how many are stored.
    """
    raise NotImplementedError
