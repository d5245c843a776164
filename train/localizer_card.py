"""The spine localizer's model card, made from its bundle and the results files: ``python -m train.localizer_card``.

No figure is typed by hand: they come from ``docs/results``, and only from files whose weights are the bundle's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from osteo_daemon.inference.bundle import MANIFEST_NAME, WEIGHTS_NAME, ModelBundle, read_bundle

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "docs" / "results"
CARD_NAME: Final = "docs/README.md"
SOURCES: Final = ("localizer-torso", "localizer-naming", "spine-phantoms", "localizer-real-ct")
"""Results files with figures of these weights."""
TIMES: Final = "screening-real-ct"

Figures = Mapping[str, Any]

_HEAD: Final = """\
# {name} {version}

Labels each 3 mm voxel of a CT as vertebral body, disc, body of S1, rest of the sacrum, posterior elements, rib,
pelvis, spinal canal or background, and gives the phase between two disc planes. Names of vertebrae do not come from
the network: `osteo_daemon.inference` counts bodies upwards from S1 and downwards from the last pair of ribs
(docs/localizer.md).

Status: {status}. Not a medical device; see `docs/intended-use.md`. The file of weights has {megabytes:.1f} MB.

## Trained on
- **One** labelled CT of a real torso (`totalsegmentator_example`: a man of 55, native phase, 3 mm, T12-L5 whole),
  under random anatomy (size, bending, elastic, wedge and crush fractures, narrow discs, one vertebra left out or put
  in) and random scans (re-mineralised bone down to dark interiors, contrast, kernel, noise, slice thickness, cut
  fields of view, metal, cement).
- {patients}
- Never on the scans that the project is tested with.

Steps: {steps} of one patch of 240 x 192 x 192 mm; moving average of the weights.
Recipe: `python -m train.localizer`, `train/LOG.md`.

## Figures
Made by `python -m train.localizer_card` from `docs/results`; every file there says date, commit, hardware and command.
"""

_PATIENTS: Final = """\
{count} virtual patients of `osteo_daemon.phantom` (about a quarter of the later patches). Their edge blur, noise and
  texture were set by comparison with the ACRIN scan below, which is therefore not wholly independent of them."""

_LIMITS: Final = """
## Limits
- One real anatomy. Spines unlike it (severe scoliosis, transitional vertebrae, tumour, long fusions) are known to it
  from simulation only.
- Virtual patients are simpler than people: figures on them show what breaks, not how often it does in patients.
- A transitional vertebra is told where sacrum and last rib are both in view and disagree; with one of them alone every
  name may be one off, and the report says so. Without both, names are guesses and block the category.
- The rib class is the poorest (docs/localizer.md says what it costs).
- Masks come from 3 mm voxels: centres are good to a few millimetres, surfaces to about one voxel.
"""


def model_card(bundle: ModelBundle, results: Path = RESULTS) -> str:
    """Markdown of docs/README.md.

    Args:
        bundle: its metadata holds ``training``: steps and number of virtual patients.
        results: folder of the results files; a missing one is said to be missing.

    Raises:
        ValueError: a results file was made with other weights.
    """
    training = bundle.metadata["training"]
    weights = bundle.files[WEIGHTS_NAME]
    count = int(training["virtual_patients"])
    text = _HEAD.format(
        name=bundle.name,
        version=bundle.version,
        status=bundle.status,
        megabytes=(bundle.path / WEIGHTS_NAME).stat().st_size / 1e6,
        patients=_PATIENTS.format(count=count) if count else "No virtual patients.",
        steps=int(training["steps"]),
    )
    parts = {
        "localizer-torso": _torso,
        "localizer-naming": _naming,
        "spine-phantoms": _phantoms,
        "localizer-real-ct": _real,
    }
    for name in SOURCES:
        document = _read(results, name)
        if document is None:
            text += f"\nNot evaluated: `docs/results/{name}.json` is missing.\n"
            continue
        figures = document["figures"]
        if figures["weights_sha256"] != weights:
            raise ValueError(f"{name}.json was made with other weights than those of {bundle.name} {bundle.version}")
        text += f"\n{parts[name](figures)}\nFrom `docs/results/{name}.json`, {_origin(document)}.\n"
    times = _read(results, TIMES)
    if times is not None:
        text += f"\n{_times(times['figures'])}\nFrom `docs/results/{TIMES}.json`, {_origin(times)}.\n"
    return text + _LIMITS


def _read(results: Path, name: str) -> Mapping[str, Any] | None:
    path = results / f"{name}.json"
    if not path.exists():
        return None
    document: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _origin(document: Mapping[str, Any]) -> str:
    return f"{document['date'][:10]}, commit `{document['commit']}`"


def _table(columns: Mapping[str, str], rows: Iterable[Figures]) -> str:
    """Markdown of some columns (key to title) of some rows."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " to ".join(f"{entry:g}" for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _torso(figures: Figures) -> str:
    altered = [row for row in figures["rows"] if not row["case"].startswith("random")]
    missed = [row["case"] for row in figures["rows"] if row["missed"] and not row["refused"]]
    where = f" ({', '.join(missed)})" if missed else ""
    return (
        "### The training torso, altered\n"
        f"{figures['cases']} cases: {len(altered)} altered copies of the training torso (size, tilt, mirror, order of "
        "axes, thick slices, noise, dark\ntrabecular bone, cut fields of view) and "
        f"{figures['cases'] - len(altered)} random anatomies made from it. {figures['vertebrae_named']} vertebrae "
        f"named, {figures['named_right_percent']:g} % of them\nright; wrong without a warning in "
        f"{figures['cases_named_wrong_without_warning']} cases; {figures['refused']} refused; a vertebra missed in "
        f"{len(missed)}{where}; worst centre\nerror "
        f"{figures['worst_centre_error_mm']:g} mm. The torso was trained on: this shows what does not break the count, "
        "not how it does on new patients.\n"
    )


def _naming(figures: Figures) -> str:
    confidence = figures["confidence"]
    above = next(key for key in confidence if key.startswith("not_right_above_"))
    return (
        "### Names by two anchors\n"
        f"{figures['cases']} cases: the training torso with a vertebra left out, put in or grown together, hard copies "
        "of it, and virtual patients with four\nto six lumbar vertebrae, lumbar ribs and curves. Unusual counts "
        f"noticed: {figures['unusual_counts_flagged']} of {figures['unusual_counts']}; usual ones doubted: "
        f"{figures['usual_counts_flagged']} of {figures['usual_counts']}; cases with\nwrong names and no flag: "
        f"{figures['cases_with_wrong_names_and_no_flag']}. Of {confidence['vertebrae']} vertebrae "
        f"{confidence['not_right']} had another name than their ribs give or lay more than 8 mm off;\n"
        f"{confidence[above]} of these had a confidence of {above.removeprefix('not_right_above_')} or more. "
        f"Cobb angle against the truth: {_cell(figures['cobb_bias_degrees'])} degrees on average, SD "
        f"{_cell(figures['cobb_sd_degrees'])}.\n"
    )


def _phantoms(figures: Figures) -> str:
    columns = {
        "stratum": "stratum",
        "patients": "patients",
        "refused_rightly": "refused rightly",
        "refused_wrongly": "wrongly",
        "in_view": "vertebrae in view",
        "found_percent": "found %",
        "named_right_percent": "named right %",
        "wrong_without_doubt": "wrong, no doubt",
        "centre_median_mm": "centre error mm",
        "centre_p95_mm": "95th percentile",
        "hu_bias": "HU bias",
        "hu_limits": "limits of agreement",
        "hu_bias_same_voxels": "HU bias, same voxels",
        "hu_limits_same_voxels": "limits of agreement ",
    }
    wanted = ("all", "true HU", "scoliosis", "phase", "noise", "thickness", "coverage", "fracture")
    rows = [row for row in figures["strata"] if row["stratum"].startswith(wanted)]
    rows += [{**row, "stratum": f"numbering: {row['anatomy']}"} for row in figures.get("numbering_variants", [])]
    return (
        "### Virtual patients outside training's ranges\n"
        "Anatomy and texture lie outside what training's virtual patients had (the results file states both ranges). "
        "HU bias: median\nmeasured in L1-L4 minus the true mean of the whole trabecular core, and minus the true "
        "median of the very voxels measured.\n\n" + _table(columns, rows)
    )


def _real(figures: Figures) -> str:
    columns = {
        "scan": "scan",
        "level": "level",
        "named": "named",
        "name_certain": "certain",
        "centre_error_mm": "centre error mm",
        "median_hu": "median HU",
        "reference_hu": "reference HU",
    }
    outcomes = {
        "study": "study",
        "outcome": "outcome",
        "exclusion": "exclusion",
        "category": "category",
        "flags": "flags",
    }
    return (
        "### Real scans\n"
        "`acrin_flt_breast_001_abdomen` was never trained on; its reference is one reader's. The rule for "
        "`compression_suspected` was changed\nafter its healthy L5 had been flagged; nothing else was chosen on it. "
        "`totalsegmentator_example` is the training torso itself.\n\n"
        + _table(columns, figures["levels"])
        + "\n"
        + _table(outcomes, figures["studies"])
    )


def _times(figures: Figures) -> str:
    stages = figures["stages_s"]
    both = [float(run["localize"]) + float(run["measure"]) for run in stages if "localize" in run]
    return (
        "### Cost\n"
        f"A real CT of {figures['slices']} slices on the {figures['device']}: localisation and measurement "
        f"{min(both):.1f} to {max(both):.1f} s, whole screening with\nreport "
        f"{min(float(run['total']) for run in stages):.1f} to {max(float(run['total']) for run in stages):.1f} s, "
        f"{figures['peak_memory_gb']:g} GB of memory at most.\n"
    )


def renew_card(folder: Path, results: Path = RESULTS) -> ModelBundle:
    """Write the card of a bundle anew and its line in the manifest; every other byte stays.

    Raises:
        BundleError: the bundle is damaged before or after.
        ValueError: a results file was made with other weights.
    """
    card = model_card(read_bundle(folder), results).encode()
    manifest = folder / MANIFEST_NAME
    lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
    renewed = [
        f"{hashlib.sha256(card).hexdigest()}  {CARD_NAME}\n" if line.endswith(f"  {CARD_NAME}\n") else line
        for line in lines
    ]
    (folder / CARD_NAME).write_bytes(card)
    manifest.write_text("".join(renewed), encoding="utf-8")
    return read_bundle(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "model_zoo" / "spine-localizer")
    renewed = renew_card(parser.parse_args().bundle)
    print(renewed.name, renewed.version, renewed.sha256)


if __name__ == "__main__":
    main()
