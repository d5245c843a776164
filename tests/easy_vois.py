"""A data set whose HU give everything away: what any sound training must learn, small enough for a unit test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from osteo_daemon.network.config import MoEConfig
from train import truth
from train.cohort import CohortConfig
from train.data import MARGIN_VOXELS, NO_LABEL, VoiRow, digest_of, write_table
from train.loop import LoopConfig
from train.splits import part_of

SHAPE = (16, 24, 32)
NETWORK = MoEConfig(
    voi_shape=SHAPE,
    voi_spacing_mm=2.0,
    stage_channels=(8, 8, 8, 8),
    feature_width=16,
    hu_width=8,
    expert_width=8,
    levels=("L1", "L2"),
    bmd_levels=("L1", "L2"),
)
LOOP = LoopConfig(epochs=3, batch_size=16, patience=99, ema_decay=0.9, learning_rate=3e-3)


def easy_set(folder: Path, patients: int = 80) -> Path:
    """VOIs whose HU give the BMD away: what any sound training must learn."""
    rng = np.random.default_rng(4)
    stored = tuple(n + 2 * MARGIN_VOXELS for n in SHAPE)
    rows, vois = [], []
    for number in range(patients):
        external = number % 5 == 4
        sbmd = float(rng.uniform(0.6, 1.3))
        for level in ("L1", "L2"):
            density = 250.0 * (sbmd - 0.5)
            hu = rng.normal(density, 20.0, stored)
            hu[:, :, : stored[2] // 3] = -100.0 if level == "L1" else 300.0
            vois.append(hu.astype(np.int16))
            value = diag = None
            if not external:
                value, diag = sbmd, truth.diagnosis(truth.t_score(sbmd, level))
            rows.append(
                VoiRow(
                    patient=f"p{number}",
                    part=part_of(f"p{number}", external),
                    site="s",
                    device="Unseen" if external else truth.MAKERS[number % 3],
                    level=level,
                    age_years=60,
                    sex="F",
                    kvp=120.0,
                    thickness_mm=1.0,
                    kernel="soft",
                    phase="native",
                    density_mg_cm3=density,
                    sbmd_g_cm2=sbmd,
                    reading_g_cm2=value,
                    target_sbmd_g_cm2=value,
                    diagnosis=NO_LABEL if diag is None else diag,
                    true_diagnosis=truth.diagnosis(truth.t_score(sbmd, level)),
                    visible_g_cm2=sbmd,
                    machine_sbmd_g_cm2=value,
                )
            )
    folder.mkdir(parents=True)
    np.save(folder / "voi.npy", np.stack(vois))
    config: dict[str, Any] = {
        **json.loads(json.dumps(CohortConfig(patients=patients, levels=("L1", "L2")).to_json())),
    }
    write_table(folder, rows, {**config, "sha256": digest_of(config)})
    return folder
