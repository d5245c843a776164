"""The virtual patient: what is true before anything is scanned."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

Sex = Literal["F", "M"]

FractureKind = Literal["wedge", "biconcave", "crush"]

MIN_LUMBAR, MAX_LUMBAR = 4, 6
MIN_THORACIC, MAX_THORACIC = 11, 13


@dataclass(frozen=True, slots=True)
class Fracture:
    """A vertebral compression.

    Attributes:
        level: name of the vertebra, such as ``"L1"``.
        kind: where height is lost: anterior edge, middle, or all of it (Genant's three shapes).
        height_loss: lost share of the height there, 0 to 0.6.
        densification: relative rise of trabecular attenuation by compaction.
    """

    level: str
    kind: FractureKind = "wedge"
    height_loss: float = 0.3
    densification: float = 0.15

    def __post_init__(self) -> None:
        if not 0.0 <= self.height_loss <= 0.6:
            raise ValueError(f"height_loss must lie in 0-0.6, got {self.height_loss}")


@dataclass(frozen=True, slots=True)
class Constitution:
    """How one patient departs from what the tables and palettes of this package draw; neutral by default.

    Nothing that draws training material sets it, so a benchmark can go where no training went.

    Attributes:
        body_height, body_depth: factors on the height and depth of vertebral bodies.
        disc_height: factor on the height of discs.
        disc_hu, muscle_hu, fat_hu: added to discs, muscles and all fat.
        cortex: factor on the thickness of the bodies' shell and endplates.
        texture_length: factor on the correlation lengths of trabecular texture.
        texture_spread: factor on its standard deviation.
    """

    body_height: float = 1.0
    body_depth: float = 1.0
    disc_height: float = 1.0
    disc_hu: float = 0.0
    muscle_hu: float = 0.0
    fat_hu: float = 0.0
    cortex: float = 1.0
    texture_length: float = 1.0
    texture_spread: float = 1.0

    def __post_init__(self) -> None:
        for name in ("body_height", "body_depth", "disc_height", "cortex", "texture_length", "texture_spread"):
            if not 0.1 <= getattr(self, name) <= 5.0:
                raise ValueError(f"{name} must lie in 0.1-5, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class VirtualPatient:
    """One adult, from whom any number of scans can be drawn.

    Attributes:
        seed: everything random about the body (organ shapes, trabecular texture) follows from it.
        age_years: 18-100; drives texture coarseness, disc height, calcification, muscle fat.
        sex: DICOM PatientSex ``F`` or ``M``; drives size and shape.
        density_mg_cm3: mean trabecular volumetric density of L1-L3 (hydroxyapatite equivalent).
        stature_cm: None draws the sex's mean (162 F, 176 M).
        bmi_kg_m2: drives fat thickness and the torso's girth.
        sacral_slope_deg: angle of the superior S1 endplate with the horizontal.
        lordosis_deg: L1-S1 lordosis (Cobb).
        kyphosis_deg: T1-T12 kyphosis.
        scoliosis_deg: Cobb angle of a lumbar curve; positive is convex to the left.
        scoliosis_apex: level at the apex.
        lumbar_count: 5; 4 or 6 are the transitional variants, the levels being L1-L4 or L1-L6.
        thoracic_count: 12; 11 or 13 pairs of ribs are the variants.
        sacralised: 0-1, how far the transverse processes of the last lumbar vertebra widen into wings that meet the
            sacral ala (Castellvi-like).
        lumbar_rib_mm: length of a rudimentary rib on L1 (0 is none).
        last_rib: length of the last pair of ribs relative to the usual one; 0 leaves it out. The vertebra keeps its
            name, which counts from the skull: with five lumbar vertebrae below it, T12 then looks like a sixth.
        fractures: compressed vertebrae.
        osteophytes: 0-1, size of marginal osteophytes.
        disc_degeneration: 0-1; None follows age.
        metal_levels: levels with pedicle screws and connecting rods.
        cement_levels: levels with a cement plug (vertebroplasty).
        hip_prosthesis: ``""``, ``"left"``, ``"right"`` or ``"both"``.
        bone_islands: levels with a dense focus in the trabecular region.
        constitution: departures of shape, texture and tissue from the tables.
    """

    seed: int
    age_years: int = 60
    sex: Sex = "F"
    density_mg_cm3: float = 110.0
    stature_cm: float | None = None
    bmi_kg_m2: float = 26.0
    sacral_slope_deg: float = 38.0
    lordosis_deg: float = 48.0
    kyphosis_deg: float = 40.0
    scoliosis_deg: float = 0.0
    scoliosis_apex: str = "L2"
    lumbar_count: int = 5
    thoracic_count: int = 12
    sacralised: float = 0.0
    lumbar_rib_mm: float = 0.0
    last_rib: float = 1.0
    fractures: tuple[Fracture, ...] = ()
    osteophytes: float = 0.2
    disc_degeneration: float | None = None
    metal_levels: tuple[str, ...] = ()
    cement_levels: tuple[str, ...] = ()
    hip_prosthesis: Literal["", "left", "right", "both"] = ""
    bone_islands: tuple[str, ...] = ()
    constitution: Constitution = Constitution()

    def __post_init__(self) -> None:
        if not 18 <= self.age_years <= 100:
            raise ValueError(f"age_years must lie in 18-100, got {self.age_years}")
        if not 0.0 <= self.density_mg_cm3 <= 400.0:
            raise ValueError(f"density_mg_cm3 must lie in 0-400, got {self.density_mg_cm3}")
        if not MIN_LUMBAR <= self.lumbar_count <= MAX_LUMBAR:
            raise ValueError(f"lumbar_count must lie in {MIN_LUMBAR}-{MAX_LUMBAR}, got {self.lumbar_count}")
        if not MIN_THORACIC <= self.thoracic_count <= MAX_THORACIC:
            raise ValueError(f"thoracic_count must lie in {MIN_THORACIC}-{MAX_THORACIC}, got {self.thoracic_count}")
        if not 0.0 <= self.last_rib <= 1.5:
            raise ValueError(f"last_rib must lie in 0-1.5, got {self.last_rib}")

    def rng(self, *names: str | int) -> np.random.Generator:
        """A generator of its own for each named part, so that the order of drawing never matters."""
        words = [zlib.crc32(str(name).encode()) for name in names]
        return np.random.default_rng([self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF, *words])

    @property
    def size(self) -> float:
        """Linear size of the skeleton relative to the tables of `spine` (a man of 176 cm).

        Stature scales bones by its square root beyond the sex's own factor: tall people owe more of their height to
        their legs than to their trunk.
        """
        mean_cm = 162.0 if self.sex == "F" else 176.0
        own_cm = mean_cm if self.stature_cm is None else self.stature_cm
        return float((0.93 if self.sex == "F" else 1.0) * np.sqrt(own_cm / mean_cm))

    @property
    def degeneration(self) -> float:
        """Disc degeneration 0-1 (given, or rising from 30 to 90 years)."""
        if self.disc_degeneration is not None:
            return self.disc_degeneration
        return float(np.clip((self.age_years - 30) / 75.0, 0.0, 0.8))

    @property
    def ageing(self) -> float:
        """0 at 25 years, 1 at 90."""
        return float(np.clip((self.age_years - 25) / 65.0, 0.0, 1.0))
