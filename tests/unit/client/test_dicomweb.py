"""Loading from a PACS: a service that misbehaves, credentials, and what is asked of it."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
import requests

from pg_siamese.client import dicomweb
from pg_siamese.client.connection import CommandError
from pg_siamese.client.dicom_sources import NoInstanceError
from pg_siamese.client.dicomweb import Pacs, Selection, check_url, credentials, only_part
from tests.dicomweb_service import CONTENT_TYPE, Handler, Service, Stored, multipart, running

SECRET = "swordfish-ü"
LIMIT = 200_000


def archive(count: int = 10) -> list[Stored]:
    """Return instances: two studies of two series each, of bytes that hold line ends and dashes."""
    return [
        Stored(f"1.{n % 2}", f"1.{n % 2}.{n % 4}", f"1.9.{n}", b"\r\n--b7\r\n\r\n%d\x00" % n)
        for n in range(count)
    ]


@pytest.fixture
def service() -> Iterator[Service]:
    with running(Service(archive())) as found:
        yield found


def pacs(service: Service, **options: object) -> Pacs:
    options = {"max_bytes": LIMIT, "sleep": lambda seconds: None} | options
    return Pacs(service.url, **options)  # type: ignore[arg-type]


def load(source: Pacs, selection: Selection | None = None) -> dict[str, bytes]:
    """Fetch all that is selected, by SOP Instance UID."""
    selection = selection or Selection()
    found: dict[str, bytes] = {}
    for study in source.studies(selection):
        for instance in source.instances(study, selection.modality):
            assert instance.sop_uid is not None and instance.sop_uid not in found
            found[instance.sop_uid] = instance.read()
    return found


def everything(service: Service) -> dict[str, bytes]:
    return {each.sop: each.data for each in service.stored}


def first(service: Service, **options: object) -> bytes:
    """Fetch one instance."""
    source = pacs(service, **options)
    return source.instances(source.studies(Selection())[0])[0].read()


def failing(times: int, status: int, **headers: str):
    """Return a fault: the first questions end with an HTTP status."""
    left = [times]

    def fault(handler: Handler) -> bool:
        left[0] -= 1
        if left[0] >= 0:
            handler.answer(status, **headers)
        return left[0] >= 0

    return fault


# --- lists -------------------------------------------------------------------------------------


def test_bytes_come_as_they_are_stored(service: Service) -> None:
    assert load(pacs(service)) == everything(service)
    accepted = {each.headers["Accept"] for each in service.asked if each.is_fetch}
    assert accepted == {'multipart/related; type="application/dicom"; transfer-syntax=*'}


@pytest.mark.parametrize("page", [1, 3])
def test_a_service_that_limits_its_pages(service: Service, page: int) -> None:
    service.page = page
    assert load(pacs(service)) == everything(service)


def test_results_that_move_to_the_next_page(service: Service) -> None:
    service.page = 3
    service.stored = [Stored("1.1", "1.2", f"1.9.{n}", b"%d" % n) for n in range(7)]

    def fault(handler: Handler) -> bool:
        if handler.asked.query.get("offset") == "3" and len(service.stored) == 7:
            service.stored.insert(0, Stored("1.1", "1.2", "1.9.99", b"new"))
        return False

    service.fault = fault
    found = load(pacs(service))
    assert found.keys() >= {f"1.9.{n}" for n in range(7)}


def test_a_service_without_pages(service: Service) -> None:
    service.ignores = frozenset({"offset"})
    with pytest.raises(CommandError, match="every page of a list is the same"):
        load(pacs(service))


@pytest.mark.parametrize(
    "ignores", [(), ("PatientID", "ModalitiesInStudy", "Modality", "StudyDate")]
)
def test_conditions(service: Service, ignores: tuple[str, ...]) -> None:
    """They hold even if the service ignores them."""
    service.ignores = frozenset(ignores)
    service.stored = [
        Stored("1.1", "1.1.1", "1.1.1.1", b"a", patient="p1", modality="CT", date="20231231"),
        Stored("1.1", "1.1.2", "1.1.2.1", b"b", patient="p1", modality="SR", date="20231231"),
        Stored("1.2", "1.2.1", "1.2.1.1", b"c", patient="p2", modality="CT", date="20240229"),
        Stored("1.3", "1.3.1", "1.3.1.1", b"d", patient="P2", modality="MR", date="20240301"),
    ]
    source = pacs(service)
    assert set(load(source, Selection(patient="p2")).values()) == {b"c"}
    assert set(load(source, Selection(modality="CT")).values()) == {b"a", b"c"}
    assert set(load(source, Selection(since=date(2024, 2, 29))).values()) == {b"c", b"d"}
    assert set(load(source, Selection(studies=("1.3", "1.1", "1.3"))).values()) == {
        b"a",
        b"b",
        b"d",
    }
    with pytest.raises(CommandError, match=r"no study that meets all conditions: 1\.3"):
        load(source, Selection(studies=("1.3",), patient="p1"))
    with pytest.raises(CommandError, match="not a Study Instance UID: 1/2"):
        load(source, Selection(studies=("1/2",)))


def test_no_result(service: Service) -> None:
    service.stored = []
    assert load(pacs(service)) == {}
    service.fault = failing(1, 204)
    assert load(pacs(service)) == {}


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"<html>Log in", "not in DICOM JSON"),
        (b'"text"', "a result without a valid UID in element 0020000D"),
        (b'[{"0020000D": 3}]', "a result without a valid UID in element 0020000D"),
        (b'[{"0020000D": {"Value": ["../.."]}}]', "a result without a valid UID"),
    ],
)
def test_a_list_that_is_none(service: Service, body: bytes, what: str) -> None:
    def fault(handler: Handler) -> bool:
        handler.answer(200, body, "application/dicom+json")
        return True

    service.fault = fault
    with pytest.raises(CommandError, match=f"unexpected answer: {what}"):
        load(pacs(service))


def test_a_list_that_is_too_large(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomweb, "MAX_PAGE_BYTES", 500)
    with pytest.raises(CommandError, match="a list of more than 500 bytes"):
        load(pacs(service))


# --- instances that don't come -----------------------------------------------------------------


def test_a_service_that_is_busy(service: Service) -> None:
    pauses: list[float] = []
    service.fault = failing(2, 503)
    assert load(pacs(service, sleep=pauses.append)) == everything(service)
    assert pauses == [1, 2]


def test_a_service_that_says_how_long_it_is_busy(service: Service) -> None:
    pauses: list[float] = []
    service.fault = failing(1, 429, Retry_After="7")
    assert load(pacs(service, sleep=pauses.append)) == everything(service)
    assert pauses == [7]
    service.fault = failing(1, 429, Retry_After="3600")
    with pytest.raises(CommandError, match="HTTP 429, to be asked again after 3600 s"):
        load(pacs(service, sleep=pauses.append))
    assert pauses == [7]


def test_a_service_that_stays_busy(service: Service) -> None:
    service.fault = failing(1000, 502)
    with pytest.raises(CommandError, match=f"{service.url}: HTTP 502"):
        load(pacs(service))
    assert len(service.asked) == dicomweb.ATTEMPTS


def test_a_connection_that_breaks_off(service: Service) -> None:
    """In the middle of a list, and of every instance once."""
    broken: set[str] = set()

    def fault(handler: Handler) -> bool:
        if handler.path in broken:
            return False
        broken.add(handler.path)
        handler.answer(200, b"[", CONTENT_TYPE, Content_Length="1000")
        handler.close_connection = True
        return True

    service.fault = fault
    assert load(pacs(service)) == everything(service)
    assert len(broken) * 2 == len(service.asked)


def test_an_answer_without_its_end(service: Service) -> None:
    """HTTP can't tell it from a whole one, if it has no length."""
    left = [2]

    def fault(handler: Handler) -> bool:
        if not handler.asked.is_fetch or left[0] == 0:
            return False
        left[0] -= 1
        body = multipart(handler.instance())[:-20]
        handler.send_response(200)
        handler.send_header("Content-Type", CONTENT_TYPE)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(body)
        return True

    service.fault = fault
    assert load(pacs(service)) == everything(service)
    left[0] = 1000
    with pytest.raises(CommandError, match="the connection broke off"):
        load(pacs(service))


def test_nobody_is_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        service = Service(url=f"http://127.0.0.1:{unused.getsockname()[1]}/dicom-web")
        pauses: list[float] = []
        with pytest.raises(CommandError, match="Connection refused"):
            load(pacs(service, sleep=pauses.append))
    assert pauses == []


def test_a_service_that_does_not_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomweb, "TIMEOUT_SECONDS", (60, 0.1))
    is_over = threading.Event()

    def fault(handler: Handler) -> bool:
        if handler.asked.is_fetch:
            is_over.wait()
        return handler.asked.is_fetch

    service.fault = fault
    with pytest.raises(CommandError, match=r"no answer within 0\.1 s"):
        first(service)
    is_over.set()
    assert len(service.fetched()) == dicomweb.ATTEMPTS


@pytest.mark.parametrize("status", [404, 500])
def test_an_instance_that_is_lost(service: Service, status: int) -> None:
    def fault(handler: Handler) -> bool:
        if handler.asked.is_fetch:
            handler.answer(status)
        return handler.asked.is_fetch

    service.fault = fault
    with pytest.raises(NoInstanceError) as caught:
        first(service)
    assert (caught.value.kind, caught.value.reason) == ("not delivered", f"HTTP {status}")


@pytest.mark.parametrize("status", [403, 503])
def test_no_instance_comes(service: Service, status: int) -> None:
    """The others would not come either, so they are not left out one by one."""

    def fault(handler: Handler) -> bool:
        if handler.asked.is_fetch:
            handler.answer(status)
        return handler.asked.is_fetch

    service.fault = fault
    with pytest.raises(CommandError, match=f"HTTP {status}"):
        first(service)


@pytest.mark.parametrize("has_length", [True, False])
def test_an_instance_that_is_too_large(service: Service, has_length: bool) -> None:
    """It is not read to its end."""
    size, sent = 400 * LIMIT, 0
    service.stored = [Stored("1.1", "1.2", "1.3", b"")]

    def fault(handler: Handler) -> bool:
        nonlocal sent
        if not handler.asked.is_fetch:
            return False
        length = {"Content_Length": str(size)} if has_length else {"Transfer_Encoding": "chunked"}
        handler.send_response(200)
        for name, value in ({"Content_Type": CONTENT_TYPE} | length).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        piece = bytes(LIMIT // 2)
        for _ in range(size // len(piece)):
            handler.wfile.write(piece if has_length else b"%x\r\n%s\r\n" % (len(piece), piece))
            sent += len(piece)
        return True

    service.fault = fault
    with pytest.raises(NoInstanceError) as caught:
        first(service)
    assert caught.value.reason == "it is larger than 200,000 bytes"
    assert sent < size


def test_something_else_than_an_instance(service: Service) -> None:
    def fault(handler: Handler) -> bool:
        if handler.asked.is_fetch:
            handler.answer(200, b"<html>", "text/html; charset=utf-8")
        return handler.asked.is_fetch

    service.fault = fault
    with pytest.raises(CommandError, match="text/html instead of multipart/related"):
        first(service)


def test_envelopes() -> None:
    kind = 'multipart/related; type="application/dicom"; boundary="b7f3"'
    data = b"\r\n--b7f\r\n\r\n-b7f3--b7f3\r\n"
    assert only_part(multipart(data), kind) == data
    assert only_part(b"\r\npreamble\r\n" + multipart(data) + b"\r\n", CONTENT_TYPE) == data
    assert only_part(multipart(b""), kind) == b""
    assert only_part(data, "application/dicom; transfer-syntax=1.2") == data
    with pytest.raises(ValueError, match="several instances"):
        only_part(multipart(data, data), kind)
    for wrong in ("multipart/related", "", "text/plain; boundary=b7f3"):
        with pytest.raises(ValueError, match="instead of multipart/related"):
            only_part(multipart(data), wrong)
    whole = multipart(data)
    for end in range(len(whole)):
        with pytest.raises(requests.ConnectionError):
            only_part(whole[:end], kind)


# --- who asks ----------------------------------------------------------------------------------


def test_credentials_from_the_environment(service: Service) -> None:
    service.login = f"loader:{SECRET}"
    with pytest.raises(CommandError, match="HTTP 401; set PG_SIAMESE_DICOMWEB_USER"):
        load(pacs(service))
    wanted = {dicomweb.USER: "loader", dicomweb.PASSWORD: SECRET}
    source = pacs(service, auth=credentials(service.url, None, wanted))
    assert load(source) == everything(service)
    with pytest.raises(CommandError, match="must be set together"):
        credentials(service.url, None, {dicomweb.USER: "loader"})


def test_a_token(service: Service) -> None:
    load(pacs(service, auth=credentials(service.url, None, {dicomweb.TOKEN: "abc.def="})))
    assert {each.headers["Authorization"] for each in service.asked} == {"Bearer abc.def="}
    with pytest.raises(CommandError) as caught:
        credentials(service.url, None, {dicomweb.TOKEN: f"{SECRET}\n"})
    assert SECRET not in str(caught.value)


def test_credentials_from_a_file(service: Service, tmp_path: Path) -> None:
    service.login = f"loader:{SECRET}"
    file = tmp_path / "pacs"
    file.write_text(f"machine 127.0.0.1 login loader password {SECRET}\n")
    file.chmod(0o640)
    with pytest.raises(CommandError, match="others have access to it; run chmod 600"):
        credentials(service.url, file, {})
    file.chmod(0o600)
    environment = {dicomweb.USER: "someone", dicomweb.PASSWORD: "else"}
    source = pacs(service, auth=credentials(service.url, file, environment))
    assert load(source) == everything(service)
    with pytest.raises(CommandError, match=r"no entry for machine pacs\.example\.org"):
        credentials("https://pacs.example.org/x", file, {})
    file.write_text(f"machine 127.0.0.1\nlogin loader {SECRET}\n")
    with pytest.raises(CommandError, match=r"line \d: not in the format of") as caught:
        credentials(service.url, file, {})
    assert SECRET not in str(caught.value)


def test_another_host_gets_no_credentials(service: Service) -> None:
    """Nor the name of the first one."""
    wanted = {dicomweb.USER: "loader", dicomweb.PASSWORD: SECRET}
    with running(Service(archive()), host="127.0.0.2") as other:

        def fault(handler: Handler) -> bool:
            place = other.url.removesuffix("/dicom-web") + handler.path
            handler.answer(307, Location=place)
            return True

        service.fault = fault
        source = pacs(service, auth=credentials(service.url, None, wanted))
        assert load(source) == everything(other)
        assert all("Authorization" in each.headers for each in service.asked)
        assert not any("Authorization" in each.headers for each in other.asked)
        assert {each.headers["Host"] for each in other.asked} == {other.url.split("/")[2]}


def test_redirects_without_end(service: Service) -> None:
    def fault(handler: Handler) -> bool:
        handler.answer(302, Location=handler.path)
        return True

    service.fault = fault
    with pytest.raises(CommandError, match="too many redirects"):
        load(pacs(service))


def test_no_message_names_a_patient(service: Service) -> None:
    service.fault = failing(1000, 404)
    with pytest.raises(CommandError) as caught:
        load(pacs(service), Selection(patient="p1"))
    assert str(caught.value) == f"{service.url}: HTTP 404"


@pytest.mark.parametrize(
    "url", ["", "pacs.example.org", "ftp://a/b", "https://", "https://a/b?c=d", "https://a:b/c"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(CommandError, match="must be followed by a URL"):
        check_url(url)


def test_an_address_with_a_password() -> None:
    assert check_url("https://a.b:80/c/") == "https://a.b:80/c"
    with pytest.raises(CommandError, match="must not contain credentials") as caught:
        check_url(f"https://loader:{SECRET}@pacs.example.org/dicom-web")
    assert SECRET not in str(caught.value)


def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    both = tmp_path / "both.pem"
    both.write_text(key.read_text() + certificate.read_text())
    with running(Service(archive()), certificate=both) as service:
        with pytest.raises(CommandError, match="certificate verify failed"):
            load(pacs(service))
        assert service.asked == []
        # Another bundle of the environment does not count.
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/ssl/certs/ca-certificates.crt")
        assert load(pacs(service, ca_file=certificate)) == everything(service)
    with pytest.raises(CommandError, match="no such file"):
        pacs(service, ca_file=tmp_path / "none")
