"""The parent's training with a site's patients among its own: who is learnt from, who judges, and that it goes on."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from osteo_daemon.inference.bundle import ModelBundle
from osteo_daemon.network.multitask import MultitaskMoE
from tests.easy_vois import LOOP, NETWORK, easy_set
from tests.refits import bundle_of
from train.data import Augmentation, VoiRow, open_set
from train.loop import load_run
from train.losses import LossWeights
from train.with_site import join, train_with_site


def parent_of(folder: Path, cohort: Path) -> ModelBundle:
    """A bundle that says how it was trained; one epoch."""
    torch.manual_seed(0)
    made = bundle_of(MultitaskMoE(NETWORK).eval(), folder)
    training = {
        "devices": ["Hologic", "Lunar", "Norland"],
        "loop": asdict(replace(LOOP, epochs=1)),
        "weights": asdict(LossWeights()),
        "augmentation": asdict(Augmentation()),
        "cohort_sha256": open_set(cohort).config["sha256"],
    }
    return replace(made, inference={**made.inference, "training": training})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return easy_set(tmp_path_factory.mktemp("easy") / "cohort", 50)


def site_rows(cohort: Path) -> tuple[np.ndarray, list[VoiRow]]:
    """The external patients with readings, but for the last two, who judge."""
    data = open_set(cohort)
    index = np.array([i for i, row in enumerate(data.rows) if row.part == "external"])[:-4]
    rows = [replace(data.rows[i], device="Fourth", target_sbmd_g_cm2=data.rows[i].sbmd_g_cm2) for i in index]
    return index, [replace(row, diagnosis=row.true_diagnosis) for row in rows]


def test_a_site_joins_the_parents_own_and_who_judges_stays_out(cohort: Path, tmp_path: Path) -> None:
    index, rows = site_rows(cohort)
    join(cohort, None, cohort, index, rows, tmp_path / "joined")
    whole, joined = open_set(cohort), open_set(tmp_path / "joined")
    own = [i for i, row in enumerate(whole.rows) if row.part != "external"]
    np.testing.assert_array_equal(joined.hu[: len(own)], whole.hu[own])
    np.testing.assert_array_equal(joined.hu[len(own) :], whole.hu[index])
    assert list(joined.rows[: len(own)]) == [whole.rows[i] for i in own]
    assert {row.part for row in joined.rows[len(own) :]} == {"train", "val"}
    judges = {row.patient for row in whole.rows if row.part == "external"} - {row.patient for row in rows}
    assert len(judges) == 2
    assert judges.isdisjoint(row.patient for row in joined.rows)
    assert joined.config["sha256"] != whole.config["sha256"]
    before = (tmp_path / "joined" / "voi.npy").stat().st_mtime_ns
    join(cohort, None, cohort, index, rows, tmp_path / "joined")
    assert (tmp_path / "joined" / "voi.npy").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another data set"):
        join(cohort, None, cohort, index[2:], rows[2:], tmp_path / "joined")


def test_a_network_is_trained_with_the_site_as_its_parent_was(cohort: Path, tmp_path: Path) -> None:
    index, rows = site_rows(cohort)
    parent = parent_of(tmp_path / "parent", cohort)
    run = train_with_site(parent, cohort, cohort, index, rows, tmp_path / "work", torch.device("cpu"))
    settings = load_run(run).settings
    assert settings["loop"]["epochs"] == 1
    assert settings["cohort_sha256"] == open_set(tmp_path / "work" / "data").config["sha256"]
    finished = (run / "best.pt").stat().st_mtime_ns
    assert train_with_site(parent, cohort, cohort, index, rows, tmp_path / "work", torch.device("cpu")) == run
    assert (run / "best.pt").stat().st_mtime_ns == finished  # finished is finished
