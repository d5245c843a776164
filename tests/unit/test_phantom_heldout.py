"""The benchmark's virtual patients lie where training's do not, and their truth is the truth of the measured voxels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.heldout import ANATOMIES, FIRST_SEED, RANGES, TRAINED_PATIENTS, draw, outside, quantities
from benchmarks.results import RESULTS
from benchmarks.spine import PATIENTS, VARIANTS_EACH, draws, judge, judged
from benchmarks.spine_figures import figures_of, groups, summary
from osteo_daemon.inference.bundle import find_bundle
from osteo_daemon.inference.localize import SpineLocalizer
from osteo_daemon.phantom.labels import body_mask, core_mask
from osteo_daemon.phantom.patient import Constitution, VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import PhantomStudy, render_study
from osteo_daemon.phantom.truth import core_truth, region_truth
from train.virtual import draw_patient, draw_scanner

ALWAYS = [name for name, entry in RANGES.items() if entry.share == 1.0]


@pytest.fixture(scope="module")
def study() -> PhantomStudy:
    patient = VirtualPatient(seed=11, age_years=63, density_mg_cm3=105.0)
    return render_study(patient, coarse_scanner(noise_hu=12.0), top="L2", bottom="L3", ideal=True)


def test_ranges_hold_what_training_drew() -> None:
    for seed in range(max(TRAINED_PATIENTS, 500)):
        values = quantities(draw_patient(seed), draw_scanner(seed))
        assert values.keys() == RANGES.keys()
        for name, value in values.items():
            assert not outside(name, value), (seed, name, value)


def test_seeds_of_training_are_others() -> None:
    assert FIRST_SEED > 1_000_000, "train.virtual: training seeds lie below a million"
    assert {case.patient.seed for case in draws(PATIENTS, VARIANTS_EACH)}.isdisjoint(range(1_000_000))


def test_every_patient_lies_outside_where_it_is_claimed() -> None:
    cases = list(draws(PATIENTS, VARIANTS_EACH))
    assert len(cases) == 200 + VARIANTS_EACH * len(ANATOMIES)
    for name, entry in RANGES.items():
        values = [quantities(case.patient, case.scanner)[name] for case in cases]
        beyond = [value for value in values if outside(name, value)]
        for value in beyond:
            assert any(low - 0.51 <= value <= high + 0.51 for low, high in entry.outside), (name, value)
        if name in ALWAYS:
            assert len(beyond) == len(values), name
        else:
            assert 0.3 * entry.share < len(beyond) / len(values) < 1.7 * entry.share, name


def test_spans_outside_are_disjoint_from_training() -> None:
    for name, entry in RANGES.items():
        for low, high in entry.outside:
            assert high < entry.training[0] or low > entry.training[1], name


def test_every_stratum_that_is_asked_for_has_patients() -> None:
    cases = list(draws(PATIENTS, 0))
    for name, least in (("true HU at 120 kVp", 20), ("coverage", 10), ("kVp", 10), ("phase", 10), ("age", 30)):
        members: dict[str, int] = {}
        for case in cases:
            members[groups(case)[name]] = members.get(groups(case)[name], 0) + 1
        assert min(members.values()) >= least, (name, members)
    assert "0 to 60" in {groups(case)["true HU at 120 kVp"] for case in cases}


def test_draws_repeat() -> None:
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(3, "6 lumbar").patient.lumbar_count == 6
    assert draw(3, "no last rib").patient.last_rib == 0.0


def test_truth_under_a_region_is_that_of_its_voxels(study: PhantomStudy) -> None:
    assert study.ideal_hu is not None
    core = core_mask(study.labels, "L3")
    whole = core_truth(study, "L3")
    truth = next(v for v in study.vertebrae if v.level == "L3")
    assert whole.voxels == int(core.sum())
    assert whole.core_share == 1.0
    assert whole.mean_hu == pytest.approx(float(study.ideal_hu[core].astype(float).mean()))
    assert whole.mean_hu == pytest.approx(truth.trabecular_hu_true, abs=6.0)
    # the same region on another grid: cut out, axes swapped and turned round
    low = np.argwhere(core).min(axis=0)
    part = core[low[0] :, low[1] :, low[2] :].transpose(2, 0, 1)[::-1]
    affine = study.affine.copy()
    affine[:3, 3] = study.affine[:3, :3] @ (low + np.array([0, 0, part.shape[0] - 1])) + study.affine[:3, 3]
    affine[:3, :3] = study.affine[:3, [2, 0, 1]] * [-1, 1, 1]
    moved = region_truth(study, "L3", part, affine)
    assert (moved.mean_hu, moved.median_hu, moved.voxels) == pytest.approx(
        (whole.mean_hu, whole.median_hu, whole.voxels)
    )
    assert region_truth(study, "L3", body_mask(study.labels, "L3"), study.affine).core_share < 0.8


def test_truth_is_refused_where_there_is_none(study: PhantomStudy) -> None:
    with pytest.raises(ValueError, match="empty"):
        region_truth(study, "L3", np.zeros((2, 2, 2), dtype=bool), study.affine)
    with pytest.raises(ValueError, match="leaves"):
        region_truth(study, "L3", np.ones((500, 1, 1), dtype=bool), study.affine)
    with pytest.raises(ValueError, match="ideal"):
        core_truth(replace(study, ideal_hu=None), "L3")


def test_ideal_attenuation_has_neither_noise_nor_miscalibration(study: PhantomStudy) -> None:
    off = replace(study.scanner, hu_offset=40.0, noise_hu=40.0)
    other = render_study(study.patient, off, top="L2", bottom="L3", ideal=True)
    assert other.ideal_hu is not None
    assert study.ideal_hu is not None
    assert np.array_equal(other.ideal_hu, study.ideal_hu)
    assert not np.array_equal(other.voxels, study.voxels)


def test_a_constitution_changes_what_it_names() -> None:
    with pytest.raises(ValueError, match="cortex"):
        Constitution(cortex=0.0)
    plain = VirtualPatient(seed=4)
    tall = quantities(replace(plain, constitution=Constitution(texture_length=2.0, cortex=1.5)), coarse_scanner())
    usual = quantities(plain, coarse_scanner())
    assert tall["texture_length_mm"] == pytest.approx(2 * usual["texture_length_mm"])
    assert tall["cortex_mm"] == pytest.approx(1.5 * usual["cortex_mm"])
    short = replace(plain, constitution=Constitution(body_height=0.8, body_depth=1.1, disc_height=0.7, disc_hu=-30.0))
    study, other = (render_study(p, coarse_scanner(), top="L2", bottom="L3") for p in (plain, short))
    for a, b in zip(study.vertebrae, other.vertebrae, strict=True):
        assert b.size_mm[2] == pytest.approx(0.8 * a.size_mm[2])
        assert b.size_mm[1] == pytest.approx(1.1 * a.size_mm[1])
        assert b.size_mm[0] == a.size_mm[0]
    assert len(other.voxels) < len(study.voxels)


def test_judgements_are_kept_and_go_on_after_a_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.phantom_cache.FOLDER", tmp_path)
    cases = [case for case in draws(40, 0) if case.coverage in ("from L3", "down to L4")][:2]
    path = tmp_path / "judged.jsonl"
    first = judged(cases[:1], path)
    with path.open("a") as file:
        file.write('{"seed": 12, "anat')
    both = judged(cases, path)
    assert both[0] == first[0], "taken from the file: the seconds are the same"
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [case.seed for case in cases]
    assert len(list(tmp_path.glob("*.npz"))) == 2
    figures = figures_of(cases, both)
    assert figures["strata"][0]["patients"] == 2


def test_figures_count_what_they_say() -> None:
    full = next(case for case in draws(40, 0) if case.coverage == "from T12")
    cut = next(case for case in draws(40, 0) if case.coverage == "down to L4")

    def row(named: str, true: str | None, certain: bool = True, error: float = -4.0) -> dict[str, object]:
        return {
            "named": named, "true": true, "certain": certain, "flags": [], "distance_mm": 2.0, "fractured": False,
            "mean": 100.0, "median": 100.0 + error, "set_mean": 100.0, "core_mean": 101.0, "core_median": 99.0,
            "region_mean": 97.0, "region_median": 96.0 + error + 4.0, "in_core_share": 1.0,
        }  # fmt: skip

    def record(*rows: dict[str, object], refused: str | None = None, seed: int = 1) -> dict[str, object]:
        return {
            "seed": seed, "anatomy": "usual", "patient_hu_true": 100.0, "in_view": ["L1", "L2", "L3"],
            "refused": refused, "flags": [], "vertebrae": list(rows), "seconds": 1.0,
        }  # fmt: skip

    good = summary([(full, record(row("L1", "L1"), row("L2", "L2", error=-6.0), row("S1", "S1")))])
    assert (good["in_view"], good["found_percent"], good["named_right_percent"]) == (3, 66.7, 100.0)
    assert (good["hu_bias"], good["hu_bias_same_voxels"]) == (-5.0, 0.0)
    assert good["measured_l1_l4"] == 2
    wrong = summary([(full, record(row("L2", "L1"), row("L3", "L2", certain=False)))])
    assert (wrong["wrong_without_doubt"], wrong["patients_with_such"], wrong["doubted_percent"]) == (1, 1, 50.0)
    refused = summary([(full, record(refused="no")), (cut, record(refused="no", seed=2))])
    assert (refused["refused_wrongly"], refused["refused_rightly"], refused["in_view"]) == (1, 1, 3)


def test_a_case_is_judged_against_its_own_truth() -> None:
    localizer = SpineLocalizer.from_bundle(find_bundle("spine-localizer"))
    case = next(case for case in draws(60, 0) if case.coverage == "from L3" and not case.patient.fractures)
    study = render_study(case.patient, case.scanner, top="L3", workers=1, ideal=True)
    record = judge(case, study, localizer)
    assert record["in_view"] == ["L3", "L4", "L5", "S1"]
    measured = {row["true"]: row for row in record["vertebrae"] if "median" in row}
    assert measured, "at least one vertebra is found and measured"
    for row in measured.values():
        assert row["distance_mm"] < 8.0
        assert row["in_core_share"] > 0.9, "the measured region lies in the true core"
        assert abs(row["median"] - row["region_median"]) < 12.0


def test_the_published_figures_state_both_ranges() -> None:
    figures = json.loads((RESULTS / "spine-phantoms.json").read_text(encoding="utf-8"))["figures"]
    stated = {row["quantity"]: row for row in figures["trained_and_benchmark_ranges"]}
    assert stated.keys() == RANGES.keys()
    for name, entry in RANGES.items():
        assert stated[name]["training"] == list(entry.training)
    assert figures["strata"][0]["patients"] == PATIENTS
    assert len(figures["numbering_variants"]) == len(ANATOMIES)
