"""The parent's training once more with a site's patients among its own: what a refit for that site is compared with.

The site's labelled patients join the parent's cohort, those that judge stay out, and a network is trained with the
settings that the parent's bundle says it was trained with. Its gates know the three makers by their name; the fourth
machine's vertebrae go where the training sends them. Resumes where it was stopped.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from osteo_daemon.inference.bundle import ModelBundle
from osteo_daemon.network.config import MoEConfig
from train.cohort import ARRAYS
from train.data import Augmentation, VoiRow, VoiSet, digest_of, open_set, write_table
from train.loop import LoopConfig
from train.losses import LossWeights
from train.multitask import run_training
from train.readings import Densitometry, remeasure

_CHUNK: Final = 256
_VALIDATES_EACH: Final = 8
"""Every eighth of the site's patients calibrates and stops, the others are learnt from."""

Index = npt.NDArray[np.int64]


def train_with_site(
    parent: ModelBundle,
    cohort: Path,
    site: Path,
    index: Index,
    rows: list[VoiRow],
    folder: Path,
    device: torch.device,
    encoder: Path | None = None,
) -> Path:
    """Train as the parent was; gives the folder of the run.

    Args:
        cohort: folder of the parent's cohort, on the network's grid.
        site: folder of a cohort with the site's vertebrae.
        index: (N,) of its rows that may be learnt from.
        rows: N, with the readings of the site's machine.
        folder: of the joined data set (``data``) and the run (``run``).
        encoder: that the parent's training began from.

    Raises:
        ValueError: the two data sets don't go together, or the folder holds another training.
        KeyError: the bundle doesn't say how it was trained.
    """
    said = parent.inference["training"]
    how = None if said.get("densitometry") is None else Densitometry(**said["densitometry"])
    join(cohort, how, site, index, rows, folder / "data")
    run_training(
        folder / "data",
        folder / "run",
        LoopConfig(**said["loop"]),
        MoEConfig.from_json(parent.network),
        LossWeights(**said["weights"]),
        Augmentation(**said["augmentation"]),
        device,
        encoder,
    )
    return folder / "run"


def join(cohort: Path, how: Densitometry | None, site: Path, index: Index, rows: list[VoiRow], target: Path) -> None:
    """Write the cohort's own sites and the rows of the further one as one data set; does nothing when it is there.

    Args:
        how: readings of the cohort are drawn anew like that; None leaves them.

    Raises:
        ValueError: the grids differ, the site's set lacks arrays, a patient lies in both, or ``target`` holds another.
    """
    first, second = open_set(cohort), open_set(site)
    if how is not None:
        first = remeasure(first, how)
    kept = np.array([i for i, row in enumerate(first.rows) if row.part != "external"], dtype=np.int64)
    own = [first.rows[i] for i in kept]
    joined = [*own, *_parts(rows)]
    if {row.patient for row in own} & {row.patient for row in rows}:
        raise ValueError("a patient of the site lies in the cohort's own sites")
    config = {**first.config, "joined": second.config.get("sha256", ""), "patients": len({r.patient for r in joined})}
    config["sha256"] = digest_of({"cohort": first.config["sha256"], "site": [repr(row) for row in joined]})
    if (target / "table.json").exists():
        if open_set(target).config["sha256"] != config["sha256"]:
            raise ValueError(f"{target} holds another data set; remove it or choose another folder")
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in ARRAYS:
        sources = (_array(first, name), _array(second, name))
        if sources[0] is None:
            continue
        if sources[1] is None or sources[0].shape[1:] != sources[1].shape[1:]:
            raise ValueError(f"{name}.npy of {site} is missing or lies on another grid than that of {cohort}")
        _write(target / f"{name}.npy", sources[0], kept, sources[1], index)
    write_table(target, joined, config)


def _parts(rows: list[VoiRow]) -> list[VoiRow]:
    names = {name: number for number, name in enumerate(dict.fromkeys(row.patient for row in rows))}
    return [replace(row, part="train" if names[row.patient] % _VALIDATES_EACH else "val") for row in rows]


def _array(data: VoiSet, name: str) -> npt.NDArray[Any] | None:
    found: npt.NDArray[Any] | None = data.hu if name == "voi" else getattr(data, name)
    return found


def _write(path: Path, first: npt.NDArray[Any], kept: Index, second: npt.NDArray[Any], index: Index) -> None:
    shape = (len(kept) + len(index), *first.shape[1:])
    array = np.lib.format.open_memmap(path, mode="w+", dtype=first.dtype, shape=shape)
    place = 0
    for source, chosen in ((first, kept), (second, index)):
        for start in range(0, len(chosen), _CHUNK):
            part = chosen[start : start + _CHUNK]
            array[place : place + len(part)] = source[part]
            place += len(part)
    array.flush()
