"""The network of a bundle as one ONNX file, for runtimes other than torch.

    python -m train.onnx_export --bundle model_zoo/osteo-moe --out osteo-moe.onnx

The file holds the network alone: HU and level in, the outputs of `osteo_daemon.network.multitask.MoEOutput` under
their names, before calibration, which stays in the bundle's configs/inference.json together with the preprocessing.
Every export is run beside torch before it is written. ``pip install osteo-daemon[onnx]``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch

from osteo_daemon.inference.bundle import ModelBundle, read_bundle
from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.multitask import UNKNOWN_LEVEL, MoEOutput, MultitaskMoE

OPSET: Final = 20
LARGEST_BATCH: Final = 64
RELATIVE_TOLERANCE: Final = 1e-3
ABSOLUTE_TOLERANCE: Final = 1e-4
"""Rounding of two runtimes that add in different orders."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest difference of each output between torch and the file, over batches of one and more."""

    largest: dict[str, float]
    within: bool


def network_of(bundle: ModelBundle) -> MultitaskMoE:
    """The bundle's network in evaluation mode.

    Raises:
        BundleError: configuration and weights do not belong together.
    """
    network = MultitaskMoE(MoEConfig.from_json(bundle.network))
    network.load_state_dict(bundle.load_weights())
    return network.eval()


def to_onnx(network: MultitaskMoE) -> onnx.ModelProto:
    """The network as an ONNX model with a batch of any size up to `LARGEST_BATCH`."""
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    hu, level = _example(network.config, 2, seed=0)
    program = torch.onnx.export(
        network.eval(),
        (hu, level),
        dynamo=True,
        dynamic_shapes={"hu": {0: batch}, "level": {0: batch}},
        input_names=["hu", "level"],
        output_names=list(MoEOutput._fields),
        opset_version=OPSET,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch gave no ONNX program")
    return program.model_proto


def check_parity(network: MultitaskMoE, content: bytes) -> Parity:
    """Run both on noise of CT-like density, in batches of 1, 2 and 5, the unknown level among them."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = dict.fromkeys(MoEOutput._fields, 0.0)
    within = True
    for size in (1, 2, 5):
        hu, level = _example(network.config, size, seed=size)
        with torch.inference_mode():
            expected = network(hu, level)
        found: list[npt.NDArray[Any]] = session.run(None, {"hu": hu.numpy(), "level": level.numpy()})
        for name, one, other in zip(MoEOutput._fields, expected, found, strict=True):
            largest[name] = max(largest[name], float(np.abs(one.numpy() - other).max()))
            within &= bool(np.allclose(other, one.numpy(), rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE))
    return Parity(largest, within)


def export_bundle(bundle: ModelBundle, target: Path) -> Parity:
    """Write the bundle's network to ``target``, named after the bundle, once both runtimes agree.

    Raises:
        BundleError: the bundle's network can't be built.
        ValueError: the file would answer otherwise than torch.
    """
    network = network_of(bundle)
    model = to_onnx(network)
    facts = {"bundle": bundle.name, "version": bundle.version, "sha256": bundle.sha256, "status": bundle.status}
    onnx.helper.set_model_props(model, facts)
    content = model.SerializeToString()
    parity = check_parity(network, content)
    if not parity.within:
        raise ValueError(f"ONNX and torch differ: {json.dumps(parity.largest)}")
    temporary = target.with_suffix(".part")
    temporary.write_bytes(content)
    temporary.replace(target)
    return parity


def _example(config: MoEConfig, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = 250.0 * torch.rand((size, 1, 1, 1), generator=generator)
    hu = base + 60.0 * torch.randn((size, *config.voi_shape), generator=generator)
    level = torch.arange(size) % len(config.levels)
    level[-1] = UNKNOWN_LEVEL
    return hu, level


def main() -> None:
    """Command line of ``python -m train.onnx_export``."""
    parser = argparse.ArgumentParser(description="a bundle's network as ONNX")
    parser.add_argument("--bundle", type=Path, default=Path("model_zoo/osteo-moe"))
    parser.add_argument("--out", type=Path, default=Path("osteo-moe.onnx"))
    given = parser.parse_args()
    parity = export_bundle(read_bundle(given.bundle), given.out)
    print(json.dumps({"file": str(given.out), "largest_difference": parity.largest}, indent=1))


if __name__ == "__main__":
    main()
