"""The delivery role: a lane per destination sends committed report objects until each is there, proven, or refused."""

from __future__ import annotations

import signal
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from os import getpid
from types import FrameType

from osteo_daemon.delivery.attempt import Attempt
from osteo_daemon.delivery.back_off import back_off_seconds
from osteo_daemon.delivery.proof import Proof
from osteo_daemon.delivery.transport import TRANSPORTS
from osteo_daemon.dicom.peer import hang_up_all
from osteo_daemon.domain.breaker import Breaker, BreakerState
from osteo_daemon.errors import Damaged, LeaseLost, OsteoError, PeerBusy, PeerUnavailable, Refused, Transient
from osteo_daemon.jobs.records import Delivery, DeliveryState
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.lease import Heartbeat
from osteo_daemon.log import configure_logging, get_logger, where
from osteo_daemon.settings import DestinationSettings, Settings
from osteo_daemon.transfers import tell_sent
from osteo_daemon.vitals import Vitals

REFUSED = "refused"
GRACE_SECONDS = 10.0
"""How long the object in hand may take after SIGTERM."""

_WAITING = (DeliveryState.PENDING, DeliveryState.SENDING, DeliveryState.AWAITING)
_LONGEST_PROBE_JITTER = 1.25
_SILENCE_SECONDS = 900.0
"""A lane that has not come round for so long hangs: every answer of a peer is waited for with a limit."""


def run(settings: Settings) -> int:
    """Deliver until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigurationError: the job store cannot be used.
    """
    configure_logging(settings.log, "deliverer")
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    vitals = Vitals(settings.state_dir, "deliverer")
    store = JobStore(settings.database_url)
    _warn_of_orphans(settings, store)
    lanes = [Lane(settings, destination, store, stopping) for destination in settings.destinations]
    for lane in lanes:
        lane.start()
    get_logger().info("deliverer_ready", count=len(lanes))
    vitals.ready()
    # short waits: a signal handler of Python runs only between them
    while not stopping.wait(0.5):
        if all(lane.comes_round for lane in lanes):
            vitals.alive()
    vitals.stopping()
    # a peer that hangs holds no object worth a SIGKILL: what is under way may end, then the line is cut
    deadline = time.monotonic() + GRACE_SECONDS
    for lane in lanes:
        lane.join(max(deadline - time.monotonic(), 0.0))
    hang_up_all()
    for lane in lanes:
        lane.join()
    store.close()
    vitals.close()
    get_logger().info("deliverer_stopped")
    return 0


def _warn_of_orphans(settings: Settings, store: JobStore) -> None:
    # nobody sends these: their destination was taken out of the settings or got another name
    known = {destination.name for destination in settings.destinations}
    for (name, state), count in store.delivery_counts().items():
        if name not in known and state in _WAITING:
            get_logger().warning("deliveries_without_destination", destination=name, state=state.value, count=count)


class Lane(threading.Thread):
    """The deliveries of one destination, one after another: a slow or dead peer holds up no other."""

    def __init__(
        self, settings: Settings, destination: DestinationSettings, store: JobStore, stopping: threading.Event
    ) -> None:
        super().__init__(name=f"lane-{destination.name}", daemon=True)
        self._settings = settings
        self._deliverer = settings.deliverer
        self._destination = destination
        self._store = store
        self._spool = Spool(settings.spool_dir)
        self._stopping = stopping
        self._transport = TRANSPORTS[destination.kind](settings, destination)
        self._breaker = Breaker(BreakerState.CLOSED, datetime.now(UTC))
        self._breaker_read = False
        self._worker = f"deliverer-{socket.gethostname()}-{getpid()}-{destination.name}"
        self._log = get_logger().bind(destination=destination.name)
        self._came_round_at = time.monotonic()

    @property
    def comes_round(self) -> bool:
        """It runs, and what it does takes no longer than anything may."""
        return self.is_alive() and time.monotonic() - self._came_round_at < _SILENCE_SECONDS

    def run(self) -> None:
        """Claim and send until the node stops."""
        while not self._stopping.is_set():
            self._came_round_at = time.monotonic()
            try:
                pause = self._step()
            except Transient as error:
                # the store itself; a delivery in hand comes back when its lease runs out
                self._log.warning("store_unavailable", error=type(error).__name__)
                pause = self._deliverer.poll_seconds
            except Exception as error:  # noqa: BLE001 - the lane's loop edge: no delivery may end the lane
                self._log.error("lane_crashed", error=type(error).__name__, detail=where(error.__traceback__))
                pause = self._deliverer.poll_seconds
            self._stopping.wait(pause)

    def _step(self) -> float:
        """One delivery, or one probe; returns how long to wait before the next, in seconds."""
        if not self._breaker_read:
            # what was known before the restart: a dead peer is not tried with every delivery anew
            self._breaker = self._store.breakers().get(self._destination.name, self._breaker)
            self._breaker_read = True
        if self._breaker.state is BreakerState.OPEN:
            # nothing is claimed: an attempt at a peer that is known to be away would only be spent
            longest = self._deliverer.probe_maximum_seconds * _LONGEST_PROBE_JITTER
            remaining = self._breaker.wait_seconds(datetime.now(UTC), longest)
            if remaining > 0:
                return min(remaining, self._deliverer.poll_seconds)
            return 0.0 if self._probe() else self._deliverer.poll_seconds
        delivery = self._store.claim_delivery(
            self._worker, self._deliverer.lease_seconds, destination=self._destination.name
        )
        if delivery is None:
            return self._deliverer.poll_seconds
        self._one(delivery)
        return 0.0

    def _probe(self) -> bool:
        try:
            self._transport.probe()
        except PeerUnavailable as error:
            self._unreachable(error)
            patience = timedelta(seconds=self._deliverer.give_up_after_seconds)
            detail = f"gave up after {self._deliverer.give_up_after_seconds:.0f} seconds: {error.detail}"
            expired = self._store.expire_deliveries(
                self._destination.name,
                datetime.now(UTC) - patience,
                detail,
                accept_unproven=self._destination.accept_unproven,
            )
            if expired:
                self._log.warning("deliveries_expired", count=expired)
            return False
        self._change(self._breaker.probed(datetime.now(UTC)))
        return True

    def _one(self, delivery: Delivery) -> None:
        log = self._log.bind(
            delivery_id=delivery.delivery_id,
            job_id=delivery.job_id,
            study_instance_uid=delivery.study_instance_uid,
            revision=delivery.revision,
            attempt=delivery.attempts,
        )
        try:
            lease = self._deliverer.lease_seconds
            with Heartbeat(lambda: self._store.heartbeat_delivery(delivery, lease), lease):
                outcome = self._deliver(delivery)
        except LeaseLost:
            log.warning("delivery_ended", outcome="lease_lost")
            return
        except PeerUnavailable as error:
            outcome = self._failed(delivery, error)
        except Refused as error:
            self._reached()
            self._store.delivery_refused(delivery, error.detail or str(error))
            outcome = REFUSED
        except Damaged as error:
            self._store.delivery_refused(delivery, error.detail or str(error))
            outcome = REFUSED
        except Transient:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the delivery must not be lost with it
            log.error("delivery_crashed", error=type(error).__name__, detail=where(error.__traceback__))
            outcome = self._later(delivery, Transient("an error inside the program, see its log"))
        log.info("delivery_ended", outcome=outcome)

    def _deliver(self, delivery: Delivery) -> str:
        attempt = Attempt(self._store, self._spool, delivery, self._stopping)
        try:
            answered = attempt.send(self._transport)
        finally:
            tell_sent(self._destination, delivery.study_instance_uid, attempt.stored, attempt.refused)
        if answered is None:
            self._store.delivery_release(delivery)
            return "released"
        outcome = Proof(self._settings, self._destination, self._store, answered).obtain()
        self._reached()
        return outcome

    def _failed(self, delivery: Delivery, error: PeerUnavailable) -> str:
        if self._stopping.is_set():
            # perhaps we hung up ourselves
            self._store.delivery_release(delivery)
            return "released"
        if isinstance(error, PeerBusy):
            self._reached()
        else:
            self._unreachable(error)
        return self._later(delivery, error)

    def _later(self, delivery: Delivery, error: OsteoError) -> str:
        now = datetime.now(UTC)
        detail = error.detail or str(error)
        if now - delivery.created_at >= timedelta(seconds=self._deliverer.give_up_after_seconds):
            text = f"gave up after {delivery.attempts} attempts: {detail}"
            present = self._store.delivery(delivery.delivery_id)
            if present.unsent:
                self._store.delivery_refused(delivery, text)
                return REFUSED
            return Proof(self._settings, self._destination, self._store, present).give_up(text)
        delay = back_off_seconds(
            self._deliverer.retry_base_seconds, delivery.attempts, self._deliverer.retry_maximum_seconds
        )
        self._store.delivery_retry(delivery, now + timedelta(seconds=delay), detail)
        return "retry"

    def _reached(self) -> None:
        self._change(self._breaker.answered(datetime.now(UTC)))

    def _unreachable(self, error: PeerUnavailable) -> None:
        limit = self._deliverer.breaker_failures
        pause = back_off_seconds(
            self._deliverer.retry_base_seconds,
            self._breaker.failures + 2 - limit,
            self._deliverer.probe_maximum_seconds,
        )
        text = f"{type(error).__name__}: {error.detail}"
        self._change(self._breaker.failed(text, datetime.now(UTC), limit=limit, pause_seconds=pause))

    def _change(self, breaker: Breaker) -> None:
        before, self._breaker = self._breaker, breaker
        if before == breaker:
            return
        self._store.save_breaker(self._destination.name, breaker)
        if before.state is not breaker.state:
            self._log.info(
                "breaker_changed",
                state=breaker.state.value,
                attempts=breaker.failures,
                not_before=None if breaker.next_probe_at is None else breaker.next_probe_at.isoformat(),
            )
