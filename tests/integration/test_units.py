"""The units as systemd's own tools see them."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from osteo_daemon.roles import ROLES
from tests.conftest import ROOT

UNITS = ROOT / "systemd"
EXPOSURE = 2.0
"""What `systemd-analyze security` may say at most, of 10."""

needs_tools = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="Debian's systemd is not installed")


def _services() -> list[Path]:
    return sorted(UNITS.glob("*.service"))


def _of(unit: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit, encoding="utf-8")
    return parser


def test_there_is_one_for_each_role() -> None:
    assert {unit.stem.removeprefix("osteo-") for unit in _services()} == set(ROLES)


@pytest.mark.parametrize("unit", _services(), ids=lambda unit: unit.stem)
def test_each_is_told_watched_and_started_again(unit: Path) -> None:
    service = _of(unit)["Service"]
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "main"  # a worker does not speak for its role
    assert int(service["WatchdogSec"]) > 0
    assert int(service["TimeoutStartSec"]) >= 300
    assert service["Restart"] == "always"
    assert f"run {unit.stem.removeprefix('osteo-')} " in service["ExecStart"]
    assert "AF_UNIX" in service["RestrictAddressFamilies"]  # or it could not say that it is ready


@needs_tools
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    for unit in (*_services(), *UNITS.glob("*.target")):
        text = unit.read_text(encoding="utf-8")
        # the only thing that is not here: the installed program
        (tmp_path / unit.name).write_text(text.replace("/opt/osteo-daemon/bin/osteo", "/bin/true"), encoding="utf-8")
    names = sorted(str(path) for path in tmp_path.iterdir())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, timeout=120, check=False
    )
    # it also tells of units of this machine, which are none of ours
    assert not [line for line in done.stderr.splitlines() if "osteo" in line], done.stderr
    assert done.returncode == 0, done.stderr


@needs_tools
def test_each_is_shut_in() -> None:
    units = _services()
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", *map(str, units)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
    )
    found = dict(re.findall(r"Overall exposure level for (\S+): (\d+\.\d)", done.stdout))
    assert set(found) == {unit.name for unit in units}
    assert {name: value for name, value in found.items() if float(value) > EXPOSURE} == {}


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None or os.geteuid() != 0, reason="needs systemd and root")
def test_user_and_folders_are_made(tmp_path: Path) -> None:
    """In a root folder of its own, by the tools that an installation uses."""
    (tmp_path / "etc").mkdir()
    for command in (
        ["systemd-sysusers", f"--root={tmp_path}", str(UNITS / "osteo-daemon.sysusers")],
        ["systemd-tmpfiles", f"--root={tmp_path}", "--create", str(UNITS / "osteo-daemon.tmpfiles")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    line = next(line for line in (tmp_path / "etc/passwd").read_text().splitlines() if line.startswith("osteo:"))
    uid, gid = line.split(":")[2:4]
    state, settings = (tmp_path / "var/lib/osteo-daemon").stat(), (tmp_path / "etc/osteo-daemon").stat()
    assert (state.st_mode & 0o777, str(state.st_uid)) == (0o700, uid)
    assert (settings.st_mode & 0o777, settings.st_uid, str(settings.st_gid)) == (0o750, 0, gid)
