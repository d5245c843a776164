"""One CT in every transfer syntax with an encoder at hand: DCMTK's, OpenJPH's and those of pydicom's plugins."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from tests.conftest import require_command
from tests.fakes import dcmtk

Encoder = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Syntax:
    """A transfer syntax, how a file gets it, and how far its HU may then be off.

    Attributes:
        option: of DCMTK's storescu, to propose it; empty where that does not know it.
        tolerance_hu: 0 for a lossless one.
    """

    uid: UID
    encode: Encoder
    option: str
    tolerance_hu: float = 0.0


def _by_dcmtk(program: str, *options: str) -> Encoder:
    def encode(source: Path, target: Path) -> None:
        subprocess.run([dcmtk(program), *options, source, target], check=True, capture_output=True, timeout=60)

    return encode


def _by_pydicom(uid: UID, **options: object) -> Encoder:
    def encode(source: Path, target: Path) -> None:
        dataset = dcmread(source)
        dataset.compress(uid, generate_instance_uid=False, **options)
        dataset.save_as(target)

    return encode


def _by_openjph(uid: UID, *options: str) -> Encoder:
    def encode(source: Path, target: Path) -> None:
        dataset = dcmread(source)
        dataset.PixelData = encapsulate([high_throughput(dataset, target.parent, *options)])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = uid
        dataset.save_as(target)

    return encode


def high_throughput(dataset: Dataset, folder: Path, *options: str) -> bytes:
    """The frame of an unsigned image as an HTJ2K code stream."""
    raw, coded = folder / "frame.pgm", folder / "frame.j2c"
    pixels = dataset.pixel_array
    head = f"P5\n{pixels.shape[1]} {pixels.shape[0]}\n{2**dataset.BitsStored - 1}\n"
    raw.write_bytes(head.encode() + pixels.astype(">u2").tobytes())
    command = [require_command("ojph_compress"), "-i", raw, "-o", coded, *options]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return coded.read_bytes()


SYNTAXES: Sequence[Syntax] = (
    Syntax(ImplicitVRLittleEndian, _by_dcmtk("dcmconv", "+ti"), "-xi"),
    Syntax(ExplicitVRLittleEndian, _by_dcmtk("dcmconv", "+te"), "-xe"),
    Syntax(ExplicitVRBigEndian, _by_dcmtk("dcmconv", "+tb"), "-xb"),
    Syntax(DeflatedExplicitVRLittleEndian, _by_dcmtk("dcmconv", "+td"), "-xd"),
    Syntax(RLELossless, _by_dcmtk("dcmcrle"), "-xr"),
    Syntax(JPEGLosslessSV1, _by_dcmtk("dcmcjpeg", "+e1"), "-xs"),
    Syntax(JPEGLossless, _by_dcmtk("dcmcjpeg", "+el"), ""),
    Syntax(JPEGBaseline8Bit, _by_dcmtk("dcmcjpeg", "+eb", "+q", "95"), "-xy", tolerance_hu=25.0),
    Syntax(JPEGExtended12Bit, _by_dcmtk("dcmcjpeg", "+ee", "+q", "95"), "-xx", tolerance_hu=12.0),
    Syntax(JPEGLSLossless, _by_dcmtk("dcmcjpls"), "-xt"),
    Syntax(JPEGLSNearLossless, _by_dcmtk("dcmcjpls", "+en", "+md", "2"), "-xu", tolerance_hu=2.0),
    Syntax(JPEG2000Lossless, _by_pydicom(JPEG2000Lossless), "-xv"),
    Syntax(JPEG2000, _by_pydicom(JPEG2000, j2k_cr=[4]), "-xw", tolerance_hu=12.0),
    Syntax(HTJ2KLossless, _by_openjph(HTJ2KLossless, "-reversible", "true", "-prog_order", "LRCP"), ""),
    Syntax(HTJ2KLosslessRPCL, _by_openjph(HTJ2KLosslessRPCL, "-reversible", "true"), ""),
    Syntax(HTJ2K, _by_openjph(HTJ2K, "-qstep", "0.0005"), "", tolerance_hu=6.0),
)


def torso(count: int, size: int) -> npt.NDArray[np.int64]:
    """(count, size, size) HU: a body in air with a vertebra and noise, changing from slice to slice."""
    generator = np.random.default_rng(7)
    d, h, w = np.mgrid[:count, :size, :size].astype(np.float64)
    x, y = (w - size / 2) / size, (h - size / 2) / size
    voxels = np.where((x / 0.45) ** 2 + (y / 0.32) ** 2 < 1, 40.0, -1000.0)
    voxels = np.where(x**2 + (y - 0.12) ** 2 < 0.09**2, 160.0 + 10.0 * d, voxels)
    voxels += generator.normal(0.0, 8.0, voxels.shape)
    return np.clip(np.rint(voxels), -1024, 3000).astype(np.int64)
