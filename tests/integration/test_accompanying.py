"""What travels with a CT over the network: kept or discarded by group, our own results, and the disk's watermarks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import AE

from osteo_daemon.dicom.contexts import (
    ACCOMPANYING,
    ACCOMPANYING_CLASSES,
    SCREENED_CLASSES,
    TRANSFER_SYNTAXES,
    Accompanying,
    class_name,
    group_of,
    supported_contexts,
)
from osteo_daemon.dicom.report import SR_CLASSES
from osteo_daemon.dicom.report_objects import build_report_objects
from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import SpoolFull
from osteo_daemon.jobs.records import ReportKind, ReportObject
from osteo_daemon.jobs.room import Room
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import AccompanyingSettings, ReceiverSettings, Settings
from tests.fakes import CALLED, CALLING, LOOPBACK, local_receiver, settings_text, storescu, write_ct
from tests.peers import rejection
from tests.report_cases import short_case


def _store(state: Path) -> JobStore:
    return JobStore(f"sqlite:///{state / 'jobs.sqlite'}")


def test_every_group_is_a_setting_and_every_class_has_a_name() -> None:
    assert {group.value for group in Accompanying} == set(AccompanyingSettings.model_fields)
    assert set(ACCOMPANYING) == set(Accompanying)
    classes = (*SCREENED_CLASSES, *ACCOMPANYING_CLASSES)
    assert len(set(classes)) == len(classes) <= 127  # with verification, what one association may propose
    assert all(class_name(uid) != uid for uid in classes)
    assert all(group_of(uid) is not None for uid in ACCOMPANYING_CLASSES)
    assert not any(group_of(uid) for uid in SCREENED_CLASSES)


def test_segmentations_that_are_read_cannot_be_discarded() -> None:
    with pytest.raises(ValueError, match="accompanying"):
        Settings.model_validate(
            {"screener": {"vertebrae": "segmentation"}, "accompanying": {"segmentations": "discard"}}
        )


def test_every_class_is_negotiated_in_every_syntax_and_the_contexts_are_not_copied(tmp_path: Path) -> None:
    from copy import deepcopy

    contexts = supported_contexts()
    assert all(copy is original for copy, original in zip(deepcopy(contexts), contexts, strict=True))
    with local_receiver(tmp_path) as port:
        for syntax in TRANSFER_SYNTAXES:
            entity = AE(ae_title=CALLING)
            for uid in (*SCREENED_CLASSES, *ACCOMPANYING_CLASSES):
                entity.add_requested_context(uid, syntax)
            association = entity.associate(LOOPBACK, port, ae_title=CALLED)
            assert len(association.accepted_contexts) == len(SCREENED_CLASSES) + len(ACCOMPANYING_CLASSES)
            assert {str(context.transfer_syntax[0]) for context in association.accepted_contexts} == {syntax}
            association.release()


def _object(folder: Path, study: str, sop_class: str) -> Path:
    (path,) = write_ct(folder, count=1, study_uid=study, SOPClassUID=sop_class)
    return path


def _send(port: int, paths: list[Path], calling: str = CALLING) -> list[int]:
    return _send_all(port, [dcmread(path) for path in paths], calling)


def _send_all(port: int, objects: list[Dataset], calling: str = CALLING) -> list[int]:
    entity = AE(ae_title=calling)
    for uid in {str(entry.SOPClassUID) for entry in objects}:
        entity.add_requested_context(uid, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    association = entity.associate(LOOPBACK, port, ae_title=CALLED)
    assert association.is_established
    statuses = [int(association.send_c_store(entry).Status) for entry in objects]
    association.release()
    return statuses


def test_groups_are_kept_or_discarded_and_a_study_says_it_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    policy = '[accompanying]\npictures = "discard"\nraw = "keep"\npet = "discard"\n'
    with local_receiver(tmp_path, settings_text(tmp_path / "state", 0, extra=policy)) as port:
        ct = write_ct(tmp_path / "ct", count=2)
        study = str(dcmread(ct[0]).StudyInstanceUID)
        other = [_object(tmp_path / str(number), study, uids[0]) for number, uids in enumerate(ACCOMPANYING.values())]
        more = [_object(tmp_path / "more", study, ACCOMPANYING[Accompanying.PICTURES][0])]
        assert set(_send(port, [*ct, *other, *more])) == {0x0000}
        assert set(_send(port, [*other])) == {0x0000}
        store = _store(tmp_path / "state")
        job = store.job(study)
        assert job is not None
        assert (job.state, job.revision) == (JobState.RECEIVING, 1)
        kept = {entry.sop_class_uid for entry in store.instances(job)}
        discarded = {ACCOMPANYING[group][0] for group in (Accompanying.PICTURES, Accompanying.PET)}
        assert kept == {SCREENED_CLASSES[0]} | {uids[0] for uids in ACCOMPANYING.values()} - discarded
        files = list((tmp_path / "state" / "spool").rglob("*.dcm"))
        assert len(files) == 2 + len(ACCOMPANYING) - 2
        assert not list((tmp_path / "state" / "spool" / "tmp").iterdir())
        store.close()
    told = [line for line in "".join(capfd.readouterr()).splitlines() if "accompanying_discarded" in line]
    assert len(told) == 1
    assert "pet 1, pictures 2" in told[0]
    assert study in told[0]


def test_a_discarded_companion_neither_begins_nor_reopens_a_study(tmp_path: Path) -> None:
    policy = '[accompanying]\ndocuments = "discard"\n'
    with local_receiver(tmp_path, settings_text(tmp_path / "state", 0, extra=policy)) as port:
        store = _store(tmp_path / "state")
        document = ACCOMPANYING[Accompanying.DOCUMENTS][0]
        alone = _object(tmp_path / "alone", generate_uid(), document)
        assert _send(port, [alone]) == [0x0000]
        assert store.job(str(dcmread(alone).StudyInstanceUID)) is None
        ct = write_ct(tmp_path / "ct", count=1)
        assert _send(port, ct) == [0x0000]
        study = str(dcmread(ct[0]).StudyInstanceUID)
        store.mark_complete(study, who="test", reason="test")
        assert _send(port, [_object(tmp_path / "late", study, document)]) == [0x0000]
        job = store.job(study)
        assert job is not None
        assert (job.state, job.revision) == (JobState.READY, 1)
        store.close()


# ---- our own results -----------------------------------------------------------------------------------------------


def _coerced(data: bytes) -> Dataset:
    """As an archive sends it on that has changed the patient's name."""
    dataset = dcmread(BytesIO(data))
    dataset.PatientName = "Coerced^Name"
    return dataset


def test_our_own_results_of_every_kind_come_back_and_change_nothing(tmp_path: Path) -> None:
    """Segmentation, reports of every class, picture, key objects, PDF: as they were, coerced, and after their purge."""
    request = short_case()
    built = build_report_objects(request, list(SR_CLASSES), {"kos", "pdf"}).objects
    assert {entry.kind for entry in built} == {"seg", "sr", "sc", "kos", "pdf"}
    classes = {str(dcmread(BytesIO(entry.data)).SOPClassUID) for entry in built}
    assert len(classes) == 4 + len(SR_CLASSES)
    spool, uids = Spool(tmp_path / "state" / "spool"), []
    with local_receiver(tmp_path) as port:
        study = request.result.study_instance_uid
        assert _send(port, write_ct(tmp_path / "ct", count=1, study_uid=study)) == [0x0000]
        store = _store(tmp_path / "state")
        store.mark_complete(study, who="test", reason="test")
        job = store.claim("test", 60)
        assert job is not None
        reports = []
        for entry in built:
            stored = spool.store_report(study, entry.sop_instance_uid, [entry.data])
            kind, size, digest = ReportKind(entry.kind), stored.size_bytes, stored.sha256
            uids.append(entry.sop_instance_uid)
            reports.append(ReportObject(kind, entry.sop_class_uid, uids[-1], stored.path, size, digest, entry.variant))
        store.commit_report(job, {"schema": "osteo-result/1"}, reports, [])

        def state() -> tuple[object, ...]:
            now = store.job(study)
            assert now is not None
            files = sorted(path for path in (spool.root / "received").rglob("*") if path.is_file())
            return now.state, now.revision, len(store.events(study)), store.instances(now), files, store.quarantined()

        before = state()
        assert before[:2] == (JobState.REPORTED, 1)
        for back in ([dcmread(BytesIO(entry.data)) for entry in built], [_coerced(entry.data) for entry in built]):
            assert _send_all(port, back) == [0x0000] * len(built)
            assert state() == before
        store.purge_study(study, spool, "test", "test", force=True)
        purged = state()
        assert _send_all(port, [_coerced(entry.data) for entry in built]) == [0x0000] * len(built)
        assert state() == purged
        assert not any(store.stored_instance(uid) for uid in uids)
        store.close()


# ---- the disk ----------------------------------------------------------------------------------------------------


@contextmanager
def _disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A small file system of its own."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


MIB = 1 << 20


def _fill(disk: Path, leave_bytes: int) -> Path:
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    room = Room(disk, 0, 0).free_bytes
    filler.write_bytes(bytes(max(room - leave_bytes, 0)))
    return filler


def test_a_disk_that_fills_refuses_new_studies_first_then_all_and_keeps_room_for_reports(tmp_path: Path) -> None:
    backfill = f'[[sources]]\nae_title = "BACKFILL"\naddresses = ["{LOOPBACK}"]\npriority = "backfill"\n'
    with _disk(tmp_path / "disk", 64) as disk:
        limits = f"minimum_free_bytes = {8 * MIB}\nlow_free_bytes = {24 * MIB}"
        text = settings_text(disk / "state", 0, extra=backfill).replace("minimum_free_bytes = 0", limits)
        with local_receiver(tmp_path, text) as port:
            begun, fresh = write_ct(tmp_path / "begun", count=4, size=128), write_ct(tmp_path / "fresh", count=1)
            reserve = disk / "state" / "spool" / "reserve"
            assert reserve.stat().st_size == MIB
            assert _send(port, begun[:1], calling="BACKFILL") == [0x0000]

            filler = _fill(disk, 20 * MIB)  # low
            assert _send(port, fresh) == [0xA700]
            assert _send(port, begun[1:2]) == [0x0000]  # in progress
            # rejected-transient, by the presentation part of the provider: temporary congestion (PS3.8 table 9-21)
            assert rejection(port, "BACKFILL", abstract_syntax=SCREENED_CLASSES[0]) == (2, 3, 1)

            filler = _fill(disk, 6 * MIB)  # below the minimum
            assert _send(port, begun[2:3]) == [0xA700]

            _fill(disk, 0)  # nothing is left but the reserve
            spool = Spool(disk / "state" / "spool")  # as the worker opens it
            stored = spool.store_report("1.2.3", "1.2.3.4", [bytes(MIB // 2)])
            assert stored.path.stat().st_size == MIB // 2
            assert not reserve.exists()
            with pytest.raises(SpoolFull):
                spool.store_report("1.2.3", "1.2.3.5", [bytes(MIB)])
            acknowledged = {str(dcmread(path).SOPInstanceUID) for path in begun[:2]}
            store = _store(disk / "state")
            job = store.job(str(dcmread(begun[0]).StudyInstanceUID))
            assert job is not None
            assert {entry.sop_instance_uid for entry in store.instances(job) if entry.path.exists()} == acknowledged

            filler.unlink()
            assert _send(port, [*begun[2:], *fresh], calling="BACKFILL") == [0x0000] * 3
            store.close()
        assert reserve.stat().st_size == MIB  # filled again when there was room


def test_the_low_mark_follows_the_minimum_unless_it_is_set(tmp_path: Path) -> None:
    assert ReceiverSettings(minimum_free_bytes=5).low_watermark_bytes == 10
    assert ReceiverSettings(minimum_free_bytes=5, low_free_bytes=7).low_watermark_bytes == 7
    assert not Room(tmp_path, 0, 1 << 62).is_low  # no minimum: nothing is watched
    assert Room(tmp_path, 1, 1 << 62).is_low


def test_storescu_finishes_a_study_whose_companions_are_discarded(tmp_path: Path) -> None:
    policy = "".join(f'{group.value} = "discard"\n' for group in Accompanying)
    text = settings_text(tmp_path / "state", 0, extra=f"[accompanying]\n{policy}")
    with local_receiver(tmp_path, text) as port:
        ct = write_ct(tmp_path / "ct", count=2)
        study = str(dcmread(ct[0]).StudyInstanceUID)
        companions = [
            _object(tmp_path / str(number), study, uids[0]) for number, uids in enumerate(ACCOMPANYING.values())
        ]
        sent = storescu(port, [*ct, *companions], "-R")  # propose what the files need
        assert sent.returncode == 0, sent.stderr
        assert len(list((tmp_path / "state" / "spool").rglob("*.dcm"))) == 2
