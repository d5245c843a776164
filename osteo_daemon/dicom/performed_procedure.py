"""Modality Performed Procedure Step as SCP (PS3.4 annex F): a modality says what it makes, and when that is all.

Only what completeness needs is read and kept: state, studies, series and instances by their UIDs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from pydicom.dataset import Dataset

from osteo_daemon.dicom.normalized import (
    DUPLICATE_INSTANCE,
    INVALID_ATTRIBUTE_VALUE,
    INVALID_INSTANCE,
    MISSING_ATTRIBUTE,
    NO_SUCH_INSTANCE,
    NOT_AUTHORISED,
    PROCESSING_FAILURE,
    RESOURCE_LIMITATION,
    Service,
    announced_instances,
    calling,
    items_of,
    uid_in,
    well_formed,
)
from osteo_daemon.domain.announcement import (
    AnnouncedInstance,
    Announcement,
    AnnouncementKind,
    AnnounceOutcome,
    StepState,
)
from osteo_daemon.errors import Declined

PERFORMED_PROCEDURE_STEP_CLASS_UID: Final = "1.2.840.10008.3.1.2.3.3"

MAXIMUM_STEPS: Final = 100
"""Scheduled steps that one performed step may answer; each names a study."""

_MAY_NO_LONGER_BE_UPDATED: Final = 0xA710  # Error ID, PS3.4 table F.7.2-2 and F.7.2.2.3

Announce = Callable[[Announcement], AnnounceOutcome]
Amend = Callable[[str, str, StepState, tuple[AnnouncedInstance, ...] | None], AnnounceOutcome]


def performed_procedure_service(announce: Announce, amend: Amend) -> Service:
    """The service.

    Args:
        announce: makes a new step durable.
        amend: makes a change durable: UID, AE title of the peer, state, instances (None: as they were).
    """

    def create(event: Any) -> Dataset | None:
        uid = well_formed(event.request.AffectedSOPInstanceUID)
        if uid is None:
            raise Declined(INVALID_INSTANCE, "the step has no well-formed SOP Instance UID")  # PS3.4 F.7.2.1.2
        attributes = event.attribute_list
        state = _state(attributes)
        if state is None:
            raise Declined(MISSING_ATTRIBUTE, "no PerformedProcedureStepStatus")
        if state is not StepState.IN_PROGRESS:
            raise Declined(INVALID_ATTRIBUTE_VALUE, "a step begins IN PROGRESS")
        steps = list(items_of(attributes, "ScheduledStepAttributesSequence"))
        if not steps:
            raise Declined(MISSING_ATTRIBUTE, "no ScheduledStepAttributesSequence")
        if len(steps) > MAXIMUM_STEPS:
            raise Declined(RESOURCE_LIMITATION, "more scheduled steps than one procedure has")
        outcome = announce(
            Announcement(
                announcement_uid=uid,
                kind=AnnouncementKind.MPPS,
                source_ae=calling(event),
                state=state,
                studies=frozenset(uid_in(step, "StudyInstanceUID") for step in steps),
                instances=_instances(attributes) or (),
            )
        )
        if outcome is AnnounceOutcome.DUPLICATE:
            raise Declined(DUPLICATE_INSTANCE, "there is a step under this SOP Instance UID")
        return None

    def change(event: Any) -> Dataset | None:
        uid = well_formed(event.request.RequestedSOPInstanceUID)
        if uid is None:
            raise Declined(NO_SUCH_INSTANCE, "no well-formed SOP Instance UID")
        attributes = event.modification_list
        outcome = amend(uid, calling(event), _state(attributes) or StepState.IN_PROGRESS, _instances(attributes))
        if outcome is AnnounceOutcome.UNKNOWN:
            raise Declined(NO_SUCH_INSTANCE, "there is no step under this SOP Instance UID")
        if outcome is AnnounceOutcome.FOREIGN:
            raise Declined(NOT_AUTHORISED, "the step is another peer's")
        if outcome is AnnounceOutcome.ENDED:
            raise Declined(
                PROCESSING_FAILURE,
                "Performed Procedure Step Object may no longer be updated",
                _MAY_NO_LONGER_BE_UPDATED,
            )
        return None

    return Service(PERFORMED_PROCEDURE_STEP_CLASS_UID, create=create, set=change)


def _state(attributes: Dataset) -> StepState | None:
    value = attributes.get("PerformedProcedureStepStatus")
    if not value:
        return None
    try:
        return StepState(str(value))
    except ValueError:
        raise Declined(INVALID_ATTRIBUTE_VALUE, "unknown PerformedProcedureStepStatus") from None


def _instances(attributes: Dataset) -> tuple[AnnouncedInstance, ...] | None:
    """All instances of all series; None when the attribute isn't there at all.

    A change brings every item of the sequence, not only what is new (PS3.4 F.7.2.2.1).
    """
    if "PerformedSeriesSequence" not in attributes:
        return None
    return announced_instances(items_of(attributes, "PerformedSeriesSequence"), _references)


def _references(series: Dataset) -> Iterable[Dataset]:
    for keyword in ("ReferencedImageSequence", "ReferencedNonImageCompositeSOPInstanceSequence"):
        yield from items_of(series, keyword)
