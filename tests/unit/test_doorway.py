"""Where connections come in: who is taken, who waits, who has to give way, and what all that costs."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import structlog
from structlog.testing import capture_logs

from osteo_daemon.audit import trail
from osteo_daemon.dicom import prompt_calls
from osteo_daemon.dicom.doorway import Doorway, Turns
from osteo_daemon.dicom.refusals import TOLD_ONE_BY_ONE, Refusals
from osteo_daemon.dicom.visitors import Visitor, Visitors
from tests.fakes import LOOPBACK, until

SECONDS = 0.4


@contextlib.contextmanager
def listening(host: str = LOOPBACK) -> Iterator[socket.socket]:
    with socket.create_server(
        (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
    ) as one:
        one.setblocking(False)
        yield one


def visitor(host: str, since: float = 0.0) -> Visitor:
    return Visitor((host, 1), since, socket.socket())


@dataclass
class Recorder:
    """A host that writes down what it is told."""

    unwanted: str = ""
    spoken: list[Visitor] = field(default_factory=list)
    gone: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def objection(self, address: str) -> str:
        return "unwanted" if address == self.unwanted else ""

    def spoke(self, visitor: Visitor) -> None:
        self.spoken.append(visitor)

    def went(self, visitor: Visitor, reason: str) -> None:
        self.gone.append((visitor.host, reason))

    def refuse_later(self, address: str, reason: str) -> None:
        self.refused.append((address, reason))


@dataclass
class Door:
    doorway: Doorway
    host: Recorder
    visitors: Visitors
    port: int

    def connect(self, source: str = LOOPBACK) -> socket.socket:
        return socket.create_connection((LOOPBACK, self.port), timeout=5, source_address=(source, 0))

    def turn_until(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        def turned() -> object:
            self.doorway.turn(0.01)
            return condition()

        until(turned, seconds)


@contextlib.contextmanager
def opened(seconds: float) -> Iterator[Door]:
    with listening() as one:
        host, visitors = Recorder(), Visitors(per_address=3, altogether=5)
        doorway = Doorway(one, visitors, host, seconds)
        yield Door(doorway, host, visitors, one.getsockname()[1])
        doorway.close()


@pytest.fixture
def door() -> Iterator[Door]:
    with opened(60) as one:
        yield one


@pytest.fixture
def hasty() -> Iterator[Door]:
    with opened(SECONDS) as one:
        yield one


def hung_up(peer: socket.socket) -> bool:
    peer.settimeout(5)
    try:
        return peer.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("host", [LOOPBACK, "::1"])
def test_a_connection_is_taken_as_python_takes_it(host: str) -> None:
    with listening(host) as one:
        assert prompt_calls.accept(one.fileno()) is None
        with socket.create_connection(one.getsockname()[:2]) as peer:
            taken = until(lambda: prompt_calls.accept(one.fileno()))
            descriptor, address = taken
            with socket.socket(fileno=descriptor) as connection:
                assert address == peer.getsockname() == connection.getpeername()
                assert not connection.get_inheritable()
                with pytest.raises(BlockingIOError):
                    connection.recv(1)
                assert prompt_calls.has_spoken(descriptor) is None
                peer.sendall(b"xy")
                assert until(lambda: prompt_calls.has_spoken(descriptor))
                assert connection.recv(2) == b"xy"  # nothing was taken
                peer.sendall(b"x" * 10_000)
                assert until(lambda: prompt_calls.has_spoken(descriptor))
                assert prompt_calls.discard(descriptor, 1 << 16)
                peer.close()
                until(lambda: prompt_calls.has_spoken(descriptor) is False)
                assert not prompt_calls.discard(descriptor, 1 << 16)


def test_a_broken_connection_and_a_bad_socket_are_errors() -> None:
    with listening() as one, socket.create_connection(one.getsockname()) as peer:
        descriptor, _address = until(lambda: prompt_calls.accept(one.fileno()))
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()

        def broken() -> bool:
            try:
                prompt_calls.has_spoken(descriptor)
            except ConnectionResetError:
                return True
            return False

        until(broken)
        prompt_calls.close_descriptor(descriptor)
        with pytest.raises(OSError, match="Bad file descriptor"):
            prompt_calls.accept(-1)


def test_no_other_thread_runs_while_connections_are_taken_and_closed() -> None:
    """The interpreter's lock is kept: whoever lets others run waits for its turn, 5 ms and more, at each call."""
    ended, turns = threading.Event(), [0]

    def run_whenever_it_may() -> None:
        while not ended.is_set():
            turns[0] += 1
            time.sleep(0)

    others = [threading.Thread(target=run_whenever_it_may) for _ in range(3)]
    before = sys.getswitchinterval()
    with listening() as one, contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(one.getsockname())).sendall(b"x")
        for thread in others:
            thread.start()
        try:
            until(lambda: turns[0] > 10)
            sys.setswitchinterval(1000)  # nobody is made to give the lock up
            seen, taken = turns[0], 0
            while (found := prompt_calls.accept(one.fileno())) is not None:
                prompt_calls.has_spoken(found[0])
                prompt_calls.discard(found[0], 4096)
                prompt_calls.close_descriptor(found[0])
                taken += 1
            ran = turns[0] - seen
        finally:
            sys.setswitchinterval(before)
            ended.set()
            for thread in others:
                thread.join()
    assert taken == 100
    assert ran == 0


def test_who_has_most_gives_way_and_the_oldest_first() -> None:
    visitors = Visitors(per_address=3, altogether=5)
    flood = [visitor("192.0.2.1", since) for since in range(4)]
    assert visitors.admit(flood[:3]) == []
    assert visitors.admit(flood[3:]) == flood[:1]  # of one address
    others = [visitor(f"192.0.2.{number}", 10) for number in range(2, 6)]
    assert visitors.admit(others[:2]) == []
    assert visitors.admit(others[2:]) == [flood[1], flood[2]]  # of all
    assert set(visitors.all()) == {flood[3], *others}
    visitors.leave(others[0])
    assert not visitors.is_present(others[0])
    assert visitors.is_present(flood[3])


def test_newcomers_who_are_too_many_at_once_are_given_back_too() -> None:
    visitors = Visitors(per_address=3, altogether=5)
    quiet = visitor("192.0.2.9")
    visitors.admit([quiet])
    crowd = [visitor("192.0.2.1", 1) for _ in range(100)]
    assert visitors.admit(crowd) == crowd[:97]
    assert set(visitors.all()) == {quiet, *crowd[97:]}


def test_any_order_of_arrivals_keeps_both_caps() -> None:
    """Against a plain count: who has to go is of the own address at its cap, or of one that has most at that of all."""
    rng = random.Random(7)
    visitors = Visitors(per_address=4, altogether=12)
    present: list[Visitor] = []
    for moment in range(600):
        one = visitor(f"192.0.2.{rng.randint(1, 6)}", moment)
        counts = Counter(entry.host for entry in present)
        evicted = visitors.admit([one])
        if counts[one.host] >= 4:
            assert [entry.host for entry in evicted] == [one.host]
        elif len(present) >= 12:
            assert [counts[entry.host] for entry in evicted] == [max(counts.values())]
        else:
            assert not evicted
        for entry in evicted:
            assert entry is next(older for older in present if older.host == entry.host)
            present.remove(entry)
        present.append(one)
        assert set(visitors.all()) == set(present)
        if rng.random() < 0.2:
            visitors.leave(leaving := rng.choice(present))
            present.remove(leaving)


def test_turns_go_from_address_to_address() -> None:
    turns = Turns()
    many = [visitor("192.0.2.1") for _ in range(50)]
    one, two = visitor("192.0.2.2"), visitor("192.0.2.3")
    for entry in (*many[:25], one, *many[25:], two):
        turns.put(entry)
    turns.close()
    order = []
    while (taken := turns.take()) is not None:
        order.append(taken)
    assert order[:3] == [many[0], one, two]
    assert [entry for entry in order if entry.host == "192.0.2.1"] == many


def test_who_speaks_is_handed_on_and_nothing_of_it_is_taken(door: Door) -> None:
    with door.connect() as peer, door.connect() as silent:
        peer.sendall(b"first words")
        door.turn_until(lambda: door.host.spoken)
        (spoken,) = door.host.spoken
        assert spoken.address == peer.getsockname()
        assert spoken.socket.recv(20) == b"first words"
        assert len(door.visitors.all()) == 2
        assert not door.host.gone
        spoken.socket.close()
        silent.close()


def test_who_says_nothing_is_gone_when_its_time_is_over(hasty: Door) -> None:
    with hasty.connect() as peer:
        hasty.turn_until(hasty.visitors.all)
        begun = hasty.visitors.all()[0].since
        hasty.turn_until(lambda: hasty.host.gone)
        assert time.monotonic() - begun >= SECONDS
        assert hung_up(peer)
    assert hasty.host.gone == [(LOOPBACK, "no association request in time")]
    assert not hasty.visitors.all()


def test_who_goes_without_a_word_or_with_a_reset_leaves_nothing(door: Door) -> None:
    door.connect().close()
    door.turn_until(lambda: door.host.gone)
    with door.connect() as peer:
        door.turn_until(lambda: door.visitors.all())
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    door.turn_until(lambda: len(door.host.gone) > 1)
    assert door.host.gone == [(LOOPBACK, ""), (LOOPBACK, "connection lost")]
    assert not door.visitors.all()


def test_who_is_not_wanted_is_hung_up_on_and_told_of(door: Door) -> None:
    door.host.unwanted = "127.0.0.9"
    with door.connect("127.0.0.9") as peer, door.connect() as other:
        door.turn_until(lambda: door.host.refused and door.visitors.all())
        assert hung_up(peer)
        other.close()
    assert door.host.refused == [("127.0.0.9", "unwanted")]


def test_a_flood_pushes_out_itself(door: Door) -> None:
    with door.connect("127.0.0.9") as quiet, contextlib.ExitStack() as stack:
        door.turn_until(lambda: door.visitors.all())
        flood = [stack.enter_context(door.connect()) for _ in range(20)]
        door.turn_until(lambda: len(door.host.refused) >= 17)
        assert all(hung_up(peer) for peer in flood[:17])
        assert door.host.refused == [(LOOPBACK, "too many silent connections")] * 17
        quiet.sendall(b"x")
        door.turn_until(lambda: door.host.spoken)
        assert door.host.spoken[0].host == "127.0.0.9"
        door.host.spoken[0].socket.close()


def turned_away(door: Door, peer: socket.socket) -> None:
    peer.sendall(b"x")
    door.turn_until(lambda: door.host.spoken)
    (spoken,) = door.host.spoken
    assert spoken.socket.recv(10) == b"x"
    spoken.socket.sendall(b"no")
    door.doorway.see_off(spoken)


@pytest.mark.parametrize("words", [b"", b"more", b"x" * 100_000])
def test_who_was_turned_away_is_seen_off_when_it_closes(door: Door, words: bytes) -> None:
    with door.connect() as peer:
        turned_away(door, peer)
        assert door.visitors.all()
        peer.sendall(words)
        peer.shutdown(socket.SHUT_WR)
        door.turn_until(lambda: not door.visitors.all())
        with contextlib.suppress(ConnectionError):
            assert peer.recv(10) == b"no"
            assert hung_up(peer)
    assert door.host.gone == []  # it was told of when it was turned away


def test_who_was_turned_away_and_stays_is_hung_up_on(hasty: Door) -> None:
    with hasty.connect() as peer:
        turned_away(hasty, peer)
        begun = hasty.visitors.all()[0].parting_since
        hasty.turn_until(lambda: not hasty.visitors.all())
        assert time.monotonic() - begun >= SECONDS
        assert peer.recv(10) == b"no"
        assert hung_up(peer)


def test_who_was_turned_away_and_goes_on_and_on_is_hung_up_on(door: Door) -> None:
    with door.connect() as peer:
        turned_away(door, peer)
        peer.settimeout(0.05)
        deadline = time.monotonic() + 30
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    peer.sendall(b"x" * 65536)
                door.doorway.turn(0.01)
        assert time.monotonic() < deadline
    assert not door.visitors.all()


def test_without_descriptors_the_doorway_waits_and_goes_on(door: Door) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with door.connect() as peer, socket.socket() as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1, hard))
        try:
            with contextlib.ExitStack() as stack:
                # holes below the last
                with contextlib.suppress(OSError):
                    while True:
                        stack.enter_context(socket.socket())
                begun = time.monotonic()
                for _ in range(10):
                    door.doorway.turn(0.005)
                tries = 1 + (time.monotonic() - begun) / 0.1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert set(door.host.refused) == {("", "out of file descriptors or memory")}
        assert len(door.host.refused) <= tries
        peer.sendall(b"x")
        door.turn_until(lambda: door.host.spoken)
        door.host.spoken[0].socket.close()


def test_a_log_that_nobody_reads_holds_up_nobody_who_takes_connections() -> None:
    refusals = Refusals()
    reading, reached, given_up = threading.Event(), threading.Event(), threading.Event()

    def stuck(*_arguments: object) -> str:
        reached.set()
        if not reading.wait(60):
            given_up.set()
        raise structlog.DropEvent

    before = structlog.get_config()["processors"]
    structlog.configure(processors=[stuck])
    try:
        refusals.tell_later("connection_refused", address="192.0.2.1", reason="x")
        assert reached.wait(30)
        for number in range(20_000):
            refusals.tell_later("connection_refused", address=f"192.0.2.{number % 50}", reason="x")
        assert not given_up.is_set()
    finally:
        reading.set()
        refusals.close()
        structlog.configure(processors=before)


def test_an_end_in_the_middle_of_telling_ends_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer tells what was left for later, and the trail is to hear it, while the listener waits for its end."""
    reading, reached = threading.Event(), threading.Event()
    written: list[object] = []
    monkeypatch.setattr(trail, "is_open", lambda: True)
    monkeypatch.setattr(trail, "record", written.append)

    def slow(*_arguments: object) -> str:
        reached.set()
        reading.wait(60)
        raise structlog.DropEvent

    before = structlog.get_config()["processors"]
    structlog.configure(processors=[slow])
    refusals = Refusals()
    ending = threading.Thread(target=refusals.close, daemon=True)
    try:
        for number in range(3):
            refusals.tell_later("connection_refused", address=f"192.0.2.{number}", reason="x")
        assert reached.wait(30)
        ending.start()
        until(lambda: refusals._alerts.qsize())  # the word that it is to end
        reading.set()
        ending.join(30)
        assert not ending.is_alive()
    finally:
        reading.set()
        structlog.configure(processors=before)
    assert len(written) == 3


def test_what_is_told_later_stands_in_lines_and_sums() -> None:
    refusals = Refusals()
    with capture_logs() as lines:
        for number in range(10_000):
            refusals.tell_later("connection_refused", address=f"192.0.2.{number % 5}", reason="x")
        for number in range(5000):
            refusals.tell_later("connection_refused", address=f"2001:db8::{number:x}", reason="y")
        refusals.close()
    singly = [line for line in lines if line["event"] == "connection_refused"]
    sums = [line for line in lines if line["event"] == "refusals_repeated"]
    assert len(singly) + sum(line["count"] for line in sums) == 15_000
    assert sum(line["address"] == "192.0.2.3" for line in singly) == TOLD_ONE_BY_ONE
    assert len(lines) < 1024 + 7 * TOLD_ONE_BY_ONE + 1024
