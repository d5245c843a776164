"""Models that stay loaded from study to study: exchanged when their bundles change, replaced when memory is short."""

from __future__ import annotations

import gc
import time

import torch

from osteo_daemon.domain.findings import ModelReference
from osteo_daemon.errors import BundleError
from osteo_daemon.imaging.study_files import StudyFiles
from osteo_daemon.inference.bundle import bundle_digest
from osteo_daemon.inference.screening import Progress, Screening, StudyScreener
from osteo_daemon.log import get_logger
from osteo_daemon.settings import Settings

_CPU = torch.device("cpu")
_SETTLE_SECONDS = 0.5

Stamp = tuple[tuple[str, str], ...]
"""Name and digest of each bundle, the localizer first."""


class ResidentModels:
    """A warm `StudyScreener` and the rules for exchanging it.

    Args:
        settings: of the node.

    Attributes:
        settings: of the node, with the names of the bundles that are loaded.
        refused: why a changed bundle was not taken up; None when all is as it should be.

    Raises:
        BundleError: a bundle is missing, changed or of another schema.
        ConfigurationError: the GPU asked for isn't there.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.refused: str | None = None
        self._on_cpu: StudyScreener | None = None
        self._refused_stamp: Stamp | None = None
        self._stamp = _stamp(settings)
        self._screener = self._load(settings)

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self._screener.device

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """The bundles in use."""
        return self._screener.models

    def refresh(self, localizer_bundle: str, network_bundle: str) -> bool:
        """Between two studies: take up bundles that changed, or those that the next study asks for.

        A changed bundle that cannot be used leaves the loaded one at work and is named in ``refused``.

        Returns:
            True when the models or ``refused`` changed.

        Raises:
            BundleError: a bundle under a name that isn't loaded cannot be used: there is no older one to keep.
        """
        names = {"localizer_bundle": localizer_bundle, "network_bundle": network_bundle}
        screener = self.settings.screener.model_copy(update=names)
        wanted = self.settings.model_copy(update={"screener": screener})
        same_names = screener == self.settings.screener
        try:
            stamp = _stamp(wanted)
            if stamp not in (self._stamp, self._refused_stamp):
                # a bundle is replaced by two renames: between them its place is empty
                time.sleep(_SETTLE_SECONDS)
                stamp = _stamp(wanted)
            if stamp == self._stamp:
                return self._unrefuse()
            if stamp == self._refused_stamp and same_names:
                return False
            loaded = self._load(wanted)
        except BundleError as error:
            if not same_names:
                raise
            return self._refuse(error)
        self._screener, self._stamp, self.settings, self._on_cpu = loaded, stamp, wanted, None
        self._unrefuse()
        return True

    def screen(self, files: StudyFiles, progress: Progress) -> Screening:
        """Screen a study; when the GPU's memory is short, once more with what can be freed, then on the CPU.

        The networks take one patch and one vertebra at a time: a smaller batch than that does not exist, and what can
        be had is the cache's and the last study's memory.

        Raises:
            torch.OutOfMemoryError: there is no room, and the CPU is not allowed.
        """
        try:
            return self._screener.screen(files, progress)
        except torch.OutOfMemoryError:
            get_logger().warning("gpu_memory_short", device=str(self.device), outcome="once more")
        _free()
        try:
            return self._screener.screen(files, progress)
        except torch.OutOfMemoryError:
            if not self.settings.screener.cpu_fallback:
                raise
            get_logger().warning("gpu_memory_short", device=str(self.device), outcome="on the cpu")
        _free()
        self._on_cpu = self._on_cpu or StudyScreener.load(self.settings, _CPU)
        return self._on_cpu.screen(files, progress)

    def _load(self, settings: Settings) -> StudyScreener:
        start = time.perf_counter()
        screener = StudyScreener.load(settings)
        duration = round(time.perf_counter() - start, 2)
        for model in screener.models:
            get_logger().info("model_loaded", bundle=model.bundle, version=model.version, digest=model.sha256)
        get_logger().info("models_ready", device=str(screener.device), duration_s=duration)
        return screener

    def _refuse(self, error: BundleError) -> bool:
        changed = self.refused != error.detail
        self.refused = error.detail
        try:
            self._refused_stamp = _stamp(self.settings)
        except BundleError:
            self._refused_stamp = None
        if changed:
            get_logger().error(
                "bundle_refused", error=type(error).__name__, detail=error.detail, outcome="old one kept"
            )
        return changed

    def _unrefuse(self) -> bool:
        changed = self.refused is not None
        self.refused = self._refused_stamp = None
        return changed


def _stamp(settings: Settings) -> Stamp:
    screener = settings.screener
    names = [screener.localizer_bundle, *([screener.network_bundle] if screener.network_enabled else [])]
    return tuple((name, bundle_digest(name, settings.bundles_dir)) for name in names)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes of a GPU that are ``used``, by whomever, and its ``total``; nothing for a processor."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"used": total - free, "total": total}
