"""The screening role as processes: bad studies end in a state with a reason, and the role goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
from click.testing import CliRunner
from pydicom.uid import JPEGLSLossless

from osteo_daemon import worker_process
from osteo_daemon.cli import cli
from osteo_daemon.domain.job import JobState
from osteo_daemon.inference.bundle import find_bundle, write_bundle
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.screener import Screener
from osteo_daemon.settings import Settings
from tests.conftest import ROOT, require_command
from tests.ct_series import column, write_slices
from tests.fakes import RoleProcess, until
from tests.integration.screening import Bench, running_screener

EMPTY = "no_lumbar_vertebra"


def test_bad_studies_end_with_a_reason_and_the_next_one_runs(tmp_path: Path) -> None:
    voxels = np.zeros((50, 16, 16), dtype=np.int16)
    cut = write_slices(tmp_path / "cut", voxels, column(50, 2.5), PatientName="Secret^Name", PatientID="SECRET-7")
    cut[25].write_bytes(cut[25].read_bytes()[:-100])
    with running_screener(tmp_path) as bench:
        truncated = bench.receive(cut)
        sharp = bench.study("sharp", ConvolutionKernel="LUNG")
        empty = bench.study("empty")
        found = bench.reaches(truncated, JobState.HELD)
        assert found.code == "PixelDataUnreadable"
        assert "slice 26" in (found.detail or "")
        assert bench.reaches(sharp, JobState.EXCLUDED).code == "unsuitable_kernel"
        assert bench.reaches(empty, JobState.EXCLUDED).code == EMPTY
        instances = bench.store.instances(bench.job(truncated))
        assert len(instances) == 50  # held, nothing deleted
        assert all(instance.path.exists() for instance in instances)
    assert "Secret" not in bench.log
    assert "SECRET-7" not in bench.log
    assert "Traceback" not in bench.log


def test_a_study_that_kills_its_worker_fails_after_three_with_the_reason_and_the_next_one_runs(tmp_path: Path) -> None:
    with running_screener(tmp_path, lease_seconds=60, prefetch_maximum_bytes=0) as bench:
        bench.ready()
        # so many files that reading their headers alone leaves time to strike
        many = write_slices(tmp_path / "poison", np.zeros((600, 16, 16), dtype=np.int16), column(600, 1.0))
        poison = bench.receive(many)
        for attempt, number in enumerate((signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS), start=1):
            until(lambda attempt=attempt: _in_hand(bench, poison, attempt), 60)
            bench.worker().send_signal(number)
        found = bench.reaches(poison, JobState.FAILED)
        assert (found.code, found.attempts) == ("worker_died", 3)
        reasons = [event.reason for event in bench.store.events(poison) if "worker_died" in event.reason]
        for reason, name in zip(reasons, ("SIGKILL", "SIGSEGV", "SIGBUS"), strict=True):
            assert name in reason
        assert bench.reaches(bench.study("next"), JobState.EXCLUDED).code == EMPTY


def _in_hand(bench: Bench, study: str, attempt: int) -> bool:
    job = bench.job(study)
    return job.state is JobState.SCREENING and job.attempts == attempt


def test_a_hanging_worker_keeps_its_lease_until_the_wall_clock_and_no_longer(tmp_path: Path) -> None:
    with running_screener(tmp_path, lease_seconds=1, wall_clock_seconds=4, maximum_attempts=1) as bench:
        worker = bench.ready()
        worker.suspend()  # a worker that answers nothing: an interpreter busy in a call that does not return
        claimed = time.monotonic()
        study = bench.study("hangs")
        until(lambda: _in_hand(bench, study, 1))
        until(lambda: time.monotonic() - claimed > 3)
        assert (
            bench.job(study).state is JobState.SCREENING
        )  # three leases later: the heartbeat does not need the worker
        assert bench.store.take_back_expired() == 0
        found = bench.reaches(study, JobState.FAILED, 10)
        assert (found.code, found.attempts) == ("wall_clock_limit", 1)
        assert not worker.is_running()
        assert bench.reaches(bench.study("next"), JobState.EXCLUDED).code == EMPTY


def test_a_study_that_exhausts_the_memory_fails_with_the_reason(tmp_path: Path) -> None:
    limit = [require_command("prlimit"), f"--as={6 * 1024**3}"]
    with running_screener(tmp_path, prefix=limit) as bench:
        # sixty slices that are 8192 x 8192 once they are decoded: 16 GB as a volume
        plane = np.zeros((60, 16, 16), dtype=np.int16)
        huge = write_slices(tmp_path / "huge", plane, column(60, 2.0), spacing_mm=(0.1, 0.1), Rows=8192, Columns=8192)
        image = pydicom.dcmread(huge[0])
        image.compress(JPEGLSLossless, np.zeros((8192, 8192), dtype=np.uint16), generate_instance_uid=False)
        for path in huge:
            slice_ = pydicom.dcmread(path)
            slice_.PixelData = image.PixelData
            slice_["PixelData"].VR = "OB"
            slice_["PixelData"].is_undefined_length = True
            slice_.file_meta.TransferSyntaxUID = JPEGLSLossless
            slice_.save_as(path)
        study = bench.receive(huge)
        found = bench.reaches(study, JobState.FAILED)
        assert (found.code, found.attempts) == ("MemoryError", 3)
        assert bench.reaches(bench.study("next"), JobState.EXCLUDED).code == EMPTY
        assert bench.log.count("screener_ready") == 1  # the worker outlived it


def test_the_next_study_is_read_ahead_and_a_death_meanwhile_is_charged_to_neither(tmp_path: Path) -> None:
    with running_screener(tmp_path, lease_seconds=60) as bench:
        worker = bench.ready()
        worker.suspend()
        first, second = bench.study("first"), bench.study("second")
        until(lambda: _in_hand(bench, first, 1))
        time.sleep(1)  # the order to read ahead follows the claim
        worker.kill()
        for study in (first, second):
            assert bench.reaches(study, JobState.EXCLUDED).code == EMPTY
        assert bench.events(first).count("lease_released") == 1
        assert (bench.summary(first).attempts, bench.summary(second).attempts) == (1, 1)
        assert "study_prefetched" not in bench.log  # suspects run alone
        bench.worker().suspend()
        third, fourth = bench.study("third"), bench.study("fourth")
        until(lambda: _in_hand(bench, third, 1))
        time.sleep(1)
        bench.worker().resume()
        for study in (third, fourth):
            assert bench.reaches(study, JobState.EXCLUDED).code == EMPTY
        assert f"study_instance_uid={fourth}" in next(
            line for line in bench.log.splitlines() if "study_prefetched" in line
        )


def test_a_stale_commit_is_refused(tmp_path: Path) -> None:
    with running_screener(tmp_path, lease_seconds=60) as bench:
        bench.ready()
        assert bench.role.process is not None
        role = psutil.Process(bench.role.process.pid)
        study = bench.study("taken")
        until(lambda: bench.job(study).state is JobState.SCREENING)
        role.suspend()  # the worker goes on and answers; the role is the one that commits
        # a long lease, so that no heartbeat notices before the commit does; for the store it is over
        assert bench.store.take_back_expired(now=datetime.now(UTC) + timedelta(minutes=2)) == 1
        other = bench.store.claim("another-screener", 60)
        assert other is not None
        bench.wait_until_computed()  # so that the commit, not the heartbeat, meets the new token
        role.resume()
        until(lambda: "outcome=lease_lost" in bench.log)
        assert bench.job(study).fencing_token == other.fencing_token
        assert bench.job(study).state is JobState.SCREENING
        assert "study_excluded" not in bench.events(study)
        bench.store.release(other)
        assert bench.reaches(study, JobState.EXCLUDED).code == EMPTY


def test_a_study_that_is_held_meanwhile_is_dropped(tmp_path: Path) -> None:
    with running_screener(tmp_path, lease_seconds=1) as bench:
        worker = bench.ready()
        worker.suspend()
        study = bench.study("held")
        until(lambda: bench.job(study).state is JobState.SCREENING)
        bench.store.hold_study(study, "operator", "wrong patient")
        time.sleep(1)
        worker.resume()
        until(lambda: "outcome=lease_lost" in bench.log)
        assert bench.job(study).state is JobState.HELD
        assert bench.reaches(bench.study("next"), JobState.EXCLUDED).code == EMPTY


def test_sigterm_returns_the_study_in_hand_within_its_grace(tmp_path: Path) -> None:
    with running_screener(tmp_path, lease_seconds=60, stop_grace_seconds=1) as bench:
        bench.ready().suspend()
        study = bench.study("in-hand")
        until(lambda: bench.job(study).state is JobState.SCREENING)
        start = time.monotonic()
        assert bench.role.stop() == 0
        assert time.monotonic() - start < 5
        assert bench.job(study).state is JobState.READY
        assert bench.job(study).attempts == 0
        assert bench.events(study)[-1] == "lease_released"


_SAYS_WHAT_IT_IS_TOLD = """
import json, os, socket, sys
from pathlib import Path
from osteo_daemon.link import Link

link = Link(socket.socket(fileno=int(sys.argv[2])))
answers = Path(link.receive()["settings"]["state_dir"]) / "answers"
link.send({"type": "ready", "device": "cuda", "models": [], "refused_bundle": None})
while True:
    message = link.receive()
    if message["type"] == "screen":
        said, _, left = answers.read_text().partition("\\n")
        answers.write_text(left)
        link.send({"token": message["token"], "detail": f"process {os.getpid()}", **json.loads(said)})
"""


def test_what_a_worker_says_of_itself_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that asks to be replaced is; what is not charged to the study costs it no attempt, however often."""
    monkeypatch.setattr(worker_process, "_START", _SAYS_WHAT_IT_IS_TOLD)
    values = {"poll_seconds": 0.01, "retry_base_seconds": 0.01, "maximum_attempts": 3}
    settings = Settings.model_validate({"state_dir": tmp_path, "screener": values})
    full = [{"type": "retry", "code": "SpoolFull", "charged": False}] * 5
    spent = {"type": "retry", "code": "AcceleratorError", "spent": True}
    odd = {"type": "retry", "code": "Odd"}
    answers = [spent, *full, odd, odd, {"type": "held", "code": "Damaged"}]
    (tmp_path / "answers").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    screener = Screener(settings)
    role = RoleProcess([], tmp_path)
    bench = Bench(tmp_path, tmp_path, Spool(settings.spool_dir), JobStore(settings.database_url), role)
    study = bench.study("first")
    working = threading.Thread(target=screener.work)
    working.start()
    try:
        found = bench.reaches(study, JobState.FAILED)
        assert bench.reaches(bench.study("second"), JobState.HELD).code == "Damaged"
    finally:
        screener.stop(0, None)
        working.join()
    assert (found.code, found.attempts) == ("Odd", 3)
    told = [event.reason for event in bench.store.events(study) if event.event in ("job_retry", "job_failed")]
    codes, processes = zip(*(reason.split(": ") for reason in told), strict=True)
    assert codes == ("AcceleratorError", *["SpoolFull"] * 5, "Odd", "Odd")
    assert processes[0] not in processes[1:]
    assert len(set(processes[1:])) == 1  # the others were no reason to load the models anew
    bench.store.close()


def _osteo(bench: Bench, *arguments: str) -> str:
    command = [sys.executable, "-m", "osteo_daemon.cli", *arguments, "--config", str(bench.config)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=60).stdout


def _state(bench: Bench) -> str:
    (status,) = json.loads(_osteo(bench, "screener", "status", "--json"))["screeners"]
    return str(status["state"])


def test_pause_drain_resume_and_finishing_before_the_end(tmp_path: Path) -> None:
    with running_screener(tmp_path) as bench:
        worker = bench.ready()
        _osteo(bench, "screener", "pause", "--reason", "scanner test")
        until(lambda: _state(bench) == "paused")
        study = bench.study("waits")
        time.sleep(1)
        assert bench.job(study).state is JobState.READY
        assert worker.is_running()
        _osteo(bench, "screener", "drain", "--reason", "driver update")
        until(lambda: not worker.is_running())
        assert _state(bench) == "drained"
        assert bench.job(study).state is JobState.READY
        _osteo(bench, "screener", "resume", "--reason", "done")
        assert bench.reaches(study, JobState.EXCLUDED).code == EMPTY
        last = bench.study("last")
        until(lambda: bench.job(last).state is JobState.SCREENING)
        assert bench.role.stop() == 0
        assert bench.summary(last).code == EMPTY  # finished within the grace, not thrown away
    assert not list((tmp_path / "state" / "screeners").glob("*-*.json"))


def _promote(folder: Path, version: str, name: str = "spine-localizer") -> None:
    """The shipped localizer under another version, as a site's own."""
    shipped = find_bundle("spine-localizer")
    write_bundle(
        folder / name,
        name=name,
        version=version,
        status=shipped.status,
        metadata={key: value for key, value in shipped.metadata.items() if key not in _WRITTEN},
        network=shipped.network,
        inference=shipped.inference,
        weights=shipped.load_weights(),
        model_card="a test",
        licence="Apache-2.0",
    )


_WRITTEN = {"schema", "osteo_schema", "name", "version", "status", "monai_version", "pytorch_version", "numpy_version"}


_TOLD_OF_EXCLUSIONS = """
[[destinations]]
name = "pacs"
ae_title = "PACS"
host = "127.0.0.1"
port = 1
report_exclusions = true
"""


def _predecessors(path: Path) -> list[str]:
    return [
        str(instance.ReferencedSOPInstanceUID)
        for study in pydicom.dcmread(path).get("PredecessorDocumentsSequence", ())
        for series in study.ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    ]


def test_a_promoted_bundle_is_taken_up_between_studies_and_a_broken_one_is_not(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    with running_screener(
        tmp_path, models=f'models_dir = "{models}"\n', network_enabled=False, extra=_TOLD_OF_EXCLUSIONS
    ) as bench:

        def model(study: str) -> dict[str, str]:
            result = bench.store.result(study)
            assert result is not None
            return dict(result["models"][0])

        def used(name: str) -> str:
            study = bench.study(name)
            assert bench.reaches(study, JobState.REPORTED).code == EMPTY
            return model(study)["version"]

        shipped = find_bundle("spine-localizer").version
        assert used("shipped") == shipped
        _promote(models, "99.1.0")
        assert used("promoted") == "99.1.0"
        manifest = models / "spine-localizer" / "MANIFEST.sha256"
        manifest.write_text(manifest.read_text().replace("LICENSE", "LICENCE"))
        assert used("broken") == "99.1.0"
        (status,) = json.loads(_osteo(bench, "screener", "status", "--json"))["screeners"]
        assert "LICENSE" in status["refused_bundle"]
        assert bench.log.count("bundle_refused") == 1
        _promote(models, "99.2.0")
        assert used("mended") == "99.2.0"
        (status,) = json.loads(_osteo(bench, "screener", "status", "--json"))["screeners"]
        assert status["refused_bundle"] is None

        # one study again with another bundle: a new revision, whose reports name those before
        study = bench.study("again")
        bench.reaches(study, JobState.REPORTED)
        _promote(models, "3.0.0", "other-localizer")
        reprocess = ["studies", "reprocess", study, "--localizer", "other-localizer", "--reason", "a trial"]
        done = CliRunner().invoke(cli, [*reprocess, "--config", str(bench.config)])
        assert done.exit_code == 0, done.output
        until(lambda: (bench.job(study).state, bench.job(study).revision) == (JobState.REPORTED, 2), 60)
        assert (model(study)["bundle"], model(study)["version"]) == ("other-localizer", "3.0.0")
        first, second = (
            {entry.variant: entry for entry in bench.store.report_objects(study, revision)} for revision in (1, 2)
        )
        assert first.keys() == second.keys() != set()
        for variant, entry in second.items():
            assert _predecessors(entry.path) == [first[variant].sop_instance_uid]
            assert _predecessors(first[variant].path) == []
        assert used("next") == "99.2.0"  # the wish was for that study alone
    assert bench.log.count("screener_ready") == 1  # one process through all of it


def test_a_missing_bundle_refuses_to_start(tmp_path: Path) -> None:
    with running_screener(tmp_path, status=2, localizer_bundle='"no-such-bundle"') as bench:
        assert bench.role.process is not None
        bench.role.process.wait(60)
    assert "no-such-bundle" in bench.log
