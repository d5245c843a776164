"""Find and name the vertebrae of a CT.

The network labels voxels; names come from counting bodies upwards from S1, never from the network. Without S1 in view
nothing is named.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import QualityFlag, Severity
from osteo_daemon.errors import BundleError, NotEligible
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.body import describe_body
from osteo_daemon.inference.bundle import ModelBundle
from osteo_daemon.inference.canonical import CanonicalVolume, resample_canonical
from osteo_daemon.inference.column import Column, count_column, find_s1
from osteo_daemon.inference.morphometry import compression_flags
from osteo_daemon.inference.tiling import PatchRunner, SpineMaps, column_starts, survey_starts
from osteo_daemon.inference.vertebra import Localization, Vertebra
from osteo_daemon.network.localizer import LocalizerConfig, SpineClass, SpineLocalizerNet

__all__ = ["Localization", "SpineLocalizer", "Vertebra"]

LEVELS_FROM_SACRUM = ("L5", "L4", "L3", "L2", "L1", "T12", "T11", "T10")
_NEARLY_WHOLE = 0.85  # height over that of the vertebra below: a body that only touches the edge of the scan
_N_MEASURED = 6  # L5 to T12, the levels that are reported
_VERTEBRA_MM3 = 8000.0  # one small vertebral body: less than this of body voxels is no spine
_SMALLEST_EXTENT_MM = 90.0  # along the patient: less cannot hold S1 and two lumbar vertebrae
_FAIR_AGREEMENT = 0.55  # `Column.agreement`, mean of T12-L5
_POOR_AGREEMENT = 0.40  # of any one vertebra
_UNEVEN_GAP = 0.30  # logarithm of a gap over the mean of its neighbours
_SCOLIOSIS_DEGREES = 10.0  # Cobb angle that defines scoliosis


@dataclass(frozen=True, slots=True)
class _Count:
    """How many vertebrae, counted from L5, have a certain name; and remarks."""

    certain: int
    flags: tuple[QualityFlag, ...]


class SpineLocalizer:
    """A network with its decoding; made once, used for every study."""

    def __init__(self, net: SpineLocalizerNet, device: torch.device) -> None:
        self._net = net.to(device).eval().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self._device = device
        # bfloat16 pays only where the processor multiplies it in hardware; elsewhere it is emulated and slower
        self._reduced = device.type == "cuda" or _has_bf16()

    @classmethod
    def from_bundle(cls, bundle: ModelBundle, device: str | torch.device = "cpu") -> SpineLocalizer:
        """Build the network that the bundle describes and load its weights.

        Raises:
            BundleError: the bundle is not a spine localizer or its weights do not fit its configuration.
        """
        if bundle.network.get("architecture") != "spine-localizer":
            raise BundleError(f"{bundle.name} is not a spine localizer")
        try:
            net = SpineLocalizerNet(LocalizerConfig.from_dict(bundle.network))
            net.load_state_dict(bundle.load_weights())
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BundleError(f"{bundle.name}: {error}") from error
        return cls(net, torch.device(device))

    def __call__(self, volume: CtVolume) -> Localization:
        """Find T10 to S1 in a CT of any orientation and spacing.

        Raises:
            NotEligible: ``no_lumbar_vertebra`` or ``insufficient_coverage``.
        """
        began = time.perf_counter()
        canonical = self.canonical(volume)
        read = time.perf_counter()
        maps = self.label(canonical)
        labelled = time.perf_counter()
        found = decode(maps, canonical)
        durations = {
            "resample": read - began,
            "network": labelled - read,
            "decode": time.perf_counter() - labelled,
        }
        return replace(found, durations_s=durations)

    def canonical(self, volume: CtVolume) -> CanonicalVolume:
        """The volume on the network's grid.

        Raises:
            NotEligible: ``insufficient_coverage``, too short along the patient for a lumbar spine.
        """
        spacing = self._net.config.spacing_mm
        canonical = resample_canonical(volume, spacing, self._device)
        if canonical.hu.shape[0] * spacing < _SMALLEST_EXTENT_MM:
            extent = canonical.hu.shape[0] * spacing
            raise NotEligible(
                ExclusionCode.INSUFFICIENT_COVERAGE,
                f"{extent:.0f} mm along the patient hold no lumbar spine with sacrum",
            )
        return canonical

    def label(self, canonical: CanonicalVolume) -> SpineMaps:
        """Network output over the patient: a survey, then patches centred on the column."""
        patch = self._net.config.patch_voxels
        runner = PatchRunner(self._net, canonical.hu, self._device, self._reduced)
        runner.run(survey_starts(canonical.hu.shape, patch))
        starts = column_starts(runner.maps(), patch)
        runner.run(starts, mirrored=True)
        return runner.maps()


def decode(maps: SpineMaps, canonical: CanonicalVolume) -> Localization:
    """Count and name the vertebrae in the network's output.

    Raises:
        NotEligible: ``no_lumbar_vertebra`` without a column, ``insufficient_coverage`` without S1 or with fewer than
            two lumbar vertebrae above it.
    """
    spacing = canonical.spacing_mm
    bone = np.count_nonzero(maps.probabilities[SpineClass.BODY] > 0.5) * spacing**3
    s1 = find_s1(maps, spacing)
    if s1 is None:
        if bone < _VERTEBRA_MM3:
            raise NotEligible(ExclusionCode.NO_LUMBAR_VERTEBRA, "no vertebral bodies in view")
        raise NotEligible(
            ExclusionCode.INSUFFICIENT_COVERAGE, "the sacrum is not in view, so the vertebrae cannot be named"
        )
    column = count_column(maps, s1, spacing)
    if column is None:
        raise NotEligible(ExclusionCode.INSUFFICIENT_COVERAGE, "no lumbar vertebrae above the sacrum in view")
    count = _judge(column)
    vertebrae = _vertebrae(maps, canonical, column, s1, count.certain)
    lumbar = [v for v in vertebrae if v.level.startswith("L")]
    if len(lumbar) < 2:
        raise NotEligible(
            ExclusionCode.INSUFFICIENT_COVERAGE, "fewer than two lumbar vertebrae above the sacrum in view"
        )
    flags = list(count.flags)
    if coronal_angle(vertebrae) > _SCOLIOSIS_DEGREES:
        flags.append(QualityFlag("scoliosis", Severity.CAUTION))
    return Localization(vertebrae=tuple(vertebrae[::-1]), flags=tuple(flags), anchor="s1")


def _judge(column: Column) -> _Count:
    """Up to where is the count to be trusted?

    Counting runs upwards, so doubt at one vertebra is doubt about it and every one above it, not below.
    """
    gaps, agreement = column.gaps_mm[: len(LEVELS_FROM_SACRUM)], column.agreement[: len(LEVELS_FROM_SACRUM)]
    certain = len(gaps)
    for k in range(len(gaps)):
        neighbours = [gaps[j] for j in (k - 1, k + 1) if 0 <= j < len(gaps)]
        uneven = bool(neighbours) and abs(float(np.log(gaps[k] / np.mean(neighbours)))) > _UNEVEN_GAP
        if uneven or agreement[k] < _POOR_AGREEMENT:
            certain = k
            break
    if agreement[:_N_MEASURED].mean() < _FAIR_AGREEMENT:
        certain = 0
    if certain >= min(_N_MEASURED, len(gaps)):
        return _Count(certain, ())
    severity = Severity.BLOCKING if certain <= LEVELS_FROM_SACRUM.index("L1") else Severity.CAUTION
    return _Count(certain, (QualityFlag("level_uncertain", severity),))


def coronal_angle(vertebrae: list[Vertebra]) -> float:
    """Largest angle in degrees, seen from the front, between the lines that join neighbouring body centres.

    Stands in for the Cobb angle, which is taken between endplates; centres are steadier at 3 mm.
    """
    centres = np.array([v.centre_lps_mm for v in vertebrae if v.level in LEVELS_FROM_SACRUM[:_N_MEASURED]])
    if len(centres) < 3:
        return 0.0
    steps = np.diff(centres, axis=0)
    tilts = np.degrees(np.arctan2(steps[:, 0], np.abs(steps[:, 2])))
    return float(tilts.max() - tilts.min())


def _vertebrae(
    maps: SpineMaps, canonical: CanonicalVolume, column: Column, s1: npt.NDArray[np.bool_], certain: int
) -> list[Vertebra]:
    """S1 and the named vertebrae above it, caudal to cranial; above T12 only those with a certain name."""
    spacing = canonical.spacing_mm
    first = column.discs[0]
    s1_centre = np.argwhere(s1).mean(axis=0) * spacing
    sacral = describe_body("S1", maps, canonical, SpineClass.S1_BODY, s1_centre, first.normal, None, 1.0, True)
    vertebrae = [] if sacral is None else [sacral]
    for k, level in enumerate(LEVELS_FROM_SACRUM[: len(column.agreement)]):
        if k >= max(certain, _N_MEASURED):
            break
        lower, upper = column.discs[k], column.discs[k + 1]
        guess = (lower.point + upper.point) / 2
        up = lower.normal + upper.normal
        up /= np.linalg.norm(up)
        confidence = float(np.clip(column.agreement[k], 0.0, 1.0)) * (1.0 if k < certain else 0.5)
        body = describe_body(
            level, maps, canonical, SpineClass.BODY, guess, up, (lower, upper), confidence, k < certain
        )
        if body is None or body.body_region.volume_mm3 < _VERTEBRA_MM3 / 2:
            break
        vertebrae.append(body)
    return flagged_column(vertebrae)


def flagged_column(vertebrae: list[Vertebra]) -> list[Vertebra]:
    """Vertebrae, caudal to cranial, with the flags that take neighbours to tell: compression, and a cut uppermost one."""
    compressed = compression_flags([v.heights for v in vertebrae])
    flagged = [replace(v, flags=v.flags + more) for v, more in zip(vertebrae, compressed, strict=True)]
    if len(flagged) > 2 and flagged[-1].height_mm > _NEARLY_WHOLE * flagged[-2].height_mm:
        flagged[-1] = replace(flagged[-1], flags=tuple(_milder_if_truncated(flag) for flag in flagged[-1].flags))
    return flagged


def _milder_if_truncated(flag: QualityFlag) -> QualityFlag:
    return QualityFlag(flag.code, Severity.CAUTION) if flag.code == "vertebra_truncated" else flag


def _has_bf16() -> bool:
    """Whether the processor has bfloat16 instructions (AVX512-BF16, AMX or Arm's); False where nothing tells."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
