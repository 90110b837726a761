"""Loading DICOM instances into a table: with columns from their tags, and each of them once."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from pg_siamese.client.connection import CommandError
from pg_siamese.client.dicom_columns import COLUMNS, PATIENT_ID, SOP_UID
from pg_siamese.client.dicom_sources import Instance, NoInstanceError
from pg_siamese.client.loading import LoadReport, Rejection, Target, store
from pg_siamese.client.sources import ImageRow
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import PROGRAM_LIMIT_EXCEEDED, ImageError

# So many instances are looked up in one statement.
PORTION = 400
# More than any collection can allow. The server knows the limit.
MAX_PIXELS = 65_535**2

HASH_KEY = "PG_SIAMESE_HASH_KEY"
MIN_KEY_BYTES = 16
HASH_DIGITS = 32

BURNED_IN = "BurnedInAnnotation"
RECOGNIZABLE = "RecognizableVisualFeatures"
IDENTITY_REMOVED = "PatientIdentityRemoved"
PRIVACY = (BURNED_IN, RECOGNIZABLE, IDENTITY_REMOVED)
KEYWORDS = (*PRIVACY, *(word for column in COLUMNS.values() for word in column.keywords))

# How the server's messages on what is no picture begin.
_NO_PICTURE = "image cannot be decoded because it is "


@dataclass
class DicomReport(LoadReport):
    """What a load of DICOM instances did.

    Attributes:
        left_out: number of files that were left out, by kind.
        named: those of them that somebody may miss, with the reason.
        privacy: number of stored images, by keyword and value of ``PRIVACY``.
    """

    left_out: Counter[str] = field(default_factory=Counter)
    named: list[Rejection] = field(default_factory=list)
    privacy: Counter[tuple[str, str | None]] = field(default_factory=Counter)

    def leave_out(self, name: str, kind: str, reason: str | None) -> None:
        """Count a file that is left out."""
        self.left_out[kind] += 1
        if reason is not None:
            self.named.append(Rejection(name, reason))

    def add(self, rows: Sequence[ImageRow], stored: int) -> None:
        """Count rows that were sent, of which others may have stored some meanwhile."""
        super().add(rows, stored)
        self.privacy.update((word, row.tags[word]) for row in rows for word in PRIVACY)

    def reject(self, name: str, reason: str, error: psycopg.Error) -> None:
        """Count an image that the server rejected."""
        self.leave_out(name, _kind_of_rejection(error), reason)


def keyed_hash(key: bytes) -> Callable[[str], str]:
    """Return a function that replaces an identifier by its HMAC-SHA-256, cut to 32 digits."""

    def hashed(identifier: str) -> str:
        return hmac.digest(key, identifier.encode(), "sha256").hex()[:HASH_DIGITS]

    return hashed


def read_hash_key(path: Path | None) -> bytes:
    """Return the key of a file that only its owner may read, or of the environment.

    Raises:
        CommandError: there is none, it is too short, or others may read the file.
    """
    if path is None:
        key = os.fsencode(os.environ.get(HASH_KEY, "")).strip()
        if not key:
            raise CommandError(f"no key to hash with: set {HASH_KEY}, or use --hash-key FILE")
        name = HASH_KEY
    else:
        if path.stat().st_mode & 0o077:
            raise CommandError(f"{path}: others may access the key file; run chmod 600 on it")
        key, name = path.read_bytes().strip(), str(path)
    if len(key) < MIN_KEY_BYTES:
        raise CommandError(
            f"{name}: the key is shorter than {MIN_KEY_BYTES} bytes; make one with openssl rand"
            " -hex 32"
        )
    return key


def load_instances(
    connection: psycopg.Connection[Any],
    target: Target,
    instances: Iterable[Instance],
    *,
    report: DicomReport | None = None,
    patient_ids: Callable[[str], str] | None = None,
    skip_rejected: bool = False,
    advance: Callable[[int], object] = lambda count: None,
) -> DicomReport:
    """Insert the instances that are not stored yet, with the columns that the table has.

    In a table with a column ``sop_uid``, the SOP Instance UID says which instances are stored.
    In others the column ``source`` does, if there is one. Images that the server can't decode are
    left out.

    Args:
        connection: in autocommit mode.
        target: the table, by ``find_target``.
        instances: in any order. They are taken in portions, and read one by one.
        report: to add to.
        patient_ids: turns patient IDs into what is stored. None leaves the column out.
        skip_rejected: leave out rows that a constraint of the table rejects, too.
        advance: called with the number of instances that it dealt with.

    Returns:
        What happened.

    Raises:
        CommandError: the load failed or was interrupted. The message says how many are stored.
    """
    report = DicomReport() if report is None else report
    tags = dict(target.tag_columns)
    if patient_ids is None:
        tags.pop(PATIENT_ID, None)
    columns = target.columns | tags
    if SOP_UID in tags:
        # It says which file this is. Paths often hold names of patients.
        columns.pop("source", None)
    target = replace(target, columns=columns)
    reader = _Reader(connection, target, report, patient_ids, advance)
    store(
        connection,
        target,
        reader.rows(instances),
        report=report,
        skip_rejected=skip_rejected,
        skips_bad_images=True,
        select=reader.not_stored,
        advance=advance,
    )
    return report


@dataclass(frozen=True)
class _Reader:
    connection: psycopg.Connection[Any]
    target: Target
    report: DicomReport
    patient_ids: Callable[[str], str] | None
    advance: Callable[[int], object]

    def rows(self, instances: Iterable[Instance]) -> Iterator[ImageRow]:
        """Read instances, without those that are known to be stored before they are read."""
        rest = iter(instances)
        while portion := list(islice(rest, PORTION)):
            stored = self._stored([key for each in portion if (key := self._key(each))])
            for instance in portion:
                if self._key(instance) in stored:
                    self._note_stored()
                    continue
                try:
                    yield self._row(instance)
                except NoInstanceError as error:
                    self._leave_out(instance.name, error.kind, error.reason)

    def not_stored(self, rows: list[ImageRow]) -> list[ImageRow]:
        """Return the rows whose SOP Instance UID is not stored, sorted, and count the others."""
        if SOP_UID not in self.target.columns:
            return rows
        stored = self._stored([str(row.tags[SOP_UID]) for row in rows], with_digests=True)
        result = []
        for row in rows:
            uid = str(row.tags[SOP_UID])
            if uid not in stored:
                result.append(row)
            elif stored[uid] == hashlib.sha256(row.image).digest():
                self._note_stored()
            else:
                reason = "its SOP Instance UID is stored with other bytes"
                self._leave_out(row.name, "stored before with other bytes", reason)
        # In one order, so that no two loads wait for each other.
        return sorted(result, key=lambda row: str(row.tags[SOP_UID]))

    def _key(self, instance: Instance) -> str | None:
        if SOP_UID in self.target.columns:
            return instance.sop_uid
        return _source(instance) if "source" in self.target.columns else None

    def _stored(self, keys: list[str], with_digests: bool = False) -> dict[str, bytes | None]:
        """Return which keys are stored, each with the digest of its image if wanted."""
        if not keys:
            return {}
        key = sql.Identifier(SOP_UID if SOP_UID in self.target.columns else "source")
        image = sql.Identifier(self.target.image_column)
        query = sql.SQL("SELECT {}::text, {} FROM {} WHERE {} = ANY (%b::text[])").format(
            key,
            sql.SQL("pg_catalog.sha256({})").format(image) if with_digests else sql.SQL("NULL"),
            sql.SQL(self.target.relation),
            key,
        )
        return dict(self.connection.execute(query, (keys,), binary=True))

    def _row(self, instance: Instance) -> ImageRow:
        data = instance.read()
        values = _tags(data, self.target.max_bytes)
        tags = {name: _first(values, name) for name in self.target.columns if name in COLUMNS}
        if SOP_UID in tags and tags[SOP_UID] is None:
            raise NoInstanceError("without SOP Instance UID", "it has no SOP Instance UID")
        if (patient := tags.get(PATIENT_ID)) is not None and self.patient_ids is not None:
            tags[PATIENT_ID] = self.patient_ids(patient)
        tags |= {word: _text(values.get(word)) for word in PRIVACY}
        return ImageRow(data, instance.name, _source(instance), instance.dataset, tags=tags)

    def _note_stored(self) -> None:
        self.report.stored_before += 1
        self.advance(1)

    def _leave_out(self, name: str, kind: str, reason: str | None) -> None:
        self.report.leave_out(name, kind, reason)
        self.advance(1)


def _source(instance: Instance) -> str:
    return instance.source or instance.name


def _tags(data: bytes, max_bytes: int) -> dict[str, Any]:
    """Return tags of a picture, read as the server reads them.

    Raises:
        NoInstanceError: it is no picture, or can't be read.
    """
    from pg_siamese_server.encoding.dicom import file, tags

    spec = InputSpec(1, 1, max_bytes=max_bytes, max_pixels=MAX_PIXELS)
    try:
        return tags.values(file.read(data, spec, lambda: None).elements, KEYWORDS)
    except ImageError as error:
        raise _no_instance(error) from None
    except MemoryError:
        raise
    except Exception as error:  # whatever pydicom meets in a damaged file
        raise NoInstanceError("broken", f"it cannot be read: {error}") from None


def _no_instance(error: ImageError) -> NoInstanceError:
    reason = ": ".join(filter(None, (error.message, error.detail)))
    if error.message.startswith(_NO_PICTURE):
        return NoInstanceError(error.message.removeprefix(_NO_PICTURE))
    if error.sqlstate == PROGRAM_LIMIT_EXCEEDED:
        return NoInstanceError("over a limit", reason)
    if "cannot be decoded" in error.message:
        return NoInstanceError("broken", reason)
    return NoInstanceError(error.message, reason)


def _kind_of_rejection(error: psycopg.Error) -> str:
    if isinstance(error, psycopg.errors.InvalidBinaryRepresentation):
        return "broken"
    if isinstance(error, psycopg.errors.ProgramLimitExceeded):
        return "over a limit"
    return "rejected by the table"


def _first(values: dict[str, Any], name: str) -> str | None:
    """Return a column's value. What is no date is none, so that it does not cost the image."""
    column = COLUMNS[name]
    if name == PATIENT_ID and isinstance(parts := values.get("PatientID"), list):
        # One ID, against the standard with a backslash. Its first part can be of all patients.
        return "\\".join(_text(part) or "" for part in parts)
    text = next((text for word in column.keywords if (text := _text(values.get(word)))), None)
    if column.type != "date" or text is None:
        return text
    try:
        return date.fromisoformat(text[:10]).isoformat()
    except ValueError:
        return None


def _text(value: Any) -> str | None:
    """Return a value as text, the first one of several."""
    while isinstance(value, list):
        value = value[0] if value else None
    return None if value is None or value == "" else str(value)
