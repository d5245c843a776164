"""Quotas, admission, the log of refusals, and what certificates say: the parts of the listener that need no port."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from osteo_daemon.audit import trail
from osteo_daemon.audit.message import AuditMessage
from osteo_daemon.certificates import earliest_next_update, read_certificates
from osteo_daemon.dicom.admission import CALLED_UNKNOWN, CALLING_UNKNOWN, Admission, Caller
from osteo_daemon.dicom.patience import BURST, PER_SECOND, Patience
from osteo_daemon.dicom.quota import Quota
from osteo_daemon.dicom.refusals import LINES_A_MINUTE, TOLD_ONE_BY_ONE, Refusals
from osteo_daemon.dicom.tls import ListenerTls
from osteo_daemon.errors import ConfigurationError, QuotaExceeded
from osteo_daemon.settings import DestinationSettings, QuotaSettings, Settings, SourceSettings
from osteo_daemon.tls import TlsFiles, server_context
from tests.authority import Authority

CT = SourceSettings(ae_title="CT", addresses=("192.0.2.0/24",))


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def quota(clock: Clock, sources: tuple[SourceSettings, ...] = (CT,), maximum: int = 100, **limits: int) -> Quota:
    unlimited = dict.fromkeys(QuotaSettings.model_fields, 0)
    return Quota(QuotaSettings(**{**unlimited, **limits}), sources, maximum, clock)


def alive() -> bool:
    return True


def test_associations_of_one_title_and_of_one_address() -> None:
    q = quota(Clock(), associations_per_ae_title=2, associations_per_address=3)
    assert not q.admit(1, "A", "192.0.2.1", alive)
    assert not q.admit(2, "A", "192.0.2.2", alive)
    assert q.admit(3, "A", "192.0.2.3", alive) == "too many associations of one AE title"
    assert not q.admit(4, "B", "192.0.2.1", alive)
    assert not q.admit(5, "C", "192.0.2.1", alive)
    assert q.admit(6, "D", "192.0.2.1", alive) == "too many associations of one address"
    q.release(1)
    assert not q.admit(6, "A", "192.0.2.1", alive)


def test_a_source_with_limits_of_its_own() -> None:
    source = CT.model_copy(update={"maximum_associations": 1, "bytes_per_hour": 10})
    q = quota(Clock(), (source,), associations_per_ae_title=5, bytes_per_hour_per_ae_title=1000)
    assert not q.admit(1, "CT", "192.0.2.1", alive)
    assert q.admit(2, "CT", "192.0.2.1", alive)
    q.charge("CT", "192.0.2.1", 10)
    with pytest.raises(QuotaExceeded):
        q.charge("CT", "192.0.2.1", 1)
    q.charge("MR", "192.0.2.1", 900)


def test_the_cap_of_all_and_associations_that_died_unseen() -> None:
    q, dead = quota(Clock(), maximum=2), []
    assert not q.admit(1, "A", "192.0.2.1", lambda: not dead)
    assert not q.admit(2, "B", "192.0.2.2", alive)
    assert q.admit(3, "C", "192.0.2.3", alive) == "too many associations"
    dead.append(1)
    assert not q.admit(3, "C", "192.0.2.3", alive)


def test_bytes_flow_off_after_an_hour_and_refuse_associations_until_then() -> None:
    clock = Clock()
    q = quota(clock, bytes_per_hour_per_address=100)
    q.charge("A", "192.0.2.1", 60)
    clock.now += 1800
    q.charge("A", "192.0.2.1", 70)  # began below the limit
    with pytest.raises(QuotaExceeded):
        q.charge("B", "192.0.2.1", 1)
    assert q.admit(1, "B", "192.0.2.1", alive) == "bytes of one address in an hour"
    assert not q.admit(2, "B", "192.0.2.2", alive)
    clock.now += 1801
    assert not q.admit(1, "B", "192.0.2.1", alive)
    q.charge("B", "192.0.2.1", 1)


def test_what_was_not_stored_is_not_counted() -> None:
    q = quota(Clock(), bytes_per_hour_per_ae_title=100)
    for _ in range(50):
        q.charge("A", "192.0.2.1", 100)
        q.refund("A", "192.0.2.1", 100)
    q.charge("A", "192.0.2.1", 1)


def test_any_order_of_events_against_a_plain_count() -> None:
    """A thousand charges at random times: refused exactly when the last sixty whole minutes have reached the limit."""
    rng, clock = random.Random(5), Clock()
    q, kept = quota(clock, bytes_per_hour_per_ae_title=500), []
    refused = 0
    for _ in range(1000):
        clock.now += rng.expovariate(1 / 90)
        size = rng.randint(1, 40)
        minute = int(clock.now // 60)
        used = sum(count for at, count in kept if at > minute - 60)
        if used >= 500:
            refused += 1
            with pytest.raises(QuotaExceeded):
                q.charge("A", "192.0.2.1", size)
        else:
            q.charge("A", "192.0.2.1", size)
            kept.append((minute, size))
    assert 100 < refused < 900


def test_many_addresses_cost_no_memory_once_their_hour_is_over() -> None:
    clock = Clock()
    q = quota(clock)
    for number in range(5000):
        clock.now += 10
        q.charge("A", f"2001:db8::{number:x}", 1)
    assert len(q._hours) < 1100


def test_refusals_are_told_singly_and_then_by_number() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    with capture_logs() as lines:
        for _ in range(1000):
            refusals.tell("connection_refused", address="192.0.2.1", reason="x")
        refusals.tell("connection_refused", address="192.0.2.2", reason="x")
        refusals.settle()
        assert len(lines) == TOLD_ONE_BY_ONE + 1
        clock.now += 61
        refusals.settle()
        assert lines[-1] == {
            "event": "refusals_repeated",
            "log_level": "warning",
            "kind": "connection_refused",
            "address": "192.0.2.1",
            "reason": "x",
            "count": 1000 - TOLD_ONE_BY_ONE,
            "duration_s": 60.0,
        }
        refusals.tell("connection_refused", address="192.0.2.1", reason="x")
        assert lines[-1]["event"] == "connection_refused"


def test_a_slow_audit_trail_holds_nobody_up_and_misses_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes 10 ms for each message; a thousand refusals are told at once, singly or in sums."""
    written: list[str] = []

    def slow(message: AuditMessage) -> None:
        time.sleep(0.01)
        written.append(message.objects[0].details["Alert Description"])

    monkeypatch.setattr(trail, "is_open", lambda: True)
    monkeypatch.setattr(trail, "record", slow)
    refusals = Refusals()
    begun = time.monotonic()
    for number in range(1000):
        refusals.tell("connection_refused", address=f"192.0.2.{number % 100}", reason="x")
    assert time.monotonic() - begun < 5
    refusals.close()
    singly = [text for text in written if "more" not in text]
    sums = [int(text.split("; ")[1].split()[0]) for text in written if "more" in text]
    assert 256 <= len(singly) < 1000
    assert len(singly) + sum(sums) == 1000


def test_refusals_from_everywhere_are_bounded() -> None:
    refusals = Refusals(Clock())
    with capture_logs() as lines:
        for number in range(20_000):
            refusals.tell("connection_refused", address=f"2001:db8::{number:x}", reason="x")
    assert len(lines) == 1024 + TOLD_ONE_BY_ONE
    assert len(refusals._kinds) <= 1025


def test_lines_of_one_minute_are_bounded_and_every_refusal_is_in_a_line_or_a_sum() -> None:
    """500 addresses, thirty times each, in three minutes."""
    clock = Clock()
    refusals = Refusals(clock)
    with capture_logs() as lines:
        for minute in range(3):
            begun = len(lines)
            for number in range(15_000):
                refusals.tell("connection_refused", address=f"2001:db8::{number % 500:x}", reason="x")
            assert len(lines) - begun == LINES_A_MINUTE, minute
            clock.now += 60
            refusals.settle()
    sums = [line["count"] for line in lines if line["event"] == "refusals_repeated"]
    assert 3 * LINES_A_MINUTE + sum(sums) == 45_000


def test_patience_with_connections_for_nothing_comes_back() -> None:
    clock = Clock()
    patience = Patience(clock)
    for _ in range(BURST):
        assert not patience.is_over("192.0.2.1")
        patience.waste("192.0.2.1")
    assert patience.is_over("192.0.2.1")
    assert not patience.is_over("192.0.2.2")
    clock.now += 1 / PER_SECOND + 1e-6
    assert not patience.is_over("192.0.2.1")
    for _ in range(1000):  # a check of the port each second is never too much
        clock.now += 1
        patience.waste("192.0.2.3")
        assert not patience.is_over("192.0.2.3")
    for number in range(5000):
        clock.now += 1
        patience.waste(f"2001:db8::{number:x}")
    assert len(patience._wasted) <= 1024


def admission(secured: bool = True, **source: object) -> Admission:
    destination = DestinationSettings(name="pacs", ae_title="PACS", host="127.0.0.9", port=104)
    safe = destination.model_copy(update={"ae_title": "SAFE", "tls": True, "certificates": ("cn:safe",)})
    known = SourceSettings.model_validate({**CT.model_dump(), **source})
    return Admission("OSTEO", (known,), (destination, safe), secured=secured)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def test_admission_table(authority: Authority) -> None:
    named = read_certificates(authority.issue("ct", names=("CT.example.org", "192.0.2.7")).certificate)[0]
    other = read_certificates(authority.issue("other").certificate)[0]
    safe = read_certificates(authority.issue("safe").certificate)[0]
    expired = read_certificates(authority.issue("old", days=(-9, -1), names=("ct.example.org",)).certificate)[0]
    listed = {"certificates": ["dns:ct.example.org"]}
    cases = [
        # settings of the source, called, calling, address, certificate, stored
        ({}, "OSTEO", "CT", "192.0.2.7", None, True),
        ({}, "OTHER", "CT", "192.0.2.7", None, None),
        ({}, "OSTEO", "MR", "192.0.2.7", None, None),
        ({}, "OSTEO", "CT", "192.0.3.7", None, None),
        ({}, "OSTEO", "CT", "192.0.2.7", named, None),
        (listed, "OSTEO", "CT", "192.0.2.7", named, True),
        (listed, "OSTEO", "CT", "192.0.2.7", other, None),
        (listed, "OSTEO", "CT", "192.0.2.7", expired, None),
        (listed, "OSTEO", "CT", "192.0.3.7", named, None),
        (listed, "OSTEO", "CT", "192.0.2.7", None, True),
        ({**listed, "tls_required": True}, "OSTEO", "CT", "192.0.2.7", None, None),
        ({"certificates": ["ip:192.0.2.7"]}, "OSTEO", "CT", "::ffff:192.0.2.7", named, True),
        ({"certificates": [f"sha256:{named.sha256}"]}, "OSTEO", "CT", "192.0.2.7", named, True),
        ({"certificates": ["subject:CN=ct,O=Hospital"]}, "OSTEO", "CT", "192.0.2.7", named, True),
        ({"certificates": ["cn:CT", "dns:example.org"]}, "OSTEO", "CT", "192.0.2.7", named, None),
        ({}, "OSTEO", "PACS", "127.0.0.9", None, False),
        ({}, "OSTEO", "PACS", "127.0.0.8", None, None),
        ({}, "OSTEO", "SAFE", "127.0.0.9", None, None),
        ({}, "OSTEO", "SAFE", "127.0.0.9", safe, False),
        ({}, "OSTEO", "SAFE", "127.0.0.9", other, None),
    ]
    for source, called, calling, address, certificate, stored in cases:
        decision = admission(**source).judge(Caller(called, calling, address, certificate))
        assert (None if decision.reason else decision.may_store) is stored, (source, calling, address)
        if decision.reason:
            assert decision.rejection == (CALLED_UNKNOWN if called == "OTHER" else CALLING_UNKNOWN)
    assert not admission(secured=False).judge(Caller("OSTEO", "SAFE", "127.0.0.9", None)).reason


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("sha256:" + ":".join(["AB"] * 32), "sha256:" + "ab" * 32),
        ("dns:CT1.Example.ORG", "dns:ct1.example.org"),
        ("ip:2001:DB8:0::1", "ip:2001:db8::1"),
        ("cn:CT 1", "cn:CT 1"),
        ("sha256:abcd", None),
        ("sha1:" + "ab" * 20, None),
        ("ct1.example.org", None),
        ("ip:hospital", None),
        ("dns:", None),
    ],
)
def test_how_settings_name_certificates(written: str, canonical: str | None) -> None:
    document = {"ae_title": "CT", "addresses": ["192.0.2.1"], "certificates": [written]}
    if canonical is None:
        with pytest.raises(ValueError, match="certificates"):
            SourceSettings.model_validate(document)
    else:
        assert SourceSettings.model_validate(document).certificates == (canonical,)


@pytest.mark.parametrize(
    "document",
    [
        {"tls": {"port": 2762}},
        {"tls": {"only": True}},
        {"destinations": [{"name": "a", "ae_title": "A", "host": "h", "port": 104, "tls": True}]},
    ],
)
def test_tls_settings_that_lack_something(document: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="needs"):
        Settings.model_validate(document)


def test_what_ends_soon_is_told_and_what_others_can_read(authority: Authority, tmp_path: Path) -> None:
    own = authority.issue("soon", days=(-1, 10.5))
    crl = authority.revoke(file=tmp_path / "ca.crl", days=-0.5)
    own.key.chmod(0o644)
    files = TlsFiles(own.certificate, own.key, authority.file, crl)
    with capture_logs() as lines:
        ListenerTls(files, 30)
    told = {(line["event"], line.get("kind"), line.get("count")) for line in lines}
    assert told == {
        ("certificate_expires", "certificate", 10),
        ("certificate_expired", "crl", -1),
        ("key_readable", None, None),
    }
    with capture_logs() as lines:
        own.key.chmod(0o600)
        authority.revoke(file=crl)
        ListenerTls(files, 5)
    assert not lines


def test_files_that_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    own, other = authority.issue("own"), authority.issue("another")
    nothing, empty = tmp_path / "nothing", tmp_path / "empty"
    empty.write_text("")
    for files in (
        TlsFiles(own.certificate, other.key, authority.file),
        TlsFiles(nothing, own.key, authority.file),
        TlsFiles(own.certificate, nothing, authority.file),
        TlsFiles(own.certificate, own.key, nothing),
        TlsFiles(own.certificate, own.key, empty),
        TlsFiles(own.certificate, own.key, authority.file, empty),
    ):
        with pytest.raises(ConfigurationError):
            server_context(files)
    for read in (read_certificates, earliest_next_update):
        for file in (nothing, empty):
            with pytest.raises(ConfigurationError):
                read(file)
    now = datetime.now(UTC)
    assert not read_certificates(own.certificate)[0].validity_error(now)
    assert "expired" in read_certificates(own.certificate)[0].validity_error(now + timedelta(days=400))
    assert "only from" in read_certificates(own.certificate)[0].validity_error(now - timedelta(days=400))


def test_an_encrypted_key_is_an_error_and_never_a_question(authority: Authority, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    own = authority.issue("locked")
    key = load_pem_private_key(own.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    with pytest.raises(ConfigurationError, match="without a password"):
        server_context(TlsFiles(own.certificate, locked, authority.file))
