"""How a refit is fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FitConfig:
    """How to fit.

    Attributes:
        strengths: of the pull to the parent, strongest first; infinity leaves the parent as it is.
        steps: of each fit.
        batch_size: vertebrae of the site in a step, and as many of the replay set.
        learning_rate: peak of Adam's.
        replay: weight of the replay set where the refit speaks for every scanner.
        replay_in_scope: the same where it speaks for the site's scanners alone: others cannot be forgotten then, and
            what was said of them must not hold back what the site's own readings say.
        gate: weight of the gate's supervision.
        level: weight of the level task.
        hide_level: share of samples whose level is withheld.
        outer_folds: for the verdict.
        inner_folds: for the strength and the calibration.
        repeats: of the bootstrap behind the verdict's intervals; a quarter of it in subgroups.
        seed: of everything random.
    """

    strengths: tuple[float, ...] = (math.inf, 1.0, 0.1, 0.01)
    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 5e-3
    replay: float = 2.0
    replay_in_scope: float = 0.1
    gate: float = 1.0
    level: float = 0.25
    hide_level: float = 0.15
    outer_folds: int = 5
    inner_folds: int = 3
    repeats: int = 500
    seed: int = 0

    @property
    def fits(self) -> int:
        """Fits of a whole refit, for the progress bar."""
        strengths = sum(math.isfinite(s) for s in self.strengths)
        return (self.outer_folds + 1) * (self.inner_folds * strengths + 1)
