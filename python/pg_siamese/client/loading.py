"""Loading images into a table by plain INSERTs, so that the collection's triggers embed them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from pg_siamese.client.connection import CommandError, describe_error
from pg_siamese.client.dicom_columns import COLUMNS, SOP_UID
from pg_siamese.client.sources import ImageRow, Part, SourceError
from pg_siamese_server.errors import counted

# Enough rows per statement to fill the encoder's batches, few enough that the progress bar moves
# and Ctrl-C loses little.
BATCH_ROWS = 400
BATCH_BYTES = 16 * 1024 * 1024

# The columns that say where an image is from, filled if the table has them.
DESCRIPTION = ("dataset", "split", "label", "source")

# Errors of single rows: no image, an image over the model's limits, or a violated constraint of the
# table. Any other error concerns the whole load.
REJECTIONS = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)
BAD_IMAGES = (
    psycopg.errors.InvalidBinaryRepresentation,
    psycopg.errors.ProgramLimitExceeded,
)
# PostgreSQL's own limit of a value.
MAX_BYTES = 1024**3 - 1


@dataclass(frozen=True)
class Target:
    """The table to load images into: ``relation`` as the server quotes it (schema.table).

    Attributes:
        relation: the table.
        image_column: its column of images, not quoted.
        columns: the columns to fill beside it, with the SQL types to cast to: those of
            :data:`DESCRIPTION` that the table has.
        tag_columns: those of ``dicom_columns.COLUMNS`` that the table has, in the same way.
        has_unique_uid: whether the table refuses an SOP Instance UID that it has.
        max_bytes: largest file that its collections take.
    """

    relation: str
    image_column: str
    columns: dict[str, str]
    tag_columns: dict[str, str] = field(default_factory=dict)
    has_unique_uid: bool = False
    max_bytes: int = MAX_BYTES


@dataclass(frozen=True)
class Rejection:
    """An image that is not stored, by its name, and the reason in one line."""

    name: str
    reason: str


@dataclass
class LoadReport:
    """What a load did. It grows while the load runs, so that Ctrl-C can say what is stored."""

    stored: int = 0
    stored_before: int = 0
    rejected: list[Rejection] = field(default_factory=list)

    def add(self, rows: Sequence[ImageRow], stored: int) -> None:
        """Count rows that were sent. Those that are not stored by it were stored meanwhile."""
        self.stored += stored
        self.stored_before += len(rows) - stored

    def reject(self, name: str, reason: str, error: psycopg.Error) -> None:
        """Note an image that the server rejected."""
        self.rejected.append(Rejection(name, reason))


def find_target(
    connection: psycopg.Connection[Any], relation: str, image_column: str = "image"
) -> Target:
    """Look up the table's columns.

    Raises:
        CommandError: the table or the image column does not exist.
    """
    row = connection.execute(
        "SELECT c.oid, c.oid::regclass::text FROM pg_catalog.pg_class AS c"
        " WHERE c.oid = pg_catalog.to_regclass(%s)",
        (relation,),
    ).fetchone()
    if row is None:
        raise CommandError(f'table "{relation}" does not exist')
    oid, name = row
    found = connection.execute(
        # A cast to varchar(8) would cut what is longer, and two values would become one. Text is
        # cast to text, so that the assignment to the column refuses it.
        "SELECT a.attname, CASE t.typcategory WHEN 'S' THEN 'text'"
        "  ELSE pg_catalog.format_type(a.atttypid, a.atttypmod) END"
        "  FROM pg_catalog.pg_attribute AS a"
        "  JOIN pg_catalog.pg_type AS t ON t.oid = a.atttypid"
        " WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''",
        (oid,),
    ).fetchall()
    columns: dict[str, str] = dict(found)
    if image_column not in columns:
        raise CommandError(f'table "{name}" has no column "{image_column}"')
    return Target(
        name,
        image_column,
        {c: columns[c] for c in DESCRIPTION if c in columns},
        {c: columns[c] for c in COLUMNS if c in columns},
        _has_unique_uid(connection, oid),
        _max_bytes(connection, oid, image_column),
    )


def _has_unique_uid(connection: psycopg.Connection[Any], oid: int) -> bool:
    row = connection.execute(
        "SELECT FROM pg_catalog.pg_index AS i"
        " JOIN pg_catalog.pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]"
        " WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indimmediate"
        "  AND i.indnkeyatts = 1 AND i.indpred IS NULL AND a.attname = %s",
        (oid, SOP_UID),
    ).fetchone()
    return row is not None


def _max_bytes(connection: psycopg.Connection[Any], oid: int, image_column: str) -> int:
    """Return the largest file that all collections of an image column take."""
    try:
        row = connection.execute(
            "SELECT min(coalesce(c.max_bytes, (m.specification #>> '{input,max_bytes}')::bigint))"
            "  FROM siamese.collections AS c JOIN siamese.models AS m USING (model_id)"
            " WHERE c.relation = %s AND c.image_column = %s",
            (oid, image_column),
        ).fetchone()
    except psycopg.errors.InsufficientPrivilege:  # who only inserts need not see the catalogue
        return MAX_BYTES
    return MAX_BYTES if row is None or row[0] is None else int(row[0])


def stored_sources(connection: psycopg.Connection[Any], target: Target, part: Part) -> set[str]:
    """Return the sources of the part's data set and split that are stored, if there is a column."""
    if "source" not in target.columns:
        return set()
    conditions: list[sql.Composable] = [sql.SQL("source IS NOT NULL")]
    for column, value in (("dataset", part.dataset), ("split", part.split)):
        if column in target.columns and value is not None:
            conditions.append(
                sql.SQL("{}::text = {}").format(sql.Identifier(column), sql.Literal(value))
            )
    query = sql.SQL("SELECT source::text FROM {} WHERE {}").format(
        sql.SQL(target.relation), sql.SQL(" AND ").join(conditions)
    )
    return {str(source) for (source,) in connection.execute(query)}


def load_part(
    connection: psycopg.Connection[Any],
    target: Target,
    part: Part,
    *,
    report: LoadReport | None = None,
    skip_rejected: bool = False,
    advance: Callable[[int], object] = lambda count: None,
) -> LoadReport:
    """Insert the images of ``part`` whose source is not stored yet, by :func:`store`."""
    report = report or LoadReport()
    stored = stored_sources(connection, target, part)
    missing = [index for index, source in enumerate(part.sources) if source not in stored]
    before = len(part) - len(missing)
    report.stored_before += before
    advance(before)
    store(
        connection,
        target,
        map(part.row, missing),
        report=report,
        skip_rejected=skip_rejected,
        advance=advance,
    )
    return report


def store(
    connection: psycopg.Connection[Any],
    target: Target,
    rows: Iterable[ImageRow],
    *,
    report: LoadReport | None = None,
    skip_rejected: bool = False,
    skips_bad_images: bool = False,
    select: Callable[[list[ImageRow]], list[ImageRow]] = lambda batch: batch,
    advance: Callable[[int], object] = lambda count: None,
    batch_rows: int = BATCH_ROWS,
) -> LoadReport:
    """Insert ``rows`` in batches, one statement and one transaction each.

    If the server rejects a batch, its halves are tried in turn until the image at fault is alone.
    The others are stored.

    Args:
        connection: in autocommit mode.
        target: the table.
        rows: to insert.
        report: of earlier loads, to be added to.
        skip_rejected: continue after a row that the server rejects.
        skips_bad_images: continue after an image that it can't decode or that is over a limit.
        select: called with each batch. Returns the rows to send.
        advance: called after each statement with the number of rows that it dealt with.
        batch_rows: largest number of rows per statement.

    Returns:
        What happened.

    Raises:
        CommandError: an image was rejected, or the load failed or was interrupted. The message
            says how many images are stored. Ctrl-C cancels the running statement in the server.
    """
    report = report or LoadReport()
    skipped = REJECTIONS if skip_rejected else BAD_IMAGES if skips_bad_images else ()
    loader = _Loader(connection, target, report, skipped, advance)
    can_continue = not {"source", SOP_UID}.isdisjoint(target.columns)
    how_to_continue = "; run the same command to continue" if can_continue else ""
    try:
        for batch in batches(rows, batch_rows):
            if selected := select(batch):
                loader.insert(selected)
    except KeyboardInterrupt:
        # psycopg has cancelled the statement in the server, and its transaction is rolled back.
        raise CommandError(
            f"interrupted: the running statement was cancelled; {_stored(report)}{how_to_continue}",
            exit_code=130,
        ) from None
    except psycopg.Error as error:
        raise CommandError(f"{describe_error(error)} ({_stored(report)})") from error
    except SourceError as error:
        raise CommandError(f"{error}; {_stored(report)}{how_to_continue}") from error
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror} ({_stored(report)})") from error
    return report


@dataclass
class _Loader:
    connection: psycopg.Connection[Any]
    target: Target
    report: LoadReport
    skipped: tuple[type[psycopg.Error], ...]
    advance: Callable[[int], object]

    def __post_init__(self) -> None:
        self.statement = _insert_statement(self.target)

    def insert(self, batch: Sequence[ImageRow]) -> None:
        values: list[list[object]] = [[row.image for row in batch]]
        values += [[row.value(column) for row in batch] for column in self.target.columns]
        try:
            with self.connection.transaction():
                cursor = self.connection.execute(self.statement, values)
        except REJECTIONS as error:
            if len(batch) == 1:
                self._reject(batch[0], describe_error(error), error)
                return
        else:
            stored = cursor.rowcount if _is_unique(self.target) else len(batch)
            self.report.add(batch, stored)
            self.advance(len(batch))
            return
        middle = len(batch) // 2
        self.insert(batch[:middle])
        self.insert(batch[middle:])

    def _reject(self, row: ImageRow, reason: str, error: psycopg.Error) -> None:
        self.report.reject(row.name, reason, error)
        self.advance(1)
        if not isinstance(error, self.skipped):
            raise CommandError(f"{row.name}: {reason} ({_stored(self.report)})") from error


def _insert_statement(target: Target) -> sql.Composed:
    """Return one INSERT of any number of rows: an array per column, in the binary format."""
    names = [target.image_column, *target.columns]
    aliases = [sql.Identifier(f"c{number}") for number in range(len(names))]
    # The description is text. The table's columns may have other types (label integer).
    values = [aliases[0]] + [
        sql.SQL("{}::{}").format(alias, sql.SQL(kind))
        for alias, kind in zip(aliases[1:], target.columns.values(), strict=True)
    ]
    arrays = [sql.SQL("%b::bytea[]")] + [sql.SQL("%b::text[]")] * len(target.columns)
    comma = sql.SQL(", ")
    return sql.SQL(
        "INSERT INTO {} ({}) SELECT {} FROM ROWS FROM (unnest({})) WITH ORDINALITY"
        " AS u ({}, position) ORDER BY position{}"
    ).format(
        sql.SQL(target.relation),
        comma.join(map(sql.Identifier, names)),
        comma.join(values),
        comma.join(arrays),
        comma.join(aliases),
        sql.SQL(f" ON CONFLICT ({SOP_UID}) DO NOTHING" if _is_unique(target) else ""),
    )


def _is_unique(target: Target) -> bool:
    """Return whether rows are left to others that store the same instance meanwhile."""
    return target.has_unique_uid and SOP_UID in target.columns


def batches(
    rows: Iterable[ImageRow], batch_rows: int = BATCH_ROWS, batch_bytes: int = BATCH_BYTES
) -> Iterator[list[ImageRow]]:
    """Group ``rows`` in order, up to limits of rows and bytes. A batch has at least one row.

    No batch has an SOP Instance UID twice. If the rows end with an error of their source, those
    before it are a batch, so that they need not be read again.
    """
    batch: list[ImageRow] = []
    uids: set[str | None] = set()
    size = 0
    try:
        for row in rows:
            uid = row.tags.get(SOP_UID)
            is_full = len(batch) >= batch_rows or size + len(row.image) > batch_bytes
            if batch and (is_full or uid in uids):
                yield batch
                batch, uids, size = [], set(), 0
            batch.append(row)
            size += len(row.image)
            if uid is not None:
                uids.add(uid)
    except SourceError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _stored(report: LoadReport) -> str:
    return f"{counted(report.stored, 'image')} stored by this command"
