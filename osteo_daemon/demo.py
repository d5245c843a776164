"""``osteo demo``: a virtual patient through the whole node, with a local test PACS at the other end."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from PIL import Image
from rich.console import Console

from osteo_daemon.dicom.report_reader import read_report
from osteo_daemon.dicom.report_text import format_report
from osteo_daemon.dicom.storage_scu import send_objects
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import ConfigurationError, OsteoError
from osteo_daemon.phantom.dicom_series import write_series
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner
from osteo_daemon.phantom.study import render_study

MODALITY = "DEMOCT"
NODE = "OSTEO"
PACS = "TESTPACS"
DEADLINE_SECONDS = 170.0
SLICE_MM = 3.0

_CONFIGURATION = """\
state_dir = "{state}"
[receiver]
ae_title = "{node}"
port = {port}
minimum_free_bytes = 0
[[sources]]
ae_title = "{modality}"
addresses = ["127.0.0.1"]
[completeness]
quiet_seconds = 3
sweep_seconds = 0.5
[screener]
poll_seconds = 0.3
[[destinations]]
name = "test-pacs"
ae_title = "{pacs}"
host = "127.0.0.1"
port = {pacs_port}
[deliverer]
poll_seconds = 0.3
"""


@dataclass(frozen=True, slots=True)
class _Slice:
    sop_class_uid: str
    sop_instance_uid: str
    path: Path


def run_demo(out: Path) -> int:
    """Render, send, wait, show; returns 0 when the report arrived.

    Args:
        out: folder for the report, the segmentation, the picture and the node's log; made anew.
    """
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="osteo-demo-") as name:
        work = Path(name)
        processes: list[subprocess.Popen[bytes]] = []
        start = time.monotonic()
        try:
            _run(console, work, out, processes, start + DEADLINE_SECONDS)
        except OsteoError as error:
            console.print(f"demo failed: {error.detail or error}")
            log = work / "node.log"
            if log.exists():
                console.print("last lines of the node's log:\n" + "\n".join(log.read_text().splitlines()[-15:]))
            return 1
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()
        console.print(f"done in {time.monotonic() - start:.0f} s")
    return 0


def _run(console: Console, work: Path, out: Path, processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    port, pacs_port = _free_port(), _free_port()
    config, received = work / "osteo.toml", work / "pacs"
    config.write_text(
        _CONFIGURATION.format(
            state=work / "state", node=NODE, port=port, modality=MODALITY, pacs=PACS, pacs_port=pacs_port
        )
    )
    console.print(f"starting a test PACS ({PACS}, port {pacs_port}) and the node ({NODE}, port {port})")
    processes.append(
        _start(
            ["test-pacs", "--port", str(pacs_port), "--ae-title", PACS, "--folder", str(received)], work / "pacs.log"
        )
    )
    processes.append(_start(["serve", "--config", str(config)], work / "node.log"))

    console.print("a virtual patient, woman of 72 years, low density, enters the virtual scanner")
    patient = VirtualPatient(seed=2026, age_years=72, sex="F", density_mg_cm3=75.0)
    scanner = Scanner(slice_thickness_mm=SLICE_MM, slice_spacing_mm=SLICE_MM)
    study = render_study(patient, scanner)
    slices = write_series(study, work / "series")
    node = RemoteAE(NODE, "127.0.0.1", port)
    console.print(f"sending {len(slices)} slices over C-STORE")
    _wait(lambda: _listens(port), deadline, "the node does not listen", processes)
    verdicts = send_objects(
        node, MODALITY, [_header(path) for path in slices], connect_timeout_seconds=10, dimse_timeout_seconds=60
    )
    for verdict in verdicts:
        if verdict.error is not None:
            raise verdict.error
    console.print("every slice is acknowledged: on disk and in the job store; waiting for the report")
    kinds = ("segmentation", "report", "picture")
    _wait(
        lambda: all(list(received.glob(f"{kind}-*.dcm")) for kind in kinds),
        deadline,
        f"no report within {DEADLINE_SECONDS:.0f} s",
        processes,
    )
    out.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        (path,) = received.glob(f"{kind}-*.dcm")
        shutil.copyfile(path, out / f"{kind}.dcm")
    _save_png(out / "picture.dcm", out / "picture.png")
    shutil.copyfile(work / "node.log", out / "node.log")
    console.print()
    console.print(format_report(read_report(out / "report.dcm")), markup=False)
    console.print()
    console.print("what was true in the virtual patient:")
    for vertebra in study.vertebrae:
        console.print(f"  {vertebra.level:<4} {vertebra.trabecular_hu_true:6.0f} HU")
    console.print()
    console.print(f"saved: {', '.join(sorted(path.name for path in out.iterdir()))} in {out}")


def _start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen([sys.executable, "-m", "osteo_daemon.cli", *arguments], stdout=sink, stderr=sink)


def _wait(
    condition: Callable[[], bool], deadline: float, otherwise: str, processes: Sequence[subprocess.Popen[bytes]]
) -> None:
    while not condition():
        if any(process.poll() is not None for process in processes):
            raise ConfigurationError("a process of the demo ended")
        if time.monotonic() > deadline:
            raise ConfigurationError(otherwise)
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _header(path: Path) -> _Slice:
    header = pydicom.dcmread(path, specific_tags=["SOPClassUID", "SOPInstanceUID"])
    return _Slice(str(header.SOPClassUID), str(header.SOPInstanceUID), path)


def _save_png(source: Path, target: Path) -> None:
    Image.fromarray(pydicom.dcmread(source).pixel_array).save(target)
