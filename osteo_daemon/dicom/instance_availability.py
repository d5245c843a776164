"""Instance Availability Notification as SCP (PS3.4 annex R): an archive says which objects of a study it has."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any, Final

from pydicom.dataset import Dataset

from osteo_daemon.dicom.normalized import (
    DUPLICATE_INSTANCE,
    INVALID_INSTANCE,
    Service,
    announced_instances,
    calling,
    items_of,
    uid_in,
    well_formed,
)
from osteo_daemon.dicom.performed_procedure import Announce
from osteo_daemon.domain.announcement import (
    Announcement,
    AnnouncementKind,
    AnnounceOutcome,
    StepState,
)
from osteo_daemon.errors import Declined

INSTANCE_AVAILABILITY_CLASS_UID: Final = "1.2.840.10008.5.1.4.33"


def instance_availability_service(announce: Announce) -> Service:
    """The service; ``announce`` makes a notification durable."""

    def create(event: Any) -> Dataset | None:
        given = event.request.AffectedSOPInstanceUID
        uid = well_formed(given) if given else f"2.25.{uuid.uuid4().int}"
        if uid is None:
            raise Declined(INVALID_INSTANCE, "malformed SOP Instance UID")
        attributes = event.attribute_list
        study = uid_in(attributes, "StudyInstanceUID")
        instances = announced_instances(items_of(attributes, "ReferencedSeriesSequence"), _available)
        outcome = announce(
            Announcement(
                announcement_uid=uid,
                kind=AnnouncementKind.IAN,
                source_ae=calling(event),
                state=StepState.COMPLETED,
                studies=frozenset({study}),
                instances=instances,
            )
        )
        if outcome is AnnounceOutcome.DUPLICATE:
            raise Declined(DUPLICATE_INSTANCE, "there is a notification under this SOP Instance UID")
        if given:
            return None
        answer = Dataset()
        answer.AffectedSOPInstanceUID = uid  # the library moves it into the command (PS3.7 10.1.5.1.4)
        return answer

    return Service(INSTANCE_AVAILABILITY_CLASS_UID, create=create)


def _available(series: Dataset) -> Iterable[Dataset]:
    # what is unavailable nobody can send
    return [
        reference
        for reference in items_of(series, "ReferencedSOPSequence")
        if reference.get("InstanceAvailability") != "UNAVAILABLE"
    ]
