"""Results over TLS: archives that prove who they are get them, others get nothing, and every failure says why."""

from __future__ import annotations

import re
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from osteo_daemon.dicom.verification import echo
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import PeerTls, RemoteAE
from osteo_daemon.errors import PeerUnavailable
from osteo_daemon.messaging import mllp
from osteo_daemon.readiness import check_node
from osteo_daemon.receiver import Receiver
from osteo_daemon.settings import Settings
from tests.authority import Authority, Issued
from tests.deliveries import PATIENCE_S, SENT, built_report, commit, ended, lanes, settings_for
from tests.fakes import LOOPBACK, CountingScp, a_free_port, dcmtk, until
from tests.orthanc import AE_TITLE, running_orthanc
from tests.report_cases import STUDY_UID


@dataclass(frozen=True)
class Pki:
    authority: Authority
    stranger: Authority
    issued: dict[str, Issued]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    folder = tmp_path_factory.mktemp("authority")
    authority, stranger = Authority(folder), Authority(folder, "Other CA")
    return Pki(
        authority,
        stranger,
        {
            "pacs": authority.issue("pacs"),
            "elsewhere": authority.issue("elsewhere", names=("pacs.example.org",)),
            "expired": authority.issue("expired", days=(-9, -1)),
            "future": authority.issue("future", days=(1, 9)),
            "imposter": stranger.issue("pacs", stem="imposter"),
            "node": authority.issue("node", rsa_bits=2048),
        },
    )


def security(pki: Pki, shown: str | None = "node", **changes: Any) -> PeerTls:
    own = None if shown is None else pki.issued[shown]
    files = {} if own is None else {"certificate_file": own.certificate, "key_file": own.key}
    return PeerTls(**{"ca_file": pki.authority.file, **files, **changes})


@contextmanager
def mllp_over_tls(context: ssl.SSLContext, *, resets: bool = False) -> Iterator[int]:
    """An HL7 receiver that acknowledges whatever comes; ``resets`` the connection when it refuses somebody."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                with context.wrap_socket(self.request, server_side=True) as link:
                    received = b""
                    while mllp.END not in received:
                        part = link.recv(65536)
                        if not part:
                            return
                        received += part
                    link.sendall(mllp.START + b"MSH|^~\\&|\rMSA|AA|1\r" + mllp.END)
            except OSError:  # it is the client who tells the test what went wrong
                if resets:
                    self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.request.close()

    with socketserver.ThreadingTCPServer((LOOPBACK, 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def over_dicom(port: int, tls: PeerTls) -> None:
    echo(RemoteAE("PACS", LOOPBACK, port, tls), "OSTEO", timeout_seconds=60)


def over_mllp(port: int, tls: PeerTls) -> None:
    send = mllp.send_message
    assert (
        send(LOOPBACK, port, b"MSH", "1", connect_timeout_seconds=60, answer_timeout_seconds=60, security=tls) == "AA"
    )


REFUSED: dict[str, tuple[str, Callable[[Pki], PeerTls], str]] = {
    "signed by another": ("imposter", security, "certificate not accepted"),
    "expired": ("expired", security, "certificate has expired"),
    "not yet valid": ("future", security, "not yet valid"),
    "another name": ("elsewhere", security, "IP address mismatch"),
    "another than the pinned": ("pacs", lambda pki: security(pki, certificates=frozenset({"cn:other"})), "not one of"),
    # the peer's alert may be lost when it closes at once
    "no certificate of ours": (
        "pacs",
        lambda pki: security(pki, None),
        "certificate required|no association|perhaps it does not accept our certificate",
    ),
    "our files are gone": ("pacs", lambda pki: security(pki, certificate_file=Path("/nowhere.pem")), "cannot be read"),
}
TAKEN: dict[str, tuple[str, Callable[[Pki], PeerTls]]] = {
    "its address in it": ("pacs", security),
    "a server name": ("elsewhere", lambda pki: security(pki, server_name="pacs.example.org")),
    "pinned, under any name": ("elsewhere", lambda pki: security(pki, certificates=frozenset({"cn:elsewhere"}))),
}


@pytest.mark.parametrize("protocol", [over_dicom, over_mllp])
@pytest.mark.parametrize("case", TAKEN)
def test_peers_that_prove_who_they_are(pki: Pki, case: str, protocol: Callable[[int, PeerTls], None]) -> None:
    shown, made = TAKEN[case]
    context = pki.authority.server(pki.issued[shown])
    if protocol is over_mllp:
        with mllp_over_tls(context) as port:
            protocol(port, made(pki))
    else:
        with CountingScp(security=context) as pacs:
            protocol(pacs.port, made(pki))


@pytest.mark.parametrize("protocol", [over_dicom, over_mllp])
@pytest.mark.parametrize("case", REFUSED)
def test_peers_that_do_not(pki: Pki, case: str, protocol: Callable[[int, PeerTls], None]) -> None:
    shown, made, reason = REFUSED[case]
    context = pki.authority.server(pki.issued[shown])
    with mllp_over_tls(context) as port, pytest.raises(PeerUnavailable, match=reason):
        # a DICOM association comes to its end in the same handshake
        protocol(port, made(pki))


def test_a_peer_that_resets_instead_of_closing_is_still_told_by_its_alert(pki: Pki) -> None:
    """The message is longer than what both ends' buffers hold: the reset comes while it is being sent."""
    context = pki.authority.server(pki.issued["pacs"])
    reasons = REFUSED["no certificate of ours"][2]
    with mllp_over_tls(context, resets=True) as port, pytest.raises(PeerUnavailable, match=reasons):
        mllp.send_message(
            LOOPBACK,
            port,
            b"x" * 20_000_000,
            "1",
            connect_timeout_seconds=30,
            answer_timeout_seconds=30,
            security=security(pki, None),
        )


def test_a_peer_without_tls(pki: Pki) -> None:
    with CountingScp() as pacs, pytest.raises(PeerUnavailable):
        over_dicom(pacs.port, security(pki))


def secured(settings: Settings, pki: Pki, **destination: Any) -> Settings:
    """The same node with its certificate, and its destination over TLS."""
    node = pki.issued["node"]
    files = {"certificate_file": node.certificate, "key_file": node.key, "ca_file": pki.authority.file}
    return settings.model_copy(
        update={
            "tls": settings.tls.model_copy(update=files),
            "destinations": (settings.destinations[0].model_copy(update={"tls": True, **destination}),),
        }
    )


def test_dcmtk_receives_over_tls(tmp_path: Path, pki: Pki) -> None:
    port, folder, shown = a_free_port(), tmp_path / "received", pki.issued["pacs"]
    folder.mkdir()
    options = ["+tls", str(shown.key), str(shown.certificate), "+cf", str(pki.authority.file), "+py", "-aet", "PACS"]
    command = [dcmtk("storescp"), *options, "--require-peer-cert", "-od", str(folder), str(port)]
    storescp = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        settings = secured(settings_for(tmp_path, port), pki)
        store = commit(settings, built_report())
        with lanes(settings, store):
            assert until(lambda: ended(store), PATIENCE_S).outcome == "stored"
        store.close()
    finally:
        storescp.kill()
        storescp.wait()
    assert len(list(folder.iterdir())) == len([entry for entry in built_report().objects if entry.variant in SENT])


def test_orthanc_takes_commits_and_reports_over_tls(tmp_path: Path, pki: Pki) -> None:
    """C-STORE and the request go over TLS; the report comes to our TLS port and counts by Orthanc's certificate."""
    receiver_port, dicom_port, shown = a_free_port(), a_free_port(), pki.issued["pacs"]
    plain = settings_for(tmp_path, dicom_port, commitment="storage-commitment", commitment_linger_seconds=0.1)
    pinned = (f"sha256:{shown.sha256}",)
    settings = secured(plain, pki, ae_title=AE_TITLE, certificates=pinned)
    settings = settings.model_copy(
        update={
            "receiver": settings.receiver.model_copy(update={"minimum_free_bytes": 0}),
            "tls": settings.tls.model_copy(update={"port": receiver_port, "only": True}),
        }
    )
    tls = {
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(shown.certificate),
        "DicomTlsPrivateKey": str(shown.key),
        "DicomTlsTrustedCertificates": str(pki.authority.file),
        "DicomTlsRemoteCertificateRequired": True,
    }
    node = {"AET": "OSTEO", "Host": LOOPBACK, "Port": receiver_port, "UseDicomTls": True}
    listening = Receiver(settings)
    listening.start()
    try:
        orthanc = running_orthanc(tmp_path / "orthanc", dicom_port, a_free_port(), modalities={"node": node}, more=tls)
        with orthanc as archive:
            store = commit(settings, built_report())
            with lanes(settings, store):
                assert until(lambda: ended(store), PATIENCE_S).outcome == "committed"
            job = store.job(STUDY_UID)
            assert job is not None
            assert job.state is JobState.DELIVERED
            assert archive.find("Study", StudyInstanceUID=STUDY_UID)
            store.close()
    finally:
        listening.stop(grace_seconds=0.0)


def test_readiness_tells_how_long_the_certificates_hold(tmp_path: Path, pki: Pki) -> None:
    node, tls = pki.issued["node"], {"port": 2762, "key_file": pki.issued["node"].key, "ca_file": pki.authority.file}
    source = {"ae_title": "CT", "addresses": ["192.0.2.1"], "certificates": ["cn:ct"]}
    soon = pki.authority.issue("soon", days=(-1, 20.5))

    def found(sources: list[Any], **changes: Any) -> tuple[bool, str]:
        document = {"state_dir": tmp_path, "sources": sources, "screener": {"network_enabled": False}}
        files = {**tls, "certificate_file": node.certificate, **changes}
        settings = Settings.model_validate({**document, "tls": files})
        finding = next(entry for entry in check_node(settings) if entry.name == "certificates")
        return finding.ok, finding.detail

    assert found([source]) == (True, "the first that ends is the certificate, in 364 days")
    renew = (True, "the first that ends is the certificate, in 20 days: renew it soon")
    assert found([source], certificate_file=soon.certificate, key_file=soon.key) == renew
    old = pki.authority.revoke(file=tmp_path / "old.crl", days=-0.5)
    for sources, changes, reason in (
        ([source], {"certificate_file": pki.issued["expired"].certificate}, "cannot be used: "),
        ([source], _files(pki.issued["expired"]), "expired on"),
        ([source], _files(pki.issued["future"]), "valid only from"),
        ([source], {"crl_file": old}, "crl ended on"),
        ([{**source, "certificates": []}], {}, "nobody can come in over TLS"),
    ):
        ok, detail = found(sources, **changes)
        assert not ok
        assert re.search(reason, detail), detail


def _files(issued: Issued) -> dict[str, Path]:
    return {"certificate_file": issued.certificate, "key_file": issued.key}
