"""Where and on whom the virtual cohort was scanned: hospitals, their scanners and machines, and how bodies differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from osteo_daemon.phantom.patient import Constitution
from osteo_daemon.phantom.scanner import Kernel, Phase
from train.truth import Maker


@dataclass(frozen=True, slots=True)
class Site:
    """A hospital: its scanners and its densitometer.

    Attributes:
        name: of the site.
        maker: of its densitometer; None is the external hospital's, seen by no training patient.
        kvp, kernels, phases: drawn from with equal chance; repeat an entry to weight it.
        thickness_mm, pixel_mm, noise_hu: ranges drawn from evenly.
        hu_offset: of its scanner's calibration.
    """

    name: str
    maker: Maker | None
    kvp: tuple[float, ...]
    kernels: tuple[Kernel, ...]
    phases: tuple[Phase, ...]
    thickness_mm: tuple[float, float]
    pixel_mm: tuple[float, float]
    noise_hu: tuple[float, float]
    hu_offset: float


SITES: Final = (
    Site(
        name="north",
        maker="Hologic",
        kvp=(120.0,),
        kernels=("soft",),
        phases=("native", "native", "portal"),
        thickness_mm=(2.0, 3.0),
        pixel_mm=(0.7, 0.95),
        noise_hu=(9.0, 18.0),
        hu_offset=0.0,
    ),
    Site(
        name="middle",
        maker="Lunar",
        kvp=(100.0, 120.0),
        kernels=("standard",),
        phases=("native", "portal"),
        thickness_mm=(1.0, 2.5),
        pixel_mm=(0.6, 0.9),
        noise_hu=(12.0, 24.0),
        hu_offset=2.0,
    ),
    Site(
        name="south",
        maker="Norland",
        kvp=(120.0, 140.0),
        kernels=("soft",),
        phases=("native", "native", "native", "arterial"),
        thickness_mm=(3.75, 5.0),
        pixel_mm=(0.8, 1.0),
        noise_hu=(10.0, 26.0),
        hu_offset=-2.0,
    ),
    Site(
        name="outside",
        maker=None,
        kvp=(110.0, 130.0),
        kernels=("soft", "standard"),
        phases=("native", "portal", "delayed"),
        thickness_mm=(1.5, 4.0),
        pixel_mm=(0.7, 0.95),
        noise_hu=(10.0, 22.0),
        hu_offset=3.0,
    ),
)
"""Three sites and the external hospital, the last one. Assumptions, not statements about makers."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How patients depart from the phantom's tables, independently of their density and age. All assumptions.

    Attributes:
        body_height, body_depth, disc_height, cortex, texture_length, texture_spread: SD of the factor's logarithm.
        disc_hu, muscle_hu, fat_hu: SD of what is added.
    """

    body_height: float = 0.05
    body_depth: float = 0.05
    disc_height: float = 0.12
    cortex: float = 0.25
    texture_length: float = 0.12
    texture_spread: float = 0.2
    disc_hu: float = 8.0
    muscle_hu: float = 6.0
    fat_hu: float = 8.0

    def draw(self, rng: np.random.Generator) -> Constitution:
        """One patient's departures."""
        factors = ("body_height", "body_depth", "disc_height", "cortex", "texture_length", "texture_spread")
        values = {name: float(np.exp(rng.normal(0.0, getattr(self, name)))) for name in factors}
        values |= {name: float(rng.normal(0.0, getattr(self, name))) for name in ("disc_hu", "muscle_hu", "fat_hu")}
        return Constitution(**values)


def makers_of_sites() -> dict[str, Maker | None]:
    """Maker of each site's machine, None at the external hospital."""
    return {site.name: site.maker for site in SITES}
