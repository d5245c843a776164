"""Candidate bundles: what a refit writes, with everything that the parent carries, lineage and verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Final, Literal

import torch

from osteo_daemon.inference.bundle import ModelBundle, write_bundle
from osteo_daemon.inference.scope import ELSEWHERE_NAME, SCOPE_KEY, Scope, kept_weights
from osteo_daemon.network.moe import gate_entropy
from osteo_daemon.network.multitask import MultitaskMoE
from osteo_daemon.network.outlier import OUTLIERS_KEY, OUTLIERS_NAME, OutlierModel
from train.outliers import bundle_parts
from train.refit_card import refit_card
from train.replay import REPLAY_NAME, Replay
from train.routed import Routed
from train.site_config import FitConfig
from train.site_pool import Pool
from train.verdict import as_json

VERDICT_NAME: Final = "docs/verdict.json"
"""File of a candidate bundle: nothing is promoted without it."""
_WRITTEN_BY_BUNDLE: Final = (
    "schema",
    "osteo_schema",
    "name",
    "version",
    "status",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "required_packages_version",
    "optional_packages_version",
)


def lineage_of(
    parent: ModelBundle, data_sha256: str, replay_sha256: str, site: str, config: FitConfig
) -> dict[str, Any]:
    """Parent, data and code: what the candidate follows from."""
    return {
        "parent": {"name": parent.name, "version": parent.version, "sha256": parent.sha256},
        "site": site,
        "data_sha256": data_sha256,
        "replay_sha256": replay_sha256,
        "code_version": installed_version("osteo-daemon"),
        "seed": config.seed,
    }


def outliers_of(parent: ModelBundle, network: MultitaskMoE, pool: Pool, held: Replay) -> OutlierModel | None:
    """The parent's, with limits that the site's own vertebrae and changed gates stay within as others do."""
    if OUTLIERS_KEY not in parent.inference:
        return None
    tensors = parent.load_tensors(OUTLIERS_NAME)
    model = OutlierModel.from_parts(parent.inference[OUTLIERS_KEY], tensors, network.encoded_width)
    distances, entropies = [], []
    for features in (pool.features, held.features):
        with torch.inference_mode():
            out = network.decide(features.encoded(network), features.level)
        distances.append(float(torch.quantile(model.distance(out.encoded), model.quantile)))
        entropies.append(float(torch.quantile(gate_entropy(out.gate_weights.mean(1)).double(), model.quantile)))
    return replace(
        model,
        distance_limit=max(model.distance_limit, *distances),
        entropy_limit=max(entropies),
        limits_from=len(pool.features) + len(held),
    )


def scope_of(parent: ModelBundle, routed: Routed) -> Scope:
    """Where the candidate speaks; elsewhere what the parent says elsewhere, or everywhere if it has no scope itself."""
    before = Scope.of_bundle(parent)
    outliers = parent.inference.get(OUTLIERS_KEY) if before is None else before.outliers
    return Scope(routed.scanners or frozenset(), routed.base.config, routed.base_calibration, outliers)


def write_candidate(
    path: Path,
    parent: ModelBundle,
    routed: Routed,
    verdict: dict[str, Any],
    registered: list[dict[str, Any]],
    picture: bytes,
    rehearsal: bytes,
    outliers: OutlierModel | None,
) -> None:
    """Write one candidate with everything that the parent carries.

    Args:
        path: folder of the bundle.
        routed: what is new, where it speaks, and what speaks elsewhere.
        verdict: of this candidate.
        registered: the site's experts, this refit's and earlier ones.
        picture: PNG for the model card.
        rehearsal: the replay set, for the next generation.
        outliers: with new limits, for a refitted network.
    """
    kind: Literal["refit", "affine"] = verdict["candidate"]
    lineage = verdict["lineage"]
    base = parent.version.split("+")[0]
    version = f"{base}+{lineage['site']}.{kind}.{sha256(json.dumps(lineage, sort_keys=True).encode()).hexdigest()[:8]}"
    metadata = {key: value for key, value in parent.metadata.items() if key not in _WRITTEN_BY_BUNDLE}
    metadata["changelog"] = {
        **metadata.get("changelog", {}),
        version: f"{'refitted' if kind == 'refit' else 'recalibrated'} for the site {lineage['site']}",
    }
    metadata["data_source"] = f"{metadata.get('data_source', '')}; labelled vertebrae of the site {lineage['site']}"
    metadata["lineage"] = lineage
    inference = {**parent.inference, "calibration": routed.calibration.to_json()}
    inference.pop(SCOPE_KEY, None)
    files = {VERDICT_NAME: as_json(verdict), "docs/refit.png": picture, REPLAY_NAME: rehearsal}
    for name in parent.files:
        if name.startswith("models/") and name not in ("models/model.safetensors", REPLAY_NAME, ELSEWHERE_NAME):
            files[name] = (parent.path / name).read_bytes()
    if kind == "refit":
        inference["training"] = {**parent.inference.get("training", {}), "site_experts": registered}
        if outliers is not None:
            numbers, tensors = bundle_parts(outliers)
            inference |= numbers
            files |= tensors
    if routed.scanners is not None:
        inference[SCOPE_KEY] = scope_of(parent, routed).to_json()
        kept = kept_weights(routed.network.state_dict(), routed.base.state_dict())
        if kept is not None:
            files[ELSEWHERE_NAME] = kept
    write_bundle(
        path,
        name=parent.name,
        version=version,
        status="investigational",
        metadata=metadata,
        network=routed.network.config.to_json(),
        inference=inference,
        weights=routed.network.state_dict(),
        model_card=refit_card(parent.name, version, verdict),
        licence=(parent.path / "LICENSE").read_text(),
        extra_files=files,
    )
