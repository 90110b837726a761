"""Files of folders, zip files and DICOMDIR trees: which are taken, and what is said of others."""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from pathlib import Path

import pytest
from pydicom.fileset import FileSet

from pg_siamese.client import dicom_sources
from pg_siamese.client.connection import CommandError
from pg_siamese.client.dicom_sources import NoInstanceError, is_dicom_source, open_instances
from pg_siamese.datasets import LeftOut
from tests import dicom_files

LIMIT = 100_000


def file(number: int) -> bytes:
    return dicom_files.written(dicom_files.instance(number))


def tree(folder: Path) -> Path:
    """Write DICOM files of any names, and others, in folders."""
    for number, name in enumerate(("a.dcm", "sub/IM0001", "sub/deep/1.2.840", "sub/picture.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(file(number))
    (folder / "sub" / "notes.txt").write_text("notes")
    (folder / "sub" / "empty").touch()
    (folder / "sub" / "more.zip").write_bytes(zipped({"IM1": file(9)}))
    (folder / ".hidden").write_bytes(file(8))
    (folder / ".git").mkdir()
    return folder


def zipped(members: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target.getvalue()


def contents(
    path: Path, recursive: bool = False, max_bytes: int = LIMIT
) -> tuple[dict[str, bytes], list[tuple[str, str]]]:
    """Return what is read by name, and names and kinds of what is left out."""
    left_out: list[LeftOut] = []
    found, others = {}, []
    with open_instances(
        path,
        recursive=recursive,
        dataset="set",
        max_bytes=max_bytes,
        leave_out=left_out.append,
    ) as instances:
        for instance in instances:
            name = str(instance.source).removeprefix("file:set/")
            try:
                found[name] = instance.read()
            except NoInstanceError as error:
                others.append((name, error.kind))
    folder = path.parent if path.name == "DICOMDIR" else path
    others += [(str(each.path.relative_to(folder)), each.kind) for each in left_out]
    return found, sorted(others)


def test_a_tree(tmp_path: Path) -> None:
    found, others = contents(tree(tmp_path), recursive=True)
    names = ("a.dcm", "sub/IM0001", "sub/deep/1.2.840", "sub/picture.png")
    assert found == {name: file(number) for number, name in enumerate(names)}
    assert others == [
        (".git", "hidden"),
        (".hidden", "hidden"),
        ("sub/empty", "not DICOM"),
        ("sub/more.zip", "zip file in it"),
        ("sub/notes.txt", "not DICOM"),
    ]


def test_a_folder_alone(tmp_path: Path) -> None:
    found, others = contents(tree(tmp_path))
    assert list(found) == ["a.dcm"]
    assert ("sub", "sub-folder (--recursive loads them)") in others


@pytest.mark.timeout(20)
def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """A pipe does not make the load wait, and links in a circle do not end it."""
    (tmp_path / "a").write_bytes(file(1))
    os.mkfifo(tmp_path / "b")
    (tmp_path / "c").symlink_to("c")
    (tmp_path / "d").symlink_to("/dev/zero")
    (tmp_path / "e").symlink_to("nowhere")
    (tmp_path / "f").symlink_to(tmp_path)
    found, others = contents(tmp_path, recursive=True)
    assert list(found) == ["a"]
    assert others == [
        ("b", "no regular file"),
        ("c", "file that cannot be read"),
        ("d", "no regular file"),
        ("e", "file that cannot be read"),
        ("f", "link to a folder"),
    ]


def test_a_zip_file(tmp_path: Path) -> None:
    path = tmp_path / "study.zip"
    members = {
        "study/IM1": file(1),
        "study/bomb": file(3) + bytes(LIMIT),
        "study/inner": zipped({"IM2": file(2)}),
        "study/notes": b"notes",
        "__MACOSX/study/IM1": file(4),
    }
    path.write_bytes(zipped(members))
    found, others = contents(path)
    assert found == {"study/IM1": file(1)}
    assert others == [
        ("__MACOSX/study/IM1", "hidden"),
        ("study/bomb", "too large"),
        ("study/inner", "zip file in it"),
        ("study/notes", "not DICOM"),
    ]


def test_bad_members(tmp_path: Path) -> None:
    """One is encrypted, one is damaged, and one says that it is smaller than it is."""
    path = tmp_path / "study.zip"
    data = bytearray(zipped({name: file(1) for name in ("a", "b", "c", "d")}))
    entries = [each.start() for each in re.finditer(rb"PK\x01\x02", data)]
    data[entries[1] + 8] |= 1
    start = struct.unpack_from("<I", data, entries[2] + 42)[0]
    data[start + 100 : start + 110] = bytes(10)
    struct.pack_into("<I", data, entries[3] + 24, 500)
    path.write_bytes(data)
    found, others = contents(path)
    assert list(found) == ["a"]
    assert others == [
        ("b", "encrypted"),
        ("c", "damaged in its zip file"),
        ("d", "damaged in its zip file"),
    ]


def test_members_of_odd_names(tmp_path: Path) -> None:
    path = tmp_path / "study.zip"
    data = zipped({"/abs/a": file(1), "/abs/.b": file(2), "../c": file(3), "nameless": file(4)})
    path.write_bytes(data.replace(b"nameless", bytes(8)))
    found, others = contents(path)
    assert list(found) == ["/abs/a"]
    assert others == [("../c", "hidden"), ("abs/.b", "hidden")]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_members_of_each_method(tmp_path: Path, method: int) -> None:
    """A damaged member costs none of the others, wherever it is damaged."""
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a", file(1))
        archive.writestr("b", file(2))
    good = path.read_bytes()
    for place in range(31, good.rindex(b"PK\x03\x04") - 2, 41):
        data = bytearray(good)
        data[place : place + 2] = b"\xff\xff"
        path.write_bytes(data)
        found, _ = contents(path)
        assert "b" in found
    place = good.index(b"PK\x01\x02") + 42  # where its header is
    path.write_bytes(good[:place] + b"\xff\xff\xff\x7f" + good[place + 4 :])
    assert contents(path)[1] == [("a", "damaged in its zip file")]


def test_a_member_is_not_unpacked_beyond_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.zip"
    path.write_bytes(zipped({"bomb": file(1) + bytes(20_000_000), "text": bytes(20_000_000)}))
    read = 0
    original = zipfile.ZipExtFile.read

    def counted(self: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        nonlocal read
        data = original(self, n)
        read += len(data)
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    assert contents(path) == ({}, [("bomb", "too large"), ("text", "not DICOM")])
    assert read <= LIMIT + 1 + 132


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.zip"
    path.write_bytes(zipped({"a": b"", "b": b"", "c": b""}))
    monkeypatch.setattr(dicom_sources, "MAX_MEMBERS", 2)
    with pytest.raises(CommandError, match="more than 2 members"):
        contents(path)


def file_set(folder: Path, count: int = 3) -> Path:
    """Write a DICOMDIR with its files, in folders of upper case."""
    files = FileSet()
    for number in range(count):
        files.add(dicom_files.filed(dicom_files.instance(number, patient=f"p {number % 2}")))
    files.write(folder)
    return folder


def files_of(folder: Path) -> list[Path]:
    """Return the files of a file set without the DICOMDIR."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path.name != "DICOMDIR")


def test_a_file_set(tmp_path: Path) -> None:
    folder = file_set(tmp_path)
    named = {str(path.relative_to(folder)): path.read_bytes() for path in files_of(folder)}
    (folder / "orphan.dcm").write_bytes(file(99))
    by_folder, others = contents(folder)
    assert by_folder == named and len(named) == 3
    assert others == []
    assert contents(folder / "DICOMDIR") == (by_folder, [])
    everything, others = contents(folder, recursive=True)
    assert everything == by_folder | {"orphan.dcm": file(99), "DICOMDIR": everything["DICOMDIR"]}


def test_a_file_set_in_lower_case(tmp_path: Path) -> None:
    folder = file_set(tmp_path)
    named = sorted(path.read_bytes() for path in files_of(folder))
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rename(path.with_name(path.name.lower() + (".;1" if path.is_file() else "")))
    (folder / "dicomdir.;1").rename(folder / "dicomdir")
    found, others = contents(folder)
    assert sorted(found.values()) == named
    assert others == []


def test_a_file_set_beside_names_of_another_case(tmp_path: Path) -> None:
    """The name as it is written counts first."""
    folder = file_set(tmp_path / "media")
    expected, _ = contents(folder)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.name != "DICOMDIR":
            path.with_name(path.name.lower()).write_bytes(file(99))
    other = next(path for path in folder.iterdir() if path.is_dir())
    other.with_name(other.name.lower()).mkdir()
    assert contents(folder) == (expected, [])


def test_what_a_file_set_lacks(tmp_path: Path) -> None:
    folder = file_set(tmp_path)
    gone = files_of(folder)[-1]
    gone.unlink()
    found, others = contents(folder)
    assert len(found) == 2
    assert others == [(str(gone.relative_to(folder)), "missing, but in the DICOMDIR")]


def test_a_file_set_leads_nowhere_else(tmp_path: Path) -> None:
    """Names with .. are no names of a file-set (PS3.10 section 8.2)."""
    (tmp_path / "SECRET").write_bytes(file(7))
    folder = file_set(tmp_path / "disc", 1)
    index = folder / "DICOMDIR"
    data = index.read_bytes()
    place = data.index(b"PT000000")
    length = struct.unpack_from("<H", data, place - 2)[0]
    index.write_bytes(data[:place] + b"..\\SECRET".ljust(length) + data[place + length :])
    found, others = contents(folder)
    assert found == {}
    assert [kind for _, kind in others] == ["missing, but in the DICOMDIR"]


@pytest.mark.parametrize("data", [b"", b"DICM" * 40, file(1), file(1)[:200]])
def test_what_is_no_file_set(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "DICOMDIR").write_bytes(data)
    with pytest.raises(CommandError, match=r"DICOMDIR: not a readable DICOMDIR.*--recursive"):
        contents(tmp_path)


def test_what_is_dicom(tmp_path: Path) -> None:
    (tmp_path / "one.dcm").write_bytes(file(1))
    (tmp_path / "two.zip").write_bytes(zipped({"one": file(1)}))
    (tmp_path / "three.npz").write_bytes(zipped({"one": file(1)}))
    (tmp_path / "four.png").write_bytes(b"\x89PNG")
    files = sorted(path.name for path in tmp_path.iterdir() if is_dicom_source(path, False))
    assert files == ["one.dcm", "two.zip"]
    assert is_dicom_source(tmp_path, True) and not is_dicom_source(tmp_path, False)
    assert is_dicom_source(file_set(tmp_path / "disc"), False)
    assert not is_dicom_source(tmp_path / "nothing", True)
    assert contents(tmp_path / "one.dcm") == ({"one.dcm": file(1)}, [])
