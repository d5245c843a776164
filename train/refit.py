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
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from osteo_daemon.errors import ConfigurationError, OsteoError, RefitRefused
from osteo_daemon.inference.bundle import ModelBundle, read_bundle
from osteo_daemon.network.config import BmdScale, MoEConfig
from osteo_daemon.network.multitask import MultitaskMoE
from train.candidate import lineage_of, outliers_of, write_candidate
from train.competitors import affine
from train.crossfit import cross_fitted, judge
from train.data import VoiSet, open_set
from train.features import kept_features
from train.refit_card import plot
from train.refit_progress import Progress
from train.replay import devices_of, find_replay
from train.routed import Routed
from train.site_config import FitConfig
from train.site_data import SiteData, accept, check_against_parent, digest_of_set
from train.site_fit import FitStore, fit_procedure
from train.site_pool import Pool, network_with, raw_of
from train.verdict import as_json, as_text, document, refusal

SITE_PATTERN: Final = r"[a-z0-9][a-z0-9-]{0,31}"
EXIT_REFUSED: Final = 3


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
    deployed = Routed.of_bundle(parent)
    network = deployed.network
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
        raw = raw_of(network, features, site.index)
        notes = check_against_parent(site, deployed.judged(features, site.index, site.scanner_of_rows).bmd)
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
        scoped=site.scanners is not None,
        data=site.data,
        index=site.index,
    )
    progress.begin("fits", config.fits)
    store = FitStore(work / "fits", progress)
    models = cross_fitted(pool, site, deployed, BmdScale.from_json(parent.inference["bmd_scale"]), config, store)
    everyone = np.arange(len(site.index))
    fitted = fit_procedure(pool, everyone, config, store, "all", 100)
    recalibrated = affine(raw, site.target, site.data)
    progress.begin("verdict", 1)
    figures, decision = judge(pool, site, models, held, fitted, recalibrated, deployed, config, (*site.notes, *notes))
    picture = plot(models, site.target, site.classes)
    bundles = {"affine": (network, recalibrated)}
    if fitted.moved:
        bundles["refit"] = (network_with(pool, fitted.moved), fitted.calibration)
    for kind, (made, calibrated) in bundles.items():
        verdict = document(decision, "refit" if kind == "refit" else "affine", lineage, figures)
        outliers = outliers_of(parent, made, pool, held) if kind == "refit" else None
        routed = deployed.candidate(made, calibrated, site.scanners)
        write_candidate(out / kind, parent, routed, verdict, registered, picture, rehearsal, outliers)
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
