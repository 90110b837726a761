"""A DICOMweb service in this process, which answers well unless a test says otherwise."""

from __future__ import annotations

import base64
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

BOUNDARY = "b7f3"
CONTENT_TYPE = f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'
LEVELS = {"studies": "0020000D", "series": "0020000E", "instances": "00080018"}
FILTERS = {
    "StudyInstanceUID": "0020000D",
    "PatientID": "00100020",
    "Modality": "00080060",
    "ModalitiesInStudy": "00080060",
}


@dataclass(frozen=True)
class Stored:
    """One instance, and what the service knows of it."""

    study: str
    series: str
    sop: str
    data: bytes
    patient: str = "p1"
    modality: str = "CT"
    date: str = "20240101"

    def result(self) -> dict[str, Any]:
        """Return the elements in DICOM JSON."""
        elements = {
            "0020000D": self.study,
            "0020000E": self.series,
            "00080018": self.sop,
            "00100020": self.patient,
            "00080060": self.modality,
            "00080020": self.date,
        }
        return {tag: {"vr": "LO", "Value": [value]} for tag, value in elements.items()}


@dataclass
class Asked:
    """One question that came."""

    path: str
    query: dict[str, str]
    headers: dict[str, str]

    @property
    def is_fetch(self) -> bool:
        return bool(re.search(r"/instances/[^/]+$", self.path))


@dataclass
class Service:
    """What it has, what it was asked, and what it does instead of an answer.

    ``fault`` is called before each answer. It returns whether it has dealt with the question.
    """

    stored: list[Stored] = field(default_factory=list)
    page: int = 1000
    login: str | None = None
    ignores: frozenset[str] = frozenset()
    asked: list[Asked] = field(default_factory=list)
    fault: Callable[[Handler], bool] = lambda handler: False
    url: str = ""

    def fetched(self) -> list[str]:
        """Return the SOP Instance UIDs that were fetched, in order."""
        return [each.path.rsplit("/", 1)[1] for each in self.asked if each.is_fetch]

    def find(self, asked: Asked) -> list[dict[str, Any]]:
        """Answer a question for a list."""
        *levels, level = asked.path.removeprefix("/dicom-web/").split("/")
        wanted = {LEVELS[a]: b for a, b in zip(levels[::2], levels[1::2], strict=True)}
        wanted |= {
            FILTERS[k]: v for k, v in asked.query.items() if k in FILTERS.keys() - self.ignores
        }
        found: dict[str, dict[str, Any]] = {}
        since = asked.query.get("StudyDate", "-").removesuffix("-")
        for each in self.stored:
            result = each.result()
            if all(result[tag]["Value"] == [value] for tag, value in wanted.items()) and (
                "StudyDate" in self.ignores or each.date >= since
            ):
                found.setdefault(result[LEVELS[level]]["Value"][0], result)
        results = list(found.values())
        start = 0 if "offset" in self.ignores else int(asked.query.get("offset", 0))
        return results[start : start + min(self.page, int(asked.query.get("limit", 1000)))]


class Handler(BaseHTTPRequestHandler):
    """Answers one question at a time."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.asked = Asked(parts.path, dict(parse_qsl(parts.query)), dict(self.headers.items()))
        service = self.server.service
        service.asked.append(self.asked)
        if service.fault(self):
            return
        login = service.login and "Basic " + base64.b64encode(service.login.encode()).decode()
        if login and self.headers.get("Authorization") != login:
            self.answer(401)
        elif self.asked.is_fetch:
            self.answer(200, multipart(self.instance()), CONTENT_TYPE)
        else:
            results = json.dumps(service.find(self.asked)).encode()
            self.answer(200, results, "application/dicom+json")

    def instance(self) -> bytes:
        """Return the bytes of the instance that is asked for."""
        uid = self.asked.path.rsplit("/", 1)[1]
        return next(each.data for each in self.server.service.stored if each.sop == uid)

    def answer(
        self, status: int, body: bytes = b"", kind: str = "text/plain", /, **headers: str
    ) -> None:
        """Send an answer. Its length can be set to another one than that of the body."""
        self.send_response(status)
        headers = {"Content_Type": kind, "Content_Length": str(len(body))} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    service: Service

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that leave in mid-answer."""


def multipart(*parts: bytes) -> bytes:
    """Return the body of an answer with these instances."""
    heads = b"\r\nContent-Type: application/dicom\r\n\r\n"
    body = b"".join(b"--" + BOUNDARY.encode() + heads + part + b"\r\n" for part in parts)
    return body + b"--" + BOUNDARY.encode() + b"--"


@contextmanager
def running(
    service: Service, host: str = "127.0.0.1", certificate: Path | None = None
) -> Iterator[Service]:
    """Run a service, and set its URL. ``certificate`` is a file with a key and a certificate."""
    server = _Server((host, 0), Handler)
    server.service = service
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "http" if certificate is None else "https"
    service.url = f"{scheme}://{host}:{server.server_port}/dicom-web"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
