"""Our side of TotalSegmentator's contract: command line, environment, result, failure, time-out.

The program of these tests is a script that makes real files; its label map is the labelled torso's, which
TotalSegmentator made. The real program needs weights of a gigabyte.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import SimpleITK
import torch

from osteo_daemon.domain.findings import Level
from osteo_daemon.errors import ConfigurationError, NotEligible, Transient
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.density import measure
from osteo_daemon.inference.totalsegmentator import LABELS, REQUIRED_DATASETS, TotalSegmentator
from osteo_daemon.inference.vertebra_source import Scan, TotalSegmentatorSource, choose_source
from osteo_daemon.readiness import check_node
from osteo_daemon.settings import ScreenerSettings, Settings, TotalSegmentatorSettings

PROGRAM = """#!{python}
import json, os, subprocess, sys, time
import numpy as np, SimpleITK
if sys.argv[1:] == ["--version"]:
    print("{version}")
    sys.exit(0)
seen = dict(arguments=sys.argv[1:], environment=dict(os.environ), cwd=os.getcwd())
seen["config"] = json.load(open(os.path.join(os.environ["TOTALSEG_HOME_DIR"], "config.json")))
given = SimpleITK.ReadImage(sys.argv[sys.argv.index("-i") + 1])
seen["size"], seen["spacing"], seen["keys"] = given.GetSize(), given.GetSpacing(), given.GetMetaDataKeys()
json.dump(seen, open({seen!r}, "w"))
out = sys.argv[sys.argv.index("-o") + 1]
{body}
"""
# what TotalSegmentator does: labels on the input's grid
LABELLED = """
labels = SimpleITK.ReadImage({torso!r})
labels = SimpleITK.Resample(labels, given, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor, 0)
SimpleITK.WriteImage(labels, out)
"""


def install(folder: Path, body: str, *, version: str = "2.18.0") -> Path:
    """A program named TotalSegmentator in ``folder``/bin, and weights; gives the file that says how it was called."""
    seen = folder / "seen.json"
    program = folder / "bin" / "TotalSegmentator"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, version=version, seen=str(seen), body=body))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    for number in sorted({n for numbers in REQUIRED_DATASETS.values() for n in numbers}):
        weights = folder / "weights" / f"Dataset{number}_part" / "trainer" / "fold_0"
        weights.mkdir(parents=True)
        (weights / "checkpoint_final.pth").write_bytes(f"weights {number}".encode())
    return seen


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TotalSegmentatorSettings:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin:/bin")
    monkeypatch.setenv("OSTEO_SECRET", "s3cret")
    return TotalSegmentatorSettings(weights_dir=tmp_path / "weights", timeout_seconds=60)


def torso(folder: Path) -> CtVolume:
    image = SimpleITK.ReadImage(str(folder / "totalsegmentator_example" / "example_ct.nii.gz"))
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, :3], affine[:3, 3] = directions[:, ::-1], image.GetOrigin()
    return CtVolume(SimpleITK.GetArrayFromImage(image).astype(np.float32), affine)


def empty_volume() -> CtVolume:
    voxels = np.full((40, 40, 40), -1000.0, np.float32)
    voxels[5:35, 5:35, 5:35] = 40.0
    return CtVolume(voxels, np.diag([3.0, 3.0, 3.0, 1.0])[[2, 1, 0, 3]])


@pytest.mark.real_ct
def test_label_map_becomes_measured_vertebrae(real_data: Path, settings: TotalSegmentatorSettings, tmp_path) -> None:
    """Reference: mean HU of the torso's bodies eroded by 6 mm; L1, with its dense focus, by its median."""
    labels = str(real_data / "totalsegmentator_example" / "totalseg.nii.gz")
    seen_file = install(tmp_path, LABELLED.format(torso=labels))
    volume = torso(real_data)
    source = TotalSegmentatorSource(TotalSegmentator.find(settings, "cpu"))
    located = source(Scan(volume, None, ()))
    found = {v.level: measure(volume, v.body_region, v.axes_lps).attenuation for v in located.localization.vertebrae}
    assert dict.fromkeys(found) == dict.fromkeys(("T12", "L1", "L2", "L3", "L4", "L5"))
    for level, hu in {"T12": 102, "L2": 113, "L3": 108, "L4": 110, "L5": 114}.items():
        assert found[level].mean == pytest.approx(hu, abs=12.0), level
    assert found["L1"].median == pytest.approx(96, abs=12.0)
    assert located.model.bundle == "totalsegmentator"
    assert located.model.version == "2.18.0"
    assert "vertebrae_from_totalsegmentator" in {flag.code for flag in located.localization.flags}

    seen = json.loads(seen_file.read_text())
    arguments = seen["arguments"]
    assert {"--ml", "--quiet", "--roi_subset"} <= set(arguments)
    assert arguments[arguments.index("--device") + 1] == "cpu"
    assert arguments[arguments.index("--roi_subset") + 1 :] == [f"vertebrae_{level}" for level in LABELS]
    assert "--fast" not in arguments
    assert seen["config"]["send_usage_stats"] is False
    environment = seen["environment"]
    assert environment["TOTALSEG_WEIGHTS_PATH"] == str(settings.weights_dir)
    assert environment["HOME"] == environment["TOTALSEG_HOME_DIR"] != os.environ.get("HOME")
    assert environment["https_proxy"] == environment["http_proxy"] == "http://127.0.0.1:9"
    assert not [name for name in environment if name.startswith("OSTEO_")]  # nor any other secret of the node
    assert seen["spacing"] == pytest.approx([1.5, 1.5, 1.5])
    assert not Path(seen["cwd"]).exists()  # nothing of the patient stays


def test_labels_are_those_of_version_2() -> None:
    assert LABELS[Level.L5] == 27
    assert LABELS[Level.L1] == 31
    assert LABELS[Level.T12] == 32
    assert LABELS[Level.T10] == 34
    assert Level.S1 not in LABELS


def test_failure_is_retried_and_says_the_last_line(settings: TotalSegmentatorSettings, tmp_path: Path) -> None:
    install(tmp_path, 'print("CUDA out of memory")\nsys.exit(3)')
    program = TotalSegmentator.find(settings, "cpu")
    with pytest.raises(Transient, match="ended with 3: CUDA out of memory"):
        program(empty_volume())


@pytest.mark.parametrize("body", ["pass", 'open(out, "w").write("no image")'])
def test_a_result_that_is_none_is_retried(settings: TotalSegmentatorSettings, tmp_path: Path, body: str) -> None:
    install(tmp_path, body)
    with pytest.raises(Transient, match="no result that can be read"):
        TotalSegmentator.find(settings, "cpu")(empty_volume())


def test_a_time_out_ends_the_program_and_its_children(settings: TotalSegmentatorSettings, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    sleeper = 'child = subprocess.Popen(["sleep", "300"])'
    install(tmp_path, f'{sleeper}\nopen({str(pid)!r}, "w").write(str(child.pid))\ntime.sleep(300)')
    program = TotalSegmentator.find(settings.model_copy(update={"timeout_seconds": 4.0}), "cpu")
    start = time.monotonic()
    with pytest.raises(Transient, match="took longer than 4 s"):
        program(empty_volume())
    assert time.monotonic() - start < 30
    child = int(pid.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_no_vertebra_in_the_result_is_an_exclusion(settings: TotalSegmentatorSettings, tmp_path: Path) -> None:
    install(tmp_path, "SimpleITK.WriteImage(given * 0, out)")
    source = TotalSegmentatorSource(TotalSegmentator.find(settings, "cpu"))
    with pytest.raises(NotEligible) as refusal:
        source(Scan(empty_volume(), None, ()))
    assert refusal.value.code == "no_lumbar_vertebra"


@pytest.mark.parametrize("fast", [True, False])
def test_fast_uses_the_other_weights(settings: TotalSegmentatorSettings, tmp_path: Path, fast: bool) -> None:
    seen = install(tmp_path, "SimpleITK.WriteImage(given * 0, out)")
    chosen = settings.model_copy(update={"fast": fast})
    program = TotalSegmentator.find(chosen, "cuda")
    program(empty_volume())
    arguments = json.loads(seen.read_text())["arguments"]
    assert ("--fast" in arguments) is fast
    assert arguments[arguments.index("--device") + 1] == "gpu"
    other = TotalSegmentator.find(settings.model_copy(update={"fast": not fast}), "cuda")
    assert other.model.sha256 != program.model.sha256


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("program", "TotalSegmentator is not installed"),
        ("weights_dir", "weights_dir names no folder"),
        ("dataset", "holds no Dataset292_...; TotalSegmentator would download it"),
        ("start", "--version ended with 1"),
        ("version", "TotalSegmentator 1.5.7: its labels are those of version 2 only"),
    ],
)
def test_what_is_missing_stops_the_start_with_one_line(
    settings: TotalSegmentatorSettings, tmp_path: Path, broken: str, text: str
) -> None:
    install(tmp_path, "pass", version="1.5.7" if broken == "version" else "2.4.0")
    program = tmp_path / "bin" / "TotalSegmentator"
    if broken == "program":
        program.unlink()
    elif broken == "weights_dir":
        settings = settings.model_copy(update={"weights_dir": tmp_path / "nowhere"})
    elif broken == "dataset":
        (tmp_path / "weights" / "Dataset292_part").rename(tmp_path / "weights" / "other")
    elif broken == "start":
        program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit(1)\n")
    node = Settings(screener=ScreenerSettings(vertebrae="totalsegmentator"), totalsegmentator=settings)
    with pytest.raises(ConfigurationError) as error:
        choose_source(node, torch.device("cpu"))
    assert text in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_osteo_check_looks_for_it(settings: TotalSegmentatorSettings, tmp_path: Path) -> None:
    node = Settings(
        state_dir=tmp_path / "state",
        screener=ScreenerSettings(vertebrae="totalsegmentator", network_enabled=False),
        totalsegmentator=settings,
    )
    (missing,) = [finding for finding in check_node(node) if finding.name == "totalsegmentator"]
    assert not missing.ok
    assert "TotalSegmentator is not installed" in missing.detail
    install(tmp_path, "pass")
    (found,) = [finding for finding in check_node(node) if finding.name == "totalsegmentator"]
    assert found.ok
    assert found.detail.startswith("TotalSegmentator 2.18.0, weights sha256 ")
