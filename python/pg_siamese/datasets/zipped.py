"""Zip files of images by class, read in place: nothing is written to the disk."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from pg_siamese.datasets.base import DataFormatError, DataNotFoundError
from pg_siamese.datasets.folder import IMAGE_SUFFIXES, Member, class_and_split
from pg_siamese.datasets.groups import GROUPS_FILE

# What zipfile and its decompressors raise for a damaged member, each in its own way.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    KeyError,  # there is no such member
    OSError,
    RuntimeError,
    ValueError,
)


@contextmanager
def open_zip(path: Path | str) -> Iterator[zipfile.ZipFile]:
    """Open a zip file.

    Raises:
        DataFormatError: it is none.
        OSError: it can't be read.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise DataFormatError(f"{path}: not a zip file: {error}") from error
    with archive:
        yield archive


def groups_name(archive: zipfile.ZipFile, members: Sequence[Member]) -> str | None:
    """Return the name of the file of groups, beside all images or in a folder around, if any."""
    names = {info.filename for info in archive.infolist()}
    around = _folder_around([PurePosixPath(member.name) for member in members])
    name = str(PurePosixPath(*PurePosixPath(members[0].name).parts[:around], GROUPS_FILE))
    return name if name in names else None


def list_image_zip(path: Path | str, archive: zipfile.ZipFile) -> list[Member]:
    """List the images of a zip file, in the order of their names, as ``list_image_folder`` does.

    One folder around everything does not count. Names that leave the archive (absolute, a drive's,
    or with ``..``) are refused, although nothing is extracted: such a file was made to harm.

    Raises:
        DataFormatError: a name leaves the archive.
        DataNotFoundError: there is no image.
    """
    names = []
    for info in archive.infolist():
        place = PurePosixPath(info.filename)
        if (
            place.is_absolute()
            or ".." in place.parts
            or "\\" in info.filename
            or ":" in (place.parts or ("",))[0]
        ):
            raise DataFormatError(f"{path}: member {info.filename!r} leads out of the archive")
        hidden = any(part.startswith((".", "__MACOSX")) for part in place.parts)
        if not info.is_dir() and not hidden and place.suffix.lower() in IMAGE_SUFFIXES:
            names.append(info.filename)
    if not names:
        raise DataNotFoundError(f"{path}: no image in this zip file")
    around = _folder_around([PurePosixPath(name) for name in names])
    return [
        Member(name, *class_and_split(PurePosixPath(name).parts[around:-1]))
        for name in sorted(names)
    ]


def _folder_around(places: list[PurePosixPath]) -> int:
    """Return 1 if all images lie in one folder that can't be their class, else 0."""
    first = {place.parts[0] for place in places}
    return int(
        len(first) == 1
        and all(len(place.parts) > 2 for place in places)
        and class_and_split(places[0].parts[:1])[1] is None
    )


@contextmanager
def open_member(
    path: Path | str, archive: zipfile.ZipFile, member: str | zipfile.ZipInfo
) -> Iterator[IO[bytes]]:
    """Open a member for reading.

    Raises:
        DataFormatError: it is missing, encrypted or damaged, also if that is found while it is
            read.
    """
    try:
        with archive.open(member) as file:
            yield file
    except _DAMAGED as error:
        name = member if isinstance(member, str) else member.filename
        raise DataFormatError(f"{path}: {name}: {error}") from error


def read_member(path: Path | str, archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """Return the bytes of a member, whatever its header says of its size.

    Raises:
        DataFormatError: it is larger than ``max_bytes``, missing, encrypted or damaged.
    """
    with open_member(path, archive, name) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise DataFormatError(f"{path}: {name}: larger than the limit of {max_bytes} bytes")
    return data
