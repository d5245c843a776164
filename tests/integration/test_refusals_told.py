"""Every refusal of the listener, over real ports: one line in the log and one audit message, each with its reason."""

from __future__ import annotations

import base64
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, tostring

import pytest
from pydicom import dcmread
from structlog.testing import capture_logs

from osteo_daemon.audit import trail
from osteo_daemon.audit.spool import AuditSpool
from osteo_daemon.dicom.performed_procedure import PERFORMED_PROCEDURE_STEP_CLASS_UID
from osteo_daemon.settings import AuditSettings, Settings, load_settings
from tests.attacks import UID, data_set
from tests.audit_repository import kind_of, xml_of
from tests.authority import Authority
from tests.fakes import CALLED, CALLING, LOOPBACK, a_free_port, local_receiver, settings_text, write_ct
from tests.integration.test_dicomweb import open_port, related, settings_of
from tests.peers import CT_STORAGE as CT
from tests.peers import (
    ECHO_COMMAND,
    associate_request,
    closed_within,
    command,
    connect,
    context,
    element,
    established,
    p_data,
    pdu,
    read_pdu,
    send_what_is_taken,
    store_command,
    store_status,
    us,
)

MR = "1.2.840.10008.5.1.4.1.1.4"
MPPS = PERFORMED_PROCEDURE_STEP_CLASS_UID
CREATE = command(
    element(2, MPPS.encode() + b"\0"),
    element(0x100, us(0x140)),
    element(0x110, us(1)),
    element(0x800, us(0)),
    element(0x1000, b"1.2.9\0"),
)
"""An N-CREATE-RQ."""

MEBI = 1 << 20
SMALL = 1000
"""Bytes in an hour of two senders."""

ALERT, TRANSFER = "Security Alert", "DICOM Instances Transferred"
NODE, RESTRICTED = "Node Authentication", "Use of Restricted Function"
CONNECTION, ASSOCIATION, CUT_OFF = "connection_refused", "association_refused", "association_cut_off"
OBJECT = "object_refused"


@dataclass
class Siege:
    """A receiver, whom it knows, and what it told."""

    port: int
    tls_port: int
    state: Path
    clients: dict[str, ssl.SSLContext]
    lines: list[dict[str, Any]] = field(default_factory=list)
    messages: list[Element] = field(default_factory=list)

    def storing(self, address: str, calling: str = CALLING) -> socket.socket:
        return established(self.port, address, calling=calling, contexts=context(1, CT))

    def asked(self, address: str, calling: str = CALLING, called: str = CALLED) -> int:
        """Type of the PDU that answers an association request."""
        with connect(self.port, address) as peer:
            peer.settimeout(30)
            peer.sendall(associate_request(calling, called))
            return read_pdu(peer)[0]

    def over_tls(self, address: str, shown: str, calling: str) -> int:
        """The same over TLS; 0 when no handshake came about."""
        with connect(self.tls_port, address) as plain:
            plain.settimeout(30)
            try:
                with self.clients[shown].wrap_socket(plain, server_hostname=LOOPBACK) as peer:
                    peer.sendall(associate_request(calling))
                    return read_pdu(peer)[0]
            except (ssl.SSLError, ConnectionError):
                return 0


Attempt = Callable[[Siege, str], None]
Told = tuple[str, str, str]
"""The line's event, words of its reason, and the audit message's event or type."""


@dataclass(frozen=True)
class Case:
    """What is done from an address of its own, and what must be told of it."""

    attempt: Attempt
    address: str
    told: tuple[Told, ...]


CASES: dict[str, Case] = {}


def refused(*told: Told, address: str = "") -> Callable[[Attempt], Attempt]:
    def note(attempt: Attempt) -> Attempt:
        CASES[attempt.__name__] = Case(attempt, address or f"127.0.5.{len(CASES) + 1}", told)
        return attempt

    return note


@refused((CONNECTION, "address not among the sources", NODE), address="127.0.99.1")
def an_address_of_nobody(siege: Siege, address: str) -> None:
    with connect(siege.port, address) as peer:
        assert closed_within(peer, 30)


@refused((CONNECTION, "first PDU is no association request", NODE))
def another_protocol(siege: Siege, address: str) -> None:
    with connect(siege.port, address) as peer:
        peer.settimeout(30)
        peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert read_pdu(peer)[0] == 7


@refused((CONNECTION, "association request of an impossible length", NODE))
def four_gib_are_announced(siege: Siege, address: str) -> None:
    with connect(siege.port, address) as peer:
        peer.settimeout(30)
        peer.sendall(struct.pack(">BBI", 1, 0, 0xFFFFFFFF))
        assert read_pdu(peer)[0] == 7


@refused((CONNECTION, "no association request in time", NODE))
def silence(siege: Siege, address: str) -> None:
    with connect(siege.port, address) as peer:
        assert closed_within(peer, 30)


@refused((CONNECTION, "no association request in time", NODE))
def silence_over_tls(siege: Siege, address: str) -> None:
    with connect(siege.tls_port, address) as peer:
        assert closed_within(peer, 30)


@refused((CONNECTION, "TLS: certificate not accepted: certificate has expired", NODE))
def an_expired_certificate(siege: Siege, address: str) -> None:
    assert siege.over_tls(address, "expired", "CT1") == 0


@refused((CONNECTION, "TLS: peer did not return a certificate", NODE))
def no_certificate(siege: Siege, address: str) -> None:
    assert siege.over_tls(address, "nobody", "CT1") == 0


@refused((CONNECTION, "TLS: certificate not accepted", NODE))
def a_certificate_of_another_authority(siege: Siege, address: str) -> None:
    assert siege.over_tls(address, "stranger", "CT1") == 0


@refused((ASSOCIATION, "certificate of another than the calling AE title", NODE))
def a_certificate_of_another(siege: Siege, address: str) -> None:
    assert siege.over_tls(address, "ct2", "CT1") == 3


@refused((ASSOCIATION, "no certificate is listed for the calling AE title", NODE))
def a_title_without_certificates(siege: Siege, address: str) -> None:
    assert siege.over_tls(address, "ct2", CALLING) == 3


@refused((ASSOCIATION, "calling AE title must come over TLS", NODE))
def plain_where_tls_is_required(siege: Siege, address: str) -> None:
    assert siege.asked(address, "CT1") == 3


@refused((ASSOCIATION, "called AE title is not ours", NODE))
def another_called_title(siege: Siege, address: str) -> None:
    assert siege.asked(address, called="OTHER") == 3


@refused((ASSOCIATION, "calling AE title is not among the sources", NODE))
def an_unknown_title(siege: Siege, address: str) -> None:
    assert siege.asked(address, "NOBODY") == 3


@refused((ASSOCIATION, "calling AE title comes from an address that is not its own", NODE))
def a_title_from_elsewhere(siege: Siege, address: str) -> None:
    assert siege.asked(address, "ELSEWHERE") == 3


@refused((ASSOCIATION, "too many associations of one address", NODE))
def a_third_association_of_an_address(siege: Siege, address: str) -> None:
    with established(siege.port, address), established(siege.port, address, calling="HOG"):
        assert siege.asked(address) == 3


@refused((ASSOCIATION, "too many associations of one AE title", NODE))
def a_second_association_of_a_title(siege: Siege, address: str) -> None:
    with established(siege.port, "127.0.4.1", calling="ONE"):
        assert siege.asked(address, "ONE") == 3


@refused(("contexts_refused", "none of its presentation contexts is taken", NODE))
def a_class_that_is_not_taken(siege: Siege, address: str) -> None:
    with established(siege.port, address, contexts=context(1, MR)) as peer:
        peer.sendall(pdu(5, bytes(4)))
        assert read_pdu(peer)[0] == 6


@refused((CUT_OFF, "the announced PDU is too long", NODE))
def a_long_pdu(siege: Siege, address: str) -> None:
    with siege.storing(address) as peer:
        peer.sendall(struct.pack(">BBI", 4, 0, 0xFFFFFFFF))
        assert closed_within(peer, 30)


@refused((CUT_OFF, "a PDU of no known type", NODE))
def an_unknown_pdu(siege: Siege, address: str) -> None:
    with siege.storing(address) as peer:
        peer.sendall(pdu(0x77, b"x" * 100))
        peer.settimeout(30)
        assert read_pdu(peer)[0] == 7


@refused((CUT_OFF, "a PDU did not come in time", NODE))
def half_a_pdu(siege: Siege, address: str) -> None:
    with siege.storing(address) as peer:
        peer.sendall(p_data(ECHO_COMMAND, 3)[:30])
        assert closed_within(peer, 30)


@refused((CUT_OFF, "the data set is too long", NODE))
def a_data_set_without_end(siege: Siege, address: str) -> None:
    with siege.storing(address) as peer:
        peer.sendall(p_data(store_command(UID), 3))
        send_what_is_taken(peer, p_data(b"x" * 65000, 0), 20)
        assert closed_within(peer, 30)


@refused((CUT_OFF, "a command in the middle of a data set", NODE))
def a_command_too_early(siege: Siege, address: str) -> None:
    with siege.storing(address) as peer:
        peer.sendall(p_data(store_command(UID), 3) + p_data(b"x", 0) + p_data(ECHO_COMMAND, 3))
        peer.settimeout(30)
        assert read_pdu(peer)[0] == 7


@refused((CUT_OFF, "the data set is too long", NODE))
def a_list_without_end(siege: Siege, address: str) -> None:
    """As the library assembles it, which reads all but objects."""
    with established(siege.port, address, contexts=context(1, MPPS)) as peer:
        peer.sendall(p_data(CREATE, 3))
        send_what_is_taken(peer, p_data(b"x" * 65000, 0), 20)
        assert closed_within(peer, 30)


@refused((OBJECT, "under a context for", TRANSFER))
def a_class_under_another_context(siege: Siege, address: str) -> None:
    with siege.storing(address) as peer:
        sop_class = b"1.2.840.10008.5.1.4.1.1.7"
        assert store_status(peer, UID, data_set(b"1.2.3", UID, sop_class), sop_class) == 0x0122


@refused((OBJECT, "SOP Instance UID differs between command and data set", RESTRICTED))
def another_object_than_announced(siege: Siege, address: str) -> None:
    with siege.storing(address) as peer:
        assert store_status(peer, b"1.2.99", data_set(b"1.2.3", UID)) == 0xA900


@refused((OBJECT, "is longer than the data set", RESTRICTED))
def half_a_data_set(siege: Siege, address: str) -> None:
    with siege.storing(address) as peer:
        assert store_status(peer, UID, data_set(b"1.2.3")[:-2]) == 0xC000


@refused((OBJECT, "another study, series or SOP class", TRANSFER))
def a_known_uid_in_another_study(siege: Siege, address: str) -> None:
    with siege.storing(address) as peer:
        assert store_status(peer, b"1.2.5.1", data_set(b"1.2.5", b"1.2.5.1")) == 0x0000
        assert store_status(peer, b"1.2.5.1", data_set(b"1.2.6", b"1.2.5.1")) == 0xC010


BYTES = "bytes of one {} in an hour"


@refused((OBJECT, BYTES.format("address"), TRANSFER), (ASSOCIATION, BYTES.format("address"), NODE))
def too_much_from_an_address(siege: Siege, address: str) -> None:
    with siege.storing(address) as peer:
        assert 2 <= _store_until_refused(peer, b"1.2.7") < 8
    assert siege.asked(address, "HOG") == 3


@refused((ASSOCIATION, BYTES.format("AE title"), NODE))
def too_much_from_a_title(siege: Siege, address: str) -> None:
    for number in (b"1", b"2", b"3"):
        with siege.storing(f"127.0.4.1{number.decode()}", "SMALL") as peer:
            assert store_status(peer, b"1.2.8." + number, data_set(b"1.2.8", b"1.2.8." + number)) == 0x0000
    assert siege.asked(address, "SMALL") == 3


def _store_until_refused(peer: socket.socket, study: bytes) -> int:
    """How many objects are stored until one is refused for the time being."""
    for number in range(10):
        uid = study + b".%d" % (number + 1)
        if (status := store_status(peer, uid, data_set(study, uid))) != 0x0000:
            assert status == 0xA700
            return number
    raise AssertionError("never refused")


@refused(("request_declined", "no PerformedProcedureStepStatus", RESTRICTED))
def a_list_that_lacks_something(siege: Siege, address: str) -> None:
    with established(siege.port, address, contexts=context(1, MPPS)) as peer:
        peer.settimeout(30)
        peer.sendall(p_data(CREATE, 3) + p_data(struct.pack("<HHI", 0x40, 0x253, 2) + b"1 ", 2))
        assert element(0x900, us(0x120)) in read_pdu(peer)[1]


SETTINGS = f"""
maximum_object_bytes = {MEBI}
acse_timeout_seconds = 5
dimse_timeout_seconds = 5
"""
MORE = """
[quotas]
associations_per_address = 2
bytes_per_hour_per_address = {small}
[audit]
enabled = true
[tls]
port = {tls_port}
certificate_file = "{own.certificate}"
key_file = "{own.key}"
ca_file = "{authority.file}"
"""


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    folder = tmp_path_factory.mktemp("told")
    authority, tls_port = Authority(folder), a_free_port()
    own = authority.issue("node")
    shown = {name: authority.issue(name) for name in ("ct1", "ct2")}
    shown["expired"] = authority.issue("expired", days=(-9, -1))
    shown["stranger"] = Authority(folder, "Other CA").issue("ct1", stem="stranger")
    more = MORE.format(small=SMALL, tls_port=tls_port, own=own, authority=authority)
    everywhere = 'addresses = ["127.0.4.0/24", "127.0.5.0/24"]'
    for title, rest in (
        ("HOG", everywhere),
        ("ONE", f"{everywhere}\nmaximum_associations = 1"),
        ("SMALL", f"{everywhere}\nbytes_per_hour = {SMALL}"),
        ("CT1", f'{everywhere}\ntls_required = true\ncertificates = ["sha256:{shown["ct1"].sha256}"]'),
        ("ELSEWHERE", 'addresses = ["127.0.6.1"]'),
    ):
        more += f'[[sources]]\nae_title = "{title}"\n{rest}\n'
    text = settings_text(folder / "state", 0, extra=more).replace("[receiver]\n", f"[receiver]{SETTINGS}")
    text = text.replace(f'addresses = ["{LOOPBACK}"]', everywhere)
    (folder / "told.toml").write_text(text)
    clients = {name: authority.client(issued) for name, issued in shown.items()} | {"nobody": authority.client()}
    trail.open_trail(load_settings(folder / "told.toml"), "receiver")
    try:
        with capture_logs() as lines, local_receiver(folder, text) as port:
            result = Siege(port, tls_port, folder / "state", clients, lines)
            with ThreadPoolExecutor(len(CASES)) as pool:
                attempts = [pool.submit(case.attempt, result, case.address) for case in CASES.values()]
                for attempt in attempts:
                    attempt.result(120)
        spool = AuditSpool(folder / "state" / "audit", 100 * MEBI)
        result.messages = [xml_of(path.read_bytes()) for path in spool.waiting(1000)]
        yield result
    finally:
        trail.open_trail(Settings(state_dir=folder), "test")


def _text(message: Element) -> tuple[str, str]:
    """What an audit message is, and what it says."""
    if kind_of(message) == ALERT:
        (detail,) = message.iter("ParticipantObjectDetail")
        kind = message.find("EventIdentification/EventTypeCode")
        assert kind is not None
        return kind.attrib["originalText"], base64.b64decode(detail.attrib["value"]).decode()
    return kind_of(message), message.findtext("EventIdentification/EventOutcomeDescription") or ""


@pytest.mark.parametrize("name", CASES)
def test_a_refusal_has_its_line_and_its_audit_message(siege: Siege, name: str) -> None:
    case = CASES[name]
    lines = [line for line in siege.lines if line.get("address") == case.address]
    assert [line["event"] for line in lines] == [event for event, _reason, _told in case.told]
    for line, (_event, reason, _told) in zip(lines, case.told, strict=True):
        assert line["log_level"] == "warning"
        assert reason in line["reason"]
    messages = [
        message
        for message in siege.messages
        if case.address in {who.attrib.get("NetworkAccessPointID") for who in message.findall("ActiveParticipant")}
        and message.find("EventIdentification").attrib["EventOutcomeIndicator"] != "0"
    ]
    told = [_text(message) for message in messages]
    assert [kind for kind, _text in told] == [kind for _event, _reason, kind in case.told]
    for (_kind, text), line in zip(told, lines, strict=True):
        assert text == f"{line['event']}: {line['reason']}"


def test_nothing_else_is_called_a_refusal(siege: Siege) -> None:
    """What was asked for rightly beside: stored, echoed, released."""
    addresses = {case.address for case in CASES.values()}
    warnings = [line for line in siege.lines if line["log_level"] == "warning" and "address" in line]
    assert {line["address"] for line in warnings} <= addresses


def test_objects_over_the_web_likewise(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    settings = settings.model_copy(update={"audit": AuditSettings(enabled=True)})
    (path,) = write_ct(tmp_path / "ct", count=1)
    study = str(dcmread(path).StudyInstanceUID)
    trail.open_trail(settings, "dicomweb")
    try:
        with capture_logs() as lines, open_port(settings) as port:
            assert port.post(related(b"no DICOM")).status_code == 409
            assert port.post(related(path.read_bytes()), path="/studies/1.2.3").status_code == 409
            assert port.post(related(path.read_bytes())).status_code == 200
    finally:
        trail.open_trail(Settings(state_dir=tmp_path), "test")
    told = [line for line in lines if line["event"] == OBJECT]
    assert [(line["status"], line.get("study_instance_uid")) for line in told] == [("0xC000", None), ("0xA900", study)]
    messages = [xml_of(file.read_bytes()) for file in AuditSpool(tmp_path / "state" / "audit", MEBI).waiting(9)]
    refusals = [_text(entry) for entry in messages if 'EventOutcomeIndicator="4"' in tostring(entry, "unicode")]
    assert [kind for kind, _said in refusals] == [RESTRICTED, TRANSFER]
    for (_kind, said), line in zip(refusals, told, strict=True):
        assert said == f"{OBJECT}: {line['reason']}"


def test_classes_proposed_in_vain_beside_others_are_told_once(tmp_path: Path) -> None:
    """No refusal, and no line for each association of a sender that proposes all it knows."""
    with capture_logs() as lines, local_receiver(tmp_path) as port:
        for _ in range(3):
            with established(port, contexts=context(1, CT) + context(3, MR) + context(5, "1.2\x1b[2J")) as peer:
                peer.sendall(pdu(5, bytes(4)))
                assert read_pdu(peer)[0] == 6
    (told,) = [line for line in lines if line["event"].startswith("contexts_")]
    assert (told["event"], told["log_level"], told["count"]) == ("contexts_declined", "info", 2)
    assert told["detail"] == "MR Image Storage, 1.2?[2J"
