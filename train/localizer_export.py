"""Turn a training run of the spine localizer into a bundle: ``python -m train.localizer_export --version V``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from osteo_daemon.inference.bundle import ModelBundle, write_bundle
from osteo_daemon.network.localizer import LocalizerConfig, SpineClass, SpineLocalizerNet

ROOT = Path(__file__).resolve().parents[1]
APACHE_2 = Path("/usr/share/common-licenses/Apache-2.0")

ATTRIBUTION = """Weights of the spine localizer. Copyright 2026 The osteo_daemon maintainers.
Apache License 2.0 (below).

Trained on one labelled CT of wasserth/TotalSegmentator (tests/reference_files), Apache License 2.0, and on virtual
patients of this project. No image is contained in the weights' files.

"""


def export(run: Path, target: Path, version: str, trained_with_phantoms: int) -> ModelBundle:
    """Write the moving average of a run's last checkpoint as a bundle, its card still without figures."""
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    config = LocalizerConfig.from_dict(json.loads(state["config"]))
    net = SpineLocalizerNet(config)
    net.load_state_dict(state["ema"])
    return write_bundle(
        target,
        name="spine-localizer",
        version=version,
        status="investigational",
        metadata={
            "task": "voxel labels of the spine for counting vertebrae",
            "description": "Small 3D UNet over 3 mm voxels; trained on one labelled torso and virtual patients.",
            "authors": "The osteo_daemon maintainers",
            "copyright": "2026 The osteo_daemon maintainers, Apache-2.0",
            "intended_use": "Research; screening decisions rest on attenuation measured in the bodies it finds.",
            "training": {"steps": int(state["step"]), "virtual_patients": trained_with_phantoms},
            "network_data_format": {
                "inputs": {
                    "image": {
                        "type": "image",
                        "format": "hounsfield",
                        "modality": "CT",
                        "num_channels": len(config.windows_hu),
                        "spatial_shape": list(config.patch_voxels),
                        "dtype": "float32",
                        "value_range": [-1, 1],
                        "is_patch_data": True,
                        "channel_def": {
                            str(i): f"HU {low:g} to {high:g}" for i, (low, high) in enumerate(config.windows_hu)
                        },
                    }
                },
                "outputs": {
                    "pred": {
                        "type": "probabilities",
                        "format": "segmentation",
                        "num_channels": len(SpineClass) + 2,
                        "spatial_shape": list(config.patch_voxels),
                        "dtype": "float32",
                        "value_range": [-1, 1],
                        "is_patch_data": True,
                        "channel_def": {
                            **{str(int(c)): c.name.lower() for c in SpineClass},
                            str(len(SpineClass)): "phase_cos",
                            str(len(SpineClass) + 1): "phase_sin",
                        },
                    }
                },
            },
        },
        network=json.loads(json.dumps(config.to_dict())),
        inference={"grid": "cubic voxels, axes cranial, posterior, left (LPS)", "spacing_mm": config.spacing_mm},
        # half precision: 2^-11 relative is far below what bfloat16 inference rounds; half the size
        weights={name: value.half() for name, value in net.state_dict().items()},
        model_card=f"# spine-localizer {version}\n\nNot yet evaluated: `python -m train.localizer_card`.\n",
        licence=ATTRIBUTION + APACHE_2.read_text(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/localizer"))
    parser.add_argument("--out", type=Path, default=ROOT / "model_zoo" / "spine-localizer")
    parser.add_argument("--version", required=True)
    parser.add_argument("--phantoms", type=int, default=0, help="number of virtual patients trained on")
    args = parser.parse_args()
    bundle = export(args.run, args.out, args.version, args.phantoms)
    print(bundle.name, bundle.version, bundle.sha256)


if __name__ == "__main__":
    main()
