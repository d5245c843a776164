"""The shipped weights on a virtual patient that training never saw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from osteo_daemon.errors import BundleError, NotEligible
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import ModelBundle, find_bundle
from osteo_daemon.inference.localize import SpineLocalizer
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import PhantomStudy, render_study

SEED = 7_000_003
NAMES = ["T12", "L1", "L2", "L3", "L4", "L5"]


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    return find_bundle("spine-localizer", None)


@pytest.fixture(scope="module")
def localizer(bundle: ModelBundle) -> SpineLocalizer:
    return SpineLocalizer.from_bundle(bundle)


@pytest.fixture(scope="module")
def study() -> PhantomStudy:
    patient = VirtualPatient(seed=SEED, age_years=78, sex="F", density_mg_cm3=45.0, bmi_kg_m2=24.0)
    return render_study(patient, coarse_scanner(3.0, noise_hu=25.0, seed=SEED), top="T11")


def volume_of(study: PhantomStudy) -> CtVolume:
    return CtVolume(study.voxels.astype(np.float32), study.affine)


def test_osteoporotic_vertebrae_are_found_and_named(localizer: SpineLocalizer, study: PhantomStudy) -> None:
    found = localizer(volume_of(study))
    truth = {v.level: v for v in study.vertebrae}
    assert set(NAMES) <= {v.level for v in found.vertebrae}
    assert found.vertebrae[-1].level == "S1"
    assert not [f for f in found.flags if f.code == "level_uncertain"]
    for vertebra in found.vertebrae:
        if vertebra.level in NAMES:
            assert vertebra.centre_lps_mm == pytest.approx(truth[vertebra.level].centre_lps_mm, abs=4.0)
            assert vertebra.confidence > 0.6
            up = truth[vertebra.level].axes[:, 2]
            assert vertebra.axes_lps[0] @ -up > np.cos(np.radians(12))
    assert {"resample", "network", "decode"} <= set(found.durations_s)


def test_the_order_of_axes_and_slices_changes_nothing(localizer: SpineLocalizer, study: PhantomStudy) -> None:
    turned = study.voxels[::-1, :, ::-1].transpose(2, 0, 1).astype(np.float32)
    flip = np.eye(4)
    flip[0, 0], flip[0, 3] = -1, study.voxels.shape[0] - 1
    flip[2, 2], flip[2, 3] = -1, study.voxels.shape[2] - 1
    affine = (study.affine @ flip)[:, [2, 0, 1, 3]]
    straight = {v.level: v.centre_lps_mm for v in localizer(volume_of(study)).vertebrae}
    other = {v.level: v.centre_lps_mm for v in localizer(CtVolume(np.ascontiguousarray(turned), affine)).vertebrae}
    assert straight.keys() == other.keys()
    for level, centre in straight.items():
        assert other[level] == pytest.approx(centre, abs=1.0)


def cut_below(study: PhantomStudy, level: str) -> CtVolume:
    """The scan from the middle of a level upwards."""
    centre = next(v.centre_lps_mm for v in study.vertebrae if v.level == level)
    first = round(float(volume_of(study).to_index(centre)[0]))
    affine = study.affine.copy()
    affine[:3, 3] = volume_of(study).to_lps([first, 0, 0])
    return CtVolume(study.voxels[first:].astype(np.float32), affine)


def test_without_the_sacrum_names_come_from_the_last_rib(localizer: SpineLocalizer, study: PhantomStudy) -> None:
    found = localizer(cut_below(study, "L5"))
    truth = {v.level: v.centre_lps_mm for v in study.vertebrae}
    assert found.anchor == "rib"
    assert {"T12", "L1", "L2", "L3"} <= {v.level for v in found.vertebrae}
    for vertebra in found.vertebrae:
        assert vertebra.centre_lps_mm == pytest.approx(truth[vertebra.level], abs=4.0)


def test_one_lumbar_vertebra_below_the_last_rib_is_too_few(localizer: SpineLocalizer, study: PhantomStudy) -> None:
    with pytest.raises(NotEligible) as refusal:
        localizer(cut_below(study, "L2"))
    assert refusal.value.code == "insufficient_coverage"


def test_a_box_of_water_has_no_vertebra(localizer: SpineLocalizer) -> None:
    voxels = np.full((70, 70, 70), -1000, np.float32)
    voxels[5:65, 10:60, 5:65] = 20
    affine = np.array([[0, 0, 4.0, 0], [0, 4.0, 0, 0], [4.0, 0, 0, 0], [0, 0, 0, 1]])
    with pytest.raises(NotEligible) as refusal:
        localizer(CtVolume(voxels, affine))
    assert refusal.value.code == "no_lumbar_vertebra"


def test_a_bundle_of_another_kind_is_refused(bundle: ModelBundle) -> None:
    with pytest.raises(BundleError, match="not a spine localizer"):
        SpineLocalizer.from_bundle(replace(bundle, network={"architecture": "something-else"}))
    with pytest.raises(BundleError, match="dropout"):
        SpineLocalizer.from_bundle(replace(bundle, network={**bundle.network, "dropout": 1}))
