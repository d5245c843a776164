"""The judges catch what they are for: planted mutants lose objects or commit without a claim, the product does not."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import load_settings
from tests.conftest import ROOT, require_command
from tests.e2e.chaos.judge import connect, history_faults, lost_objects, read_ledger
from tests.e2e.chaos.power import STRACE, Disk, acknowledged, cuts, read_calls
from tests.e2e.chaos.storm import Modality
from tests.fakes import a_free_port, settings_text, storescu, until, write_ct
from tests.integration.screening import running_screener
from tests.integration.test_durability_trace import MUTANTS, RUN

pytestmark = [pytest.mark.slow]


def _receiver(folder: Path, port: int, mutation: str, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """A receiver with ``mutation`` planted, listening."""
    config, log = folder / "osteo.toml", folder / "receiver.log"
    config.write_text(settings_text(folder / "state", port))
    seen = log.read_bytes().count(b"receiver_listening") if log.exists() else 0
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-c", RUN.format(mutation=mutation), str(config)],
            stdout=sink,
            stderr=sink,
            cwd=ROOT,
        )
    until(lambda: log.read_bytes().count(b"receiver_listening") > seen)
    return process


def _killed_while_receiving(folder: Path, mutation: str) -> list[str]:
    """Faults after a receiver was killed again and again while a modality sent, and came back."""
    port = a_free_port()
    modality = Modality(folder, port)
    rng = random.Random(3)
    receiver = _receiver(folder, port, mutation)
    try:
        modality.send(*write_ct(folder / "ct", count=120))
        for _ in range(3):
            before = len(read_ledger(modality.ledger))
            until(lambda before=before: len(read_ledger(modality.ledger)) > before + 5)
            time.sleep(rng.uniform(0, 0.05))
            receiver.kill()
            receiver.wait()
            receiver = _receiver(folder, port, mutation)
        until(modality.idle, 60)
        time.sleep(0.5)  # whatever is still to be written late
    finally:
        modality.close()
        receiver.kill()
        receiver.wait()
    with connect(folder / "state" / "jobs.sqlite") as store:
        return lost_objects(read_ledger(modality.ledger), store)


def test_no_acknowledged_object_is_lost_when_the_receiver_is_killed(tmp_path: Path) -> None:
    assert _killed_while_receiving(tmp_path, "") == []


@pytest.mark.parametrize("mutant", ["acknowledged before the commit", "acknowledged before it is stored"])
def test_acknowledging_too_early_is_caught(tmp_path: Path, mutant: str) -> None:
    # without the look at the start, which makes rows of files again
    assert _killed_while_receiving(tmp_path, MUTANTS[mutant] + "\nreceiver.Reconciliation.start = lambda self: None\n")


def test_rows_that_a_kill_prevented_are_made_from_their_files_at_the_next_start(tmp_path: Path) -> None:
    assert _killed_while_receiving(tmp_path, MUTANTS["acknowledged before the commit"]) == []


def _losses_by_power_cut(folder: Path, mutation: str) -> tuple[int, list[str]]:
    """How many cuts were tried, and every acknowledged object that a cut lost."""
    port = a_free_port()
    first = _receiver(folder, port, "")
    first.terminate()  # the store and the spool's folders exist now
    first.wait(60)
    state, trace = folder / "state", folder / "trace.txt"
    disk = Disk(state.resolve())
    receiver = _receiver(folder, port, mutation, (require_command("strace"), *STRACE, "-o", str(trace)))
    try:
        for seed in range(2):
            sent = storescu(port, write_ct(folder / f"ct{seed}", count=12, seed=seed))
            assert sent.returncode == 0, (folder / "receiver.log").read_text()
    finally:
        # the receiver, not strace: a traced process outlives its tracer
        (traced,) = psutil.Process(receiver.pid).children()
        traced.kill()
        receiver.wait(60)
    calls = read_calls(trace.read_text(errors="replace"))
    places, promised, faults, position = list(cuts(calls)), [], [], 0
    for number, place in enumerate(places):
        for call in calls[position:place]:
            disk.apply(call)
            if uid := acknowledged(call):
                promised.append(uid)
        position = place
        left = folder / f"cut-{number}" / "state"
        left.mkdir(parents=True)
        disk.after_power_cut(left)
        faults += [f"cut {number}: {fault}" for fault in _missing(left, state, promised)]
    return len(places), faults


def _missing(left: Path, state: Path, promised: Sequence[str]) -> list[str]:
    try:
        with sqlite3.connect(left / "jobs.sqlite") as store:
            rows = dict(store.execute("SELECT sop_instance_uid, path FROM instances").fetchall())
            sizes = dict(store.execute("SELECT sop_instance_uid, size_bytes FROM instances").fetchall())
    except sqlite3.DatabaseError as error:
        return [f"the store cannot be read: {error}"]
    faults = []
    for uid in promised:
        path = left / os.path.relpath(rows[uid], state.resolve()) if uid in rows else None
        if path is None:
            faults.append(f"{uid[-8:]} has no row")
        elif not path.exists() or path.stat().st_size != sizes[uid]:
            faults.append(f"{uid[-8:]} has no whole file")
    return faults


def test_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    tried, faults = _losses_by_power_cut(tmp_path, "")
    assert tried == 24
    assert faults == []
    # and the product itself works with what the last cut left
    left = tmp_path / "cut-23"
    (left / "osteo.toml").write_text(settings_text(left / "state", 1))
    store = JobStore(load_settings(left / "osteo.toml", {}).database_url)
    assert sum(store.counts_by_state().values()) == 2
    store.check()
    store.close()


@pytest.mark.parametrize(
    ("mutant", "caught"),
    [
        ("file not synced", "no whole file"),
        ("folder not synced", "no whole file"),
        ("commit not synced", "no row"),
        ("acknowledged before the commit", "no row"),
    ],
)
def test_what_is_not_synced_is_lost_by_a_power_cut(tmp_path: Path, mutant: str, caught: str) -> None:
    _, faults = _losses_by_power_cut(tmp_path, MUTANTS[mutant])
    assert any(caught in fault or "cannot be read" in fault for fault in faults)


def _stopped_while_screening(folder: Path, module: str) -> list[str]:
    """Faults in the history of a study whose screener slept beyond its lease and woke up under another's claim."""
    with running_screener(folder, lease_seconds=60, module=module) as bench:
        bench.ready()
        assert bench.role.process is not None
        role = psutil.Process(bench.role.process.pid)
        study = bench.study("taken")
        until(lambda: bench.job(study).state is JobState.SCREENING)
        role.suspend()
        # a long lease, so that no heartbeat notices before the commit does; for the store it is over
        assert bench.store.take_back_expired(now=datetime.now(UTC) + timedelta(minutes=2)) == 1
        other = bench.store.claim("another-screener", 60)
        assert other is not None
        bench.wait_until_computed()  # so that the commit, not the heartbeat, meets the new token
        role.resume()
        until(lambda: "screening_ended" in bench.log)
        with connect(folder / "state" / "jobs.sqlite") as store:
            (state,) = store.execute("SELECT state FROM jobs WHERE job_id = ?", (other.job_id,)).fetchone()
            faults = history_faults(other.job_id, store)
        # the other one is this test, and it has written nothing
        return faults if state == "SCREENING" else [*faults, f"the study is {state} while another-screener holds it"]


def test_only_the_holder_of_the_claim_commits(tmp_path: Path) -> None:
    assert _stopped_while_screening(tmp_path, "osteo_daemon.cli") == []


def test_committing_without_the_fencing_token_is_caught(tmp_path: Path) -> None:
    (fault,) = _stopped_while_screening(tmp_path, "tests.e2e.chaos.unfenced")
    assert "while another-screener holds it" in fault
