"""DICOMweb as a client: QIDO-RS through dicomweb-client, WADO-RS and STOW-RS with the bytes as they are (PS3.18 10).

No patient is named in a URL: servers and proxies write URLs into logs.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from dicomweb_client.web import DICOMwebClient

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.events import Peer
from osteo_daemon.dicomweb.dicom_json import (
    BODY_PART,
    MODALITY,
    SERIES,
    SERIES_INSTANCES,
    SOP_CLASS,
    SOP_INSTANCE,
    STUDY,
    count_of,
    failure_of,
    study_of,
    uid_of,
    value_of,
)
from osteo_daemon.dicomweb.multipart import MultipartReader, Part, boundary_of
from osteo_daemon.domain.archive import FoundSeries, FoundStudies, Span, Target
from osteo_daemon.errors import MalformedMessage, OsteoError, PeerBusy, PeerUnavailable, Refused
from osteo_daemon.settings import ArchiveSettings, DestinationSettings

DICOM: Final = "application/dicom"
_DICOM_JSON: Final = "application/dicom+json"
_STUDY_ROOT_FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
_CHUNK_BYTES: Final = 1 << 18
_LONGEST_ANSWER_BYTES: Final = 64 << 20
_PAGE: Final = 1000
_FOR_NOW: Final = frozenset({408, 425, 429})
_CREDENTIALS: Final = frozenset({401, 403})
_NOT_FOUND: Final = frozenset({204, 404})


@dataclass(frozen=True, slots=True)
class StoreAnswer:
    """What a server says of one object that was sent (PS3.18 10.5.3).

    Attributes:
        http_status: of the response.
        failure: the Failure Reason of the object, a status of C-STORE; None when it is stored.
    """

    http_status: int
    failure: int | None


class DicomwebClient:
    """One DICOMweb server.

    Args:
        server: its base URL (``/studies`` is below it), who may have signed its certificate (else the system's
            authorities), a certificate of our own, and a file with a bearer token, read at every request.
        connect_timeout_seconds: for a connection.
        answer_timeout_seconds: longest silence.
    """

    names_patients = False

    def __init__(
        self,
        server: ArchiveSettings | DestinationSettings,
        *,
        connect_timeout_seconds: float,
        answer_timeout_seconds: float,
    ) -> None:
        self._url = server.url.rstrip("/")
        self._timeout = (connect_timeout_seconds, answer_timeout_seconds)
        self._token_file = server.token_file
        self.host = urlsplit(self._url).hostname or ""
        self._session = requests.Session()
        self._session.trust_env = False  # credentials come from the settings, never from a ~/.netrc
        self._session.verify = True if server.ca_file is None else str(server.ca_file)
        if server.certificate_file is not None:
            self._session.cert = (str(server.certificate_file), str(server.key_file or server.certificate_file))
        self._session.max_redirects = 0  # a redirect could take the token elsewhere
        self._session.hooks["response"] = [self._tell]
        self._qido: Any = DICOMwebClient(self._url, session=self._session, timeout=self._timeout)
        # whether and when to try again is decided by who asks
        self._qido.set_http_retry_params(retry=False)

    def probe(self) -> None:
        """Ask whether the server is there; any answer will do.

        Raises:
            PeerUnavailable: it does not answer.
        """
        with self._answering():
            self._session.get(
                f"{self._url}/studies?limit=1", headers=self._headers(_DICOM_JSON), timeout=self._timeout, stream=True
            ).close()

    def studies(
        self, span: Span | None, modality: str, maximum: int, *, patient_id: str = "", accession_number: str = ""
    ) -> FoundStudies:
        """Studies of a span with a series of this modality, at most ``maximum``.

        Raises:
            PeerUnavailable: no answer, or not for now.
            Refused: the server answers no such questions.
            ValueError: a patient or an order was named.
        """
        if patient_id or accession_number:
            raise ValueError("no patient is named in a URL")
        filters = {"ModalitiesInStudy": modality}
        if span is not None:
            filters["StudyDate"] = span.dates
            if span.times:
                filters["StudyTime"] = span.times
        fields = ["PatientID", "AccessionNumber", "StudyDescription", "ModalitiesInStudy", "StudyDate"]
        fields.append("NumberOfStudyRelatedInstances")
        found = self._search("search_for_studies", search_filters=filters, fields=fields, limit=maximum)
        error: OsteoError | None = None
        if len(found) >= maximum:
            error = PeerBusy(f"{self.host} has {maximum} matches or more")
        return FoundStudies(tuple(study_of(entry) for entry in found if uid_of(entry, STUDY)), error)

    def series(self, study_instance_uid: str) -> tuple[FoundSeries, ...]:
        """Every series of a study.

        Raises:
            PeerUnavailable: no answer, or not for now.
            Refused: the server answers no such questions.
        """
        fields = ["Modality", "BodyPartExamined", "NumberOfSeriesRelatedInstances"]
        found = self._pages("search_for_series", study_instance_uid=study_instance_uid, fields=fields)
        return tuple(
            FoundSeries(
                uid_of(entry, SERIES),
                modality=value_of(entry, MODALITY),
                body_part=value_of(entry, BODY_PART),
                instances=count_of(entry, SERIES_INSTANCES),
            )
            for entry in found
            if uid_of(entry, SERIES)
        )

    def images(self, study_instance_uid: str, series_instance_uid: str) -> Mapping[str, str] | None:
        """SOP Instance UIDs of a series with their classes.

        Raises:
            PeerUnavailable: no answer, or not for now.
            Refused: the server answers no such questions.
        """
        found = self._pages(
            "search_for_instances",
            study_instance_uid=study_instance_uid,
            series_instance_uid=series_instance_uid,
            fields=["SOPClassUID"],
        )
        return {uid: value_of(entry, SOP_CLASS) for entry in found if (uid := uid_of(entry, SOP_INSTANCE))}

    def has_instance(self, study_instance_uid: str, series_instance_uid: str, sop_instance_uid: str) -> bool:
        """Whether the server lists an instance.

        Raises:
            PeerUnavailable: no answer, or not for now.
            Refused: the server answers no such questions.
        """
        found = self._search(
            "search_for_instances",
            study_instance_uid=study_instance_uid,
            series_instance_uid=series_instance_uid,
            search_filters={"SOPInstanceUID": sop_instance_uid},
        )
        return any(value_of(entry, SOP_INSTANCE) == sop_instance_uid for entry in found)

    def retrieve(self, target: Target, maximum_part_bytes: int, stopping: threading.Event) -> Iterator[bytearray]:
        """Part 10 files of a series, or of some of its objects, one after the other as they come.

        Raises:
            PeerUnavailable: no connection, an answer cut short, or not for now; or ``stopping`` was set.
            Refused: the server says no.
        """
        path = f"{self._url}/studies/{target.study_instance_uid}/series/{target.series_instance_uid}"
        paths = [f"{path}/instances/{uid}" for uid in target.sop_instance_uids] or [path]
        for entry in paths:
            for part in self._parts(entry, maximum_part_bytes, stopping):
                if part.media_type not in ("", DICOM):
                    raise Refused(f"{self.host} answers with parts of another type than {DICOM}")
                yield part.body

    def store(self, path: Path, sop_instance_uid: str) -> StoreAnswer:
        """Send one Part 10 file, its bytes as they are.

        Raises:
            PeerUnavailable: no connection, no answer in time, or the credentials are not taken.
            PeerBusy: the server asks to try later, or failed itself.
            Refused: it takes no such requests.
        """
        boundary = f"osteo-{time.monotonic_ns():x}"
        head = f"--{boundary}\r\nContent-Type: {DICOM}\r\n\r\n".encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        headers = self._headers(_DICOM_JSON)
        headers["Content-Type"] = f'multipart/related; type="{DICOM}"; boundary={boundary}'
        headers["Content-Length"] = str(len(head) + path.stat().st_size + len(tail))
        with (
            self._answering(),
            self._session.post(
                f"{self._url}/studies",
                data=_Body(head, path, tail),
                headers=headers,
                timeout=self._timeout,
                stream=True,
                allow_redirects=False,
            ) as answer,
        ):
            body = b"".join(_bounded(answer, _LONGEST_ANSWER_BYTES))
            if answer.status_code in (200, 202, 409):
                return StoreAnswer(
                    answer.status_code, failure_of(answer.status_code, body, sop_instance_uid, self.host)
                )
            raise self._error(answer.status_code)

    def _parts(self, url: str, maximum_part_bytes: int, stopping: threading.Event) -> Iterator[Part]:
        # the parameter is the standard's way to ask for the encoding that is stored (PS3.18 8.7.3.5.2)
        accept = f'multipart/related; type="{DICOM}"; transfer-syntax=*'
        with (
            self._answering(),
            self._session.get(
                url, headers=self._headers(accept), timeout=self._timeout, stream=True, allow_redirects=False
            ) as answer,
        ):
            if answer.status_code not in (200, 206):
                raise self._error(answer.status_code)
            try:
                reader = MultipartReader(boundary_of(answer.headers.get("Content-Type", "")), maximum_part_bytes)
                for chunk in answer.iter_content(_CHUNK_BYTES):
                    if stopping.is_set():
                        raise PeerBusy("stopped")
                    yield from reader.feed(chunk)
                reader.close()
            except MalformedMessage as error:
                raise PeerBusy(f"{self.host}: {error.detail}") from error

    def _pages(self, search: str, **arguments: Any) -> list[dict[str, Any]]:
        """Every match, page by page; a server that does not know of pages is not asked for ever."""
        found: dict[str, dict[str, Any]] = {}
        while True:
            page = self._search(search, limit=_PAGE, offset=len(found), **arguments)
            before = len(found)
            for entry in page:
                found.setdefault(value_of(entry, SOP_INSTANCE) or value_of(entry, SERIES), entry)
            if len(page) < _PAGE or len(found) == before:
                return list(found.values())

    def _search(self, search: str, **arguments: Any) -> list[dict[str, Any]]:
        with self._answering():
            self._session.headers.update(self._headers(_DICOM_JSON))
            try:
                found: list[dict[str, Any]] = getattr(self._qido, search)(**arguments)
            except requests.HTTPError as error:
                status = 500 if error.response is None else error.response.status_code
                if status in _NOT_FOUND:
                    return []
                raise self._error(status) from None
            except (json.JSONDecodeError, requests.JSONDecodeError) as error:
                raise PeerBusy(f"{self.host} answered with no readable JSON") from error
        return [entry for entry in found if isinstance(entry, dict)]

    def _tell(self, answer: requests.Response, **_arguments: Any) -> None:
        """A query is an event for the audit trail; it names no patient."""
        request = answer.request
        if trail.is_open() and request.method == "GET" and _DICOM_JSON in request.headers.get("Accept", ""):
            asked = Peer(self.host, self.host)
            uri = (request.url or "").encode()
            trail.record(events.queried(_STUDY_ROOT_FIND, uri, "", trail.node(), asked))

    def _headers(self, accept: str) -> dict[str, str]:
        headers = {"Accept": accept, "Accept-Encoding": "identity"}
        if self._token_file is not None:
            try:
                headers["Authorization"] = f"Bearer {self._token_file.read_text(encoding='ascii').strip()}"
            except (OSError, UnicodeDecodeError) as error:
                raise PeerUnavailable(f"the token file cannot be read: {type(error).__name__}") from error
        return headers

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (requests.RequestException, OSError) as error:
            # never its text: it quotes the URL
            raise PeerUnavailable(f"{self.host}: {type(error).__name__}") from error

    def _error(self, status: int) -> PeerUnavailable | Refused:
        # the answer may quote the patient: only the status goes into a log
        text = f"{self.host}: HTTP {status}"
        if status in _CREDENTIALS:
            return PeerUnavailable(f"{text}, check the token file")
        if status in _FOR_NOW or status >= 500:
            return PeerBusy(text)
        return Refused(text)


class _Body:
    """A request's body from memory, file and memory; requests reads it in portions and knows its length."""

    def __init__(self, head: bytes, path: Path, tail: bytes) -> None:
        self._pieces = head, path, tail

    def __iter__(self) -> Iterator[bytes]:
        head, path, tail = self._pieces
        yield head
        with path.open("rb") as stream:
            while block := stream.read(_CHUNK_BYTES):
                yield block
        yield tail

    def __len__(self) -> int:
        head, path, tail = self._pieces
        return len(head) + path.stat().st_size + len(tail)


def _bounded(answer: requests.Response, limit: int) -> Iterator[bytes]:
    count = 0
    for chunk in answer.iter_content(_CHUNK_BYTES):
        count += len(chunk)
        if count > limit:
            raise PeerBusy("an answer of unreasonable length")
        yield chunk
