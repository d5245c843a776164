"""Another object under a known SOP Instance UID: the same, the same image of a corrected patient, or a conflict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ImplicitVRLittleEndian, RLELossless, generate_uid

from osteo_daemon.dicom.compare import Comparison, compare_files, compare_objects
from osteo_daemon.errors import NotDicom
from tests.fakes import write_ct

IDENTICAL, SAME, DIFFERENT = Comparison.IDENTICAL, Comparison.SAME_IMAGE, Comparison.DIFFERENT
Change = Callable[[Dataset], object]


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ct(tmp_path_factory.mktemp("ct"), count=1)[0]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dose report, as far as it matters here."""
    (path,) = write_ct(tmp_path_factory.mktemp("sr"), count=1, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67")
    dataset = dcmread(path)
    for keyword in ("PixelData", "Rows", "Columns"):
        delattr(dataset, keyword)
    dataset.ContentSequence = [_item(TextValue="CTDIvol 7.1 mGy")]
    dataset.save_as(path)
    return path


def _item(**values: object) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _set(**values: object) -> Change:
    def change(dataset: Dataset) -> None:
        for keyword, value in values.items():
            setattr(dataset, keyword, value)

    return change


def _compared(path: Path, change: Change, folder: Path) -> Comparison:
    dataset = dcmread(path)
    change(dataset)
    other = folder / "other.dcm"
    dataset.save_as(other)
    found = compare_files(path, other)
    assert compare_files(other, path) is found
    return found


CORRECTED = _set(
    PatientName="Corrected^Name",
    PatientID="4711",
    AccessionNumber="A9",
    StudyDescription="CT abdomen",
    ReferencedRequestSequence=Sequence([_item(AccessionNumber="A9", StudyInstanceUID="1.2.3")]),
    InstanceCoercionDateTime="20261123",
    AdmissionID="17",
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_set(), IDENTICAL),
        (CORRECTED, SAME),
        (_set(SpecificCharacterSet="ISO_IR 192", PatientName="Änne^Größe"), SAME),
        (lambda dataset: setattr(dataset.file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian), SAME),
        (lambda dataset: dataset.compress(RLELossless, generate_instance_uid=False), SAME),
        (_set(ImagePositionPatient=[0, 0, 99]), DIFFERENT),
        (_set(RescaleIntercept=-1000), DIFFERENT),
        (_set(FrameOfReferenceUID=generate_uid()), DIFFERENT),
        (lambda dataset: setattr(dataset, "PixelData", dataset.PixelData[::-1]), DIFFERENT),
        (lambda dataset: dataset.__delattr__("PixelData"), DIFFERENT),
    ],
)
def test_an_image(ct: Path, tmp_path: Path, change: Change, expected: Comparison) -> None:
    assert _compared(ct, change, tmp_path) is expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_set(), IDENTICAL),
        (CORRECTED, SAME),
        (_set(ContentSequence=[_item(TextValue="CTDIvol 9.9 mGy")]), DIFFERENT),
        (_set(ContentSequence=[]), DIFFERENT),
        (_set(SeriesDescription="another"), DIFFERENT),
        (_set(ContentDate="20261123"), DIFFERENT),
    ],
)
def test_an_object_without_pixels(document: Path, tmp_path: Path, change: Change, expected: Comparison) -> None:
    """A corrected patient is no other document: an archive sends the whole study anew, with its dose report."""
    assert _compared(document, change, tmp_path) is expected


def test_what_cannot_be_read_or_decoded_is_undecided(ct: Path, tmp_path: Path) -> None:
    """In the child, which a broken code stream may end: never taken for the same, never an error of the receiver."""
    dataset = dcmread(ct)
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.PixelData = encapsulate([b"\xff" * 64])
    broken = tmp_path / "broken.dcm"
    dataset.save_as(broken)
    assert compare_objects(ct, broken) is Comparison.UNDECIDED
    broken.write_bytes(b"no file at all")
    with pytest.raises(NotDicom):
        compare_files(ct, broken)
