"""A series of CT images as one multi-frame object, as newer scanners and converters write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

_KEPT = (
    *("SpecificCharacterSet", "StudyDate", "StudyTime", "SeriesDate", "SeriesTime", "ContentDate", "ContentTime"),
    *("AccessionNumber", "Modality", "Manufacturer", "ManufacturerModelName", "ReferringPhysicianName"),
    *("StudyDescription", "SeriesDescription", "PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("PatientAge", "SoftwareVersions", "PatientPosition", "StudyInstanceUID", "SeriesInstanceUID", "StudyID"),
    *("SeriesNumber", "FrameOfReferenceUID", "PositionReferenceIndicator", "SamplesPerPixel"),
    *("PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelPaddingValue"),
)


def write_enhanced(
    path: Path,
    files: Sequence[Path],
    *,
    sop_class_uid: UID = EnhancedCTImageStorage,
    transfer_syntax_uid: UID = ExplicitVRLittleEndian,
    instance_number: int = 1,
) -> Dataset:
    """Write CT images of one series as the frames of one object, in the order given; what was written."""
    slices = [pydicom.dcmread(file) for file in files]
    dataset = enhanced_dataset(slices, sop_class_uid, instance_number)
    dataset.PixelData = b"".join(item.PixelData for item in slices)
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    if transfer_syntax_uid.is_encapsulated:
        dataset.compress(transfer_syntax_uid, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = transfer_syntax_uid
    dataset.save_as(path, enforce_file_format=True)
    return dataset


def enhanced_dataset(
    slices: Sequence[Dataset], sop_class_uid: UID = EnhancedCTImageStorage, instance_number: int = 1
) -> Dataset:
    """The object without its pixels."""
    legacy = sop_class_uid != EnhancedCTImageStorage
    dataset = Dataset()
    for keyword in _KEPT:
        if keyword in slices[0]:
            dataset[keyword] = slices[0][keyword]
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class_uid, generate_uid()
    dataset.InstanceNumber = instance_number
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    _describe(dataset)
    dataset.NumberOfFrames = len(slices)
    organization = generate_uid()
    dataset.DimensionOrganizationSequence = Items([_item(DimensionOrganizationUID=organization)])
    dataset.DimensionIndexSequence = Items(
        [
            _item(
                DimensionOrganizationUID=organization,
                DimensionIndexPointer=pointer,
                FunctionalGroupPointer=0x00209111,
            )
            for pointer in (0x00209056, 0x00209057)
        ]
    )
    shared, frames = (_legacy_groups if legacy else _groups)(slices)
    dataset.SharedFunctionalGroupsSequence = Items([shared])
    dataset.PerFrameFunctionalGroupsSequence = Items(frames)
    return dataset


def _describe(dataset: Dataset) -> None:
    dataset.DeviceSerialNumber = "17"
    dataset.BodyPartExamined = "ABDOMEN"
    dataset.AcquisitionNumber = 1
    dataset.AcquisitionDateTime = f"{dataset.StudyDate}{dataset.StudyTime}"
    dataset.AcquisitionDuration = 5.0
    dataset.PixelPresentation, dataset.VolumetricProperties = "MONOCHROME", "VOLUME"
    dataset.VolumeBasedCalculationTechnique = "NONE"
    dataset.ContentQualification = "PRODUCT"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.LossyImageCompression = "00"
    dataset.BurnedInAnnotation = "NO"
    dataset.MultienergyCTAcquisition = "NO"
    dataset.AcquisitionContextSequence = Items([])


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _group(**groups: Dataset) -> Dataset:
    return _item(**{keyword: Items([item]) for keyword, item in groups.items()})


def _place(item: Dataset, number: int) -> dict[str, Dataset]:
    return {
        "FrameContentSequence": _item(
            FrameAcquisitionNumber=1,
            FrameReferenceDateTime=f"{item.StudyDate}{item.StudyTime}",
            FrameAcquisitionDateTime=f"{item.StudyDate}{item.StudyTime}",
            FrameAcquisitionDuration=100.0,
            StackID="1",
            InStackPositionNumber=number,
            DimensionIndexValues=[1, number],
        ),
        "PlanePositionSequence": _item(ImagePositionPatient=item.ImagePositionPatient),
    }


def _same_geometry(item: Dataset) -> dict[str, Dataset]:
    return {
        "PixelMeasuresSequence": _item(PixelSpacing=item.PixelSpacing, SliceThickness=item.SliceThickness),
        "PlaneOrientationSequence": _item(ImageOrientationPatient=item.ImageOrientationPatient),
        "PixelValueTransformationSequence": _item(
            RescaleIntercept=item.RescaleIntercept, RescaleSlope=item.RescaleSlope, RescaleType="HU"
        ),
        "CTImageFrameTypeSequence": _item(
            FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
            PixelPresentation="MONOCHROME",
            VolumetricProperties="VOLUME",
            VolumeBasedCalculationTechnique="NONE",
        ),
    }


def _legacy_groups(slices: Sequence[Dataset]) -> tuple[Dataset, list[Dataset]]:
    """A converter keeps what it has no group for as it found it (PS3.3 C.7.6.16.2.25)."""
    first = slices[0]
    shared = _group(
        **_same_geometry(first),
        UnassignedSharedConvertedAttributesSequence=_item(KVP=first.KVP, ConvolutionKernel=first.ConvolutionKernel),
    )
    frames = [
        _group(
            **_place(item, number),
            UnassignedPerFrameConvertedAttributesSequence=_item(SliceLocation=item.get("SliceLocation")),
            ConversionSourceAttributesSequence=_item(
                ReferencedSOPClassUID=item.SOPClassUID, ReferencedSOPInstanceUID=item.SOPInstanceUID
            ),
        )
        for number, item in enumerate(slices, start=1)
    ]
    return shared, frames


def _groups(slices: Sequence[Dataset]) -> tuple[Dataset, list[Dataset]]:
    first = slices[0]
    field_mm = [float(first.PixelSpacing[0]) * first.Rows, float(first.PixelSpacing[1]) * first.Columns]
    abdomen = _item(CodeValue="818983003", CodingSchemeDesignator="SCT", CodeMeaning="Abdomen")
    shared = _group(
        **_same_geometry(first),
        FrameAnatomySequence=_item(AnatomicRegionSequence=Items([abdomen]), FrameLaterality="U"),
        CTAcquisitionTypeSequence=_item(AcquisitionType="SPIRAL", ConstantVolumeFlag="NO", FluoroscopyFlag="NO"),
        CTAcquisitionDetailsSequence=_item(
            RotationDirection="CW",
            RevolutionTime=0.5,
            SingleCollimationWidth=0.6,
            TotalCollimationWidth=38.4,
            TableHeight=100.0,
            GantryDetectorTilt=0.0,
            DataCollectionDiameter=500.0,
        ),
        IrradiationEventIdentificationSequence=_item(IrradiationEventUID=generate_uid()),
        CTTableDynamicsSequence=_item(TableSpeed=46.0, TableFeedPerRotation=23.0, SpiralPitchFactor=0.6),
        CTGeometrySequence=_item(DistanceSourceToDetector=1085.0, DistanceSourceToDataCollectionCenter=595.0),
        CTReconstructionSequence=_item(
            ReconstructionAlgorithm="FILTER_BACK_PROJ",
            ConvolutionKernel=first.ConvolutionKernel,
            ConvolutionKernelGroup="SOFT_TISSUE",
            ReconstructionFieldOfView=field_mm,
            ReconstructionPixelSpacing=first.PixelSpacing,
            ReconstructionAngle=360.0,
            ImageFilter="NONE",
        ),
        CTExposureSequence=_item(
            ExposureTimeInms=500.0,
            XRayTubeCurrentInmA=200.0,
            ExposureInmAs=100.0,
            ExposureModulationType="NONE",
            CTDIvol=8.0,
            CTDIPhantomTypeCodeSequence=Items(
                [_item(CodeValue="113691", CodingSchemeDesignator="DCM", CodeMeaning="IEC Body Dosimetry Phantom")]
            ),
        ),
        CTXRayDetailsSequence=_item(
            KVP=first.KVP,
            FocalSpots=[1.0],
            FilterType="FLAT",
            FilterMaterial="ALUMINUM",
            CalciumScoringMassFactorPatient=1.0,
        ),
    )
    frames = []
    for number, item in enumerate(slices, start=1):
        z = float(item.ImagePositionPatient[2])
        centre = [0.0, 0.0, z]
        frames.append(
            _group(
                **_place(item, number),
                CTPositionSequence=_item(
                    TablePosition=z, DataCollectionCenterPatient=centre, ReconstructionTargetCenterPatient=centre
                ),
            )
        )
    return shared, frames
