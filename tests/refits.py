"""A tiny network, its bundle, a replay set and a site's data, for refits of a few seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from osteo_daemon.imaging.preprocess import VoiSpec
from osteo_daemon.inference.bundle import ModelBundle, write_bundle
from osteo_daemon.network.config import BmdScale, Calibration
from osteo_daemon.network.multitask import MultitaskMoE
from tests.easy_vois import NETWORK, easy_set
from train.data import NO_LABEL, VoiRow, VoiSet, open_set, write_table
from train.export import scale_of_cohort
from train.features import encode_rows
from train.replay import replay_of
from train.truth import MAKERS, diagnosis, t_score

OFFSET_G_CM2 = 0.15
"""What the fourth site's densitometer reads above the others."""


def seeing_network(data: VoiSet) -> MultitaskMoE:
    """A network whose BMD follows the HU, without a training: its linear path is solved for."""
    torch.manual_seed(0)
    network = MultitaskMoE(NETWORK).eval()
    assert network.hu_statistics is not None
    assert network.bmd_head.linear is not None
    inside = torch.from_numpy(data.hu[:, 4:-4, 4:-4, 4:-4].astype(np.float32))
    network.hu_statistics.fit(network.hu_statistics.raw(inside))
    features = encode_rows(network, data, np.arange(len(data.rows)), torch.device("cpu"))
    target = torch.tensor([float(row.sbmd_g_cm2 or 0.0) for row in data.rows]).double()
    with torch.no_grad():
        for parameter in network.bmd_head.hidden[2].parameters():
            parameter.zero_()
        network.bmd_head.hidden[2].bias[1] = -3.0
        wanted = (target - NETWORK.bmd_centre_g_cm2) / NETWORK.bmd_scale_g_cm2
        design = torch.cat([features.statistics.double(), torch.ones(len(target), 1)], dim=1)
        ridge = design.T @ design + 0.1 * torch.eye(design.shape[1])
        solved = torch.linalg.solve(ridge, design.T @ wanted)
        network.bmd_head.linear.weight.copy_(solved[None, :-1])
        network.bmd_head.linear.bias.copy_(solved[-1:])
        # the class follows the same number
        network.class_head.score.weight.zero_()
        network.class_head.score.weight[:, -len(solved) + 1 :] = -2.0 * solved[None, :-1]
        network.class_head.score.bias.copy_(-2.0 * solved[-1:])
    return network


def bundle_of(network: MultitaskMoE, folder: Path) -> ModelBundle:
    """As `train.export` writes it."""
    return write_bundle(
        folder,
        name="osteo-moe",
        version="1.0.0",
        status="investigational",
        metadata={"task": "a test"},
        network=network.config.to_json(),
        inference={
            "voi": VoiSpec(network.config.voi_shape, network.config.voi_spacing_mm).to_json(),
            "calibration": Calibration().to_json(),
            "bmd_scale": scale_of_cohort().to_json(),
            "training": {"devices": list(MAKERS)},
        },
        weights=network.state_dict(),
        model_card="a test",
        licence="none",
    )


def site_rows(data: VoiSet, offset: float = OFFSET_G_CM2) -> list[VoiRow]:
    """The same vertebrae at a fourth site with a densitometer of its own, as an archive tells of them."""
    scale: BmdScale = scale_of_cohort()
    rows = []
    for number, row in enumerate(data.rows):
        assert row.sbmd_g_cm2 is not None
        assert scale.t_score(1.0, row.level) is not None
        reading = row.sbmd_g_cm2 + offset + float(np.random.default_rng([5, number // 2]).normal(0.0, 0.02))
        rows.append(
            replace(
                row,
                part="train",
                site="fourth",
                device="Fourth",
                reading_g_cm2=reading,
                target_sbmd_g_cm2=reading,
                diagnosis=diagnosis(t_score(reading, row.level)),
                sbmd_g_cm2=None,
                visible_g_cm2=None,
                machine_sbmd_g_cm2=None,
                true_diagnosis=NO_LABEL,
            )
        )
    return rows


def write_site(folder: Path, data: VoiSet, rows: list[VoiRow]) -> Path:
    """A data set as docs/refit-data.md says; the fourth scanner reads 60 HU too low, so that it can be told."""
    folder.mkdir(parents=True)
    np.save(folder / "voi.npy", (data.hu[: len(rows)] - 60).astype(np.int16))
    write_table(folder, rows, {"schema": "osteo-refit-data/1", "voi_spacing_mm": NETWORK.voi_spacing_mm})
    return folder


def make_parts(folder: Path, patients: int = 30) -> tuple[ModelBundle, Path, Path, VoiSet]:
    """Parent bundle, replay file, the site's data set, and the virtual one behind them."""
    virtual = easy_set(folder / "virtual", patients)
    document = json.loads((virtual / "table.json").read_text())
    document["config"]["voi_spacing_mm"] = NETWORK.voi_spacing_mm
    (virtual / "table.json").write_text(json.dumps(document))
    data = open_set(virtual)
    network = seeing_network(data)
    bundle = bundle_of(network, folder / "parent")
    replay = folder / "replay.safetensors"
    replay.write_bytes(replay_of(network, data, list(MAKERS), torch.device("cpu")).to_bytes())
    return bundle, replay, write_site(folder / "site", data, site_rows(data)), data


def refit_process(folder: Path) -> int | None:
    """The process whose command line names that folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train.refit" in words and any(word.startswith(bytes(folder)) for word in words):
            return int(path.parent.name)
    return None


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
