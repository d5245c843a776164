"""The picture's page as an Encapsulated PDF, for archives that hand documents to record systems."""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID, EncapsulatedPDFStorage, ExplicitVRLittleEndian

from osteo_daemon.dicom import codes
from osteo_daemon.dicom.series_description import series_description

PDF_SERIES_NUMBER = 9104
ENCAPSULATED_PDF_CLASS_UID = str(EncapsulatedPDFStorage)
_INHERITED = (
    "SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex",
    "PatientAge", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber",
    "ReferringPhysicianName",
)  # fmt: skip


def pdf_dataset(
    pdf: bytes,
    header: Dataset,
    *,
    title: str,
    series_instance_uid: str,
    sop_instance_uid: str,
    instance_number: int,
    software_version: str,
    device_serial_number: str,
    institution: str,
    sources: Sequence[Dataset],
    contributing_equipment: Sequence[hd.ContributingEquipment],
) -> Dataset:
    """A PDF as an Encapsulated PDF object (PS3.3 A.45.1) in the source study.

    Args:
        header: a cleaned header of the source series.
        sources: headers of the slices that the page was made from.
    """
    dataset = Dataset()
    for keyword in _INHERITED:
        if keyword in header:
            dataset[keyword] = header[keyword]
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = EncapsulatedPDFStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = UID(sop_instance_uid)
    dataset.Modality = "DOC"
    dataset.SeriesInstanceUID, dataset.SeriesNumber = series_instance_uid, PDF_SERIES_NUMBER
    dataset.SeriesDescription = series_description("document")
    dataset.InstanceNumber = instance_number
    dataset.Manufacturer = dataset.ManufacturerModelName = "osteo_daemon"
    dataset.SoftwareVersions, dataset.DeviceSerialNumber = software_version, device_serial_number
    if institution:
        dataset.InstitutionName = institution
    dataset.ConversionType = "WSD"
    dataset.AcquisitionDateTime = ""
    dataset.BurnedInAnnotation = "NO"
    dataset.DocumentTitle = title
    name = Dataset()
    code = codes.DIAGNOSTIC_IMAGING_REPORT
    name.CodeValue, name.CodingSchemeDesignator, name.CodeMeaning = code.value, code.scheme_designator, code.meaning
    dataset.ConceptNameCodeSequence = DicomSequence([name])
    dataset.SourceInstanceSequence = DicomSequence([_reference(source) for source in sources])
    dataset.VerificationFlag = "UNVERIFIED"
    dataset.MIMETypeOfEncapsulatedDocument = "application/pdf"
    dataset.EncapsulatedDocumentLength = len(pdf)
    dataset.EncapsulatedDocument = pdf + b"\x00" * (len(pdf) % 2)
    dataset.ContributingEquipmentSequence = DicomSequence(contributing_equipment)
    return dataset


def _reference(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    return item
