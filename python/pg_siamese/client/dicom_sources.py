"""Where DICOM instances come from: folders, zip files and DICOMDIR trees, read one at a time."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from pg_siamese.client.connection import CommandError
from pg_siamese.client.sources import printable
from pg_siamese.datasets import DataFormatError, LeftOut
from pg_siamese.datasets.zipped import open_member, open_zip
from pg_siamese_server.encoding import kinds

# More than any study has. The list alone takes 1 kB per member.
MAX_MEMBERS = 1_000_000
MAX_DICOMDIR_BYTES = 64 * 1024 * 1024
# Where the bytes DICM end.
HEAD_BYTES = 132
# A member's flag in a zip file.
ENCRYPTED = 1


@dataclass(frozen=True)
class Instance:
    """One DICOM file that may be loaded.

    Attributes:
        name: for messages, such as a path.
        read: returns the bytes of the file. It is called once at most, and not if the instance is
            known to be stored. It raises ``NoInstanceError`` if the file is to be left out.
        sop_uid: SOP Instance UID, if it is known before the file is read.
        source: identifies the file in tables without a column ``sop_uid``. None means ``name``.
        dataset: for the table's column of that name.
    """

    name: str
    read: Callable[[], bytes]
    sop_uid: str | None = None
    source: str | None = None
    dataset: str | None = None


class NoInstanceError(Exception):
    """A file that is left out. The others are not affected.

    Attributes:
        kind: groups it with others like it, such as ``not DICOM``.
        reason: a sentence on this file. None if nobody would miss it.
    """

    def __init__(self, kind: str, reason: str | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.reason = reason


def is_dicom_source(path: Path, recursive: bool) -> bool:
    """Return whether a path can only be meant as DICOM: a zip file, a DICOMDIR, a DICOM file.

    A folder is one if it has a DICOMDIR, or is to be searched for DICOM files.
    """
    if path.is_dir():
        return recursive or _dicomdir(path) is not None
    if not path.is_file() or path.suffix.lower() == ".npz":
        return False
    return _begins_as_dicom(path) or zipfile.is_zipfile(path)


@contextmanager
def open_instances(
    path: Path,
    *,
    recursive: bool,
    dataset: str,
    max_bytes: int,
    leave_out: Callable[[LeftOut], object],
) -> Iterator[list[Instance]]:
    """List the files of a folder, a zip file or a DICOMDIR. They can be read in the body.

    Args:
        path: a folder, a zip file, a DICOMDIR or a DICOM file.
        recursive: take all files below a folder, whatever a DICOMDIR in it says.
        dataset: of the instances.
        max_bytes: larger files are left out when they are read.
        leave_out: called with each file that is left out before it is read.

    Raises:
        CommandError: the DICOMDIR can't be read, or the zip file has too many members.
        DataFormatError: it is no zip file.
    """
    path = path.resolve()
    if not path.is_dir() and not _begins_as_dicom(path):
        with open_zip(path) as archive:
            yield _zip_instances(path, archive, dataset, max_bytes, leave_out)
        return
    index = None if recursive else _dicomdir(path)
    if index is not None:
        files = _file_set(index, leave_out)
        folder = index.parent
    else:
        folder = path if path.is_dir() else path.parent
        files = _files_below(path, recursive, leave_out) if path.is_dir() else [path]
    yield [
        Instance(
            printable(file),
            partial(_read_file, file, max_bytes),
            source=f"file:{dataset}/{printable(file.relative_to(folder))}",
            dataset=dataset,
        )
        for file in files
    ]


def _begins_as_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return kinds.supported(file.read(HEAD_BYTES)) == "DICOM"


def _dicomdir(path: Path) -> Path | None:
    """Return the DICOMDIR that a path is, or that lies in the folder that it is."""
    if path.is_dir():
        return next((each for each in sorted(path.iterdir()) if _dicomdir_file(each)), None)
    return path if _dicomdir_file(path) else None


def _dicomdir_file(path: Path) -> bool:
    return path.name.upper() == "DICOMDIR" and path.is_file()


def _files_below(
    folder: Path, recursive: bool, leave_out: Callable[[LeftOut], object]
) -> list[Path]:
    """List the files of a folder, sorted. Links to folders are left out: they can be circles."""

    def unreadable(error: OSError) -> None:
        path = Path(os.fsdecode(error.filename))
        leave_out(LeftOut(path, "folder that cannot be read", error.strerror))

    files = []
    for place, folders, names in os.walk(folder, onerror=unreadable):
        for name in sorted(name for name in folders if name.startswith(".") or not recursive):
            kind = "hidden" if name.startswith(".") else "sub-folder (--recursive loads them)"
            leave_out(LeftOut(Path(place, name), kind))
            folders.remove(name)
        folders.sort()
        for link in filter(Path.is_symlink, (Path(place, name) for name in folders)):
            leave_out(LeftOut(link, "link to a folder", "load the folder that it leads to"))
        for name in sorted(names):
            if name.startswith("."):
                leave_out(LeftOut(Path(place, name), "hidden"))
            else:
                files.append(Path(place, name))
    return files


def _file_set(index: Path, leave_out: Callable[[LeftOut], object]) -> list[Path]:
    """Return the files that a DICOMDIR names (PS3.3 annex F, PS3.10 section 8).

    pydicom's ``FileSet`` is not used. It drops what is missing, heeds the case of names, and runs
    forever on a circle of records.

    Raises:
        CommandError: it can't be read.
    """
    from pg_siamese_server.encoding.dicom import file
    from pg_siamese_server.encoding.specification import InputSpec

    try:
        data = _read_file(index, MAX_DICOMDIR_BYTES)
        # Twelve elements of a record are more than a picture may have, if there are many records.
        _, elements, _, _ = file.read_elements(
            data, InputSpec(1, 1), lambda: None, max_reads=len(data)
        )
        with file.quiet():
            names = [
                record.ReferencedFileID
                for record in elements.DirectoryRecordSequence
                if record.get("ReferencedFileID") and record.get("RecordInUseFlag") != 0
            ]
    except MemoryError:
        raise
    except Exception:  # whatever pydicom meets in a damaged file
        raise CommandError(
            f"{printable(index)}: not a readable DICOMDIR; load its folder with --recursive instead"
        ) from None
    folder = _Folder(index.parent)
    found = []
    for parts in names:
        parts = [parts] if isinstance(parts, str) else list(parts)
        place = folder.find(parts)
        if place is None:
            missing = index.parent.joinpath(*parts)
            leave_out(LeftOut(missing, "missing, but in the DICOMDIR", "there is no such file"))
        else:
            found.append(place)
    return list(dict.fromkeys(found))


class _Folder:
    """A folder that finds files by names in upper case, as file-sets have them.

    Media without lower case are often mounted or copied with it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[Path, dict[str, Path]] = {}

    def find(self, parts: list[str]) -> Path | None:
        """Return the file at these components, which are names and no ways out, or None."""
        place = self._path
        for part in parts:
            entries = {} if part in ("", ".", "..") else self._in(place)
            found = entries.get(part) or entries.get(part.upper())
            if found is None:
                return None
            place = found
        return place if place.is_file() else None

    def _in(self, place: Path) -> dict[str, Path]:
        if place not in self._entries:
            # ISO 9660 shows versions and final dots if it is mounted plainly: IM0001.;1.
            entries = sorted(place.iterdir()) if place.is_dir() else []
            plain = {_plain_name(entry.name): entry for entry in entries}
            self._entries[place] = plain | {entry.name: entry for entry in entries}
        return self._entries[place]


def _plain_name(name: str) -> str:
    return name.upper().split(";")[0].rstrip(".")


def _zip_instances(
    path: Path,
    archive: zipfile.ZipFile,
    dataset: str,
    max_bytes: int,
    leave_out: Callable[[LeftOut], object],
) -> list[Instance]:
    members = archive.infolist()
    name = printable(path)
    if len(members) > MAX_MEMBERS:
        raise CommandError(f"{name}: more than {MAX_MEMBERS:,} members")
    result = []
    for member in members:
        if not member.filename or member.is_dir():
            continue
        place = PurePosixPath(member.filename)
        shown = Path(path, *place.parts[place.is_absolute() :])
        if any(part.startswith((".", "__MACOSX")) for part in place.parts):
            leave_out(LeftOut(shown, "hidden"))
        elif member.flag_bits & ENCRYPTED:
            leave_out(LeftOut(shown, "encrypted", "it is encrypted"))
        else:
            result.append(
                Instance(
                    f"{name}: {member.filename}",
                    partial(_read_member, path, archive, member, max_bytes),
                    source=f"file:{dataset}/{member.filename}",
                    dataset=dataset,
                )
            )
    return result


def _read_file(path: Path, max_bytes: int) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe waits for whoever writes to it
            raise NoInstanceError("no regular file", "it is no regular file")
        with path.open("rb") as file:
            return _read_dicom(file, max_bytes)
    except OSError as error:  # links in circles and failing disks among others
        raise NoInstanceError("file that cannot be read", error.strerror) from None


def _read_member(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, max_bytes: int
) -> bytes:
    try:
        with open_member(path, archive, member) as file:
            return _read_dicom(file, max_bytes)
    except DataFormatError as error:
        raise NoInstanceError("damaged in its zip file", str(error.__cause__)) from None


def _read_dicom(file: IO[bytes], max_bytes: int) -> bytes:
    """Return the bytes of a DICOM file. Of others, no more than the beginning is read."""
    head = file.read(HEAD_BYTES)
    if kinds.supported(head) != "DICOM":
        if head.startswith(b"PK\3\4"):
            raise NoInstanceError("zip file in it", "load it by its own name")
        raise NoInstanceError("not DICOM")
    data = head + file.read(max_bytes + 1 - len(head))
    if len(data) > max_bytes:
        raise NoInstanceError("too large", f"it is larger than the limit of {max_bytes:,} bytes")
    return data
