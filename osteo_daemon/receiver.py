"""The receiver: a DICOM listener in front of spool and job store. Success is said only of what a power cut spares."""

from __future__ import annotations

import gc
import queue
import signal
import threading
from types import FrameType

from osteo_daemon.dicom.commitment import CommitmentReport
from osteo_daemon.dicom.commitment_scp import commitment_service
from osteo_daemon.dicom.instance_availability import instance_availability_service
from osteo_daemon.dicom.normalized import NormalizedServices
from osteo_daemon.dicom.performed_procedure import performed_procedure_service
from osteo_daemon.dicom.storage_scp import StorageScp
from osteo_daemon.discards import Discards
from osteo_daemon.intake import DurableIntake, source_priorities
from osteo_daemon.jobs.room import Room
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import configure_logging, get_logger
from osteo_daemon.reconciliation import Reconciliation
from osteo_daemon.settings import Settings
from osteo_daemon.vitals import Vitals

GRACE_SECONDS = 10.0
"""How long associations may finish after SIGTERM."""

_LOOK_SECONDS = 1.0
_SILENCE_SECONDS = 10.0
"""A thread that takes connections and does not come round for so long hangs: it never waits for a second."""


class Receiver:
    """The listener with its spool and store.

    Args:
        settings: of the node.

    Raises:
        ConfigurationError: folder or port cannot be used.
        StoreUnavailable: the job store does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._spool = Spool(settings.spool_dir, minimum_free_bytes=settings.receiver.minimum_free_bytes)
        self._jobs = JobStore(settings.database_url)
        limits = settings.receiver
        room = Room(settings.spool_dir, limits.minimum_free_bytes, limits.low_watermark_bytes)
        intake = DurableIntake(
            self._spool, self._jobs, source_priorities(settings), Discards(settings.accompanying), room
        )
        self._destinations = settings.destinations
        leftovers = self._spool.remove_leftovers()
        self._jobs.forget_associations()
        self._reconciliation = Reconciliation(self._jobs, self._spool)
        self._scp = StorageScp(
            settings.receiver,
            settings.sources,
            intake.accept,
            intake.association_closed,
            settings.destinations,
            self._commitment_reported,
            settings.tls,
            settings.quotas,
            begin_file=self._spool.begin,
            services=self._services(settings),
            crowded=lambda: room.is_low,
        )
        if not room.set_aside():
            get_logger().warning("no_reserve", free_bytes=room.free_bytes, detail="no disk could be set aside")
        if leftovers:
            get_logger().info("leftovers_removed", count=leftovers)
        if not settings.sources:
            get_logger().warning("no_sources", detail="nobody may send: add [[sources]] to the settings")

    @property
    def port(self) -> int:
        """The port listened on."""
        return self._scp.port

    @property
    def tls_port(self) -> int:
        """The TLS port listened on; 0: none."""
        return self._scp.tls_port

    @property
    def silent_seconds(self) -> float:
        """How long ago the thread that takes connections came round."""
        return self._scp.silent_seconds

    def reload_certificates(self) -> None:
        """Load the TLS port's files now."""
        self._scp.reload_certificates()

    def start(self) -> None:
        """Listen, and look meanwhile for files that have no rows."""
        self._scp.start()
        self._reconciliation.start()

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Finish what is under way and close."""
        self._scp.stop(grace_seconds)
        self._reconciliation.stop()
        self._jobs.close()

    def _services(self, settings: Settings) -> NormalizedServices:
        """What sources may ask of us beside storing."""
        services = []
        if settings.completeness.mpps:
            services.append(performed_procedure_service(self._jobs.announce, self._jobs.amend_announcement))
        if settings.completeness.ian:
            services.append(instance_availability_service(self._jobs.announce))
        if settings.commitment_scp.enabled:
            requesters = frozenset(entry.ae_title for entry in settings.sources if entry.commitment is not None)
            services.append(commitment_service(requesters, self._jobs.request_pledge))
        return NormalizedServices(tuple(services))

    def _commitment_reported(self, ae_title: str, report: CommitmentReport) -> None:
        names = {entry.name for entry in self._destinations if entry.ae_title == ae_title}
        delivery = self._jobs.commitment_reported(report.transaction_uid, names, report.committed, report.failed)
        get_logger().info(
            "commitment_reported",
            ae_title=ae_title,
            delivery_id=delivery.delivery_id,
            job_id=delivery.job_id,
            study_instance_uid=delivery.study_instance_uid,
            state=delivery.state.value,
            count=len(report.committed),
            affected=len(report.failed),
        )


def run(settings: Settings) -> int:
    """Receive until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigurationError: folder or port cannot be used.
    """
    configure_logging(settings.log, "receiver")
    # a handler runs where this thread just is, inside a wait's lock too: an Event it sets there would wait for itself
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def end(signum: int, _frame: FrameType | None) -> None:
        ended.put(signum)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    vitals = Vitals(settings.state_dir, "receiver")
    receiver = Receiver(settings)

    def reload() -> None:
        vitals.reloading()
        receiver.reload_certificates()
        vitals.ready()

    # in a thread of its own: the handler may run where a lock is held
    signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=reload).start())
    # what is there for good is not looked at again: all threads wait while garbage is collected
    gc.collect()
    gc.freeze()
    receiver.start()
    get_logger().info(
        "receiver_listening",
        ae_title=settings.receiver.ae_title,
        address=settings.receiver.address,
        port=receiver.port,
        count=len(settings.sources),
    )
    if receiver.tls_port:
        get_logger().info("receiver_listening_tls", address=settings.receiver.address, port=receiver.tls_port)
    with vitals:
        vitals.ready()
        get_logger().info("stopping", signal=signal.Signals(_wait(ended, receiver, vitals)).name)
        vitals.stopping()
        receiver.stop()
    get_logger().info("stopped")
    return 0


def _wait(ended: queue.SimpleQueue[int], receiver: Receiver, vitals: Vitals) -> int:
    """The signal that ends this process; until then it is alive as long as connections are taken."""
    while True:
        try:
            return ended.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            if receiver.silent_seconds < _SILENCE_SECONDS:
                vitals.alive()
