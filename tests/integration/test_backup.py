"""Backup beside a writer, restore, reconcile, go on; and what the integrity check sees."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from osteo_daemon.cli import cli
from osteo_daemon.dicom.header import file_header
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.errors import ConfigurationError, Damaged
from osteo_daemon.integrity import IntegrityReport, Problem, check_integrity
from osteo_daemon.jobs.backup import make_backup, restore_backup
from osteo_daemon.jobs.inventory import LIFT
from osteo_daemon.jobs.records import NewDelivery, ReportKind, ReportObject
from osteo_daemon.jobs.spool import Spool, StoredFile
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import Settings
from tests.conftest import require_command
from tests.postgres import Cluster

CT = "1.2.840.10008.5.1.4.1.1.2"
LITTLE = "1.2.840.10008.1.2.1"


def data_set_bytes(study: str, series: str, uid: str, patient_name: str = "A^B") -> bytes:
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID = CT, uid
    header.PatientName = patient_name
    header.StudyInstanceUID, header.SeriesInstanceUID = study, series
    target = DicomBytesIO()
    target.is_little_endian, target.is_implicit_VR = True, False
    write_dataset(target, header)
    return target.getvalue()


def node(folder: Path) -> tuple[Settings, JobStore, Spool]:
    settings = Settings(state_dir=folder)
    return settings, JobStore(settings.database_url), Spool(settings.spool_dir)


def receive(store: JobStore, spool: Spool, study: str, number: int) -> SopInstance:
    uid = f"{study}.1.{number}"
    data = data_set_bytes(study, f"{study}.1", uid)
    stored = spool.store_instance(study, f"{study}.1", uid, [file_header(CT, uid, LITTLE), data])
    instance = SopInstance(study, f"{study}.1", CT, uid, LITTLE, stored.path, stored.size_bytes, stored.sha256)
    store.record_instance(instance, "CT1")
    return instance


def report(store: JobStore, spool: Spool, study: str) -> ReportObject:
    store.mark_complete(study, who="test", reason="test")
    job = store.claim("w", 60)
    assert job is not None
    uid = f"{study}.9.{job.revision}"
    stored = spool.store_report(study, uid, [b"report"])
    entry = ReportObject(ReportKind.SR, "1.2", uid, stored.path, stored.size_bytes, stored.sha256)
    store.commit_report(job, {"schema": "osteo-result/1"}, [entry], [NewDelivery("pacs", (uid,))])
    return entry


def checked(store: JobStore, spool: Spool, *, repair: bool = False) -> IntegrityReport:
    return check_integrity(store, spool, repair=repair, young_seconds=0)


def problems(found: IntegrityReport) -> list[Problem]:
    return sorted(finding.problem for finding in found.findings)


@pytest.fixture
def working(tmp_path: Path) -> Iterator[tuple[Settings, JobStore, Spool]]:
    settings, store, spool = node(tmp_path / "state")
    for number in range(3):
        receive(store, spool, "1.1", number)
    report(store, spool, "1.1")
    receive(store, spool, "1.2", 1)
    yield settings, store, spool
    store.close()


WRITER = """
import itertools, sys
from pathlib import Path
from tests.integration.test_backup import node, receive
_, store, spool = node(Path(sys.argv[1]))
for number in itertools.count():
    instance = receive(store, spool, f"1.5.{number // 3}", number % 3)
    print(instance.sop_instance_uid, flush=True)
"""


@pytest.mark.parametrize("spool_too", [True, False])
def test_backup_beside_a_writer_restore_and_go_on(tmp_path: Path, spool_too: bool) -> None:
    settings, store, spool = node(tmp_path / "state")
    report(store, spool, (first := receive(store, spool, "1.1", 1)).study_instance_uid)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "state")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert writer.stdout is not None
    before = [writer.stdout.readline().strip() for _ in range(20)]
    made = make_backup(settings.database_url, settings.spool_dir, tmp_path / "backup", spool=spool_too)
    after = [writer.stdout.readline().strip() for _ in range(10)]
    writer.kill()
    after += [line.strip() for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    writer.wait()
    store.close()
    assert (made.files > 20) == spool_too

    # the machine is lost; with the spool in the backup another place takes over, else only the database was lost
    new = Settings(state_dir=tmp_path / "new" if spool_too else tmp_path / "state")
    assert new.database_file is not None
    if not spool_too:
        for end in ("", "-wal", "-shm"):
            Path(f"{new.database_file}{end}").unlink(missing_ok=True)
    restored = restore_backup(tmp_path / "backup", new.database_url, new.database_file, new.spool_dir)
    spool = Spool(new.spool_dir)
    assert all(restored.stored_instance(uid) is not None for uid in before)
    kept = restored.stored_instance(first.sop_instance_uid)
    assert kept is not None
    assert kept.path.is_relative_to(new.spool_dir)

    found = checked(restored, spool, repair=True)
    assert found.clean
    assert not {Problem.FILE_MISSING, Problem.FILE_CHANGED} & set(problems(found))
    assert checked(restored, spool).clean
    if not spool_too:
        # what was acknowledged after the backup is there again, from its files
        assert all(restored.stored_instance(uid) is not None for uid in after)

    # work goes on: the delivery that waited is sent with the same bytes, a study that waited is screened
    delivery = restored.claim_delivery("d", 60)
    assert delivery is not None
    assert delivery.unsent[0].path.read_bytes() == b"report"
    restored.mark_complete("1.5.0", who="test", reason="test")
    job = restored.claim("w", 60)
    assert job is not None
    assert (job.study_instance_uid, job.revision) == ("1.5.0", 1 + LIFT)
    assert all(entry.path.exists() for entry in restored.instances(job))
    restored.close()


def test_a_store_lost_for_good_is_made_again_from_its_files(working: tuple[Settings, JobStore, Spool]) -> None:
    settings, store, spool = working
    store.close()
    assert settings.database_file is not None
    for end in ("", "-wal", "-shm"):
        Path(f"{settings.database_file}{end}").unlink(missing_ok=True)
    empty = JobStore(settings.database_url)
    found = checked(empty, spool)
    assert problems(found) == [Problem.REPORT_UNUSED, *[Problem.ROW_MISSING] * 4]
    assert not found.clean
    assert checked(empty, spool, repair=True).clean
    jobs = {job.study_instance_uid: job for job in empty.recent()}
    assert {uid: (job.state, job.instances) for uid, job in jobs.items()} == {
        "1.1": (JobState.RECEIVING, 3),
        "1.2": (JobState.RECEIVING, 1),
    }
    # 1.1 was reported once: no UID of that report may come again with other bytes
    assert (jobs["1.1"].revision, jobs["1.2"].revision) == (1 + LIFT, 1)
    empty.close()


def test_the_check_names_every_kind_of_damage(working: tuple[Settings, JobStore, Spool]) -> None:
    _settings, store, spool = working
    assert checked(store, spool).findings == ()
    first, second, third = store.instances(store.job("1.1"))  # type: ignore[arg-type]
    first.path.unlink()
    second.path.write_bytes(second.path.read_bytes()[:-1] + b"!")
    third.path.write_bytes(b"short")
    stray = spool.store_instance("1.7", "1.7.1", "1.7.1.1", [b"no DICOM"])
    (spool.root / "tmp" / "999999999-abc").write_bytes(b"x")
    with store._writing() as connection:
        connection.exec_driver_sql("UPDATE job_counts SET jobs = 7 WHERE count_id = 1")
        connection.exec_driver_sql("UPDATE studies SET instances = 99 WHERE study_instance_uid = '1.2'")
    expected = [
        Problem.COUNT_WRONG,
        Problem.COUNT_WRONG,
        Problem.FILE_CHANGED,
        Problem.FILE_CHANGED,
        Problem.FILE_MISSING,
        Problem.FILE_UNREADABLE,
        Problem.LEFTOVER,
    ]
    assert problems(checked(store, spool)) == expected
    quick = check_integrity(store, spool, digests=False, young_seconds=0)
    assert problems(quick).count(Problem.FILE_CHANGED) == 1  # of the same size: only the digest tells
    mended = checked(store, spool, repair=True)
    assert sorted(finding.problem for finding in mended.findings if finding.repaired) == [
        Problem.COUNT_WRONG,
        Problem.COUNT_WRONG,
        Problem.LEFTOVER,
    ]
    assert stray.path.exists()  # nothing that was received is ever removed
    assert problems(checked(store, spool)) == expected[2:6]
    # the sender sends the study again: the lost file comes back under its row
    receive(store, spool, "1.1", 0)
    assert Problem.FILE_MISSING not in problems(checked(store, spool))


def test_a_file_that_a_later_header_replaced_is_only_a_note(working: tuple[Settings, JobStore, Spool]) -> None:
    _settings, store, spool = working
    uid = "1.2.1.1"
    data = data_set_bytes("1.2", "1.2.1", uid, patient_name="NEW^NAME")
    stored = spool.store_instance("1.2", "1.2.1", uid, [file_header(CT, uid, LITTLE), data])
    other = SopInstance("1.2", "1.2.1", CT, uid, LITTLE, stored.path, stored.size_bytes, stored.sha256)
    store.replace_instance(other, "CT1")
    found = checked(store, spool)
    assert (problems(found), found.clean) == ([Problem.SUPERSEDED], True)


def test_quarantined_bytes_are_checked_too(working: tuple[Settings, JobStore, Spool]) -> None:
    _settings, store, spool = working
    stored = spool.store_instance("1.8", "1.8.1", "1.8.1.1", [b"conflict"])
    kept: StoredFile = spool.quarantine("1.8", "1.8.1.1", stored)
    instance = SopInstance("1.8", "1.8.1", CT, "1.8.1.1", LITTLE, kept.path, kept.size_bytes, kept.sha256)
    store.quarantine_instance(instance, "CT1", "other pixels")
    assert checked(store, spool).findings == ()
    kept.path.unlink()
    assert problems(checked(store, spool)) == [Problem.FILE_MISSING]


def test_nothing_is_overwritten_and_no_changed_backup_restored(
    tmp_path: Path, working: tuple[Settings, JobStore, Spool]
) -> None:
    settings, _store, _spool = working
    backup = tmp_path / "backup"
    make_backup(settings.database_url, settings.spool_dir, backup, spool=True)
    with pytest.raises(ConfigurationError, match="exists"):
        make_backup(settings.database_url, settings.spool_dir, backup, spool=True)
    with pytest.raises(ConfigurationError, match="exists"):
        restore_backup(backup, settings.database_url, settings.database_file, settings.spool_dir)
    new = Settings(state_dir=tmp_path / "new")
    other = Spool(new.spool_dir).store_instance("1.1", "1.1.1", "1.1.1.1", [b"x"])
    with pytest.raises(ConfigurationError, match="holds files"):
        restore_backup(backup, new.database_url, new.database_file, new.spool_dir)
    other.path.unlink()
    with (backup / "jobs.sqlite").open("r+b") as file:
        file.seek(5000)
        file.write(b"changed")
    with pytest.raises(Damaged, match="changed"):
        restore_backup(backup, new.database_url, new.database_file, new.spool_dir)
    with pytest.raises(Damaged, match="no backup"):
        restore_backup(tmp_path, new.database_url, new.database_file, new.spool_dir)


def test_commands(tmp_path: Path, working: tuple[Settings, JobStore, Spool]) -> None:
    settings, _store, _spool = working
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text(f'state_dir = "{settings.state_dir}"\n')
    new.write_text(f'state_dir = "{tmp_path / "new"}"\n')
    run = CliRunner().invoke
    assert "clean" in run(cli, ["fsck", "--config", str(old)]).output
    made = run(cli, ["backup", str(tmp_path / "backup"), "--config", str(old)])
    assert (made.exit_code, "5 files" in made.output) == (0, True)
    restored = run(cli, ["restore", str(tmp_path / "backup"), "--config", str(new)])
    assert "2 studies restored" in restored.output
    next((tmp_path / "new" / "spool" / "received").rglob("*.dcm")).write_bytes(b"broken")
    shown = run(cli, ["fsck", "--json", "--config", str(new)])
    document = json.loads(shown.output)
    assert (shown.exit_code, document["clean"], document["files"]) == (1, False, 5)
    assert [finding["problem"] for finding in document["findings"]] == ["file_changed"]


def test_postgresql_goes_through_its_own_programs(
    tmp_path: Path, postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_command("pg_dump")
    url, spool = postgres.new(), Spool(tmp_path / "spool")
    store = JobStore(url)
    receive(store, spool, "1.1", 1)
    report(store, spool, "1.1")
    receive(store, spool, "1.2", 1)
    made = make_backup(url, spool.root, tmp_path / "backup", spool=True)
    assert made.files == 3
    new_url = postgres.new(migrated=False)
    restored = restore_backup(tmp_path / "backup", new_url, None, tmp_path / "new" / "spool")
    assert checked(restored, Spool(tmp_path / "new" / "spool")).findings == ()
    assert {job.study_instance_uid: job.revision for job in restored.recent()} == {"1.1": 1, "1.2": 1 + LIFT}
    with pytest.raises(Exception, match="pg_restore ended"):
        restore_backup(tmp_path / "backup", new_url, None, tmp_path / "third" / "spool")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="pg_dump is not installed"):
        make_backup(url, spool.root, tmp_path / "another", spool=False)
    assert not (tmp_path / "another").exists()
    store.close()
    restored.close()
