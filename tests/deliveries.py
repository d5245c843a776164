"""A study that waits for delivery, and lanes that deliver it: what the tests of the deliverer share."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from osteo_daemon.deliverer import Lane
from osteo_daemon.dicom.report_forms import BuiltReport, needed_variants
from osteo_daemon.dicom.report_objects import build_report_objects
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.records import Delivery, DeliveryState, NewDelivery, ReportKind, ReportObject
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import DestinationSettings, Settings
from tests.fakes import LOOPBACK
from tests.report_cases import STUDY_UID, synthetic_case

PATIENCE_S = 120.0
SENT = ("", "comprehensive-3d+seg")
"""Variants of the objects that a destination gets which takes everything."""


def settings_for(folder: Path, *ports: int, commitment: str = "none", **deliverer: Any) -> Settings:
    """One node with a destination for each port, quick to retry."""
    timing = {
        "poll_seconds": 0.05,
        "retry_base_seconds": 0.1,
        "retry_maximum_seconds": 0.3,
        "probe_maximum_seconds": 0.3,
        # far beyond any wait for a core: a time-out that a test is not about would be one more attempt
        "connect_timeout_seconds": 60,
        "dimse_timeout_seconds": 60,
        **deliverer,
    }
    destinations = [
        {"name": f"pacs{number}", "ae_title": "PACS", "host": LOOPBACK, "port": port, "commitment": commitment}
        for number, port in enumerate(ports)
    ]
    return Settings.model_validate({"state_dir": folder / "state", "destinations": destinations, "deliverer": timing})


@functools.cache
def built_report() -> BuiltReport:
    """All objects that a destination with the default settings may need; built once in a process."""
    destination = DestinationSettings(name="any", ae_title="PACS", host=LOOPBACK, port=104)
    return build_report_objects(synthetic_case(), needed_variants([destination]))


def spooled(folder: Path, built: BuiltReport) -> list[ReportObject]:
    """The objects in a spool, as the store knows them."""
    spool = Spool(folder)
    found = []
    for entry in built.objects:
        stored = spool.store_report(STUDY_UID, entry.sop_instance_uid, [entry.data])
        found.append(
            ReportObject(
                ReportKind(entry.kind),
                entry.sop_class_uid,
                entry.sop_instance_uid,
                stored.path,
                stored.size_bytes,
                stored.sha256,
                entry.variant,
            )
        )
    return found


def commit(settings: Settings, built: BuiltReport) -> JobStore:
    """A store in which a study was received, screened and reported."""
    store = JobStore(settings.database_url)
    receive(store, settings)
    report(store, settings, built)
    return store


def receive(store: JobStore, settings: Settings) -> None:
    """A study of one slice, complete."""
    source = SopInstance(
        study_instance_uid=STUDY_UID,
        series_instance_uid=f"{STUDY_UID}.2",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid=f"{STUDY_UID}.2.1",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        path=settings.spool_dir / "source",
        size_bytes=1,
        sha256="0" * 64,
    )
    store.record_instance(source, "CT1")
    store.mark_complete(STUDY_UID, who="test", reason="all sent")


def report(store: JobStore, settings: Settings, built: BuiltReport) -> None:
    """The study that waits is screened; its objects wait for every destination."""
    job = store.claim("test", 60, 3)
    assert job is not None
    objects = spooled(settings.spool_dir, built)
    deliveries = [
        NewDelivery(entry.name, tuple(each.sop_instance_uid for each in built.for_destination(entry)))
        for entry in settings.destinations
    ]
    store.commit_report(job, {"schema": "osteo-result/1"}, objects, deliveries)


@contextmanager
def lanes(settings: Settings, store: JobStore) -> Iterator[list[Lane]]:
    """Run the deliverer's lanes in this process."""
    stopping = threading.Event()
    running = [Lane(settings, destination, store, stopping) for destination in settings.destinations]
    for lane in running:
        lane.start()
    try:
        yield running
    finally:
        stopping.set()
        for lane in running:
            lane.join(90)
            assert not lane.is_alive()


def ended(store: JobStore, destination: str = "pacs0") -> Delivery | None:
    """The destination's last delivery once it is delivered, unproven or refused."""
    return reached(
        store, DeliveryState.DELIVERED, DeliveryState.UNPROVEN, DeliveryState.REFUSED, destination=destination
    )


def reached(store: JobStore, *states: DeliveryState, destination: str = "pacs0") -> Delivery | None:
    """The destination's last delivery once it is in one of these states."""
    delivery = store.deliveries(destination=destination, limit=1)[0]
    return delivery if delivery.state in states else None


def data_set_digest(data: bytes) -> str:
    """SHA-256 of a Part 10 file's data set without its meta information (PS3.10 7.1)."""
    group_length = int.from_bytes(data[140:144], "little")
    return hashlib.sha256(data[144 + group_length :]).hexdigest()
