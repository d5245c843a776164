"""Densitometry of a cohort: who was measured on which machine, and who never was.

Readings stand apart from voxels: one set of renders serves the cohort and its negative controls.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np

from train.data import NO_LABEL, VoiRow, VoiSet
from train.truth import MAKERS, Maker, diagnosis, draw_readings, machine_sbmd, t_score, to_sbmd

Scheme = Literal["sites", "one-device", "shuffled"]


@dataclass(frozen=True, slots=True)
class Densitometry:
    """How readings are drawn.

    Attributes:
        scheme: "sites": every site has its own maker's machine. "one-device": all are measured on the first maker's, a
            control in which nothing depends on a device. "shuffled": every patient goes to a machine by lot, so that no
            image can tell it; a control in which devices differ but can't be learnt.
        labelled_share: of the training patients have a reading at all. Validation and test patients all have one, the
            external hospital's none.
        seed: of the lots and of chance in readings.
    """

    scheme: Scheme = "sites"
    labelled_share: float = 0.3
    seed: int = 20262

    def __post_init__(self) -> None:
        if not 0.0 < self.labelled_share <= 1.0:
            raise ValueError(f"labelled_share must lie in (0, 1], got {self.labelled_share}")

    def maker_of(self, patient: str, site_maker: Maker) -> Maker:
        """Whose machine measures a patient of a site."""
        if self.scheme == "one-device":
            return MAKERS[0]
        if self.scheme == "shuffled":
            return MAKERS[int(self.rng(patient, "machine").integers(len(MAKERS)))]
        return site_maker

    def labelled(self, row: VoiRow) -> bool:
        """Whether the patient was measured."""
        if row.part == "external":
            return False
        return row.part != "train" or bool(self.rng(row.patient, "labelled").random() < self.labelled_share)

    def rng(self, patient: str, purpose: str) -> np.random.Generator:
        """A generator of its own for each patient and purpose."""
        return np.random.default_rng([self.seed, zlib.crc32(patient.encode()), zlib.crc32(purpose.encode())])


def remeasure(data: VoiSet, how: Densitometry) -> VoiSet:
    """The same renders with other readings."""
    makers = {str(site["name"]): site["maker"] for site in data.config["sites"]}
    return replace(data, rows=measure(data.rows, how, makers))


def measure(rows: Sequence[VoiRow], how: Densitometry, makers: dict[str, Maker | None]) -> tuple[VoiRow, ...]:
    """The same rows with devices, readings, targets and classes drawn anew.

    Args:
        rows: of whole patients, each patient's rows together; ``sbmd_g_cm2`` is read, other labels are replaced.
        makers: maker of each site; None is the external hospital's, whose rows are returned without a label.
    """
    measured: list[VoiRow] = []
    for patient, group in groupby(rows, key=lambda row: row.patient):
        measured += _measure_patient(patient, list(group), how, makers)
    return tuple(measured)


def _measure_patient(
    patient: str, rows: list[VoiRow], how: Densitometry, makers: dict[str, Maker | None]
) -> Iterator[VoiRow]:
    nothing: dict[str, Any] = {
        "reading_g_cm2": None,
        "target_sbmd_g_cm2": None,
        "machine_sbmd_g_cm2": None,
        "diagnosis": NO_LABEL,
    }
    own = makers[rows[0].site]
    if own is None:
        yield from (replace(row, **nothing) for row in rows)
        return
    maker = how.maker_of(patient, own)
    true = {row.level: row.sbmd_g_cm2 for row in rows if row.sbmd_g_cm2 is not None}
    readings = draw_readings(how.rng(patient, "reading"), true, maker)
    labelled = how.labelled(rows[0])
    for row in rows:
        values: dict[str, Any] = {**nothing, "device": maker}
        if row.sbmd_g_cm2 is not None:
            values["machine_sbmd_g_cm2"] = machine_sbmd(row.sbmd_g_cm2, maker)
        if labelled and row.level in readings:
            target = to_sbmd(readings[row.level], maker)
            values |= {
                "reading_g_cm2": readings[row.level],
                "target_sbmd_g_cm2": target,
                "diagnosis": diagnosis(t_score(target, row.level)),
            }
        yield replace(row, **values)
