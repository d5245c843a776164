"""Refits: asked for, claimed under a lease, ended with a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from osteo_daemon.domain.refit import MAXIMUM_ATTEMPTS, OPEN, Refit, RefitState
from osteo_daemon.errors import ConfigurationError, LeaseLost
from osteo_daemon.jobs.archive_schema import ArchiveLabelRow
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.refit_schema import RefitRow
from osteo_daemon.jobs.transitions import utc_now

_LOCK = "refits"


class Refits(Database):
    """The refitter's side of the store."""

    def request_refit(
        self, site: str, *, who: str, reason: str, data: str | None = None, now: datetime | None = None
    ) -> Refit:
        """Ask for a refit.

        Args:
            site: its name.
            who: asks.
            reason: why.
            data: folder of a data set; None takes the archive.
            now: the present, for tests.

        Raises:
            ConfigurationError: one of the site is open already.
        """
        with self._writing() as connection:
            self._alone(connection, _LOCK)
            open_one = connection.execute(
                select(RefitRow.refit_id).where(RefitRow.site == site, RefitRow.state.in_(OPEN)).limit(1)
            ).scalar()
            if open_one is not None:
                raise ConfigurationError(f"refit {open_one} of {site} has not ended yet; see osteo refit")
            row = connection.execute(
                insert(RefitRow)
                .values(
                    site=site,
                    state=RefitState.QUEUED,
                    requested_at=now or utc_now(),
                    requested_by=who,
                    reason=reason,
                    data=data,
                    labels=_labels(connection),
                    attempts=0,
                    fencing_token=0,
                    progress={},
                    versions=[],
                )
                .returning(RefitRow.__table__)
            ).one()
            return _refit(row)

    def refits(self, limit: int = 50) -> list[Refit]:
        """The newest ones, newest first."""
        with self._reading() as connection:
            rows = connection.execute(select(RefitRow.__table__).order_by(RefitRow.refit_id.desc()).limit(limit)).all()
        return [_refit(row) for row in rows]

    def new_labels(self, site: str) -> int:
        """Labels in the archive that the site's last refit, which did not fail, was not asked for with."""
        with self._reading() as connection:
            last = connection.execute(
                select(RefitRow.labels)
                .where(RefitRow.site == site, RefitRow.state != RefitState.FAILED)
                .order_by(RefitRow.refit_id.desc())
                .limit(1)
            ).scalar()
            return _labels(connection) - (last or 0)

    def claim_refit(
        self,
        worker: str,
        lease_seconds: float,
        *,
        is_gone: Callable[[str], bool] = lambda _worker: False,
        now: datetime | None = None,
    ) -> Refit | None:
        """The oldest refit that waits or whose worker is gone, or None; one of spent attempts fails instead.

        Args:
            worker: who claims it.
            lease_seconds: until when it is heard of again.
            is_gone: True for a worker that is known to have ended: its lease is not awaited.
            now: the present, for tests.
        """
        now = now or utc_now()
        with self._writing() as connection:
            self._alone(connection, _LOCK)
            waiting = connection.execute(
                select(RefitRow.__table__).where(RefitRow.state.in_(OPEN)).order_by(RefitRow.refit_id)
            ).all()
            for row in waiting:
                held = row.lease_until is not None and now <= row.lease_until
                if row.state == RefitState.RUNNING and held and not is_gone(row.worker):
                    continue
                if row.attempts >= MAXIMUM_ATTEMPTS:
                    detail = f"its worker ended {row.attempts} times before it was done"
                    connection.execute(
                        update(RefitRow)
                        .where(RefitRow.refit_id == row.refit_id)
                        .values(state=RefitState.FAILED, ended_at=now, lease_until=None, detail=row.detail or detail)
                    )
                    continue
                claimed = connection.execute(
                    update(RefitRow)
                    .where(RefitRow.refit_id == row.refit_id)
                    .values(
                        state=RefitState.RUNNING,
                        worker=worker,
                        attempts=row.attempts + 1,
                        fencing_token=row.fencing_token + 1,
                        started_at=now,
                        lease_until=now + timedelta(seconds=lease_seconds),
                    )
                    .returning(RefitRow.__table__)
                ).one()
                return _refit(claimed)
        return None

    def refit_goes_on(
        self, refit: Refit, lease_seconds: float, progress: Mapping[str, Any], *, now: datetime | None = None
    ) -> None:
        """Renew the lease and tell how far it is.

        Raises:
            LeaseLost: another worker has it.
        """
        now = now or utc_now()
        self._change(refit, lease_until=now + timedelta(seconds=lease_seconds), progress=dict(progress))

    def release_refit(self, refit: Refit, detail: str | None, *, charged: bool) -> None:
        """Give it back: it waits for the next claim.

        Args:
            detail: what went wrong, None for nothing.
            charged: the attempt counts.

        Raises:
            LeaseLost: another worker has it.
        """
        attempts = refit.attempts if charged else refit.attempts - 1
        self._change(refit, state=RefitState.QUEUED, lease_until=None, attempts=attempts, detail=detail)

    def end_refit(
        self,
        refit: Refit,
        state: RefitState,
        *,
        verdict: str | None = None,
        recommended: str | None = None,
        versions: Sequence[str] = (),
        detail: str | None = None,
        now: datetime | None = None,
    ) -> None:
        """End it with a verdict, a refusal or a failure.

        Raises:
            LeaseLost: another worker has it.
        """
        self._change(
            refit,
            state=state,
            lease_until=None,
            ended_at=now or utc_now(),
            verdict=verdict,
            recommended=recommended,
            versions=list(versions),
            detail=detail,
        )

    def _change(self, refit: Refit, **values: Any) -> None:
        with self._writing() as connection:
            done = connection.execute(
                update(RefitRow)
                .where(
                    RefitRow.refit_id == refit.refit_id,
                    RefitRow.state == RefitState.RUNNING,
                    RefitRow.fencing_token == refit.fencing_token,
                )
                .values(**values)
            )
            if done.rowcount != 1:
                raise LeaseLost(f"refit {refit.refit_id}")


def _labels(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(ArchiveLabelRow)).scalar_one()


def _refit(row: Row[Any]) -> Refit:
    values = dict(row._mapping)
    return Refit(**{**values, "state": RefitState(values["state"]), "versions": tuple(values["versions"])})
