"""Small bundles with a verdict, as a refit leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from osteo_daemon.inference.bundle import ModelBundle, find_bundle, write_bundle

NETWORK = "osteo-moe"
_WRITTEN = {"schema", "osteo_schema", "name", "version", "status", "monai_version", "pytorch_version", "numpy_version"}


def verdict_file(verdict: str, parent: ModelBundle) -> bytes:
    """docs/verdict.json of a candidate that follows from ``parent``."""
    lineage = {
        "parent": {"name": parent.name, "version": parent.version, "sha256": parent.sha256},
        "site": "here",
        "data_sha256": "d" * 64,
        "code_version": "0.1.0",
    }
    document = {
        "schema": "osteo-verdict/1",
        "candidate": "refit",
        "verdict": verdict,
        "recommended": "refit",
        "reasons": ["a test"],
        "lineage": lineage,
        "figures": {},
    }
    return json.dumps(document).encode()


def tiny_candidate(
    folder: Path, version: str, verdict: str | None = "better", parent: ModelBundle | None = None, salt: float = 0.0
) -> ModelBundle:
    """A bundle that the registry may hold and no network can be built from."""
    parent = parent or find_bundle(NETWORK)
    return write_bundle(
        folder,
        name=NETWORK,
        version=version,
        status="investigational",
        metadata={"task": "a test"},
        network={"a": 1},
        inference={"b": 2},
        weights={"weight": torch.tensor([salt])},
        model_card="a test",
        licence="Apache-2.0",
        extra_files={} if verdict is None else {"docs/verdict.json": verdict_file(verdict, parent)},
    )


def full_candidate(folder: Path, version: str, bmd_shift_g_cm2: float, verdict: str = "better") -> ModelBundle:
    """The shipped network with another intercept of its BMD."""
    shipped = find_bundle(NETWORK)
    calibration = dict(shipped.inference["calibration"])
    calibration["bmd_intercept_g_cm2"] += bmd_shift_g_cm2
    extra = {
        name: (shipped.path / name).read_bytes()
        for name in shipped.files
        if name.startswith("models/") and name != "models/model.safetensors"
    }
    return write_bundle(
        folder,
        name=NETWORK,
        version=version,
        status=shipped.status,
        metadata={key: value for key, value in shipped.metadata.items() if key not in _WRITTEN},
        network=shipped.network,
        inference={**shipped.inference, "calibration": calibration},
        weights=shipped.load_weights(),
        model_card="a test",
        licence="Apache-2.0",
        extra_files={**extra, "docs/verdict.json": verdict_file(verdict, shipped)},
    )
