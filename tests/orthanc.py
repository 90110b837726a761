"""A real PACS: Orthanc with its DICOMweb plug-in. Debian's packages are only unpacked."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.support import wait_until
from tools import apt
from tools.project import build_folder, server_user
from tools.report import SetupError

PACKAGES = ("orthanc", "orthanc-dicomweb")
USER = "loader"


class Orthanc:
    """A running Orthanc, which only this machine and one user can ask."""

    def __init__(self, port: int, password: str) -> None:
        self.password = password
        self.url = f"http://127.0.0.1:{port}/dicom-web"
        self._root = f"http://127.0.0.1:{port}"
        self._session = requests.Session()
        self._session.auth = (USER, password)

    def is_up(self) -> bool:
        try:
            return self._session.get(f"{self._root}/system", timeout=5).ok
        except requests.ConnectionError:
            return False

    def store(self, *files: bytes) -> None:
        for file in files:
            answer = self._session.post(f"{self._root}/instances", data=file, timeout=60)
            answer.raise_for_status()

    def clear(self) -> None:
        for patient in self._session.get(f"{self._root}/patients", timeout=60).json():
            self._session.delete(f"{self._root}/patients/{patient}", timeout=60)


@contextmanager
def running() -> Iterator[Orthanc]:
    """Run Orthanc in a temporary folder, as the server's user. Skip if it can't be had."""
    tree = build_folder() / "orthanc"
    if not tree.exists():
        try:
            apt.unpack(PACKAGES, tree, "Orthanc")
        except SetupError as error:
            pytest.skip(f"no Orthanc: {error}")
    folder = Path(tempfile.mkdtemp(prefix="pg_siamese-orthanc-", dir="/tmp"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    password = secrets.token_urlsafe()
    settings = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "Plugins": [str(next(tree.glob("usr/lib/orthanc/libOrthancDicomWeb.so*")))],
        "DicomServerEnabled": False,
        "HttpPort": port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: password},
        "DicomWeb": {"Enable": True},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    libraries = {file.parent for file in tree.rglob("*.so.*")}
    environment = {"LD_LIBRARY_PATH": ":".join(map(str, sorted(libraries)))}
    for dictionary in tree.glob("usr/share/libdcmtk*/dicom.dic"):
        environment["DCMDICTPATH"] = str(dictionary)
    user = server_user()
    if user is not None:
        for path in (folder, folder / "orthanc.json"):
            os.chown(path, user.pw_uid, user.pw_gid)
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [tree / "usr/sbin/Orthanc", folder / "orthanc.json"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            user=user and user.pw_uid,
            group=user and user.pw_gid,
            extra_groups=user and [],
        )
    try:
        found = Orthanc(port, password)
        wait_until(lambda: found.is_up() or process.poll() is not None, "Orthanc doesn't answer")
        assert process.poll() is None, log.read_text()
        yield found
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)
