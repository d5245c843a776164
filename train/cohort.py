"""A virtual multi-site cohort: patients, their scans and their densitometry, with the truth known.

    python -m train.cohort --out runs/cohort

renders what ``train/cohort.json`` says: that file was committed with its digest before anything was trained on it. It
makes ``voi.npy``, ``core.npy``, their coarse versions and ``table.json`` (`train.data`) and resumes after a stop. Every
patient follows from (seed, number) alone, so the number of workers and of stops changes nothing.

Three sites have their own scanners and densitometer makers. With one maker a site, maker and population are
confounded, as they are in reality; only truth, which a real site doesn't have, can separate them. The external hospital
has a scanner and a maker that no training patient saw; it carries no training target. Most training patients were never
measured at all.

Patients differ in body shape, shell and texture beyond what density and age explain (`Spread`): else a network could
read density off the shell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from tqdm import tqdm

import osteo_daemon.phantom
from osteo_daemon.network.config import MoEConfig
from osteo_daemon.phantom.acquire import blur_voi
from osteo_daemon.phantom.labels import body_mask, core_mask
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner
from osteo_daemon.phantom.spine import build_spine
from osteo_daemon.phantom.study import PhantomVoi, render_voi
from train import truth
from train.data import CORE_SCALE, MARGIN_VOXELS, NO_LABEL, VoiRow, digest_of, write_table
from train.readings import Densitometry, measure
from train.rescan import draw_lattice, rescan
from train.sites import SITES, Site, Spread, makers_of_sites
from train.splits import part_of
from train.truth import MAKERS, diagnosis, draw_density_mg_cm3, draw_truth, t_score

CONFIGURATION: Final = Path(__file__).with_name("cohort.json")
UNSEEN_MAKER: Final = "Unseen"


def phantom_sha256() -> str:
    """Digest of the phantom's source: a cohort is what this code draws, so its name holds the code's."""
    digest = hashlib.sha256()
    for path in sorted(Path(osteo_daemon.phantom.__path__[0]).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class CohortConfig:
    """What the cohort is drawn from; its digest names it.

    Attributes:
        patients: number of patients.
        external_share: of them from the external hospital.
        seed: of the cohort.
        age_years: drawn evenly.
        female_share: of the patients.
        coarse_share: scans kept by an archive at 2-3 mm in plane.
        levels: rendered for each patient.
        shift_mm, turn_deg: SD of the localiser's error.
        voi_shape, voi_spacing_mm: of the network; `MARGIN_VOXELS` are added on each side.
        spread: of body shape, shell, texture and soft tissue.
        densitometry: who has a reading, from which machine.
    """

    patients: int = 1200
    external_share: float = 0.28
    seed: int = 20263
    age_years: tuple[int, int] = (30, 90)
    female_share: float = 0.6
    coarse_share: float = 0.1
    levels: tuple[str, ...] = ("T12", "L1", "L2", "L3", "L4", "L5")
    shift_mm: float = 1.5
    turn_deg: float = 3.0
    voi_shape: tuple[int, int, int] = field(default_factory=lambda: MoEConfig().voi_shape)
    voi_spacing_mm: float = field(default_factory=lambda: MoEConfig().voi_spacing_mm)
    spread: Spread = field(default_factory=Spread)
    densitometry: Densitometry = field(default_factory=Densitometry)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the sites and every constant of the truth, for the digest and the table."""
        values = {
            **asdict(self),
            "sites": [asdict(site) for site in SITES],
            "makers": list(MAKERS),
            "truth": {name: value for name, value in sorted(vars(truth).items()) if name.lstrip("_").isupper()},
            "phantom_sha256": phantom_sha256(),
        }
        return dict(json.loads(json.dumps(values)))

    @classmethod
    def read(cls, path: Path = CONFIGURATION, **changes: Any) -> CohortConfig:
        """The committed configuration, with ``changes`` for a smaller trial.

        Raises:
            ValueError: its digest isn't that of its values.
        """
        document = json.loads(path.read_text())
        values = document["cohort"]
        if digest_of(values) != document["sha256"]:
            raise ValueError(f"{path.name} was changed after its digest was written")
        own = {name: values[name] for name in cls.__dataclass_fields__}
        own["spread"], own["densitometry"] = Spread(**own["spread"]), Densitometry(**own["densitometry"])
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
        return cls(**{**plain, **changes})

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of a stored VOI, margin included."""
        d, h, w = (n + 2 * MARGIN_VOXELS for n in self.voi_shape)
        return d, h, w


def draw_patient(config: CohortConfig, number: int) -> tuple[VirtualPatient, Scanner, Site]:
    """Patient ``number`` of the cohort with the scan and the site."""
    rng = np.random.default_rng([config.seed, number, 1])
    external = rng.random() < config.external_share
    site = SITES[-1] if external else SITES[int(rng.integers(len(SITES) - 1))]
    sex: Any = "F" if rng.random() < config.female_share else "M"
    age = int(rng.integers(config.age_years[0], config.age_years[1] + 1))
    osteophytes = float(np.clip(rng.normal(0.2 + 0.006 * (age - 50), 0.18), 0.0, 1.0))
    patient = VirtualPatient(
        seed=int(rng.integers(2**40)),
        age_years=age,
        sex=sex,
        density_mg_cm3=draw_density_mg_cm3(rng, age),
        stature_cm=float(rng.normal(162.0 if sex == "F" else 176.0, 7.0)),
        bmi_kg_m2=float(np.clip(rng.normal(26.5, 4.5), 18.0, 42.0)),
        sacral_slope_deg=float(rng.normal(38.0, 6.0)),
        lordosis_deg=float(rng.normal(48.0, 8.0)),
        scoliosis_deg=float(rng.normal(0.0, 4.0)),
        osteophytes=osteophytes,
        disc_degeneration=float(np.clip(rng.normal((age - 30) / 75.0, 0.2), 0.0, 0.9)),
        constitution=config.spread.draw(np.random.default_rng([config.seed, number, 4])),
    )
    coarse = rng.random() < config.coarse_share
    scanner = Scanner(
        kvp=float(rng.choice(site.kvp)),
        kernel=site.kernels[int(rng.integers(len(site.kernels)))],
        phase=site.phases[int(rng.integers(len(site.phases)))],
        noise_hu=float(rng.uniform(*site.noise_hu)),
        slice_thickness_mm=3.0 if coarse else float(rng.uniform(*site.thickness_mm)),
        pixel_spacing_mm=float(rng.uniform(2.0, 3.0)) if coarse else float(rng.uniform(*site.pixel_mm)),
        hu_offset=site.hu_offset,
        seed=int(rng.integers(2**31)),
    )
    return patient, scanner, site


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """One patient: rows without readings, and (L, D, H, W) arrays in their order.

    Attributes:
        rows: truth and acquisition.
        arrays: by the name of the file they go to: int16 HU or uint8 share of trabecular bone times `CORE_SCALE`.
    """

    rows: list[VoiRow]
    arrays: dict[str, npt.NDArray[Any]]


ARRAYS: Final = {"voi": np.int16, "core": np.uint8, "coarse": np.int16, "coarse_core": np.uint8}


def make_patient(config: CohortConfig, number: int) -> Rendered:
    """Scan one patient."""
    patient, scanner, site = draw_patient(config, number)
    spine = build_spine(patient)
    measured = tuple(truth.LEVEL_OFFSET_G_CM2)
    labels = draw_truth(
        np.random.default_rng([config.seed, number, 2]),
        age_years=patient.age_years,
        sex=patient.sex,
        osteophytes=patient.osteophytes,
        density_mg_cm3={level: spine[level].trabecular_mg_cm3 for level in measured},
        depth_mm={level: spine[level].depth for level in measured},
    )
    name = f"virtual-{config.seed}-{number:05d}"
    rows: list[VoiRow] = []
    arrays = {key: np.empty((len(config.levels), *config.stored_shape), dtype=kind) for key, kind in ARRAYS.items()}
    for i, level in enumerate(config.levels):
        voi = render_voi(
            patient,
            level,
            scanner,
            config.stored_shape,
            config.voi_spacing_mm,
            np.random.default_rng([config.seed, number, 3, i]),
            shift_mm=config.shift_mm,
            turn_deg=config.turn_deg,
        )
        # the phantom's first axis runs cranially, the network's caudally
        hu = np.ascontiguousarray(np.clip(voi.voxels[::-1], -1024, 3071), dtype=np.float32)
        core = np.ascontiguousarray(trabecular_share(voi, scanner, config.voi_spacing_mm)[::-1])
        lattice = draw_lattice(np.random.default_rng([config.seed, number, 5, i]), config.voi_spacing_mm)
        arrays["voi"][i] = np.rint(hu)
        arrays["core"][i] = np.rint(core * CORE_SCALE)
        arrays["coarse"][i] = np.rint(rescan(hu, lattice, config.voi_spacing_mm))
        arrays["coarse_core"][i] = np.rint(rescan(core, lattice, config.voi_spacing_mm) * CORE_SCALE)
        found = labels.get(level)
        rows.append(
            VoiRow(
                patient=name,
                part=part_of(name, site.maker is None),
                site=site.name,
                device=site.maker or UNSEEN_MAKER,
                level=level,
                age_years=patient.age_years,
                sex=patient.sex,
                kvp=scanner.kvp,
                thickness_mm=scanner.slice_thickness_mm,
                kernel=scanner.kernel,
                phase=scanner.phase,
                density_mg_cm3=spine[level].trabecular_mg_cm3,
                sbmd_g_cm2=None if found is None else found.sbmd_g_cm2,
                reading_g_cm2=None,
                target_sbmd_g_cm2=None,
                diagnosis=NO_LABEL,
                true_diagnosis=NO_LABEL if found is None else diagnosis(t_score(found.sbmd_g_cm2, level)),
                visible_g_cm2=None if found is None else found.visible_g_cm2,
            )
        )
    return Rendered(rows, arrays)


def trabecular_share(voi: PhantomVoi, scanner: Scanner, spacing_mm: float) -> npt.NDArray[np.float32]:
    """(D, H, W) share of trabecular bone in each voxel as the scanner sees it, 0 to 1.

    The true core begins 3 mm under the surface; bone of nearly its density reaches 1 mm further.
    """
    level = voi.vertebra.level
    inside = core_mask(voi.labels, level)
    grown = ndimage.binary_dilation(
        inside, iterations=max(1, round(1.0 / spacing_mm)), mask=body_mask(voi.labels, level)
    )
    seen = blur_voi(grown.astype(np.float32), scanner, spacing_mm, voi.vertebra.axes)
    return np.asarray(np.clip(seen, 0.0, 1.2), dtype=np.float32)


def make_cohort(config: CohortConfig, folder: Path, workers: int = 2) -> None:
    """Render the cohort into ``folder``; goes on where an earlier call with the same configuration stopped.

    Raises:
        ValueError: the folder holds another cohort.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = {**config.to_json(), "sha256": digest_of(config.to_json())}
    stamp = folder / "config.json"
    if stamp.exists() and json.loads(stamp.read_text()) != document:
        raise ValueError(f"{folder} holds another cohort; remove it or choose another folder")
    stamp.write_text(json.dumps(document, indent=1))
    if (folder / "table.json").exists():
        return
    count = len(config.levels)
    shape = (config.patients * count, *config.stored_shape)
    files = {}
    for key, kind in ARRAYS.items():
        path = folder / f"{key}.npy"
        if path.exists():
            files[key] = np.lib.format.open_memmap(path, mode="r+")
        else:
            files[key] = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
    parts = folder / "rows"
    parts.mkdir(exist_ok=True)
    todo = [n for n in range(config.patients) if not (parts / f"{n}.json").exists()]
    with ProcessPoolExecutor(max_workers=workers, initializer=_one_thread) as pool:
        bar = tqdm(
            total=config.patients, initial=config.patients - len(todo), unit="patient", desc="cohort", mininterval=5
        )
        for number, done in zip(todo, pool.map(make_patient, [config] * len(todo), todo), strict=True):
            for key, array in done.arrays.items():
                files[key][number * count : (number + 1) * count] = array
            temporary = parts / f"{number}.part"
            temporary.write_text(json.dumps([asdict(row) for row in done.rows]))
            temporary.replace(parts / f"{number}.json")
            bar.update()
        bar.close()
    for array in files.values():
        array.flush()
    rows = [VoiRow(**row) for n in range(config.patients) for row in json.loads((parts / f"{n}.json").read_text())]
    write_table(folder, measure(rows, config.densitometry, makers_of_sites()), document)


def _one_thread() -> None:
    """Workers share the cores: none of them may start threads of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"


def main() -> None:
    """Command line of ``python -m train.cohort``."""
    parser = argparse.ArgumentParser(description="make a virtual multi-site cohort")
    parser.add_argument("--out", type=Path, default=Path("runs/cohort"))
    parser.add_argument("--patients", type=int, help="another number than the committed one, for a trial")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    changes = {} if given.patients is None else {"patients": given.patients}
    make_cohort(CohortConfig.read(**changes), given.out, given.workers)


if __name__ == "__main__":
    main()
