"""SIGKILL in the middle of writing: what was said to be recorded is there, whole, and nothing is half there."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from osteo_daemon.domain.job import TRANSITIONS, JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.integrity import check_integrity
from osteo_daemon.jobs.records import DeliveryState
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from tests.stores import new_sqlite

WRITER = """
import itertools, sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.records import NewDelivery, ReportKind, ReportObject
from osteo_daemon.jobs.store import JobStore

store, name = JobStore(sys.argv[1]), sys.argv[2]
later = datetime.now(UTC)
for n in itertools.count():
    study = f"1.{name}.{n}"
    for k in range(3):
        uid = f"{study}.1.{k}"
        store.record_instance(SopInstance(study, "1", "1", uid, "1", Path("/x"), 1, "0" * 64), "CT")
        print("instance", uid, flush=True)
    later += timedelta(days=1)
    store.mark_complete(study, who="test", reason="test")
    job = store.claim(name, 10**9)
    if job is None:
        continue
    report = ReportObject(ReportKind.SR, "1", f"{study}.{job.fencing_token}.9", Path("/r"), 1, "0" * 64)
    store.commit_report(job, {"n": n}, [report], [NewDelivery("pacs", (report.sop_instance_uid,))])
    print("report", job.study_instance_uid, flush=True)
    delivery = store.claim_delivery(name, 10**9)
    if delivery is not None:
        for entry in delivery.unsent:
            store.delivery_object_sent(delivery, entry.sop_instance_uid, "0x0000")
        store.delivery_done(delivery, "stored")
        print("delivered", delivery.study_instance_uid, flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_what_was_said_survives_sigkill(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "jobs.sqlite"
    url = f"sqlite:///{path}"
    JobStore(url).close()
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, url, str(name)], stdout=subprocess.PIPE, text=True)
        for name in range(2)
    ]
    said: list[list[str]] = []
    enough = 20 + random.Random(seed).randrange(30)
    for writer in writers:
        assert writer.stdout is not None
        for _ in range(enough):
            said.append(writer.stdout.readline().split())
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
    for writer in writers:
        assert writer.stdout is not None
        said += [line.split() for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        writer.wait()

    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()

    store = JobStore(url)
    for what, uid in said:
        if what == "instance":
            assert store.stored_instance(uid) is not None
        elif what == "report":
            job = store.job(uid)
            assert job is not None
            assert job.state in (JobState.REPORTED, JobState.DELIVERED)
            assert len(store.report_objects(uid)) == 1
            assert store.result(uid) is not None
            assert len(store.deliveries(study_instance_uid=uid)) == 1
        else:
            job = store.job(uid)
            assert job is not None
            assert job.state is JobState.DELIVERED
    for summary in store.recent(limit=10_000):
        walk = [event for event in store.events(summary.study_instance_uid) if event.to_state is not None]
        assert walk[-1].to_state is summary.state
        for earlier, later in itertools.pairwise(walk):
            assert later.from_state is earlier.to_state
            assert earlier.to_state is not None
            assert later.to_state in TRANSITIONS[earlier.to_state]
        sent = store.deliveries(study_instance_uid=summary.study_instance_uid)
        assert (summary.state is JobState.DELIVERED) == any(d.state is DeliveryState.DELIVERED for d in sent)
        assert bool(sent) == bool(store.report_objects(summary.study_instance_uid))
    store.close()
    assert len(said) >= 2 * enough


PURGER = """
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore

store, spool = JobStore(sys.argv[1]), Spool(Path(sys.argv[2]))
later = datetime.now(UTC) + timedelta(days=1)
print("begun", flush=True)
for study in store.purgeable_images(later):
    store.purge_finished(study, spool, before=later, images=True, reports=True)
    print(study, flush=True)
"""


@pytest.mark.parametrize("seed", range(2))
def test_a_removal_that_was_killed_is_finished_and_nothing_contradicts(tmp_path: Path, seed: int) -> None:
    store, spool = new_sqlite(tmp_path), Spool(tmp_path / "spool")
    for number in range(12):
        study = f"1.{number}"
        for k in range(60 if number < 6 else 1):
            stored = spool.store_instance(study, f"{study}.1", f"{study}.1.{k}", [b"%d" % k])
            instance = SopInstance(
                study, f"{study}.1", "1.2", f"{study}.1.{k}", "1.2", stored.path, stored.size_bytes, stored.sha256
            )
            store.record_instance(instance, "CT")
        if number < 6:
            store.mark_complete(study, who="test", reason="test")
            job = store.claim("w", 60)
            assert job is not None
            store.exclude(job, "no_ct_series", "none", {})
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    purger = subprocess.Popen([sys.executable, "-c", PURGER, url, str(spool.root)], stdout=subprocess.PIPE, text=True)
    assert purger.stdout is not None
    for _ in range(2 + seed):
        purger.stdout.readline()
    time.sleep(random.Random(seed).random() * 0.05)
    purger.kill()
    purger.wait()

    for study in store.being_purged():
        store.finish_purge(study, spool)
    found = check_integrity(store, spool, young_seconds=0)
    assert found.findings == ()
    for number in range(12):
        left = len(spool.received_files(f"1.{number}"))
        assert left in (0, 60) if number < 6 else left == 1
    assert spool.received_files("1.0") == []
    store.close()
