"""Storage commitment asked of this node (PS3.4 annex J): requests, what was promised, and reports that are owed.

A request is durable before it is accepted. A promise is durable before it is reported: from then on nothing removes the
study's images by itself, whatever the settings say later. One transaction asked twice is one request.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, delete, insert, or_, select, update

from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.evidence_schema import CommitmentRequestRow, CommittedStudyRow
from osteo_daemon.jobs.intake import to_instance
from osteo_daemon.jobs.schema import InstanceRow, StudyRow
from osteo_daemon.jobs.transitions import utc_now

NO_SUCH_INSTANCE = 0x0112
PROCESSING_FAILURE = 0x0110
CLASS_INSTANCE_CONFLICT = 0x0119
CLASS_NOT_SUPPORTED = 0x0122
"""Values of Failure Reason (0008,1197), PS3.3 C.14.1.1."""

_UIDS_PER_QUERY = 500


class RequestState(StrEnum):
    """Where a request stands."""

    ASKED = "ASKED"  # accepted, not yet looked at
    JUDGED = "JUDGED"  # what is promised is written down; the report is owed
    REPORTED = "REPORTED"  # the requester took the report
    GIVEN_UP = "GIVEN_UP"  # it was not to be reached for too long; what was promised stays


@dataclass(frozen=True, slots=True)
class PledgeRequest:
    """One request.

    Attributes:
        items: SOP Class UID and SOP Instance UID of each object asked about.
        failures: Failure Reason by SOP Instance UID of what is not promised; empty until JUDGED.
    """

    requester_ae: str
    transaction_uid: str
    state: RequestState
    items: tuple[tuple[str, str], ...]
    failures: Mapping[str, int]
    attempts: int
    requested_at: datetime
    detail: str | None


class Pledges(Database):
    """Requests as the receiver takes them and the scheduler answers them."""

    def request_pledge(
        self,
        requester_ae: str,
        transaction_uid: str,
        items: Sequence[tuple[str, str]],
        *,
        now: datetime | None = None,
    ) -> bool:
        """Take a request, durably; False when the transaction was used for other objects.

        One that was answered before is answered again: it would not be asked if the report had been heard.

        Raises:
            StoreUnavailable: nothing was taken.
        """
        now = now or utc_now()
        wanted = [list(item) for item in dict.fromkeys(items)]
        with self._writing() as connection:
            self._alone(connection, transaction_uid)
            row = connection.execute(_request(requester_ae, transaction_uid)).one_or_none()
            if row is None:
                connection.execute(
                    insert(CommitmentRequestRow).values(
                        requester_ae=requester_ae,
                        transaction_uid=transaction_uid,
                        state=RequestState.ASKED.value,
                        items=wanted,
                        attempts=0,
                        requested_at=now,
                        changed_at=now,
                    )
                )
                return True
            if sorted(row.items) != sorted(wanted):
                return False
            if row.state not in (RequestState.ASKED, RequestState.JUDGED):
                # looked at anew: objects that were missing may have come since
                _change(connection, row, now, state=RequestState.ASKED.value, attempts=0, not_before=None, detail=None)
                connection.execute(_this(update(CommitmentRequestRow), row).values(requested_at=now))
        return True

    def pledge_request(self, requester_ae: str, transaction_uid: str) -> PledgeRequest | None:
        """One request, or None."""
        with self._reading() as connection:
            row = connection.execute(_request(requester_ae, transaction_uid)).one_or_none()
        return None if row is None else _to_request(row)

    def due_pledges(self, *, now: datetime | None = None, limit: int = 100) -> list[PledgeRequest]:
        """Requests that want looking at or reporting, the oldest first."""
        row = CommitmentRequestRow
        query = (
            select(row.__table__)
            .where(
                row.state.in_([RequestState.ASKED.value, RequestState.JUDGED.value]),
                or_(row.not_before.is_(None), row.not_before <= (now or utc_now())),
            )
            .order_by(row.requested_at)
            .limit(limit)
        )
        with self._reading() as connection:
            return [_to_request(entry) for entry in connection.execute(query)]

    def asked_instances(self, items: Sequence[tuple[str, str]]) -> dict[str, tuple[SopInstance, str]]:
        """Of the objects asked about those that are here, each with the AE title that its study came from first."""
        found: dict[str, tuple[SopInstance, str]] = {}
        uids = [uid for _, uid in items]
        with self._reading() as connection:
            for start in range(0, len(uids), _UIDS_PER_QUERY):
                rows = connection.execute(
                    select(InstanceRow.__table__, StudyRow.source_ae.label("first_ae"))
                    .join(StudyRow, StudyRow.study_instance_uid == InstanceRow.study_instance_uid)
                    .where(InstanceRow.sop_instance_uid.in_(uids[start : start + _UIDS_PER_QUERY]))
                )
                found.update((row.sop_instance_uid, (to_instance(row), row.first_ae)) for row in rows)
        return found

    def pledge(
        self,
        request: PledgeRequest,
        verified: Collection[SopInstance],
        failures: Mapping[str, int],
        *,
        now: datetime | None = None,
    ) -> PledgeRequest:
        """Promise to keep what was verified, and write down what is reported of the request.

        An object that has gone or changed since it was verified is not promised.

        Returns:
            The request, JUDGED.
        """
        now = now or utc_now()
        failed = dict(failures)
        by_study: dict[str, list[SopInstance]] = {}
        for instance in verified:
            by_study.setdefault(instance.study_instance_uid, []).append(instance)
        with self._writing() as connection:
            for study_instance_uid in sorted(by_study):
                self._alone(connection, study_instance_uid)
                for uid in _changed(connection, study_instance_uid, by_study[study_instance_uid]):
                    failed[uid] = PROCESSING_FAILURE
                if any(entry.sop_instance_uid not in failed for entry in by_study[study_instance_uid]):
                    _commit(connection, study_instance_uid, request.requester_ae, now)
            row = connection.execute(_request(request.requester_ae, request.transaction_uid)).one()
            _change(connection, row, now, state=RequestState.JUDGED.value, failures=failed)
            return _to_request(connection.execute(_request(request.requester_ae, request.transaction_uid)).one())

    def pledge_reported(self, request: PledgeRequest, *, now: datetime | None = None) -> None:
        """The requester took the report."""
        self._settle(request, RequestState.REPORTED, None, None, now or utc_now())

    def pledge_unreported(
        self, request: PledgeRequest, not_before: datetime | None, detail: str, *, now: datetime | None = None
    ) -> None:
        """The requester did not take the report: again at ``not_before``, or never."""
        state = RequestState.JUDGED if not_before is not None else RequestState.GIVEN_UP
        self._settle(request, state, not_before, detail, now or utc_now())

    def is_committed(self, study_instance_uid: str) -> bool:
        """A sender was told that this study is kept."""
        with self._reading() as connection:
            return is_committed(connection, study_instance_uid)

    def forget_pledge_requests(self, before: datetime) -> int:
        """Remove requests that were answered before a moment; the promises stay. Returns how many."""
        ended = [RequestState.REPORTED.value, RequestState.GIVEN_UP.value]
        row = CommitmentRequestRow
        with self._writing() as connection:
            return connection.execute(delete(row).where(row.state.in_(ended), row.changed_at < before)).rowcount

    def _settle(
        self,
        request: PledgeRequest,
        state: RequestState,
        not_before: datetime | None,
        detail: str | None,
        now: datetime,
    ) -> None:
        with self._writing() as connection:
            row = connection.execute(_request(request.requester_ae, request.transaction_uid)).one_or_none()
            if row is None or row.state != RequestState.JUDGED:
                return
            _change(
                connection,
                row,
                now,
                state=state.value,
                attempts=row.attempts + 1,
                not_before=not_before,
                detail=detail,
            )


def is_committed(connection: Connection, study_instance_uid: str) -> bool:
    """A sender was told that this study is kept, as this transaction sees it."""
    query = select(CommittedStudyRow.study_instance_uid).where(
        CommittedStudyRow.study_instance_uid == study_instance_uid
    )
    return connection.execute(query).first() is not None


def _request(requester_ae: str, transaction_uid: str) -> Any:
    return (
        select(CommitmentRequestRow.__table__)
        .where(
            CommitmentRequestRow.requester_ae == requester_ae,
            CommitmentRequestRow.transaction_uid == transaction_uid,
        )
        .with_for_update()
    )


def _this(statement: Any, row: Any) -> Any:
    return statement.where(
        CommitmentRequestRow.requester_ae == row.requester_ae,
        CommitmentRequestRow.transaction_uid == row.transaction_uid,
    )


def _change(connection: Connection, row: Any, now: datetime, **values: Any) -> None:
    connection.execute(_this(update(CommitmentRequestRow), row).values(changed_at=now, **values))


def _changed(connection: Connection, study_instance_uid: str, instances: Sequence[SopInstance]) -> list[str]:
    """Those whose row is no longer what was verified, or all while files of the study are being removed."""
    purging = connection.execute(
        select(StudyRow.purging_at).where(StudyRow.study_instance_uid == study_instance_uid).with_for_update()
    ).scalar()
    rows = connection.execute(
        select(InstanceRow.sop_instance_uid, InstanceRow.sha256).where(
            InstanceRow.study_instance_uid == study_instance_uid
        )
    )
    here = {row.sop_instance_uid: row.sha256 for row in rows}
    return [
        entry.sop_instance_uid
        for entry in instances
        if purging is not None or here.get(entry.sop_instance_uid) != entry.sha256
    ]


def _commit(connection: Connection, study_instance_uid: str, requester_ae: str, now: datetime) -> None:
    if not is_committed(connection, study_instance_uid):
        connection.execute(
            insert(CommittedStudyRow).values(
                study_instance_uid=study_instance_uid, requester_ae=requester_ae, committed_at=now
            )
        )


def _to_request(row: Any) -> PledgeRequest:
    return PledgeRequest(
        requester_ae=row.requester_ae,
        transaction_uid=row.transaction_uid,
        state=RequestState(row.state),
        items=tuple((sop_class, uid) for sop_class, uid in row.items),
        failures={uid: int(reason) for uid, reason in (row.failures or {}).items()},
        attempts=row.attempts,
        requested_at=row.requested_at,
        detail=row.detail,
    )
