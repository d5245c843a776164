"""Every malformed file and every character set that pydicom brings: stored, kept aside or refused, never a crash."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pydicom.data
import pytest
from pydicom import dcmread
from pydicom.uid import CTImageStorage, generate_uid

from osteo_daemon.dicom.received import received_file
from osteo_daemon.errors import ConflictingInstance, Damaged, NotEligible, PixelDataUnreadable
from osteo_daemon.imaging.decoder import decode
from osteo_daemon.imaging.selection import other_series, select_series
from osteo_daemon.imaging.slices import ct_slices, read_header, read_headers
from osteo_daemon.inference.patient import Patient
from osteo_daemon.intake import DurableIntake
from osteo_daemon.jobs.records import RecordOutcome
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from tests.fakes import LOOPBACK

# those that the package carries: its own list would fetch others from the network
_DATA = Path(pydicom.data.__file__).parent
FILES = sorted(path for name in ("test_files", "charset_files") for path in (_DATA / name).rglob("*") if path.is_file())


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[tuple[DurableIntake, JobStore, Path]]:
    spool, store = Spool(tmp_path / "spool"), JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    yield DurableIntake(spool, store), store, tmp_path / "spool"
    store.close()


def _as_ct(path: Path) -> bytes | None:
    """The same file as a CT image with four sound UIDs: what is wrong with it otherwise must be met further on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = dcmread(path, force=True)
            dataset.SOPClassUID = CTImageStorage
            for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
                setattr(dataset, keyword, generate_uid())
            dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            out = BytesIO()
            dataset.save_as(out, enforce_file_format=True)
            return out.getvalue()
    except Exception:  # noqa: BLE001 - malformed on purpose: pydicom may raise anything
        return None


@pytest.mark.parametrize("disguised", [False, True], ids=["as it is", "as a CT"])
def test_every_file_is_stored_or_refused_and_what_is_stored_can_be_judged(
    intake: tuple[DurableIntake, JobStore, Path], disguised: bool
) -> None:
    take, store, spool = intake
    outcomes: Counter[str] = Counter()
    for path in FILES:
        data = _as_ct(path) if disguised else path.read_bytes()
        if data is None:
            outcomes["no CT can be made of it"] += 1
            continue
        before = {entry for entry in spool.rglob("*") if entry.is_file()}
        try:
            received = received_file(data, source_ae="TEST", address=LOOPBACK, association_id="1")
            outcome = take.accept(received)
        except ConflictingInstance:
            outcomes["kept aside"] += 1
            assert any("quarantine" in entry.parts for entry in spool.rglob("*.dcm"))
            continue
        except Damaged as error:
            outcomes[type(error).__name__ if str(error).isprintable() else "no reason"] += 1
            assert {entry for entry in spool.rglob("*") if entry.is_file()} == before
            continue
        outcomes[outcome.value] += 1
        entry = store.stored_instance(received.identifiers.sop_instance_uid)
        assert entry is not None
        assert entry.path.is_relative_to(spool.resolve())
        if outcome is RecordOutcome.STORED:
            assert entry.path.read_bytes().endswith(bytes(received.parts[1])), path.name
        _judge(entry.path)
    assert not outcomes["no reason"]
    assert outcomes["stored"] >= (100 if disguised else 15), outcomes
    assert not list((spool / "tmp").iterdir())
    if not disguised:
        assert outcomes["NotDicom"] + outcomes["UnsupportedSopClass"] >= 20


def _judge(path: Path) -> None:
    """What the screener does first with a file of a study."""
    headers, unreadable = read_headers([path])
    assert len(headers) + len(unreadable) == 1
    for entry in unreadable:
        assert entry.reason.isprintable()
    for _, header in headers:
        try:
            Patient.of(header).check_age()
            series = ct_slices(headers)
            select_series(series)
            other_series(headers, series.keys())
        except (Damaged, NotEligible) as error:
            assert str(error).isprintable()  # noqa: PT017 - none of them need come


def test_every_file_as_the_screener_reads_it_from_a_folder() -> None:
    """`osteo screen` is given files that no receiver has seen."""
    readable = unreadable = 0
    for path in FILES:
        try:
            header = read_header(path)
        except Damaged:
            unreadable += 1
        else:
            readable += 1
            assert header.SOPInstanceUID
    assert readable >= 60
    assert unreadable >= 10


def _is_compressed(path: Path) -> bool:
    try:
        header = dcmread(path, stop_before_pixels=True)
    except Exception:  # noqa: BLE001 - malformed on purpose
        return False
    syntax = header.file_meta.get("TransferSyntaxUID")
    return "Rows" in header and syntax is not None and syntax.is_encapsulated


def test_every_image_is_decoded_or_refused_by_the_decoder() -> None:
    """One decoder for all, started again where a file ends it: no file ends anything else."""
    decoded = refused = 0
    # the others are read where they lie, with no more memory than they have bytes
    images_of = {path for path in FILES if path.suffix == ".dcm" and _is_compressed(path)}
    waiting = sorted(images_of)
    while waiting:
        images = decode([(path, ()) for path in waiting])
        done = 0
        try:
            for pixels in images:
                assert pixels.size
                done += 1
        except PixelDataUnreadable as error:
            refused += 1
            assert error.detail.isprintable()  # noqa: PT017 - not every file raises
            waiting = waiting[done + 1 :]
        else:
            waiting = []
        decoded += done
    assert decoded + refused == len(images_of)
    assert decoded >= 20, (decoded, refused)
