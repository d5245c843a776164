"""Scans of virtual patients agree with the truth that comes with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from osteo_daemon.phantom.body import build_body
from osteo_daemon.phantom.calibration import density_of_hu, trabecular_hu
from osteo_daemon.phantom.labels import BODY, CORE, LEVEL_CODE, Tissue, body_mask, core_mask, posterior_mask
from osteo_daemon.phantom.patient import Fracture, VirtualPatient
from osteo_daemon.phantom.scanner import Scanner, coarse_scanner
from osteo_daemon.phantom.spine import build_spine
from osteo_daemon.phantom.study import PhantomStudy, render_study, render_voi

PATIENT = VirtualPatient(seed=11, age_years=63, density_mg_cm3=105.0, scoliosis_deg=8.0)
CORE_TOLERANCE_HU = 3.0
COARSE = coarse_scanner()


@pytest.fixture(scope="module")
def coarse() -> PhantomStudy:
    return render_study(PATIENT, COARSE)


def centroid_mm(study: PhantomStudy, mask: np.ndarray) -> np.ndarray:
    return study.affine[:3, :3] @ np.array(ndimage.center_of_mass(mask)) + study.affine[:3, 3]


def test_the_volume_holds_the_levels_asked_for(coarse: PhantomStudy) -> None:
    assert [v.level for v in coarse.vertebrae] == ["T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5", "S1"]
    assert coarse.voxels.dtype == np.int16
    assert coarse.voxels.shape == coarse.labels.shape
    assert np.allclose(np.linalg.norm(coarse.affine[:3, :3], axis=0), COARSE.spacing_mm)
    # D runs cranially, H posteriorly, W to the left
    assert (np.abs(coarse.affine[:3, :3]).argmax(axis=0) == [2, 1, 0]).all()
    assert np.linalg.det(coarse.affine[:3, :3]) < 0


def test_mean_hu_of_each_core_is_the_set_value(coarse: PhantomStudy) -> None:
    for v in coarse.vertebrae:
        core = core_mask(coarse.labels, v.level)
        assert core.sum() > 100
        assert coarse.voxels[core].mean() == pytest.approx(v.trabecular_hu_true, abs=CORE_TOLERANCE_HU), v.level
        assert v.trabecular_hu_true == pytest.approx(trabecular_hu(v.density_mg_cm3))


def test_mean_hu_holds_at_clinical_resolution_without_noise() -> None:
    scanner = Scanner(slice_thickness_mm=1.5, pixel_spacing_mm=0.8, matrix=160, noise_hu=0.0, phase="portal", kvp=100.0)
    study = render_study(PATIENT, scanner, top="L2", bottom="L3")
    for v in study.vertebrae:
        core = core_mask(study.labels, v.level)
        assert study.voxels[core].mean() == pytest.approx(v.trabecular_hu_true, abs=CORE_TOLERANCE_HU)
        # QCT's density plus 17.5 mg/cm3 in the portal phase, read with more contrast at 100 kVp
        assert v.trabecular_hu_true == pytest.approx(1.25 / 0.951 * (v.density_mg_cm3 + 17.5))


def test_masks_lie_at_the_true_centres(coarse: PhantomStudy) -> None:
    for v in coarse.vertebrae:
        if v.level == "T10":  # its upper part may be cut
            continue
        body = body_mask(coarse.labels, v.level)
        assert np.linalg.norm(centroid_mm(coarse, body) - v.centre_lps_mm) < 3.0, v.level
        behind = (centroid_mm(coarse, posterior_mask(coarse.labels, v.level)) - v.centre_lps_mm) @ v.axes[:, 1]
        assert 15.0 < behind < 60.0
        volume_ml = body.sum() * 27e-3
        assert volume_ml == pytest.approx(np.prod(v.size_mm) * 0.75e-3, rel=0.2)


def test_axes_are_a_rotation_that_points_left_back_and_up(coarse: PhantomStudy) -> None:
    for v in coarse.vertebrae:
        assert np.allclose(v.axes.T @ v.axes, np.eye(3), atol=1e-9)
        assert np.linalg.det(v.axes) == pytest.approx(1.0)
        assert (np.diag(v.axes) > 0.6).all()


def test_sagittal_profile_has_lordosis_and_sacral_slope() -> None:
    spine = build_spine(replace(PATIENT, sacral_slope_deg=40.0, lordosis_deg=50.0, scoliosis_deg=0.0))
    tilt = {v.level: np.degrees(np.arctan2(v.axes[1, 2], v.axes[2, 2])) for v in spine.vertebrae}
    assert tilt["S1"] == pytest.approx(-40.0, abs=6.0)
    assert tilt["L1"] - tilt["S1"] == pytest.approx(50.0, abs=10.0)
    assert tilt["L5"] < tilt["L4"] < tilt["L3"] < tilt["L2"]
    assert tilt["T4"] < tilt["T8"] < tilt["T12"], "kyphosis"


def test_scoliosis_bends_the_column_sideways() -> None:
    def bow(degrees: float) -> float:
        spine = build_spine(replace(PATIENT, scoliosis_deg=degrees))
        return float(spine["L2"].centre[0] - 0.5 * (spine["T11"].centre[0] + spine["L5"].centre[0]))

    assert bow(30.0) > bow(0.0) + 8.0
    assert bow(-30.0) < bow(0.0) - 8.0


def test_slices_may_be_counted() -> None:
    study = render_study(PATIENT, COARSE, top="L3", bottom="L3", slices=4)
    assert study.voxels.shape[0] == 4


def test_tissues_read_as_they_should(coarse: PhantomStudy) -> None:
    def median(tissue: int) -> float:
        mask = ndimage.binary_erosion(coarse.labels == tissue, iterations=2)
        assert mask.sum() > 30, tissue
        return float(np.median(coarse.voxels[mask]))

    assert -120 < median(Tissue.FAT) < -85
    assert 25 < median(Tissue.MUSCLE) < 70
    assert 30 < median(Tissue.LIVER) < 75
    assert 15 < median(Tissue.KIDNEY) < 50
    assert median(Tissue.LUNG) < -650
    corner = coarse.voxels[:, 0, 0]
    assert (corner == -1024).all()
    rows = coarse.voxels[:, :4, 40:80]
    assert -1010 < rows.mean() < -990


def test_phases_enhance_vessels_and_kidneys() -> None:
    readings = {}
    for phase in ("native", "arterial", "portal"):
        study = render_study(PATIENT, coarse_scanner(phase=phase), top="L1", bottom="L3")
        aorta = study.voxels[ndimage.binary_erosion(study.labels == Tissue.AORTA)]
        kidney = study.voxels[ndimage.binary_erosion(study.labels == Tissue.KIDNEY)]
        readings[phase] = np.median(aorta), np.median(kidney)
    assert readings["native"][0] < 60 < 120 < readings["portal"][0] < readings["arterial"][0] - 80
    assert readings["portal"][1] > readings["native"][1] + 80


def test_same_seed_same_voxels_whatever_the_threads() -> None:
    one = render_study(PATIENT, COARSE, top="L2", bottom="L4", workers=1)
    two = render_study(PATIENT, COARSE, top="L2", bottom="L4", workers=2)
    assert np.array_equal(one.voxels, two.voxels)
    assert np.array_equal(one.labels, two.labels)
    other = render_study(replace(PATIENT, seed=12), COARSE, top="L2", bottom="L4")
    assert other.voxels.shape != one.voxels.shape or not np.array_equal(one.voxels, other.voxels)
    again = render_study(PATIENT, replace(COARSE, seed=1), top="L2", bottom="L4")
    assert np.array_equal(again.labels, one.labels), "the body does not depend on the scan's noise"
    assert not np.array_equal(again.voxels, one.voxels)


def test_noise_has_the_set_strength() -> None:
    quiet = render_study(PATIENT, coarse_scanner(noise_hu=0.0), top="L3", bottom="L3")
    loud = render_study(PATIENT, coarse_scanner(noise_hu=30.0), top="L3", bottom="L3")
    difference = (loud.voxels.astype(float) - quiet.voxels)[body_mask(quiet.labels)]
    assert 18.0 < difference.std() < 42.0
    assert abs(difference.mean()) < 4.0


def test_transitional_anatomy_keeps_its_names() -> None:
    six = render_study(replace(PATIENT, lumbar_count=6), COARSE, top="T12", bottom="S1")
    assert [v.level for v in six.vertebrae] == ["T12", "L1", "L2", "L3", "L4", "L5", "L6", "S1"]
    assert body_mask(six.labels, "L6").sum() > 800
    four = render_study(replace(PATIENT, lumbar_count=4, thoracic_count=11), COARSE, top="T11", bottom="S1")
    assert [v.level for v in four.vertebrae] == ["T11", "L1", "L2", "L3", "L4", "S1"]


def test_ribs_may_be_short_absent_or_lumbar() -> None:
    # thoracic_count 12: names count from the skull, whether T12 carries a rib or not
    def ribs_by_level(patient: VirtualPatient) -> dict[str, int]:
        study = render_study(patient, COARSE, top="T11", bottom="L2")
        d, _, _ = np.nonzero(study.labels == Tissue.RIB)
        z = study.affine[2, 3] + 3.0 * d
        bounds = {v.level: (float(v.centre_lps_mm[2]), 0.5 * v.size_mm[2]) for v in study.vertebrae}
        return {level: int((np.abs(z - middle) < half).sum()) for level, (middle, half) in bounds.items()}

    straight = replace(PATIENT, scoliosis_deg=0.0)
    usual, short, none, lumbar = (
        ribs_by_level(replace(straight, **change))  # type: ignore[arg-type]
        for change in ({}, {"last_rib": 0.2}, {"last_rib": 0.0}, {"lumbar_rib_mm": 40.0})
    )
    assert list(usual) == list(none) == ["T11", "T12", "L1", "L2"]
    assert none["T12"] < short["T12"] < usual["T12"]
    # beside L1 the eleventh rib passes too
    assert short["L1"] - none["L1"] < 0.2 * (usual["L1"] - none["L1"])
    assert lumbar["L1"] > usual["L1"] + 50
    lowest = build_body(replace(straight, last_rib=0.0), COARSE, 3.0).ribs.ribs[0]
    assert lowest.z > build_spine(straight)["T11"].centre[2], "the lowest rib is the eleventh"
    with pytest.raises(ValueError, match="last_rib"):
        VirtualPatient(seed=1, last_rib=-0.1)


@pytest.mark.parametrize(
    ("kind", "front", "middle"), [("wedge", 0.6, 0.84), ("biconcave", 1.0, 0.6), ("crush", 0.66, 0.66)]
)
def test_a_fracture_takes_height_where_it_should(kind: str, front: float, middle: float) -> None:
    whole = render_voi(PATIENT, "L2", Scanner(noise_hu=0.0), 64)
    broken = replace(PATIENT, fractures=(Fracture("L2", kind, 0.4),))  # type: ignore[arg-type]
    voi = render_voi(broken, "L2", Scanner(noise_hu=0.0), 64)
    assert voi.vertebra.fractured
    assert not whole.vertebra.fractured
    relative = [a / b for a, b in zip(voi.vertebra.heights_mm, whole.vertebra.heights_mm, strict=True)]
    assert relative[0] == pytest.approx(front, abs=0.06)
    assert relative[1] == pytest.approx(middle, abs=0.06)

    def height(labels: np.ndarray, row: int) -> int:
        column = labels[:, row, 32]
        return int(((column == BODY + LEVEL_CODE["L2"]) | (column == CORE + LEVEL_CODE["L2"])).sum())

    front_row, middle_row = 32 - round(0.42 * whole.vertebra.size_mm[1]), 32
    assert height(voi.labels, front_row) / height(whole.labels, front_row) == pytest.approx(front, abs=0.14)
    assert height(voi.labels, middle_row) / height(whole.labels, middle_row) == pytest.approx(middle, abs=0.14)


def test_metal_and_cement_stand_in_their_levels() -> None:
    patient = replace(PATIENT, metal_levels=("L3", "L4"), cement_levels=("L1",), hip_prosthesis="left")
    study = render_study(patient, COARSE)
    metal = study.labels == Tissue.METAL
    assert study.voxels[metal].max() > 2000
    truth = {v.level: v.centre_lps_mm[2] for v in study.vertebrae}
    z = study.affine[2, 3] + np.flatnonzero(metal.any(axis=(1, 2))) * study.affine[2, 0]
    assert any(abs(z - truth["L3"]) < 10)
    assert any(abs(z - truth["L1"]) < 6)
    assert not any(abs(z - truth["L2"]) < 4)
    hips = metal[: int((truth["S1"] - 70 - study.affine[2, 3]) / 3)]
    assert hips[:, :, 64:].sum() > 100
    assert hips[:, :, :64].sum() == 0


def test_a_scan_may_be_miscalibrated_padded_and_off_centre(coarse: PhantomStudy) -> None:
    scanner = replace(COARSE, hu_offset=12.0, padding_hu=-3024.0, truncate_mm=90.0)
    study = render_study(PATIENT, scanner)
    v = study.vertebrae[5]
    assert study.voxels[core_mask(study.labels, v.level)].mean() == pytest.approx(v.trabecular_hu_true + 12, abs=4)
    assert study.voxels.min() == -3024
    assert study.affine[0, 3] == pytest.approx(coarse.affine[0, 3] + 90)


def test_a_voi_is_centred_and_true() -> None:
    voi = render_voi(PATIENT, "L4", Scanner(noise_hu=8.0))
    assert voi.voxels.shape == (64, 64, 64)
    assert voi.voxels.dtype == np.float32
    assert np.allclose(voi.affine @ [31.5, 31.5, 31.5, 1], [*voi.vertebra.centre_lps_mm, 1])
    core = core_mask(voi.labels, "L4")
    assert voi.voxels[core].mean() == pytest.approx(voi.vertebra.trabecular_hu_true, abs=CORE_TOLERANCE_HU)
    body = body_mask(voi.labels, "L4")
    assert np.allclose(ndimage.center_of_mass(body), 31.5, atol=2.0)
    assert {"L3", "L5"} <= {name for name in LEVEL_CODE if body_mask(voi.labels, name).any()}
    assert (voi.labels == Tissue.DISC).sum() > 5000
    # the posterior elements lie behind: at higher rows
    assert ndimage.center_of_mass(posterior_mask(voi.labels, "L4"))[1] > 45


def test_a_voi_repeats_with_its_generator_and_moves_with_jitter() -> None:
    first = render_voi(PATIENT, "L1", Scanner(), 48, rng=np.random.default_rng(5), shift_mm=3.0, turn_deg=4.0)
    second = render_voi(PATIENT, "L1", Scanner(), 48, rng=np.random.default_rng(5), shift_mm=3.0, turn_deg=4.0)
    other = render_voi(PATIENT, "L1", Scanner(), 48, rng=np.random.default_rng(6), shift_mm=3.0, turn_deg=4.0)
    assert np.array_equal(first.voxels, second.voxels)
    assert not np.allclose(first.affine, other.affine)
    with pytest.raises(KeyError):
        render_voi(PATIENT, "L6", Scanner())


def test_calibration_and_its_inverse() -> None:
    assert trabecular_hu(120.0) == pytest.approx(150.0)
    assert trabecular_hu(80.0) == pytest.approx(100.0)
    assert trabecular_hu(100.0, 80.0) / trabecular_hu(100.0) == pytest.approx(1.23)
    assert trabecular_hu(100.0, 140.0) < trabecular_hu(100.0) < trabecular_hu(100.0, 100.0)
    for kvp in (80.0, 100.0, 120.0, 140.0):
        assert density_of_hu(trabecular_hu(93.0, kvp, "portal"), kvp, "portal") == pytest.approx(93.0)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="lumbar_count"):
        VirtualPatient(seed=1, lumbar_count=7)
    with pytest.raises(ValueError, match="age_years"):
        VirtualPatient(seed=1, age_years=12)
    with pytest.raises(ValueError, match="kvp"):
        Scanner(kvp=20.0)
    with pytest.raises(ValueError, match="height_loss"):
        Fracture("L1", "wedge", 0.9)
