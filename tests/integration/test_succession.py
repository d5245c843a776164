"""A later revision's report names the report that this very destination holds, never one that it does not have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pynetdicom import AE, build_context, evt

from osteo_daemon.dicom.report_forms import BuiltReport, needed_variants
from osteo_daemon.dicom.report_objects import build_report_objects
from osteo_daemon.dicom.succession import predecessor_uid, succeed
from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.reporting import PreviousReport
from osteo_daemon.settings import DestinationSettings
from tests.deliveries import PATIENCE_S, built_report, commit, ended, lanes, report, settings_for
from tests.fakes import LOOPBACK, CountingScp, a_free_port, until
from tests.report_cases import STUDY_UID, synthetic_case

COMPREHENSIVE_3D, COMPREHENSIVE = "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.88.33"
SEGMENTATION, SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.7"


@pytest.fixture(scope="module")
def first() -> BuiltReport:
    """Revision 1."""
    return built_report()


@pytest.fixture(scope="module")
def second(first: BuiltReport, tmp_path_factory: pytest.TempPathFactory) -> BuiltReport:
    """Revision 2 as the screener builds it: each form names the same form of revision 1."""
    folder = tmp_path_factory.mktemp("first")
    predecessors = {}
    for entry in first.objects:
        if entry.kind == "sr":
            path = folder / entry.sop_instance_uid
            path.write_bytes(entry.data)
            predecessors[entry.variant] = PreviousReport.read(path)
    request = dataclasses.replace(synthetic_case(), revision=2, predecessors=predecessors)
    destination = DestinationSettings(name="any", ae_title="PACS", host=LOOPBACK, port=104)
    return build_report_objects(request, needed_variants([destination]))


@contextmanager
def changing_peer(classes: list[str]) -> Iterator[tuple[int, list[pydicom.Dataset]]]:
    """A storage SCP that offers the classes that the list holds at the moment of an association."""
    stored: list[pydicom.Dataset] = []

    def requested(event: Any) -> None:
        event.assoc.acceptor.supported_contexts = [build_context(uid) for uid in classes]

    def store(event: Any) -> int:
        stored.append(event.dataset)
        return 0x0000

    entity = AE(ae_title="PACS")
    entity.supported_contexts = [build_context(SECONDARY_CAPTURE)]
    server = entity.start_server(
        (LOOPBACK, 0), block=False, evt_handlers=[(evt.EVT_REQUESTED, requested), (evt.EVT_C_STORE, store)]
    )
    assert server is not None
    try:
        yield server.server_address[1], stored
    finally:
        server.shutdown()


def reports(stored: Sequence[pydicom.Dataset]) -> list[pydicom.Dataset]:
    """The structured reports in the order in which they came."""
    return [dataset for dataset in stored if dataset.SOPClassUID in (COMPREHENSIVE_3D, COMPREHENSIVE)]


def named(dataset: pydicom.Dataset) -> tuple[str, str, str] | None:
    """Series, class and instance of the document that a report replaces."""
    for study in dataset.get("PredecessorDocumentsSequence", ()):
        assert study.StudyInstanceUID == STUDY_UID
        series = study.ReferencedSeriesSequence[0]
        instance = series.ReferencedSOPSequence[0]
        return (
            str(series.SeriesInstanceUID),
            str(instance.ReferencedSOPClassUID),
            str(instance.ReferencedSOPInstanceUID),
        )
    return None


def key(dataset: pydicom.Dataset) -> tuple[str, str, str]:
    """As `named`, of the report itself."""
    return str(dataset.SeriesInstanceUID), str(dataset.SOPClassUID), str(dataset.SOPInstanceUID)


def test_each_destination_gets_the_successor_of_what_it_holds(
    tmp_path: Path, first: BuiltReport, second: BuiltReport
) -> None:
    offered = [SEGMENTATION, COMPREHENSIVE, SECONDARY_CAPTURE]
    with changing_peer(offered) as (old_port, old), CountingScp() as modern:
        settings = settings_for(tmp_path, old_port, modern.port)
        store = commit(settings, first)
        with lanes(settings, store):
            for name in ("pacs0", "pacs1"):
                assert until(lambda name=name: ended(store, name), PATIENCE_S).outcome == "stored"
            # the archive is updated between the revisions: now it takes the newest class
            offered.insert(0, COMPREHENSIVE_3D)
            store.reprocess_study(STUDY_UID, "test", "again")
            report(store, settings, second)
            for name in ("pacs0", "pacs1"):
                until(lambda name=name: (now := ended(store, name)) and now.revision == 2, PATIENCE_S)
        older, newer = reports(old)
        assert (older.SOPClassUID, newer.SOPClassUID) == (COMPREHENSIVE, COMPREHENSIVE_3D)
        assert named(newer) == key(older)
        # the other one holds the form that was built for it: its bytes are those of the build
        built = {entry.sop_instance_uid for entry in second.objects}
        older, newer = reports(list(modern.data_sets.values()))
        assert named(newer) == key(older)
        assert newer.SOPInstanceUID in built
    store.close()


def test_a_report_that_never_arrived_is_not_named(tmp_path: Path, first: BuiltReport, second: BuiltReport) -> None:
    port = a_free_port()
    settings = settings_for(tmp_path, port, give_up_after_seconds=0.2, breaker_failures=1)
    store = commit(settings, first)
    with lanes(settings, store):
        assert until(lambda: ended(store), PATIENCE_S).state is DeliveryState.REFUSED
    store.reprocess_study(STUDY_UID, "test", "again")
    settings = settings_for(tmp_path, port)
    report(store, settings, second)
    # its first report is refused for now: the second attempt sends the same bytes
    with CountingScp(port=port, answer=lambda _uid, count: 0xA700 if count < 2 else 0x0000) as pacs:
        with lanes(settings, store):
            delivery = until(lambda: (now := ended(store)) and now.revision == 2 and now, PATIENCE_S)
        assert delivery.state is DeliveryState.DELIVERED
        (only,) = reports(list(pacs.data_sets.values()))
        assert named(only) is None
        assert len(pacs.received) == 6
        assert all(len(digests) == 1 for digests in pacs.digests.values())
    store.close()


def test_the_same_input_gives_the_same_bytes_and_another_predecessor_another_uid(
    tmp_path: Path, first: BuiltReport, second: BuiltReport
) -> None:
    paths = {}
    for number, built in enumerate((first, second)):
        for entry in built.objects:
            if entry.kind == "sr":
                paths[number, entry.variant] = tmp_path / entry.sop_instance_uid
                paths[number, entry.variant].write_bytes(entry.data)
    new, held = paths[1, "comprehensive-3d+seg"], paths[0, "comprehensive"]
    assert predecessor_uid(new) == paths[0, "comprehensive-3d+seg"].name
    made = succeed(new, held)
    assert made == succeed(new, held)
    alone = succeed(new, None)
    assert len({made.sop_instance_uid, alone.sop_instance_uid, new.name}) == 3
    for succession, expected in ((made, held.name), (alone, None)):
        path = tmp_path / "made"
        path.write_bytes(succession.data)
        assert predecessor_uid(path) == expected
        before, after = pydicom.dcmread(new), pydicom.dcmread(path)
        assert after.file_meta.MediaStorageSOPInstanceUID == after.SOPInstanceUID == succession.sop_instance_uid
        for dataset in (before, after):
            dataset.pop("PredecessorDocumentsSequence", None)
            del dataset.SOPInstanceUID
        assert before == after
