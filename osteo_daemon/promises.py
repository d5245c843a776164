"""Storage commitment for senders: look at what they asked about, promise what is to be kept, and report it to them.

Promised is only what lies here with the digest it came with, in a study whose source the site keeps (``[keep]``). The
promise is durable before anybody hears of it; a report that nobody takes is repeated with back-off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from osteo_daemon.delivery.back_off import back_off_seconds
from osteo_daemon.dicom.commitment_scp import report_commitment
from osteo_daemon.dicom.contexts import ACCOMPANYING_CLASSES, SCREENED_CLASSES
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import PeerUnavailable, Refused
from osteo_daemon.jobs.pledges import (
    CLASS_INSTANCE_CONFLICT,
    CLASS_NOT_SUPPORTED,
    NO_SUCH_INSTANCE,
    PROCESSING_FAILURE,
    PledgeRequest,
    RequestState,
)
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import get_logger
from osteo_daemon.settings import Settings
from osteo_daemon.tls import source_peer

_CHUNK_BYTES = 1 << 20
_STORED_CLASSES = frozenset((*SCREENED_CLASSES, *ACCOMPANYING_CLASSES))


class Promises:
    """The requests of one node's senders.

    Args:
        settings: of the node.
        jobs: where requests and promises stand.
        clock: gives the present in UTC.
        is_stopping: True when no further request shall be begun.
    """

    def __init__(
        self,
        settings: Settings,
        jobs: JobStore,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._settings = settings.commitment_scp
        self._deliverer = settings.deliverer
        self._calling = settings.receiver.ae_title
        self._kept = frozenset(settings.keep.sources)
        self._peers = {
            source.ae_title: source_peer(settings.tls, source.commitment)
            for source in settings.sources
            if source.commitment is not None
        }
        self._jobs = jobs
        self._clock = clock
        self._is_stopping = is_stopping

    def run(self) -> str:
        """Answer what is due; gives what was done, in words.

        Raises:
            StoreUnavailable: the job store does not answer.
        """
        reported, away = 0, set()
        for due in self._jobs.due_pledges(now=self._clock()):
            if self._is_stopping():
                break
            request = self._judge(due) if due.state is RequestState.ASKED else due
            if request.requester_ae in away:
                continue  # its next request would only wait for the same time-out
            if self._report(request):
                reported += 1
            else:
                away.add(request.requester_ae)
        return f"{reported} reported" if reported else ""

    def _judge(self, request: PledgeRequest) -> PledgeRequest:
        here = self._jobs.asked_instances(request.items)
        verified: list[SopInstance] = []
        failures: dict[str, int] = {}
        for sop_class_uid, uid in request.items:
            reason = self._objection(sop_class_uid, here.get(uid))
            if reason is None:
                verified.append(here[uid][0])
            else:
                failures[uid] = reason
        judged = self._jobs.pledge(request, verified, failures, now=self._clock())
        get_logger().info(
            "commitment_judged",
            ae_title=request.requester_ae,
            count=len(judged.items) - len(judged.failures),
            affected=len(judged.failures),
        )
        return judged

    def _objection(self, sop_class_uid: str, found: tuple[SopInstance, str] | None) -> int | None:
        """Failure Reason of an object that is not promised; None for one that may be."""
        if sop_class_uid not in _STORED_CLASSES:
            return CLASS_NOT_SUPPORTED
        if found is None:
            return NO_SUCH_INSTANCE
        instance, first_ae = found
        if instance.sop_class_uid != sop_class_uid:
            return CLASS_INSTANCE_CONFLICT
        if first_ae not in self._kept:
            return PROCESSING_FAILURE  # it is here, and nobody says that it stays
        if not _is_intact(instance.path, instance.sha256):
            get_logger().error(
                "instance_damaged",
                study_instance_uid=instance.study_instance_uid,
                sop_instance_uid=instance.sop_instance_uid,
            )
            return PROCESSING_FAILURE
        return None

    def _report(self, request: PledgeRequest) -> bool:
        now = self._clock()
        peer = self._peers.get(request.requester_ae)
        if peer is None:
            self._jobs.pledge_unreported(request, None, "no address to report to in the settings", now=now)
            return False
        try:
            report_commitment(
                peer,
                self._calling,
                request.transaction_uid,
                request.items,
                request.failures,
                connect_timeout_seconds=self._deliverer.connect_timeout_seconds,
                dimse_timeout_seconds=self._deliverer.dimse_timeout_seconds,
            )
        except (PeerUnavailable, Refused) as error:
            # a refusal, too, may be a setting that somebody is about to repair
            self._later(request, error.detail, now)
            return False
        self._jobs.pledge_reported(request, now=now)
        get_logger().info(
            "commitment_told",
            ae_title=request.requester_ae,
            count=len(request.items) - len(request.failures),
            affected=len(request.failures),
        )
        return True

    def _later(self, request: PledgeRequest, detail: str, now: datetime) -> None:
        patience = timedelta(seconds=self._settings.give_up_after_seconds)
        not_before = None
        if now - request.requested_at < patience:
            pause = back_off_seconds(
                self._settings.retry_base_seconds, request.attempts + 1, self._settings.retry_maximum_seconds
            )
            not_before = now + timedelta(seconds=pause)
        self._jobs.pledge_unreported(request, not_before, detail, now=now)
        get_logger().warning(
            "commitment_untold",
            ae_title=request.requester_ae,
            attempts=request.attempts + 1,
            not_before=None if not_before is None else not_before.isoformat(),
            reason=detail,
        )


def _is_intact(path: Path, sha256: str) -> bool:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == sha256
