"""The refitter: claims refits, has them computed by a child process, and lets screening go first.

The child (`python -m train.refit`) knows no job store, and nothing here knows how a refit is computed: a folder goes
in, a folder with candidates and a verdict comes out. It is stopped (SIGSTOP) the moment a study is screened and goes on
after it. Both may be killed at any time: the child dies with its parent, the lease runs out, and the next claim goes on
from what lies in the refit's folder. Nothing is promoted here: candidates are registered, no more.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from osteo_daemon.archive.export import export_dataset
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.child import start_child
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.refit import OPEN, Refit, RefitState
from osteo_daemon.errors import BundleError, ConfigurationError, Damaged, LeaseLost, Transient
from osteo_daemon.imaging.preprocess import VoiSpec
from osteo_daemon.inference.bundle import ModelBundle, read_bundle
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import configure_logging, get_logger
from osteo_daemon.network.config import BmdScale
from osteo_daemon.registry.registry import Registry
from osteo_daemon.settings import Settings
from osteo_daemon.vitals import Vitals

_WATCH_SECONDS: Final = 0.5
"""How soon the child stands still when a study is screened."""
_BEAT_SHARE: Final = 1 / 4
_END_SECONDS: Final = 10.0
_EXIT_REFUSED: Final = 3
_REPLAY_NAME: Final = "models/replay.safetensors"
"""What `train.refit` and `train.replay` agree on; a test compares, since nothing here imports train."""
_NICE: Final = "19"
_WHO: Final = "refitter"
_PATIENCE_SECONDS: Final = 1800.0
"""A data set of many vertebrae is written before the child starts."""


@dataclass
class _Work:
    """A refit in hand: its deadline counts only while its child runs.

    Attributes:
        refit: as claimed.
        folder: everything that it writes.
        left_seconds: of its time.
    """

    refit: Refit
    folder: Path
    left_seconds: float
    stands_still: bool = False
    beaten_at: float = field(default=float("-inf"))


class Refitter:
    """One refit at a time.

    Args:
        settings: of the node.
        options: further arguments of ``python -m train.refit``.
        alive: called whenever this role's loops come round.

    Raises:
        StoreUnavailable: the job store does not answer.
    """

    def __init__(
        self, settings: Settings, options: Sequence[str] = (), alive: Callable[[], None] = lambda: None
    ) -> None:
        self._settings = settings
        self._options = options
        self._alive = alive
        self._jobs = JobStore(settings.database_url)
        self._registry = Registry(settings, self._jobs)
        self._name = f"{_WHO}-{socket.gethostname()}-{os.getpid()}"
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let `run` end: the refit in hand goes back and is not charged."""
        self._stopping.set()

    def close(self) -> None:
        """Close the store."""
        self._jobs.close()

    def run(self) -> None:
        """Work until `stop`."""
        while not self._stopping.is_set():
            self._alive()
            try:
                worked = self.step()
            except Transient as error:
                get_logger().warning("store_unavailable", error=type(error).__name__, detail=error.detail)
                worked = False
            if not worked:
                self._stopping.wait(self._settings.refit.poll_seconds)

    def step(self) -> bool:
        """Claim a refit and work on it to its end; False when there is none.

        Raises:
            StoreUnavailable: the store does not answer; the lease will run out.
        """
        refit = self._jobs.claim_refit(self._name, self._settings.refit.lease_seconds, is_gone=_is_gone)
        if refit is None:
            return False
        get_logger().info("refit_claimed", job_id=refit.refit_id, attempts=refit.attempts)
        try:
            self._work(refit)
        except LeaseLost:
            get_logger().warning("refit_lease_lost", job_id=refit.refit_id)
        except (ConfigurationError, BundleError, Damaged) as error:
            self._end(refit, RefitState.FAILED, detail=error.detail)
        except OSError as error:
            self._again(refit, f"{error.strerror or type(error).__name__}")
        self._sweep()
        return True

    def _sweep(self) -> None:
        """Remove what ended refits worked on: vertebrae stay in the archive alone, candidates in the registry."""
        open_ones = {refit.refit_id for refit in self._jobs.refits() if refit.state in OPEN}
        for folder in self._settings.refits_dir.glob("[0-9]*-*"):
            if int(folder.name.partition("-")[0]) not in open_ones:
                for name in ("data", "out/work", "out/refit", "out/affine"):
                    shutil.rmtree(folder / name, ignore_errors=True)

    def _work(self, refit: Refit) -> None:
        parent = read_bundle(self._registry.deployed(self._settings.screener.network_bundle).path)
        # another parent is another refit: what an earlier attempt did for the old one is of no use
        folder = self._settings.refits_dir / f"{refit.refit_id}-{parent.sha256[:12]}"
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        work = _Work(refit, folder, self._settings.refit.maximum_hours * 3600)
        data = self._data(refit, folder, parent)
        replay = self._replay(work, parent)
        if replay is None:
            return
        command = [sys.executable, "-m", "train.refit", "--data", str(data), "--parent", str(parent.path)]
        command += ["--site", refit.site, "--out", str(folder / "out"), "--replay", str(replay), *self._options]
        status = self._watch(work, command)
        if status is None:
            return
        if status not in (0, _EXIT_REFUSED):
            self._again(refit, f"the refit's process ended with status {status}")
            return
        self._conclude(refit, folder / "out")

    def _data(self, refit: Refit, folder: Path, parent: ModelBundle) -> Path:
        """The data set: a given folder, or the archive's labelled vertebrae, exported once."""
        if refit.data is not None:
            return Path(refit.data)
        data = folder / "data"
        if not (data / "table.json").exists():
            export_dataset(
                data,
                archive=VoiArchive(self._settings, self._jobs),
                labels=self._jobs.archive_labels(),
                site=refit.site,
                voi=VoiSpec.from_json(parent.inference["voi"]),
                scale=BmdScale.from_json(parent.inference["bmd_scale"]),
            )
        return data

    def _replay(self, work: _Work, parent: ModelBundle) -> Path | None:
        """The replay set of the parent, made once for each parent; None when the refit is not ours any more."""
        if self._settings.refit.replay_file is not None:
            return self._settings.refit.replay_file
        if _REPLAY_NAME in parent.files:
            return parent.path / _REPLAY_NAME
        path = self._settings.refits_dir / f"replay-{parent.sha256[:12]}.safetensors"
        if not path.exists():
            command = [sys.executable, "-m", "train.replay", "--parent", str(parent.path), "--out", str(path)]
            command += ["--patients", str(self._settings.refit.replay_patients), "--workers", "1"]
            status = self._watch(work, command)
            if status is None:
                return None
            if status != 0:
                self._again(work.refit, f"the replay set's process ended with status {status}")
                return None
        return path

    def _watch(self, work: _Work, command: Sequence[str]) -> int | None:
        """Run a child to its end, behind screening; None when it was ended: stopped, out of time or lease lost."""
        child = start_child(["nice", "-n", _NICE, *command], signal.SIGKILL)
        try:
            while child.poll() is None:
                before = time.monotonic()
                self._alive()
                if self._stopping.is_set():
                    self._jobs.release_refit(work.refit, None, charged=False)
                    return None
                if work.left_seconds <= 0:
                    hours = self._settings.refit.maximum_hours
                    self._end(work.refit, RefitState.FAILED, detail=f"not done after {hours:g} h of work")
                    return None
                self._give_way(work, child)
                self._beat(work)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_WATCH_SECONDS)
                if not work.stands_still:
                    work.left_seconds -= time.monotonic() - before
            return child.returncode
        finally:
            _end_group(child)

    def _give_way(self, work: _Work, child: subprocess.Popen[bytes]) -> None:
        """Stop the child while a study is screened, let it go on when none is."""
        if not self._settings.refit.yield_to_screening:
            return
        try:
            busy = self._jobs.counts_by_state()[JobState.SCREENING] > 0
        except Transient:
            return
        if busy != work.stands_still:
            os.killpg(child.pid, signal.SIGSTOP if busy else signal.SIGCONT)
            work.stands_still, work.beaten_at = busy, float("-inf")
            get_logger().info("refit_waits" if busy else "refit_goes_on", job_id=work.refit.refit_id)

    def _beat(self, work: _Work) -> None:
        """Renew the lease and tell the progress."""
        lease = self._settings.refit.lease_seconds
        if time.monotonic() - work.beaten_at < lease * _BEAT_SHARE:
            return
        progress = _read_json(work.folder / "out" / "progress.json") or {"stage": "replay set"}
        progress["paused"] = work.stands_still
        try:
            self._jobs.refit_goes_on(work.refit, lease, progress)
        except Transient as error:
            # the lease outlasts a short silence of the store
            get_logger().warning("refit_not_noted", job_id=work.refit.refit_id, error=type(error).__name__)
            return
        work.beaten_at = time.monotonic()

    def _conclude(self, refit: Refit, out: Path) -> None:
        """Register the candidates and write the verdict down."""
        verdict = _read_json(out / "verdict.json")
        if verdict is None:
            self._again(refit, "the refit's process left no verdict")
            return
        versions = []
        for kind in verdict["figures"].get("bundles", []):
            reason = f"{kind} of refit {refit.refit_id} for {refit.site}: {verdict['verdict']}"
            versions.append(self._registry.register(out / kind, who=_WHO, reason=reason).version)
        self._end(
            refit,
            RefitState.DONE if verdict["candidate"] else RefitState.REFUSED,
            verdict=verdict["verdict"],
            recommended=verdict["recommended"],
            versions=versions,
            detail="; ".join(verdict["reasons"]),
        )

    def _end(self, refit: Refit, state: RefitState, **values: Any) -> None:
        self._jobs.end_refit(refit, state, **values)
        get_logger().info("refit_ended", job_id=refit.refit_id, outcome=state.value, detail=values.get("detail"))

    def _again(self, refit: Refit, detail: str) -> None:
        """Give a refit back whose attempt failed; the claim fails it when attempts are spent."""
        get_logger().warning("refit_attempt_failed", job_id=refit.refit_id, attempts=refit.attempts, detail=detail)
        self._jobs.release_refit(refit, detail, charged=True)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it started; a stopped process takes SIGKILL, too."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    try:
        child.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        get_logger().warning("refit_process_stays", pid=child.pid)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None


def _is_gone(worker: str) -> bool:
    """True for a refitter of this machine whose process has ended."""
    place, _, pid = worker.rpartition("-")
    if place != f"{_WHO}-{socket.gethostname()}" or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def run(settings: Settings) -> int:
    """Run the role until SIGTERM or SIGINT; returns the exit status."""
    configure_logging(settings.log, _WHO)
    # bars belong to a terminal; progress.json is read here
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    vitals = Vitals(settings.state_dir, _WHO, _PATIENCE_SECONDS)
    refitter = Refitter(settings, alive=vitals.alive)

    def end(_signum: int, _frame: FrameType | None) -> None:
        refitter.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with vitals:
        vitals.ready()
        try:
            refitter.run()
        finally:
            vitals.stopping()
            refitter.close()
    return 0
