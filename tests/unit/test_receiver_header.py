"""The walk over a data set's elements: pydicom's own files, every cut, and mutated bytes."""

from __future__ import annotations

import random
import zlib
from io import BytesIO
from pathlib import Path

import pydicom.data
import pytest
from pydicom import dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from osteo_daemon.dicom.contexts import TRANSFER_SYNTAXES
from osteo_daemon.dicom.header import Identifiers, file_header, read_identifiers
from osteo_daemon.errors import NotDicom
from tests.fakes import write_ct


def _body(path: Path) -> tuple[bytes, str]:
    raw = path.read_bytes()
    data_set = dcmread(path, stop_before_pixels=True)
    length = data_set.file_meta.FileMetaInformationGroupLength
    return raw[132 + 12 + length :], str(data_set.file_meta.TransferSyntaxUID)


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    return write_ct(tmp_path, count=1)[0]


def test_identifiers_of_a_ct(ct: Path) -> None:
    data_set = dcmread(ct)
    assert read_identifiers(*_body(ct)) == Identifiers(
        study_instance_uid=str(data_set.StudyInstanceUID),
        series_instance_uid=str(data_set.SeriesInstanceUID),
        sop_class_uid=str(data_set.SOPClassUID),
        sop_instance_uid=str(data_set.SOPInstanceUID),
    )


def test_every_cut_is_seen(ct: Path) -> None:
    body, syntax = _body(ct)
    pixels = body.index(b"\xe0\x7f\x10\x00OW")
    for end in [*range(0, pixels, 7), pixels + 4, pixels + 11, pixels + 13, len(body) - 1]:
        try:
            read_identifiers(body[:end], syntax)
        except NotDicom:
            continue
        # whole elements up to here: nothing in the bytes tells that more was meant
        assert dcmread(BytesIO(file_header("1.2", "1.2", syntax) + body[:end])) is not None
        assert end < pixels


def test_every_cut_of_a_deflated_data_set_is_seen(ct: Path) -> None:
    """The stream itself tells its end, between elements too."""
    body, _syntax = _body(ct)
    engine = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = engine.compress(body) + engine.flush()
    whole = read_identifiers(deflated, DeflatedExplicitVRLittleEndian)
    assert whole == read_identifiers(body, ExplicitVRLittleEndian)
    assert read_identifiers(deflated + b"\x00", DeflatedExplicitVRLittleEndian) == whole  # padded to an even length
    for end in range(len(deflated)):
        with pytest.raises(NotDicom):
            read_identifiers(deflated[:end], DeflatedExplicitVRLittleEndian)


def test_files_of_pydicom_agree_with_pydicom() -> None:
    """Whatever pydicom reads with four sound UIDs is found here with the same; the rest is refused, never a crash."""
    agreed = refused = 0
    # those that the package carries: its own list would fetch others from the network
    for path in sorted((Path(pydicom.data.__file__).parent / "test_files").rglob("*.dcm")):
        try:
            data_set = dcmread(path, stop_before_pixels=True)
            body, syntax = _body(path)
            wanted = Identifiers(
                str(data_set.StudyInstanceUID),
                str(data_set.SeriesInstanceUID),
                str(data_set.SOPClassUID),
                str(data_set.SOPInstanceUID),
            )
        except Exception:  # noqa: BLE001 - malformed on purpose: pydicom may raise anything
            with pytest.raises(NotDicom):
                read_identifiers(path.read_bytes()[132:], ImplicitVRLittleEndian)
            continue
        if syntax not in TRANSFER_SYNTAXES:
            continue
        try:
            assert read_identifiers(body, syntax) == wanted, path.name
            agreed += 1
        except NotDicom:
            refused += 1
    assert agreed >= 60
    assert refused <= 12


def test_mutated_files_are_read_or_refused(ct: Path) -> None:
    body, _syntax = _body(ct)
    body = body[: body.index(b"\xe0\x7f\x10\x00OW") + 12 + 64]
    generator = random.Random(20261122)
    for _ in range(4000):
        mutated = bytearray(body)
        for _ in range(generator.randrange(1, 6)):
            where = generator.randrange(len(mutated))
            action = generator.randrange(3)
            if action == 0:
                mutated[where] = generator.randrange(256)
            elif action == 1:
                mutated[where : where + 4] = generator.choice([b"\xff\xff\xff\xff", b"\xfe\xff\x00\xe0", b"\x00" * 4])
            else:
                del mutated[where : where + generator.randrange(1, 20)]
        for syntax in (ExplicitVRLittleEndian, generator.choice(TRANSFER_SYNTAXES)):
            try:
                read_identifiers(mutated, syntax)
            except NotDicom:
                continue


def test_deep_nesting_is_refused_without_recursion() -> None:
    bomb = (
        b"\x08\x00\x40\x11"
        + b"\xff" * 4
        + (b"\xfe\xff\x00\xe0" + b"\xff" * 4 + b"\x08\x00\x40\x11" + b"\xff" * 4) * 50_000
    )
    with pytest.raises(NotDicom, match="nested"):
        read_identifiers(bomb, ImplicitVRLittleEndian)


def test_the_file_header_is_part_10(ct: Path) -> None:
    body, syntax = _body(ct)
    found = read_identifiers(body, syntax)
    header = file_header(found.sop_class_uid, found.sop_instance_uid, syntax)
    data_set = dcmread(BytesIO(header + body))
    assert data_set == dcmread(ct)
    assert data_set.file_meta.MediaStorageSOPInstanceUID == found.sop_instance_uid
    assert data_set.file_meta.FileMetaInformationGroupLength == len(header) - 144


def _element(group: int, number: int, value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2)
    return group.to_bytes(2, "little") + number.to_bytes(2, "little") + len(value).to_bytes(4, "little") + value


@pytest.mark.parametrize("uid", [b"..", b".", b"1..2", b".1", b"1.", b"", b"1" * 65, b"1.2/3", b"1.2\n", b"1 2"])
def test_what_is_no_uid(uid: bytes) -> None:
    ids = [(8, 0x16, b"1.2"), (8, 0x18, b"1.2"), (0x20, 0xD, b"1.02.3"), (0x20, 0xE, b"1.2")]
    for number in range(len(ids)):
        assert read_identifiers(b"".join(_element(*entry) for entry in ids), str(ImplicitVRLittleEndian))
        wrong = [(*entry[:2], uid) if at == number else entry for at, entry in enumerate(ids)]
        with pytest.raises(NotDicom, match="malformed"):
            read_identifiers(b"".join(_element(*entry) for entry in wrong), str(ImplicitVRLittleEndian))


def test_the_walk_is_bounded_by_number_too(ct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osteo_daemon.dicom.header._MAXIMUM_ELEMENTS", 10)
    with pytest.raises(NotDicom, match="more than 10 elements"):
        read_identifiers(*_body(ct))
