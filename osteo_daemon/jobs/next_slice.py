"""The common arrival: one more image of a study that is being received. Three statements, built once.

Whatever is not that (the first image, a UID that is known, a study past RECEIVING, files being removed) is left to
the general way of `intake`, which decides the same for this case in seven.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BindParameter, Connection, bindparam, exists, insert, select, update

from osteo_daemon.domain.job import JobKind, JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.schema import InstanceRow, JobRow, ReportObjectRow, StudyRow

_OF_STUDY: BindParameter[str] = bindparam("of_study")
_OF_INSTANCE: BindParameter[str] = bindparam("of_instance")

_IS_NEXT = (
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
_COUNT = (
    update(StudyRow)
    .where(StudyRow.study_instance_uid == _OF_STUDY)
    .values(last_received_at=bindparam("now"), instances=StudyRow.instances + 1)
)
_FILE = insert(InstanceRow)


def record_next_slice(connection: Connection, instance: SopInstance, source_ae: str, now: datetime) -> bool:
    """Record an image of a study in RECEIVING; False, and nothing written, when it is anything else.

    Only where one transaction writes at a time: no row is locked here.
    """
    of = {"of_study": instance.study_instance_uid, "of_instance": instance.sop_instance_uid}
    if connection.execute(_IS_NEXT, of).first() is None:
        return False
    connection.execute(_COUNT, {"of_study": instance.study_instance_uid, "now": now})
    connection.execute(_FILE, {**instance_columns(instance), "source_ae": source_ae, "received_at": now})
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
