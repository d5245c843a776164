"""One archived study as a file: safetensors with a JSON document in its header, so that both appear and go as one."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from osteo_daemon.errors import Damaged
from osteo_daemon.imaging.preprocess import SUPINE_AXES_LPS, VoiSpec, extract_voi
from osteo_daemon.imaging.volume import CtVolume

SCHEMA: Final = "osteo-vois/1"
MARGIN_VOXELS: Final = 4
"""Kept around the network's grid on every side: room for a random shift in training, and for another grid."""

Int16Array = npt.NDArray[np.int16]

_TENSOR: Final = "hu"
_DOCUMENT: Final = "osteo"
_LENGTH_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Acquisition:
    """How a study was acquired and of whom, without anything that tells who it was.

    Attributes:
        manufacturer, model: of the scanner, in capitals; empty when not told.
        kernel: its name as the header gives it; ``kernel_class`` is ``soft``, ``sharp`` or ``unknown``.
        kvp, thickness_mm: None where the header does not say.
        phase: of the contrast agent, as measured in the image.
        age_years, sex: of the patient at the CT, None where the header does not say.
        source: bundle that found the vertebrae, with its version.
    """

    manufacturer: str
    model: str
    kernel: str
    kernel_class: str
    kvp: float | None
    thickness_mm: float | None
    spacing_mm: tuple[float, float, float]
    phase: str
    age_years: int | None
    sex: str | None
    source: str


@dataclass(frozen=True, slots=True)
class VertebraRecord:
    """One vertebra beside its voxels.

    Attributes:
        level: ``T12`` to ``L5``.
        coverage: share of the network's grid inside the scan.
        confidence: of the localizer.
        blocked: a blocking flag stands on it.
        flags: codes of docs/report.md.
        features: measured numbers by name (mean_hu, median_hu, sd_hu, volume_mm3, corrected_hu, height_..._mm, ...).
    """

    level: str
    coverage: float
    confidence: float
    blocked: bool
    flags: tuple[str, ...]
    features: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class StudyVois:
    """A study's vertebrae.

    Attributes:
        hu: (N, D, H, W) int16 HU on grids of ``spacing_mm`` along the caudal, posterior and left axes of each vertebra:
            the grid that the network saw and `MARGIN_VOXELS` more on every side.
        spacing_mm: isotropic.
        order: of the spline that made the grid.
        vertebrae: N, cranial to caudal.
        flags: codes of the study's own quality flags.
    """

    hu: Int16Array
    spacing_mm: float
    order: int
    acquisition: Acquisition
    vertebrae: tuple[VertebraRecord, ...]
    flags: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """The file."""
        document = {
            "schema": SCHEMA,
            "spacing_mm": self.spacing_mm,
            "order": self.order,
            "acquisition": asdict(self.acquisition),
            "vertebrae": [{**asdict(entry), "features": dict(entry.features)} for entry in self.vertebrae],
            "flags": list(self.flags),
        }
        text = json.dumps(document, sort_keys=True, allow_nan=False)
        return bytes(save({_TENSOR: np.ascontiguousarray(self.hu)}, {_DOCUMENT: text}))

    @classmethod
    def from_bytes(cls, data: bytes) -> StudyVois:
        """Read a file.

        Raises:
            Damaged: it is not one of ours.
        """
        try:
            hu = load(data)[_TENSOR]
            (length,) = struct.unpack_from("<Q", data)
            header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
            document: dict[str, Any] = json.loads(header["__metadata__"][_DOCUMENT])
            if document["schema"] != SCHEMA or hu.dtype != np.int16 or hu.ndim != 4:
                raise Damaged("an archived study of another schema")
            about = document["acquisition"]
            read = cls(
                hu,
                float(document["spacing_mm"]),
                int(document["order"]),
                Acquisition(**{**about, "spacing_mm": tuple(about["spacing_mm"])}),
                tuple(VertebraRecord(**{**v, "flags": tuple(v["flags"])}) for v in document["vertebrae"]),
                tuple(document["flags"]),
            )
        except (SafetensorError, struct.error, ValueError, KeyError, TypeError) as error:
            raise Damaged("an archived study cannot be read") from error
        if len(read.vertebrae) != len(hu):
            raise Damaged("an archived study has other voxels than vertebrae")
        return read

    def on_grid(self, index: int, spec: VoiSpec, margin: int = MARGIN_VOXELS) -> Int16Array:
        """One vertebra on the grid of ``spec`` and ``margin`` voxels more on every side, int16 HU.

        On the grid that it was archived with, these are the very voxels; onto another one they are resampled, and what
        lies beyond the archived block repeats its edge.
        """
        stored = self.hu[index]
        shape = tuple(n + 2 * margin for n in spec.shape)
        if spec.spacing_mm == self.spacing_mm and all(a >= b for a, b in zip(stored.shape, shape, strict=True)):
            start = [(a - b) // 2 for a, b in zip(stored.shape, shape, strict=True)]
            same: Int16Array = stored[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
            return same
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(SUPINE_AXES_LPS).T * self.spacing_mm
        block = CtVolume(stored.astype(np.float32), affine)
        centre = block.to_lps((np.asarray(stored.shape) - 1) / 2)
        wider = VoiSpec(_three(shape), spec.spacing_mm, spec.interpolation_order)
        return to_int16(extract_voi(block, centre, SUPINE_AXES_LPS, wider).hu)


def to_int16(hu: npt.NDArray[np.float32]) -> Int16Array:
    """HU to the nearest whole number; `extract_voi` keeps them within 12 bits."""
    return np.rint(hu).astype(np.int16)


def _three(values: tuple[int, ...]) -> tuple[int, int, int]:
    first, second, third = values
    return first, second, third
