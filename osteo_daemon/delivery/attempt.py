"""One attempt at one delivery: which of its objects are sent, and what the destination's answers come to."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace
from pathlib import Path

from osteo_daemon.delivery.transport import Transport
from osteo_daemon.dicom.storage_scu import Verdict
from osteo_daemon.errors import Damaged, PeerUnavailable, Refused
from osteo_daemon.jobs.records import Delivery, ReportKind, ReportObject, is_stored
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore

NOT_NEEDED = "not-needed"
"""Status of a form of the report that another form made superfluous."""

_REFUSED = "refused"
_SEGMENT_REFERENCE = "+seg"
"""In the variant names of structured reports that point to the segmentation."""

_BLOCK_BYTES = 1 << 20


class Attempt:
    """Sends what the destination does not have yet."""

    def __init__(self, store: JobStore, spool: Spool, delivery: Delivery, stopping: threading.Event) -> None:
        self._store = store
        self._spool = spool
        self._delivery = delivery
        self._stopping = stopping
        self._statuses = {entry.report.sop_instance_uid: entry.status for entry in delivery.objects}
        self._reports = {entry.report.sop_instance_uid: entry.report for entry in delivery.objects}
        self._errors: list[Refused] = []
        self.stored: list[ReportObject] = []
        """What the destination took in this attempt."""
        self.refused: list[ReportObject] = []
        """What it would not take in this attempt."""

    def send(self, transport: Transport) -> Delivery | None:
        """Send over one association.

        Returns:
            The delivery with an answer for each object, or None when this process stops before that.

        Raises:
            PeerUnavailable: try again later.
            Refused: the destination takes no form of an object.
            Damaged: a spooled file is not the one that was committed.
            LeaseLost: another worker has the delivery.
        """
        if self._delivery.unsent:
            self._send(transport)
        if self._stopping.is_set() and any(self._wanted(report) for report in self._waiting()):
            return None
        self._conclude()
        return self._store.delivery(self._delivery.delivery_id)

    def _send(self, transport: Transport) -> None:
        for report in self._delivery.unsent:
            _verify(report)
        if self._delivery.revision > 1:
            self._name_what_is_held()
        verdicts = transport.send(
            self._waiting(),
            lambda entry, _verdicts: (
                not self._stopping.is_set() and self._wanted(self._reports[entry.sop_instance_uid])
            ),
            self._note,
        )
        for verdict in verdicts:
            if isinstance(verdict.error, PeerUnavailable):
                raise verdict.error

    def _name_what_is_held(self) -> None:
        """A later revision's report names the report that this destination has, which may be a fallback, or none."""
        # here: it loads highdicom, for a second, and few reports have a predecessor
        from osteo_daemon.dicom.succession import predecessor_uid, succeed

        held = self._store.held_report(self._delivery)
        there = held is not None and held.path.exists()
        for report in [entry for entry in self._waiting() if entry.kind is ReportKind.SR]:
            if predecessor_uid(report.path) == (held.sop_instance_uid if held is not None else None):
                continue
            made = succeed(report.path, held.path if held is not None and there else None)
            study = self._delivery.study_instance_uid
            stored = self._spool.store_report(study, made.sop_instance_uid, [made.data])
            mine = replace(
                report,
                sop_instance_uid=made.sop_instance_uid,
                path=stored.path,
                size_bytes=stored.size_bytes,
                sha256=stored.sha256,
                variant=f"{report.variant}@{self._delivery.destination}",
            )
            self._store.replace_unsent(self._delivery, report.sop_instance_uid, mine)
            # in its place: the order is that of preference
            self._reports = {
                mine.sop_instance_uid if uid == report.sop_instance_uid else uid: mine if entry is report else entry
                for uid, entry in self._reports.items()
            }
            self._statuses = {uid: self._statuses.get(uid) for uid in self._reports}

    def _waiting(self) -> list[ReportObject]:
        return [self._reports[uid] for uid, status in self._statuses.items() if status is None]

    def _wanted(self, report: ReportObject) -> bool:
        """Whether an object is still to be sent: of the reports only the best form that the destination takes."""
        if report.kind is not ReportKind.SR:
            return True
        if self._is_stored(ReportKind.SR):
            return False
        return (_SEGMENT_REFERENCE in report.variant) == self._is_stored(ReportKind.SEG)

    def _is_stored(self, kind: ReportKind) -> bool:
        return any(is_stored(status) for uid, status in self._statuses.items() if self._reports[uid].kind is kind)

    def _note(self, verdict: Verdict) -> None:
        if isinstance(verdict.error, PeerUnavailable):
            return
        status = verdict.status
        sent = self.stored
        if isinstance(verdict.error, Refused):
            self._errors.append(verdict.error)
            status = f"{_REFUSED} {verdict.status}"
            sent = self.refused
        sent.append(self._reports[verdict.sop_instance_uid])
        self._write(verdict.sop_instance_uid, status)

    def _write(self, sop_instance_uid: str, status: str) -> None:
        self._statuses[sop_instance_uid] = status
        self._store.delivery_object_sent(self._delivery, sop_instance_uid, status)

    def _conclude(self) -> None:
        kinds = {report.kind for report in self._reports.values()}
        stored = {kind for kind in kinds if self._is_stored(kind)}
        # a refused segmentation has a substitute, the report without a reference to it; nothing else has
        missing = kinds - stored - {ReportKind.SEG} if ReportKind.SR in kinds else kinds - stored
        if missing:
            names = ", ".join(sorted(kind.value for kind in missing))
            details = "; ".join(dict.fromkeys(error.detail for error in self._errors)) or "refused before"
            raise Refused(f"{names} not stored: {details}")
        for report in self._waiting():
            self._write(report.sop_instance_uid, NOT_NEEDED)


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
