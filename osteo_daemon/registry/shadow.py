"""A candidate beside the deployed network: the same vertebrae, values that go to a table of their own and nowhere else.

It runs when a study's answer has gone to the screener, so no report waits for it; it looks at the clock between
vertebrae, and whatever goes wrong with it is a word in its row.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from osteo_daemon.errors import BundleError, ConfigurationError
from osteo_daemon.imaging.acquisition import scanner_of
from osteo_daemon.inference.bundle import read_bundle
from osteo_daemon.inference.screening import Screening
from osteo_daemon.inference.signature import check_trusted
from osteo_daemon.inference.vertebra_network import VertebraNetwork
from osteo_daemon.log import get_logger
from osteo_daemon.registry.layout import Layout
from osteo_daemon.settings import Settings

OUT_OF_TIME = "out_of_time"


class ShadowRunner:
    """The candidate of a node, loaded while there is one.

    Args:
        settings: of the node.
        device: where it runs.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._layout = Layout(settings.bundles_dir)
        self._folder: Path | None = None
        self._network: VertebraNetwork | None = None

    def wanted(self) -> bool:
        """True while a candidate is in the shadow; what was loaded of an earlier one is dropped."""
        folder = self._layout.shadow(self._settings.screener.network_bundle)
        if folder != self._folder:
            self._folder, self._network = folder, None
            if folder is not None:
                self._network = self._load(folder)
        return self._network is not None

    def run(self, screening: Screening) -> dict[str, Any] | None:
        """The candidate's values of a reported study, as columns of `jobs.records.Shadow` less those of the job.

        None when there is no candidate, the study was excluded, or the deployed network is the candidate.
        """
        reported = {vertebra.level.value: vertebra.network for vertebra in screening.result.vertebrae}
        if not self.wanted() or self._network is None or screening.volume is None or not any(reported.values()):
            return None
        bundle, deployed = self._network.bundle, screening.result.models[-1].sha256
        if deployed == bundle.sha256:
            return None
        scanner = scanner_of(screening.headers[0])
        begun, levels, error = time.perf_counter(), dict[str, dict[str, Any]](), None
        try:
            for vertebra in screening.vertebrae:
                if time.perf_counter() - begun > self._settings.models.shadow_seconds:
                    error = OUT_OF_TIME
                    break
                level = str(vertebra.level)
                place = (level, vertebra.centre_lps_mm, vertebra.axes_lps)
                (said,) = self._network.predict(screening.volume, [place], scanner=scanner)
                now = reported.get(level)
                if now is None:
                    continue
                levels[level] = {
                    "bmd_g_cm2": said.bmd_g_cm2,
                    "deployed_bmd_g_cm2": now.bmd_g_cm2,
                    "class": _likeliest(said.class_probabilities),
                    "deployed_class": _likeliest(now.class_probabilities),
                }
        except Exception as failure:  # noqa: BLE001 - a loop edge: what a candidate does must not touch the screening
            error = type(failure).__name__
            get_logger().warning("shadow_failed", bundle=bundle.name, version=bundle.version, error=error)
        return {
            "sha256": bundle.sha256,
            "deployed_sha256": deployed,
            "seconds": round(time.perf_counter() - begun, 3),
            "error": error,
            "levels": levels,
        }

    def _load(self, folder: Path) -> VertebraNetwork | None:
        try:
            bundle = read_bundle(folder)
            check_trusted(bundle, self._settings)
            network = VertebraNetwork.from_bundle(bundle, self._device)
        except (BundleError, ConfigurationError) as error:
            get_logger().error("shadow_refused", error=type(error).__name__, detail=error.detail)
            return None
        except Exception as error:  # noqa: BLE001 - a loop edge, as in `run`
            get_logger().error("shadow_refused", error=type(error).__name__)
            return None
        get_logger().info("shadow_loaded", bundle=bundle.name, version=bundle.version, digest=bundle.sha256)
        return network


def _likeliest(probabilities: Any) -> str | None:
    return None if not probabilities else str(max(probabilities, key=probabilities.__getitem__))
