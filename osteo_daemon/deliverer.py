"""The delivery role: a lane per destination sends committed report objects until each is there or refused."""

from __future__ import annotations

import hashlib
import random
import signal
import socket
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from os import getpid
from pathlib import Path
from types import FrameType

from osteo_daemon.dicom.storage_scu import Verdict, send_objects
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import Damaged, LeaseLost, OsteoError, PeerUnavailable, Refused, Transient
from osteo_daemon.jobs.records import Delivery, ReportKind, ReportObject
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.lease import Heartbeat
from osteo_daemon.log import configure_logging, get_logger, where
from osteo_daemon.settings import DestinationSettings, Settings

LANE_PAUSE_MAXIMUM_SECONDS = 60.0
"""A lane whose peer does not answer asks it this often at least, whatever the deliveries' own back-off says."""

REFUSED = "refused"
NOT_NEEDED = "not-needed"
SEGMENT_REFERENCE = "+seg"
"""End of the variant names of structured reports that point to the segmentation."""

_JITTER = (0.8, 1.2)
_LONGEST_EXPONENT = 30
_BLOCK_BYTES = 1 << 20


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
    store = JobStore(settings.database_url)
    lanes = [Lane(settings, destination, store, stopping) for destination in settings.destinations]
    for lane in lanes:
        lane.start()
    get_logger().info("deliverer_ready", count=len(lanes))
    # short waits: a signal handler of Python runs only between them
    while not stopping.wait(0.5):
        pass
    for lane in lanes:
        lane.join()
    store.close()
    get_logger().info("deliverer_stopped")
    return 0


class Lane(threading.Thread):
    """The deliveries of one destination, one after another: a slow or dead peer holds up no other."""

    def __init__(
        self, settings: Settings, destination: DestinationSettings, store: JobStore, stopping: threading.Event
    ) -> None:
        super().__init__(name=f"lane-{destination.name}", daemon=True)
        self._settings = settings
        self._destination = destination
        self._store = store
        self._stopping = stopping
        self._failures = 0
        self._worker = f"deliverer-{socket.gethostname()}-{getpid()}-{destination.name}"
        self._log = get_logger().bind(destination=destination.name)

    def run(self) -> None:
        """Claim and send until the node stops."""
        deliverer = self._settings.deliverer
        while not self._stopping.is_set():
            try:
                delivery = self._store.claim_delivery(
                    self._worker, deliverer.lease_seconds, destination=self._destination.name
                )
                if delivery is not None:
                    self._one(delivery)
            except Transient as error:
                # the store itself; a delivery in hand comes back when its lease runs out
                self._log.warning("store_unavailable", error=type(error).__name__)
                delivery = None
            except Exception as error:  # noqa: BLE001 - the lane's loop edge: no delivery may end the lane
                self._log.error("lane_crashed", error=type(error).__name__, detail=where(error.__traceback__))
                delivery = None
            pause = self._pause_seconds() if self._failures else (0.0 if delivery else deliverer.poll_seconds)
            self._stopping.wait(pause)

    def _pause_seconds(self) -> float:
        base = self._settings.deliverer.retry_base_seconds
        return min(_back_off(base, self._failures), LANE_PAUSE_MAXIMUM_SECONDS)

    def _one(self, delivery: Delivery) -> None:
        log = self._log.bind(
            delivery_id=delivery.delivery_id,
            job_id=delivery.job_id,
            study_instance_uid=delivery.study_instance_uid,
            revision=delivery.revision,
            attempt=delivery.attempts,
        )
        attempt = Attempt(self._settings, self._destination, self._store, delivery, self._stopping)
        unavailable = False
        try:
            lease = self._settings.deliverer.lease_seconds
            with Heartbeat(lambda: self._store.heartbeat_delivery(delivery, lease), lease):
                outcome = attempt.send()
        except LeaseLost:
            log.warning("delivery_ended", outcome="lease_lost")
            return
        except PeerUnavailable as error:
            unavailable = True
            outcome = self._later(delivery, error)
        except (Refused, Damaged) as error:
            self._store.delivery_refused(delivery, error.detail or str(error))
            outcome = REFUSED
        except Transient:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the delivery must not be lost with it
            log.error("delivery_crashed", error=type(error).__name__, detail=where(error.__traceback__))
            outcome = self._later(delivery, Transient("an error inside the program, see its log"))
        self._failures = self._failures + 1 if unavailable else 0
        log.info("delivery_ended", outcome=outcome)

    def _later(self, delivery: Delivery, error: OsteoError) -> str:
        deliverer = self._settings.deliverer
        now = datetime.now(UTC)
        detail = error.detail or str(error)
        if now - delivery.created_at >= timedelta(seconds=deliverer.give_up_after_seconds):
            self._store.delivery_refused(delivery, f"gave up after {delivery.attempts} attempts: {detail}")
            return REFUSED
        delay = min(_back_off(deliverer.retry_base_seconds, delivery.attempts), deliverer.retry_maximum_seconds)
        self._store.delivery_retry(delivery, now + timedelta(seconds=delay), detail)
        return "retry"


class Attempt:
    """One attempt at one delivery: which of its objects are sent, and what the peer's answers come to."""

    def __init__(
        self,
        settings: Settings,
        destination: DestinationSettings,
        store: JobStore,
        delivery: Delivery,
        stopping: threading.Event,
    ) -> None:
        self._settings = settings
        self._destination = destination
        self._store = store
        self._delivery = delivery
        self._stopping = stopping
        self._statuses = {entry.report.sop_instance_uid: entry.status for entry in delivery.objects}
        self._reports = {entry.report.sop_instance_uid: entry.report for entry in delivery.objects}
        self._errors: list[Refused] = []

    def send(self) -> str:
        """Send what the peer does not have yet; returns the outcome that was written.

        Raises:
            PeerUnavailable: try again later.
            Refused: the peer takes no form of an object.
            Damaged: a spooled file is not the one that was committed.
            LeaseLost: another worker has the delivery.
        """
        for report in self._delivery.unsent:
            _verify(report)
        peer = RemoteAE(self._destination.ae_title, self._destination.host, self._destination.port)
        verdicts: Sequence[Verdict] = ()
        if self._delivery.unsent:
            verdicts = send_objects(
                peer,
                self._settings.receiver.ae_title,
                self._delivery.unsent,
                connect_timeout_seconds=self._settings.deliverer.connect_timeout_seconds,
                dimse_timeout_seconds=self._settings.deliverer.dimse_timeout_seconds,
                choose=lambda entry, _verdicts: (
                    not self._stopping.is_set() and self._wanted(self._reports[entry.sop_instance_uid])
                ),
                answered=self._note,
            )
        for verdict in verdicts:
            if isinstance(verdict.error, PeerUnavailable):
                raise verdict.error
        if self._stopping.is_set() and any(self._wanted(report) for report in self._waiting()):
            self._store.delivery_release(self._delivery)
            return "released"
        return self._conclude()

    def _waiting(self) -> list[ReportObject]:
        return [self._reports[uid] for uid, status in self._statuses.items() if status is None]

    def _wanted(self, report: ReportObject) -> bool:
        """Whether an object is still to be sent: of the reports only the best form that the peer takes."""
        if report.kind is not ReportKind.SR:
            return True
        if self._report_stored():
            return False
        return report.variant.endswith(SEGMENT_REFERENCE) == self._segmentation_stored()

    def _segmentation_stored(self) -> bool:
        return any(
            _stored(status) for uid, status in self._statuses.items() if self._reports[uid].kind is ReportKind.SEG
        )

    def _report_stored(self) -> bool:
        return any(
            _stored(status) for uid, status in self._statuses.items() if self._reports[uid].kind is ReportKind.SR
        )

    def _note(self, verdict: Verdict) -> None:
        if isinstance(verdict.error, PeerUnavailable):
            return
        status = verdict.status
        if isinstance(verdict.error, Refused):
            self._errors.append(verdict.error)
            status = f"{REFUSED} {verdict.status}"
        self._write(verdict.sop_instance_uid, status)

    def _write(self, sop_instance_uid: str, status: str) -> None:
        self._statuses[sop_instance_uid] = status
        self._store.delivery_object_sent(self._delivery, sop_instance_uid, status)

    def _conclude(self) -> str:
        kinds = {report.kind for report in self._reports.values()}
        stored = {self._reports[uid].kind for uid, status in self._statuses.items() if _stored(status)}
        # a refused segmentation has a substitute, the report without a reference to it; nothing else has
        missing = kinds - stored - {ReportKind.SEG} if ReportKind.SR in kinds else kinds - stored
        if missing:
            names = ", ".join(sorted(kind.value for kind in missing))
            details = "; ".join(dict.fromkeys(error.detail for error in self._errors)) or "refused before"
            raise Refused(f"{names} not stored: {details}")
        for report in self._waiting():
            self._write(report.sop_instance_uid, NOT_NEEDED)
        outcome = "stored" if kinds == stored else "stored without segmentation"
        self._store.delivery_done(self._delivery, outcome)
        return outcome


def _stored(status: str | None) -> bool:
    return status is not None and status.startswith("0x")


def _back_off(base_seconds: float, attempts: int) -> float:
    """Exponential back-off with jitter: lanes and nodes that failed together do not come back together."""
    exponent = min(max(attempts - 1, 0), _LONGEST_EXPONENT)
    return base_seconds * float(2**exponent) * random.uniform(*_JITTER)  # noqa: S311


def _verify(report: ReportObject) -> None:
    digest = hashlib.sha256()
    try:
        with Path(report.path).open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    except FileNotFoundError as error:
        raise Damaged(f"spooled {report.kind.value} {report.sop_instance_uid} is gone") from error
    if digest.hexdigest() != report.sha256:
        raise Damaged(f"spooled {report.kind.value} {report.sop_instance_uid} has changed on disk")
