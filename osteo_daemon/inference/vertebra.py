"""What the localizer finds: vertebrae with names, bodies and remarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from osteo_daemon.domain.findings import QualityFlag
from osteo_daemon.imaging.region import Region
from osteo_daemon.inference.morphometry import Heights

Points = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Vertebra:
    """One vertebra; every point in LPS millimetres.

    Attributes:
        level: ``T10`` to ``L5``, or ``S1``.
        centre_lps_mm: (3,) centroid of the body.
        axes_lps: (3, 3) rows are unit vectors of the vertebra's own frame: cranial to caudal, anterior to posterior,
            right to left (right-handed).
        confidence: 0 to 1, how well image and count agree here; not a calibrated probability.
        body_region: the whole vertebral body, cortex included, without arch and processes.
        level_certain: False when the name may be wrong; then the localization also carries ``level_uncertain``.
        height_mm: from lower to upper endplate on the body's axis.
        heights: anterior, middle and posterior height, or None where they cannot be measured (always for S1).
        superior_lps_mm: (3,) centre of the upper endplate.
        inferior_lps_mm: (3,) centre of the lower endplate.
        flags: remarks on this vertebra.
        compression_grade: 0 to 3 by loss of height (`morphometry`), or None where it cannot be measured.
    """

    level: str
    centre_lps_mm: Points
    axes_lps: Points
    confidence: float
    body_region: Region
    level_certain: bool
    height_mm: float
    heights: Heights | None
    superior_lps_mm: Points
    inferior_lps_mm: Points
    flags: tuple[QualityFlag, ...] = ()
    compression_grade: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Localization:
    """The vertebrae of one scan.

    Attributes:
        vertebrae: cranial to caudal; only masks from outside may leave a level out.
        flags: remarks on the column as a whole.
        anchor: what the names were counted from: ``s1+rib``, ``s1``, ``rib``, ``none``, or ``labels`` for masks with
            names.
        durations_s: seconds per step.
        alternative: where sacrum and last rib disagree, by how many levels every vertebra would lie higher by the
            rib's count (L5 of the names would be L4 for 1); else 0.
    """

    vertebrae: tuple[Vertebra, ...]
    flags: tuple[QualityFlag, ...]
    anchor: str
    durations_s: Mapping[str, float] = field(default_factory=dict)
    alternative: int = 0
