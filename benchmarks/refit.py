"""A fourth site with an unseen scanner and densitometer, before and after a refit: ``python -m benchmarks.refit``.

Virtual patients of the external hospital get readings of a machine of its own, which reads high by a factor and an
offset that no conversion knows. Refits on 50, 200 and 1,000 labelled vertebrae are judged on other patients of the
hospital against what its machine would say without chance, beside the deployed bundle, its recalibrated BMD and a
recalibrated line of HU; and on virtual patients of the parent's own sites.

The cohort is rendered, unless ``--data`` names one whose external rows serve; patients that it lacks are rendered.
``--from-start COHORT`` names the parent's cohort: a network is trained on it with the site's 1,000 labelled vertebrae
among its own, as the parent was (``--encoder`` names the encoder that its training began from), and stands in the
table, too; a folder with a finished run of `train.with_site` serves as well. ``--quick`` renders few patients, refits
once and checks what must hold even then.

All is kept below ``--work`` as it is finished, and a command that was stopped goes on there: rendered patients, the
replay set, every fit, every size's figures, every epoch of the training. On two free cores expect some 10 minutes for
rendering and replay set and one for each size (a refit took 14 to 15 s of a processor), and with ``--from-start`` as
long again as the parent's training took (its model card says), more by the site's share. ``--quick`` takes a minute or
two of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.fourth_site import Site, enlarged, rendered
from benchmarks.results import RESULTS, write_result
from osteo_daemon.inference.bundle import ModelBundle, read_bundle
from osteo_daemon.network.config import BmdScale
from train.calibrate import fit_calibration
from train.competitors import affine, core_hu, hu_line
from train.data import open_set
from train.evaluate import judged_of, run_network
from train.judging import Judged
from train.loop import load_run
from train.refit_card import MODELS
from train.replay import (
    PATIENTS,
    REPLAY_NAME,
    Replay,
    devices_of,
    find_replay,
    load_network,
    render_replay,
    replay_of_cohort,
)
from train.routed import NOWHERE, Routed
from train.site_config import FitConfig
from train.site_fit import FitStore, fit_procedure
from train.site_pool import network_with, say
from train.verdict import compare, decide
from train.with_site import train_with_site

NAME: Final = "refit"
SIZES: Final = (50, 200, 1000)
TEST_PATIENTS: Final = 66
RENDERED: Final = 316
_HALF: Final = np.full(2, 0.5)
_FIGURES: Final = ("mae", "bias", "screening_auc", "diagnosis_auc", "class_ece", "interval_90_coverage")


def figures_at(
    site: Site, vertebrae: int, config: FitConfig, repeats: int, from_start: Judged | None, work: Path
) -> dict[str, Any]:
    """One size: every model on the test patients and on other devices, with the rule's decision.

    Args:
        work: for this site, these settings and this size alone; what lies there is used.
    """
    finished = work / "figures.json"
    if finished.exists():
        return dict(json.loads(finished.read_text()))
    seen = site.labelled(vertebrae)
    scale = BmdScale.from_json(site.bundle.inference["bmd_scale"])
    before = say(site.network, site.pool, seen)
    taken = work / "seconds.json"
    before_this = float(json.loads(taken.read_text())) if taken.exists() else 0.0
    started = time.process_time()

    def note(_steps: int) -> None:
        taken.write_text(json.dumps(before_this + time.process_time() - started))

    fitted = fit_procedure(site.pool, seen, config, FitStore(work / "fits", note), "size", vertebrae)
    seconds = before_this + time.process_time() - started
    network = network_with(site.pool, fitted.moved)
    line = affine(before, site.target[seen], site.data)
    everything = (core_hu(site.network, site.pool.features), [row.level for row in site.data.rows], site.target)
    spoken = {
        "parent": site.deployed,
        "refit": site.deployed.candidate(network, fitted.calibration, site.scanners),
        "affine": site.deployed.candidate(site.network, line, site.scanners),
    }
    tested = site.test
    features, names = site.pool.features.take(tested), [site.data.rows[i].scanner for i in tested]
    models = {
        **{name: one.judged(features, site.pool.index[tested], names) for name, one in spoken.items()},
        "hu_line": hu_line(*everything, site.pool.classes.numpy(), seen, site.test, scale, site.pool.index),
    }
    if from_start is not None:
        models["from_start"] = from_start
    pairs = [("refit", "parent"), ("affine", "parent"), ("refit", "affine"), ("refit", "hu_line")]
    pairs += [("refit", "from_start")] if from_start is not None else []
    at_site = compare(models, site.machine[tested], site.machine_class[tested], site.patients[tested], pairs, repeats)
    held = site.held.take(torch.isfinite(site.held.sbmd).nonzero().squeeze(1))
    others, unbound = (_elsewhere(spoken, held, bound, pairs[:2], repeats) for bound in (True, False))
    decision = decide(at_site, others)
    found = {
        "labelled_vertebrae": len(seen),
        "labelled_patients": len(np.unique(site.patients[seen])),
        "test_vertebrae": len(tested),
        "test_patients": at_site["patients"],
        "processor_seconds": round(seconds, 1),
        "pull_to_the_parent": fitted.strength if np.isfinite(fitted.strength) else "endless",
        "verdict": decision.verdicts["refit"],
        "recommended": decision.recommended,
        "site": at_site,
        "others": others,
        "others_without_scope": unbound,
    }
    if from_start is not None:
        own = at_site["models"]
        found["mae_over_from_start"] = round(own["refit"]["mae"]["value"] / own["from_start"]["mae"]["value"], 3)
    temporary = finished.with_suffix(".part")
    temporary.write_text(json.dumps(found))
    temporary.replace(finished)
    return found


def _elsewhere(
    spoken: dict[str, Routed], held: Replay, bound: bool, pairs: list[tuple[str, str]], repeats: int
) -> dict[str, Any]:
    """Every model on virtual patients of the parent's own sites; without its scope where not ``bound`` to it."""
    rows = np.arange(len(held))
    models = {
        name: (one if bound else replace(one, scanners=None)).judged(held.features, rows, [NOWHERE] * len(rows))
        for name, one in spoken.items()
    }
    patients = np.array([str(number) for number in held.patient.tolist()])
    return compare(models, held.sbmd.double().numpy(), held.diagnosis.numpy(), patients, pairs, repeats)


def table_of(sizes: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Rows for the page of results: size and model."""

    def cell(value: dict[str, float]) -> str:
        return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

    rows = {}
    for size, found in sizes.items():
        for model, own in found["site"]["models"].items():
            title = MODELS.get(model, "trained with the site from the start")
            rows[f"{size} labelled vertebrae, {title}"] = {
                **{name: cell(own[name]) for name in _FIGURES if name in own},
                **{
                    title: cell(found[key]["models"][model]["mae"]) if model in found[key]["models"] else ""
                    for title, key in (
                        ("MAE, other devices", "others"),
                        ("MAE, other devices, were it not bound to the site's scanner", "others_without_scope"),
                    )
                },
                "recommended": found["recommended"] if model == "refit" else "",
            }
    return rows


def plot(sizes: dict[str, dict[str, Any]], path: Path) -> None:
    """MAE and bias at the site over the number of labelled vertebrae."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    counts = [found["labelled_vertebrae"] for found in sizes.values()]
    models = next(iter(sizes.values()))["site"]["models"]
    for axis, name in zip(figure.subplots(1, 2), ("mae", "bias"), strict=True):
        for shift, model in enumerate(models):
            values = [found["site"]["models"][model][name] for found in sizes.values()]
            middle = [v["value"] for v in values]
            spans = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
            axis.errorbar(
                np.array(counts) * 1.04**shift, middle, spans, marker="o", markersize=3, label=MODELS.get(model, model)
            )
        axis.set(xscale="log", xlabel="labelled vertebrae", ylabel=f"{name}, g/cm2")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def trained_from_start(run_folder: Path, site: Site) -> Judged:
    """A run that saw the site in training, calibrated on its own validation patients, on the test patients."""
    run = load_run(run_folder)
    whole = open_set(Path(run.settings["data"]))
    val = run_network(run.network, whole, whole.indices("val"), run.devices, quiet=True)
    calibration = fit_calibration(val.class_logits, val.level_logits, val.bmd, val.bmd_sd, val.index, whole)
    cohort = open_set(site.folder)
    raw = run_network(run.network, cohort, site.rows_in_cohort[site.test], run.devices, quiet=True)
    return judged_of(raw, calibration, _HALF)


def _over_from_start(sizes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The refit's MAE at the site over that of the network trained with it, by size; nothing without such a network."""
    ratios = {size: found["mae_over_from_start"] for size, found in sizes.items() if "mae_over_from_start" in found}
    return {"mae_over_from_start": ratios} if ratios else {}


def _replay(
    bundle: ModelBundle, given: Path | None, cohort: Path | None, work: Path, patients: int, workers: int
) -> Replay:
    """The named set, the bundle's own, that of the cohort's test patients, or a rendered one; kept in ``work``."""
    network = load_network(bundle)
    if given is not None or REPLAY_NAME in bundle.files:
        return find_replay(bundle, network, given)
    path = work / f"replay-{bundle.sha256[:12]}.safetensors"
    if not path.exists():
        temporary = path.with_suffix(".part")
        data = None if cohort is None else open_set(cohort)
        if data is not None and len(data.indices("test")):
            found = replay_of_cohort(network, data, devices_of(bundle), patients)
        else:
            found = render_replay(bundle, patients, workers, torch.device("cpu"))
        temporary.write_bytes(found.to_bytes())
        temporary.replace(path)
    return find_replay(bundle, network, path)


def _run_with_site(folder: Path, encoder: Path | None, site: Site, work: Path) -> Path:
    """A finished run as it is; a cohort is trained on, with the site's labelled patients of the largest size."""
    if (folder / "settings.json").exists():
        return folder
    chosen = site.labelled(SIZES[-1])
    rows = [site.data.rows[i] for i in chosen]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = site.rows_in_cohort[chosen]
    return train_with_site(site.bundle, folder, site.folder, index, rows, work / "from-start", device, encoder)


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong with a quick table; empty when all is well."""
    wrong = []
    models = found["site"]["models"]
    if not np.isfinite([models[name]["mae"]["value"] for name in MODELS]).all():
        wrong.append("an error that is no number")
    if not models["affine"]["absolute_bias"]["value"] < models["parent"]["absolute_bias"]["value"] + 0.05:
        wrong.append("a recalibration that moves BMD away from its own readings")
    if any(value != 0 for value in found["others"]["differences"]["refit minus parent"]["mae"].values()):
        wrong.append("a refit that is bound to its scanner says something else on others")
    if found["recommended"] == "refit" and found["verdict"] != "better":
        wrong.append("a refit is recommended that isn't better")
    return wrong


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few patients and one small refit, checked")
    parser.add_argument("--parent", type=Path, default=Path("model_zoo/osteo-moe"))
    parser.add_argument("--data", type=Path, help="a cohort on the parent's grid; its external rows are the site")
    parser.add_argument("--replay", type=Path, help="of train.replay; else the bundle's own, or a rendered one")
    parser.add_argument("--from-start", type=Path, help="the parent's cohort, or a run that was trained with the site")
    parser.add_argument("--encoder", type=Path, help="that the parent's training began from, for --from-start")
    parser.add_argument("--work", type=Path, default=Path("runs/refit"), help="everything is kept here")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    bundle = read_bundle(given.parent)
    config = FitConfig(steps=20, inner_folds=2) if given.quick else FitConfig()
    with tempfile.TemporaryDirectory(prefix="osteo-refit-") as place:
        work = Path(place) if given.quick else given.work
        work.mkdir(parents=True, exist_ok=True)
        patients, tested = (22, 8) if given.quick else (RENDERED, TEST_PATIENTS)
        if given.data is None:
            folder = rendered(work, bundle, patients, given.workers)
        else:
            folder = given.data if given.quick else enlarged(given.data, work, bundle, patients, given.workers)
        replay = _replay(bundle, given.replay, given.data, work, 12 if given.quick else PATIENTS, given.workers)
        site = Site(bundle, folder, replay, tested)
        run = None if given.from_start is None else _run_with_site(given.from_start, given.encoder, site, work)
        from_start = None if run is None else trained_from_start(run, site)
        repeats = 50 if given.quick else 500
        stamp = (bundle.sha256, site.names, sha256(replay.to_bytes()).hexdigest(), asdict(config), str(run), repeats)
        key = sha256(json.dumps(stamp).encode()).hexdigest()[:12]
        sizes = {}
        for size in SIZES[:1] if given.quick else SIZES:
            (own := work / f"size-{size}-{key}").mkdir(exist_ok=True)
            found = figures_at(site, size, config, repeats, from_start, own)
            sizes[str(found["labelled_vertebrae"])] = found
            print(size, found["verdict"], found["recommended"], found["pull_to_the_parent"], flush=True)
    shown = {
        "parent": f"{bundle.name} {bundle.version}",
        "test_patients": next(iter(sizes.values()))["test_patients"],
        "processor_seconds_of_a_refit": {size: found["processor_seconds"] for size, found in sizes.items()},
        "verdict": {size: found["verdict"] for size, found in sizes.items()},
        **_over_from_start(sizes),
        "rows": table_of(sizes),
    }
    write_result(NAME, {**shown}, quick=given.quick)
    if not given.quick:
        plot(sizes, RESULTS / f"{NAME}.png")
    elif wrong := faults(next(iter(sizes.values()))):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
