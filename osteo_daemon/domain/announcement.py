"""What a peer says of objects that it made or has: performed procedure steps and availability notifications."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class AnnouncementKind(StrEnum):
    """Which service brought it."""

    MPPS = "mpps"  # Modality Performed Procedure Step (PS3.4 annex F)
    IAN = "ian"  # Instance Availability Notification (PS3.4 annex R)


class StepState(StrEnum):
    """Performed Procedure Step Status (0040,0252); an availability notification is COMPLETED from the start."""

    IN_PROGRESS = "IN PROGRESS"
    COMPLETED = "COMPLETED"
    DISCONTINUED = "DISCONTINUED"


@dataclass(frozen=True, slots=True)
class AnnouncedInstance:
    """One object of a list."""

    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True)
class Announcement:
    """One list as it stands.

    Attributes:
        announcement_uid: SOP Instance UID of the step or notification.
        studies: Study Instance UIDs; one step may serve several studies.
    """

    announcement_uid: str
    kind: AnnouncementKind
    source_ae: str
    state: StepState
    studies: frozenset[str]
    instances: tuple[AnnouncedInstance, ...]


class AnnounceOutcome(StrEnum):
    """What became of an announcement or of a change to one."""

    DONE = "done"
    DUPLICATE = "duplicate"  # there is one under this UID
    UNKNOWN = "unknown"  # there is none under this UID
    FOREIGN = "foreign"  # it is another peer's
    ENDED = "ended"  # the step has ended: it takes no more changes
