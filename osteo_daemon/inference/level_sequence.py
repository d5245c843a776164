"""Consecutive vertebrae read together: which start of the sequence explains their looks best.

One vertebra tells its level badly, since neighbours look alike. Six in a row can only all be named one too high or too
low together, so their evidence adds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from osteo_daemon.inference.vertebra_network import Prediction

REACH: Final = 2
"""Sequences are moved by at most this many levels."""
_LEAST_PROBABILITY: Final = 1e-4
"""No single vertebra may veto a reading of the others."""


@dataclass(frozen=True, slots=True)
class SequenceReading:
    """How the looks of a run of vertebrae fit their names.

    Attributes:
        shift: levels by which all names would have to move caudally to fit best; 0 confirms them.
        margin: log likelihood of the best shift over the second best, 0 or more.
        vertebrae: how many were read.
    """

    shift: int
    margin: float
    vertebrae: int


def read_sequence(
    names: Sequence[str], probabilities: Sequence[Mapping[str, float]], levels: Sequence[str]
) -> SequenceReading | None:
    """Read vertebrae of one scan together.

    A name moved beyond the first or last known level counts as that level: a T11 looks most like a T12.

    Args:
        names: given to the vertebrae, for example by counting; unknown ones are left out.
        probabilities: of each vertebra's level from its image alone.
        levels: known levels, cranial to caudal.

    Returns:
        None when fewer than two vertebrae have a known name.
    """
    known = [k for k, name in enumerate(names) if name in levels]
    if len(known) < 2:
        return None
    index = np.array([levels.index(names[k]) for k in known])
    table = np.array([[probabilities[k].get(level, 0.0) for level in levels] for k in known])
    score = shift_scores(np.log(np.maximum(table, _LEAST_PROBABILITY)), index)
    order = np.argsort(score)
    return SequenceReading(int(order[-1]) - REACH, float(score[order[-1]] - score[order[-2]]), len(known))


def names_confirmed(names: Sequence[str], predictions: Sequence[Prediction | None]) -> bool:
    """Whether the network, reading a scan's vertebrae together, finds them where they were counted."""
    seen = [(str(name), p.level_probabilities) for name, p in zip(names, predictions, strict=True) if p is not None]
    if not seen:
        return False
    reading = read_sequence([name for name, _ in seen], [look for _, look in seen], list(seen[0][1]))
    return reading is not None and reading.shift == 0


def shift_scores(log_probability: npt.NDArray[np.float64], index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Log likelihood of each shift from -`REACH` to `REACH`.

    Args:
        log_probability: (N, L) of each vertebra's level.
        index: (N,) the given levels.
    """
    last = log_probability.shape[1] - 1
    rows = np.arange(len(index))
    return np.array(
        [log_probability[rows, np.clip(index + shift, 0, last)].sum() for shift in range(-REACH, REACH + 1)]
    )
