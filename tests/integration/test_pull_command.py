"""`osteo pull` as a process: killed in the middle, stopped by Ctrl-C, resumed; and what it prints."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from osteo_daemon.cli import cli
from osteo_daemon.errors import ConfigurationError, Damaged
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.pull.criteria import Criteria
from tests.conftest import ROOT
from tests.fakes import settings_text, until
from tests.slow_archive import SlowArchive, running_slow_archive


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[SlowArchive]:
    """Three studies of six slices, of patients P0, P1 and P2."""
    with running_slow_archive(tmp_path) as running:
        yield running


@dataclass
class Command:
    """`osteo pull` with settings that name the archive."""

    folder: Path
    config: Path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin it."""
        return subprocess.Popen(
            [sys.executable, "-m", "osteo_daemon.cli", "pull", *arguments, "--config", str(self.config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def run(self, *arguments: str) -> tuple[int, Any, str]:
        """Status, JSON of standard output, standard error."""
        output, errors = (process := self.start(*arguments, "--json")).communicate(timeout=60)
        return process.returncode, json.loads(output) if output else None, errors

    @contextmanager
    def store(self) -> Iterator[JobStore]:
        """The node's store."""
        store = JobStore(f"sqlite:///{self.folder / 'state' / 'jobs.sqlite'}")
        try:
            yield store
        finally:
            store.close()

    @property
    def stored(self) -> set[str]:
        """SOP Instance UIDs that are here."""
        with self.store() as store:
            studies = {job.study_instance_uid for job in store.recent()}
            return {uid for study in studies for uid in store.study_here(study).stored}

    def counts(self, pull_id: int) -> dict[str, int]:
        """Studies of a pull by state."""
        with self.store() as store:
            return {state.value: count for state, count in store.pull_counts(pull_id).items() if count}

    def attempts(self, pull_id: int) -> list[int]:
        """Of its studies."""
        with self.store() as store:
            return [entry.attempts for entry in store.pulled_studies(pull_id)]


@pytest.fixture
def command(tmp_path: Path, archive: SlowArchive) -> Command:
    config = tmp_path / "osteo.toml"
    config.write_text(settings_text(tmp_path / "state", 11112, extra=archive.text()))
    JobStore(f"sqlite:///{tmp_path / 'state' / 'jobs.sqlite'}").close()
    return Command(tmp_path, config)


def test_killed_in_the_middle_it_goes_on_with_what_is_missing(archive: SlowArchive, command: Command) -> None:
    reached = threading.Event()
    killed = threading.Event()

    def gate(cancelled: Callable[[], bool]) -> bool:
        # in the middle of the second study
        if archive.sent.total() == 9 and not killed.is_set():
            reached.set()
            killed.wait(120)
        return cancelled()

    archive.gate = gate
    process = command.start("start", "slow", "--from", "2020-01-01")
    assert reached.wait(60)
    until(lambda: len(command.stored) == 9)
    process.kill()
    process.wait(60)
    killed.set()
    assert command.counts(1) == {"FETCHED": 1, "WANTED": 2}
    before = Counter(archive.sent)
    status, document, errors = command.run("resume", "1")
    assert status == 0, errors
    assert document["studies"]["FETCHED"] == 3
    assert command.stored == archive.images
    # after the kill each object that was here was not asked for again
    again = archive.sent - before
    assert again.total() == 9 or again.total() == 10  # 10: the one that was on its way
    assert ("IMAGE", 3) in archive.asked
    assert archive.asked.count(("SERIES", 0)) == 3


def test_ctrl_c_cancels_at_the_archive_and_charges_nobody(archive: SlowArchive, command: Command) -> None:
    sending = threading.Event()

    def gate(cancelled: Callable[[], bool]) -> bool:
        if archive.sent.total() == 2 and not sending.is_set():
            sending.set()
            return bool(until(cancelled))
        return cancelled()

    archive.gate = gate
    process = command.start("start", "slow", "--from", "2020-01-01", "--json")
    assert sending.wait(60)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    document = json.loads(output)
    assert document["state"] == "FETCHING"
    assert document["studies"]["WANTED"] == 3
    until(lambda: archive.cancelled == 1)
    assert command.attempts(1) == [0, 0, 0]
    status, document, errors = command.run("resume", "1")
    assert status == 0, errors
    assert document["studies"]["FETCHED"] == 3


def test_a_list_in_a_file_is_asked_for_and_forgotten(archive: SlowArchive, command: Command, tmp_path: Path) -> None:
    listed = tmp_path / "list"
    listed.write_text("# of this month\nP1\n\nNOBODY-4711\n")
    status, document, errors = command.run("start", "slow", "--patients", str(listed))
    assert status == 0, errors
    # the archive answers every question with all its studies: strangers stay where they are
    assert archive.patients[:2] == ["P1", "NOBODY-4711"]
    assert {state: count for state, count in document["studies"].items() if count} == {"FETCHED": 1}
    wanted = list(archive.studies.values())[1]
    assert command.stored == {str(image.SOPInstanceUID) for image in wanted}
    assert "NOBODY-4711" not in errors + json.dumps(document)
    for path in command.folder.rglob("*"):
        assert path == listed or not path.is_file() or b"NOBODY-4711" not in path.read_bytes()
    # a search with a list that was killed cannot go on without it
    with command.store() as store:
        unfinished = store.create_pull("slow", Criteria(listed=2).document())
    refused = CliRunner().invoke(cli, ["pull", "resume", str(unfinished), "--config", str(command.config)])
    assert refused.exit_code == 2
    assert "give the list again" in refused.stderr


def test_a_dry_run_counts_and_a_wrong_word_is_explained(archive: SlowArchive, command: Command, tmp_path: Path) -> None:
    def osteo(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["pull", *arguments, "--config", str(command.config)])

    counted = osteo("start", "slow", "--from", "2020-01-01", "--dry-run", "--json")
    assert counted.exit_code == 0, counted.output
    assert json.loads(counted.stdout) == {"studies": 3, "known_here": 0, "instances": 0, "instances_unknown": 3}
    assert not archive.sent
    assert osteo("start", "slow", "--days", "3", "--dry-run").exit_code == 0
    today = datetime.now().astimezone().date()
    assert archive.dates[-1] == f"{today - timedelta(days=2):%Y%m%d}-{today:%Y%m%d}"
    assert osteo("list").stdout == "no pulls\n"
    for arguments, text in (
        (("start", "slow"), "say which"),
        (("start", "slow", "--days", "3", "--from", "2020-01-01"), "--days, or"),
        (("start", "slow", "--from", "2020-01-02", "--to", "2020-01-01"), "--to lies before --from"),
        (("start", "slow", "--from", "2020-01-01", "--between", "soon"), "20:00-06:00"),
    ):
        assert text in osteo(*arguments).stderr
    secret = tmp_path / "list"
    secret.write_text("SECRET-1\nSECRET*\n")
    for arguments, error, text in (
        (("start", "elsewhere", "--from", "2020-01-01"), ConfigurationError, "no archive elsewhere"),
        (("start", "slow", "--patients", str(secret)), ConfigurationError, "line 2"),
        (("status", "7"), Damaged, "no pull 7"),
        (("cancel", "7"), Damaged, "no pull 7"),
    ):
        failed = osteo(*arguments)
        assert isinstance(failed.exception, error)
        assert text in str(failed.exception)
        assert "SECRET" not in str(failed.exception) + failed.output
