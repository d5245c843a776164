"""Foreign archives on loopback, with studies in them: DCMTK's dcmqrscp and Orthanc with its DICOMweb plugin."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from tests.conftest import missing
from tests.fakes import CALLED, LOOPBACK, a_free_port, dcmtk, until, write_ct

DICOMWEB_PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
DCMQRSCP = "DCMQR"


@dataclass(frozen=True)
class Study:
    """A study of an archive: its files, and those of its CT series by SOP Instance UID."""

    uid: str
    files: tuple[Path, ...]
    ct: frozenset[str]


def write_study(folder: Path, *, slices: int = 3, seed: int = 0, secondary: bool = False, **attributes: Any) -> Study:
    """One CT series, and a series of one secondary capture when asked for."""
    files = write_ct(folder / "ct", count=slices, seed=seed, **attributes)
    headers = [dcmread(path, stop_before_pixels=True) for path in files]
    more = [_secondary_capture(folder / "sc.dcm", headers[0])] if secondary else []
    uids = frozenset(str(header.SOPInstanceUID) for header in headers)
    return Study(str(headers[0].StudyInstanceUID), (*files, *more), uids)


def _secondary_capture(path: Path, ct: Dataset) -> Path:
    header = Dataset()
    for keyword in ("StudyInstanceUID", "StudyDate", "StudyTime", "PatientID", "PatientName", "AccessionNumber"):
        setattr(header, keyword, ct.get(keyword))
    header.SpecificCharacterSet = "ISO_IR 192"
    header.SOPClassUID = SecondaryCaptureImageStorage
    header.SOPInstanceUID = generate_uid()
    header.SeriesInstanceUID = generate_uid()
    header.Modality = "OT"
    header.StudyID = "1"
    header.SeriesNumber, header.InstanceNumber = 99, 1
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.Rows = header.Columns = 4
    header.BitsAllocated = header.BitsStored = 8
    header.HighBit, header.PixelRepresentation = 7, 0
    header.PixelData = bytes(16)
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.save_as(path, enforce_file_format=True)
    return path


def send_to(ae_title: str, port: int, files: Sequence[Path]) -> None:
    """DCMTK's storescu to an archive."""
    command = [dcmtk("storescu"), "-aet", "MODALITY", "-aec", ae_title, LOOPBACK, str(port), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@contextmanager
def running_dcmqrscp(folder: Path, our_port: int, *, maximum_pdu: int = 131072) -> Iterator[int]:
    """DCMTK's archive, which may move to our node; gives its port."""
    (folder / "store").mkdir(parents=True)
    port = a_free_port()
    configuration = folder / "dcmqrscp.cfg"
    configuration.write_text(
        f"""NetworkTCPPort = {port}
MaxPDUSize = {maximum_pdu}
MaxAssociations = 16
HostTable BEGIN
osteo = ({CALLED}, {LOOPBACK}, {our_port})
HostTable END
VendorTable BEGIN
VendorTable END
AETable BEGIN
{DCMQRSCP} {folder / "store"} RW (200, 1024mb) ANY
AETable END
"""
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [dcmtk("dcmqrscp"), "-c", str(configuration), str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"PATH": "/usr/bin", "TCP_NODELAY": "1", "DCMDICTPATH": "/usr/share/libdcmtk17/dicom.dic"},
        )
        try:
            until(lambda: _echoes(DCMQRSCP, port), 20)
            yield port
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def running_storescp(folder: Path, ae_title: str, *options: str) -> Iterator[int]:
    """DCMTK's storescp, which keeps what it gets below ``folder``; gives its port."""
    folder.mkdir(parents=True, exist_ok=True)
    port = a_free_port()
    command = [dcmtk("storescp"), "-aet", ae_title, "-od", str(folder), *options, str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: _echoes(ae_title, port), 20)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _echoes(ae_title: str, port: int) -> bool:
    done = subprocess.run(
        [dcmtk("echoscu"), "-aec", ae_title, LOOPBACK, str(port)], capture_output=True, timeout=60, check=False
    )
    if done.returncode:
        time.sleep(0.05)
    return done.returncode == 0


def require_dicomweb_plugin() -> str:
    """Path of Orthanc's DICOMweb plugin."""
    if not Path(DICOMWEB_PLUGIN).exists():
        missing("Orthanc's DICOMweb plugin is not installed (make system-packages)")
    return DICOMWEB_PLUGIN
