"""Can this scan's numbers be trusted: calibration against air, fat and muscle, contrast, noise, metal, tube voltage.

Everything is measured in the image; the header is asked only for the tube voltage, which no image shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import Attenuation, CorrectedAttenuation, QualityFlag, Severity
from osteo_daemon.domain.references import CONTRAST_OFFSET_HU, KVP_TO_120
from osteo_daemon.errors import NotEligible
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.contrast import Enhancement, Phase, measure_enhancement
from osteo_daemon.inference.paravertebral import muscle_hu
from osteo_daemon.inference.surroundings import Surroundings, survey
from osteo_daemon.inference.vertebra import Vertebra

AIR_HU = (-1030.0, -950.0)
"""Air around the patient reads -1000 HU by definition (PS3.3 C.11.1.1.2); scatter moves it a little."""

FAT_HU = (-130.0, -70.0)
"""Adipose tissue: -123 to -89 HU is the 95% interval of 4,000 samples (PMID 37296765); single voxels of pure
subcutaneous fat reach -140 and -70 HU (Kim, PMC4043057). Wider than the first for tube voltage and thin patients."""

MUSCLE_HU = (0.0, 100.0)
"""Lumbar muscle: psoas 42 +/- 8, paravertebral 35 +/- 11 HU in 150 portal venous scans (Rollins, Nottingham 2017), so
zero lies three standard deviations below; lean subjects 49 HU (Goodpaster, J Appl Physiol 2000;89:104), up to a quarter
more with contrast agent."""

HIGH_NOISE_HU = 60.0
"""Noise above which a 5 ml trabecular mean is no longer better than a few HU."""

METAL_HU = 2500.0
"""Above every tissue: cortical bone stays below 2000 HU, 12-bit CT ends at 3071 HU, where metal lies."""

METAL_MM3 = 500.0
TRUNCATED_SHARE = 0.2
"""A field of view counts as truncated when it cuts the patient off in this share of the slices."""

KVP_TOLERANCE = 5.0


@dataclass(frozen=True, slots=True)
class ScanQuality:
    """Measured scan quality; a value is None where the image holds nothing to measure it on.

    Attributes:
        surroundings: air, fat, and where the field of view cuts the patient off.
        muscle_hu: attenuation of psoas and erector spinae.
        enhancement: great vessels, kidneys and contrast phase.
        noise_hu: robust standard deviation of the voxel noise in fat and soft tissue.
        metal_mm3: volume as dense as metal.
    """

    surroundings: Surroundings
    muscle_hu: float | None
    enhancement: Enhancement
    noise_hu: float | None
    metal_mm3: float
    quality_flags: tuple[QualityFlag, ...]

    def to_json(self) -> dict[str, float | str | None]:
        """The measured values under the names of the manifest."""
        around, vessels = self.surroundings, self.enhancement
        measured = {
            "air_hu": around.air_hu,
            "fat_hu": around.fat_hu,
            "muscle_hu": self.muscle_hu,
            "aorta_hu": vessels.aorta_hu,
            "vena_cava_hu": vessels.vena_cava_hu,
            "kidney_hu": vessels.kidney_hu,
            "noise_hu": self.noise_hu,
            "metal_mm3": self.metal_mm3,
            "truncated_share": around.truncated_share,
        }
        rounded = {name: None if value is None else round(value, 2) for name, value in measured.items()}
        return {**rounded, "contrast_phase": vessels.phase.value}


def check_scale(surroundings: Surroundings) -> None:
    """Refuse a scan whose HU scale is wrong, before anything is looked for in it.

    Raises:
        NotEligible: ``calibration_out_of_range`` when air or fat is out of its range.
    """
    for name, value, (low, high) in (("air", surroundings.air_hu, AIR_HU), ("fat", surroundings.fat_hu, FAT_HU)):
        if value is not None and not low <= value <= high:
            raise NotEligible(
                ExclusionCode.CALIBRATION_OUT_OF_RANGE,
                f"{name} reads {value:.0f} HU, {low:.0f} to {high:.0f} is expected: the HU scale is off",
            )


def assess(volume: CtVolume, vertebrae: Sequence[Vertebra], surroundings: Surroundings | None = None) -> ScanQuality:
    """Measure a scan's quality around the vertebrae that were found.

    Args:
        volume: the scan.
        vertebrae: as the localizer names them.
        surroundings: from `survey` when that was made already.
    """
    around = survey(volume) if surroundings is None else surroundings
    muscle = muscle_hu(volume, vertebrae, around.fat_hu)
    enhancement = measure_enhancement(volume, vertebrae)
    noise, metal = _noise(volume.voxels), _metal_mm3(volume)
    flags: list[QualityFlag] = []
    references = ((around.air_hu, AIR_HU), (around.fat_hu, FAT_HU), (muscle, MUSCLE_HU))
    if any(value is not None and not low <= value <= high for value, (low, high) in references):
        flags.append(QualityFlag("calibration_out_of_range", Severity.BLOCKING))
    elif any(value is None for value, _ in references):
        flags.append(QualityFlag("calibration_unchecked", Severity.CAUTION))
    if enhancement.enhanced:
        flags.append(QualityFlag("contrast_enhanced", Severity.CAUTION))
        if enhancement.phase.value not in CONTRAST_OFFSET_HU:
            flags.append(QualityFlag("contrast_uncorrected", Severity.CAUTION))
    if noise is not None and noise > HIGH_NOISE_HU:
        flags.append(QualityFlag("high_noise", Severity.CAUTION))
    if around.truncated_share >= TRUNCATED_SHARE:
        flags.append(QualityFlag("field_of_view_truncated", Severity.CAUTION))
    if metal > METAL_MM3:
        flags.append(QualityFlag("metal_in_view", Severity.INFO))
    return ScanQuality(around, muscle, enhancement, noise, metal, tuple(flags))


def _metal_mm3(volume: CtVolume) -> float:
    dense = sum(int(np.count_nonzero(plane[::2, ::2] > METAL_HU)) for plane in volume.voxels)
    return 4.0 * dense * volume.voxel_volume_mm3


def _noise(voxels: npt.NDArray[np.floating]) -> float | None:
    middle = voxels[voxels.shape[0] // 4 : -(voxels.shape[0] // 4) or None : 4]
    # second differences cancel gradients; their variance is 6 times the noise's when neighbours are independent
    second = middle[:, :, :-4:2] - 2 * middle[:, :, 2:-2:2] + middle[:, :, 4::2]
    tissue = (np.abs(middle[:, :, 2:-2:2] + 30.0) < 130.0) & (np.abs(second) < 400.0)
    if np.count_nonzero(tissue) < 10_000:
        return None
    return float(1.4826 * np.median(np.abs(second[tissue])) / 6**0.5)


def tube_voltage(header: Dataset) -> float | None:
    """KVP (0018,0060) in kV, or None when absent or not a number."""
    try:
        value = float(header.KVP)
    except (AttributeError, TypeError, ValueError):
        return None
    return value if value > 0 else None


def correct(
    attenuation: Attenuation, kvp: float | None, phase: Phase = Phase.UNENHANCED
) -> tuple[CorrectedAttenuation | None, tuple[QualityFlag, ...]]:
    """Attenuation as it would read at 120 kVp without contrast agent, and what to say about it.

    The tube voltage's factor comes first, then the contrast agent's offset, which was published for 120 kVp.

    Returns:
        None when nothing was corrected. The flags are ``kvp_unknown`` or ``kvp_uncorrected`` (both caution) where no
        published factor applies.
    """
    flags: tuple[QualityFlag, ...] = ()
    factors: dict[str, float] = {}
    if kvp is None:
        flags = (QualityFlag("kvp_unknown", Severity.CAUTION),)
    else:
        nearest = min(KVP_TO_120, key=lambda known: abs(known - kvp))
        if abs(nearest - kvp) > KVP_TOLERANCE:
            flags = (QualityFlag("kvp_uncorrected", Severity.CAUTION),)
        elif KVP_TO_120[nearest] != 1.0:
            factors[f"kvp_{nearest}_to_120"] = KVP_TO_120[nearest]
    if phase.value in CONTRAST_OFFSET_HU:
        factors[f"contrast_{phase.value}_hu"] = CONTRAST_OFFSET_HU[phase.value]
    if not factors:
        return None, flags
    corrected = CorrectedAttenuation(attenuation.mean, factors)
    return CorrectedAttenuation(round(corrected.apply(attenuation.mean), 1), factors), flags
