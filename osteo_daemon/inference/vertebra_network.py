"""The network channel: calibrated values of the multitask mixture-of-experts for each vertebra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from osteo_daemon.domain.observation import Scanner
from osteo_daemon.errors import BundleError
from osteo_daemon.imaging.preprocess import VoiSpec, extract_voi
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import ModelBundle
from osteo_daemon.inference.scope import Scope, base_network
from osteo_daemon.network.config import CLASSES, BmdScale, Calibration, MoEConfig
from osteo_daemon.network.heads import class_probabilities
from osteo_daemon.network.moe import gate_entropy
from osteo_daemon.network.multitask import UNKNOWN_LEVEL, MultitaskMoE
from osteo_daemon.network.outlier import OUTLIERS_KEY, OUTLIERS_NAME, OutlierModel

MINIMUM_COVERAGE: Final = 0.8
"""With less of the VOI inside the scan, diagnosis and BMD are withheld: the rest repeats the scan's edge."""

_UNKNOWN_SCANNER: Final = Scanner()

VertebraPlace = tuple[str, npt.ArrayLike, npt.ArrayLike]
"""Level name, (3,) centre of the body in LPS mm, (3, 3) unit vectors in LPS by row: caudal, posterior, left."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Calibrated values of one vertebra.

    Diagnosis and BMD are None for levels that DXA does not measure and for VOIs that the scan does not cover.

    Attributes:
        level: the level that the caller gave.
        class_probabilities: ``normal``, ``osteopenia``, ``osteoporosis``; sums to 1.
        bmd_g_cm2: areal BMD on the bundle's declared scale.
        bmd_sd_g_cm2: calibrated standard deviation of that prediction.
        bmd_interval_90_g_cm2: 90 % prediction interval.
        t_score: against the bundle's declared reference for this level. The caller withholds it where age or sex is
            missing or below the limit.
        level_probabilities: level to probability, from the image alone; sums to 1.
        expert_weights: gate weight per expert (mean over the tasks' gates); sums to 1.
        gate_entropy: of those weights, 0 one expert to 1 all alike.
        coverage: share of the VOI inside the scan.
        outlier_distance: of its features to the training set's, None where the bundle does not tell them.
        out_of_distribution: that distance or the gate's entropy lies above the bundle's limit; None as above.
    """

    level: str
    class_probabilities: Mapping[str, float] | None
    bmd_g_cm2: float | None
    bmd_sd_g_cm2: float | None
    bmd_interval_90_g_cm2: tuple[float, float] | None
    t_score: float | None
    level_probabilities: Mapping[str, float]
    expert_weights: tuple[float, ...]
    gate_entropy: float
    coverage: float
    outlier_distance: float | None = None
    out_of_distribution: bool | None = None


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """One vertebra takes 25 ms on one CPU thread; more threads wait for each other on busy cores."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One network of a bundle with what belongs to its output."""

    network: MultitaskMoE
    calibration: Calibration
    outliers: OutlierModel | None


class VertebraNetwork:
    """A loaded bundle, ready to predict; make one per process and keep it warm.

    A bundle that was refitted for a site has two networks: its own for the scanners of its scope, and that of its base
    for all others (`osteo_daemon.inference.scope`).

    Attributes:
        bundle: where the weights came from; its status and digest belong beside every value.
        scale: of BMD and T-scores.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        voi: VoiSpec,
        scale: BmdScale,
        device: torch.device,
        own: Branch,
        elsewhere: tuple[Scope, Branch] | None = None,
    ) -> None:
        self.bundle = bundle
        self.scale = scale
        self.voi = voi
        self.device = device
        self._own = own
        self._elsewhere = elsewhere
        for branch in (own, *([] if elsewhere is None else [elsewhere[1]])):
            branch.network.to(device).eval()

    @classmethod
    def from_bundle(cls, bundle: ModelBundle, device: str | torch.device = "cpu") -> VertebraNetwork:
        """Build the network that the bundle describes and load its weights.

        Raises:
            BundleError: a configuration is incomplete, or weights and configuration do not belong together.
        """
        config = MoEConfig.from_json(bundle.network)
        for key in ("voi", "calibration", "bmd_scale"):
            if not isinstance(bundle.inference.get(key), Mapping):
                raise BundleError(f"configs/inference.json of {bundle.name} has no {key}; use a bundle of this version")
        voi = VoiSpec.from_json(bundle.inference["voi"])
        scope = Scope.of_bundle(bundle)
        for each in (config, *([] if scope is None else [scope.network])):
            if voi.shape != each.voi_shape or voi.spacing_mm != each.voi_spacing_mm:
                raise BundleError(f"configs/inference.json and network.json of {bundle.name} disagree about the VOI")
        network = MultitaskMoE(config)
        try:
            network.load_state_dict(bundle.load_weights())
        except RuntimeError as error:
            raise BundleError(f"the weights of {bundle.name} do not fit its configs/network.json") from error
        calibration = Calibration.from_json(bundle.inference["calibration"])
        own = Branch(network, calibration, _outliers(bundle, bundle.inference.get(OUTLIERS_KEY), network))
        elsewhere = None
        if scope is not None:
            base = base_network(bundle, scope)
            elsewhere = scope, Branch(base, scope.calibration, _outliers(bundle, scope.outliers, base))
        return cls(bundle, voi, BmdScale.from_json(bundle.inference["bmd_scale"]), torch.device(device), own, elsewhere)

    def predict(
        self,
        volume: CtVolume,
        vertebrae: Sequence[VertebraPlace],
        batch_size: int = 1,
        scanner: Scanner = _UNKNOWN_SCANNER,
    ) -> list[Prediction]:
        """Predict each vertebra, in the order given.

        One at a time is the default: six vertebrae take some tens of milliseconds each, and a larger batch changes the
        order of additions, so that rounding would depend on the company.

        Args:
            volume: the scan.
            vertebrae: level, centre and axes of each.
            batch_size: vertebrae computed at once.
            scanner: that made the scan; it decides which network of a site's bundle answers.

        Raises:
            ValueError: a VOI lies outside the scan, or axes are not orthonormal.
        """
        predictions: list[Prediction] = []
        branch = self._branch(scanner)
        levels = branch.network.config.levels
        for start in range(0, len(vertebrae), batch_size):
            chunk = vertebrae[start : start + batch_size]
            vois = [extract_voi(volume, centre, axes, self.voi) for _, centre, axes in chunk]
            index = [levels.index(level) if level in levels else UNKNOWN_LEVEL for level, _, _ in chunk]
            answers = self._run(branch, torch.from_numpy(np.stack([voi.hu for voi in vois])), torch.tensor(index))
            predictions += [
                self._prediction(
                    branch, chunk[row][0], voi.coverage, {name: value[row] for name, value in answers.items()}
                )
                for row, voi in enumerate(vois)
            ]
        return predictions

    def _branch(self, scanner: Scanner) -> Branch:
        if self._elsewhere is None or self._elsewhere[0].covers(scanner):
            return self._own
        return self._elsewhere[1]

    def _run(self, branch: Branch, hu: Tensor, level: Tensor) -> dict[str, Tensor]:
        """Calibrated tensors of one batch on the CPU."""
        calibration = branch.calibration
        with torch.inference_mode(), _one_thread(self.device):
            out = branch.network(hu.to(self.device), level.to(self.device))
            weights = out.gate_weights.mean(1)
            sd = (0.5 * out.bmd_log_variance).exp() * calibration.bmd_sd_factor
            answers = {
                "class": class_probabilities(
                    out.class_logits, len(CLASSES), calibration.class_temperature, calibration.class_shift
                ),
                "bmd": calibration.bmd_slope * out.bmd + calibration.bmd_intercept_g_cm2,
                "sd": sd * abs(calibration.bmd_slope),
                "level": (out.level_logits / calibration.level_temperature).softmax(1),
                "weights": weights,
                "entropy": gate_entropy(weights),
            }
            if branch.outliers is not None:
                answers["distance"] = branch.outliers.distance(out.encoded)
            return {name: value.double().cpu() for name, value in answers.items()}

    def _prediction(self, branch: Branch, level: str, coverage: float, answer: Mapping[str, Tensor]) -> Prediction:
        config = branch.network.config
        given = level in config.bmd_levels and coverage >= MINIMUM_COVERAGE
        bmd, sd = float(answer["bmd"]), float(answer["sd"])
        half = branch.calibration.bmd_interval_90 * sd
        distance = out_of_distribution = None
        if branch.outliers is not None:
            distance = float(answer["distance"])
            out_of_distribution = branch.outliers.exceeds(distance, float(answer["entropy"]))
        return Prediction(
            level=level,
            class_probabilities=dict(zip(CLASSES, answer["class"].tolist(), strict=True)) if given else None,
            bmd_g_cm2=bmd if given else None,
            bmd_sd_g_cm2=sd if given else None,
            bmd_interval_90_g_cm2=(bmd - half, bmd + half) if given else None,
            t_score=self.scale.t_score(bmd, level) if given else None,
            level_probabilities=dict(zip(config.levels, answer["level"].tolist(), strict=True)),
            expert_weights=tuple(answer["weights"].tolist()),
            gate_entropy=float(answer["entropy"]),
            coverage=coverage,
            outlier_distance=distance,
            out_of_distribution=out_of_distribution,
        )


def _outliers(bundle: ModelBundle, numbers: object, network: MultitaskMoE) -> OutlierModel | None:
    """Raises:
    BundleError: the numbers are none, or the tensors do not fit.
    """
    if numbers is None:
        return None
    if not isinstance(numbers, Mapping):
        raise BundleError(f"configs/inference.json of {bundle.name}: outliers is not an object")
    return OutlierModel.from_parts(numbers, bundle.load_tensors(OUTLIERS_NAME), network.encoded_width)
