"""Two processes started by torchrun train what one would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import distributed_run
from tests.conftest import ROOT
from tests.easy_vois import NETWORK, easy_set
from train.data import Augmentation, batches, open_set
from train.distributed import Ranks


def torchrun(processes: int, data: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed_run", str(data), str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "last.pt", weights_only=True)["network"])


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Each sample's loss has the same weight in both: the gradients of two halves average to that of the whole."""
    data = easy_set(tmp_path / "set", patients=40)
    distributed_run.main(data, tmp_path / "one")
    torchrun(2, data, tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=2e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    first, second = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    assert len(first) == len(second) == 2
    assert first[-1]["loss"] == pytest.approx(second[-1]["loss"], rel=1e-2)


def test_shares_of_a_batch_are_all_of_it_once(tmp_path: Path) -> None:
    data = open_set(easy_set(tmp_path / "set", patients=20))
    batch = next(iter(batches(data, data.indices("train"), NETWORK, [], 8, augmentation=Augmentation())))
    shares = [Ranks(rank, 3).share(batch).index.tolist() for rank in range(3)]
    assert sorted(i for share in shares for i in share) == sorted(batch.index.tolist())
    with pytest.raises(ValueError, match="evenly"):
        Ranks(0, 3).check_batch(8)
