"""Find and name the vertebrae of a CT: the network and how it is run; names are given in `decode`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.errors import BundleError, NotEligible
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import ModelBundle
from osteo_daemon.inference.canonical import CanonicalVolume, resample_canonical
from osteo_daemon.inference.decode import decode
from osteo_daemon.inference.tiling import PatchRunner, SpineMaps, column_starts, survey_starts
from osteo_daemon.inference.vertebra import Localization, Vertebra
from osteo_daemon.network.localizer import LocalizerConfig, SpineLocalizerNet

__all__ = ["Localization", "SpineLocalizer", "Vertebra"]

_SMALLEST_EXTENT_MM = 90.0  # along the patient: less cannot hold three vertebrae


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
                f"{extent:.0f} mm along the patient hold too little of the lumbar spine",
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


def _has_bf16() -> bool:
    """Whether the processor has bfloat16 instructions (AVX512-BF16, AMX or Arm's); False where nothing tells."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
