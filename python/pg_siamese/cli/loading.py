"""Commands that load images, and make a table for DICOM files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from pg_siamese.cli.failures import extra_packages
from pg_siamese.cli.options import CollectionName, Dsn
from pg_siamese.cli.terminal import errors, output, progress_bar
from pg_siamese.client.connection import CommandError, connect
from pg_siamese_server.errors import counted

if TYPE_CHECKING:
    import psycopg

    from pg_siamese.client.dicom_loading import DicomReport
    from pg_siamese.client.dicom_sources import Instance
    from pg_siamese.client.loading import LoadReport, Target
    from pg_siamese.client.sources import Part
    from pg_siamese.datasets import LeftOut

PACS = "dicomweb:"
PatientIds = Literal["omit", "hash", "keep"]


def load(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder (its sub-folders are the labels), an npz file in MedMNIST's layout, "
            "or an IDX file (with --labels). DICOM: a folder with --recursive, a zip file, "
            "a DICOMDIR or its folder, a single file, or a PACS as dicomweb:URL.",
            metavar="SOURCE",
        ),
    ],
    collection: CollectionName = "images",
    table: Annotated[
        str | None, typer.Option(help="Insert into this table instead of a collection's.")
    ] = None,
    image_column: Annotated[
        str, typer.Option(help="Image column of --table (not needed with --collection).")
    ] = "image",
    split: Annotated[
        list[str] | None, typer.Option(help="Load only this split: train, val or test. Repeatable.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="IDX file of labels.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Name of the data set. Default: the name of SOURCE.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="If the collection does not exist, create it on siamese.images with this model."
        ),
    ] = None,
    recursive: Annotated[
        bool,
        typer.Option(
            "--recursive",
            help="Load the DICOM files of a folder and of its sub-folders, whatever their names.",
        ),
    ] = False,
    patient_ids: Annotated[
        PatientIds,
        typer.Option(help="Fill the column patient_id with nothing, a keyed hash, or the ID."),
    ] = "omit",
    hash_key: Annotated[
        Path | None,
        typer.Option(
            help="File with the key of --patient-ids hash, of mode 0600. "
            "Default: the environment variable PG_SIAMESE_HASH_KEY."
        ),
    ] = None,
    study: Annotated[
        list[str] | None,
        typer.Option(help="Of a PACS: only this Study Instance UID. Repeatable."),
    ] = None,
    patient: Annotated[
        str | None, typer.Option(help="Of a PACS: only studies of this patient ID.")
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="Of a PACS: only series of this modality, e.g. CT.")
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="Of a PACS: only studies of this date or later."),
    ] = None,
    credentials: Annotated[
        Path | None,
        typer.Option(
            help="Of a PACS: a file with user and password in the format of .netrc, of mode 0600. "
            "Default: the variables PG_SIAMESE_DICOMWEB_TOKEN, or _USER and _PASSWORD, or ~/.netrc."
        ),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(help="Of a PACS: certificates of the authorities to trust, in PEM."),
    ] = None,
    skip_rejected: Annotated[
        bool, typer.Option("--skip-rejected", help="Skip images that the server rejects.")
    ] = False,
    dsn: Dsn = None,
) -> None:
    """Load images into a collection.

    The collection's triggers embed the images. Image files are stored unchanged, pixels of npz and
    IDX files as PNG. The columns dataset, split, label and source are filled if the table has them.
    Images whose source is already stored are left out, so a second run continues the first one.

    Tags of DICOM files fill the columns of create-dicom-table, if the table has them. With the
    column sop_uid, each SOP Instance UID is stored once, and source stays empty, since paths often
    hold names. DICOM files that are no pictures or can't be decoded are left out and counted.
    """
    from pg_siamese.client.dicom_columns import SOP_UID
    from pg_siamese.client.dicom_loading import keyed_hash, read_hash_key
    from pg_siamese.client.dicom_sources import is_dicom_source, open_instances
    from pg_siamese.client.sources import printable, read_source

    if model is not None and table is not None:
        raise CommandError("--model can't be used with --table")
    if hash_key is not None and patient_ids != "hash":
        raise CommandError("--hash-key needs --patient-ids hash")
    identify: Callable[[str], str] | None = str if patient_ids == "keep" else None
    if patient_ids == "hash":
        identify = keyed_hash(read_hash_key(hash_key))
    path = Path(source)
    left_out: list[LeftOut] = []
    no_parts: list[LeftOut] = []
    is_pacs = source.startswith(PACS)
    is_dicom = is_pacs or is_dicom_source(path, recursive)
    open_source: Callable[..., AbstractContextManager[Iterable[Instance]]]
    if is_pacs:
        if recursive:
            raise CommandError("--recursive can't be used with a PACS")
        open_source = _pacs(
            source.removeprefix(PACS),
            credentials,
            ca_file,
            studies=tuple(study or ()),
            patient=patient,
            modality=modality,
            since=since and since.date(),
        )
    elif study or patient or modality or since or credentials or ca_file:
        raise CommandError(
            "--study, --patient, --modality, --since, --credentials and --ca-file"
            f" need a PACS as the source: {PACS}URL"
        )
    else:
        open_source = partial(open_instances, path, recursive=recursive, leave_out=left_out.append)
    parts: list[Part] = []
    if not is_dicom:
        parts = read_source(
            path, splits=split, labels=labels, dataset=dataset, leave_out=no_parts.append
        )
    with connect(dsn) as connection:
        target = _find_target(connection, collection, table, image_column, model)
        if not is_dicom and not (path.is_dir() and SOP_UID in target.tag_columns):
            _load_parts(connection, target, parts, no_parts, skip_rejected)
            return
        if split or labels is not None:
            raise CommandError("--split and --labels can't be used with DICOM files")
        name = printable(path.resolve()).rpartition("/")[2]
        with open_source(
            dataset=dataset or (None if is_pacs else name), max_bytes=target.max_bytes
        ) as instances:
            _load_dicom(
                connection,
                target,
                instances,
                total=len(instances) if isinstance(instances, list) else None,
                description=name,
                left_out=left_out,
                patient_ids=identify,
                skip_rejected=skip_rejected,
            )


def _pacs(
    url: str, credentials: Path | None, ca_file: Path | None, **conditions: Any
) -> Callable[..., AbstractContextManager[Iterable[Instance]]]:
    """Check what is said of a PACS, and return a function that opens it."""
    with extra_packages("dicomweb"):
        from pg_siamese.client import dicomweb

    url = dicomweb.check_url(url)
    return partial(
        dicomweb.open_instances,
        url,
        dicomweb.Selection(**conditions),
        auth=dicomweb.credentials(url, credentials, os.environ),
        ca_file=ca_file,
    )


def _find_target(
    connection: psycopg.Connection[Any],
    collection: str,
    table: str | None,
    image_column: str,
    model: str | None,
) -> Target:
    from pg_siamese.client.loading import find_target
    from pg_siamese.client.queries import ensure_collection, find_collection

    if table is not None:
        return find_target(connection, table, image_column)
    if model is not None:
        ensure_collection(connection, collection, model)
    found = find_collection(connection, collection)
    return find_target(connection, found.relation, found.image_name)


def _load_parts(
    connection: psycopg.Connection[Any],
    target: Target,
    parts: Iterable[Part],
    left_out: list[LeftOut],
    skip_rejected: bool,
) -> None:
    from pg_siamese.client.loading import LoadReport, load_part
    from pg_siamese.client.sources import count_left_out

    _name_left_out(left_out)
    report = LoadReport()
    for part in parts:
        with progress_bar(str(part), len(part)) as advance:
            load_part(
                connection,
                target,
                part,
                report=report,
                skip_rejected=skip_rejected,
                advance=advance,
            )
    for rejection in report.rejected:
        _warn("rejected", rejection.name, rejection.reason)
    _print_stored(report, target)
    if left_out:
        output().print(escape(count_left_out(left_out)), soft_wrap=True)


def _load_dicom(
    connection: psycopg.Connection[Any],
    target: Target,
    instances: Iterable[Instance],
    *,
    total: int | None,
    description: str,
    left_out: list[LeftOut],
    patient_ids: Callable[[str], str] | None,
    skip_rejected: bool,
) -> None:
    """Load instances under a bar, and print the summary, with the files left out before."""
    from pg_siamese.client.dicom_columns import PATIENT_ID
    from pg_siamese.client.dicom_loading import DicomReport, load_instances
    from pg_siamese.client.sources import count_kinds

    if patient_ids is not None and PATIENT_ID not in target.tag_columns:
        raise CommandError(f'table {target.relation} has no column "{PATIENT_ID}"')
    report = DicomReport(left_out=Counter(file.kind for file in left_out))
    with progress_bar(description, total) as advance:
        load_instances(
            connection,
            target,
            instances,
            report=report,
            patient_ids=patient_ids,
            skip_rejected=skip_rejected,
            advance=advance,
        )
    _name_left_out(left_out)
    for rejection in report.named:
        _warn("left out", rejection.name, rejection.reason)
    _print_stored(report, target)
    if report.left_out:
        output().print(escape(count_kinds(report.left_out)), soft_wrap=True)
    if report.stored:
        _print_privacy(report)
        if patient_ids is None and PATIENT_ID in target.tag_columns:
            output().print(
                f"{PATIENT_ID} is left empty: --patient-ids hash or keep fills it", soft_wrap=True
            )


def _print_privacy(report: DicomReport) -> None:
    from pg_siamese.client.dicom_loading import BURNED_IN, IDENTITY_REMOVED, RECOGNIZABLE

    burned_in, recognizable, removed = (
        {value: number for (word, value), number in report.privacy.items() if word == keyword}
        for keyword in (BURNED_IN, RECOGNIZABLE, IDENTITY_REMOVED)
    )
    output().print(
        f"burned-in annotation: {burned_in.get('YES', 0):,} YES,"
        f" {report.stored - burned_in.get('YES', 0) - burned_in.get('NO', 0):,} absent;"
        f" recognizable visual features: {recognizable.get('YES', 0):,} YES;"
        f" patient identity removed: {report.stored - removed.get('YES', 0):,} not YES",
        soft_wrap=True,
    )
    output().print(
        "the files are stored as they are, with all names and dates in them", soft_wrap=True
    )


def _name_left_out(left_out: Iterable[LeftOut]) -> None:
    from pg_siamese.client.sources import printable

    for file in left_out:
        if file.reason is not None:
            _warn("left out", printable(file.path), file.reason)


def _warn(what: str, name: str, reason: str) -> None:
    errors().print(f"[yellow]{what}:[/] {escape(name)}: {escape(reason)}", soft_wrap=True)


def _print_stored(report: LoadReport, target: Target) -> None:
    before = f" (already stored: {report.stored_before:,})" if report.stored_before else ""
    images = counted(report.stored, "image")
    output().print(f"{images} stored in {escape(target.relation)}{before}")


def create_dicom_table(
    table: Annotated[str, typer.Argument(help="Name of the new table.", metavar="TABLE")],
    collection: Annotated[
        str | None,
        typer.Option("--collection", "-c", help="Name of the collection. Default: the table's."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model of the collection. Default: the default model.")
    ] = None,
    deferred: Annotated[
        bool, typer.Option("--deferred", help="Let workers embed the images.")
    ] = False,
    frames: Annotated[
        Literal["one", "all"],
        typer.Option(help="Embed one frame of each image, or all of them."),
    ] = "one",
    window: Annotated[
        str,
        typer.Option(help="Render with this window, such as lung or 40/400. Default: the file's."),
    ] = "",
    dsn: Dsn = None,
) -> None:
    """Create a table for DICOM files, with columns for tags, and its collection.

    The columns hold patient, study, series, instance, modality, body part, laterality, view, dates
    and device. No SOP Instance UID can be stored twice. The command load fills them. The patient is
    the collection's group column.
    """
    from pg_siamese.client.dicom_columns import create_table

    with connect(dsn) as connection:
        name = create_table(
            connection,
            table,
            collection=collection,
            model=model,
            deferred=deferred,
            frames=frames,
            window=window,
        )
    output().print(
        f"table {escape(table)} and collection {escape(name)} are created:"
        f" pg_siamese load FOLDER --recursive -c {escape(name)}",
        soft_wrap=True,
    )
