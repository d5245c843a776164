"""What a person may do to a study: stop it, let it run, screen it again, change its turn."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import update

from osteo_daemon.domain.job import FINISHED, JobState, Priority
from osteo_daemon.errors import IllegalTransition
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.intake import HELD_BY_HAND
from osteo_daemon.jobs.schema import JobRow
from osteo_daemon.jobs.transitions import NO_CLAIM, add_event, change_state, screening_job, utc_now


class ByHand(Database):
    """The operator's side of the store; every step leaves an event with who and why."""

    def hold_study(self, study_instance_uid: str, who: str, reason: str, *, now: datetime | None = None) -> None:
        """A person stops a study; a worker on it loses its lease.

        Raises:
            KeyError: no such study.
            IllegalTransition: it has already ended.
        """
        self._by_hand(
            study_instance_uid, JobState.HELD, "study_held", who, reason, now, code=HELD_BY_HAND, detail=reason
        )

    def retry_study(self, study_instance_uid: str, who: str, reason: str, *, now: datetime | None = None) -> None:
        """A person lets a held, failed or excluded study run again, from the first attempt, under the same revision.

        Raises:
            KeyError: no such study.
            IllegalTransition: it is not held, failed or excluded, or waits already.
        """
        self._by_hand(
            study_instance_uid,
            JobState.READY,
            "study_retried",
            who,
            reason,
            now,
            sources=frozenset({JobState.HELD, JobState.FAILED, JobState.EXCLUDED}),
            attempts=0,
            not_before=None,
        )

    def release_study(self, study_instance_uid: str, who: str, reason: str, *, now: datetime | None = None) -> None:
        """A person lets a held study go on where completeness decides: nothing may have arrived for the quiet time.

        Raises:
            KeyError: no such study.
            IllegalTransition: it is not held.
        """
        self._by_hand(
            study_instance_uid,
            JobState.RECEIVING,
            "study_released",
            who,
            reason,
            now,
            sources=frozenset({JobState.HELD}),
            attempts=0,
            not_before=None,
            code=None,
            detail=None,
        )

    def reprocess_study(
        self,
        study_instance_uid: str,
        who: str,
        reason: str,
        *,
        localizer_bundle: str | None = None,
        network_bundle: str | None = None,
        priority: Priority | None = None,
        now: datetime | None = None,
    ) -> None:
        """A person wants a new report: a higher revision, screened again.

        Args:
            study_instance_uid: of the study.
            who: asks for it.
            reason: why.
            localizer_bundle: for this revision, instead of the settings'.
            network_bundle: likewise.
            priority: in which it waits from now on; None leaves it.
            now: the present, for tests.

        Raises:
            KeyError: no such study.
            IllegalTransition: it is being received, waits or is being screened, or its images were removed.
        """
        self._by_hand(
            study_instance_uid,
            JobState.READY,
            "study_reprocessed",
            who,
            reason,
            now,
            sources=frozenset(
                {JobState.REPORTED, JobState.DELIVERED, JobState.EXCLUDED, JobState.HELD, JobState.FAILED}
            ),
            new_revision=True,
            attempts=0,
            not_before=None,
            localizer_bundle=localizer_bundle,
            network_bundle=network_bundle,
            **({} if priority is None else {"priority": priority.value}),
        )

    def prioritise_study(
        self, study_instance_uid: str, priority: Priority, who: str, reason: str, *, now: datetime | None = None
    ) -> None:
        """A person changes the class in which a study waits.

        Raises:
            KeyError: no such study.
            IllegalTransition: it is finished.
        """
        with self._writing() as connection:
            row = connection.execute(screening_job(study_instance_uid)).one_or_none()
            if row is None:
                raise KeyError(study_instance_uid)
            if row.state in FINISHED:
                raise IllegalTransition(f"study_prioritised: the study is {row.state}")
            connection.execute(update(JobRow).where(JobRow.job_id == row.job_id).values(priority=priority.value))
            add_event(
                connection,
                study_instance_uid=study_instance_uid,
                job_id=row.job_id,
                now=now or utc_now(),
                who=who,
                event="study_prioritised",
                reason=f"{Priority(row.priority).name.lower()} to {priority.name.lower()}: {reason}",
                revision=row.revision,
            )

    def _by_hand(
        self,
        study_instance_uid: str,
        state: JobState,
        event: str,
        who: str,
        reason: str,
        now: datetime | None,
        *,
        sources: frozenset[JobState] = frozenset(JobState),
        new_revision: bool = False,
        **values: Any,
    ) -> None:
        with self._writing() as connection:
            row = connection.execute(screening_job(study_instance_uid)).one_or_none()
            if row is None:
                raise KeyError(study_instance_uid)
            if row.state not in sources:
                raise IllegalTransition(f"{event}: the study is {row.state}")
            if row.images_purged_at is not None:
                when = f"{row.images_purged_at:%Y-%m-%d}"
                raise IllegalTransition(f"{event}: its images were removed on {when}; have the study sent again")
            if new_revision:
                values["revision"] = row.revision + 1
            change_state(
                connection, row, state, who=who, event=event, reason=reason, now=now or utc_now(), **NO_CLAIM, **values
            )
