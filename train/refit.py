"""Refit a bundle for a site: from labelled vertebrae to candidate bundles with a verdict.

    python -m train.refit --data FOLDER --parent BUNDLE --site NAME --out FOLDER [--replay FILE]

FOLDER of --data is a data set of `train.data` in which some rows have a reading. Written below --out:

    refit/        the refitted bundle, where the labels called for one
    affine/       the parent's weights with its BMD and probabilities recalibrated
    verdict.json  which of them to deploy, and why (`train.verdict`); written last: with it the refit is finished
    verdict.txt   the same for people
    progress.json what is being done, and the seconds that are left

The encoder stays as it is, so its features are computed once; all else takes minutes on a CPU. Every finished piece is
on disk before the next begins: a refit that was killed goes on where it was and ends with the same bytes. It may be
stopped and continued (SIGSTOP, SIGCONT) at any time.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from dataclasses import asdict, replace
from hashlib import sha256
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from tqdm import tqdm

from osteo_daemon.errors import ConfigurationError, OsteoError, RefitRefused
from osteo_daemon.inference.bundle import ModelBundle, read_bundle, write_bundle
from osteo_daemon.network.config import BmdScale, Calibration, MoEConfig
from osteo_daemon.network.moe import gate_entropy
from osteo_daemon.network.multitask import MultitaskMoE
from osteo_daemon.network.outlier import OUTLIERS_KEY, OUTLIERS_NAME, OutlierModel
from train.competitors import affine, core_hu, hu_line
from train.data import VoiSet, open_set
from train.evaluate import judged_of
from train.features import kept_features
from train.judging import Judged, subgroups
from train.outliers import bundle_parts
from train.refit_card import plot, refit_card
from train.replay import REPLAY_NAME, Replay, devices_of, find_replay, load_network
from train.site_data import Index, SiteData, accept, check_against_parent, deal, digest_of_set
from train.site_fit import FitConfig, FitStore, Fitted, Pool, fit_procedure, network_with, raw_of, say
from train.verdict import Decision, as_json, as_text, compare, decide, document, in_subgroups, refusal

SITE_PATTERN: Final = r"[a-z0-9][a-z0-9-]{0,31}"
VERDICT_NAME: Final = "docs/verdict.json"
"""File of a candidate bundle: nothing is promoted without it."""
EXIT_REFUSED: Final = 3
_HALF: Final = np.full(2, 0.5)
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
_PAIRS: Final = (("refit", "parent"), ("affine", "parent"), ("refit", "affine"), ("refit", "hu_line"))


class Progress:
    """A bar on the terminal and ``progress.json`` for who started the refit.

    Args:
        path: of that file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stage, self._total, self._done, self._since = "", 1, 0, time.monotonic()
        self._bar: Any = None

    def begin(self, stage: str, total: int) -> None:
        """A new stage of so many steps."""
        self.close()
        self._stage, self._total, self._done, self._since = stage, max(1, total), 0, time.monotonic()
        self._bar = tqdm(total=total, desc=stage, mininterval=1.0)
        self._write()

    def __call__(self, steps: int) -> None:
        self._done += steps
        if self._bar is not None:
            self._bar.update(steps)
        self._write()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self) -> None:
        left = None
        if self._done:
            left = round((time.monotonic() - self._since) / self._done * max(0, self._total - self._done), 1)
        values = {"stage": self._stage, "done": self._done, "total": self._total, "seconds_left": left}
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(values))
        temporary.replace(self._path)


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


def refit(
    data_folder: Path,
    parent: ModelBundle,
    site_name: str,
    out: Path,
    config: FitConfig,
    device: torch.device,
    replay_path: Path | None = None,
) -> dict[str, Any]:
    """Refit, or go on with it; returns the verdict that ``out/verdict.json`` holds.

    Raises:
        RefitRefused: the labels allow no refit; the verdict says so, too.
        ConfigurationError: ``out`` holds another refit, or the site's name can't be one.
        BundleError: there is no replay set for the parent.
        FileNotFoundError, ValueError: the data set is incomplete.
    """
    if not re.fullmatch(SITE_PATTERN, site_name):
        raise ConfigurationError(f"a site's name is of the form {SITE_PATTERN}, not {site_name!r}")
    network = load_network(parent)
    data = _fitting(open_set(data_folder), network.config)
    replay = find_replay(parent, network, replay_path)
    rehearsal = replay.to_bytes()
    lineage = lineage_of(parent, digest_of_set(data_folder), sha256(rehearsal).hexdigest(), site_name, config)
    out.mkdir(parents=True, exist_ok=True)
    work = out / "work"
    stamp = {"lineage": lineage, "config": json.loads(json.dumps(asdict(config)))}
    _claim(out, stamp)
    if (out / "verdict.json").exists():
        return dict(json.loads((out / "verdict.json").read_text()))
    progress = Progress(out / "progress.json")
    try:
        site = accept(data, lineage["data_sha256"], network.config.bmd_levels)
        progress.begin("features", len(site.index))
        features = kept_features(network, data, site.index, work / "features", device, progress)
        network.cpu()
        calibration = Calibration.from_json(parent.inference["calibration"])
        raw = raw_of(network, features, site.index)
        notes = check_against_parent(site, calibration.bmd_slope * raw.bmd + calibration.bmd_intercept_g_cm2)
    except RefitRefused as error:
        progress.close()
        verdict = refusal(error.detail, lineage)
        _finish(out, verdict)
        raise
    experts, copied, registered = _experts(parent, network, site, site_name)
    rehearsed, held = replay.halves()
    pool = Pool(
        parent=network,
        copied=copied,
        expert_of=torch.tensor([experts.get(row.device, -1) for row in site.rows]),
        features=features,
        target=torch.from_numpy(site.target).float(),
        classes=torch.from_numpy(site.classes),
        patients=site.patients,
        rehearsed=rehearsed,
        fits_classes=site.fits_classes,
        data=site.data,
        index=site.index,
    )
    progress.begin("fits", config.fits)
    store = FitStore(work / "fits", progress)
    models = _cross_fitted(pool, site, calibration, BmdScale.from_json(parent.inference["bmd_scale"]), config, store)
    everyone = np.arange(len(site.index))
    fitted = fit_procedure(pool, everyone, config, store, "all", 100)
    recalibrated = affine(raw, site.target, site.data)
    progress.begin("verdict", 1)
    figures, decision = _judge(
        pool, site, models, held, fitted, recalibrated, calibration, config, (*site.notes, *notes)
    )
    picture = plot(models, site.target, site.classes)
    bundles = {"affine": (network, recalibrated)}
    if fitted.moved:
        bundles["refit"] = (network_with(pool, fitted.moved), fitted.calibration)
    for kind, (made, calibrated) in bundles.items():
        verdict = document(decision, "refit" if kind == "refit" else "affine", lineage, figures)
        outliers = _outliers(parent, made, pool, held) if kind == "refit" else None
        _write_candidate(
            out / kind, parent, made, calibrated, verdict, registered, picture, rehearsal, outliers, fitted
        )
    progress(1)
    progress.close()
    verdict = document(decision, "refit", lineage, {**figures, "bundles": sorted(bundles)})
    _finish(out, verdict)
    return verdict


def _fitting(data: VoiSet, config: MoEConfig) -> VoiSet:
    """The set with the network's own names of levels.

    Raises:
        ConfigurationError: it lies on another grid than the network's.
    """
    spacing_mm = float(data.config["voi_spacing_mm"])
    if spacing_mm != config.voi_spacing_mm:
        raise ConfigurationError(
            f"the data set is sampled at {spacing_mm:g} mm, the network at {config.voi_spacing_mm:g}"
        )
    return replace(data, config={**data.config, "levels": list(config.levels)})


def _claim(out: Path, stamp: dict[str, Any]) -> None:
    """Raises:
    ConfigurationError: the folder holds another refit.
    """
    path = out / "refit.json"
    if path.exists():
        if json.loads(path.read_text()) != json.loads(json.dumps(stamp)):
            raise ConfigurationError(f"{out} holds another refit; remove it or choose another folder")
        return
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(stamp, indent=1))
    temporary.replace(path)


def _finish(out: Path, verdict: dict[str, Any]) -> None:
    (out / "verdict.txt").write_text(as_text(verdict))
    temporary = out / "verdict.json.part"
    temporary.write_bytes(as_json(verdict))
    temporary.replace(out / "verdict.json")
    shutil.rmtree(out / "work", ignore_errors=True)


def _experts(
    parent: ModelBundle, network: MultitaskMoE, site: SiteData, site_name: str
) -> tuple[dict[str, int], tuple[int | None, ...], list[dict[str, Any]]]:
    """Which expert stands for each densitometer of the site: its own of an earlier refit, else one that is appended."""
    registered = [dict(entry) for entry in parent.inference.get("training", {}).get("site_experts", [])]
    known = {(entry["site"], entry["device"]): int(entry["expert"]) for entry in registered}
    base = devices_of(parent)[: network.config.device_count]
    found: dict[str, int] = {}
    copied: list[int | None] = []
    for device in site.devices:
        if (site_name, device) in known:
            found[device] = known[site_name, device]
            continue
        found[device] = network.config.expert_count + len(copied)
        copied.append(base.index(device) if device in base else None)
        registered.append({"expert": found[device], "site": site_name, "device": device})
    return found, tuple(copied), registered


def _cross_fitted(
    pool: Pool, site: SiteData, calibration: Calibration, scale: BmdScale, config: FitConfig, store: FitStore
) -> dict[str, Judged]:
    """What every model says of each patient when it has not seen that patient, in the order of ``site.index``."""
    folds = deal(pool.patients, site.classes, config.outer_folds, config.seed)
    levels = [row.level for row in site.rows]
    hu = core_hu(pool.parent, pool.features)
    parts: dict[str, list[Judged]] = {"parent": [], "refit": [], "affine": [], "hu_line": []}
    order = []
    for fold in range(config.outer_folds):
        seen, unseen = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        order.append(unseen)
        before, raw = say(pool.parent, pool, seen), say(pool.parent, pool, unseen)
        parts["parent"].append(judged_of(raw, calibration, _HALF))
        parts["affine"].append(judged_of(raw, affine(before, site.target[seen], pool.data), _HALF))
        parts["hu_line"].append(hu_line(hu, levels, site.target, site.classes, seen, unseen, scale, site.index))
        fitted = fit_procedure(pool, seen, config, store, f"fold{fold}", fold)
        parts["refit"].append(judged_of(say(network_with(pool, fitted.moved), pool, unseen), fitted.calibration, _HALF))
    back = np.argsort(np.concatenate(order))
    return {name: _in_order(several, back) for name, several in parts.items()}


def _in_order(parts: list[Judged], order: Index) -> Judged:
    def whole(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])[order]

    return Judged(whole("index"), whole("probability"), whole("bmd"), whole("half"), whole("level"), _HALF)


def _judge(
    pool: Pool,
    site: SiteData,
    models: dict[str, Judged],
    held: Replay,
    fitted: Fitted,
    recalibrated: Calibration,
    calibration: Calibration,
    config: FitConfig,
    notes: tuple[str, ...],
) -> tuple[dict[str, Any], Decision]:
    folds = deal(pool.patients, site.classes, config.outer_folds, config.seed)
    at_site = compare(models, site.target, site.classes, site.patients, _PAIRS, config.repeats, folds)
    measured = held.take(torch.isfinite(held.sbmd).nonzero().squeeze(1))
    rows = np.arange(len(measured))
    before = raw_of(pool.parent, measured.features, rows)
    elsewhere = {
        "parent": judged_of(before, calibration, _HALF),
        "refit": judged_of(
            raw_of(network_with(pool, fitted.moved), measured.features, rows), fitted.calibration, _HALF
        ),
        "affine": judged_of(before, recalibrated, _HALF),
    }
    truth = measured.sbmd.double().numpy()
    classes, names = measured.diagnosis.numpy(), np.array([str(n) for n in measured.patient.tolist()])
    others = compare(elsewhere, truth, classes, names, _PAIRS[:2], config.repeats)
    by_device = {f"device {d}": np.flatnonzero(measured.device.numpy() == d) for d in measured.device.unique().tolist()}
    groups = _groups(site)
    figures = {
        "site": at_site,
        "others": others,
        "others_by_device": in_subgroups(elsewhere, truth, classes, names, by_device, config.repeats // 4),
        "subgroups": in_subgroups(models, site.target, site.classes, site.patients, groups, config.repeats // 4),
        "devices": list(site.devices),
        "strength": fitted.strength,
        "outer_folds": config.outer_folds,
    }
    return figures, decide(at_site, others, notes)


def _groups(site: SiteData) -> dict[str, Index]:
    """Subgroups, each level one of them; who has no age or sex belongs to no group of it."""
    ages = np.array([row.age_years for row in site.rows])
    found = {
        name: chosen[ages[chosen] >= 0] if name.startswith("age ") else chosen
        for name, chosen in subgroups(site.rows).items()
        if name != "sex "
    }
    levels = np.array([row.level for row in site.rows])
    return {**found, **{f"level {name}": np.flatnonzero(levels == name) for name in np.unique(levels)}}


def _outliers(parent: ModelBundle, network: MultitaskMoE, pool: Pool, held: Replay) -> OutlierModel | None:
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


def _write_candidate(
    path: Path,
    parent: ModelBundle,
    network: MultitaskMoE,
    calibration: Calibration,
    verdict: dict[str, Any],
    registered: list[dict[str, Any]],
    picture: bytes,
    rehearsal: bytes,
    outliers: OutlierModel | None,
    fitted: Fitted,
) -> None:
    """Write one candidate with everything that the parent carries."""
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
    inference = {**parent.inference, "calibration": calibration.to_json()}
    files = {VERDICT_NAME: as_json(verdict), "docs/refit.png": picture, REPLAY_NAME: rehearsal}
    for name in parent.files:
        if name.startswith("models/") and name not in ("models/model.safetensors", REPLAY_NAME):
            files[name] = (parent.path / name).read_bytes()
    if kind == "refit":
        inference["training"] = {**parent.inference.get("training", {}), "site_experts": registered}
        if outliers is not None:
            numbers, tensors = bundle_parts(outliers)
            inference |= numbers
            files |= tensors
    write_bundle(
        path,
        name=parent.name,
        version=version,
        status="investigational",
        metadata=metadata,
        network=network.config.to_json(),
        inference=inference,
        weights=network.state_dict(),
        model_card=refit_card(parent.name, version, verdict),
        licence=(parent.path / "LICENSE").read_text(),
        extra_files=files,
    )


def main() -> None:
    """Command line of ``python -m train.refit``; the exit status is 3 where the labels allow no refit."""
    parser = argparse.ArgumentParser(description="refit a bundle for a site")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parent", type=Path, required=True)
    parser.add_argument("--site", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--replay", type=Path, help="of train.replay, where the parent carries none")
    whole = ("steps", "batch_size", "outer_folds", "inner_folds", "repeats", "seed")
    for name in whole:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(FitConfig(), name))
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)  # so little work at a time that threads would only wait for each other
    try:
        verdict = refit(
            given.data,
            read_bundle(given.parent),
            given.site,
            given.out,
            FitConfig(**{name: getattr(given, name) for name in whole}),
            torch.device(given.device),
            given.replay,
        )
    except RefitRefused as error:
        print(f"refused: {error.detail}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except (OsteoError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(as_text(verdict), end="")


if __name__ == "__main__":
    main()
