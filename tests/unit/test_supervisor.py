"""The supervisor as a process, with small children in place of the roles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from osteo_daemon.roles import screeners_of
from osteo_daemon.settings import Settings
from tests.fakes import until

SUPERVISE = """
import json, sys
from osteo_daemon.log import configure_logging
from osteo_daemon.settings import LogSettings
from osteo_daemon.supervisor import Supervisor
configure_logging(LogSettings(), "supervisor")
commands = {name: [sys.executable, "-c", code] for name, code in json.loads(sys.argv[1]).items()}
environments = {name: {"CUDA_VISIBLE_DEVICES": name} for name in commands if name.startswith("screener")}
timing = {"stop_seconds": float(sys.argv[2]), "backoff_seconds": (0.05, 0.3)}
sys.exit(Supervisor(commands, environments=environments, **timing).run())
"""

GENTLE = """
import signal, sys, time
def end(*_):
    open({folder!r} + "/{name}.ended", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open({folder!r} + "/{name}.started", "a").write("x")
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({folder!r} + "/{name}.started", "a").write("x")
time.sleep(600)
"""
SEES = """
import os, time
open({folder!r} + "/{name}.started", "a").write(os.environ.get("CUDA_VISIBLE_DEVICES", "-") + os.environ["PATH"])
time.sleep(600)
"""
DIES = """
open({folder!r} + "/{name}.started", "a").write("x")
"""
RELOADS = """
import signal, time
signal.signal(signal.SIGHUP, lambda *_: open({folder!r} + "/{name}.reloaded", "a").write("x"))
open({folder!r} + "/{name}.started", "a").write("x")
time.sleep(600)
"""
REFUSES = "import sys; sys.exit(2)"
REFUSES_LATER = """
import sys
with open({folder!r} + "/{name}.started", "a+") as file:
    file.write("x")
    file.seek(0)
    sys.exit(0 if len(file.read()) == 1 else 2)
"""


@contextmanager
def supervisor(folder: Path, stop_seconds: float = 10, **children: str) -> Iterator[subprocess.Popen[str]]:
    import json

    commands = {name: code.format(folder=str(folder), name=name) for name, code in children.items()}
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, json.dumps(commands), str(stop_seconds)],
        stderr=(folder / "log").open("w"),
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children()


def started(folder: Path, name: str) -> int:
    path = folder / f"{name}.started"
    return len(path.read_text()) if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_every_child_gently(tmp_path: Path, number: signal.Signals) -> None:
    with supervisor(tmp_path, one=GENTLE, two=GENTLE) as process:
        until(lambda: started(tmp_path, "one") and started(tmp_path, "two"))
        process.send_signal(number)
        assert process.wait(60) == 0
    assert (tmp_path / "one.ended").exists()
    assert (tmp_path / "two.ended").exists()


def test_a_killed_child_is_started_again_and_the_others_stay(tmp_path: Path) -> None:
    with supervisor(tmp_path, one=GENTLE, two=GENTLE) as process:
        until(lambda: started(tmp_path, "one") and started(tmp_path, "two"))
        first, second = children_of(process.pid)
        first.kill()
        until(lambda: started(tmp_path, "one") == 2)
        assert started(tmp_path, "two") == 1
        assert second.is_running()
        assert "exit_code=-9" in (tmp_path / "log").read_text()
        process.terminate()
        assert process.wait(60) == 0


def test_restarts_back_off(tmp_path: Path) -> None:
    with supervisor(tmp_path, one=DIES, two=GENTLE) as process:
        until(lambda: started(tmp_path, "one") >= 3)
        process.terminate()
        assert process.wait(60) == 0
    log = (tmp_path / "log").read_text()
    assert "wait_s=0.05" in log
    assert "wait_s=0.3" in log


def test_a_stubborn_child_is_killed_at_the_deadline(tmp_path: Path) -> None:
    with supervisor(tmp_path, stop_seconds=0.5, one=STUBBORN, two=GENTLE) as process:
        until(lambda: started(tmp_path, "one") and started(tmp_path, "two"))
        (stubborn, _) = children_of(process.pid)
        process.terminate()
        assert process.wait(15) == 0
        assert not stubborn.is_running()
    assert (tmp_path / "two.ended").exists()
    assert "role_killed" in (tmp_path / "log").read_text()


def test_a_role_that_refuses_to_start_ends_all(tmp_path: Path) -> None:
    with supervisor(tmp_path, one=GENTLE, two=REFUSES) as process:
        assert process.wait(60) == 2
    assert "role_refused_to_start" in (tmp_path / "log").read_text()


def test_a_role_that_ran_before_and_refuses_later_takes_nobody_with_it(tmp_path: Path) -> None:
    with supervisor(tmp_path, one=GENTLE, two=REFUSES_LATER) as process:
        until(lambda: started(tmp_path, "two") >= 3)  # it is tried again
        assert "role_refused_to_start" in (tmp_path / "log").read_text()
        assert started(tmp_path, "one") == 1
        assert process.poll() is None
        process.terminate()
        assert process.wait(60) == 0


def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    with supervisor(tmp_path, one=GENTLE) as process:
        until(lambda: started(tmp_path, "one"))
        (child,) = children_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
        assert (tmp_path / "one.ended").exists()


def test_sighup_reaches_the_receiver_and_ends_nobody(tmp_path: Path) -> None:
    with supervisor(tmp_path, receiver=RELOADS, screener=GENTLE) as process:
        until(lambda: started(tmp_path, "receiver") and started(tmp_path, "screener"), 30)
        process.send_signal(signal.SIGHUP)
        until(lambda: (tmp_path / "receiver.reloaded").exists(), 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert started(tmp_path, "receiver") == started(tmp_path, "screener") == 1


def test_each_gpu_is_seen_by_one_screener_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = ("screener", "screener-2", "other")
    with supervisor(tmp_path, **dict.fromkeys(names, SEES)):
        until(lambda: all(started(tmp_path, name) for name in names))
    seen = {name: (tmp_path / f"{name}.started").read_text() for name in names}
    path = os.environ["PATH"]  # the rest of the environment is everybody's
    assert seen == {"screener": f"screener{path}", "screener-2": f"screener-2{path}", "other": f"-{path}"}


def test_which_screeners_there_are() -> None:
    def of(**screener: object) -> dict[str, dict[str, str]]:
        return screeners_of(Settings.model_validate({"screener": screener}))

    assert of() == {"screener": {}}
    assert of(processes=2) == {"screener": {}, "screener-2": {}}
    assert of(gpus=["0", "GPU-8f3a"]) == {
        "screener": {"CUDA_VISIBLE_DEVICES": "0"},
        "screener-2": {"CUDA_VISIBLE_DEVICES": "GPU-8f3a"},
    }
    for wrong in ({"device": "cpu", "gpus": ["0"]}, {"gpus": ["0"], "processes": 2}, {"gpus": [""]}, {"processes": 0}):
        with pytest.raises(ValueError, match="screener"):
            of(**wrong)
