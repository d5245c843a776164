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
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, evt

from osteo_daemon.cli import cli
from osteo_daemon.errors import ConfigurationError, Damaged
from osteo_daemon.jobs.store import JobStore
from tests.conftest import ROOT
from tests.fakes import LOOPBACK, settings_text, until, write_ct

FIND = "1.2.840.10008.5.1.4.1.2.2.1"
GET = "1.2.840.10008.5.1.4.1.2.2.3"
CT = "1.2.840.10008.5.1.4.1.1.2"


@dataclass
class SlowArchive:
    """An archive on loopback that counts what it sends, and waits before each object when told to.

    Attributes:
        sent: how often each SOP Instance UID was sent and acknowledged.
        asked: identifiers of C-GET requests: level, and how many SOP Instance UIDs they named.
        cancelled: C-GET requests that ended by C-CANCEL.
        dates: keys of the questions.
        gate: called before each object is sent with what asks, once, whether a C-CANCEL has come; gives its answer.
    """

    studies: dict[str, list[Dataset]]
    sent: Counter[str] = field(default_factory=Counter)
    asked: list[tuple[str, int]] = field(default_factory=list)
    cancelled: int = 0
    dates: list[str] = field(default_factory=list)
    gate: Callable[[Callable[[], bool]], bool] = lambda cancelled: cancelled()
    port: int = 0
    _server: Any = None

    def __enter__(self) -> SlowArchive:
        entity = AE(ae_title="SLOW")
        entity.add_supported_context(FIND)
        entity.add_supported_context(GET)
        entity.supported_contexts = [*entity.supported_contexts, build_context(CT)]
        for context in entity.supported_contexts:
            if context.abstract_syntax == CT:
                context.scu_role, context.scp_role = False, True
        handlers = [(evt.EVT_C_FIND, self._find), (evt.EVT_C_GET, self._get)]
        self._server = entity.start_server((LOOPBACK, 0), block=False, evt_handlers=handlers)
        self.port = self._server.server_address[1]
        return self

    def __exit__(self, *_reason: object) -> None:
        self._server.shutdown()

    @property
    def images(self) -> set[str]:
        """Every SOP Instance UID."""
        return {str(image.SOPInstanceUID) for images in self.studies.values() for image in images}

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset]]:
        keys = event.identifier
        self.dates.append(str(keys.get("StudyDate", "")))
        for uid, images in self.studies.items():
            if keys.QueryRetrieveLevel != "STUDY" and uid != keys.StudyInstanceUID:
                continue
            for image in images if keys.QueryRetrieveLevel == "IMAGE" else images[:1]:
                answer = Dataset()
                answer.QueryRetrieveLevel = keys.QueryRetrieveLevel
                for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality"):
                    if keyword in keys:
                        setattr(answer, keyword, image.get(keyword))
                yield 0xFF00, answer

    def _get(self, event: Any) -> Iterator[Any]:
        keys = event.identifier
        wanted = keys.get("SOPInstanceUID")
        named = [wanted] if isinstance(wanted, str) else list(wanted or ())
        self.asked.append((keys.QueryRetrieveLevel, len(named)))
        images = [image for image in self.studies[keys.StudyInstanceUID] if not named or image.SOPInstanceUID in named]
        yield len(images)
        for image in images:
            if self.gate(lambda: event.is_cancelled):
                self.cancelled += 1
                yield 0xFE00, None
                return
            self.sent[str(image.SOPInstanceUID)] += 1
            yield 0xFF00, image


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[SlowArchive]:
    """Three studies of six slices."""
    series = [[dcmread(path) for path in write_ct(tmp_path / str(n), count=6, seed=n)] for n in range(3)]
    with SlowArchive({str(images[0].StudyInstanceUID): images for images in series}) as running:
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
    entry = f'''[[archives]]
name = "slow"
retrieve = "c-get"
ae_title = "SLOW"
host = "{LOOPBACK}"
port = {archive.port}
'''
    config = tmp_path / "osteo.toml"
    config.write_text(settings_text(tmp_path / "state", 11112, extra=entry))
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
