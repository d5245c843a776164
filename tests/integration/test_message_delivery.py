"""Messages reach real servers: HL7 over a socket, FHIR over HTTP, with the guarantees that DICOM destinations have."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.diagnosticreport import DiagnosticReport
from fhir.resources.R4B.observation import Observation
from hl7apy.parser import parse_message

from osteo_daemon.dicom.report_forms import BuiltReport
from osteo_daemon.dicom.report_objects import build_report_objects
from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import PeerBusy, PeerUnavailable, Refused
from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.messages import build_messages
from osteo_daemon.messaging import fhir_client, mllp
from osteo_daemon.messaging.hl7 import control_id
from osteo_daemon.settings import DestinationSettings, Settings
from tests.deliveries import PATIENCE_S, commit, ended, lanes, settings_for
from tests.fakes import LOOPBACK, a_free_port, until
from tests.report_cases import STUDY_UID, short_case

Answer = Callable[[int], str]


@dataclass
class MllpServer:
    """An HL7 receiver: reads frames, validates with hl7apy, acknowledges with the code that ``answer`` gives.

    Attributes:
        answer: called with how many messages came so far; ``""`` closes without a word, ``"silent"`` says nothing.
    """

    answer: Answer = lambda _count: "AA"
    port: int = 0
    messages: list[bytes] = field(default_factory=list)

    def __enter__(self) -> MllpServer:
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                received = b""
                while mllp.END not in received:
                    part = self.request.recv(65536)
                    if not part:
                        return
                    received += part
                message = received.partition(mllp.START)[2].partition(mllp.END)[0]
                outer.messages.append(message)
                code = outer.answer(len(outer.messages))
                if code == "silent":
                    time.sleep(3)
                elif code:
                    header = message.decode().split("\r")[0].split("|")
                    reply = f"MSH|^~\\&|RIS||OSTEO||20260101||ACK^R01^ACK|1|P|2.5.1\rMSA|{code}|{header[9]}\r"
                    # in pieces: a frame need not come in one segment
                    self.request.sendall(mllp.START + reply.encode()[:20])
                    self.request.sendall(reply.encode()[20:] + mllp.END)

        self._server = socketserver.ThreadingTCPServer((LOOPBACK, self.port), Handler, bind_and_activate=False)
        self._server.allow_reuse_address = True
        self._server.daemon_threads = True
        self._server.server_bind()
        self._server.server_activate()
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_reason: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def fhir_server(status: Callable[[int], int] = lambda _count: 200) -> Iterator[tuple[str, dict[str, Any], list[Any]]]:
    """A FHIR server that validates what comes and keeps one resource for each search it was told to update by.

    Gives its base URL, the resources by conditional URL, and (path, headers, body) of every POST.
    """
    kept: dict[str, Any] = {}
    posts: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200 if self.path == "/r4/metadata" else 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posts.append((self.path, dict(self.headers), body))
            answer = status(len(posts))
            if answer == 200:
                Bundle.model_validate_json(body)
                for entry in json.loads(body)["entry"]:
                    kind = entry["resource"]["resourceType"]
                    {"DiagnosticReport": DiagnosticReport, "Observation": Observation}[kind].model_validate(
                        entry["resource"]
                    )
                    assert entry["request"]["method"] == "PUT"
                    kept[entry["request"]["url"]] = entry["resource"]
            self._answer(answer)

        def _answer(self, code: int) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_arguments: object) -> None:
            return

    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://{LOOPBACK}:{server.server_address[1]}/r4", kept, posts
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def dicom_objects() -> BuiltReport:
    return build_report_objects(short_case())


def node(folder: Path, dicom_objects: BuiltReport, **destination: Any) -> tuple[Settings, BuiltReport]:
    """Settings with one destination, and the objects with its message."""
    entry = DestinationSettings.model_validate({"name": "pacs0", **destination})
    settings = settings_for(folder).model_copy(update={"destinations": (entry,)})
    messages = build_messages(short_case(), settings.destinations)
    return settings, replace(dicom_objects, objects=(*dicom_objects.objects, *messages))


def test_an_hl7_message_arrives_once_and_the_job_is_delivered(tmp_path: Path, dicom_objects: BuiltReport) -> None:
    with MllpServer() as server:
        settings, built = node(tmp_path, dicom_objects, kind="hl7", host=LOOPBACK, port=server.port)
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert (delivery.state, delivery.outcome) == (DeliveryState.DELIVERED, "stored")
        assert [entry.status for entry in delivery.objects] == ["ack-AA"]
        assert server.messages == [built.objects[-1].data]
        assert parse_message(server.messages[0].decode()).msh.msh_10.value == control_id(
            built.objects[-1].sop_instance_uid
        )
        assert store.recent(study_instance_uid=STUDY_UID)[0].state is JobState.DELIVERED
        store.close()


def test_an_error_and_a_lost_connection_are_tried_again_with_the_same_bytes(
    tmp_path: Path, dicom_objects: BuiltReport
) -> None:
    answers = ["AE", "", "XX", "AA"]
    with MllpServer(lambda count: answers[count - 1]) as server:
        settings, built = node(tmp_path, dicom_objects, kind="hl7", host=LOOPBACK, port=server.port)
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert delivery.state is DeliveryState.DELIVERED
        assert len(server.messages) == 4
        assert len(set(server.messages)) == 1
        store.close()


def test_a_rejected_message_is_a_dead_letter(tmp_path: Path, dicom_objects: BuiltReport) -> None:
    with MllpServer(lambda _count: "AR") as server:
        settings, built = node(tmp_path, dicom_objects, kind="hl7", host=LOOPBACK, port=server.port)
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert delivery.state is DeliveryState.REFUSED
        assert "AR" in str(delivery.detail)
        assert len(server.messages) == 1
        store.close()


def test_a_receiver_that_comes_up_late_gets_the_message(tmp_path: Path, dicom_objects: BuiltReport) -> None:
    port = a_free_port()
    settings, built = node(tmp_path, dicom_objects, kind="hl7", host=LOOPBACK, port=port)
    store = commit(settings, built)
    with lanes(settings, store):
        until(lambda: store.deliveries()[0].attempts >= 1, PATIENCE_S)
        with MllpServer(port=port) as server:
            until(lambda: ended(store), PATIENCE_S)
            assert server.messages == [built.objects[-1].data]
    store.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("AA", None), ("CA", None), ("AE", PeerBusy), ("CE", PeerBusy), ("AR", Refused), ("CR", Refused)],
)
def test_what_an_acknowledgement_means(answer: str, expected: type[Exception] | None) -> None:
    with MllpServer(lambda _count: answer) as server:
        call = lambda: mllp.send_message(  # noqa: E731
            LOOPBACK, server.port, b"MSH|^~\\&|||||||ORU|ID1|P|2.5.1\r", "ID1",
            connect_timeout_seconds=60, answer_timeout_seconds=60,
        )  # fmt: skip
        if expected is None:
            assert call() == answer
        else:
            with pytest.raises(expected):
                call()


def test_silence_and_an_answer_to_another_message_are_transient() -> None:
    with MllpServer(lambda count: "silent" if count == 1 else "AA") as server:
        for control in ("ID1", "ID2"):
            with pytest.raises(PeerUnavailable):
                mllp.send_message(
                    LOOPBACK, server.port, b"MSH|^~\\&|||||||ORU|ID1|P|2.5.1\r", control,
                    connect_timeout_seconds=60, answer_timeout_seconds=0.3,
                )  # fmt: skip


def test_an_endless_answer_ends() -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:

        def pour() -> None:
            link, _ = listener.accept()
            with link:
                try:
                    while True:
                        link.sendall(b"x" * 4096)
                except OSError:
                    return

        threading.Thread(target=pour, daemon=True).start()
        with pytest.raises(PeerUnavailable, match="TimeoutError"):
            mllp.send_message(
                LOOPBACK, listener.getsockname()[1], b"MSH", "1", connect_timeout_seconds=2, answer_timeout_seconds=5
            )


def test_a_fhir_transaction_arrives_and_a_repeat_doubles_nothing(tmp_path: Path, dicom_objects: BuiltReport) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    # 503 after the server kept it would be a repeat: the second time it is kept again under the same identifiers
    with fhir_server(lambda count: 503 if count == 1 else 200) as (url, kept, posts):
        settings, built = node(tmp_path, dicom_objects, kind="fhir", url=url, token_file=str(token))
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert delivery.state is DeliveryState.DELIVERED
        assert [entry.status for entry in delivery.objects] == ["http-200"]
        assert len(posts) == 2
        assert {body for _, _, body in posts} == {built.objects[-1].data}
        assert posts[0][1]["Authorization"] == "Bearer secret"
        assert posts[0][1]["Content-Type"] == "application/fhir+json"
        assert len(kept) == 3
        fhir_client.post_transaction(url, built.objects[-1].data, None, timeout_seconds=60)
        assert len(kept) == 3
        store.close()


@pytest.mark.parametrize(
    ("status", "expected"),
    [(400, Refused), (422, Refused), (404, Refused), (401, PeerUnavailable), (429, PeerBusy), (500, PeerBusy)],
)
def test_what_a_fhir_status_means(status: int, expected: type[Exception]) -> None:
    with fhir_server(lambda _count: status) as (url, _, _), pytest.raises(expected, match=str(status)):
        fhir_client.post_transaction(url, b"{}", None, timeout_seconds=60)


def test_probes(tmp_path: Path) -> None:
    port = a_free_port()
    with pytest.raises(PeerUnavailable):
        mllp.probe(LOOPBACK, port, connect_timeout_seconds=1)
    with pytest.raises(PeerUnavailable):
        fhir_client.probe(f"http://{LOOPBACK}:{port}/r4", timeout_seconds=1)
    with pytest.raises(PeerUnavailable, match="token file"):
        fhir_client.post_transaction(f"http://{LOOPBACK}:{port}", b"{}", tmp_path / "none", timeout_seconds=1)
    with MllpServer() as server:
        mllp.probe(LOOPBACK, server.port, connect_timeout_seconds=60)
    with fhir_server() as (url, _, _):
        fhir_client.probe(url, timeout_seconds=60)
