"""The texture feature pool: standardised radiomic vectors of unlabeled vertebrae with how each was acquired.

    python -m train.pool SOURCE... --out runs/pool [--site NAME] [--external-site NAME...]

A source is a folder of VOIs (`train.data`) or any folder of DICOM CT, which `train.scans` turns into one first.
Patients are split by a hash of their name before anything is computed, and only those of the training part enter; an
external hospital never does. Every step resumes. The pool is one safetensors file and one JSON file, which names the
digests of the sources and of the code.

Each feature is standardised within its acquisition's stratum (`train.strata`); a stratum with too few vertebrae or
patients takes the numbers of its parent, which forgets one property after the other. Features that say nearly the same
as an earlier one are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save

import train.strata as strata_module
from osteo_daemon.network.config import MoEConfig
from train.data import VoiRow, VoiSet, digest_of, open_set
from train.radiomics import radiomic_vectors, radiomics_version
from train.scans import archive_scans
from train.strata import Acquisition, Strata, uncorrelated

Floats = npt.NDArray[np.float64]

SCHEMA: Final = "osteo-texture-pool/1"
VALUES_NAME: Final = "pool.safetensors"
TABLE_NAME: Final = "pool.json"


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """How a pool is built; ours, nothing of it is published.

    Attributes:
        minimum_rows, minimum_patients: a stratum with fewer takes its parent's numbers.
        maximum_correlation: a feature that correlates more than this with one kept before is left out.
        clip_sd: standardised values are clipped here.
        external_sites: sites that never enter, beside patients of the part ``external``.
    """

    minimum_rows: int = 30
    minimum_patients: int = 5
    maximum_correlation: float = 0.95
    clip_sd: float = 5.0
    external_sites: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """A built pool.

    Attributes:
        version: digest of sources, code and configuration.
        features: names of the features kept.
        strata: of these features.
        values: (N, F) standardised, clipped.
        rows: patient, source, row in that source, level, acquisition and stratum of each vertebra.
        clip_sd: where values are clipped.
    """

    version: str
    features: tuple[str, ...]
    strata: Strata
    values: npt.NDArray[np.float32]
    rows: tuple[dict[str, Any], ...]
    clip_sd: float

    @property
    def patients(self) -> npt.NDArray[np.str_]:
        """(N,) patient of each row."""
        return np.array([row["patient"] for row in self.rows])

    def project(
        self, values: Floats, names: Sequence[str], acquisitions: Sequence[Acquisition]
    ) -> npt.NDArray[np.float32]:
        """Other vertebrae's (M, F') raw features on this pool's scale, (M, F) clipped.

        Raises:
            ValueError: a feature of the pool is missing.
        """
        place = {name: i for i, name in enumerate(names)}
        missing = [name for name in self.features if name not in place]
        if missing:
            raise ValueError(f"the pool needs the features {', '.join(missing[:5])}")
        chosen = values[:, [place[name] for name in self.features]]
        return np.clip(self.strata.standardise(chosen, acquisitions), -self.clip_sd, self.clip_sd).astype(np.float32)

    def of_source(self, sha256: str) -> tuple[Pool, npt.NDArray[np.int64]]:
        """The vertebrae that come from one source, and their rows there.

        Raises:
            ValueError: none does.
        """
        chosen = np.array([i for i, row in enumerate(self.rows) if row["source"] == sha256], dtype=np.int64)
        if len(chosen) == 0:
            raise ValueError("the pool holds no vertebra of this data set")
        rows = tuple(self.rows[i] for i in chosen)
        part = replace(self, values=self.values[chosen], rows=rows)
        return part, np.array([row["row"] for row in rows], dtype=np.int64)

    def neighbours(self, count: int, block: int = 512) -> npt.NDArray[np.int64]:
        """(N, count) rows of other patients with the most alike vectors, the nearest first.

        Raises:
            ValueError: a row has fewer than ``count`` rows of other patients.
        """
        patients = np.unique(self.patients, return_inverse=True)[1]
        if len(patients) - np.bincount(patients).max() < count:
            raise ValueError(f"the pool has too few patients for {count} neighbours of others")
        points = torch.from_numpy(self.values)
        owner = torch.from_numpy(patients)
        found = []
        for start in range(0, len(points), block):
            distance = torch.cdist(points[start : start + block], points)
            distance[owner[start : start + block, None] == owner[None]] = torch.inf
            found.append(distance.topk(count, dim=1, largest=False).indices)
        return torch.cat(found).numpy()

    def write(self, folder: Path) -> None:
        """Write both files; the JSON file comes last and holds the digest of the other one."""
        folder.mkdir(parents=True, exist_ok=True)
        content = save(
            {
                "values": torch.from_numpy(np.ascontiguousarray(self.values)),
                "mean": torch.from_numpy(np.ascontiguousarray(self.strata.mean)),
                "sd": torch.from_numpy(np.ascontiguousarray(self.strata.sd)),
            }
        )
        document = {
            "schema": SCHEMA,
            "version": self.version,
            "sha256": hashlib.sha256(content).hexdigest(),
            "features": self.features,
            "strata": self.strata.names,
            "clip_sd": self.clip_sd,
            "rows": self.rows,
        }
        for name, data in ((VALUES_NAME, content), (TABLE_NAME, (json.dumps(document) + "\n").encode())):
            temporary = folder / f"{name}.part"
            temporary.write_bytes(data)
            temporary.replace(folder / name)


def open_pool(folder: Path) -> Pool:
    """Read a pool.

    Raises:
        FileNotFoundError: it was not finished.
        ValueError: the files do not belong together, or are of another schema.
    """
    document = json.loads((folder / TABLE_NAME).read_text())
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{folder / TABLE_NAME} has schema {document.get('schema')!r}, this version reads {SCHEMA!r}")
    content = (folder / VALUES_NAME).read_bytes()
    if hashlib.sha256(content).hexdigest() != document["sha256"]:
        raise ValueError(f"{folder / VALUES_NAME} is not what {TABLE_NAME} was written for; build the pool again")
    tensors = load(content)
    return Pool(
        document["version"],
        tuple(document["features"]),
        Strata(tuple(document["strata"]), tensors["mean"].numpy(), tensors["sd"].numpy()),
        tensors["values"].numpy(),
        tuple(document["rows"]),
        float(document["clip_sd"]),
    )


def build_pool(
    sources: Sequence[Path], folder: Path, network: MoEConfig | None = None, config: PoolConfig | None = None
) -> Pool:
    """Build a pool from folders of VOIs, or read the one in ``folder`` when it follows from the same.

    Raises:
        ValueError: no vertebra of the training part was found.
    """
    network = MoEConfig() if network is None else network
    config = PoolConfig() if config is None else config
    sets = [open_set(source) for source in sources]
    version = digest_of(
        {
            "sources": [data.config["sha256"] for data in sets],
            "code": [
                hashlib.sha256(Path(str(file)).read_bytes()).hexdigest() for file in (__file__, strata_module.__file__)
            ],
            "radiomics": radiomics_version(),
            "grid": [network.voi_shape, network.voi_spacing_mm],
            "config": asdict(config),
        }
    )
    if (folder / TABLE_NAME).exists():
        pool = open_pool(folder)
        if pool.version == version:
            return pool
    found = list(_vectors(sets, network, config, folder / "parts"))
    members = [member for _, chunk, _ in found for member in chunk]
    if not members:
        raise ValueError("no source holds a vertebra of the training part")
    names = found[0][2]
    raw = np.concatenate([values for values, _, _ in found])
    acquisitions = [Acquisition.of(row) for _, _, row in members]
    patients = [row.patient for _, _, row in members]
    everything = Strata.fit(raw, acquisitions, patients, config.minimum_rows, config.minimum_patients)
    kept = uncorrelated(everything.standardise(raw, acquisitions), config.maximum_correlation)
    strata = Strata(everything.names, everything.mean[:, kept], everything.sd[:, kept])
    values = np.clip(strata.standardise(raw[:, kept], acquisitions), -config.clip_sd, config.clip_sd)
    rows = tuple(
        {
            "patient": row.patient,
            "source": source,
            "row": number,
            "level": row.level,
            "acquisition": asdict(acquisition),
            "stratum": strata.names[strata.stratum_of(acquisition)],
        }
        for (source, number, row), acquisition in zip(members, acquisitions, strict=True)
    )
    pool = Pool(version, tuple(names[i] for i in kept), strata, values.astype(np.float32), rows, config.clip_sd)
    pool.write(folder)
    return pool


def _vectors(
    sets: Sequence[VoiSet], network: MoEConfig, config: PoolConfig, folder: Path
) -> Iterator[tuple[Floats, list[tuple[str, int, VoiRow]], tuple[str, ...]]]:
    """Raw features of each source's training rows, with (digest of the source, row, VoiRow) of each."""
    for data in sets:
        chosen = np.array(
            [i for i in data.indices("train") if data.rows[i].site not in config.external_sites], dtype=np.int64
        )
        if len(chosen):
            values, names = radiomic_vectors(data, network, folder, chosen)
            yield values, [(data.config["sha256"], int(i), data.rows[i]) for i in chosen], names


def main() -> None:
    """Command line of ``python -m train.pool``."""
    parser = argparse.ArgumentParser(description="build a texture feature pool")
    parser.add_argument("sources", type=Path, nargs="+", help="folders of VOIs or of DICOM CT")
    parser.add_argument("--out", type=Path, default=Path("runs/pool"))
    parser.add_argument("--site", default="site", help="name of the site that DICOM sources come from")
    parser.add_argument("--external-site", action="append", default=[], help="a site that never enters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    config = PoolConfig(external_sites=tuple(given.external_site))
    folders = []
    for source in given.sources:
        if not (source / "table.json").exists():
            archive = given.out / "scans" / hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]
            external = given.site in config.external_sites
            archive_scans(
                source, archive, given.site, external=external, device=torch.device(given.device), key_folder=given.out
            )
            source = archive
        folders.append(source)
    pool = build_pool(folders, given.out, config=config)
    counts: dict[str, int] = {}
    for row in pool.rows:
        counts[row["stratum"]] = counts.get(row["stratum"], 0) + 1
    print(
        json.dumps(
            {
                "version": pool.version,
                "vertebrae": len(pool.rows),
                "patients": len(set(pool.patients)),
                "features": len(pool.features),
                "strata": counts,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
