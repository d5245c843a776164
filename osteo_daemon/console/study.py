"""One study: its history, its result with every flag explained, its picture, its deliveries; and what may be done."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pydicom
from PIL import Image
from pydicom.errors import InvalidDicomError
from pydicom.uid import SecondaryCaptureImageStorage
from starlette.responses import RedirectResponse, Response

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.codes import Action
from osteo_daemon.audit.events import AuditPatient, AuditStudy
from osteo_daemon.console import formats
from osteo_daemon.console.pages import NotDone, NotHere, Visit
from osteo_daemon.dicom.identity import patient_of
from osteo_daemon.domain.findings import ScreeningResult
from osteo_daemon.domain.job import FINISHED, TRANSITIONS, Job, JobState, Priority
from osteo_daemon.handling import tell_read
from osteo_daemon.jobs.records import DeliveryState, ReportKind
from osteo_daemon.jobs.store import JobStore

_RETRIED = frozenset({JobState.HELD, JobState.FAILED, JobState.EXCLUDED})
_REPROCESSED = frozenset({JobState.REPORTED, JobState.DELIVERED, *_RETRIED})
_ENDED = frozenset({DeliveryState.REFUSED, DeliveryState.UNPROVEN})


def show_study(visit: Visit) -> Response:
    """The page of a study; that somebody looks at it is an audit message."""
    store, job = visit.node.store, _job(visit)
    uid = job.study_instance_uid
    summary = store.recent(study_instance_uid=uid, limit=1)[0]
    patient = _patient(store, job)
    tell_read(store, job, events.person(visit.person.name, visit.address))
    objects = store.report_objects(uid, also_removed=True)
    return visit.show(
        "study.html",
        job=job,
        summary=summary,
        result=_result(store, uid),
        wording=visit.node.wording,
        patient=patient,
        events=store.events(uid),
        objects=objects,
        picture=_picture(store, uid) is not None,
        deliveries=store.deliveries(study_instance_uid=uid, limit=200),
        ended=_ENDED,
        possible=_possible(job),
        priorities=[priority.name.lower() for priority in Priority],
    )


def show_picture(visit: Visit) -> Response:
    """The picture of the latest report, which shows no identity."""
    job = _job(visit)
    path = _picture(visit.node.store, job.study_instance_uid)
    if path is None:
        raise NotHere("no picture is kept of this study")
    try:
        pixels = pydicom.dcmread(path).pixel_array
    except (OSError, InvalidDicomError, ValueError, AttributeError) as error:
        raise NotDone(f"the picture cannot be read: {type(error).__name__}") from None
    _tell(visit, job, Action.READ, {str(SecondaryCaptureImageStorage): 1})
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return Response(target.getvalue(), media_type="image/png")


def act_on_study(visit: Visit) -> Response:
    """Hold, release, retry, reprocess or reprioritise, with the person's reason."""
    job, store = _job(visit), visit.node.store
    uid, who, reason = job.study_instance_uid, visit.person.name, visit.reason()
    acts: dict[str, Callable[[], None]] = {
        "hold": lambda: store.hold_study(uid, who, reason),
        "release": lambda: store.release_study(uid, who, reason),
        "retry": lambda: store.retry_study(uid, who, reason),
        "reprocess": lambda: store.reprocess_study(uid, who, reason),
        "prioritise": lambda: store.prioritise_study(uid, _priority(visit), who, reason),
    }
    act = acts.get(visit.names["act"])
    if act is None:
        raise NotHere
    act()
    _tell(visit, job, Action.UPDATE)
    visit.say(f"Done: {visit.names['act']}.")
    return RedirectResponse(f"/studies/{uid}", 303)


def act_on_delivery(visit: Visit) -> Response:
    """Send a dead letter or an unproven delivery again, or settle it."""
    store, who = visit.node.store, visit.person.name
    if not visit.names["number"].isdecimal():
        raise NotHere
    number = int(visit.names["number"])
    act = visit.names["act"]
    if act not in ("resend", "accept"):
        raise NotHere
    reason = visit.reason() if act == "accept" else ""
    try:
        delivery = store.resend(number, who) if act == "resend" else store.accept_delivery(number, who, reason)
    except KeyError:
        raise NotDone("only refused and unproven deliveries wait for a person; this one does not") from None
    job = store.job(delivery.study_instance_uid)
    if job is not None:
        _tell(visit, job, Action.UPDATE)
    visit.say(f"Done: {act} to {delivery.destination}.")
    return RedirectResponse(f"/studies/{delivery.study_instance_uid}", 303)


def _job(visit: Visit) -> Job:
    uid = visit.names["uid"]
    job = visit.node.store.job(uid) if formats.is_uid(uid) else None
    if job is None:
        raise NotHere("there is no such study")
    return job


def _patient(store: JobStore, job: Job) -> AuditPatient:
    images = store.instances(job)
    return patient_of(images[0].path) if images else AuditPatient()


def _result(store: JobStore, uid: str) -> ScreeningResult | None:
    document = store.result(uid)
    try:
        return None if document is None else ScreeningResult.from_json(document)
    except ValueError:
        return None  # of another version


def _possible(job: Job) -> list[str]:
    """What the store would not refuse, as it stands now."""
    wanted = {
        "hold": JobState.HELD in TRANSITIONS[job.state],
        "release": job.state is JobState.HELD,
        "retry": job.state in _RETRIED,
        "reprocess": job.state in _REPROCESSED,
        "prioritise": job.state not in FINISHED,
    }
    return [act for act, possible in wanted.items() if possible]


def _priority(visit: Visit) -> Priority:
    try:
        return Priority[visit.form.get("priority", "").upper()]
    except KeyError:
        raise NotDone("there is no such class of priority") from None


def _picture(store: JobStore, uid: str) -> Path | None:
    pictures = [entry.path for entry in store.report_objects(uid) if entry.kind is ReportKind.SC]
    return next((path for path in reversed(pictures) if path.exists()), None)


def _tell(visit: Visit, job: Job, action: Action, classes: Mapping[str, int] = MappingProxyType({})) -> None:
    """The audit message of an act of the person on a study, or on these objects of it."""
    if trail.is_open():
        who = events.person(visit.person.name, visit.address)
        study = AuditStudy(job.study_instance_uid, classes)
        trail.record(events.instances_accessed([study], _patient(visit.node.store, job), who, action))
