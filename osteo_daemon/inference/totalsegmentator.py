"""An installed TotalSegmentator as a source of vertebrae: a child process that sees one nameless volume and no network.

The site installs it (extra ``totalsegmentator``) and provides its weights. Nothing is downloaded and nothing is
reported: the child gets a home of its own with usage statistics off and a proxy that leads nowhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from osteo_daemon.child import die_with_parent
from osteo_daemon.domain.findings import Level, ModelReference
from osteo_daemon.errors import ConfigurationError, Transient
from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.canonical import resample_canonical
from osteo_daemon.settings import TotalSegmentatorSettings

NAME = "totalsegmentator"
EXECUTABLE = "TotalSegmentator"

LABELS: Mapping[Level, int] = MappingProxyType(
    # class map "total" of version 2: label 27 is vertebrae_L5, upwards from there
    {level: 27 + k for k, level in enumerate(reversed([level for level in Level if level is not Level.S1]))}
)

REQUIRED_DATASETS: Mapping[bool, tuple[int, ...]] = MappingProxyType(
    # numbers of the weight folders by `fast`. Version 2 fetches all five parts of the full model even when it runs
    # one, and the 6 mm model that finds where to look.
    {False: (291, 292, 293, 294, 295, 298), True: (297, 298)}
)

INPUT_SPACING_MM = 1.5
"""The full model's own voxel size; a finer input would be thinned out again."""

_NOWHERE = "http://127.0.0.1:9"  # the discard port: whatever asks for the network fails at once
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TZ")
_VERSION = re.compile(r"\d+(?:\.\w+)*")
_VERSION_TIMEOUT_SECONDS = 120.0


class TotalSegmentator:
    """A checked installation; made once, used for every study."""

    def __init__(self, program: Path, settings: TotalSegmentatorSettings, model: ModelReference, device: str) -> None:
        self.model = model
        self._program = program
        self._settings = settings
        self._device = "gpu" if device == "cuda" else "cpu"

    @classmethod
    def find(cls, settings: TotalSegmentatorSettings, device: str) -> TotalSegmentator:
        """Find program and weights.

        Args:
            device: ``cpu`` or ``cuda``.

        Raises:
            ConfigurationError: the program is not installed or does not start, or weights are missing.
        """
        program = shutil.which(EXECUTABLE) or shutil.which(EXECUTABLE, path=str(Path(sys.executable).parent))
        if program is None:
            raise ConfigurationError(
                'screener.vertebrae is "totalsegmentator" and TotalSegmentator is not installed; '
                'pip install "osteo-daemon[totalsegmentator]" or set another source'
            )
        weights = settings.weights_dir
        if weights is None or not weights.is_dir():
            raise ConfigurationError(
                'screener.vertebrae is "totalsegmentator" and totalsegmentator.weights_dir names no folder; '
                "it must hold the weights, which are never downloaded"
            )
        folders = [_dataset(weights, number) for number in REQUIRED_DATASETS[settings.fast]]
        model = ModelReference(NAME, _version(Path(program), weights), _digest(folders))
        return cls(Path(program), settings, model, device)

    def __call__(self, volume: CtVolume) -> dict[Level, Region]:
        """Masks of whole vertebrae, T10 to L5, on a grid of 1.5 mm; a level that isn't found isn't there.

        Raises:
            Transient: the program failed, took too long, or left no result that can be read.
        """
        import SimpleITK  # slow to import, and needed where this program is installed

        canonical = resample_canonical(volume, INPUT_SPACING_MM, torch.device("cpu"))
        image = SimpleITK.GetImageFromArray(np.rint(canonical.hu).astype(np.int16))
        image.SetSpacing((INPUT_SPACING_MM,) * 3)
        image.SetOrigin([float(v) for v in canonical.origin_lps_mm])
        with tempfile.TemporaryDirectory(prefix="osteo-") as name:
            work = Path(name)
            SimpleITK.WriteImage(image, str(work / "ct.nii.gz"))
            self._run(work)
            return _read_labels(work / "labels.nii.gz")

    def _run(self, work: Path) -> None:
        command = [
            str(self._program),
            *("-i", str(work / "ct.nii.gz"), "-o", str(work / "labels.nii.gz")),
            *("--ml", "--quiet", "--device", self._device),
            *("--nr_thr_resamp", "1", "--nr_thr_saving", "1"),
            *(["--fast"] if self._settings.fast else []),
            *("--roi_subset", *(f"vertebrae_{level}" for level in LABELS)),
        ]
        weights = self._settings.weights_dir
        if weights is None:
            raise ValueError("find() checks that there are weights")
        status, last_line = _run_group(command, _environment(work, weights), work, self._settings.timeout_seconds)
        if status is None:
            raise Transient(f"TotalSegmentator took longer than {self._settings.timeout_seconds:.0f} s")
        if status != 0:
            raise Transient(f"TotalSegmentator ended with {status}: {last_line}")


def _dataset(weights: Path, number: int) -> Path:
    found = sorted(weights.glob(f"Dataset{number}_*"))
    if not found:
        raise ConfigurationError(f"{weights} holds no Dataset{number}_...; TotalSegmentator would download it")
    return found[-1]


def _digest(folders: list[Path]) -> str:
    """sha256 over name and content of every file of the weights."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{path.relative_to(folder.parent).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _version(program: Path, weights: Path) -> str:
    with tempfile.TemporaryDirectory(prefix="osteo-") as name:
        environment = _environment(Path(name), weights)
        try:
            done = subprocess.run(
                [str(program), "--version"],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_VERSION_TIMEOUT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigurationError(f"{program} does not start ({type(error).__name__})") from error
    found = _VERSION.search(done.stdout)
    if done.returncode != 0 or found is None:
        raise ConfigurationError(f"{program} --version ended with {done.returncode}; is it whole?")
    if not found[0].startswith("2."):
        raise ConfigurationError(f"TotalSegmentator {found[0]}: its labels are those of version 2 only")
    return found[0]


def _environment(work: Path, weights: Path) -> dict[str, str]:
    """All that the child may know: its weights, a home without statistics, a network that isn't there."""
    home = work / "home"
    home.mkdir(exist_ok=True)
    config = {
        "totalseg_id": "totalseg_OSTEO000",
        "send_usage_stats": False,
        "prediction_counter": 0,
        "statistics_disclaimer_shown": True,
    }
    (home / "config.json").write_text(json.dumps(config), encoding="utf-8")
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), _NOWHERE)
    return {
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        **proxies,
        "HOME": str(home),
        "TMPDIR": str(work),
        "MPLBACKEND": "Agg",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOTALSEG_HOME_DIR": str(home),
        "TOTALSEG_WEIGHTS_PATH": str(weights),
    }


def _run_group(
    command: list[str], environment: Mapping[str, str], work: Path, timeout_seconds: float
) -> tuple[int | None, str]:
    """Run to the end, or kill the child with its own children; gives exit status (None: too late) and last line."""
    log = work / "log.txt"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # a worker that is killed at the wall clock cannot end it
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        status: int | None = None
        try:
            status = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # on a time-out, and when a signal ends the screener in the middle of it
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    # the child was told no name: its words can't hold one; the work folder's name is noise
    return status, lines[-1].replace(str(work), "")[:200] if lines else "without a word"


def _read_labels(path: Path) -> dict[Level, Region]:
    import SimpleITK

    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        raise Transient("TotalSegmentator left no result that can be read") from error
    labels = SimpleITK.GetArrayFromImage(image)
    if labels.ndim != 3:
        raise Transient(f"TotalSegmentator left a result of {labels.ndim} dimensions")
    affine = np.eye(4)
    # ITK's axes are (w, h, d), ours (d, h, w)
    directions = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, :3] = directions[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    masks = {level: labels == label for level, label in LABELS.items()}
    return {level: Region(mask, affine) for level, mask in masks.items() if mask.any()}
