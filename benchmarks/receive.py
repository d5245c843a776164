"""Durable receive beside Orthanc and DCMTK's storescp in one run: ``python -m benchmarks.receive``.

300 CT slices of 0.5 MB on loopback, over one association or four at once, from DCMTK's storescu and from pynetdicom;
all ends as they come, and with ``TCP_NODELAY=1``. Only this node syncs every file and commits a row before it answers;
storescp neither syncs nor indexes. Peers take turns within each round, and ratios are taken within a round: what else
runs on the machine meets all of them. ``--quick`` sends 24 slices.
"""

from __future__ import annotations

import argparse
import json
import operator
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
from pynetdicom import AE, _config

from benchmarks.results import write_result

LOOPBACK = "127.0.0.1"
TITLE = "OSTEO"
SIZE = 512
PDU_BYTES = 131072
ATTEMPTS = 5


def dcmtk(name: str) -> str | None:
    """DCMTK's program (pynetdicom puts others of the same names into a virtual environment)."""
    folders = [folder for folder in os.get_exec_path() if not folder.startswith(sys.prefix)]
    return shutil.which(name, path=os.pathsep.join([*folders, "/usr/bin", "/usr/sbin"]))


def write_slices(folder: Path, count: int, side: int = SIZE) -> list[Path]:
    """A study of ``count`` slices of 16 bit, noise; their paths."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    study, series = generate_uid(), generate_uid()
    for number in range(count):
        header = Dataset()
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, generate_uid()
        header.StudyInstanceUID, header.SeriesInstanceUID = study, series
        header.Modality, header.PatientID, header.InstanceNumber = "CT", "BENCH", number + 1
        header.Rows = header.Columns = side
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 12, 11, 0
        header.PixelData = generator.integers(0, 4096, (side, side), dtype=np.uint16).tobytes()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.save_as(folder / f"{number:04d}.dcm", enforce_file_format=True)
    return sorted(folder.iterdir())


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
    return [str(dcmtk("storescp")), "--fork", "-pdu", str(PDU_BYTES), "-od", str(folder / "storage"), str(port)]


PEERS = {"osteo_daemon": node, "orthanc": orthanc, "storescp": storescp}


@contextmanager
def running(name: str, folder: Path, environment: dict[str, str]) -> Iterator[tuple[int, psutil.Process]]:
    """A fresh peer on a free port."""
    for attempt in range(ATTEMPTS):
        place = folder / str(attempt)
        place.mkdir()
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = probe.getsockname()[1]
        process = subprocess.Popen(
            PEERS[name](place, port), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            if answers(port, process):
                yield port, psutil.Process(process.pid)
                return
        finally:
            process.terminate()
            process.wait(60)
    raise RuntimeError(f"{name} does not answer")


def answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    """True when the peer answers C-ECHO; False when it has ended (another took its port) or says nothing."""
    echo = [str(dcmtk("echoscu")), "-aet", "STORESCU", "-aec", TITLE, LOOPBACK, str(port)]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if not subprocess.run(echo, capture_output=True, check=False).returncode:
            return True
        time.sleep(0.2)
    return False


def send(port: int, files: list[str]) -> None:
    """Send files over one association of pynetdicom, once told to; ends with an error when one is refused."""
    _config.STORE_SEND_CHUNKED_DATASET = True
    print("ready", flush=True)
    sys.stdin.readline()
    entity = AE(ae_title="STORESCU")
    entity.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    for _attempt in range(ATTEMPTS):
        association = entity.associate(LOOPBACK, port, ae_title=TITLE, max_pdu=PDU_BYTES)
        if association.is_established:
            break
    if os.environ.get("TCP_NODELAY") == "1":
        association.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    statuses = [association.send_c_store(path).get("Status") for path in files]
    association.release()
    if any(statuses):
        sys.exit("refused")


def command_of(sender: str, port: int) -> list[str]:
    """The command of a sender; paths of files follow."""
    if sender == "pynetdicom":
        return [sys.executable, "-m", "benchmarks.receive", "--send", str(port)]
    return [str(dcmtk("storescu")), "-pdu", str(PDU_BYTES), "-aec", TITLE, LOOPBACK, str(port)]


def measure(
    name: str, warm: list[Path], files: list[Path], sender: str, senders: int, no_delay: bool
) -> dict[str, float]:
    """One run: small files to a fresh peer, then, measured, all files, in 10^6 bytes; Python's start is left out."""
    environment = {**os.environ, **({"TCP_NODELAY": "1"} if no_delay else {})}
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    with tempfile.TemporaryDirectory() as folder, running(name, Path(folder), environment) as (port, process):
        quick = {**os.environ, "TCP_NODELAY": "1"}
        subprocess.run([*command_of("storescu", port), *map(str, warm)], env=quick, check=True, capture_output=True)
        begun = time.monotonic()
        children = [
            subprocess.Popen(
                [*command_of(sender, port), *map(str, files[part::senders])],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for part in range(senders)
        ]
        if sender == "pynetdicom":
            for child in children:
                assert child.stdout is not None
                child.stdout.readline()
            begun = time.monotonic()
            for child in children:
                assert child.stdin is not None
                child.stdin.write(b"go\n")
                child.stdin.flush()
        codes = [child.wait() for child in children]
        if any(codes):
            raise RuntimeError(f"{name} refused a slice")
        seconds = time.monotonic() - begun
        return {"mb_per_s": size_mb / seconds, "peer_rss_mb": process.memory_info().rss / 1e6}


def compare(
    warm: list[Path], files: list[Path], sender: str, senders: int, no_delay: bool, rounds: int
) -> dict[str, float]:
    """Medians over rounds of every peer's speed, and of this node's ratio to each within a round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PEERS}
    names = list(PEERS)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(measure(name, warm, files, sender, senders, no_delay))
    speeds = {name: [run["mb_per_s"] for run in runs] for name, runs in found.items()}
    ours = speeds["osteo_daemon"]
    return {
        **{f"{name}_mb_per_s": round(statistics.median(speed), 1) for name, speed in speeds.items()},
        **{
            f"times_{name}": round(statistics.median(map(operator.truediv, ours, speeds[name])), 2)
            for name in names
            if name != "osteo_daemon"
        },
        "osteo_daemon_rss_mb": round(max(run["peer_rss_mb"] for run in found["osteo_daemon"]), 1),
    }


def main() -> None:
    """Measure and write ``docs/results/receive.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="24 slices, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--send", nargs="+", metavar="ARGUMENT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send:
        send(int(arguments.send[0]), arguments.send[1:])
        return
    if missing := [name for name in ("storescu", "echoscu", "storescp", "Orthanc") if dcmtk(name) is None]:
        sys.exit(f"not installed: {', '.join(missing)}")
    count, rounds = (24, 1) if arguments.quick else (300, arguments.rounds)
    runs: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = write_slices(Path(folder) / "slices", count)
        warm = write_slices(Path(folder) / "warm", count, side=64)
        for no_delay in (True, False):
            for sender in ("storescu", "pynetdicom"):
                for senders in (1, 4):
                    label = f"{senders} x {sender}, {'TCP_NODELAY at both ends' if no_delay else 'as they come'}"
                    runs[label] = compare(warm, files, sender, senders, no_delay, rounds)
                    print(f"{label:46}", runs[label], flush=True)
                    # after each: a run that is cut short has measured what it has
                    figures = {"slices": count, "rounds": rounds, "note": arguments.note, "runs": runs}
                    path = write_result("receive", figures, quick=arguments.quick)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
