"""What the import contracts can't see: what really gets loaded, and where the package finds its data."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    "role",
    [
        "receiver",
        "dicomweb_receiver",
        "pull.puller",
        "pull_runner",
        "deliverer",
        "scheduler",
        "console.role",
        "cli",
        "supervisor",
    ],
)
def test_processes_that_face_the_pacs_load_no_torch(role: str) -> None:
    code = f"import sys, osteo_daemon.{role}; print(sorted({{'torch', 'monai', 'train'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_installed_wheel_screens_without_the_checkout(tmp_path) -> None:
    """The wheel carries the package, train and the bundles, and `osteo` finds them outside the checkout."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        check=True,
        timeout=200,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    code = (
        "import osteo_daemon, train, sys; from osteo_daemon.inference.bundle import find_bundle\n"
        "print(osteo_daemon.__file__)\n"
        "print(find_bundle('spine-localizer', None).path)\nprint(find_bundle('osteo-moe', None).path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(site)) for line in done.stdout.split())
