"""Virtual patients outside what the spine localizer's training drew, and the ranges of both.

`train.virtual` made the virtual patients that training saw; random warps and scans of single patches
(`train.warp.sample_points`, `train.synthesis.scan`) widened size, blur, noise and slice thickness beyond what is
listed here, so those are not claimed to be held out. What is claimed is tested (tests/unit/test_phantom_heldout.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from osteo_daemon.phantom.calibration import SLOPE_120_HU_PER_MG_CM3, Palette
from osteo_daemon.phantom.patient import Constitution, Fracture, FractureKind, Sex, VirtualPatient
from osteo_daemon.phantom.scanner import Kernel, Phase, Scanner, coarse_scanner
from osteo_daemon.phantom.texture import texture_of

FIRST_SEED: Final = 5_000_000
"""Training draws its virtual patients from other seeds (train/virtual.py)."""
TRAINED_PATIENTS: Final = 83
"""Seeds 0 to 82 of `train.virtual` are what the shipped weights saw."""
CORTEX_MM: Final = 0.42
"""Thickness of the bodies' shell in `osteo_daemon.phantom.vertebra` at a density of 130 mg/cm3."""

Span = tuple[float, float]

FAT_OFFSET_HU: Final[Span] = (-6.0, 16.0)
MOTION_MM: Final[Span] = (0.0, 1.3)
"""Wide enough that the fat and the skin's edge of real scans lie within (benchmarks/reality.py)."""


@dataclass(frozen=True, slots=True)
class Range:
    """One quantity in training and here.

    Attributes:
        training: lowest and highest value of training's virtual patients, rounded outwards.
        outside: the intervals beyond that this benchmark draws from.
        share: 1 when every patient lies outside; else some do and the rest lies within training's range.
    """

    training: Span
    outside: tuple[Span, ...]
    share: float = 1.0


RANGES: Final[dict[str, Range]] = {
    "body_height_factor": Range((1.0, 1.0), ((0.84, 0.92), (1.08, 1.16))),
    "body_depth_factor": Range((1.0, 1.0), ((0.86, 0.94), (1.06, 1.14))),
    "disc_height_factor": Range((1.0, 1.0), ((0.65, 0.85), (1.15, 1.35))),
    "kyphosis_deg": Range((40.0, 40.0), ((15.0, 35.0), (45.0, 70.0))),
    "texture_length_mm": Range((0.54, 0.87), ((0.25, 0.45), (1.0, 1.7))),
    "texture_spread": Range((0.29, 0.55), ((0.12, 0.25), (0.60, 0.85))),
    "cortex_mm": Range((0.23, 0.53), ((0.12, 0.20), (0.58, 1.10))),
    "disc_hu": Range((50.0, 115.0), ((25.0, 45.0), (118.0, 140.0))),
    "muscle_hu": Range((33.0, 75.0), ((8.0, 30.0),), 0.5),
    "scoliosis_deg": Range((0.0, 22.0), ((24.0, 40.0),), 0.25),
    "lordosis_deg": Range((30.0, 62.0), ((18.0, 29.0), (63.0, 75.0)), 0.4),
    "bmi_kg_m2": Range((20.0, 36.0), ((17.0, 19.5), (36.5, 45.0)), 0.3),
    "age_years": Range((35.0, 87.0), ((30.0, 34.0), (88.0, 95.0)), 0.2),
    "density_mg_cm3": Range((20.0, 220.0), ((0.0, 18.0),), 0.1),
}
"""By quantity, as `quantities` gives it: anatomy, then texture and tissue, then who the patient is."""

_ALWAYS: Final = ("body_height_factor", "body_depth_factor", "disc_height_factor", "disc_hu", "cortex_mm")

ANATOMIES: Final[dict[str, dict[str, float | int]]] = {
    "4 lumbar": {"lumbar_count": 4},
    "6 lumbar": {"lumbar_count": 6},
    "no last rib": {"last_rib": 0.0},
    "short last rib": {"last_rib": 0.3},
    "lumbar rib": {"lumbar_rib_mm": 40.0},
}
"""Numbering variants; the usual patients have 12 pairs of ribs and 5 lumbar vertebrae."""

COVERAGES: Final[dict[str, tuple[str, str]]] = {
    "from T10": ("T10", "pelvis"),
    "from T12": ("T12", "pelvis"),
    "from L1": ("L1", "pelvis"),
    "from L3": ("L3", "pelvis"),
    "down to L5": ("T10", "L5"),
    "down to L4": ("T10", "L4"),
}
"""Uppermost level in view and the lower limit, as `render_study` takes them."""
WITHOUT_SACRUM: Final = frozenset({"down to L5", "down to L4"})


@dataclass(frozen=True, slots=True)
class Draw:
    """One virtual patient, a scanner and how much of the body is scanned."""

    seed: int
    patient: VirtualPatient
    scanner: Scanner
    coverage: str
    anatomy: str


def quantities(patient: VirtualPatient, scanner: Scanner) -> dict[str, float]:
    """Every quantity of `RANGES` for one patient on one scanner."""
    own = patient.constitution
    palette = Palette.of(patient, scanner)
    texture = texture_of(patient.density_mg_cm3, patient.ageing, own.texture_length, own.texture_spread)
    return {
        "body_height_factor": own.body_height,
        "body_depth_factor": own.body_depth,
        "disc_height_factor": own.disc_height,
        "kyphosis_deg": patient.kyphosis_deg,
        "texture_length_mm": texture.fine_mm,
        "texture_spread": texture.spread,
        "cortex_mm": _cortex_mm(patient.density_mg_cm3) * own.cortex,
        "disc_hu": palette.disc,
        "muscle_hu": palette.muscle,
        "scoliosis_deg": abs(patient.scoliosis_deg),
        "lordosis_deg": patient.lordosis_deg,
        "bmi_kg_m2": patient.bmi_kg_m2,
        "age_years": float(patient.age_years),
        "density_mg_cm3": patient.density_mg_cm3,
    }


def outside(name: str, value: float) -> bool:
    """Whether a value of a quantity lies outside training's range."""
    low, high = RANGES[name].training
    return not low <= value <= high


def _cortex_mm(density_mg_cm3: float) -> float:
    return CORTEX_MM * float(np.clip(0.55 + 0.45 * density_mg_cm3 / 130.0, 0.55, 1.25))


def draw(seed: int, anatomy: str = "usual") -> Draw:
    """A patient and a scanner; ``seed`` counts from 0, ``anatomy`` is "usual" or one of `ANATOMIES`."""
    rng = np.random.default_rng([FIRST_SEED, seed, sorted(ANATOMIES).index(anatomy) + 1 if anatomy in ANATOMIES else 0])

    def beyond(name: str, side: int | None = None) -> float:
        spans = RANGES[name].outside
        return float(rng.uniform(*spans[int(rng.integers(len(spans))) if side is None else side]))

    def some(name: str, within: Span) -> float:
        return beyond(name) if rng.uniform() < RANGES[name].share else float(rng.uniform(*within))

    sex: Sex = "F" if rng.uniform() < 0.55 else "M"
    # a third is very osteoporotic: below 60 HU at 120 kVp
    fragile = rng.uniform() < 0.33
    density = some("density_mg_cm3", (20.0, 60.0 / SLOPE_120_HU_PER_MG_CM3) if fragile else (48.0, 180.0))
    lordosis = some("lordosis_deg", (32.0, 60.0))
    curved = rng.uniform()
    scoliosis = beyond("scoliosis_deg") if curved < 0.25 else float(rng.uniform(8.0, 20.0)) if curved < 0.5 else 0.0
    patient = VirtualPatient(
        seed=FIRST_SEED + seed,
        age_years=round(some("age_years", (36.0, 86.0))),
        sex=sex,
        density_mg_cm3=density,
        stature_cm=float(np.clip(rng.normal(162.0 if sex == "F" else 176.0, 9.0), 142.0, 200.0)),
        bmi_kg_m2=some("bmi_kg_m2", (20.0, 36.0)),
        lordosis_deg=lordosis,
        # lordosis follows the sacral slope
        sacral_slope_deg=float(np.clip((lordosis - 15.0) / 0.85 + rng.normal(0.0, 4.0), 15.0, 60.0)),
        kyphosis_deg=beyond("kyphosis_deg"),
        scoliosis_deg=scoliosis * float(rng.choice([-1.0, 1.0])),
        scoliosis_apex=str(rng.choice(["T12", "L1", "L3"])),
        osteophytes=float(rng.uniform(0.0, 1.0)),
        fractures=_fractures(rng, density),
        **ANATOMIES.get(anatomy, {}),  # type: ignore[arg-type]
    )
    scanner = _scanner(rng, seed)
    coverages = list(COVERAGES)
    coverage = str(rng.choice(coverages, p=[0.40, 0.15, 0.15, 0.10, 0.10, 0.10])) if anatomy == "usual" else "from T10"
    long = int(rng.integers(2))
    targets = {name: beyond(name) for name in _ALWAYS}
    # coarse and strong at once would be a spread that no scan shows: long texture is faint, short texture is strong
    targets |= {
        "texture_length_mm": beyond("texture_length_mm", long),
        "texture_spread": beyond("texture_spread", 1 - long),
    }
    targets["fat_offset_hu"] = float(rng.uniform(*FAT_OFFSET_HU))
    if rng.uniform() < RANGES["muscle_hu"].share:
        targets["muscle_hu"] = beyond("muscle_hu")
    return Draw(seed, _with_constitution(patient, scanner, targets), scanner, coverage, anatomy)


def _fractures(rng: np.random.Generator, density_mg_cm3: float) -> tuple[Fracture, ...]:
    """One or two compressed vertebrae in a third of the fragile patients."""
    if density_mg_cm3 > 100.0 or rng.uniform() > 0.33:
        return ()
    kinds: tuple[FractureKind, ...] = ("wedge", "biconcave", "crush")
    levels = sorted(str(level) for level in rng.choice(["T12", "L1", "L2", "L3", "L4"], int(rng.integers(1, 3)), False))
    return tuple(
        Fracture(level, kinds[int(rng.integers(3))], float(rng.uniform(0.2, 0.5)), float(rng.uniform(0.0, 0.3)))
        for level in levels
    )


def _scanner(rng: np.random.Generator, seed: int) -> Scanner:
    """A coarse scan. Training varied voltage and phase alike, noise and thickness patch by patch."""
    kernels: tuple[Kernel, ...] = ("soft", "standard")
    phases: tuple[Phase, ...] = ("native", "arterial", "portal", "delayed")
    thickness, spacing = ((3.0, 3.0), (5.0, 3.0), (5.0, 5.0))[int(rng.choice(3, p=[0.55, 0.2, 0.25]))]
    return coarse_scanner(
        3.0,
        kvp=float(rng.choice([80.0, 100.0, 120.0, 140.0], p=[0.1, 0.25, 0.45, 0.2])),
        kernel=kernels[int(rng.uniform() < 0.4)],
        phase=phases[int(rng.choice(4, p=[0.5, 0.15, 0.25, 0.1]))],
        noise_hu=float(rng.uniform(6.0, 40.0)),
        noise_grain=float(rng.uniform(0.8, 2.2)),
        slice_thickness_mm=thickness,
        slice_spacing_mm=spacing,
        table=str(rng.choice(["curved", "flat", "none"])),
        motion_mm=float(rng.uniform(*MOTION_MM)),
        seed=seed,
    )


def _with_constitution(patient: VirtualPatient, scanner: Scanner, targets: dict[str, float]) -> VirtualPatient:
    """Factors and offsets that bring quantities of `RANGES` to the given values."""
    usual = quantities(patient, scanner)
    factors = {name: targets[name] / usual[name] for name in ("cortex_mm", "texture_length_mm", "texture_spread")}
    constitution = Constitution(
        body_height=targets["body_height_factor"],
        body_depth=targets["body_depth_factor"],
        disc_height=targets["disc_height_factor"],
        disc_hu=targets["disc_hu"] - usual["disc_hu"],
        muscle_hu=targets.get("muscle_hu", usual["muscle_hu"]) - usual["muscle_hu"],
        cortex=factors["cortex_mm"],
        texture_length=factors["texture_length_mm"],
        texture_spread=factors["texture_spread"],
        fat_hu=targets["fat_offset_hu"],
    )
    return replace(patient, constitution=constitution)
