"""The demo on DICOM files: columns from their tags, and the nearest images of other patients."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psycopg
from rich.markup import escape

from pg_siamese.cli.demo_data import build_if_needed, find_data, short_path
from pg_siamese.cli.terminal import answer_table, output, progress_bar
from pg_siamese.client.connection import CommandError, schema_prefix
from pg_siamese.client.dicom_columns import create_table
from pg_siamese.client.dicom_loading import DicomReport, load_instances
from pg_siamese.client.dicom_sources import Instance, open_instances
from pg_siamese.client.loading import find_target
from pg_siamese.client.queries import collection_names, find_collection
from pg_siamese.client.sources import count_kinds
from pg_siamese.datasets.places import data_folders
from pg_siamese_server.errors import counted

if TYPE_CHECKING:
    from pg_siamese.client.contact_sheet import SheetRow
    from pg_siamese.client.queries import Collection

TABLE = "dicom_images"
SHEET = Path("dicom_contact_sheet.png")
NEIGHBOURS = 4
QUERIES = 2
# Of made files: pictures per data set, and their modality and SOP class.
MADE = 60
KINDS = {
    "breastmnist": ("US", "1.2.840.10008.5.1.4.1.1.6.1"),
    "pneumoniamnist": ("DX", "1.2.840.10008.5.1.4.1.1.1.1"),
    "retinamnist": ("OP", "1.2.840.10008.5.1.4.1.1.77.1.5.1"),
}
OTHER = ("OT", "1.2.840.10008.5.1.4.1.1.7")
# A root that every owner of a UUID has (PS3.5 annex B.2).
UIDS = "2.25.97531086420"
STUDY_DATES = ("20240229", "20240614")


def run_dicom_demo(
    connection: psycopg.Connection[Any], folder: Path | None, sheet: Path | None
) -> None:
    """Run the demo on DICOM files. A second run stores nothing and only searches.

    Raises:
        CommandError: there are no DICOM files, or no patients to tell apart.
    """
    from pg_siamese.client.contact_sheet import contact_sheet

    started = time.monotonic()
    prepare_table(connection)
    load_files(connection, folder)
    build_if_needed(connection, TABLE)
    collection = replace(
        find_collection(connection, TABLE),
        shown_columns=("patient_id", "modality", "study_date"),
    )
    rows = [
        search(connection, collection, key, patient, options)
        for key, patient in query_rows(connection)
        for options in ("", ", group_by => 'patient_id', own_group => false")
    ]
    target = sheet or SHEET
    title = "similar_images(image_id => …, group_by => 'patient_id', own_group => false)"
    contact_sheet(rows, target, title=title, dpi=90, label="patient")
    console = output()
    console.print(f"[bold]contact sheet:[/] {escape(short_path(target))}", soft_wrap=True)
    console.print(f"done in {time.monotonic() - started:.1f} s")


def prepare_table(connection: psycopg.Connection[Any]) -> None:
    """Create the table and its collection, unless they exist."""
    if TABLE not in collection_names(connection):
        connection.execute("SELECT FROM siamese.register_shipped_models()")
        create_table(connection, TABLE, model="clinical")
        output().print(f'created the table and the collection "{TABLE}" with model "clinical"')


def load_files(connection: psycopg.Connection[Any], folder: Path | None) -> None:
    """Load the files that are not stored yet, and say what was left out.

    Raises:
        CommandError: there are no DICOM files.
    """
    target = find_target(connection, TABLE)
    report = DicomReport()
    started = time.monotonic()
    with find_instances(folder, target.max_bytes, report) as instances:
        if not instances:
            raise CommandError("no DICOM files are in this folder")
        with progress_bar("DICOM files         ", len(instances)) as advance:
            load_instances(
                connection, target, instances, report=report, patient_ids=str, advance=advance
            )
    console = output()
    if report.stored:
        seconds = time.monotonic() - started
        console.print(f"{counted(report.stored, 'image')} stored in {seconds:.1f} s")
    if report.stored_before:
        console.print(f"{counted(report.stored_before, 'image')} already stored")
    if report.left_out:
        console.print(escape(count_kinds(report.left_out)), soft_wrap=True)


@contextmanager
def find_instances(
    folder: Path | None, max_bytes: int, report: DicomReport
) -> Iterator[Sequence[Instance]]:
    """List the files of a folder, else of the data beside the project, else files made here."""
    console = output()
    places = data_folders("dicom_series") if folder is None else [folder]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        console.print(
            "[bold]data:[/] no DICOM files are at hand, so the demo makes some of MedMNIST's"
            " pictures. Patients and studies are made up",
            soft_wrap=True,
        )
        yield made_instances()
        return
    console.print(f"[bold]data:[/] DICOM files in {escape(str(place))}", soft_wrap=True)
    with open_instances(
        place,
        recursive=True,
        dataset=place.name,
        max_bytes=max_bytes,
        leave_out=lambda file: report.leave_out(str(file.path), file.kind, file.reason),
    ) as instances:
        yield instances


def query_rows(connection: psycopg.Connection[Any]) -> list[tuple[str, str]]:
    """Return key and patient of an image of each of the first patients with several studies.

    Nothing is chosen by hand, so the pictures show what the encoder really does.

    Raises:
        CommandError: no patient has two studies, or there is one patient only.
    """
    rows = connection.execute(
        "SELECT min(image_id)::text, patient_id FROM dicom_images GROUP BY patient_id"
        " HAVING count(DISTINCT study_uid) > 1 ORDER BY patient_id LIMIT %s",
        (QUERIES,),
    ).fetchall()
    patients = connection.execute("SELECT count(DISTINCT patient_id) FROM dicom_images").fetchone()
    if not rows or patients == (1,):
        raise CommandError("the demo needs several patients, and one of them with two studies")
    return rows


def search(
    connection: psycopg.Connection[Any],
    collection: Collection,
    key: str,
    patient: str,
    options: str,
) -> SheetRow:
    """Search by a stored image, print the statement with its answers, and return them drawn."""
    from pg_siamese.client.contact_sheet import SheetRow
    from pg_siamese.client.queries import (
        Search,
        display_pixels,
        run_search,
        sheet_neighbours,
        stored_images,
    )

    console = output()
    name = "other patients" if options else "any patient"
    statement = (
        "SELECT s.rank, i.image_id, s.distance, s.similarity, i.patient_id, i.modality,"
        " i.study_date\n"
        f"  FROM {schema_prefix(connection)}similar_images(image_id => {key}, k => {NEIGHBOURS},"
        f" collection => '{TABLE}'{options}) AS s\n"
        "  JOIN dicom_images AS i USING (image_id)\n"
        " ORDER BY s.rank"
    )
    console.print(f"\n[bold]image {key} of patient {escape(patient)}:[/] the nearest of {name}")
    console.print(f"{statement};", markup=False, soft_wrap=True)
    answers = run_search(connection, collection, Search(statement, ()))
    console.print(answer_table(collection, answers))
    neighbours = [
        replace(neighbour, label=answer.values["patient_id"])
        for neighbour, answer in zip(
            sheet_neighbours(connection, collection, answers), answers, strict=True
        )
    ]
    image = stored_images(connection, collection, [key])[key]
    return SheetRow(f"The nearest of {name}", display_pixels(image), patient, neighbours)


def made_instances() -> list[Instance]:
    """Make DICOM files of some of the demo's pictures: two studies of each patient.

    The second study is the same picture, moved by a pixel and a little darker.
    """
    made: list[Instance] = []
    for name, splits in find_data().sets.items():
        modality, sop_class = KINDS.get(name, OTHER)
        for picture in splits["test"].images[:MADE]:
            patient = len(made) // len(STUDY_DATES) + 1
            for study, day in enumerate(STUDY_DATES, 1):
                uid = f"{patient}.{study}"
                data = dicom_file(
                    picture if study == 1 else np.roll(picture, 1, 1) // 10 * 9,
                    SOPClassUID=sop_class,
                    SOPInstanceUID=f"{UIDS}.3.{uid}",
                    SeriesInstanceUID=f"{UIDS}.2.{uid}",
                    StudyInstanceUID=f"{UIDS}.1.{uid}",
                    PatientID=f"DEMO-{patient:03}",
                    PatientName=f"Demo^Patient {patient}",
                    StudyDate=day,
                    Modality=modality,
                    Manufacturer="pg_siamese demo",
                )
                made.append(Instance(f"{name} {uid}", partial(bytes, data)))
    return made


def dicom_file(picture: npt.NDArray[np.uint8], **elements: str) -> bytes:
    """Return a picture of 8 bits, (H, W) or (H, W, 3), as an uncompressed DICOM file."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    picture = np.squeeze(picture)
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.Rows, dataset.Columns = picture.shape[:2]
    dataset.SamplesPerPixel = 1 if picture.ndim == 2 else 3
    dataset.PhotometricInterpretation = "MONOCHROME2" if picture.ndim == 2 else "RGB"
    if picture.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = np.ascontiguousarray(picture).tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = UID(elements["SOPClassUID"])
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(elements["SOPInstanceUID"])
    target = io.BytesIO()
    dataset.save_as(target, enforce_file_format=True)
    return target.getvalue()
