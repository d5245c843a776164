"""The TLS port: who gets in, who does not and what the log says of it, and certificates that change while it runs."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pynetdicom import AE

from tests.authority import Authority, Issued
from tests.fakes import (
    CALLED,
    LOOPBACK,
    RoleProcess,
    a_free_port,
    dcmtk,
    local_receiver,
    receiver_process,
    settings_text,
    until,
    write_ct,
)
from tests.peers import VERIFICATION, associate_request

ACCEPTED, REJECTED, NOTHING = 2, 3, 0
"""First byte of the answer to an A-ASSOCIATE-RQ; 0: none came."""


def tls_text(port: int, authority: Authority, own: Issued, crl: Path | None = None) -> str:
    text = f"""
[tls]
port = {port}
certificate_file = "{own.certificate}"
key_file = "{own.key}"
ca_file = "{authority.file}"
"""
    return text + (f'crl_file = "{crl}"\n' if crl is not None else "")


def source_text(ae_title: str, *certificates: str, address: str = LOOPBACK, more: str = "") -> str:
    listed = ", ".join(f'"{entry}"' for entry in certificates)
    return f'\n[[sources]]\nae_title = "{ae_title}"\naddresses = ["{address}"]\ncertificates = [{listed}]\n{more}\n'


@dataclass(frozen=True)
class Node:
    role: RoleProcess
    plain: int
    port: int
    authority: Authority
    issued: dict[str, Issued]
    log: Path

    def client(self, name: str | None) -> ssl.SSLContext:
        return self.authority.client(None if name is None else self.issued[name])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder)
    own = authority.issue("node", rsa_bits=2048)
    issued = {
        "ct1": authority.issue("ct1"),
        "ct2": authority.issue("ct2", names=("CT2.hospital.example",), rsa_bits=2048),
        "ct3": authority.issue("ct3"),
        "expired": authority.issue("expired", days=(-10, -1)),
        "future": authority.issue("future", days=(1, 10)),
        "revoked": authority.issue("revoked"),
        "stranger": Authority(folder, "Other CA").issue("ct1", stem="stranger"),
    }
    port = a_free_port()
    crl = authority.revoke(issued["revoked"], file=folder / "ca.crl")
    extra = tls_text(port, authority, own, crl)
    extra += source_text("CT1", f"sha256:{issued['ct1'].sha256.upper()}", more="tls_required = true")
    extra += source_text("CT2", "dns:ct2.hospital.example")
    extra += source_text("CT3", "subject:CN=ct3,O=Hospital", "cn:nobody")
    extra += source_text("ELSEWHERE", "cn:ct1", address="127.0.0.77")
    for name in ("expired", "future", "revoked", "stranger"):
        extra += source_text(name.upper(), f"sha256:{issued[name].sha256}")
    with receiver_process(folder, extra=extra) as (role, plain):
        role.wait_for("receiver_listening_tls", 90)
        yield Node(role, plain, port, authority, issued, folder / "receiver.log")


def answer(port: int, context: ssl.SSLContext | None, calling: str) -> int:
    """Ask for an association; gives the first byte of the answer."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=60) as plain:
            if context is None:
                plain.sendall(associate_request(calling))
                return (plain.recv(1) or b"\0")[0]
            with context.wrap_socket(plain, server_hostname=LOOPBACK) as peer:
                peer.sendall(associate_request(calling))
                return (peer.recv(1) or b"\0")[0]
    except (ssl.SSLError, ConnectionError):
        return NOTHING


def bounded(context: ssl.SSLContext, version: ssl.TLSVersion, suites: str = "") -> ssl.SSLContext:
    context.minimum_version = context.maximum_version = version
    if suites:
        context.set_ciphers(suites)
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_source_with_its_certificate_is_let_in(node: Node, version: ssl.TLSVersion) -> None:
    for name in ("ct1", "ct2", "ct3"):
        assert answer(node.port, bounded(node.client(name), version), name.upper()) == ACCEPTED


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_handshake_is_that_of_the_profile(node: Node, version: ssl.TLSVersion) -> None:
    """No compression and no tickets; who takes up a session of before is held to its certificate as before."""
    context, session = bounded(node.client("ct1"), version), None
    for _ in range(3):
        with (
            socket.create_connection((LOOPBACK, node.port), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname=LOOPBACK, session=session) as peer,
        ):
            calling, expected = ("CT1", b"\x02") if session is None else ("CT2", b"\x03")
            peer.sendall(associate_request(calling))
            assert peer.recv(1) == expected
            assert peer.compression() is None
            session = peer.session
            assert session is None or not session.has_ticket


def test_tls_1_3_is_preferred(node: Node) -> None:
    with (
        socket.create_connection((LOOPBACK, node.port), timeout=60) as plain,
        node.client("ct1").wrap_socket(plain, server_hostname=LOOPBACK) as peer,
    ):
        assert peer.version() == "TLSv1.3"


WEAK = {
    "TLS 1.1": lambda c: bounded(c, ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0"),
    "TLS 1.0": lambda c: bounded(c, ssl.TLSVersion.TLSv1, "ALL:@SECLEVEL=0"),
    "no forward secrecy": lambda c: bounded(c, ssl.TLSVersion.TLSv1_2, "AES256-GCM-SHA384:@SECLEVEL=0"),
    "no authenticated encryption": lambda c: bounded(c, ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-AES256-SHA384:@SECLEVEL=0"),
    "finite-field DHE": lambda c: bounded(c, ssl.TLSVersion.TLSv1_2, "DHE-RSA-AES256-GCM-SHA384:@SECLEVEL=0"),
}


@pytest.mark.parametrize("weakness", WEAK)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weak_cryptography_is_refused(node: Node, weakness: str) -> None:
    before = node.log.stat().st_size
    change: Callable[[ssl.SSLContext], ssl.SSLContext] = WEAK[weakness]
    assert answer(node.port, change(node.client("ct1")), "CT1") == NOTHING
    expected = "unsupported protocol" if weakness.startswith("TLS") else "no shared cipher"
    assert told(node.log, before, "connection_refused", expected)


def told(log: Path, offset: int, *words: str) -> bool:
    """Wait for a line of the log, after ``offset``, that holds all words."""

    def found() -> bool:
        lines = log.read_text(errors="replace")[offset:].splitlines()
        return any(all(word in line for word in words) for line in lines)

    return bool(until(found))


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        (None, "peer did not return a certificate"),
        ("stranger", "certificate not accepted"),
        ("expired", "certificate has expired"),
        ("future", "certificate is not yet valid"),
        ("revoked", "certificate revoked"),
    ],
)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_certificates_that_do_not_hold(node: Node, shown: str | None, reason: str, version: ssl.TLSVersion) -> None:
    before = node.log.stat().st_size
    assert answer(node.port, bounded(node.client(shown), version), (shown or "ct1").upper()) == NOTHING
    assert told(node.log, before, "connection_refused", reason)


@pytest.mark.parametrize(
    ("shown", "calling", "reason"),
    [
        ("ct2", "CT1", "certificate of another"),
        ("ct1", "CT2", "certificate of another"),
        ("ct1", "MODALITY", "no certificate is listed"),
        ("ct1", "ELSEWHERE", "an address that is not its own"),
        ("ct1", "NOBODY", "not among the sources"),
        (None, "CT1", "must come over TLS"),
    ],
)
def test_title_address_and_certificate_must_agree(node: Node, shown: str | None, calling: str, reason: str) -> None:
    before = node.log.stat().st_size
    if shown is None:
        assert answer(node.plain, None, calling) == REJECTED
    else:
        assert answer(node.port, node.client(shown), calling) == REJECTED
        assert told(node.log, before, "association_refused", f"sha256:{node.issued[shown].sha256}")
    assert told(node.log, before, "association_refused", reason)


def test_a_source_with_certificates_may_use_the_plain_port_unless_tls_is_required(node: Node) -> None:
    assert answer(node.plain, None, "CT2") == ACCEPTED


def test_plain_dicom_on_the_tls_port(node: Node) -> None:
    before = node.log.stat().st_size
    assert answer(node.port, None, "MODALITY") != ACCEPTED
    assert told(node.log, before, "connection_refused", "TLS")


@pytest.mark.parametrize(
    ("tool", "profile", "exit_code"),
    [
        ("echoscu", "+py", 0),
        ("echoscu", "+px", 0),
        ("storescu", "+py", 0),
        ("storescu", "+pz", 0),
        ("echoscu", "+pn", 1),
    ],
)
def test_dcmtk_over_tls(node: Node, tmp_path: Path, tool: str, profile: str, exit_code: int) -> None:
    """Its three BCP 195 profiles are taken; the retired one without encryption is not."""
    files = write_ct(tmp_path, count=3) if tool == "storescu" else []
    options = [*node.issued["ct1"].options, "+cf", str(node.authority.file), profile, "-aet", "CT1", "-aec", CALLED]
    command = [dcmtk(tool), *options, LOOPBACK, str(node.port), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == exit_code, done.stdout + done.stderr


def test_renegotiation_is_refused(node: Node) -> None:
    """A client of TLS 1.2 that asks for a new handshake does not get one."""
    shown = node.issued["ct1"]
    command = ["openssl", "s_client", "-connect", f"{LOOPBACK}:{node.port}", "-tls1_2", "-CAfile", node.authority.file]
    process = subprocess.Popen(
        [*map(str, command), "-cert", str(shown.certificate), "-key", str(shown.key)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin is not None
    try:
        assert process.stdout is not None
        seen = b""
        while b"Verify return code" not in seen:
            seen += os.read(process.stdout.fileno(), 65536)
        process.stdin.write(b"R\n")
        process.stdin.flush()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert b"no renegotiation" in output


def test_idle_clients_do_not_freeze_the_listener(node: Node) -> None:
    idle = [socket.create_connection((LOOPBACK, node.port), timeout=60) for _ in range(30)]
    half = socket.create_connection((LOOPBACK, node.port), timeout=60)
    half.sendall(b"\x16\x03\x01\x02\x00\x01")
    begun = time.monotonic()
    assert answer(node.port, node.client("ct1"), "CT1") == ACCEPTED
    assert time.monotonic() - begun < 1.5
    for peer in (*idle, half):
        peer.close()


def test_certificates_change_while_it_runs(tmp_path: Path) -> None:
    """New files count from the next handshake on; broken ones change nothing; who is connected stays so."""
    authority = Authority(tmp_path)
    own, ct1, ct2 = authority.issue("node"), authority.issue("ct1"), authority.issue("ct2")
    crl = authority.revoke(file=tmp_path / "ca.crl")
    port = a_free_port()
    extra = tls_text(port, authority, own, crl)
    extra += source_text("CT1", f"sha256:{ct1.sha256}") + source_text("CT2", f"sha256:{ct2.sha256}")
    with receiver_process(tmp_path, extra=extra) as (role, _plain):
        role.wait_for("receiver_listening_tls", 90)
        log = tmp_path / "receiver.log"

        def shown() -> str:
            with (
                socket.create_connection((LOOPBACK, port), timeout=60) as plain,
                authority.client(ct1).wrap_socket(plain, server_hostname=LOOPBACK) as peer,
            ):
                return hashlib.sha256(peer.getpeercert(binary_form=True) or b"").hexdigest()

        assert shown() == own.sha256
        entity = AE(ae_title="CT1")
        entity.add_requested_context(VERIFICATION)
        open_before = entity.associate(LOOPBACK, port, ae_title=CALLED, tls_args=(authority.client(ct1), LOOPBACK))
        assert open_before.is_established

        good = own.key.read_bytes()
        own.key.write_text("-----BEGIN PRIVATE KEY-----\nnonsense\n-----END PRIVATE KEY-----\n")
        assert told(log, 0, "certificates_refused", "those of before stay in use")
        assert shown() == own.sha256
        own.key.write_bytes(good)
        assert told(log, 0, "certificates_loaded", own.sha256)

        newer = authority.issue("node", stem="newer")
        for old, new in ((own.certificate, newer.certificate), (own.key, newer.key)):
            new.replace(old)
        assert until(lambda: shown() == newer.sha256)

        assert answer(port, authority.client(ct2), "CT2") == ACCEPTED
        authority.revoke(ct2, file=crl)
        assert until(lambda: answer(port, authority.client(ct2), "CT2") == NOTHING)
        assert answer(port, authority.client(ct1), "CT1") == ACCEPTED

        offset = log.stat().st_size
        assert role.process is not None
        role.process.send_signal(signal.SIGHUP)
        assert told(log, offset, "certificates_loaded", newer.sha256)
        assert open_before.send_c_echo().Status == 0x0000
        open_before.release()


def test_without_a_plain_port(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own, ct1 = authority.issue("node"), authority.issue("ct1")
    port, plain = a_free_port(), a_free_port()
    extra = tls_text(port, authority, own) + "only = true\n" + source_text("CT1", "cn:ct1")
    with local_receiver(tmp_path, settings_text(tmp_path / "state", plain, extra=extra)) as served:
        assert served == port
        assert answer(port, authority.client(ct1), "CT1") == ACCEPTED
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, plain), timeout=2)
