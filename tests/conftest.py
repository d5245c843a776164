"""Fixtures: real CT, free ports, and what to do when something a test needs is not there."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from benchmarks.unpack import unpack
from tests.ports import a_free_port
from tests.postgres import Cluster, cluster, programs

ROOT = Path(__file__).resolve().parents[1]
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")


def missing(what: str) -> None:
    """Skip outside CI; in CI a missing thing fails, so that nothing is passed over in silence."""
    if IN_CI:
        pytest.fail(f"{what}: CI must have it")
    pytest.skip(what)


def require_command(name: str) -> str:
    """Path of a program: on PATH, among Debian's servers, or installed by pip beside the interpreter."""
    found = shutil.which(name) or shutil.which(name, path=f"/usr/sbin:/sbin:{Path(sys.executable).parent}")
    if found is None:
        missing(f"{name} is not installed (make system-packages)")
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A command called in the test process configures its log: later tests don't write to what that one wrote to."""
    configured, before, level = structlog.is_configured(), structlog.get_config(), logging.getLogger().level
    yield
    if configured:
        structlog.configure(**before)
    else:
        structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    logging.captureWarnings(capture=False)
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real CT files."""
    for folder in (os.environ.get("OSTEO_TEST_DATA"), ROOT.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    missing("no real CT files: set OSTEO_TEST_DATA to their folder")
    raise AssertionError


@pytest.fixture(scope="session")
def real_series(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Call with a series' name: its folder of DICOM files, unpacked once."""
    unpacked = tmp_path_factory.mktemp("real-ct")

    def folder(name: str) -> Path:
        if (real_data / name).is_dir():
            return real_data / name
        if not (unpacked / name).is_dir():
            unpack(real_data / f"{name}.tar.xz", unpacked)
        return unpacked / name

    return folder


@pytest.fixture
def acrin(real_series: Callable[[str], Path]) -> Path:
    """The reference series: 99 axial slices from T9 to the femoral heads."""
    return real_series("acrin_flt_breast_001_abdomen")


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Call for a TCP port that is free on loopback."""
    return a_free_port


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL server for the job store, started once and only when a test asks for it."""
    if programs() is None:
        missing("PostgreSQL is not installed (make system-packages)")
    with cluster(a_free_port()) as server:
        yield server
