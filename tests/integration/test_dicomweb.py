"""DICOMweb both ways: Orthanc and dicomweb-client send to us, we to Orthanc; and what nobody may do to the port."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from dicomweb_client.web import DICOMwebClient
from pydicom import dcmread
from pydicom.uid import MRImageStorage

from osteo_daemon.dicomweb.multipart import MultipartReader, boundary_of
from osteo_daemon.dicomweb.store_response import DICOM_JSON, StoredPart, http_status, store_response
from osteo_daemon.dicomweb_receiver import DicomwebReceiver, read_token
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import Settings
from tests.authority import Authority
from tests.deliveries import PATIENCE_S, built_report, commit, data_set_digest, ended, lanes
from tests.fakes import LOOPBACK, RoleProcess, a_free_port, until
from tests.foreign import Study, require_dicomweb_plugin, send_to, write_study
from tests.orthanc import AE_TITLE, Orthanc, running_orthanc
from tests.report_cases import STUDY_UID

TOKEN = "a-token-of-some-length"  # noqa: S105 - of a test
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}
RELATED = 'multipart/related; type="application/dicom"; boundary=b'
COMPREHENSIVE_3D, COMPREHENSIVE = "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.88.33"


def settings_of(folder: Path, *, port: int = 0, receiver: dict[str, Any] | None = None, **dicomweb: Any) -> Settings:
    """A node with the port open."""
    token = folder / "token"
    token.write_text(TOKEN + "\n")
    files = dicomweb.pop("files", {})
    return Settings.model_validate(
        {
            "state_dir": folder / "state",
            "receiver": {"minimum_free_bytes": 0, **(receiver or {})},
            "dicomweb": {"port": port or a_free_port(), "token_file": token, **dicomweb},
            "tls": files,
        }
    )


@dataclass
class Port:
    """Our port, open in this process."""

    url: str
    port: int
    store: JobStore

    def post(self, body: bytes, *, path: str = "/studies", **headers: str) -> requests.Response:
        """One request with the token."""
        fields = {
            "Content-Type": RELATED,
            **AUTHORISED,
            **{name.replace("_", "-"): text for name, text in headers.items()},
        }
        return requests.post(f"{self.url}{path}", data=body, headers=fields, timeout=60)

    def stored(self, study: str) -> set[str]:
        """SOP Instance UIDs that are here."""
        return set(self.store.study_here(study).stored)


@contextmanager
def open_port(settings: Settings, scheme: str = "http") -> Iterator[Port]:
    """The role in a thread."""
    receiver = DicomwebReceiver(settings)
    thread = threading.Thread(target=receiver.run)
    thread.start()
    store = JobStore(settings.database_url)
    try:
        yield Port(f"{scheme}://{LOOPBACK}:{receiver.port}", receiver.port, store)
    finally:
        store.close()
        receiver.stop()
        thread.join(30)
        assert not thread.is_alive()


def related(*files: bytes, kind: str = "application/dicom") -> bytes:
    """A multipart/related body."""
    return (
        b"".join(b"--b\r\nContent-Type: " + kind.encode() + b"\r\n\r\n" + data + b"\r\n" for data in files) + b"--b--"
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Three slices."""
    return write_study(tmp_path_factory.mktemp("study"), seed=11)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    """One port for the tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("port")
    limits = {"idle_timeout_seconds": 1.0, "maximum_part_bytes": 200_000, "maximum_request_bytes": 1_000_000}
    with open_port(settings_of(folder, **limits)) as port:
        yield port


def test_orthanc_and_dicomweb_client_send_to_the_role(tmp_path: Path, study: Study) -> None:
    port = a_free_port()
    config = tmp_path / "osteo.toml"
    (tmp_path / "token").write_text(TOKEN)
    config.write_text(
        f'state_dir = "{tmp_path / "state"}"\n[receiver]\nminimum_free_bytes = 0\n'
        f'[dicomweb]\nport = {port}\ntoken_file = "{tmp_path / "token"}"\n'
    )
    role = RoleProcess(["run", "dicomweb", "--config", str(config)], tmp_path / "dicomweb.log").start()
    url = f"http://{LOOPBACK}:{port}"
    server = {"Url": url, "HttpHeaders": AUTHORISED}
    more = {"DicomWeb": {"Servers": {"osteo": server}}}
    other = write_study(tmp_path / "other", seed=12, secondary=True)
    try:
        with running_orthanc(
            tmp_path / "orthanc", a_free_port(), a_free_port(), plugins=[require_dicomweb_plugin()], more=more
        ) as orthanc:
            send_to(AE_TITLE, orthanc.dicom_port, study.files)
            role.wait_for("dicomweb_listening", 60)
            resource = orthanc.find("Study", StudyInstanceUID=study.uid)
            answer = json.loads(_post_json(orthanc, "/dicom-web/servers/osteo/stow", {"Resources": resource}))
            assert answer
        session = requests.Session()
        session.headers.update(AUTHORISED)
        client = DICOMwebClient(url, session=session)
        stored = client.store_instances([dcmread(path) for path in other.files])
        assert len(stored.ReferencedSOPSequence) == 4
        assert "FailedSOPSequence" not in stored
        store = JobStore(f"sqlite:///{tmp_path / 'state' / 'jobs.sqlite'}")
        assert set(store.study_here(study.uid).stored) == study.ct
        assert other.ct < set(store.study_here(other.uid).stored)
        job = store.job(study.uid)
        assert job is not None
        assert {entry.sop_instance_uid for entry in store.instances(job)} == study.ct
        for entry in store.instances(job):
            original = next(path for path in study.files if dcmread(path).SOPInstanceUID == entry.sop_instance_uid)
            assert dcmread(entry.path) == dcmread(original)
        store.close()
    finally:
        assert role.stop() == 0
    log = role.log.read_text()
    assert TOKEN not in log
    assert "Virtual" not in log


def _post_json(orthanc: Orthanc, path: str, document: Any) -> bytes:
    request = urllib.request.Request(f"{orthanc.url}{path}", json.dumps(document).encode(), method="POST")  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback http
        return bytes(answer.read())


def test_each_object_has_its_answer(shared: Port, study: Study) -> None:
    good = [path.read_bytes() for path in study.files]
    wrong = dcmread(study.files[0])
    wrong.SOPClassUID = wrong.file_meta.MediaStorageSOPClassUID = MRImageStorage
    path = study.files[0].parent / "wrong"
    wrong.save_as(path)
    answer = shared.post(related(good[0], path.read_bytes(), b"no DICOM", good[0]))
    assert answer.status_code == 202
    assert answer.headers["content-type"] == DICOM_JSON
    document = answer.json()
    uid = str(wrong.SOPInstanceUID)
    stored = [item["00081155"]["Value"] for item in document["00081199"]["Value"]]
    assert stored == [[uid], [uid]]  # the same again is no failure
    assert [item["00081197"]["Value"] for item in document["0008119A"]["Value"]] == [[0x0122], [0xC000]]
    assert shared.post(related(*good), path=f"/studies/{study.uid}").status_code == 200
    other = shared.post(related(good[1]), path="/studies/1.2.3")
    assert other.status_code == 409
    assert other.json()["00081198"]["Value"][0]["00081197"]["Value"] == [0xA900]
    assert shared.stored(study.uid) == study.ct


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Content_Type": "application/dicom"}, 415),
        ({"Content_Type": 'multipart/related; type="application/dicom+json"; boundary=b'}, 415),
        ({"Content_Type": "multipart/related"}, 400),
        ({"Accept": "text/html"}, 406),
        ({"path": "/studies/1.2.3/../../etc"}, 404),
        ({"path": "/studies/abc"}, 400),
        ({"path": "/studies/1.2.3;x"}, 400),
        ({"body": b""}, 400),
        ({"body": b"--b--"}, 400),
        ({"body": b"garbage"}, 400),
        ({"body": related(b"x")[:-3]}, 400),
        ({"body": related(b"x" * 300_000)}, 400),
        ({"body": b"--b\r\n" + b"x" * 1_100_000}, 413),
        ({"body": related(b"x", kind="text/plain")}, 409),
    ],
)
def test_requests_that_are_refused(shared: Port, study: Study, change: dict[str, Any], status: int) -> None:
    body = change.pop("body", related(study.files[0].read_bytes()))
    assert shared.post(body, **change).status_code == status


def test_a_chunked_body_ends_at_the_bound(shared: Port) -> None:
    def endless() -> Iterator[bytes]:
        yield b"--b\r\nContent-Type: application/dicom\r\n\r\n"
        for _ in range(100):
            yield b"x" * 100_000

    try:
        status = requests.post(
            f"{shared.url}/studies", data=endless(), headers={"Content-Type": RELATED, **AUTHORISED}, timeout=60
        ).status_code
    except requests.ConnectionError:
        return  # cut off while it still sent
    assert status == 400


def test_silent_and_slow_senders_are_cut_off_and_others_served(shared: Port, study: Study) -> None:
    def connect(*pieces: bytes) -> socket.socket:
        connection = socket.create_connection((LOOPBACK, shared.port), timeout=60)
        for piece in pieces:
            connection.sendall(piece)
        return connection

    head = f"POST /studies HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {RELATED}\r\n".encode()
    silent = [connect() for _ in range(20)]
    half_header = connect(b"POST /studies HTTP/1.1\r\nHost: x\r\n")
    stopped = connect(head + b"Content-Length: 500000\r\n\r\n", b"--b\r\n\r\nx")
    trickle = connect(head + b"Content-Length: 500000\r\n\r\n")
    ended_at: list[float] = []

    def drip() -> None:
        try:
            for _ in range(200):
                trickle.sendall(b"x")
                time.sleep(0.05)
        except OSError:
            ended_at.append(time.monotonic())

    began = time.monotonic()
    thread = threading.Thread(target=drip)
    thread.start()
    assert shared.post(related(study.files[0].read_bytes())).status_code == 200
    for connection in (*silent, half_header):
        assert connection.recv(1000) in (b"", b"HTTP/1.1 400 Bad Request\r\n")
    assert b" 408 " in stopped.recv(1000)
    assert b" 408 " in trickle.recv(1000)
    assert time.monotonic() - began < 15
    thread.join(30)
    for connection in (*silent, half_header, stopped, trickle):
        connection.close()


def test_a_header_has_a_bound(shared: Port) -> None:
    with socket.create_connection((LOOPBACK, shared.port), timeout=60) as connection:
        connection.sendall(b"POST /studies HTTP/1.1\r\nHost: x\r\nX-A: " + b"y" * 70_000)
        assert b" 400 " in connection.recv(1000)


def test_no_room_on_the_disk_is_said_and_passes(tmp_path: Path, study: Study) -> None:
    body = related(study.files[0].read_bytes())
    full = settings_of(tmp_path, receiver={"minimum_free_bytes": 1 << 60})
    with open_port(full) as port:
        answer = port.post(body)
        assert answer.status_code == 507
        assert answer.headers["retry-after"]
        assert answer.json()["00081198"]["Value"][0]["00081197"]["Value"] == [0xA700]
        assert port.stored(study.uid) == set()
    with open_port(settings_of(tmp_path)) as port:
        assert port.post(body).status_code == 200


def test_more_requests_than_allowed_are_told_to_come_again(tmp_path: Path, study: Study) -> None:
    with open_port(settings_of(tmp_path, maximum_requests=1, idle_timeout_seconds=60.0)) as port:
        going_on = threading.Event()
        parts = [b"Content-Type: application/dicom\r\n\r\n" + path.read_bytes() for path in study.files[:2]]

        def body() -> Iterator[bytes]:
            yield b"--b\r\n" + parts[0] + b"\r\n--b\r\n"
            going_on.wait(50)
            yield parts[1] + b"\r\n--b--"

        answers: list[int] = []
        headers = {"Content-Type": RELATED, **AUTHORISED}

        def send() -> None:
            answers.append(requests.post(f"{port.url}/studies", data=body(), headers=headers, timeout=60).status_code)

        first = threading.Thread(target=send)
        first.start()
        # its first part is stored: the first request is under way, and it has the only place
        until(lambda: len(port.stored(study.uid)) == 1, 60)
        busy = port.post(related(b"x"))
        assert busy.status_code == 503
        assert busy.headers["retry-after"]
        going_on.set()
        first.join(60)
        assert answers == [200]
        assert len(port.stored(study.uid)) == 2
        # the place is free again
        assert port.post(related(study.files[2].read_bytes())).status_code == 200


def test_certificates_instead_of_a_token(tmp_path: Path, study: Study) -> None:
    authority, strangers = Authority(tmp_path), Authority(tmp_path, "Other CA")
    ours, sender, colleague = authority.issue("node"), authority.issue("sender"), authority.issue("colleague")
    stranger = strangers.issue("stranger")
    files = {"certificate_file": ours.certificate, "key_file": ours.key, "ca_file": authority.file}
    mutual = settings_of(tmp_path, tls="mutual", token_file=None, certificates=[f"sha256:{sender.sha256}"], files=files)
    body = related(study.files[0].read_bytes())
    with open_port(mutual, "https") as port:

        def post(shown: Any) -> int:
            pair = None if shown is None else (str(shown.certificate), str(shown.key))
            headers = {"Content-Type": RELATED}
            return requests.post(
                f"{port.url}/studies", data=body, headers=headers, cert=pair, verify=str(authority.file), timeout=60
            ).status_code

        assert post(sender) == 200
        for shown in (None, colleague, stranger):
            with pytest.raises(requests.ConnectionError):
                post(shown)
        assert post(sender) == 200


@pytest.mark.parametrize("text", ["", "short", "\u00fcmlaut-and-long-enough"])
def test_a_token_that_is_no_secret_starts_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match="token_file"):
        read_token(path)


def test_settings_that_would_let_anybody_in(tmp_path: Path) -> None:
    for wrong in (
        {"port": 1},
        {"port": 1, "token_file": "t", "address": "0.0.0.0"},
        {"port": 1, "tls": "mutual"},
        {"port": 1, "tls": "server", "token_file": "t"},
    ):
        with pytest.raises(ValueError, match="dicomweb"):
            Settings.model_validate({"dicomweb": wrong})
    overheard = {"name": "a", "url": "http://pacs.example.org/rs", "token_file": "t"}
    for section in (
        {"archives": [{**overheard, "retrieve": "dicomweb"}]},
        {"destinations": [{**overheard, "kind": "dicomweb"}]},
    ):
        with pytest.raises(ValueError, match="https only"):
            Settings.model_validate(section)


def test_a_sender_has_a_quota(tmp_path: Path, study: Study) -> None:
    settings = settings_of(tmp_path)
    quotas = settings.quotas.model_copy(update={"bytes_per_hour_per_address": 2 * len(study.files[0].read_bytes())})
    with open_port(settings.model_copy(update={"quotas": quotas})) as port:
        answer = port.post(related(*(path.read_bytes() for path in study.files)))
        assert answer.status_code == 202
        assert answer.json()["00081198"]["Value"][0]["00081197"]["Value"] == [0xA700]
        assert len(port.stored(study.uid)) == 2


# --- out: STOW-RS as destination ---


def web_settings(folder: Path, url: str, **more: Any) -> Settings:
    """One node with a destination at this URL."""
    timing = {
        "poll_seconds": 0.05,
        "retry_base_seconds": 0.1,
        "retry_maximum_seconds": 0.3,
        "probe_maximum_seconds": 0.3,
    }
    destination = {"name": "pacs0", "kind": "dicomweb", "url": url, **more}
    return Settings.model_validate({"state_dir": folder / "state", "destinations": [destination], "deliverer": timing})


def test_orthanc_gets_results_over_the_web_and_proves_that_it_keeps_them(tmp_path: Path) -> None:
    with running_orthanc(
        tmp_path / "orthanc", a_free_port(), a_free_port(), plugins=[require_dicomweb_plugin()]
    ) as orthanc:
        settings = web_settings(tmp_path, f"{orthanc.url}/dicom-web")
        store = commit(settings, built_report())
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert (delivery.state, delivery.outcome) == (DeliveryState.DELIVERED, "found")
        digests = {
            data_set_digest(orthanc.read(f"/instances/{name}/file"))
            for name in orthanc.find("Instance", StudyInstanceUID=STUDY_UID)
        }
        sent = [entry.report for entry in delivery.objects if (entry.status or "").startswith("http-")]
        assert {entry.kind.value for entry in sent} == {"seg", "sr", "sc"}
        assert digests == {data_set_digest(entry.path.read_bytes()) for entry in sent}
        store.close()


@dataclass
class WebArchive:
    """A STOW-RS and QIDO-RS server that answers as it is told.

    Attributes:
        failure: called with SOP class and how many requests came; the Failure Reason, or an HTTP status below 600.
    """

    failure: Callable[[str, int], int | None]
    kept: dict[str, str] = field(default_factory=dict)
    requests: int = 0
    tokens: set[str] = field(default_factory=set)
    url: str = ""
    _server: Any = None

    def __enter__(self) -> WebArchive:
        archive = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                archive.tokens.add(self.headers.get("Authorization", ""))
                reader = MultipartReader(boundary_of(self.headers["Content-Type"]), 1 << 24)
                (part,) = reader.feed(self.rfile.read(int(self.headers["Content-Length"])))
                reader.close()
                path = Path(archive.folder) / "part"
                path.write_bytes(part.body)
                header = dcmread(path)
                sop_class, uid = str(header.SOPClassUID), str(header.SOPInstanceUID)
                archive.requests += 1
                failure = archive.failure(sop_class, archive.requests)
                if failure is not None and failure < 600 and failure != 0x0122:
                    self.send_error(failure)
                    return
                answer = [StoredPart(sop_class, uid, failure)]
                if failure is None:
                    archive.kept[uid] = sop_class
                self._answer(http_status(answer), store_response(answer, DICOM_JSON))

            def do_GET(self) -> None:
                found = [uid for uid in archive.kept if uid in self.path]
                body = [{"00080018": {"vr": "UI", "Value": [uid]}} for uid in found]
                self._answer(200, json.dumps(body).encode())

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", DICOM_JSON)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://{LOOPBACK}:{self._server.server_port}/rs"
        return self

    def __exit__(self, *_reason: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    folder: str = ""


@pytest.mark.parametrize(
    ("failure", "state", "outcome"),
    [
        (lambda _kind, count: 0xA700 if count < 3 else None, DeliveryState.DELIVERED, "found"),
        (lambda _kind, count: 503 if count < 3 else None, DeliveryState.DELIVERED, "found"),
        (lambda _kind, count: 401 if count < 3 else None, DeliveryState.DELIVERED, "found"),
        (lambda kind, _count: 0x0122 if kind == COMPREHENSIVE_3D else None, DeliveryState.DELIVERED, "found"),
        (lambda _kind, _count: 0xA900, DeliveryState.REFUSED, "refused"),
        (lambda _kind, _count: 404, DeliveryState.REFUSED, "refused"),
    ],
    ids=[
        "no room for a while",
        "busy for a while",
        "token mended",
        "class fallback",
        "data set refused",
        "no such service",
    ],
)
def test_answers_of_a_web_archive(
    tmp_path: Path, failure: Callable[[str, int], int | None], state: DeliveryState, outcome: str
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with WebArchive(failure, folder=str(tmp_path)) as archive:
        settings = web_settings(tmp_path, archive.url, token_file=tmp_path / "token")
        store = commit(settings, built_report())
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert (delivery.state, delivery.outcome) == (state, outcome)
        assert archive.tokens == {AUTHORISED["Authorization"]}
        if state is DeliveryState.DELIVERED:
            kept = set(archive.kept.values())
            took_best = failure(COMPREHENSIVE_3D, 100) is None
            assert (COMPREHENSIVE_3D in kept, COMPREHENSIVE in kept) == (took_best, not took_best)
        store.close()
