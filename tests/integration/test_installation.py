"""The wheel: what is in it, and what an environment of its own makes of it, far from the checkout."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from osteo_daemon.settings import load_settings
from tests.conftest import ROOT

SHARED = {
    "systemd": "systemd",
    "deploy/osteo.example.toml": "osteo.example.toml",
    "deploy/prometheus": "prometheus",
    "deploy/grafana": "grafana",
}
"""What lies below ``share/osteo-daemon`` of the environment, by where it stands here."""

USE_ITS_DATA = """
import sys
from pathlib import Path
import osteo_daemon, train
from jinja2 import StrictUndefined
from osteo_daemon.console.explanations import read_explanations
from osteo_daemon.console.pages import _templates
from osteo_daemon.domain.wording import LANGUAGES, load_wording
from osteo_daemon.inference.bundle import find_bundle, is_shipped
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.monitor.messages import Writer

for name in _templates().list_templates():
    _templates().get_template(name)
assert read_explanations().flags and read_explanations().exclusions
assert {load_wording(language).language for language in LANGUAGES} == set(LANGUAGES)
Writer(None, "node")  # writes an example
JobStore(f"sqlite:///{Path.cwd() / 'jobs.sqlite'}").close()
print(osteo_daemon.__file__, train.__file__, sep="\\n")
for name in ("spine-localizer", "osteo-moe"):
    path = find_bundle(name, None).path
    assert is_shipped(path)
    print(path)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this checkout, as `pip install .` does."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], check=True, timeout=280
    )
    (built,) = folder.glob("osteo_daemon-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel; dependencies are lent by the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment") / "osteo"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=280)
    python = str(folder / "bin" / "python")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--no-compile",
            str(wheel),
        ],
        check=True,
        timeout=280,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    # a folder on the path, not a site: the editable installation of the checkout in there does not count
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder


def _files_below(folder: Path) -> dict[str, Path]:
    if folder.is_file():
        return {"": folder}
    return {
        f"/{path.relative_to(folder)}": path
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_the_wheel_holds_the_packages_the_bundles_and_what_an_installation_needs_and_nothing_else(wheel: Path) -> None:
    wanted: dict[str, Path] = {}
    with zipfile.ZipFile(wheel) as archive:
        there = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    (data,) = {name.partition("/")[0] for name in there if name.partition("/")[0].endswith(".data")}
    places = {"osteo_daemon": "osteo_daemon", "train": "train", "model_zoo": "osteo_daemon/model_zoo"}
    places["docs/report.md"] = "osteo_daemon/console/report.md"
    places |= {source: f"{data}/data/share/osteo-daemon/{target}" for source, target in SHARED.items()}
    for source, target in places.items():
        wanted |= {target + below: path for below, path in _files_below(ROOT / source).items()}
    assert len(wanted) > 300  # the search itself works
    assert sorted(there) == sorted(wanted)
    assert _digests(there) == _digests({name: path.read_bytes() for name, path in wanted.items()})


def test_every_role_finds_its_data_in_a_fresh_environment(environment: Path, tmp_path: Path) -> None:
    """Templates, texts, migrations, bundles: read by what uses them, outside the checkout."""
    done = subprocess.run(
        [str(environment / "bin" / "python"), "-c", USE_ITS_DATA],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4
    assert all(line.startswith(str(environment)) for line in done.stdout.split())


def test_osteo_runs_from_it_with_the_settings_that_came_along(environment: Path, tmp_path: Path) -> None:
    share = environment / "share" / "osteo-daemon"
    assert {path.name for path in share.iterdir()} == set(SHARED.values())
    assert load_settings(share / "osteo.example.toml", {}) == load_settings(ROOT / "deploy" / "osteo.example.toml", {})
    done = subprocess.run(
        [str(environment / "bin" / "osteo"), "conformance", "--config", str(share / "osteo.example.toml")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("OSTEO_")},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# DICOM conformance statement")
