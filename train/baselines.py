"""Models to beat, refitted on the same labelled vertebrae as the network: HU thresholds and lines, radiomics.

None of them sees more than the network does, and like it none is told age or sex. What they lack is the augmentation:
they are fitted on the scans as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from osteo_daemon.imaging.texture import discretise, texture_features
from osteo_daemon.network.config import CLASSES, MoEConfig
from osteo_daemon.network.encoder import HU_STATISTICS, HuStatistics
from train import truth
from train.data import VoiSet, batches
from train.judging import Index, Judged, Vec, operating_points

NAMES: Final = ("l1_hu_threshold", "core_hu_linear", "vertebra_hu_linear", "radiomics_boosting")
_CORE_RADII_MM: Final = (8.0, 9.0, 12.0)
_LOW_HU: Final = -200.0
_BIN_HU: Final = 25.0
_GREY_LEVELS: Final = 32
_BATCH: Final = 32


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """(N, F) numbers of all vertebrae of a data set, as scanned: HU statistics first, texture of the core after
    them."""

    values: Vec
    names: tuple[str, ...]

    def column(self, name: str) -> Vec:
        """(N,) values of one feature."""
        return np.asarray(self.values[:, self.names.index(name)])


def features_of(data: VoiSet, config: MoEConfig, folder: Path) -> Features:
    """Features of every vertebra, computed once and kept in ``folder``."""
    values_file, names_file = folder / "baseline-features.npy", folder / "baseline-features.json"
    if names_file.exists():
        kept = json.loads(names_file.read_text())
        if kept["cohort"] == data.config["sha256"] and kept["rows"] == len(data.rows):
            return Features(np.load(values_file, allow_pickle=False), tuple(kept["names"]))
    statistics = HuStatistics(config)
    axes = [(torch.arange(n) - (n - 1) / 2) * config.voi_spacing_mm for n in config.voi_shape]
    grid = torch.meshgrid(*axes, indexing="ij")
    mask = torch.stack([(a / r) ** 2 for a, r in zip(grid, _CORE_RADII_MM, strict=True)]).sum(0) <= 1.0
    inside = mask.nonzero()
    box = tuple(slice(int(a), int(b)) for a, b in zip(inside.min(0).values, inside.max(0).values + 1, strict=True))
    rows, names = [], list(HU_STATISTICS)
    everything = np.arange(len(data.rows))
    steps = batches(data, everything, config, [], _BATCH)
    for batch in tqdm(steps, total=-(-len(everything) // _BATCH), desc="features of baselines", mininterval=5):
        hu = batch.hu[(slice(None), *box)]
        found = texture_features(discretise(hu, mask[box].expand_as(hu), _LOW_HU, _BIN_HU, _GREY_LEVELS), _GREY_LEVELS)
        names = [*HU_STATISTICS, *sorted(found)]
        texture = torch.stack([found[name].double() for name in sorted(found)], dim=1)
        rows.append(torch.cat([statistics.raw(batch.hu).double(), texture], dim=1).numpy())
    values = np.nan_to_num(np.concatenate(rows))
    np.save(values_file, values)
    names_file.write_text(json.dumps({"cohort": data.config["sha256"], "rows": len(data.rows), "names": names}))
    return Features(values, tuple(names))


def run_baselines(
    data: VoiSet, features: Features, parts: dict[str, Index], seed: int = 0
) -> dict[str, dict[str, Judged]]:
    """Fit every baseline on labelled training rows and apply it.

    Args:
        data: with the readings to fit on.
        features: of the data set.
        parts: name of each part to judge and its rows of L1-L4.

    Returns:
        By baseline, then by part.
    """
    train, val = data.indices("train", labelled=True), data.indices("val", labelled=True)
    wanted = {"train": train, "val": val, **parts}
    found: dict[str, dict[str, Judged]] = {}
    for name, column in (("core_hu_linear", "core_mean"), ("vertebra_hu_linear", "body_mean")):
        found[name] = _linear(data, features.column(column), wanted)
    found["l1_hu_threshold"] = _threshold(data, features.column("core_mean"), wanted)
    found["radiomics_boosting"] = _boosting(data, features, wanted, seed)
    return {name: {part: found[name][part] for part in parts} for name in NAMES}


def _classes(data: VoiSet, index: Index) -> Index:
    return np.array([data.rows[i].diagnosis for i in index], dtype=np.int64)


def _targets(data: VoiSet, index: Index) -> Vec:
    return np.array([data.rows[i].target_sbmd_g_cm2 for i in index], dtype=np.float64)


def _judged(
    data: VoiSet, index: dict[str, Index], probability: dict[str, Vec], bmd: dict[str, Vec] | None
) -> dict[str, Judged]:
    operating = operating_points(probability["val"], _classes(data, index["val"]))
    result = {}
    for part, rows in index.items():
        nothing = np.full(len(rows), np.nan)
        result[part] = Judged(
            index=rows,
            probability=probability[part],
            bmd=nothing if bmd is None else bmd[part],
            half=nothing,
            level=np.zeros((len(rows), 0)),
            operating=operating,
        )
    return result


def _ordered(score: dict[str, Vec], classes: Index) -> dict[str, Vec]:
    """Class probabilities from one number by two logistic curves fitted on the training part."""
    models = [LogisticRegression(C=1e4).fit(score["train"][:, None], classes >= k) for k in (1, 2)]
    probability = {}
    for part, values in score.items():
        low, osteoporosis = (model.predict_proba(values[:, None])[:, 1] for model in models)
        osteoporosis = np.minimum(low, osteoporosis)
        probability[part] = np.stack([1.0 - low, low - osteoporosis, osteoporosis], axis=1)
    return probability


def _t_scores(data: VoiSet, index: Index, bmd: Vec) -> Vec:
    return np.array([truth.t_score(b, data.rows[i].level) for b, i in zip(bmd, index, strict=True)])


def _linear(data: VoiSet, hu: Vec, index: dict[str, Index]) -> dict[str, Judged]:
    """sBMD linear in HU with an offset for each level, by least squares (as Comp2Comp's model of HU)."""
    names = list(truth.LEVEL_OFFSET_G_CM2)

    def design(rows: Index) -> Vec:
        levels = np.array([names.index(data.rows[i].level) for i in rows])
        return np.column_stack([hu[rows] / 100.0, np.eye(len(names))[levels]])

    weights = np.linalg.lstsq(design(index["train"]), _targets(data, index["train"]), rcond=None)[0]
    bmd = {part: np.asarray(design(rows) @ weights) for part, rows in index.items()}
    score = {part: _t_scores(data, index[part], values) for part, values in bmd.items()}
    return _judged(data, index, _ordered(score, _classes(data, index["train"])), bmd)


def _threshold(data: VoiSet, hu: Vec, index: dict[str, Index]) -> dict[str, Judged]:
    """The HU of the patient's L1 alone, for all of the patient's vertebrae; it gives no BMD."""
    first = {row.patient: hu[i] for i, row in enumerate(data.rows) if row.level == "L1"}
    score = {part: np.array([first[data.rows[i].patient] for i in rows]) for part, rows in index.items()}
    return _judged(data, index, _ordered(score, _classes(data, index["train"])), None)


def _boosting(data: VoiSet, features: Features, index: dict[str, Index], seed: int) -> dict[str, Judged]:
    """Gradient boosting on HU statistics, texture of the core and level."""
    levels = np.array([list(data.config["levels"]).index(row.level) for row in data.rows], dtype=np.float64)
    table = np.column_stack([features.values, levels])
    x, classes = table[index["train"]], _classes(data, index["train"])
    settings = {"max_iter": 200, "learning_rate": 0.05, "max_leaf_nodes": 15, "l2_regularization": 1.0}
    regressor = HistGradientBoostingRegressor(random_state=seed, **settings).fit(x, _targets(data, index["train"]))
    classifier = HistGradientBoostingClassifier(random_state=seed, **settings).fit(x, classes)
    probability = {}
    for part, rows in index.items():
        full = np.zeros((len(rows), len(CLASSES)))
        full[:, classifier.classes_.astype(int)] = classifier.predict_proba(table[rows])
        probability[part] = full
    bmd = {part: np.asarray(regressor.predict(table[rows])) for part, rows in index.items()}
    return _judged(data, index, probability, bmd)


def rows_with_truth(data: VoiSet, indices: npt.NDArray[np.int64] | Sequence[int]) -> Index:
    """Those of L1-L4, whose BMD is known."""
    return np.array([i for i in indices if data.rows[i].sbmd_g_cm2 is not None], dtype=np.int64)
