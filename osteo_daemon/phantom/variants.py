"""Random patients and scanners over the whole range of plausible anatomy and technique.

For tests, localiser training and robustness figures. A cohort with epidemiology of its own sets the fields itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, Literal, get_args

import numpy as np

from osteo_daemon.phantom.calibration import SLOPE_120_HU_PER_MG_CM3
from osteo_daemon.phantom.patient import Fracture, FractureKind, Sex, VirtualPatient
from osteo_daemon.phantom.scanner import Kernel, Phase, Scanner

_AGES: Final = (25.0, 95.0)
_MEAN_HU: Final = (226.0, 89.0)
_DENSITY_SD_MG_CM3: Final = 30.0
"""Close to the SD of 38-44 HU around the age norm (Jang, Radiology 2019)."""

Anatomy = Literal["usual", "any"]


def expected_density(age_years: float) -> float:
    """Mean trabecular density in mg/cm3 at an age.

    Jang's attenuation norm (Radiology 2019: 226 HU below 30 years to 89 HU from 90, taken as linear between 25 and 95)
    over the calibration's slope.
    """
    return float(np.interp(age_years, _AGES, _MEAN_HU)) / SLOPE_120_HU_PER_MG_CM3


def draw_patient(rng: np.random.Generator, *, anatomy: Anatomy = "any", **fixed: Any) -> VirtualPatient:
    """A random adult.

    Args:
        rng: draws everything, the patient's own seed included.
        anatomy: "usual" has five lumbar vertebrae and no fracture, implant or transitional form; "any" has each of them
            with a frequency well above the population's, so that small sets hold some.
        fixed: fields of `VirtualPatient` that are set rather than drawn.
    """
    age = int(rng.integers(30, 91))
    sex: Sex = "F" if rng.uniform() < 0.55 else "M"
    slope = float(np.clip(rng.normal(38.0, 8.0), 18.0, 58.0))
    density = float(np.clip(rng.normal(expected_density(age), _DENSITY_SD_MG_CM3), 15.0, 260.0))
    drawn: dict[str, Any] = {
        "seed": int(rng.integers(0, 2**62)),
        "age_years": age,
        "sex": sex,
        "density_mg_cm3": density,
        "stature_cm": float(np.clip(rng.normal(162.0 if sex == "F" else 176.0, 7.0), 142.0, 205.0)),
        "bmi_kg_m2": float(np.clip(rng.lognormal(np.log(26.0), 0.17), 17.0, 45.0)),
        "sacral_slope_deg": slope,
        # lordosis follows the sacral slope
        "lordosis_deg": float(np.clip(slope * 0.85 + rng.normal(15.0, 6.0), 15.0, 75.0)),
        "kyphosis_deg": float(np.clip(rng.normal(36.0 + 0.2 * max(0, age - 50), 9.0), 12.0, 75.0)),
        "scoliosis_deg": float(rng.normal(0.0, 4.0)),
        "osteophytes": float(np.clip(rng.normal((age - 35) / 70.0, 0.2), 0.0, 1.0)),
        "disc_degeneration": float(np.clip(rng.normal((age - 30) / 75.0, 0.18), 0.0, 0.95)),
    }
    if anatomy == "any":
        drawn |= _unusual(rng, density)
    return VirtualPatient(**(drawn | fixed))


def _unusual(rng: np.random.Generator, density_mg_cm3: float) -> dict[str, Any]:
    """Transitional forms, curves, fractures, implants, dense foci: each seldom."""
    fields: dict[str, Any] = {}
    chance = rng.uniform(size=9)
    if chance[0] < 0.10:
        fields["lumbar_count"] = int(rng.choice([4, 6]))
    if chance[1] < 0.04:
        fields["thoracic_count"] = int(rng.choice([11, 13]))
    if chance[2] < 0.08:
        fields["sacralised"] = float(rng.uniform(0.3, 1.0))
    if chance[3] < 0.05:
        fields["lumbar_rib_mm"] = float(rng.uniform(12.0, 50.0))
    if chance[4] < 0.12:
        fields["scoliosis_deg"] = float(rng.choice([-1.0, 1.0]) * rng.uniform(10.0, 40.0))
        fields["scoliosis_apex"] = str(rng.choice(["T12", "L1", "L2", "L3"]))
    names = ["T11", "T12", "L1", "L2", "L3", "L4"]
    # fractures become common where density is low
    if chance[5] < 0.04 + 0.25 * float(np.clip((100.0 - density_mg_cm3) / 80.0, 0.0, 1.0)):
        count = int(rng.integers(1, 3))
        fields["fractures"] = tuple(
            Fracture(
                level,
                kind=get_args(FractureKind)[int(rng.integers(0, 3))],
                height_loss=float(rng.uniform(0.15, 0.55)),
                densification=float(rng.uniform(0.0, 0.35)),
            )
            for level in sorted(str(name) for name in rng.choice(names, count, replace=False))
        )
    if chance[6] < 0.03:
        start = int(rng.integers(2, 4))
        fields["metal_levels"] = ("L2", "L3", "L4", "L5")[start - 1 : start + 1]
    elif chance[6] < 0.05:
        fields["cement_levels"] = (str(rng.choice(["T12", "L1", "L2"])),)
    if chance[7] < 0.04:
        fields["hip_prosthesis"] = str(rng.choice(["left", "right", "both"]))
    if chance[8] < 0.10:
        fields["bone_islands"] = (str(rng.choice(names)),)
    return fields


def draw_scanner(rng: np.random.Generator, base: Scanner | None = None, **fixed: Any) -> Scanner:
    """A random technique of the kind abdominal CT is made with.

    Args:
        rng: draws everything, the noise seed included.
        base: keeps its geometry (spacing, thickness, matrix); None draws that too.
        fixed: fields of `Scanner` that are set rather than drawn.
    """
    phases: tuple[Phase, ...] = get_args(Phase)
    kernels: tuple[Kernel, ...] = ("soft", "standard")
    drawn: dict[str, Any] = {
        "kvp": float(rng.choice([80.0, 100.0, 120.0, 140.0], p=[0.05, 0.25, 0.6, 0.1])),
        "kernel": kernels[int(rng.uniform() < 0.35)],
        "noise_hu": float(rng.uniform(8.0, 32.0)),
        "phase": phases[int(rng.choice(4, p=[0.4, 0.12, 0.4, 0.08]))],
        "table": str(rng.choice(["curved", "flat", "none"], p=[0.6, 0.3, 0.1])),
        "padding_hu": [None, -1024.0, -2000.0, -3024.0][int(rng.integers(0, 4))],
        "seed": int(rng.integers(0, 2**31)),
    }
    if base is None:
        thickness = float(rng.choice([1.0, 1.25, 2.0, 2.5, 3.0, 5.0]))
        drawn |= {
            "slice_thickness_mm": thickness,
            "slice_spacing_mm": float(thickness * rng.choice([0.6, 0.8, 1.0])),
            "pixel_spacing_mm": float(rng.uniform(0.66, 0.98)),
        }
        base = Scanner()
    return replace(base, **(drawn | fixed))
