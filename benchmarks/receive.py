"""Durable receive beside Orthanc and DCMTK's storescp in one run: ``python -m benchmarks.receive``.

300 CT slices of 0.5 MB from DCMTK's storescu, one association or four at once, on loopback; DCMTK programs as they
come and with ``TCP_NODELAY=1``. Only this node syncs every file and commits a row before it answers; storescp neither
syncs nor indexes. ``--quick`` sends 24 slices.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from benchmarks.results import write_result

LOOPBACK = "127.0.0.1"
TITLE = "OSTEO"
SIZE = 512


def dcmtk(name: str) -> str | None:
    """DCMTK's program (pynetdicom puts others of the same names into a virtual environment)."""
    folders = [folder for folder in os.get_exec_path() if not folder.startswith(sys.prefix)]
    return shutil.which(name, path=os.pathsep.join([*folders, "/usr/bin", "/usr/sbin"]))


def write_slices(folder: Path, count: int) -> None:
    """A study of ``count`` slices, 512 x 512, 16 bit, noise."""
    generator = np.random.default_rng(1)
    study, series = generate_uid(), generate_uid()
    for number in range(count):
        header = Dataset()
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, generate_uid()
        header.StudyInstanceUID, header.SeriesInstanceUID = study, series
        header.Modality, header.PatientID, header.InstanceNumber = "CT", "BENCH", number + 1
        header.Rows = header.Columns = SIZE
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 12, 11, 0
        header.PixelData = generator.integers(0, 4096, (SIZE, SIZE), dtype=np.uint16).tobytes()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.save_as(folder / f"{number:04d}.dcm", enforce_file_format=True)


def node(folder: Path, port: int) -> list[str]:
    """This product's receiver."""
    (folder / "osteo.toml").write_text(
        f'state_dir = "{folder / "state"}"\n[receiver]\nport = {port}\nae_title = "{TITLE}"\n'
        f'[[sources]]\nae_title = "STORESCU"\naddresses = ["{LOOPBACK}"]\n[log]\nlevel = "error"\n'
    )
    return [sys.executable, "-m", "osteo_daemon.cli", "run", "receiver", "--config", str(folder / "osteo.toml")]


def orthanc(folder: Path, port: int) -> list[str]:
    """Orthanc with its default durable settings."""
    settings = {
        "DicomPort": port,
        "DicomAet": TITLE,
        "HttpServerEnabled": False,
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "Plugins": [],
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    return [str(dcmtk("Orthanc")), str(folder / "orthanc.json")]


def storescp(folder: Path, port: int) -> list[str]:
    """DCMTK's storescp: writes files, syncs nothing, keeps no index."""
    (folder / "storage").mkdir()
    # --fork: it serves several associations only then
    return [str(dcmtk("storescp")), "--fork", "-pdu", "131072", "-od", str(folder / "storage"), str(port)]


PEERS = {"osteo_daemon": node, "orthanc": orthanc, "storescp": storescp}


@contextmanager
def running(name: str, folder: Path, environment: dict[str, str]) -> Iterator[tuple[int, psutil.Process]]:
    """A fresh peer on a free port."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        PEERS[name](folder, port), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        echo = [str(dcmtk("echoscu")), "-aet", "STORESCU", "-aec", TITLE, LOOPBACK, str(port)]
        deadline = time.monotonic() + 60
        while subprocess.run(echo, capture_output=True, check=False).returncode:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"{name} does not answer")
            time.sleep(0.2)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def measure(name: str, files: list[Path], senders: int, no_delay: bool) -> dict[str, float]:
    """One run: all files to a fresh peer; MB are 10^6 bytes of file."""
    environment = {**os.environ, **({"TCP_NODELAY": "1"} if no_delay else {})}
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    with tempfile.TemporaryDirectory() as folder, running(name, Path(folder), environment) as (port, process):
        begun = time.monotonic()
        command = [str(dcmtk("storescu")), "-pdu", "131072", "-aec", TITLE, LOOPBACK, str(port)]
        children = [
            subprocess.Popen([*command, *map(str, files[part::senders])], env=environment, stdout=subprocess.DEVNULL)
            for part in range(senders)
        ]
        codes = [child.wait() for child in children]
        if any(codes):
            raise RuntimeError(f"{name} refused a slice")
        seconds = time.monotonic() - begun
        return {
            "seconds": round(seconds, 3),
            "mb_per_s": round(size_mb / seconds, 1),
            "peer_rss_mb": round(process.memory_info().rss / 1e6, 1),
        }


def main() -> None:
    """Measure and write ``docs/results/receive.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="24 slices, one round")
    quick = parser.parse_args().quick
    if missing := [name for name in ("storescu", "echoscu", "storescp", "Orthanc") if dcmtk(name) is None]:
        sys.exit(f"not installed: {', '.join(missing)}")
    count, rounds = (24, 1) if quick else (300, 3)
    runs: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_slices(Path(folder), count)
        files = sorted(Path(folder).iterdir())
        for no_delay in (False, True):
            for senders in (1, 4):
                for name in PEERS:
                    found = [measure(name, files, senders, no_delay) for _ in range(rounds)]
                    label = f"{name}, {senders} sender{'s' * (senders > 1)}, {'no delay' if no_delay else 'defaults'}"
                    runs[label] = {key: statistics.median(run[key] for run in found) for key in found[0]}
                    print(f"{label:48}", runs[label], flush=True)
    path = write_result("receive", {"slices": count, "rounds": rounds, "runs": runs}, quick=quick)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
