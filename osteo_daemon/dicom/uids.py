"""Unique identifiers of what this node makes: always the same UID for the same content.

A UID is ``2.25.`` followed by a UUID as a decimal number (PS3.5 B.2). The UUIDs are name-based (RFC 9562, version 5),
so that a report built twice from the same result carries the same SOP Instance UID and a peer sees one object.
"""

from __future__ import annotations

import uuid

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:osteo-daemon:dicom")


def derived_uid(*parts: str) -> str:
    """UID derived from ``parts``; the order counts and no two lists of parts share a name."""
    # a length before each part: ("ab", "c") and ("a", "bc") must not meet
    name = "".join(f"{len(part)}:{part}" for part in parts)
    return f"2.25.{uuid.uuid5(_NAMESPACE, name).int}"


IMPLEMENTATION_CLASS_UID = derived_uid("implementation class")
"""Implementation Class UID: of objects that this node writes (0002,0012) and of its associations (PS3.7 D.3.3.2)."""

ASSOCIATION_VERSION_NAME = "OSTEO_DAEMON"
"""Implementation Version Name of associations: no version, which would tell an attacker more than a peer."""


def implementation_version_name(software_version: str) -> str:
    """Implementation Version Name (0002,0013): at most 16 characters (VR SH)."""
    return f"OSTEO_{software_version}"[:16]


def device_uid(software_version: str, models: tuple[str, ...]) -> str:
    """Device UID (0018,1002): a new one for every version of the software or of a model."""
    return derived_uid("device", software_version, *models)


def tracking_uid(study_instance_uid: str, level: str, what: str) -> str:
    """Tracking UID of a measured thing; stays the same over all revisions of a study's report."""
    return derived_uid("tracking", study_instance_uid, level, what)


def result_series_uid(kind: str, study_instance_uid: str, software_version: str) -> str:
    """Series Instance UID of one kind of result; one series has one equipment, hence the version."""
    return derived_uid("series", kind, study_instance_uid, software_version)


def result_instance_uid(
    sop_class_uid: str, variant: str, study_instance_uid: str, revision: int, digest: str, software_version: str
) -> str:
    """SOP Instance UID of a result object.

    Args:
        digest: over the result as reported, the models and the effective settings; never over durations.
    """
    return derived_uid("instance", sop_class_uid, variant, study_instance_uid, str(revision), digest, software_version)
