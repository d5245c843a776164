"""A cohort on a coarser grid, for ablations that have to be many: ``python -m train.shrink``.

The same patients, scans and readings; only the VOI's grid changes. Smoothing before sampling is that of
`osteo_daemon.imaging.preprocess.extract_voi`.
"""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from tqdm import tqdm

from train.cohort import ARRAYS

STORED_SHAPE: Final = (28, 36, 42)
NETWORK_SHAPE: Final = (24, 32, 40)
SPACING_MM: Final = 1.5
_CHUNK: Final = 48


def shrink(voxels: npt.NDArray[np.float32], factor: float, shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """(D, H, W) voxels on a grid of the same centre that is ``factor`` times coarser, by linear interpolation."""
    smooth = ndimage.gaussian_filter(voxels, 0.5 * math.sqrt(factor**2 - 1.0), mode="nearest", truncate=3.0)
    offset = [(n - 1) / 2.0 - factor * (m - 1) / 2.0 for n, m in zip(voxels.shape, shape, strict=True)]
    return np.asarray(
        ndimage.affine_transform(
            smooth, np.full(3, factor), offset=offset, output_shape=shape, order=1, mode="nearest", output=np.float32
        )
    )


def _chunk(source: Path, key: str, start: int, stop: int, factor: float) -> npt.NDArray[np.float32]:
    voxels = np.load(source / f"{key}.npy", mmap_mode="r", allow_pickle=False)
    return np.stack([shrink(voxels[i].astype(np.float32), factor, STORED_SHAPE) for i in range(start, stop)])


def shrink_cohort(source: Path, target: Path, workers: int = 2) -> None:
    """Write the cohort in ``source`` on the coarser grid into ``target``; does nothing when it is there.

    Raises:
        ValueError: ``target`` holds another cohort.
    """
    document = json.loads((source / "table.json").read_text())
    factor = SPACING_MM / float(document["config"]["voi_spacing_mm"])
    document["config"] |= {"voi_shape": list(NETWORK_SHAPE), "voi_spacing_mm": SPACING_MM}
    table = target / "table.json"
    if table.exists():
        if json.loads(table.read_text())["config"]["sha256"] != document["config"]["sha256"]:
            raise ValueError(f"{target} holds another cohort; remove it or choose another folder")
        return
    target.mkdir(parents=True, exist_ok=True)
    count = len(document["rows"])
    files = {
        key: np.lib.format.open_memmap(target / f"{key}.npy", mode="w+", dtype=kind, shape=(count, *STORED_SHAPE))
        for key, kind in ARRAYS.items()
    }
    todo = [(key, start, min(start + _CHUNK, count)) for key in ARRAYS for start in range(0, count, _CHUNK)]
    with ProcessPoolExecutor(workers) as pool:
        chunks = pool.map(_chunk, *zip(*((source, *job, factor) for job in todo), strict=True))
        for (key, start, stop), found in zip(todo, tqdm(chunks, total=len(todo), desc="shrink"), strict=True):
            files[key][start:stop] = np.rint(found)
    for array in files.values():
        array.flush()
    temporary = target / "table.json.part"
    temporary.write_text(json.dumps(document))
    temporary.replace(table)


def main() -> None:
    """Command line of ``python -m train.shrink``."""
    parser = argparse.ArgumentParser(description="a cohort on a coarser grid")
    parser.add_argument("--data", type=Path, default=Path("runs/cohort"))
    parser.add_argument("--out", type=Path, default=Path("runs/cohort-small"))
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    shrink_cohort(given.data, given.out, given.workers)


if __name__ == "__main__":
    main()
