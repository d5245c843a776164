"""Files are the truth: whatever the job store has forgotten is screened after the receiver's next start."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydicom import dcmread

from osteo_daemon.dicom.received import received_file
from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.reconciliation import UNKNOWN_SOURCE, Reconciliation
from tests.fakes import local_receiver, receiver_process, storescu, until, write_ct
from tests.stores import complete_quiet


class Node:
    """A node's state folder between the lives of its receivers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        self.database = self.state / "jobs.sqlite"

    def receive(self, files: list[Path]) -> str:
        """A receiver's whole life, with a clean end; returns the study's UID."""
        with local_receiver(self.folder) as port:
            assert storescu(port, files).returncode == 0
        return str(dcmread(files[0]).StudyInstanceUID)

    def store(self) -> JobStore:
        return JobStore(f"sqlite:///{self.database}")

    def spool(self) -> Spool:
        return Spool(self.state / "spool")

    def forget(self, statement: str, *parameters: str) -> None:
        connection = sqlite3.connect(self.database)
        with connection:
            connection.execute(statement, parameters)
        connection.close()

    def reconcile(self) -> tuple[bool, dict[str, int]]:
        """Reconcile to the end; whether there was anything to look at, and the instances of every study."""
        store = self.store()
        reconciliation = Reconciliation(store, self.spool())
        pending = reconciliation.pending
        reconciliation.start()
        if pending:
            until(lambda: not reconciliation.pending)
        reconciliation.stop()
        found = {study.study_instance_uid: len(study.files) for study in store.inventory()}
        assert all(study.counted_instances == len(study.files) for study in store.inventory())
        store.close()
        return pending, found


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_study_received_after_the_backup_is_screened_after_its_restore(node: Node, tmp_path: Path) -> None:
    first = node.receive(write_ct(tmp_path / "a", count=3))
    shutil.copy(node.database, tmp_path / "backup.sqlite")
    second = node.receive(write_ct(tmp_path / "b", count=5, seed=1))
    for file in node.state.glob("jobs.sqlite*"):
        file.unlink()
    shutil.copy(tmp_path / "backup.sqlite", node.database)

    with local_receiver(tmp_path):
        store = node.store()
        until(lambda: (job := store.job(second)) is not None and len(store.instances(job)) == 5)
        ready = complete_quiet(store, 100, now=datetime.now(UTC) + timedelta(seconds=200))
        assert {job.study_instance_uid for job in ready} == {first, second}
        jobs = [store.claim("test", 60), store.claim("test", 60)]
        assert {job.study_instance_uid for job in jobs if job is not None} == {first, second}
        store.close()
    assert node.reconcile()[0] is False


def test_rows_that_were_removed_come_back_and_reopen_their_study(node: Node, tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=4)
    study = node.receive(files)
    store = node.store()
    store.mark_complete(study, who="test", reason="test")
    node.forget("DELETE FROM instances WHERE sop_instance_uid = ?", str(dcmread(files[1]).SOPInstanceUID))
    node.forget("UPDATE studies SET instances = 3 WHERE study_instance_uid = ?", study)
    assert node.reconcile() == (True, {study: 4})
    job = store.job(study)
    assert job is not None
    assert (job.state, job.revision) == (JobState.RECEIVING, 2)
    assert {event.who for event in store.events(study)} >= {UNKNOWN_SOURCE}
    store.close()


def test_after_a_clean_end_nothing_is_looked_at(node: Node, tmp_path: Path) -> None:
    study = node.receive(write_ct(tmp_path / "ct", count=2))
    (stray,) = write_ct(tmp_path / "stray", count=1, seed=2)
    _lay_down(node, stray)
    assert node.reconcile() == (False, {study: 2})


def test_a_crash_between_file_and_row_costs_the_folders_that_changed(node: Node, tmp_path: Path) -> None:
    unchanged = write_ct(tmp_path / "old", count=2, seed=3)
    node.receive(unchanged)
    with receiver_process(tmp_path) as (role, port):
        files = write_ct(tmp_path / "ct", count=3)
        assert storescu(port, files).returncode == 0
        assert role.process is not None
        role.process.kill()
        role.process.wait(60)
    (late,) = write_ct(tmp_path / "late", count=1, seed=4)
    orphan = _lay_down(node, late)  # as if the crash had come after the rename
    (elsewhere,) = write_ct(tmp_path / "elsewhere", count=1, seed=5)
    forgotten = _lay_down(node, elsewhere)
    os.utime(forgotten.parent, (1, 1))
    ending = json.loads((node.state / "spool" / "receiver.json").read_text())
    assert ending["clean"] is False
    assert time.time() - 120 < ending["since"] < time.time()

    pending, found = node.reconcile()
    assert pending
    assert sorted(found.values()) == [1, 2, 3]  # the folder of long ago was not looked at
    store = node.store()
    stored = store.stored_instance(str(dcmread(late).SOPInstanceUID))
    assert stored is not None
    assert stored.path == orphan
    store.close()


def test_damaged_and_replaced_files_are_not_taken_up(node: Node, tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=2)
    study = node.receive(files)
    changed = dcmread(files[0])
    changed.PatientName = "Other^Name"
    changed.save_as(tmp_path / "changed.dcm")
    node.receive([tmp_path / "changed.dcm"])  # the same image under another header: the former file stays
    received = sorted((node.state / "spool" / "received").rglob("*.dcm"))
    assert len(received) == 3
    (other,) = write_ct(tmp_path / "other", count=1, seed=5)
    damaged = _lay_down(node, other)
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\x01\x02")
    (node.state / "spool" / "receiver.json").unlink()
    assert node.reconcile() == (True, {study: 2})
    assert damaged.exists()


def test_an_interrupted_look_goes_on_with_the_next_start(node: Node, tmp_path: Path) -> None:
    study = node.receive(write_ct(tmp_path / "ct", count=2))
    node.forget("DELETE FROM instances")
    node.forget("UPDATE studies SET instances = 0")
    store = node.store()
    interrupted = Reconciliation(store, node.spool())
    assert interrupted.pending
    interrupted._ended.set()
    interrupted.start()
    interrupted.stop()
    assert interrupted.pending
    store.close()
    assert node.reconcile() == (True, {study: 2})
    assert node.reconcile()[0] is False


def test_an_ending_that_cannot_be_written_is_no_old_one(node: Node, tmp_path: Path) -> None:
    study = node.receive(write_ct(tmp_path / "ct", count=1))
    (node.state / "spool" / "receiver.new").mkdir()  # in the way of the file
    store = node.store()
    Reconciliation(store, node.spool())
    assert not (node.state / "spool" / "receiver.json").exists()
    (node.state / "spool" / "receiver.new").rmdir()
    store.close()
    assert node.reconcile() == (True, {study: 1})


def _lay_down(node: Node, path: Path) -> Path:
    """A received file without a row, written as the receiver does."""
    received = received_file(path.read_bytes(), source_ae="X", address="", association_id="x")
    uids = received.identifiers
    stored = node.spool().store_instance(
        uids.study_instance_uid, uids.series_instance_uid, uids.sop_instance_uid, received.parts
    )
    return stored.path
