"""The receiver: a DICOM listener in front of spool and job store. Success is said only of what a power cut spares."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from osteo_daemon.dicom.commitment import CommitmentReport
from osteo_daemon.dicom.compare import Comparison, compare_objects
from osteo_daemon.dicom.storage_scp import ReceivedObject, StorageScp
from osteo_daemon.domain.job import Priority
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import ConflictingInstance, StoreUnavailable
from osteo_daemon.jobs.records import RecordOutcome
from osteo_daemon.jobs.spool import Spool, StoredFile
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import configure_logging, get_logger
from osteo_daemon.settings import Settings

GRACE_SECONDS = 10.0
"""How long associations may finish after SIGTERM."""


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
        self._studies: dict[str, str] = {}
        self._priorities = {source.ae_title: Priority[source.priority.upper()] for source in settings.sources}
        self._destinations = settings.destinations
        leftovers = self._spool.remove_leftovers()
        self._jobs.forget_associations()
        self._scp = StorageScp(
            settings.receiver,
            settings.sources,
            self.accept,
            self._association_closed,
            settings.destinations,
            self._commitment_reported,
        )
        if leftovers:
            get_logger().info("leftovers_removed", count=leftovers)
        if not settings.sources:
            get_logger().warning("no_sources", detail="nobody may send: add [[sources]] to the settings")

    @property
    def port(self) -> int:
        """The port listened on."""
        return self._scp.port

    def start(self) -> None:
        """Listen."""
        self._scp.start()

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Finish what is under way and close."""
        self._scp.stop(grace_seconds)
        self._jobs.close()

    def accept(self, received: ReceivedObject) -> None:
        """Make an object durable: file first, then its row; returning means both are on disk.

        Raises:
            SpoolFull: no room.
            StoreUnavailable: the row was not committed.
            ConflictingInstance: other pixels are stored under this UID; these are in quarantine.
            OSError: the disk failed.
        """
        stored = self._write(received)
        instance = _instance(received, stored)
        outcome = self._record(received, instance)
        if outcome is RecordOutcome.CONFLICT:
            outcome = self._resolve(received, instance, stored)
        if outcome is RecordOutcome.OWN_RESULT:
            self._spool.discard(stored)
        get_logger().debug(
            "instance_received",
            outcome=outcome.value,
            ae_title=received.source_ae,
            study_instance_uid=instance.study_instance_uid,
            sop_instance_uid=instance.sop_instance_uid,
            bytes=instance.size_bytes,
        )

    def _write(self, received: ReceivedObject) -> StoredFile:
        identifiers = received.identifiers
        return self._spool.store_instance(
            identifiers.study_instance_uid,
            identifiers.series_instance_uid,
            identifiers.sop_instance_uid,
            received.parts,
        )

    def _record(self, received: ReceivedObject, instance: SopInstance) -> RecordOutcome:
        # an association is noted with its second object: one image per association must not cost two commits
        last = self._studies.get(received.association_id)
        self._studies[received.association_id] = instance.study_instance_uid
        return self._jobs.record_instance(
            instance,
            received.source_ae,
            association_id=received.association_id if last is not None else None,
            screenable=received.screenable,
            priority=self._priorities.get(received.source_ae, Priority.ROUTINE),
        )

    def _resolve(self, received: ReceivedObject, instance: SopInstance, stored: StoredFile) -> RecordOutcome:
        """Other bytes under a known UID: the same image under another header, or a conflict."""
        known = self._jobs.stored_instance(instance.sop_instance_uid)
        if known is None:
            raise StoreUnavailable("the stored instance has gone meanwhile")
        same_place = (known.study_instance_uid, known.series_instance_uid, known.sop_class_uid) == (
            instance.study_instance_uid,
            instance.series_instance_uid,
            instance.sop_class_uid,
        )
        found = compare_objects(known.path, instance.path) if same_place else Comparison.DIFFERENT
        if found is Comparison.IDENTICAL:
            self._spool.discard(stored)
            return RecordOutcome.DUPLICATE
        if found is Comparison.SAME_IMAGE:
            outcome = self._jobs.replace_instance(instance, received.source_ae)
            if outcome is RecordOutcome.REPLACED:
                return outcome
        reason = found.value if same_place else "another study, series or SOP class"
        kept = self._spool.quarantine(instance.study_instance_uid, instance.sop_instance_uid, stored)
        self._jobs.quarantine_instance(_instance(received, kept), received.source_ae, reason)
        get_logger().warning(
            "instance_quarantined",
            ae_title=received.source_ae,
            study_instance_uid=instance.study_instance_uid,
            sop_instance_uid=instance.sop_instance_uid,
            reason=reason,
        )
        raise ConflictingInstance(reason)

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

    def _association_closed(self, association_id: str) -> None:
        self._studies.pop(association_id, None)
        try:
            self._jobs.association_closed(association_id)
        except StoreUnavailable as error:
            # the study only waits longer: an open association speaks for a bounded time
            get_logger().warning("association_end_unrecorded", reason=str(error))


def run(settings: Settings) -> int:
    """Receive until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigurationError: folder or port cannot be used.
    """
    configure_logging(settings.log, "receiver")
    ended = threading.Event()

    def end(signum: int, _frame: FrameType | None) -> None:
        get_logger().info("stopping", signal=signal.Signals(signum).name)
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    receiver = Receiver(settings)
    receiver.start()
    get_logger().info(
        "receiver_listening",
        ae_title=settings.receiver.ae_title,
        address=settings.receiver.address,
        port=receiver.port,
        count=len(settings.sources),
    )
    ended.wait()
    receiver.stop()
    get_logger().info("stopped")
    return 0


def _instance(received: ReceivedObject, stored: StoredFile) -> SopInstance:
    identifiers: Any = received.identifiers
    return SopInstance(
        study_instance_uid=identifiers.study_instance_uid,
        series_instance_uid=identifiers.series_instance_uid,
        sop_class_uid=identifiers.sop_class_uid,
        sop_instance_uid=identifiers.sop_instance_uid,
        transfer_syntax_uid=received.transfer_syntax_uid,
        path=stored.path,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
    )
