"""What a scan shows of its own quality, on a drawn torso of which every value is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from osteo_daemon.domain.findings import Attenuation
from osteo_daemon.errors import NotEligible
from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.contrast import Enhancement, Phase, measure_enhancement, phase_of
from osteo_daemon.inference.paravertebral import front_mm, muscle_hu
from osteo_daemon.inference.quality import assess, check_scale, correct
from osteo_daemon.inference.surroundings import survey
from osteo_daemon.inference.vertebra import Vertebra

UPRIGHT = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # caudal, posterior, left
LEVELS = ("L1", "L2", "L3", "L4")
GAP_MM = 35.0


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Attenuation in HU of each part, and how the whole is scanned."""

    air: float = -1000.0
    fat: float = -105.0
    muscle: float = 48.0
    aorta: float = 42.0
    cava: float = 40.0
    kidney: float = 32.0
    noise: float = 12.0
    half_width_mm: float = 150.0
    metal: bool = False
    ribs: bool = True


def draw(parts: Drawn = Drawn(), field_mm: float = 400.0) -> CtVolume:
    """An elliptic trunk of 140 mm on 4 x 2 x 2 mm voxels; the origin lies in the middle of L2 and L3."""
    half = field_mm / 2
    z, y, x = np.meshgrid(np.arange(-18, 18) * 4.0, *(np.arange(-half, half, 2.0),) * 2, indexing="ij")
    voxels = np.full(z.shape, parts.air)
    trunk = (x / parts.half_width_mm) ** 2 + ((y + 10) / 105) ** 2 < 1
    voxels[trunk] = parts.fat
    voxels[(x / (parts.half_width_mm - 28)) ** 2 + ((y + 10) / 80) ** 2 < 1] = parts.fat + 6  # around the organs
    # liver, bowel, abdominal wall: most of the lean tissue
    voxels[(np.abs(x) < 95) & (y > -75) & (y < -45)] = parts.muscle + 4
    for side in (-1, 1):
        voxels[(x - side * 36) ** 2 / 13**2 + (y - 2) ** 2 / 17**2 < 1] = parts.muscle  # psoas
        voxels[(x - side * 28) ** 2 / 24**2 + (y - 66) ** 2 / 20**2 < 1] = parts.muscle  # erector spinae
        voxels[((x - side * 62) / 22) ** 2 + ((y - 6) / 20) ** 2 + ((z - 20) / 50) ** 2 < 1] = parts.kidney
        if parts.ribs:
            voxels[((x - side * 82) / 5) ** 2 + ((y - 40) / 5) ** 2 < 1] = 450.0
    bone = (x / 22) ** 2 + (y / 17) ** 2 < 1
    voxels[bone] = 150.0
    voxels[(x - 12) ** 2 + (y + 32) ** 2 < 10**2] = parts.aorta
    voxels[((x - 12) ** 2 + (y + 32) ** 2 < 11**2) & (x > 20)] = 500.0  # a calcified wall
    voxels[(x + 20) ** 2 + (y + 29) ** 2 < 10**2] = parts.cava
    if parts.metal:
        voxels[(np.abs(x - 70) < 8) & (np.abs(y + 60) < 8) & (np.abs(z) < 20)] = 3071.0
    voxels += np.random.default_rng(0).normal(0, parts.noise, voxels.shape)
    affine = np.array([[0, 0, 2.0, -half], [0, 2.0, 0, -half], [4.0, 0, 0, -72.0], [0, 0, 0, 1]])
    return CtVolume(np.maximum(voxels, -1400.0).astype(np.float32), affine)


def spine() -> list[Vertebra]:
    """L1 to L4 of that trunk."""
    _, y, x = np.meshgrid(np.arange(-13, 14.0), np.arange(-17, 18.0), np.arange(-22, 23.0), indexing="ij")
    mask = (x / 22) ** 2 + (y / 17) ** 2 < 1
    found = []
    for number, level in enumerate(LEVELS):
        centre = np.array([0.0, 0.0, (1.5 - number) * GAP_MM])
        affine = np.array([[0, 0, 1.0, -22], [0, 1.0, 0, -17], [1.0, 0, 0, -13 + centre[2]], [0, 0, 0, 1]])
        found.append(
            Vertebra(
                level=level,
                centre_lps_mm=centre,
                axes_lps=UPRIGHT,
                confidence=1.0,
                body_region=Region(mask, affine),
                level_certain=True,
                height_mm=27.0,
                heights=None,
                superior_lps_mm=centre,
                inferior_lps_mm=centre,
            )
        )
    return found


def _codes(volume: CtVolume) -> list[str]:
    return [f"{flag.code}:{flag.severity}" for flag in assess(volume, spine()).quality_flags]


def test_a_good_scan_gives_its_own_values_back() -> None:
    quality = assess(draw(), spine())
    around, vessels = quality.surroundings, quality.enhancement
    assert around.air_hu == pytest.approx(-1000, abs=4)
    assert around.fat_hu == pytest.approx(-105, abs=4)
    assert around.truncated_share == 0
    assert quality.muscle_hu == pytest.approx(48, abs=4)
    assert vessels.aorta_hu == pytest.approx(42, abs=8)
    assert vessels.vena_cava_hu == pytest.approx(40, abs=8)
    assert vessels.kidney_hu == pytest.approx(45, abs=16)  # or the psoas beside it
    assert vessels.phase is Phase.UNENHANCED
    assert quality.noise_hu == pytest.approx(12, abs=3)
    assert quality.metal_mm3 == 0
    assert quality.quality_flags == ()
    assert front_mm(spine()[0]) == pytest.approx(17, abs=1)
    check_scale(around)
    assert set(quality.to_json()) >= {"air_hu", "fat_hu", "muscle_hu", "contrast_phase"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda hu: hu + 60, "air"),
        (lambda hu: hu - 60, "air"),
        (lambda hu: hu * 1.3, "air"),
        (lambda hu: hu * 0.8, "air"),
        (lambda hu: hu + 1024, "air"),  # stored as if the intercept were 0
        (lambda hu: (hu + 1000) * 1.1 - 1000, "fat"),  # air kept, tissue stretched
        (lambda hu: np.where(hu > -900, hu + 40, hu), "fat"),
    ],
)
def test_a_scale_that_is_off_is_refused(change, named: str) -> None:
    good = draw()
    altered = CtVolume(change(good.voxels).astype(np.float32), good.affine)
    with pytest.raises(NotEligible, match=f"calibration_out_of_range: {named} reads"):
        check_scale(survey(altered))


def test_a_scan_shifted_below_air_has_no_scale_left() -> None:
    """An intercept of -2024: air falls below every padding value, tissue reads like air."""
    good = draw()
    shifted = np.where(good.voxels - 1000 < -1400, -1024, good.voxels - 1000)
    with pytest.raises(NotEligible, match="calibration_out_of_range"):
        check_scale(survey(CtVolume(shifted.astype(np.float32), good.affine)))


@pytest.mark.parametrize(("muscle", "flagged"), [(48, False), (8, False), (85, False), (-25, True), (125, True)])
def test_muscle_alone_gates(muscle: float, flagged: bool) -> None:
    """Air and fat are right, soft tissue is not: a table that was bent between them."""
    codes = _codes(draw(Drawn(muscle=float(muscle))))
    assert ("calibration_out_of_range:blocking" in codes) is flagged


def test_no_air_in_view_is_said() -> None:
    volume = draw(field_mm=140.0)
    assert survey(volume).air_hu is None
    assert survey(volume).truncated_share == 1.0
    check_scale(survey(volume))
    codes = _codes(volume)
    assert "calibration_unchecked:caution" in codes
    assert "field_of_view_truncated:caution" in codes


def test_a_lean_patient_without_fat_is_unchecked_not_refused() -> None:
    volume = draw(Drawn(fat=40.0))
    assert survey(volume).fat_hu is None
    check_scale(survey(volume))
    assert "calibration_unchecked:caution" in _codes(volume)


def test_fluid_in_a_wasted_patient_is_not_taken_for_fat() -> None:
    """Ascites beside enhanced organs: two peaks as far apart as fat and muscle, but not on one scale with air."""
    around = survey(draw(Drawn(fat=8.0, muscle=108.0)))
    assert around.air_hu == pytest.approx(-1000, abs=4)
    assert around.fat_hu is None
    check_scale(around)


@pytest.mark.parametrize(("half_width_mm", "truncated"), [(150.0, False), (190.0, False), (230.0, True)])
def test_an_obese_patient_is_cut_off(half_width_mm: float, truncated: bool) -> None:
    codes = _codes(draw(Drawn(half_width_mm=half_width_mm)))
    assert ("field_of_view_truncated:caution" in codes) is truncated
    assert "calibration_out_of_range:blocking" not in codes


def test_padding_is_not_air() -> None:
    volume = draw()
    voxels = volume.voxels.copy()
    y, x = np.mgrid[-100:100, -100:100]
    voxels[:, x**2 + y**2 > 99**2] = -1024.0
    assert survey(CtVolume(voxels, volume.affine)).air_hu == pytest.approx(-1000, abs=4)
    voxels[voxels < -900] = -1024.0  # a background that was erased
    erased = survey(CtVolume(voxels, volume.affine))
    assert erased.air_hu is None
    assert erased.fat_hu == pytest.approx(-105, abs=4)


def test_noise_and_metal() -> None:
    assert "high_noise:caution" in _codes(draw(Drawn(noise=80.0)))
    assert "metal_in_view:info" in _codes(draw(Drawn(metal=True)))


# HU of aorta, vena cava, kidney: what is drawn, and the phase that must be told
PHASES = {
    "native": (42, 40, 32, Phase.UNENHANCED),
    "anaemic": (28, 28, 28, Phase.UNENHANCED),
    "late arterial": (310, 90, 150, Phase.ARTERIAL),
    "portal venous": (155, 145, 185, Phase.PORTAL_VENOUS),
    "portal venous at 100 kV": (210, 190, 240, Phase.PORTAL_VENOUS),
    "late": (108, 106, 150, Phase.LATE),
    "excretory": (82, 80, 130, Phase.LATE),
    "kidneys do not take part": (150, 140, 40, Phase.UNCLEAR),
    "agent long gone from the blood": (45, 45, 120, Phase.UNENHANCED),
}


@pytest.mark.parametrize("name", PHASES)
def test_contrast_phase(name: str) -> None:
    aorta, cava, kidney, phase = PHASES[name]
    volume = draw(Drawn(aorta=aorta, cava=cava, kidney=kidney))
    quality = assess(volume, spine())
    found = quality.enhancement
    assert found.phase is phase, found
    assert found.aorta_hu == pytest.approx(aorta, abs=15)
    assert found.vena_cava_hu == pytest.approx(cava, abs=15)
    assert found.kidney_hu == pytest.approx(max(kidney, 45), abs=20)
    assert found.enhanced is (phase is not Phase.UNENHANCED)
    codes = [flag.code for flag in quality.quality_flags]
    assert ("contrast_enhanced" in codes) is found.enhanced
    assert ("contrast_uncorrected" in codes) is (found.enhanced and phase is not Phase.PORTAL_VENOUS)


@pytest.mark.parametrize(
    ("aorta", "cava", "kidney", "phase"),
    [
        (None, None, None, Phase.UNENHANCED),
        (None, None, 180.0, Phase.UNCLEAR),
        (150.0, None, 180.0, Phase.UNCLEAR),
        (150.0, 140.0, None, Phase.UNCLEAR),
        (99.0, 95.0, None, Phase.UNENHANCED),
        (99.0, 95.0, 150.0, Phase.LATE),
        (124.0, 120.0, 150.0, Phase.LATE),
        (124.0, 120.0, 120.0, Phase.PORTAL_VENOUS),
        (180.0, 100.0, 100.0, Phase.ARTERIAL),
    ],
)
def test_phase_table(aorta: float | None, cava: float | None, kidney: float | None, phase: Phase) -> None:
    assert phase_of(aorta, cava, kidney) is phase


def test_organs_out_of_view_are_none() -> None:
    volume = draw(field_mm=90.0)
    assert measure_enhancement(volume, []) == Enhancement(None, None, None, Phase.UNENHANCED)
    assert measure_enhancement(volume, spine()).kidney_hu is None
    assert muscle_hu(volume, [], -105.0) is None


@pytest.mark.parametrize(
    ("kvp", "phase", "mean", "factors", "codes"),
    [
        (120.0, Phase.UNENHANCED, None, {}, []),
        (140.0, Phase.UNENHANCED, 107.3, {"kvp_140_to_120": 1.073}, []),
        (100.0, Phase.UNENHANCED, 95.1, {"kvp_100_to_120": 0.951}, []),
        (80.0, Phase.UNENHANCED, None, {}, ["kvp_uncorrected"]),
        (None, Phase.UNENHANCED, None, {}, ["kvp_unknown"]),
        (120.0, Phase.PORTAL_VENOUS, 88.8, {"contrast_portal_venous_hu": -11.2}, []),
        (140.0, Phase.PORTAL_VENOUS, 96.1, {"kvp_140_to_120": 1.073, "contrast_portal_venous_hu": -11.2}, []),
        (None, Phase.PORTAL_VENOUS, 88.8, {"contrast_portal_venous_hu": -11.2}, ["kvp_unknown"]),
        (120.0, Phase.ARTERIAL, None, {}, []),
        (120.0, Phase.LATE, None, {}, []),
        (120.0, Phase.UNCLEAR, None, {}, []),
    ],
)
def test_corrections(
    kvp: float | None, phase: Phase, mean: float | None, factors: dict[str, float], codes: list[str]
) -> None:
    corrected, flags = correct(Attenuation(100.0, 100.0, 20.0, 5000.0), kvp, phase)
    assert (None if corrected is None else corrected.mean) == mean
    assert ({} if corrected is None else corrected.factors) == factors
    assert [flag.code for flag in flags] == codes
    if corrected is not None:
        assert corrected.apply(100.0) == pytest.approx(mean, abs=0.06)
