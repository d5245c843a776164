"""For which scanners a site's bundle speaks; for every other one it says, bit by bit, what its base says.

A gate cannot keep a refit to its site: two scanners whose images look alike share its decision. The scanner's name in
the header can. A candidate therefore carries the network that it was refitted from beside its own, and which of them
answers follows from the header alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from safetensors.torch import save
from torch import Tensor

from osteo_daemon.domain.observation import Scanner
from osteo_daemon.errors import BundleError
from osteo_daemon.inference.bundle import ModelBundle
from osteo_daemon.network.config import Calibration, MoEConfig
from osteo_daemon.network.multitask import MultitaskMoE

SCOPE_KEY: Final = "scope"
"""Of configs/inference.json; a bundle without it speaks for every scanner."""
ELSEWHERE_NAME: Final = "models/elsewhere.safetensors"
"""Weights of the base that differ from the bundle's own; those that are the same stand once."""
_KEYS: Final = frozenset({"scanners", "network", "calibration", "outliers"})

ScannerName = tuple[str, str]
"""Maker and model in capitals, as `Scanner.named` writes them."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a bundle speaks, and what speaks elsewhere.

    Attributes:
        scanners: that it was refitted on.
        network, calibration: of the base.
        outliers: numbers of the base's outlier model, None where it has none.
    """

    scanners: frozenset[ScannerName]
    network: MoEConfig
    calibration: Calibration
    outliers: Mapping[str, Any] | None

    def covers(self, scanner: Scanner) -> bool:
        """True for a scanner that the bundle was refitted on; never for one that the header does not name."""
        return (scanner.manufacturer, scanner.model) in self.scanners

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "scanners": [{"manufacturer": maker, "model": model} for maker, model in sorted(self.scanners)],
            "network": self.network.to_json(),
            "calibration": self.calibration.to_json(),
            "outliers": None if self.outliers is None else dict(self.outliers),
        }

    @classmethod
    def of_bundle(cls, bundle: ModelBundle) -> Scope | None:
        """The scope of a bundle, None for one that speaks for every scanner.

        Raises:
            BundleError: a key is unknown or missing, or a value is out of range.
        """
        values = bundle.inference.get(SCOPE_KEY)
        if values is None:
            return None
        try:
            if set(values) != _KEYS:
                raise BundleError(f"configs/inference.json: scope needs exactly the keys {', '.join(sorted(_KEYS))}")
            scanners = frozenset((str(one["manufacturer"]), str(one["model"])) for one in values["scanners"])
            outliers = values["outliers"]
            if not scanners or any(not maker for maker, _ in scanners):
                raise BundleError("configs/inference.json: scope names no scanner, or one without a maker")
            if outliers is not None and not isinstance(outliers, Mapping):
                raise BundleError("configs/inference.json: scope has unusable outliers")
            return cls(
                scanners, MoEConfig.from_json(values["network"]), Calibration.from_json(values["calibration"]), outliers
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"configs/inference.json has an unusable scope: {error}") from error


def base_network(bundle: ModelBundle, scope: Scope) -> MultitaskMoE:
    """The network that speaks elsewhere, on the CPU.

    Raises:
        BundleError: weights and configuration do not belong together.
    """
    network = MultitaskMoE(scope.network)
    own = bundle.load_weights()
    kept = bundle.load_tensors(ELSEWHERE_NAME) if ELSEWHERE_NAME in bundle.files else {}
    try:
        network.load_state_dict({name: kept[name] if name in kept else own[name] for name in network.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise BundleError(f"the weights of {bundle.name} do not hold the network that speaks elsewhere") from error
    return network.eval()


def kept_weights(own: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> bytes | None:
    """What `ELSEWHERE_NAME` holds: the base's tensors that differ from the bundle's own; None when there are none."""
    kept = {name: value.contiguous() for name, value in base.items() if not _same(own.get(name), value)}
    return bytes(save(kept)) if kept else None


def labels_of(scanners: Iterable[ScannerName]) -> str:
    """For people."""
    return ", ".join(Scanner(maker, model).label for maker, model in sorted(scanners))


def _same(first: Tensor | None, second: Tensor) -> bool:
    return first is not None and first.dtype == second.dtype and torch.equal(first, second)
