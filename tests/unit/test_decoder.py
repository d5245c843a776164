"""The decoder as a process: its limits, what becomes of an image that breaks it, and headers that lie."""

from __future__ import annotations

import os
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RawDataStorage,
    RLELossless,
)
from pynetdicom.dsutils import encode

from osteo_daemon.dicom.contexts import TRANSFER_SYNTAXES
from osteo_daemon.dicom.header import file_header
from osteo_daemon.errors import NotDicom, PixelDataUnreadable, WorkerDied
from osteo_daemon.imaging import decoder, slices
from osteo_daemon.imaging.codecs import DECODERS
from osteo_daemon.imaging.decoder import MEMORY_BYTES, decode
from osteo_daemon.imaging.decoding import read_volume
from osteo_daemon.imaging.series import split_stacks
from osteo_daemon.imaging.slices import LARGE_FILE_BYTES, Stack, ct_slices, read_header, read_headers
from tests.ct_series import column, write_slices
from tests.enhanced_ct import write_enhanced


def _compressed(source: Path, target: Path, syntax: UID = JPEG2000Lossless) -> Path:
    dataset = dcmread(source)
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(target)
    return target


def _stack(paths: list[Path]) -> Stack:
    headers, unreadable = read_headers(paths)
    assert not unreadable
    (slices,) = ct_slices(headers).values()
    (stack,) = split_stacks(slices)
    return stack


@pytest.fixture
def large(tmp_path: Path) -> list[Path]:
    """Three compressed slices, each more than the pipe to the decoder holds."""
    voxels = np.random.default_rng(3).integers(-1000, 1000, (3, 1024, 1024))
    files = write_slices(tmp_path / "plain", voxels, column(3, 3.0))
    return [_compressed(path, tmp_path / path.name, RLELossless) for path in files]


def test_every_compressed_syntax_has_its_decoder() -> None:
    assert {str(uid) for uid in DECODERS} == {uid for uid in TRANSFER_SYNTAXES if UID(uid).is_encapsulated}


def decoders() -> list[psutil.Process]:
    """Decoding children of this process; a test before this one may have left it a server."""
    return [child for child in psutil.Process().children() if decoder.__name__ in child.cmdline()]


def test_the_child_is_held_to_memory_and_time_and_writes_no_file(large: list[Path]) -> None:
    images = decode([(path, ()) for path in large])
    assert next(images).shape == (1024, 1024)
    (child,) = decoders()
    assert child.rlimit(psutil.RLIMIT_AS) == (MEMORY_BYTES, MEMORY_BYTES)
    assert child.rlimit(psutil.RLIMIT_FSIZE) == child.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert 0 < child.rlimit(psutil.RLIMIT_CPU)[0] < 300
    images.close()
    assert not child.is_running()


def test_the_child_sees_no_setting_of_the_node(large: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTEO_STORE__PASSWORD", "secret")
    images = decode([(path, ()) for path in large])
    next(images)
    (child,) = decoders()
    assert not [name for name in child.environ() if name.startswith("OSTEO_")]
    images.close()


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (signal.SIGSEGV, PixelDataUnreadable, "SIGSEGV"),
        (signal.SIGXCPU, PixelDataUnreadable, "SIGXCPU"),
        (signal.SIGKILL, WorkerDied, "SIGKILL"),  # by the system, short of memory: not the image's fault
    ],
)
def test_a_child_that_dies_is_told_by_the_way_it_died(
    large: list[Path], number: signal.Signals, error: type[Exception], said: str
) -> None:
    images = decode([(path, ()) for path in large])
    next(images)
    (child,) = decoders()
    os.kill(child.pid, number)
    with pytest.raises(error, match=said):
        list(images)


def test_an_image_that_takes_too_long(large: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "IMAGE_SECONDS", 0.0)
    with pytest.raises(PixelDataUnreadable, match="too long"):
        list(decode([(path, ()) for path in large]))
    assert not decoders()


def test_nothing_is_decoded_of_nothing() -> None:
    assert list(decode([])) == []


def claiming(frame: bytes, size: int) -> bytes:
    """A JPEG 2000 code stream whose size and tile are said to be another (ISO/IEC 15444-1 A.5.1)."""
    at = frame.index(b"\xff\x51")
    changed = bytearray(frame)
    for field in (6, 10, 22, 26):
        changed[at + field : at + field + 4] = struct.pack(">I", size)
    return bytes(changed)


def test_a_code_stream_that_claims_to_be_huge_holds_the_study(tmp_path: Path) -> None:
    voxels = np.random.default_rng(3).integers(-1000, 1000, (4, 64, 64))
    files = write_slices(tmp_path / "plain", voxels, column(4, 3.0))
    paths = [_compressed(path, tmp_path / path.name) for path in files]
    dataset = dcmread(paths[2])
    dataset.PixelData = encapsulate([claiming(get_frame(dataset.PixelData, 0, number_of_frames=1), 65535)])
    for size in (64, 65535):
        dataset.Rows = dataset.Columns = size
        dataset.save_as(paths[2])
        with pytest.raises(PixelDataUnreadable):
            list(decode([(paths[2], ())]))
    dataset.Rows = dataset.Columns = 64
    dataset.save_as(paths[2])
    with pytest.raises(PixelDataUnreadable, match=f"slice 3.*{paths[2].name}"):
        read_volume(_stack(paths))


def test_rows_and_columns_that_no_scan_has_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    voxels = np.zeros((4, 8, 8), dtype=np.int64)
    files = write_slices(tmp_path, voxels, column(4, 3.0), Rows=65535, Columns=65535)
    with pytest.raises(PixelDataUnreadable, match="no scan"):
        read_volume(_stack(files))
    for path in files:
        dataset = dcmread(path)
        dataset.Rows = dataset.Columns = 4096  # may be a scan, but not with these few bytes
        dataset.save_as(path)
    with pytest.raises(PixelDataUnreadable, match="slice 1"):
        read_volume(_stack(files))


def test_a_deflated_object_that_inflates_without_end_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "MAXIMUM_INFLATED_BYTES", 32 << 20)
    (path,) = write_slices(tmp_path, np.zeros((1, 8, 8), dtype=np.int64), column(1, 3.0))
    dataset = dcmread(path)
    engine = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    head = encode(dataset, False, True)
    assert head is not None
    body = engine.compress(head + struct.pack("<HH2sHI", 0x7FE0, 0x0011, b"OB", 0, 0xFFFFFFF0))
    zeros = bytes(1 << 24)
    body += b"".join(engine.compress(zeros) for _ in range(4)) + engine.flush()
    assert len(body) < 1 << 20
    bomb = tmp_path / "bomb.dcm"
    uids = str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), str(DeflatedExplicitVRLittleEndian)
    bomb.write_bytes(file_header(*uids) + body)
    before = psutil.Process().memory_info().rss
    with pytest.raises(NotDicom, match="inflates"):
        read_header(bomb)
    assert psutil.Process().memory_info().rss - before < 16 << 20


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.keyword)
def test_signed_pixels_keep_their_sign(tmp_path: Path, syntax: UID) -> None:
    voxels = np.random.default_rng(5).integers(-1024, 1500, (3, 32, 32))
    signed = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15, "RescaleIntercept": "0"}
    files = write_slices(tmp_path / "plain", voxels, column(3, 3.0), **signed)
    for path, plane in zip(files, voxels, strict=True):
        dataset = dcmread(path)
        dataset.PixelData = plane.astype("<i2").tobytes()
        dataset.save_as(path)
    coded = [_compressed(path, tmp_path / path.name, syntax) for path in files]
    assert np.array_equal(read_volume(_stack(coded)).voxels, voxels)


def test_native_and_compressed_slices_and_frames_of_one_series(tmp_path: Path) -> None:
    voxels = np.random.default_rng(6).integers(-1000, 1000, (6, 64, 64))
    files = write_slices(tmp_path / "plain", voxels, column(6, 3.0))
    expected = read_volume(_stack(files)).voxels
    mixed = [*files[:2], *(_compressed(path, tmp_path / path.name) for path in files[2:4]), *files[4:]]
    assert np.array_equal(read_volume(_stack(mixed)).voxels, expected)
    frames = tmp_path / "frames.dcm"
    for uid in (ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless):
        write_enhanced(frames, files, transfer_syntax_uid=uid)
        assert np.array_equal(read_volume(_stack([frames])).voxels, expected)


def test_an_error_says_nothing_that_was_sent(tmp_path: Path) -> None:
    files = write_slices(tmp_path, np.zeros((4, 8, 8), dtype=np.int64), column(4, 3.0))
    dataset: Dataset = dcmread(files[1])
    dataset.PixelData = dataset.PixelData[:20]
    dataset["InstanceNumber"]._value = ["Smith", "John"]
    dataset.save_as(files[1])
    _readable, unreadable = read_headers(files)
    if not unreadable:
        with pytest.raises(PixelDataUnreadable) as raised:
            read_volume(_stack(files))
        assert "Smith" not in str(raised.value)
    assert all("Smith" not in entry.reason for entry in unreadable)


def test_of_a_large_object_only_what_names_it_is_read(tmp_path: Path) -> None:
    (path,) = write_slices(tmp_path, np.zeros((1, 8, 8), dtype=np.int64), column(1, 3.0))
    dataset = dcmread(path)
    with path.open("ab") as sink:  # a last element that takes no room on the disk
        sink.write(struct.pack("<HH2sHI", 0x7FE1, 0x1010, b"OB", 0, LARGE_FILE_BYTES))
        sink.truncate(sink.tell() + LARGE_FILE_BYTES)
    with pytest.raises(NotDicom, match="larger"):
        read_header(path)
    raw = tmp_path / "raw.dcm"
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = RawDataStorage
    del dataset.PixelData
    dataset.add_new(0x00291010, "OB", b"")
    dataset.save_as(raw)
    with raw.open("ab") as sink:
        sink.write(struct.pack("<HH2sHI", 0x0031, 0x1010, b"OB", 0, LARGE_FILE_BYTES))
        sink.truncate(sink.tell() + LARGE_FILE_BYTES)
    before = psutil.Process().memory_info().rss
    header = read_header(raw)
    assert psutil.Process().memory_info().rss - before < LARGE_FILE_BYTES / 2
    assert (header.StudyInstanceUID, header.SOPClassUID) == (dataset.StudyInstanceUID, RawDataStorage)
    assert "Rows" not in header
