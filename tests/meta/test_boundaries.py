"""What the import contracts can't see: what really gets loaded."""

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
