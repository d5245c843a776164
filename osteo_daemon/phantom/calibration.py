"""Attenuation of tissues, and density to HU.

Trabecular attenuation follows ``HU = slope(kVp) * (density + contrast)``:

- slope at 120 kVp: 1.25 HU per mg/cm3 (assumption, within the 1.2-1.3 that QCT calibrations report at 120 kVp). It maps
  the ACR's 120 and 80 mg/cm3 to 150 and 100 HU and the age norm of Jang (Radiology 2019), 226 HU below 30 years and
  89 HU from 90 years, to 181 and 71 mg/cm3. The intercept is zero (assumption: marrow fat is part of the density).
- slope at other voltages: the factor that brings a measured value to 120 kVp is 0.951 at 100 kVp and 1.073 at 140 kVp
  (crude population ratios), and 80 kVp reads 23 % higher than 120 kVp. Calcium attenuates more at lower voltage, so the
  slope is divided by that factor. Linear in between, constant outside 80-140 kVp.
- contrast: +17.5 mg/cm3 in the portal venous and +5.7 in the arterial phase (Ruehling 2021). Delayed: 14 mg/cm3
  (assumption).

Soft tissue values are typical ones, checked against two real scans; blood and organs per phase are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Phase, Scanner

SLOPE_120_HU_PER_MG_CM3: Final = 1.25
_KVP: Final = (80.0, 100.0, 120.0, 140.0)
_KVP_RATIO: Final = (1.23, 1.0 / 0.951, 1.0, 1.0 / 1.073)
CONTRAST_MG_CM3: Final[dict[Phase, float]] = {"native": 0.0, "arterial": 5.7, "portal": 17.5, "delayed": 14.0}

# HU by phase: native, arterial, portal, delayed
_PHASE_INDEX: Final[dict[Phase, int]] = {"native": 0, "arterial": 1, "portal": 2, "delayed": 3}
_BY_PHASE: Final[dict[str, tuple[float, float, float, float]]] = {
    "aorta": (42.0, 310.0, 155.0, 110.0),
    "vein": (40.0, 60.0, 145.0, 112.0),
    "kidney_cortex": (32.0, 165.0, 190.0, 150.0),
    "kidney_medulla": (30.0, 65.0, 170.0, 150.0),
    "renal_pelvis": (8.0, 8.0, 12.0, 260.0),
    "liver": (57.0, 68.0, 108.0, 90.0),
    "spleen": (48.0, 120.0, 118.0, 98.0),
    "muscle": (52.0, 56.0, 62.0, 60.0),
    "wall": (38.0, 60.0, 80.0, 66.0),
    "pancreas": (36.0, 95.0, 90.0, 70.0),
    "uterus": (46.0, 70.0, 98.0, 84.0),
}


def kvp_ratio(kvp: float) -> float:
    """Attenuation of bone mineral at ``kvp`` relative to 120 kVp."""
    return float(np.interp(kvp, _KVP, _KVP_RATIO))


def trabecular_hu(density_mg_cm3: float, kvp: float = 120.0, phase: Phase = "native") -> float:
    """Trabecular attenuation in HU of a density in mg/cm3 (formula and sources in the module's head)."""
    return SLOPE_120_HU_PER_MG_CM3 * kvp_ratio(kvp) * (density_mg_cm3 + CONTRAST_MG_CM3[phase])


def density_of_hu(hu: float, kvp: float = 120.0, phase: Phase = "native") -> float:
    """Inverse of `trabecular_hu`: mg/cm3."""
    return hu / (SLOPE_120_HU_PER_MG_CM3 * kvp_ratio(kvp)) - CONTRAST_MG_CM3[phase]


@dataclass(frozen=True, slots=True)
class Palette:
    """Attenuation in HU of each tissue of one patient on one scanner."""

    air: float
    skin: float
    fat: float
    visceral_fat: float
    muscle: float
    liver: float
    spleen: float
    kidney_cortex: float
    kidney_medulla: float
    renal_pelvis: float
    aorta: float
    vein: float
    wall: float
    pancreas: float
    uterus: float
    bowel_content: float
    urine: float
    lung: float
    disc: float
    thecal: float
    cartilage: float
    cortical: float
    cancellous: float
    marrow: float
    plaque: float
    metal: float
    cement: float

    @classmethod
    def of(cls, patient: VirtualPatient, scanner: Scanner) -> Palette:
        """Typical values, spread a little from patient to patient, at the scanner's voltage and phase."""
        rng = patient.rng("palette")
        spread = [float(v) for v in rng.standard_normal(24)]
        index = _PHASE_INDEX[scanner.phase]
        mineral = kvp_ratio(scanner.kvp)
        # fat reads lower at low voltage, by about 0.35 HU per kV around 120
        fat_shift = 0.35 * (float(np.clip(scanner.kvp, 80, 140)) - 120.0) + patient.constitution.fat_hu
        # iodine is taken to follow the voltage as bone mineral does
        gain = (1.0 + 0.12 * float(spread[0])) * mineral
        uptake = {name: values[0] + (values[index] - values[0]) * gain for name, values in _BY_PHASE.items()}
        bone = float(np.clip(0.75 + 0.25 * patient.density_mg_cm3 / 120.0, 0.72, 1.15))
        return cls(
            air=-1000.0,
            skin=12.0 + 4.0 * spread[1],
            fat=-106.0 + 3.0 * spread[2] + fat_shift,
            visceral_fat=-101.0 + 3.0 * spread[3] + fat_shift,
            muscle=uptake["muscle"] - 10.0 * patient.ageing + 3.0 * spread[4] + patient.constitution.muscle_hu,
            liver=uptake["liver"] + 6.0 * spread[5] - 10.0 * max(0.0, (patient.bmi_kg_m2 - 28.0) / 8.0),
            spleen=uptake["spleen"] + 3.0 * spread[6],
            kidney_cortex=uptake["kidney_cortex"] + 3.0 * spread[7],
            kidney_medulla=uptake["kidney_medulla"] + 3.0 * spread[8],
            renal_pelvis=uptake["renal_pelvis"],
            aorta=uptake["aorta"] + 3.0 * spread[9],
            vein=uptake["vein"] + 3.0 * spread[10],
            wall=uptake["wall"],
            pancreas=uptake["pancreas"] - 12.0 * patient.ageing,
            uterus=uptake["uterus"],
            bowel_content=24.0 + 6.0 * spread[11],
            urine=6.0 + 3.0 * spread[12],
            lung=-840.0 + 25.0 * spread[13],
            disc=82.0 + 8.0 * spread[14] + patient.constitution.disc_hu,
            thecal=22.0 + 4.0 * spread[15],
            cartilage=90.0,
            cortical=1150.0 * mineral * bone,
            cancellous=350.0 * mineral * bone,
            marrow=150.0 * mineral * bone,
            plaque=620.0 * mineral,
            metal=3071.0,
            cement=1600.0 * mineral,
        )
