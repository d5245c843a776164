"""Changes of what is deployed, and what candidates said in the shadow."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import delete, insert, select, update

from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.model_schema import ModelChangeRow, ShadowRow
from osteo_daemon.jobs.records import ModelChange, ModelChangeKind, Shadow
from osteo_daemon.jobs.transitions import utc_now


class Models(Database):
    """The registry's side of the store."""

    def begin_model_change(
        self,
        kind: ModelChangeKind,
        name: str,
        before: tuple[str, str] | None,
        after: tuple[str, str] | None,
        *,
        who: str,
        reason: str,
        done: bool | None = None,
        now: datetime | None = None,
    ) -> int:
        """Write down what is about to be changed, or what was when ``done``; returns its number.

        Args:
            kind: what happens.
            name: of the bundle.
            before, after: version and digest.
            who: does it.
            reason: why.
            done: None while it is not known.
            now: the present, for tests.
        """
        from_version, from_sha256 = before or (None, None)
        to_version, to_sha256 = after or (None, None)
        with self._writing() as connection:
            return connection.execute(
                insert(ModelChangeRow)
                .values(
                    at=now or utc_now(),
                    who=who,
                    kind=kind.value,
                    name=name,
                    from_version=from_version,
                    from_sha256=from_sha256,
                    to_version=to_version,
                    to_sha256=to_sha256,
                    reason=reason,
                    done=done,
                )
                .returning(ModelChangeRow.change_id)
            ).scalar_one()

    def settle_model_change(self, change_id: int, *, done: bool) -> None:
        """Write down whether a change that was begun was made."""
        with self._writing() as connection:
            connection.execute(update(ModelChangeRow).where(ModelChangeRow.change_id == change_id).values(done=done))

    def model_changes(self, name: str | None = None, *, begun: bool = False) -> list[ModelChange]:
        """Changes, oldest first; with ``begun`` those only of which it is not known whether they were made."""
        query = select(ModelChangeRow.__table__).order_by(ModelChangeRow.change_id)
        if name is not None:
            query = query.where(ModelChangeRow.name == name)
        if begun:
            query = query.where(ModelChangeRow.done.is_(None))
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return [ModelChange(**{**row._mapping, "kind": ModelChangeKind(row.kind)}) for row in rows]

    def save_shadow(self, shadow: Shadow) -> None:
        """Keep what a candidate said; of one revision of a study the last word counts."""
        key = (
            (ShadowRow.job_id == shadow.job_id)
            & (ShadowRow.revision == shadow.revision)
            & (ShadowRow.sha256 == shadow.sha256)
        )
        with self._writing() as connection:
            connection.execute(delete(ShadowRow).where(key))
            connection.execute(
                insert(ShadowRow).values(
                    job_id=shadow.job_id,
                    revision=shadow.revision,
                    sha256=shadow.sha256,
                    deployed_sha256=shadow.deployed_sha256,
                    at=shadow.at,
                    seconds=shadow.seconds,
                    error=shadow.error,
                    levels=dict(shadow.levels),
                )
            )

    def shadows(self, sha256: str, limit: int = 20_000) -> list[Shadow]:
        """What a candidate said, newest first."""
        query = (
            select(ShadowRow.__table__)
            .where(ShadowRow.sha256 == sha256)
            .order_by(ShadowRow.at.desc(), ShadowRow.job_id.desc())
            .limit(limit)
        )
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return [Shadow(**row._mapping) for row in rows]
