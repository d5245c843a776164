"""How an object becomes ours, whichever way it came: file first, then row, and only then may anybody hear of it.

The listener, what is fetched from an archive and what comes over the web all pass here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from osteo_daemon.dicom.compare import Comparison, compare_objects
from osteo_daemon.dicom.received import ReceivedObject
from osteo_daemon.discards import Discards
from osteo_daemon.domain.job import JobState, Priority
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import ConflictingInstance, SpoolFull, StoreUnavailable
from osteo_daemon.jobs.incoming import IncomingFile
from osteo_daemon.jobs.records import RecordOutcome
from osteo_daemon.jobs.room import Room
from osteo_daemon.jobs.spool import Spool, StoredFile
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import get_logger
from osteo_daemon.settings import Settings
from osteo_daemon.tally import TALLY
from osteo_daemon.transfers import ReceivedTransfers

_NOT_YET = ""


class DurableIntake:
    """Spool and job store behind one call; several threads may use it at once.

    Args:
        spool: where the bytes go.
        jobs: where the rows go.
        priorities: of new studies, by the AE title of their sender; routine for all others.
        discards: what is not kept; without it everything is.
        room: on the disk; without it every study may begin.
    """

    def __init__(
        self,
        spool: Spool,
        jobs: JobStore,
        priorities: Mapping[str, Priority] = MappingProxyType({}),
        discards: Discards | None = None,
        room: Room | None = None,
    ) -> None:
        self._discards = discards
        self._room = room
        self._spool = spool
        self._jobs = jobs
        self._priorities = priorities
        self._transfers = ReceivedTransfers()
        self._noted: dict[str, str] = {}  # the study that the store was last told of, by association

    def accept(self, received: ReceivedObject) -> RecordOutcome:
        """Make an object durable: file first, then its row; returning means both are on disk.

        Raises:
            SpoolFull: no room, or not enough to begin a new study.
            StoreUnavailable: the row was not committed.
            ConflictingInstance: other pixels are stored under this UID; these are in quarantine.
            OSError: the disk failed.
        """
        if self._discards is not None and self._discards.take(received):
            if received.file is not None:
                received.file.discard()
            return RecordOutcome.DISCARDED
        if self._room is not None and self._room.is_low:
            job = self._jobs.job(received.identifiers.study_instance_uid)
            if job is None or job.state is not JobState.RECEIVING:
                raise SpoolFull("little is free: no new study is begun")
        stored = self._write(received)
        instance = _instance(received, stored)
        outcome = self._record(received, instance)
        if outcome is RecordOutcome.CONFLICT:
            outcome = self._resolve(received, instance, stored)
        if outcome is RecordOutcome.OWN_RESULT:
            self._spool.discard(stored)
        self._transfers.note(received, stored.path, outcome)
        TALLY.count("osteo_objects_received_total", outcome.value)
        TALLY.count("osteo_received_bytes_total", amount=instance.size_bytes)
        get_logger().debug(
            "instance_received",
            outcome=outcome.value,
            ae_title=received.source_ae,
            study_instance_uid=instance.study_instance_uid,
            sop_instance_uid=instance.sop_instance_uid,
            bytes=instance.size_bytes,
        )
        return outcome

    def association_closed(self, association_id: str) -> None:
        """What was received over this association has no more to come."""
        self._transfers.ended(association_id)
        if self._discards is not None:
            self._discards.association_closed(association_id)
        if self._room is not None:
            self._room.set_aside()
        if self._noted.pop(association_id, _NOT_YET) == _NOT_YET:
            return
        try:
            self._jobs.association_closed(association_id)
        except StoreUnavailable as error:
            # the study only waits longer: an open association speaks for a bounded time
            get_logger().warning("association_end_unrecorded", reason=str(error))

    def _write(self, received: ReceivedObject) -> StoredFile:
        identifiers, file = received.identifiers, received.file
        uids = identifiers.study_instance_uid, identifiers.series_instance_uid, identifiers.sop_instance_uid
        if isinstance(file, IncomingFile):
            return self._spool.keep_instance(*uids, file)
        return self._spool.store_instance(*uids, received.parts)

    def _record(self, received: ReceivedObject, instance: SopInstance) -> RecordOutcome:
        # an association is noted with its second object: one image per association must not cost two commits
        association_id, study_instance_uid = received.association_id, instance.study_instance_uid
        noted = self._noted.get(association_id)
        note = noted is not None and noted != study_instance_uid
        self._noted[association_id] = noted or _NOT_YET
        priority = self._priorities.get(received.source_ae, Priority.ROUTINE)
        outcome = self._jobs.record_instance(
            instance,
            received.source_ae,
            association_id=association_id if note else None,
            screenable=received.screenable,
            priority=Priority.BACKFILL if received.fetched else priority,
        )
        if note and outcome is RecordOutcome.STORED:
            self._noted[association_id] = study_instance_uid
        return outcome

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


def source_priorities(settings: Settings) -> dict[str, Priority]:
    """The class of each source's studies, by AE title."""
    return {source.ae_title: Priority[source.priority.upper()] for source in settings.sources}


def _instance(received: ReceivedObject, stored: StoredFile) -> SopInstance:
    identifiers = received.identifiers
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
