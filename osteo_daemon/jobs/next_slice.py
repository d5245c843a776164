"""The common arrival: one more image of a study that is being received. Three statements of SQLite, built once.

They go to the driver as text: SQLAlchemy's way to execute a statement costs several times SQLite's work on it.

Whatever is not that (the first image, a UID that is known, a study past RECEIVING, files being removed) is left to
the general way of `intake`, which decides the same for this case in seven.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from datetime import datetime
from typing import Any, cast

from sqlalchemy import BindParameter, ClauseElement, bindparam, exists, insert, select, update
from sqlalchemy.dialects import sqlite

from osteo_daemon.domain.job import JobKind, JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.schema import InstanceRow, JobRow, ReportObjectRow, StudyRow, UtcDateTime

_SQLITE = sqlite.dialect()


class _Statement:
    """A statement as SQLite's driver takes it; its parameters are bound by name."""

    def __init__(self, statement: ClauseElement) -> None:
        compiled: Any = statement.compile(dialect=_SQLITE)
        self._text = str(compiled)
        self._names: tuple[str, ...] = tuple(compiled.positiontup)
        self._constants: dict[str, object] = {
            name: value for name, value in compiled.params.items() if value is not None
        }

    def execute(self, connection: sqlite3.Connection, values: Mapping[str, object]) -> sqlite3.Cursor:
        given = {**self._constants, **values}
        return connection.execute(self._text, [given[name] for name in self._names])


_OF_STUDY: BindParameter[str] = bindparam("of_study")
_OF_INSTANCE: BindParameter[str] = bindparam("of_instance")

_IS_NEXT = _Statement(
    select(StudyRow.study_instance_uid)
    .join(JobRow, JobRow.study_instance_uid == StudyRow.study_instance_uid)
    .where(
        StudyRow.study_instance_uid == _OF_STUDY,
        StudyRow.purging_at.is_(None),
        StudyRow.purged_at.is_(None),
        JobRow.kind == JobKind.SCREEN,
        JobRow.state == JobState.RECEIVING,
        ~exists().where(InstanceRow.sop_instance_uid == _OF_INSTANCE),
        ~exists().where(ReportObjectRow.sop_instance_uid == _OF_INSTANCE),
    )
)
_COUNT = _Statement(
    update(StudyRow)
    .where(StudyRow.study_instance_uid == _OF_STUDY)
    .values(last_received_at=bindparam("now"), instances=StudyRow.instances + 1)
)
_FILE = _Statement(insert(InstanceRow))
_as_text = UtcDateTime().dialect_impl(_SQLITE).bind_processor(_SQLITE)


def record_next_slice(connection: sqlite3.Connection, instance: SopInstance, source_ae: str, now: datetime) -> bool:
    """Record an image of a study in RECEIVING; False, and nothing written, when it is anything else.

    Only where one transaction writes at a time: no row is locked here.
    """
    of = {"of_study": instance.study_instance_uid, "of_instance": instance.sop_instance_uid}
    if _IS_NEXT.execute(connection, of).fetchone() is None:
        return False
    at = cast(Any, _as_text)(now)
    _COUNT.execute(connection, {"of_study": instance.study_instance_uid, "now": at})
    _FILE.execute(connection, {**instance_columns(instance), "source_ae": source_ae, "received_at": at})
    return True


def instance_columns(instance: SopInstance) -> dict[str, str | int]:
    """What `InstanceRow` holds of an instance itself."""
    return {
        "sop_instance_uid": instance.sop_instance_uid,
        "study_instance_uid": instance.study_instance_uid,
        "series_instance_uid": instance.series_instance_uid,
        "sop_class_uid": instance.sop_class_uid,
        "transfer_syntax_uid": instance.transfer_syntax_uid,
        "path": str(instance.path),
        "size_bytes": instance.size_bytes,
        "sha256": instance.sha256,
    }
