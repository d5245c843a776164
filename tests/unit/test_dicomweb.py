"""Bodies of DICOMweb: multipart messages in any portions, Part 10 files, store responses."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
from xml.etree import ElementTree

import pytest
from dicomweb_client.web import _load_xml_dataset
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, MRImageStorage

from osteo_daemon.dicom.received import received_file
from osteo_daemon.dicomweb.dicom_json import failure_of, study_of
from osteo_daemon.dicomweb.multipart import MultipartReader, Part, boundary_of, media_type_of
from osteo_daemon.dicomweb.store_response import DICOM_JSON, DICOM_XML, StoredPart, http_status, store_response
from osteo_daemon.errors import DataSetMismatch, MalformedMessage, NotDicom, OsteoError, Refused, UnsupportedSopClass

BOUNDARY = "b-1"
BODIES = st.lists(
    st.binary(max_size=40)
    | st.sampled_from([b"\r\n--b-", b"\r\n--", b"\r\n\r\n", b"\r\n--b", b"--b-1", b"\r", b"\r\n--b\r\n"]),
    max_size=6,
).map(b"".join)
SMALL = {"min_size": 1, "max_size": 5}


def message(bodies: list[bytes], *, preamble: bytes = b"", epilogue: bytes = b"") -> bytes:
    """A multipart message."""
    head = b"".join(b"\r\n--b-1\r\nContent-Type: application/dicom\r\n\r\n" + body for body in bodies)
    return (preamble + head)[0 if preamble else 2 :] + b"\r\n--b-1--\r\n" + epilogue


def portions(data: bytes, seed: int) -> list[bytes]:
    """The same bytes in pieces of 1 to 9."""
    source = random.Random(seed)
    pieces = []
    while data:
        size = source.randint(1, 9)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def parts_of(data: list[bytes], longest: int = 1 << 20) -> list[Part]:
    """All parts of a message that comes in these portions."""
    reader = MultipartReader(BOUNDARY, longest)
    found = [part for piece in data for part in reader.feed(piece)]
    reader.close()
    return found


@given(st.lists(BODIES, **SMALL), st.integers(), st.sampled_from([b"", b"This is a preamble."]), st.binary(max_size=20))
def test_parts_come_out_as_they_went_in(bodies: list[bytes], seed: int, preamble: bytes, epilogue: bytes) -> None:
    if any(b"\r\n--b-1" in b"\r\n" + body for body in bodies):
        return  # no sender may choose such a boundary
    found = parts_of(portions(message(bodies, preamble=preamble, epilogue=epilogue), seed))
    assert [bytes(part.body) for part in found] == bodies
    assert all(part.media_type == "application/dicom" for part in found)


@given(st.lists(BODIES, **SMALL), st.integers(), st.data())
def test_a_message_cut_short_is_an_error(bodies: list[bytes], seed: int, data: st.DataObject) -> None:
    whole = message(bodies)
    end = whole.rindex(b"--b-1--") + len(b"--b-1-")
    cut = data.draw(st.integers(0, end))
    with pytest.raises(MalformedMessage):
        parts_of(portions(whole[:cut], seed))


@given(st.binary(max_size=300), st.integers())
def test_garbage_ends_in_one_kind_of_error(garbage: bytes, seed: int) -> None:
    for data in (garbage, b"--b-1" + garbage, b"--b-1\r\n" + garbage):
        try:
            parts_of(portions(data, seed))
        except MalformedMessage:
            continue


def test_bounds_hold_before_the_bytes_are_there() -> None:
    head = b"--b-1\r\nContent-Type: application/dicom\r\n\r\n"
    assert len(parts_of([head, b"x" * 100, b"\r\n--b-1--"], longest=100)) == 1
    with pytest.raises(MalformedMessage, match="longer"):
        parts_of([head, *[b"x" * 10] * 11], longest=100)
    with pytest.raises(MalformedMessage, match="header"):
        parts_of([b"--b-1\r\n", *[b"X-A: " + b"y" * 1000 + b"\r\n"] * 20])
    with pytest.raises(MalformedMessage, match="boundary"):
        parts_of([b"z" * 1000] * 100)
    with pytest.raises(MalformedMessage, match="boundary"):
        parts_of([b"--b-1 what is this?\r\n\r\n"])


@pytest.mark.parametrize(
    ("field", "boundary"),
    [
        ('multipart/related; type="application/dicom"; boundary=b-1', "b-1"),
        ('Multipart/Related; Boundary="a b:c"; type=application/dicom', "a b:c"),
        ("multipart/related;boundary=----x", "----x"),
        ("multipart/related", None),
        ("multipart/related; boundary=", None),
        (f"multipart/related; boundary={'x' * 201}", None),
        ("multipart/mixed; boundary=x", None),
        ("application/dicom", None),
        ("", None),
    ],
)
def test_boundaries(field: str, boundary: str | None) -> None:
    if boundary is None:
        with pytest.raises(MalformedMessage):
            boundary_of(field)
    else:
        assert boundary_of(field) == boundary
        assert media_type_of(field)[0] == "multipart/related"


def ct(
    syntax: str = ExplicitVRLittleEndian,
    sop_class: str = CTImageStorage,
) -> bytes:
    """A Part 10 file."""
    header = Dataset()
    header.SOPClassUID = sop_class
    header.SOPInstanceUID = "1.2.3.4"
    header.StudyInstanceUID = "1.2.3"
    header.SeriesInstanceUID = "1.2.3.1"
    header.PixelData = bytes(8)
    header["PixelData"].VR = "OW"
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax
    header.file_meta.MediaStorageSOPClassUID = sop_class
    header.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    header.file_meta.PrivateInformationCreatorUID = "1.9"
    header.file_meta.PrivateInformation = b"\x01\x02"
    buffer = io.BytesIO()
    dcmwrite(buffer, header, enforce_file_format=True)
    return buffer.getvalue()


def received(data: bytes) -> bytes:
    """What is stored of a file."""
    return b"".join(received_file(data, source_ae="X", address="", association_id="a").parts)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, "1.2.840.10008.1.2"])
def test_a_file_keeps_its_data_set(syntax: str) -> None:
    data = ct(syntax)
    stored = received(data)
    assert dcmread(io.BytesIO(stored)) == dcmread(io.BytesIO(data))
    meta = 144 + int.from_bytes(data[140:144], "little")
    assert stored.endswith(data[meta:])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", NotDicom),
        (b"\x00" * 200, NotDicom),
        (ct()[:134], NotDicom),
        (ct()[:200], OsteoError),
        (ct()[:-3], NotDicom),
        (ct(sop_class=MRImageStorage), UnsupportedSopClass),
        (ct().replace(b"1.2.3.4\0", b"1.2.3.5\0", 1), DataSetMismatch),
        (ct().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"), UnsupportedSopClass),
    ],
)
def test_files_that_are_not_what_they_say(data: bytes, error: type[OsteoError]) -> None:
    with pytest.raises(error):
        received(data)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_a_changed_file_is_taken_or_refused(position: int, noise: bytes) -> None:
    data = bytearray(ct())
    data[position : position + len(noise)] = noise
    try:
        received(bytes(data))
    except OsteoError:
        return


GOOD = StoredPart(CTImageStorage, "1.2.3.4")
FULL = StoredPart(CTImageStorage, "1.2.3.5", 0xA700, no_room=True)
BUSY = StoredPart(CTImageStorage, "1.2.3.6", 0xA700)
WRONG = StoredPart(CTImageStorage, "1.2.3.7", 0xA900)
UNREADABLE = StoredPart("", "", 0xC000)


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([GOOD, GOOD], 200),
        ([GOOD, WRONG], 202),
        ([GOOD, FULL], 202),
        ([WRONG, UNREADABLE], 409),
        ([WRONG, FULL], 409),
        ([BUSY, BUSY], 503),
        ([BUSY, FULL], 507),
    ],
)
def test_status_of_a_request(parts: list[StoredPart], status: int) -> None:
    assert http_status(parts) == status


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["Value", "vr", "0020000D"]), inner),
    max_leaves=8,
)
TAGS = st.sampled_from(["0020000D", "00081198", "00081199", "0008119A", "00081155", "00081197", "00080061", "00201208"])


@given(st.dictionaries(TAGS, ANYTHING), st.sampled_from([200, 202, 409]))
def test_whatever_a_server_answers_is_no_crash(document: dict[str, object], status: int) -> None:
    assert re.fullmatch(r"[0-9.]{0,64}", study_of(document).study_instance_uid)
    for body in (json.dumps(document), json.dumps([document])):
        with contextlib.suppress(Refused):
            failure_of(status, body.encode(), "1.2.3.4", "host")


def test_no_path_comes_out_of_an_answer() -> None:
    for uid in ("1.2/../../x", "..%2f", "1.2?x=", "", "1" * 65):
        assert study_of({"0020000D": {"vr": "UI", "Value": [uid]}}).study_instance_uid == ""


def test_store_response_in_both_forms() -> None:
    parts = [GOOD, WRONG, UNREADABLE]
    from_json = Dataset.from_json(store_response(parts, DICOM_JSON).decode())
    from_xml = _load_xml_dataset(ElementTree.fromstring(store_response(parts, DICOM_XML)))  # noqa: S314 - our own
    for answer in (from_json, from_xml):
        assert [item.ReferencedSOPInstanceUID for item in answer.ReferencedSOPSequence] == ["1.2.3.4"]
        (failed,) = answer.FailedSOPSequence
        assert (failed.ReferencedSOPInstanceUID, failed.FailureReason) == ("1.2.3.7", 0xA900)
        assert [item.FailureReason for item in answer.OtherFailuresSequence] == [0xC000]
    assert "00081198" not in json.loads(store_response([GOOD], DICOM_JSON))
