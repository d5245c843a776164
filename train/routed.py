"""A bundle as it answers: its own network for the scanners of its scope, that of its base for all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from osteo_daemon.inference.bundle import ModelBundle
from osteo_daemon.inference.scope import ScannerName, Scope, base_network
from osteo_daemon.network.config import Calibration
from osteo_daemon.network.multitask import MultitaskMoE
from train.evaluate import judged_of
from train.features import Features
from train.judging import Index, Judged
from train.replay import load_network
from train.site_pool import raw_of

NOWHERE: Final[ScannerName] = ("", "")
"""A scanner that no header named."""
_HALF: Final = np.full(2, 0.5)


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """Two networks on features of one encoder, and who answers.

    Attributes:
        network, calibration: for the scanners of ``scanners``, or for all where that is None.
        base, base_calibration: for all others.
    """

    network: MultitaskMoE
    calibration: Calibration
    scanners: frozenset[ScannerName] | None
    base: MultitaskMoE
    base_calibration: Calibration

    @classmethod
    def of_bundle(cls, bundle: ModelBundle) -> Routed:
        """A bundle that is deployed.

        Raises:
            BundleError: its weights do not fit its configuration.
        """
        network, calibration = load_network(bundle), Calibration.from_json(bundle.inference["calibration"])
        scope = Scope.of_bundle(bundle)
        if scope is None:
            return cls(network, calibration, None, network, calibration)
        return cls(network, calibration, scope.scanners, base_network(bundle, scope), scope.calibration)

    def candidate(
        self, network: MultitaskMoE, calibration: Calibration, scanners: frozenset[ScannerName] | None
    ) -> Routed:
        """What follows from this bundle: another network for ``scanners``, elsewhere what this one says elsewhere.

        Args:
            scanners: that the site's labels speak of; None for all.
        """
        wider = None if scanners is None else scanners | (self.scanners or frozenset())
        return Routed(network, calibration, wider, self.base, self.base_calibration)

    def judged(self, features: Features, index: Index, scanners: Sequence[ScannerName]) -> Judged:
        """Calibrated values of N vertebrae, each by the network that answers for its scanner."""
        inside = np.array([self._covers(scanner) for scanner in scanners], dtype=bool)
        if inside.all():
            return judged_of(raw_of(self.network, features, index), self.calibration, _HALF)
        parts, places = [], []
        for chosen, network, calibration in (
            (np.flatnonzero(inside), self.network, self.calibration),
            (np.flatnonzero(~inside), self.base, self.base_calibration),
        ):
            if len(chosen):
                raw = raw_of(network, features.take(chosen), index[chosen])
                parts.append(judged_of(raw, calibration, _HALF))
                places.append(chosen)
        return reordered(parts, np.argsort(np.concatenate(places)))

    def _covers(self, scanner: ScannerName) -> bool:
        return self.scanners is None or scanner in self.scanners


def reordered(parts: Sequence[Judged], order: Index) -> Judged:
    """One after another, then in that order; the points of operation are the first part's."""

    def whole(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])[order]

    names = [field.name for field in fields(Judged) if field.name != "operating"]
    return Judged(**{name: whole(name) for name in names}, operating=parts[0].operating)
