"""The deciding value of each study under a keyed digest of its patient, for the trend in a picture."""

from __future__ import annotations

from datetime import date

from sqlalchemy import insert, select, update

from osteo_daemon.domain.trend import EarlierValue, TrendPoint
from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.schema import TrendRow


class Trend(Database):
    """The trend's side of the store."""

    def remember_value(self, study_instance_uid: str, point: TrendPoint) -> None:
        """Write down a study's value; a later revision replaces it."""
        values = {
            "patient_key": point.patient_key,
            "study_date": point.value.study_date.isoformat(),
            "index_hu": point.value.index_hu,
        }
        with self._writing() as connection:
            known = update(TrendRow).where(TrendRow.study_instance_uid == study_instance_uid).values(**values)
            if connection.execute(known).rowcount == 0:
                connection.execute(insert(TrendRow).values(study_instance_uid=study_instance_uid, **values))

    def earlier_values(self, patient_key: str, before: date, limit: int = 4) -> tuple[EarlierValue, ...]:
        """The patient's values of studies before a date: the last ``limit``, oldest first."""
        query = (
            select(TrendRow.study_date, TrendRow.index_hu)
            .where(TrendRow.patient_key == patient_key, TrendRow.study_date < before.isoformat())
            .order_by(TrendRow.study_date.desc(), TrendRow.study_instance_uid)
            .limit(limit)
        )
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return tuple(EarlierValue(date.fromisoformat(row.study_date), row.index_hu) for row in reversed(rows))
