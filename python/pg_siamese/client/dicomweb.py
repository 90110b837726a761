"""DICOM instances of a PACS: listed by QIDO-RS, fetched by WADO-RS, one by one (DICOM PS3.18).

``dicomweb-client`` asks for the lists. It hands instances out as data sets that it has parsed, so
their bytes, which are to be stored unchanged, are fetched here over the same session.
"""

from __future__ import annotations

import itertools
import logging
import netrc
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from email.message import Message
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from dicomweb_client import DICOMwebClient
from requests.auth import AuthBase, HTTPBasicAuth
from requests.exceptions import ChunkedEncodingError, InvalidJSONError
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from pg_siamese.client.connection import CommandError
from pg_siamese.client.dicom_sources import Instance, NoInstanceError
from pg_siamese.client.sources import SourceError

# It warns of what is checked here.
logging.getLogger("dicomweb_client").addHandler(logging.NullHandler())

USER, PASSWORD, TOKEN = (f"PG_SIAMESE_DICOMWEB_{name}" for name in ("USER", "PASSWORD", "TOKEN"))

PAGE = 200  # results per question, some 2 kB each
MAX_PAGE_BYTES = 64 * 1024 * 1024
ENVELOPE_BYTES = 64 * 1024  # what multipart adds to a file
CHUNK_BYTES = 256 * 1024
TIMEOUT_SECONDS = (10, 60)  # to connect, and between two pieces of an answer
ATTEMPTS = 6
LONGEST_PAUSE_SECONDS = 120.0
BUSY = (429, 502, 503, 504)
REFUSED = (401, 403, 407)

# Tags as DICOM JSON writes them (PS3.18 annex F).
STUDY_DATE, MODALITY, PATIENT_ID = "00080020", "00080060", "00100020"
STUDY_UID, SERIES_UID, SOP_UID = "0020000D", "0020000E", "00080018"

UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")

T = TypeVar("T")
Result = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Selection:
    """Which instances to load: those that meet all conditions.

    Attributes:
        studies: Study Instance UIDs, or none for all studies.
        patient: Patient ID.
        modality: of the series, such as ``CT``.
        since: date of the oldest study.
    """

    studies: tuple[str, ...] = ()
    patient: str | None = None
    modality: str | None = None
    since: date | None = None


class _CutShortError(requests.ConnectionError):
    """An answer that ended before its end."""


class _TooLargeError(Exception):
    """An answer over its limit of bytes."""


class _Token(AuthBase):
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class _Session(requests.Session):
    """A session that lets neither ``dicomweb-client`` nor the environment set what is known here.

    The one sets a header ``Host`` without the port, which redirects to other hosts would keep. The
    variable ``REQUESTS_CA_BUNDLE`` would replace ``verify``.
    """

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        request.headers = {k: v for k, v in request.headers.items() if k != "Host"}
        return super().prepare_request(request)

    def merge_environment_settings(self, *arguments: Any) -> Any:
        settings = super().merge_environment_settings(*arguments)
        return settings if self.verify is True else settings | {"verify": self.verify}


def credentials(url: str, file: Path | None, environment: Mapping[str, str]) -> AuthBase | None:
    """Return what proves who asks, or None to leave it to ``requests``, which reads ``~/.netrc``.

    Args:
        url: of the service.
        file: in the format of ``.netrc``, readable by its owner only. It goes before the
            environment.
        environment: a token in ``PG_SIAMESE_DICOMWEB_TOKEN``, or a name and a password in
            ``PG_SIAMESE_DICOMWEB_USER`` and ``PG_SIAMESE_DICOMWEB_PASSWORD``.

    Raises:
        CommandError: something is missing, or others can read the file. No message has a secret.
    """
    if file is not None:
        return _from_file(file, urlsplit(url).hostname or "")
    if token := environment.get(TOKEN):
        # Anything else could end up in the message of an error (RFC 6750, section 2.1).
        if not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
            raise CommandError(f"{TOKEN} is not a bearer token")
        return _Token(token)
    user, password = environment.get(USER), environment.get(PASSWORD)
    if (user is None) != (password is None):
        raise CommandError(f"{USER} and {PASSWORD} must be set together")
    return None if user is None or password is None else _basic(user, password)


def _from_file(file: Path, host: str) -> AuthBase:
    if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise CommandError(f"{file}: others have access to it; run chmod 600")
    try:
        found = netrc.netrc(file).authenticators(host)
    except (netrc.NetrcParseError, UnicodeDecodeError) as error:
        line = f", line {error.lineno}" if isinstance(error, netrc.NetrcParseError) else ""
        raise CommandError(f"{file}{line}: not in the format of .netrc") from None
    if found is None:
        raise CommandError(f"{file}: no entry for machine {host}")
    user, _, password = found
    return _basic(user, password)


def _basic(user: str, password: str) -> AuthBase:
    # requests would encode text as Latin-1, which not every password is.
    return HTTPBasicAuth(user.encode(), password.encode())


def check_url(url: str) -> str:
    """Return the URL of a service without a slash at its end.

    Raises:
        CommandError: it is no URL of a service, or has a password in it. The message has not.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    if "@" in parts.netloc:
        raise CommandError(
            f"the URL of a DICOMweb service must not contain credentials; set {USER} and"
            f" {PASSWORD}, or use --credentials"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise CommandError(
            "dicomweb: must be followed by a URL such as https://pacs.example.org/dicom-web"
        )
    return url.rstrip("/")


class Pacs:
    """A DICOMweb service.

    Questions that fail in passing are asked again: after a broken connection, and if the service is
    busy. The first question must get an answer, since a service that never answered may not exist.

    Args:
        url: checked by :func:`check_url`.
        auth: from :func:`credentials`.
        ca_file: certificates of authorities to trust instead of the usual ones.
        max_bytes: larger instances are left out.
        sleep: waits for a number of seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        auth: AuthBase | None = None,
        ca_file: Path | None = None,
        max_bytes: int,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._url = url
        self._max_bytes = max_bytes
        self._sleep = sleep
        self._has_answered = False
        self._session = _Session()
        self._session.auth = auth
        if ca_file is not None:
            if not ca_file.is_file():
                raise CommandError(f"{ca_file}: no such file")
            self._session.verify = str(ca_file)
        self._client = DICOMwebClient(
            url, self._session, callback=self._answered, timeout=TIMEOUT_SECONDS
        )
        self._client.set_http_retry_params(retry=False)

    def studies(self, selection: Selection) -> list[str]:
        """Return the Study Instance UIDs of a selection.

        Raises:
            SourceError: the service can't be asked, or lacks one of the studies.
        """
        filters: dict[str, str] = {}
        if selection.patient is not None:
            filters["PatientID"] = selection.patient
        if selection.modality is not None:
            filters["ModalitiesInStudy"] = selection.modality
        if selection.since is not None:
            filters["StudyDate"] = f"{selection.since:%Y%m%d}-"
        if not selection.studies:
            return self._matching_studies(selection, filters)
        for uid in selection.studies:
            if not UID.fullmatch(uid):
                raise CommandError(f"not a Study Instance UID: {uid}")
            if uid not in self._matching_studies(selection, filters | {"StudyInstanceUID": uid}):
                raise CommandError(f"{self._url}: no study that meets all conditions: {uid}")
        return list(dict.fromkeys(selection.studies))

    def _matching_studies(self, selection: Selection, filters: Mapping[str, str]) -> list[str]:
        return [
            _values(study, STUDY_UID)[0]
            for study in self._search(self._client.search_for_studies, STUDY_UID, filters)
            if not _differs(study, PATIENT_ID, selection.patient)
            and not _is_older(study, selection.since)
        ]

    def instances(self, study: str, modality: str | None = None) -> list[Instance]:
        """Return the instances of a study, those of one modality if it is given.

        Raises:
            SourceError: the service can't be asked.
        """
        filters = {} if modality is None else {"Modality": modality}
        found = []
        for series in self._search(
            partial(self._client.search_for_series, study), SERIES_UID, filters
        ):
            if _differs(series, MODALITY, modality):
                continue
            uid = _values(series, SERIES_UID)[0]
            for instance in self._search(
                partial(self._client.search_for_instances, study, uid), SOP_UID, {}
            ):
                sop_uid = _values(instance, SOP_UID)[0]
                address = f"{self._url}/studies/{study}/series/{uid}/instances/{sop_uid}"
                found.append(Instance(address, partial(self._fetch, address), sop_uid))
        return found

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _search(
        self, find: Callable[..., list[Any]], key: str, filters: Mapping[str, str]
    ) -> Iterator[Result]:
        """Yield all results, each once, page by page.

        Services limit their pages to any size, so only an empty page is the last one. What is
        stored meanwhile may move results to the next page, where they are known already.

        Raises:
            SourceError: the service can't be asked, or gives no complete list.
        """
        seen: set[str] = set()
        offset = 0
        while True:
            ask = partial(find, limit=PAGE, offset=offset, search_filters=dict(filters))
            try:
                page = self._patiently(ask)
            except requests.RequestException as error:
                raise self._failure(error) from None
            except _TooLargeError:
                raise self._unexpected(f"a list of more than {MAX_PAGE_BYTES:,} bytes") from None
            if not page:
                return
            offset += len(page)
            known = len(seen)
            for result in page:
                uid = next(iter(_values(result, key)), None)
                if uid is None or not UID.fullmatch(uid):
                    raise self._unexpected(f"a result without a valid UID in element {key}")
                if uid not in seen:
                    seen.add(uid)
                    yield result
            if len(seen) == known:
                raise self._unexpected("every page of a list is the same")

    def _fetch(self, address: str) -> bytes:
        """Return the file of an instance.

        Raises:
            SourceError: the service can't be asked.
            NoInstanceError: it does not deliver this instance.
        """
        try:
            return self._patiently(partial(self._get, address))
        except _TooLargeError:
            raise NoInstanceError(
                "over the limit of bytes", f"it is larger than {self._max_bytes:,} bytes"
            ) from None
        except requests.RequestException as error:
            status = _status(error)
            if status is None or status in (*BUSY, *REFUSED):
                raise self._failure(error) from None
            # It was deleted a moment ago, or the service has lost its file.
            raise NoInstanceError("not delivered", _reason(error)) from None

    def _get(self, address: str) -> bytes:
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        with self._session.get(
            address, headers={"Accept": accept}, stream=True, timeout=TIMEOUT_SECONDS
        ) as response:
            response.raise_for_status()
            body = b"".join(response.iter_content(CHUNK_BYTES))
        try:
            return only_part(body, response.headers.get("Content-Type", ""))
        except ValueError as error:
            raise self._unexpected(str(error)) from None

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask, and ask again if it fails in passing."""
        for attempt in itertools.count(1):
            try:
                return ask()
            except requests.RequestException as error:
                passes = _status(error) in BUSY or (self._has_answered and _is_broken(error))
                if not passes or attempt == ATTEMPTS:
                    raise
                pause = _wanted_pause(error) or 2.0 ** (attempt - 1)
                if pause > LONGEST_PAUSE_SECONDS:
                    raise
            self._sleep(pause)
        raise AssertionError

    def _answered(self, response: requests.Response, **options: Any) -> None:
        """Limit the bytes of an answer, before any of them are read."""
        self._has_answered = True
        limit = self._max_bytes + ENVELOPE_BYTES if options["stream"] else MAX_PAGE_BYTES
        chunks = response.iter_content

        def limited(*arguments: Any, **named: Any) -> Iterator[Any]:
            size = 0
            for chunk in chunks(*arguments, **named):
                size += len(chunk)
                if size > limit:
                    response.close()
                    raise _TooLargeError
                yield chunk

        response.iter_content = limited  # type: ignore[method-assign]

    def _failure(self, error: requests.RequestException) -> SourceError:
        return SourceError(f"{self._url}: {_reason(error)}")

    def _unexpected(self, what: str) -> SourceError:
        return SourceError(f"{self._url}: unexpected answer: {what}")


@contextmanager
def open_instances(
    url: str,
    selection: Selection,
    *,
    auth: AuthBase | None,
    ca_file: Path | None,
    dataset: str | None,
    max_bytes: int,
) -> Iterator[Iterator[Instance]]:
    """Open a :class:`Pacs`. In the body, each study is listed when its turn comes.

    Args:
        url, auth, ca_file, max_bytes: as there.
        selection: what to load.
        dataset: of the instances.
    """
    with closing(Pacs(url, auth=auth, ca_file=ca_file, max_bytes=max_bytes)) as pacs:
        yield (
            replace(instance, dataset=dataset)
            for study in pacs.studies(selection)
            for instance in pacs.instances(study, selection.modality)
        )


def only_part(body: bytes, content_type: str) -> bytes:
    """Return the one part of a multipart answer (RFC 2046, section 5.1), or the plain answer.

    Raises:
        ValueError: it is something else, or has several parts.
        requests.ConnectionError: its end is missing.
    """
    header = Message()
    header["Content-Type"] = content_type
    kind, boundary = header.get_content_type(), header.get_boundary()
    # Some services send one instance without an envelope.
    if kind == "application/dicom":
        return body
    if kind != "multipart/related" or not boundary:
        raise ValueError(f"{kind} instead of multipart/related")
    mark = b"--" + boundary.encode()
    start = body.find(mark)
    head = body.find(b"\r\n\r\n", start + len(mark))
    end = body.find(b"\r\n" + mark, head + 2)
    after_end = end + 2 + len(mark)
    after = body[after_end : after_end + 2]
    if min(start, head, end) < 0 or len(after) < 2:
        raise _CutShortError
    if after != b"--":
        raise ValueError("several instances instead of one")
    return body[head + 4 : end]


def _values(result: Any, tag: str) -> list[str]:
    """Return the values of an element in DICOM JSON, none if it is not as it should be."""
    element = result.get(tag) if isinstance(result, dict) else None
    values = element.get("Value") if isinstance(element, dict) else None
    return [str(value).strip() for value in values] if isinstance(values, list) else []


def _differs(result: Result, tag: str, wanted: str | None) -> bool:
    """Return whether an element is there, and is not what was asked for.

    Services may ignore a condition, and match names with ``*`` and in any case.
    """
    values = _values(result, tag)
    return wanted is not None and bool(values) and wanted not in values


def _is_older(study: Result, since: date | None) -> bool:
    dates = _values(study, STUDY_DATE)
    return since is not None and bool(dates) and dates[0] < f"{since:%Y%m%d}"


def _status(error: requests.RequestException) -> int | None:
    if not isinstance(error, requests.HTTPError) or error.response is None:
        return None
    return error.response.status_code


def _is_broken(error: requests.RequestException) -> bool:
    return isinstance(error, requests.ConnectionError | requests.Timeout | ChunkedEncodingError)


def _wanted_pause(error: requests.RequestException) -> float | None:
    """Return the seconds that a busy service asks to wait."""
    value = None if error.response is None else error.response.headers.get("Retry-After")
    try:
        return None if value is None else Retry().parse_retry_after(value)
    except InvalidHeader:
        return None


def _reason(error: requests.RequestException) -> str:
    """Return what failed, without the question that the exception quotes: it names patients."""
    status = _status(error)
    if status in REFUSED:
        return f"HTTP {status}; set {USER} and {PASSWORD}, or use --credentials"
    if status is not None:
        pause = _wanted_pause(error)
        return f"HTTP {status}" + (f", to be asked again after {pause:.0f} s" if pause else "")
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT_SECONDS[1]} s"
    if isinstance(error, InvalidJSONError):
        return "unexpected answer: not in DICOM JSON"
    if isinstance(error, requests.TooManyRedirects):
        return "too many redirects"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return "the connection broke off"
