"""A node under a stream of studies while its processes are killed and the world around it fails."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import ROOT
from tests.e2e.chaos.clock import ShiftedClock
from tests.e2e.chaos.judge import ENDED, Expected, Verdict, connect, judge, read_ledger
from tests.e2e.chaos.pacs import TITLE
from tests.e2e.chaos.studies import EXCLUSIONS, REPORTED, Corpus, SmallStudy
from tests.fakes import CALLED, CALLING, LOOPBACK, a_free_port, until

ROLES = ("receiver", "scheduler", "screener", "worker", "deliverer", "supervisor")
"""What is killed; ``worker`` is the screener's computing process."""

KINDS = (REPORTED, REPORTED, *EXCLUSIONS)
"""The studies of one batch."""

MOMENTS = ("any", "any", "receiving", "screening", "sending")
_MOMENT_SECONDS = 8.0
_ROLE_SECONDS = 60.0  # how long a round waits for a role that is being started
_LATE = 14  # the slice in the middle: without it the study is another one


class Modality:
    """The sender's process, its queue and its ledger."""

    def __init__(self, folder: Path, port: int) -> None:
        self.queue, self.ledger = folder / "queue", folder / "acknowledged.jsonl"
        self.queue.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.chaos.modality", str(port), str(self.ledger), str(self.queue)], cwd=ROOT
        )
        self._tasks = 0

    def send(self, *files: Path) -> None:
        """Queue the objects of one study."""
        self._tasks += 1
        part = self.queue / f"{self._tasks:05d}.part"
        part.write_text("\n".join(map(str, files)))
        part.rename(part.with_suffix(".txt"))

    def idle(self) -> bool:
        """Whether everything that was queued is acknowledged."""
        assert self._process.poll() is None, "the modality ended"
        return not list(self.queue.glob("*.txt"))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Archive:
    """The counting PACS: its process, which may be down, and its ledger, which stays."""

    def __init__(self, folder: Path) -> None:
        self.port, self.ledger, self._mood = a_free_port(), folder / "archived.jsonl", folder / "mood"
        self._process: subprocess.Popen[bytes] | None = None
        self.mood("ok")
        self.start()

    def mood(self, mood: str) -> None:
        """``ok``, ``refuse`` or ``hang``."""
        part = self._mood.with_suffix(".part")
        part.write_text(mood)
        part.replace(self._mood)

    def start(self) -> None:
        arguments = [str(self.port), str(self.ledger), str(self._mood)]
        self._process = subprocess.Popen([sys.executable, "-m", "tests.e2e.chaos.pacs", *arguments], cwd=ROOT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class SmallDisk:
    """A tmpfs of its own for the node, which can be filled; a plain folder where none can be mounted."""

    def __init__(self, folder: Path, megabytes: int = 256) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", str(folder)]
        self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0

    def fill(self, leave_bytes: int = 400_000) -> None:
        """Leave room for some objects, and no more."""
        if self.mounted:
            with self._ballast.open("wb") as ballast:
                os.posix_fallocate(ballast.fileno(), 0, shutil.disk_usage(self.folder).free - leave_bytes)

    def relieve(self) -> None:
        """Somebody made room."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=False)


class Node:
    """`osteo serve`, started again whenever it is gone, as systemd does."""

    def __init__(
        self,
        folder: Path,
        archive_port: int,
        *,
        environment: Mapping[str, str] | None = None,
        state: Path | None = None,
    ) -> None:
        self.folder, self.port = folder, a_free_port()
        self.state = state or folder / "state"
        self.config, self.log = folder / "osteo.toml", folder / "node.log"
        self.config.write_text(_SETTINGS.format(state=self.state, port=self.port, pacs_port=archive_port))
        self.restarts = 0
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._guard = threading.Thread(target=self._keep_alive, daemon=True)
        self._guard.start()

    @property
    def database(self) -> Path:
        return self.state / "jobs.sqlite"

    def _keep_alive(self) -> None:
        while not self._stopping.is_set():
            with self.log.open("ab") as sink:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.e2e.chaos.serve", "serve", "--config", str(self.config)],
                    stdout=sink,
                    stderr=sink,
                    stdin=subprocess.DEVNULL,
                    cwd=ROOT,
                    env=self._environment,
                )
            self._process.wait()
            self.restarts += 1
            self._stopping.wait(0.5)

    def kill(self, role: str) -> bool:
        """SIGKILL a role; False when it was not there."""
        deadline = time.monotonic() + _ROLE_SECONDS
        while (found := self.find(role)) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        try:
            found.kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def find(self, role: str) -> psutil.Process | None:
        """The process of a role of the present supervisor."""
        if self._process is None:
            return None
        try:
            supervisor = psutil.Process(self._process.pid)
            if role == "supervisor":
                return supervisor
            for process in supervisor.children(recursive=True):
                line = process.cmdline()
                if role in line or (role == "worker" and "osteo_daemon.screening_worker" in line):
                    return process
        except psutil.NoSuchProcess:
            pass
        return None

    def states(self) -> dict[str, str]:
        """Study to state, as the store has it."""
        if not self.database.exists():
            return {}
        try:
            with connect(self.database) as store:
                return dict(store.execute("SELECT study_instance_uid, state FROM jobs").fetchall())
        except sqlite3.OperationalError:
            return {}

    def close(self) -> None:
        self._stopping.set()
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
        self._guard.join(60)
        assert not self._guard.is_alive(), "the node did not end within a minute of SIGTERM"


_SETTINGS = f"""\
state_dir = "{{state}}"
[receiver]
ae_title = "{CALLED}"
port = {{port}}
minimum_free_bytes = 0
[[sources]]
ae_title = "{CALLING}"
addresses = ["{LOOPBACK}"]
[completeness]
quiet_seconds = 3
missing_wait_seconds = 3
sweep_seconds = 0.5
[screener]
lease_seconds = 6
poll_seconds = 0.2
retry_base_seconds = 0.2
maximum_attempts = 1000
stop_grace_seconds = 5
threads = 1
[deliverer]
lease_seconds = 6
poll_seconds = 0.2
retry_base_seconds = 0.2
retry_maximum_seconds = 3
probe_maximum_seconds = 3
connect_timeout_seconds = 5
dimse_timeout_seconds = 5
[[destinations]]
name = "pacs"
ae_title = "{TITLE}"
host = "{LOOPBACK}"
port = {{pacs_port}}
commitment = "none"
accept_unproven = true
"""


@dataclass(frozen=True)
class Plan:
    """What happens in one batch, from the seed alone."""

    disturbance: str
    kinds: tuple[str, ...]
    late: bool
    rounds: tuple[tuple[str, str, float], ...]  # role, moment, further seconds

    @classmethod
    def draw(cls, rng: random.Random, rounds: int, disturbance: str, kinds: Sequence[str]) -> Plan:
        kinds = rng.sample(kinds, len(kinds))
        return cls(
            disturbance,
            tuple(kinds),
            rng.random() < 0.5,
            tuple((rng.choice(ROLES), rng.choice(MOMENTS), rng.uniform(0, 2)) for _ in range(rounds)),
        )


DISTURBANCES = ("none", "pacs-down", "pacs-hangs", "pacs-refuses", "store-locked", "clock-jumps", "disk-full")


class Storm:
    """Batches of rounds against one node; every batch ends with a verdict over all that was ever acknowledged."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self._rng = random.Random(seed)
        self._say = say
        self.corpus = Corpus(folder / "corpus", seed)
        self.archive = Archive(folder)
        self._clock = ShiftedClock(folder)
        self.disk = SmallDisk(folder / "disk")
        if not self.disk.mounted:
            say("no tmpfs can be mounted here (it needs root): the disk will not be full in this run")
        self.node = Node(
            folder, self.archive.port, state=self.disk.folder / "state", environment=self._clock.environment
        )
        self.modality = Modality(folder, self.node.port)
        self.kills: Counter[str] = Counter()
        self.rounds = 0
        self._studies: list[SmallStudy] = []

    def batch(self, rounds: int, disturbance: str, *, kinds: Sequence[str] = KINDS) -> Verdict:
        """Send a stream, kill ``rounds`` times, let everything settle, judge."""
        plan = Plan.draw(self._rng, rounds, disturbance, kinds)
        new = [self.corpus.study(len(self._studies) + number, kind) for number, kind in enumerate(plan.kinds)]
        self._studies += new
        start = time.monotonic()
        for study in new:
            late = {study.files[_LATE]} if plan.late and study.kind == REPORTED else set[Path]()
            self.modality.send(*(path for path in study.files if path not in late))
        with self._disturbed(plan.disturbance):
            for role, moment, further in plan.rounds:
                self._await(moment)
                time.sleep(further)
                self.rounds += 1
                if self.node.kill(role):
                    self.kills[role] += 1
            if plan.late:
                for study in new:
                    if study.kind == REPORTED:
                        self.modality.send(study.files[_LATE])
        self.settle()
        verdict = self.judge()
        self._say(
            f"rounds {self.rounds}, {plan.disturbance}{', late slices' if plan.late else ''}: "
            f"{verdict.reported} reported, {verdict.excluded} excluded of {len(self._studies)} studies, "
            f"{verdict.acknowledged} objects acknowledged, {len(verdict.faults)} faults, "
            f"{time.monotonic() - start:.0f} s"
        )
        return verdict

    def judge(self) -> Verdict:
        """Over everything so far."""
        reported = [study for study in self._studies if study.kind == REPORTED]
        expected = Expected(
            {study.uid: EXCLUSIONS[study.kind] for study in self._studies if study.kind != REPORTED},
            {study.uid: self.corpus.expected_sources(study.number) for study in reported},
        )
        verdict = judge(
            read_ledger(self.modality.ledger), read_ledger(self.archive.ledger), self.node.database, expected
        )
        files = sum(len(study.files) for study in self._studies)
        if verdict.acknowledged != files:
            verdict.faults.append(f"{verdict.acknowledged} of {files} objects were acknowledged in the end")
        return verdict

    def settle(self, seconds: float = 240.0) -> None:
        """Until every object is acknowledged and every study has ended; what has not by then, the judge will name."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            states = self.node.states()
            if self.modality.idle() and all(states.get(study.uid) in ENDED for study in self._studies):
                return
            time.sleep(0.5)

    def close(self) -> None:
        self.modality.close()
        try:
            self.node.close()
        finally:
            self.archive.kill()
            self.disk.close()

    def _await(self, moment: str) -> None:
        """Wait for the moment, not for ever."""
        ledgers = {"receiving": self.modality.ledger, "sending": self.archive.ledger}
        deadline = time.monotonic() + _MOMENT_SECONDS
        if moment in ledgers:
            size = _size(ledgers[moment])
            while _size(ledgers[moment]) == size and time.monotonic() < deadline:
                time.sleep(0.02)
        elif moment == "screening":
            while "SCREENING" not in self.node.states().values() and time.monotonic() < deadline:
                time.sleep(0.05)

    @contextmanager
    def _disturbed(self, disturbance: str) -> Iterator[None]:
        timer: threading.Thread | None = None
        if disturbance == "pacs-down":
            self.archive.kill()
        elif disturbance in ("pacs-hangs", "pacs-refuses"):
            self.archive.mood(disturbance.removeprefix("pacs-").removesuffix("s"))
        elif disturbance == "disk-full":
            self.disk.fill()
        elif disturbance == "store-locked":
            timer = threading.Thread(target=self._lock_store, args=[self._rng.uniform(3, 8)])
            timer.start()
        elif disturbance == "clock-jumps":
            timer = threading.Thread(target=self._jump, args=[self._rng.choice([7200, -7200])])
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.join()
            self.archive.mood("ok")
            self.disk.relieve()
            if disturbance == "pacs-down":
                self.archive.start()

    def _lock_store(self, seconds: float) -> None:
        """Another process's lock: what a backup tool or an administrator's shell may hold."""
        until(self.node.database.exists, 30)
        code = (
            "import sqlite3, sys, time\n"
            "store = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)\n"
            "store.execute('BEGIN EXCLUSIVE')\n"
            "time.sleep(float(sys.argv[2]))\n"
            "store.execute('ROLLBACK')\n"
        )
        subprocess.run([sys.executable, "-c", code, str(self.node.database), str(seconds)], check=True)

    def _jump(self, seconds: int) -> None:
        """The clock of every process of the node jumps, and some seconds later back again."""
        for shift in (seconds, 0):
            self._clock.shift(shift)
            time.sleep(6)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
