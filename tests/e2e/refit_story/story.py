"""A site's refit through the real daemon: received, labelled, refitted, shadowed, promoted, rolled back; 3 kills."""

from __future__ import annotations

import getpass
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pydicom
from click.testing import CliRunner

from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.cli import cli
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.refit import Refit, RefitState
from osteo_daemon.inference.bundle import find_bundle
from osteo_daemon.jobs.records import ReportKind
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import Settings, load_settings
from tests.candidates import NETWORK, tiny_candidate
from tests.conftest import ROOT
from tests.e2e.node import destination, running_node
from tests.e2e.refit_story.patients import (
    Readings,
    patient_of,
    readings_of,
    render,
    seed_archive,
    write_ct,
    write_labels,
    write_replay,
)
from tests.fakes import CountingScp, RoleProcess, storescu, until
from tests.refits import refit_process

SITE = "fourth"
_ENDED = (JobState.REPORTED, JobState.DELIVERED)
_SR_CLASS_PREFIX = "1.2.840.10008.5.1.4.1.1.88."


@dataclass(frozen=True)
class Form:
    """How large the story is.

    Attributes:
        studies: patients with labels.
        shadow: studies while the candidate runs in the shadow.
        received: of the patients, those whose CT is received; the others' vertebrae are put into the archive.
        quick: short fits by a refitter of its own, on a replay set that isn't rendered.
        patience_seconds: for the refit.
    """

    studies: int
    shadow: int
    received: int
    quick: bool
    patience_seconds: float

    @classmethod
    def whole(cls, studies: int, shadow: int) -> Form:
        """Every patient through the daemon, the refit as it comes."""
        return cls(studies, shadow, studies, False, 7200.0)


QUICK = Form(studies=12, shadow=1, received=1, quick=True, patience_seconds=240.0)


class Story:
    """One node and what happens to it.

    Args:
        folder: for everything.
        form: how large.
        tell: is told what happened.
    """

    def __init__(self, folder: Path, form: Form, tell: Callable[[str], None]) -> None:
        self.folder = folder
        self.form = form
        self.tell = tell
        self.parent = find_bundle(NETWORK)
        self.readings: Readings = {}
        self.sent = 0

    def run(self) -> None:
        """From the first study to the rollback; an assertion fails where the story is another one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            CountingScp() as pacs,
            running_node(self.folder, self._settings(pacs.port), screener="threads = 1") as node,
        ):
            self.pacs, self.node = pacs, node
            self.settings: Settings = load_settings(self.node.config)
            self.store = JobStore(self.settings.database_url)
            try:
                self._receive_the_labelled()
                self._import_labels()
                version = self._refit()
                self._shadow(version)
                self._promote(version)
                self._roll_back(version)
                self._afterwards(version)
            finally:
                self.store.close()

    def _settings(self, pacs_port: int) -> str:
        key = self.folder / "link.key"
        text = destination("pacs", "PACS", pacs_port)
        # nobody listens there: their objects are built all the same
        text += '[[destinations]]\nname = "his"\nkind = "hl7"\nhost = "127.0.0.1"\nport = 1\n'
        text += '[[destinations]]\nname = "fhir"\nkind = "fhir"\nurl = "http://127.0.0.1:1/fhir"\n'
        text += f'[archive]\nenabled = true\nconsent = "virtual patients"\nkey_file = "{key}"\n'
        text += f'[refit]\nenabled = {str(not self.form.quick).lower()}\nsite = "{SITE}"\n'
        made = self.folder / "init.toml"
        made.write_text(f'state_dir = "{self.folder / "state"}"\n{text}')
        _osteo(made, "archive", "init")
        return text

    # --- the acts -----------------------------------------------------------------------------------------------------

    def _receive_the_labelled(self) -> None:
        """Studies come in; a candidate that no network can be built from runs in the shadow and harms none of them."""
        self._models("register", str(tiny_candidate(self.folder / "broken", "0.0.1").path), "--reason", "a test")
        self._models("shadow", "0.0.1", "--reason", "a test")
        studies = []
        for number in range(self.form.received):
            rendered = render(patient_of(number, self.form.received), "L1")
            name = f"STORY-{number:03d}"
            studies.append(self._send(write_ct(rendered, self.folder / "ct", name)))
            self.readings[name] = readings_of(rendered, number)
        for uid in studies:
            self._ended(uid)
            assert self._used(uid) == self.parent.sha256
        assert "shadow_refused" in self.node.log
        self._models("shadow", "--stop", "--reason", "a test")
        archive = VoiArchive(self.settings, self.store)
        until(lambda: len(archive.entries()) == self.form.received, 60)
        if self.form.received < self.form.studies:
            self.readings |= seed_archive(archive, rendered, self.form.studies - self.form.received)
        self.tell(f"{self.form.received} studies received and screened, {len(archive.entries())} archived")

    def _import_labels(self) -> None:
        file = write_labels(self.folder / "dxa.csv", self.readings)
        done = json.loads(_osteo(self.node.config, "labels", "import", str(file), "--json"))
        assert done["imported"] is not None
        assert not done["flags"], done["flags"]
        assert not done["ambiguous"]
        wanted = sum(len(levels) for levels in self.readings.values())
        # of a received study the localizer may leave a vertebra out: then its reading is rejected, with the reason
        assert done["matched"] + len(done["rejected"]) == wanted
        assert len(done["rejected"]) <= 0.05 * wanted, done["rejected"]
        self.tell(f"{done['matched']} labels imported, {len(done['rejected'])} readings of no archived vertebra")

    def _refit(self) -> str:
        """A refit whose refitter gets SIGKILL; gives the version that the verdict recommends."""
        before = self._deployed()
        started = time.monotonic()
        with self._refitter() as (config, kill, revive):
            _osteo(config, "refit", "--site", SITE, "--reason", "the story")
            state = self.folder / "state"
            # several fits are done, several are left
            until(
                lambda: len(list(state.glob("refits/*/out/work/fits/*.safetensors"))) >= 2, self.form.patience_seconds
            )
            child = until(lambda: refit_process(state), 60)
            kill()
            until(lambda: _is_gone(child), 60)
            kept = {path: _identity(path) for path in _fits(state)}
            assert len(kept) >= 2
            assert self._refit_row().state is RefitState.RUNNING
            assert self._deployed() == before
            revive()

            def ended() -> bool:
                is_over = self._refit_row().state is not RefitState.RUNNING
                # what was done is not done again; in the end it is removed
                assert all(_identity(path) in (None, before_kill) for path, before_kill in kept.items())
                return is_over

            until(ended, self.form.patience_seconds)
        done = self._refit_row()
        assert (done.state, done.attempts) == (RefitState.DONE, 2), done.detail
        assert self._deployed() == before  # nothing is promoted by itself
        candidates = {row["version"]: row for row in self._list() if row["version"] in done.versions}
        assert set(candidates) == set(done.versions)
        assert {row["compared_with"] for row in candidates.values()} == {self.parent.sha256}
        (version,) = [name for name in candidates if f".{done.recommended}." in name]
        self.tell(
            f"refit after a SIGKILL of the refitter: {done.verdict}, recommended {done.recommended}, "
            f"{time.monotonic() - started:.0f} s; {done.detail}"
        )
        return version

    def _shadow(self, version: str) -> None:
        """The candidate looks at further studies and appears in nothing that leaves the node."""
        self._models("shadow", version, "--reason", "the verdict")
        digest = self._row(version)["sha256"]
        for _ in range(self.form.shadow):
            uid = self._another("shadow")
            assert self._used(uid) == self.parent.sha256
            assert not {version, digest} & set(_words(self.store.result(uid)))
            entries = self.store.report_objects(uid)
            assert {ReportKind.SR, ReportKind.HL7, ReportKind.FHIR} <= {entry.kind for entry in entries}
            for entry in entries:
                content = entry.path.read_bytes()
                assert version.encode() not in content, entry.kind
                assert digest.encode() not in content, entry.kind
            assert self.parent.version in self._report(uid)
        rows = until(lambda: found if len(found := self.store.shadows(digest)) == self.form.shadow else None, 60)
        assert all(row.error is None and row.deployed_sha256 == self.parent.sha256 for row in rows)
        compared = json.loads(self._models("compare", version, "--json"))
        assert compared["shadow"]["studies"] == self.form.shadow
        self.tell(f"{self.form.shadow} studies with the candidate in the shadow: {json.dumps(compared['shadow'])}")

    def _promote(self, version: str) -> None:
        """Killed before the link nothing has happened; then promoted, and the next report names it."""
        self._die("before", "promote", version, "--reason", "killed")
        assert self._deployed() == self.parent.sha256
        assert self._moves() == []
        self._models("promote", version, "--reason", "the verdict")
        assert self._deployed() == self._row(version)["sha256"]
        uid = self._another("promoted")
        assert self._used(uid) == self._row(version)["sha256"]
        assert version in self._report(uid)
        self.tell(f"promoted {version}: the next study's report names it")

    def _roll_back(self, version: str) -> None:
        """Killed after the link it has happened, and the history says so."""
        started = time.monotonic()
        self._die("after", "rollback", "--reason", "the story")
        seconds = time.monotonic() - started
        assert self._deployed() == self.parent.sha256
        uid = self._another("back")
        assert self._used(uid) == self.parent.sha256
        assert version not in self._report(uid)
        who = getpass.getuser()
        assert self._moves() == [
            ("promoted", version, who, "the verdict"),
            ("rolled_back", self.parent.version, who, "the story"),
        ]
        self.tell(f"rolled back in {seconds:.1f} s by a process that was killed at the link")

    def _afterwards(self, version: str) -> None:
        assert len(self.store.shadows(self._row(version)["sha256"])) == self.form.shadow
        for row in json.loads(self._models("verify", "--json")):
            assert row["fault"] is None, row
        assert self.node.log.count("screener_ready") == 1  # one process through all of it
        assert "screening_crashed" not in self.node.log
        assert not any(name in self.node.log for name in self.readings)  # no patient's name

    # --- what the acts are made of ------------------------------------------------------------------------------------

    @contextmanager
    def _refitter(self) -> Iterator[tuple[Path, Callable[[], object], Callable[[], object]]]:
        """Settings of a node with a refitter, what kills it, and what starts it again."""
        if not self.form.quick:
            yield self.node.config, lambda: self.node.kill("refitter"), lambda: None  # the supervisor does
            return
        replay = write_replay(
            self.folder / "replay.safetensors", VoiArchive(self.settings, self.store), self.parent, self.readings
        )
        config = self.folder / "refitter.toml"
        text = self.node.config.read_text()
        config.write_text(
            text.replace("[refit]\nenabled = false", f'[refit]\nenabled = true\nreplay_file = "{replay}"')
        )
        role = RoleProcess([str(config)], self.folder / "refitter.log", module="tests.e2e.refit_story.quick_refitter")
        role.start()

        def kill() -> None:
            assert role.stop(signal.SIGKILL) == -signal.SIGKILL

        try:
            yield config, kill, role.start
        finally:
            assert role.stop() == 0, role.log.read_text(errors="replace")

    def _refit_row(self) -> Refit:
        (row,) = self.store.refits()
        return row

    def _another(self, what: str) -> str:
        """One more study, to its report at the PACS; gives its UID."""
        self.sent += 1
        rendered = render(patient_of(1000 + self.sent, 10), "L3")
        uid = self._send(write_ct(rendered, self.folder / "ct", f"STORY-{what}-{self.sent}"))
        self._ended(uid)
        return uid

    def _send(self, files: list[Path]) -> str:
        done = storescu(self.node.port, files)
        assert done.returncode == 0, done.stderr
        return str(pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)

    def _ended(self, uid: str) -> None:
        def state() -> JobState:
            job = self.store.job(uid)
            assert job is not None
            assert job.state not in (JobState.EXCLUDED, JobState.HELD, JobState.FAILED), job
            return job.state

        until(lambda: state() in _ENDED, max(240.0, 30.0 * self.form.received))

    def _used(self, uid: str) -> str:
        result = self.store.result(uid)
        assert result is not None
        return str(result["models"][-1]["sha256"])

    def _report(self, uid: str) -> set[str]:
        """Every text in the study's structured reports at the PACS."""

        def arrived() -> list[Any]:
            return [
                data_set
                for data_set in list(self.pacs.data_sets.values())
                if data_set.StudyInstanceUID == uid and data_set.SOPClassUID.startswith(_SR_CLASS_PREFIX)
            ]

        return {str(element.value) for data_set in until(arrived, 120) for element in data_set.iterall()}

    def _deployed(self) -> str:
        return find_bundle(NETWORK, self.settings.bundles_dir).sha256

    def _list(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self._models("list", "--json"))
        return [row for row in rows if row["name"] == NETWORK]

    def _row(self, version: str) -> dict[str, Any]:
        (row,) = [row for row in self._list() if row["version"] == version and not row["shipped"]]
        return row

    def _moves(self) -> list[tuple[str, str, str, str]]:
        changes = json.loads(self._models("history", "--json"))
        return [
            (change["kind"], change["to_version"], change["who"], change["reason"])
            for change in changes
            if change["kind"] in ("promoted", "rolled_back")
        ]

    def _models(self, *arguments: str) -> str:
        return _osteo(self.node.config, "models", *arguments)

    def _die(self, moment: str, *arguments: str) -> None:
        """`osteo models` as a process that gets SIGKILL before or after the rename of the link."""
        command = [sys.executable, "-m", "tests.e2e.refit_story.dying", moment, *arguments]
        done = subprocess.run(
            [*command, "--config", str(self.node.config)], cwd=ROOT, capture_output=True, timeout=120, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr


def _osteo(config: Path, *arguments: str) -> str:
    done = CliRunner().invoke(cli, [*arguments, "--config", str(config)])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.stdout  # what is logged goes to the other one


def _fits(state_dir: Path) -> list[Path]:
    return list(state_dir.glob("refits/*/out/work/fits/*.safetensors"))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_ino, found.st_mtime_ns)


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _words(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _words(item)
    else:
        yield str(value)
