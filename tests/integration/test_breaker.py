"""Destinations that are down, hang, refuse or break off: what it costs them, the others, and the deliveries."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from osteo_daemon.dicom.report_forms import BuiltReport
from osteo_daemon.domain.breaker import Breaker, BreakerState
from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.jobs.store import JobStore
from tests.deliveries import PATIENCE_S, built_report, commit, ended, lanes, settings_for
from tests.fakes import LOOPBACK, CountingScp, a_free_port, until


@pytest.fixture(scope="module")
def built() -> BuiltReport:
    """All objects that a destination with the default settings may need."""
    return built_report()


@contextmanager
def silent_listener() -> Iterator[tuple[int, threading.Event]]:
    """A port that accepts every connection and says no word; with the event set it hangs up on all."""
    hang_up, stop = threading.Event(), threading.Event()
    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.settimeout(0.05)

        def accept() -> None:
            held: list[socket.socket] = []
            while not stop.is_set():
                with suppress(TimeoutError):
                    held.append(listener.accept()[0])
                while held and hang_up.is_set():
                    held.pop().close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1], hang_up
        finally:
            hang_up.set()
            stop.set()
            thread.join()


@contextmanager
def cutting_proxy(target: int, cuts_after_bytes: list[int]) -> Iterator[int]:
    """A relay to a peer; each connection dies after so many bytes to the peer, while the list lasts."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.settimeout(0.1)
        stop = threading.Event()
        threads: list[threading.Thread] = []

        def relay(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
            passed = 0
            try:
                while data := source.recv(65536):
                    if limit is not None and passed + len(data) >= limit:
                        sink.sendall(data[: limit - passed])
                        break
                    sink.sendall(data)
                    passed += len(data)
            except OSError:
                pass
            for end in (source, sink):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

        def accept() -> None:
            while not stop.is_set():
                try:
                    near, _address = listener.accept()
                except TimeoutError:
                    continue
                far = socket.create_connection((LOOPBACK, target))
                limit = cuts_after_bytes.pop(0) if cuts_after_bytes else None
                for source, sink, most in ((near, far, limit), (far, near, None)):
                    threads.append(threading.Thread(target=relay, args=(source, sink, most)))
                    threads[-1].start()

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            acceptor.join()
            for thread in threads:
                thread.join(60)


def breaker(store: JobStore, destination: str = "pacs0") -> Breaker | None:
    """The destination's breaker as it is written down."""
    return store.breakers().get(destination)


def opened(store: JobStore) -> Breaker | None:
    """The breaker once it is open."""
    found = breaker(store)
    return found if found is not None and found.state is BreakerState.OPEN else None


def test_an_open_breaker_consumes_no_attempts_and_outlives_the_process(tmp_path: Path, built: BuiltReport) -> None:
    port = a_free_port()
    settings = settings_for(tmp_path, port, breaker_failures=2)
    store = commit(settings, built)
    with lanes(settings, store):
        found = until(lambda: opened(store), PATIENCE_S)
        assert found.failures >= 2
        assert found.error is not None
        assert found.error.startswith("PeerUnavailable: PACS at")
        # probes go on, attempts do not
        until(lambda: (breaker(store) or found).failures >= found.failures + 3, PATIENCE_S)
        assert store.deliveries()[0].attempts == 2
    # a new process starts with what is known
    with lanes(settings, store):
        known = breaker(store)
        assert known is not None
        until(lambda: (breaker(store) or known).failures > known.failures, PATIENCE_S)
        assert store.deliveries()[0].attempts == 2
        assert known.since == found.since
        with CountingScp(port=port) as pacs:
            delivery = until(lambda: ended(store), PATIENCE_S)
            assert (delivery.outcome, delivery.attempts) == ("stored", 3)
            assert len(pacs.received) == 3
            assert all(len(digests) == 1 for digests in pacs.digests.values())
            closed = until(
                lambda: (now := breaker(store)) is not None and now.state is BreakerState.CLOSED and now, PATIENCE_S
            )
            assert (closed.failures, closed.error) == (0, None)
    store.close()


def test_a_hanging_peer_holds_up_no_other_lane(tmp_path: Path, built: BuiltReport) -> None:
    with silent_listener() as (silent, hang_up), CountingScp() as pacs:
        settings = settings_for(tmp_path, silent, pacs.port, breaker_failures=1)
        store = commit(settings, built)
        with lanes(settings, store):
            assert until(lambda: ended(store, "pacs1"), PATIENCE_S).outcome == "stored"
            hanging = store.deliveries(destination="pacs0")[0]
            assert (hanging.state, hanging.attempts) == (DeliveryState.SENDING, 1)
            hang_up.set()
            assert until(lambda: opened(store), PATIENCE_S).failures >= 1
    store.close()


def test_a_peer_that_never_answers_is_given_up_after_its_time(tmp_path: Path, built: BuiltReport) -> None:
    with silent_listener() as (silent, _hang_up):
        settings = settings_for(tmp_path, silent, connect_timeout_seconds=0.3, breaker_failures=2)
        store = commit(settings, built)
        with lanes(settings, store):
            assert until(lambda: opened(store), PATIENCE_S).failures >= 2
        assert store.deliveries()[0].attempts == 2
    store.close()


def test_a_full_peer_is_probed_with_one_delivery_at_a_time(tmp_path: Path, built: BuiltReport) -> None:
    full = threading.Event()
    full.set()
    with CountingScp(answer=lambda _uid, _count: 0xA700 if full.is_set() else 0x0000) as pacs:
        settings = settings_for(tmp_path, pacs.port, breaker_failures=1)
        store = commit(settings, built)
        with lanes(settings, store):
            until(lambda: len(pacs.received) >= 3, PATIENCE_S)
            # its first object, once for each attempt; an attempt may be under way
            assert store.deliveries()[0].attempts - len(pacs.received) in (-1, 0, 1)
            full.clear()
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert delivery.outcome == "stored"
        assert all(len(digests) == 1 for digests in pacs.digests.values())
        counts = Counter(uid for _sop_class, uid, _digest in pacs.received)
        assert sorted(counts.values())[:2] == [1, 1]
    store.close()


def test_a_failure_of_one_object_leaves_the_breaker_closed(tmp_path: Path, built: BuiltReport) -> None:
    with CountingScp(answer=lambda _uid, count: 0x0110 if count < 4 else 0x0000) as pacs:
        settings = settings_for(tmp_path, pacs.port, breaker_failures=1)
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert (delivery.outcome, delivery.attempts) == ("stored", 10)
        assert breaker(store) is None
    store.close()


@pytest.mark.parametrize("bytes_before_the_cut", [100, 40_000])
def test_an_association_cut_amid_an_object_is_resumed_with_the_same_bytes(
    tmp_path: Path, built: BuiltReport, bytes_before_the_cut: int
) -> None:
    with CountingScp() as pacs, cutting_proxy(pacs.port, [bytes_before_the_cut] * 2) as port:
        settings = settings_for(tmp_path, port, dimse_timeout_seconds=60.0, breaker_failures=5)
        store = commit(settings, built)
        with lanes(settings, store):
            delivery = until(lambda: ended(store), PATIENCE_S)
        assert (delivery.outcome, delivery.attempts) == ("stored", 3)
        assert len(pacs.data_sets) == 3
        assert all(len(digests) == 1 for digests in pacs.digests.values())
    store.close()


def test_patience_ends_behind_an_open_breaker_and_a_person_may_resend(tmp_path: Path, built: BuiltReport) -> None:
    port = a_free_port()
    settings = settings_for(tmp_path, port, breaker_failures=1, give_up_after_seconds=1.0)
    store = commit(settings, built)
    with lanes(settings, store):
        delivery = until(lambda: ended(store), PATIENCE_S)
        assert delivery.state is DeliveryState.REFUSED
        assert delivery.detail is not None
        assert delivery.detail.startswith("gave up after")
        assert [job.state for job in store.recent()] == [JobState.REPORTED]
        with CountingScp(port=port):
            store.resend(delivery.delivery_id, "operator")
            assert until(lambda: ended(store), PATIENCE_S).outcome == "stored"
        assert [job.state for job in store.recent()] == [JobState.DELIVERED]
    store.close()


def test_a_moment_written_by_a_wrong_clock_holds_nothing_up(tmp_path: Path, built: BuiltReport) -> None:
    with CountingScp() as pacs:
        settings = settings_for(tmp_path, pacs.port)
        store = commit(settings, built)
        claimed = store.claim_delivery("before", 60)
        assert claimed is not None
        ahead = datetime.now(UTC) + timedelta(days=400)
        probe_at = ahead + timedelta(minutes=1)
        store.delivery_retry(claimed, probe_at, "the clock was a year ahead", now=ahead)
        store.save_breaker("pacs0", Breaker(BreakerState.OPEN, ahead, 3, probe_at, "away"))
        with lanes(settings, store):
            assert until(lambda: ended(store), PATIENCE_S).outcome == "stored"
    store.close()
