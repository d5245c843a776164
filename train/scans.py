"""From any folder of CT to a folder of VOIs without labels: vertebrae located, resampled, with how they were acquired.

Each study goes the daemon's own way: its best series is chosen, decoded and located with the shipped localiser.
Vertebrae whose name is in doubt, whose region is blocked (metal, cement, cut off) or that the scan hardly covers stay
out. Patients get names by a keyed hash; the key lies beside the archive, readable for its user alone, so that a later
call gives the same patient the same name and the same part.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from pydicom.dataset import Dataset
from tqdm import tqdm

from osteo_daemon.domain.findings import Severity
from osteo_daemon.errors import Damaged, NotEligible
from osteo_daemon.imaging.decoding import read_volume
from osteo_daemon.imaging.preprocess import VoiSpec, extract_voi
from osteo_daemon.imaging.selection import refusal, select_series
from osteo_daemon.imaging.slices import Stack, ct_slices, read_headers
from osteo_daemon.inference.bundle import find_bundle
from osteo_daemon.inference.contrast import measure_enhancement
from osteo_daemon.inference.density import measure
from osteo_daemon.inference.localize import SpineLocalizer
from osteo_daemon.inference.patient import Patient
from osteo_daemon.inference.quality import tube_voltage
from osteo_daemon.inference.vertebra_network import MINIMUM_COVERAGE
from osteo_daemon.network.config import MoEConfig
from train.data import MARGIN_VOXELS, NO_LABEL, VoiRow, digest_of, write_table
from train.splits import part_of

KEY_NAME: Final = "patients.key"
_KEY_BYTES: Final = 32
_STUDIES: Final = "studies"
_EXTRA: Final = 2 * MARGIN_VOXELS


def archive_scans(
    source: Path,
    folder: Path,
    site: str,
    *,
    external: bool = False,
    device: torch.device | None = None,
    network: MoEConfig | None = None,
    key_folder: Path | None = None,
) -> int:
    """Write the vertebrae of every study below ``source`` into ``folder``; goes on where an earlier call stopped.

    Args:
        site: named in every row.
        external: all of it is an external hospital's.
        network: whose grid the VOIs hold, with a margin.
        key_folder: where the key of the patients' names lies; archives with one key agree on names. None is ``folder``.

    Returns:
        The number of vertebrae.
    """
    network = MoEConfig() if network is None else network
    shape = (network.voi_shape[0], network.voi_shape[1], network.voi_shape[2])
    spec = VoiSpec((shape[0] + _EXTRA, shape[1] + _EXTRA, shape[2] + _EXTRA), network.voi_spacing_mm)
    (folder / _STUDIES).mkdir(parents=True, exist_ok=True)
    secret = _secret(folder if key_folder is None else key_folder)
    headers, _ = read_headers(sorted(path for path in source.rglob("*") if path.is_file()))
    studies: dict[str, list[tuple[Path, Dataset]]] = {}
    for path, header in headers:
        studies.setdefault(str(header.get("StudyInstanceUID") or ""), []).append((path, header))
    bundle = find_bundle("spine-localizer")
    localizer: SpineLocalizer | None = None
    names = []
    for _, study in tqdm(sorted(studies.items()), desc="scans", unit="study"):
        instances = sorted(str(header.get("SOPInstanceUID") or "") for _, header in study)
        name = _keyed(secret, "\n".join([bundle.sha256, repr(spec), site, str(external), *instances]))
        names.append(name)
        if (folder / _STUDIES / f"{name}.json").exists():
            continue
        if localizer is None:
            localizer = SpineLocalizer.from_bundle(bundle, device or torch.device("cpu"))
        try:
            rows, vois = _study(study, localizer, spec, network, secret, site, external)
            reason = None
        except NotEligible as error:
            rows, vois, reason = [], np.zeros((0, *spec.shape), dtype=np.int16), error.code
        except Damaged as error:
            rows, vois, reason = [], np.zeros((0, *spec.shape), dtype=np.int16), type(error).__name__
        with (folder / _STUDIES / f"{name}.npy").open("wb") as stream:
            np.save(stream, vois)
        temporary = folder / _STUDIES / f"{name}.part"
        temporary.write_text(json.dumps({"rows": [asdict(row) for row in rows], "left_out": reason}))
        temporary.replace(folder / _STUDIES / f"{name}.json")
    return _assemble(folder, names, spec, network, bundle.sha256)


def _study(
    study: Sequence[tuple[Path, Dataset]],
    localizer: SpineLocalizer,
    spec: VoiSpec,
    network: MoEConfig,
    secret: bytes,
    site: str,
    external: bool,
) -> tuple[list[VoiRow], npt.NDArray[np.int16]]:
    """Rows and (N, D, H, W) int16 HU of one study.

    Raises:
        NotEligible: no series can be used, or it shows no lumbar spine.
        Damaged: its pixels cannot be read.
    """
    candidates, rejections = select_series(ct_slices(study))
    if not candidates:
        raise refusal(rejections)
    stack = candidates[0].stack
    volume = read_volume(stack)
    vertebrae = localizer(volume).vertebrae
    phase = measure_enhancement(volume, vertebrae).phase.value
    patient = Patient.of(stack.header)
    owner = str(stack.header.get("PatientID") or stack.header.get("StudyInstanceUID") or "")
    name = f"scan-{_keyed(secret, owner)}"
    rows, vois = [], []
    for vertebra in vertebrae:
        if vertebra.level not in network.levels or not vertebra.level_certain:
            continue
        flags = (*vertebra.flags, *measure(volume, vertebra.body_region, vertebra.axes_lps).quality_flags)
        if any(flag.severity is Severity.BLOCKING for flag in flags):
            continue
        voi = extract_voi(volume, vertebra.centre_lps_mm, vertebra.axes_lps, spec)
        if voi.coverage < MINIMUM_COVERAGE:
            continue
        vois.append(np.rint(np.clip(voi.hu, -1024, 3071)).astype(np.int16))
        rows.append(
            VoiRow(
                patient=name,
                part=part_of(name, external),
                site=site,
                device="",
                level=vertebra.level,
                age_years=patient.age_years or 0,
                sex=patient.sex or "",
                kvp=tube_voltage(stack.header) or 0.0,
                thickness_mm=_thickness_mm(stack),
                kernel=str(stack.header.get("ConvolutionKernel") or "").strip().upper(),
                phase=phase,
                density_mg_cm3=float("nan"),
                sbmd_g_cm2=None,
                reading_g_cm2=None,
                target_sbmd_g_cm2=None,
                diagnosis=NO_LABEL,
                true_diagnosis=NO_LABEL,
                vendor=str(stack.header.get("Manufacturer") or "").strip().upper(),
            )
        )
    return rows, np.stack(vois) if vois else np.zeros((0, *spec.shape), dtype=np.int16)


def _thickness_mm(stack: Stack) -> float:
    """Slice thickness as the header says it, else the distance of slices."""
    try:
        thickness = float(stack.header.get("SliceThickness") or 0.0)
    except (TypeError, ValueError):
        thickness = 0.0
    return thickness if thickness > 0 else stack.spacing_mm


def _assemble(folder: Path, names: Sequence[str], spec: VoiSpec, network: MoEConfig, bundle_sha256: str) -> int:
    """All studies' rows and voxels as one data set; nothing is written when it stands already."""
    documents = [json.loads((folder / _STUDIES / f"{name}.json").read_text()) for name in names]
    rows = [VoiRow(**row) for document in documents for row in document["rows"]]
    config: dict[str, Any] = {
        "kind": "scans",
        "levels": list(network.levels),
        "voi_shape": list(network.voi_shape),
        "voi_spacing_mm": network.voi_spacing_mm,
        "localizer_sha256": bundle_sha256,
        "studies": sorted(names),
        "left_out": {name: d["left_out"] for name, d in zip(names, documents, strict=True) if d["left_out"]},
    }
    config["sha256"] = digest_of(config)
    table = folder / "table.json"
    if table.exists() and json.loads(table.read_text())["config"] == config:
        return len(rows)
    table.unlink(missing_ok=True)
    voxels = np.lib.format.open_memmap(folder / "voi.npy", mode="w+", dtype=np.int16, shape=(len(rows), *spec.shape))
    start = 0
    for name in names:
        part = np.load(folder / _STUDIES / f"{name}.npy", allow_pickle=False)
        voxels[start : start + len(part)] = part
        start += len(part)
    voxels.flush()
    write_table(folder, rows, config)
    return len(rows)


def _keyed(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:24]


def _secret(folder: Path) -> bytes:
    """The key of the patients' names, made at its first use."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / KEY_NAME
    if not path.exists():
        temporary = path.with_suffix(".part")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(os.urandom(_KEY_BYTES))
        temporary.replace(path)
    return path.read_bytes()
