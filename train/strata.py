"""Acquisition strata: texture features in standard deviations among vertebrae scanned the same way.

Run-length and other features shift with slice thickness, kernel and tube voltage, which an encoder shall not learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt

from train.data import VoiRow

Floats = npt.NDArray[np.float64]

_TINY_SD: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Acquisition:
    """What of a scan moves texture, the strongest first: the order in which strata forget, from the end.

    Attributes:
        kernel: as the reconstruction names it.
        thickness: ``thin`` below 1.5 mm, ``middle`` below 3.5 mm, else ``thick``.
        kvp: tube voltage rounded to 10 kV.
        vendor: of the scanner, empty when not told.
        phase: contrast phase.
    """

    kernel: str
    thickness: str
    kvp: str
    vendor: str
    phase: str

    @classmethod
    def of(cls, row: VoiRow) -> Acquisition:
        """The acquisition of one VOI."""
        thickness = "thin" if row.thickness_mm < 1.5 else "middle" if row.thickness_mm < 3.5 else "thick"
        return cls(row.kernel, thickness, f"{round(row.kvp, -1):.0f}", row.vendor, row.phase)

    @property
    def lineage(self) -> tuple[str, ...]:
        """Names of its stratum and of every parent, down to ``all``."""
        values = [getattr(self, field.name) or "unknown" for field in fields(self)]
        return (*("/".join(values[:n]) for n in range(len(values), 0, -1)), "all")


@dataclass(frozen=True, slots=True, eq=False)
class Strata:
    """Mean and SD of every feature in each stratum that is large enough.

    Attributes:
        names: of the strata; the last is ``all``.
        mean, sd: (S, F).
    """

    names: tuple[str, ...]
    mean: Floats
    sd: Floats

    @classmethod
    def fit(
        cls,
        values: Floats,
        acquisitions: Sequence[Acquisition],
        patients: Sequence[str],
        minimum_rows: int,
        minimum_patients: int,
    ) -> Strata:
        """From (N, F) raw features; a stratum with fewer rows or patients than these gets no numbers of its own.

        Raises:
            ValueError: there is no row.
        """
        if len(values) == 0:
            raise ValueError("a pool needs at least one vertebra of the training part")
        members: dict[str, list[int]] = {}
        for i, acquisition in enumerate(acquisitions):
            for name in acquisition.lineage:
                members.setdefault(name, []).append(i)
        names = [
            name
            for name, rows in sorted(members.items())
            if name != "all" and len(rows) >= minimum_rows and len({patients[i] for i in rows}) >= minimum_patients
        ]
        names.append("all")
        means = np.stack([values[members[name]].mean(0) for name in names])
        sds = np.stack([values[members[name]].std(0) for name in names])
        return cls(tuple(names), means, np.where(sds > _TINY_SD, sds, 1.0))

    def stratum_of(self, acquisition: Acquisition) -> int:
        """Index of the narrowest stratum that is large enough."""
        known = {name: i for i, name in enumerate(self.names)}
        return next(known[name] for name in acquisition.lineage if name in known)

    def standardise(self, values: Floats, acquisitions: Sequence[Acquisition]) -> Floats:
        """(N, F) raw features to standard deviations of their own strata."""
        index = np.array([self.stratum_of(acquisition) for acquisition in acquisitions], dtype=np.int64)
        return (values - self.mean[index]) / self.sd[index]


def uncorrelated(values: Floats, maximum: float) -> npt.NDArray[np.int64]:
    """Columns of (N, F) standardised features to keep: in their order, each unless it repeats one kept before.

    A column that does not vary is never kept.
    """
    kept: list[int] = []
    varies = values.std(0) > _TINY_SD
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.abs(np.corrcoef(values, rowvar=False)) if values.shape[1] > 1 else np.ones((1, 1))
    for column in range(values.shape[1]):
        if varies[column] and not (correlation[column, kept] > maximum).any():
            kept.append(column)
    return np.array(kept, dtype=np.int64)
