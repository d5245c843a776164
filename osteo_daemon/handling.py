"""What is done to studies that are here, as the audit trail tells it: they are read, and they are removed."""

from __future__ import annotations

from collections import Counter

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.events import AuditPatient, AuditStudy
from osteo_daemon.audit.message import AuditMessage, Participant
from osteo_daemon.dicom.identity import patient_of
from osteo_daemon.domain.job import Job
from osteo_daemon.jobs.store import JobStore


def tell_read(store: JobStore, job: Job, who: Participant) -> None:
    """A process reads a study's images."""
    if not trail.is_open():
        return
    instances = store.instances(job)
    classes = dict(Counter(instance.sop_class_uid for instance in instances))
    patient = patient_of(instances[0].path) if instances else AuditPatient()
    trail.record(events.instances_accessed([AuditStudy(job.study_instance_uid, classes)], patient, who))


def deletion_of(store: JobStore, study_instance_uid: str, who: Participant) -> AuditMessage | None:
    """The message to record once the study's files are gone: what there is, is looked up now. None: nobody listens."""
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
