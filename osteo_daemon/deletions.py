"""The removal of a study, as the audit trail tells it: what there was is looked up before it goes."""

from __future__ import annotations

from collections import Counter

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.events import AuditPatient, AuditStudy
from osteo_daemon.audit.message import AuditMessage, Participant
from osteo_daemon.dicom.identity import patient_of
from osteo_daemon.jobs.store import JobStore


def deletion_of(store: JobStore, study_instance_uid: str, who: Participant) -> AuditMessage | None:
    """The message to record once the study's files are gone; None where nobody listens."""
    if not trail.is_open():
        return None
    inventory = store.inventory_of(study_instance_uid)
    job = store.job(study_instance_uid)
    instances = [] if job is None else store.instances(job)
    files = [] if inventory is None else [entry.path for entry in inventory.files]
    there = next((path for path in files if path.exists()), None)
    patient = AuditPatient() if there is None else patient_of(there)
    classes = dict(Counter(instance.sop_class_uid for instance in instances))
    return events.study_deleted(AuditStudy(study_instance_uid, classes), patient, who)


def tell(message: AuditMessage | None) -> None:
    """Record what `deletion_of` prepared."""
    if message is not None:
        trail.record(message)
