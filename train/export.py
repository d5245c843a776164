"""From a finished run to a bundle: weights, configuration, calibration, model card, and what a refit rehearses.

    python -m train.export --run runs/multitask --out model_zoo/osteo-moe --version 0.1.0

Evaluates the run first when that has not been done.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

from osteo_daemon.imaging.preprocess import VoiSpec
from osteo_daemon.inference.bundle import ModelBundle, write_bundle
from osteo_daemon.network.config import CLASSES, BmdScale, MoEConfig
from train import truth
from train.data import open_set
from train.evaluate import evaluate_run
from train.loop import load_run
from train.model_card import model_card
from train.outliers import bundle_parts, fit_outliers
from train.replay import REPLAY_NAME, replay_of_cohort

NAME: Final = "osteo-moe"


def scale_of_cohort() -> BmdScale:
    """The scale and the reference that the cohort's labels are made on."""
    return BmdScale(
        name="sBMD (Hui 1997), simulated",
        reference=truth.REFERENCE_NAME,
        reference_mean_g_cm2=round(truth.REFERENCE_MEAN_G_CM2, 5),
        reference_sd_g_cm2=round(truth.REFERENCE_SD_G_CM2, 5),
        level_offset_g_cm2=dict(truth.LEVEL_OFFSET_G_CM2),
    )


def export_run(folder: Path, target: Path, version: str, licence: str, repeats: int = 500) -> ModelBundle:
    """Write the run in ``folder`` as a bundle into ``target``; its status is investigational, always.

    Raises:
        BundleError: a value cannot be written.
    """
    evaluation_file = folder / "evaluation.json"
    evaluation = json.loads(evaluation_file.read_text()) if evaluation_file.exists() else evaluate_run(folder, repeats)
    run = load_run(folder)
    summary = json.loads((folder / "summary.json").read_text())
    data = open_set(Path(run.settings["data"]))
    cohort = data.config
    config = run.network.config
    spec = VoiSpec(config.voi_shape, config.voi_spacing_mm)
    outlier_numbers, outlier_files = bundle_parts(fit_outliers(run.network, data))
    rehearsal = replay_of_cohort(run.network, data, run.devices)
    return write_bundle(
        target,
        name=NAME,
        version=version,
        status="investigational",
        metadata=_metadata(config, version, cohort),
        network=config.to_json(),
        inference={
            "voi": spec.to_json(),
            "calibration": evaluation["calibration"],
            "bmd_scale": scale_of_cohort().to_json(),
            **outlier_numbers,
            "training": {
                "cohort_sha256": cohort["sha256"],
                "devices": run.devices,
                "best_epoch": run.epoch,
                "loop": run.settings["loop"],
                "weights": run.settings["weights"],
                "augmentation": run.settings["augmentation"],
                "densitometry": run.settings["densitometry"],
                "encoder_sha256": run.settings["encoder_sha256"],
            },
        },
        weights=run.network.state_dict(),
        model_card=model_card(f"{NAME} {version}", config, run.settings, summary, cohort, evaluation, run.epoch),
        licence=licence,
        extra_files={
            "docs/evaluation.json": (json.dumps(evaluation, indent=1) + "\n").encode(),
            REPLAY_NAME: rehearsal.to_bytes(),
            **outlier_files,
        },
    )


def _metadata(config: MoEConfig, version: str, cohort: dict[str, Any]) -> dict[str, Any]:
    d, h, w = config.voi_shape
    vector = {"format": "vector", "dtype": "float32", "is_patch_data": False, "spatial_shape": []}
    return {
        "changelog": {version: f"trained on the virtual cohort {cohort['sha256'][:12]}"},
        "task": "diagnosis class, areal BMD and level of one vertebra from CT",
        "description": "multitask mixture-of-experts network trained on virtual patients only; investigational",
        "authors": "The osteo_daemon maintainers",
        "copyright": "The osteo_daemon maintainers",
        "intended_use": "research; not for diagnosis; never the basis of a category or conclusion",
        "data_source": "virtual patients of osteo_daemon.phantom; no patient's image and no clinical label",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield",
                    "modality": "CT",
                    "num_channels": 1,
                    "spatial_shape": [d, h, w],
                    "dtype": "float32",
                    "value_range": [-1024, 3071],
                    "is_patch_data": False,
                    "channel_def": {"0": "image"},
                }
            },
            "outputs": {
                "class": {
                    **vector,
                    "type": "probabilities",
                    "num_channels": len(CLASSES),
                    "value_range": [0, 1],
                    "channel_def": {str(i): name for i, name in enumerate(CLASSES)},
                },
                "bmd": {
                    **vector,
                    "type": "regression",
                    "num_channels": 1,
                    "value_range": [0, 3],
                    "channel_def": {"0": "BMD in g/cm2"},
                },
                "level": {
                    **vector,
                    "type": "probabilities",
                    "num_channels": len(config.levels),
                    "value_range": [0, 1],
                    "channel_def": {str(i): name for i, name in enumerate(config.levels)},
                },
            },
        },
    }


def main() -> None:
    """Command line of ``python -m train.export``."""
    parser = argparse.ArgumentParser(description="write a run as a bundle")
    parser.add_argument("--run", type=Path, default=Path("runs/multitask"))
    parser.add_argument("--out", type=Path, default=Path("model_zoo") / NAME)
    parser.add_argument("--version", default="0.1.0")
    parser.add_argument(
        "--licence", type=Path, default=Path("model_zoo") / NAME / "LICENSE", help="text for the bundle"
    )
    given = parser.parse_args()
    bundle = export_run(given.run, given.out, given.version, given.licence.read_text())
    print(f"{bundle.path}: {bundle.name} {bundle.version} {bundle.status} sha256 {bundle.sha256}")


if __name__ == "__main__":
    main()
