"""From a screening result to the DICOM objects of every destination, the same bytes for the same input."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Protocol

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.uid import UID

from osteo_daemon.dicom import codes
from osteo_daemon.dicom.basic_text import as_basic_text
from osteo_daemon.dicom.key_objects import KEY_OBJECTS_CLASS_UID, key_objects_dataset
from osteo_daemon.dicom.measurement_group import ReportAnatomy, SegmentReference
from osteo_daemon.dicom.outline import NativeMask, on_native_grid
from osteo_daemon.dicom.picture import PictureContent, draw_pdf, draw_picture, encode_png
from osteo_daemon.dicom.report import (
    BASIC_TEXT,
    SR_CLASSES,
    SeriesReference,
    observer,
    report_content,
    report_dataset,
    retarget,
)
from osteo_daemon.dicom.report_forms import DEFAULT_KINDS, SEGMENT_REFERENCE, BuiltObject, BuiltReport
from osteo_daemon.dicom.report_pdf import ENCAPSULATED_PDF_CLASS_UID, pdf_dataset
from osteo_daemon.dicom.report_source import ReportSource, VertebraRegions, clean_headers, instances
from osteo_daemon.dicom.reported_values import as_reported, result_digest
from osteo_daemon.dicom.secondary_capture import SECONDARY_CAPTURE_CLASS_UID, picture_dataset
from osteo_daemon.dicom.segmentation import SEGMENTATION_CLASS_UID, plan_segments, segmentation_dataset
from osteo_daemon.dicom.uids import (
    IMPLEMENTATION_CLASS_UID,
    implementation_version_name,
    result_instance_uid,
    result_series_uid,
)
from osteo_daemon.domain.eligibility import age_years
from osteo_daemon.domain.findings import Level, ModelReference, Outcome, ScreeningResult
from osteo_daemon.domain.references import l1_age_reference
from osteo_daemon.domain.trend import EarlierValue
from osteo_daemon.domain.wording import Wording, load_wording
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.settings import SiteSettings


class Predecessor(Protocol):
    """A report object that the new one replaces."""

    @property
    def sop_class_uid(self) -> str:
        """SOP Class UID."""

    @property
    def sop_instance_uid(self) -> str:
        """SOP Instance UID."""

    @property
    def series_instance_uid(self) -> str:
        """Series Instance UID."""


@dataclass(frozen=True, slots=True, eq=False)
class ReportRequest:
    """Everything that a report is made from.

    Attributes:
        created: when the result was made, with a time zone; the only source of times in the objects. A second build
            for the same revision must be given the same moment.
        volume: None for an excluded study without a usable volume.
        network_bundle: name of the bundle (among ``result.models``) behind the network values.
        effective_settings: a canonical description of all settings that shaped the result; goes into the UIDs.
        predecessors: reports of earlier revisions, by SR variant (`osteo_daemon.dicom.report_forms.sr_variant`).
        wording: texts in the site's language.
        earlier: the same patient's earlier studies for the picture's trend, oldest first.
    """

    result: ScreeningResult
    source: ReportSource
    volume: CtVolume | None
    regions: Mapping[Level, VertebraRegions]
    site: SiteSettings
    software_version: str
    created: datetime
    revision: int = 1
    network_bundle: str | None = None
    effective_settings: str = ""
    predecessors: Mapping[str, Predecessor] = field(default_factory=dict)
    wording: Wording = field(default_factory=load_wording)
    earlier: Sequence[EarlierValue] = ()

    @property
    def local_created(self) -> datetime:
        """``created`` in the site's time zone."""
        offset = self.site.timezone_offset
        minutes = int(offset[1:3]) * 60 + int(offset[3:5])
        zone = timezone(timedelta(minutes=-minutes if offset[0] == "-" else minutes))
        return self.created.astimezone(zone)


def build_report_objects(
    request: ReportRequest,
    variants: Iterable[str] = ("comprehensive-3d+seg",),
    kinds: Set[str] = DEFAULT_KINDS,
) -> BuiltReport:
    """Build segmentation, structured reports, picture, and on demand key objects and a PDF.

    An excluded study gets structured reports alone: they hold the reason and no number. So does a study in which no
    vertebra has a centre; a segmentation needs at least one region.

    Args:
        variants: forms of the structured report, see `osteo_daemon.dicom.report_forms`.
        kinds: which objects to make besides those of `DEFAULT_KINDS`.

    Raises:
        ValueError: the volume and the headers do not match, or ``created`` has no time zone.
        Damaged: the source headers lack what a report must refer to.
    """
    if request.created.tzinfo is None:
        raise ValueError("the moment of creation needs a time zone")
    builder = _Builder(request)
    segmentation, segments = builder.segmentation()
    wanted = {variant if segmentation is not None else variant.removesuffix(SEGMENT_REFERENCE) for variant in variants}
    reports = [
        *builder.reports([name for name in wanted if name.endswith(SEGMENT_REFERENCE)], segmentation, segments),
        *builder.reports([name for name in wanted if not name.endswith(SEGMENT_REFERENCE)], None, {}),
    ]
    picture, png = builder.picture()
    on_demand = (
        builder.key_objects() if "kos" in kinds else None,
        picture,
        builder.pdf() if "pdf" in kinds else None,
    )
    objects = [
        *([segmentation.built] if segmentation else []),
        *reports,
        *(built for built in on_demand if built is not None),
    ]
    return BuiltReport(tuple(objects), png)


@dataclass(frozen=True, slots=True, eq=False)
class _Segmentation:
    built: BuiltObject
    dataset: Dataset


class _Builder:
    def __init__(self, request: ReportRequest) -> None:
        volume, headers = request.volume, clean_headers(request.source)
        if volume is not None:
            slice_shape = (int(headers[0].Rows), int(headers[0].Columns))
            if volume.voxels.shape != (len(headers), *slice_shape):
                raise ValueError(
                    f"the volume is {volume.voxels.shape}, the source {len(headers)} slices of {slice_shape}"
                )
        self.request = request
        self.headers = headers
        self.result = as_reported(request.result)
        self.digest = result_digest(
            request.result, f"{request.effective_settings}{request.wording.digest}{[*request.earlier]}"
        )
        bodies: dict[Level, NativeMask] = {}
        trabecular: dict[Level, NativeMask] = {}
        if volume is not None:
            for finding in self.result.vertebrae:
                regions = request.regions.get(finding.level)
                for masks, region in (
                    () if regions is None else ((bodies, regions.body), (trabecular, regions.trabecular))
                ):
                    native = None if region is None else on_native_grid(region, volume)
                    if native is not None:
                        masks[finding.level] = native
        self.anatomy = ReportAnatomy(headers, volume, bodies, trabecular)
        self.created = request.local_created

    def segmentation(self) -> tuple[_Segmentation | None, dict[Level, SegmentReference]]:
        segments = plan_segments(self.anatomy.bodies, self.anatomy.trabecular)
        if not segments:
            return None, {}
        instance_uid = self._instance_uid(SEGMENTATION_CLASS_UID, "")
        dataset = segmentation_dataset(
            segments,
            self.headers,
            series_instance_uid=self._series_uid("seg"),
            sop_instance_uid=instance_uid,
            instance_number=self.request.revision,
            software_version=self.request.software_version,
            device_serial_number=self.request.site.device_serial_number,
            institution=self.request.site.institution,
            contributing_equipment=self._equipment(),
        )
        references = {
            segment.level: SegmentReference(SEGMENTATION_CLASS_UID, instance_uid, number)
            for number, segment in enumerate(segments, start=1)
            if not segment.trabecular
        }
        return _Segmentation(self._finish("seg", "", dataset), dataset), references

    def reports(
        self, variants: Sequence[str], segmentation: _Segmentation | None, segments: Mapping[Level, SegmentReference]
    ) -> Iterator[BuiltObject]:
        """One document per variant; they share the tree, which is legal in every class."""
        if not variants:
            return
        content, slices = self._content(segments)
        dataset = report_dataset(
            content,
            [*instances(slices), *([] if segmentation is None else [segmentation.dataset])],
            series_instance_uid=self._series_uid("sr"),
            instance_number=self.request.revision,
            is_complete=all(finding.attenuation_hu is not None for finding in self.result.vertebrae),
            software_version=self.request.software_version,
            device_serial_number=self.request.site.device_serial_number,
            institution=self.request.site.institution,
            contributing_equipment=self._equipment(),
        )
        for variant in sorted(variants):
            name = variant.removesuffix(SEGMENT_REFERENCE)
            document = as_basic_text(dataset) if name == BASIC_TEXT else dataset
            sop_class_uid = SR_CLASSES[name]
            retarget(document, sop_class_uid, self._instance_uid(sop_class_uid, variant), self._predecessors(variant))
            yield self._finish("sr", variant, document)

    def picture(self) -> tuple[BuiltObject | None, bytes | None]:
        content = self._picture_content()
        if content is None:
            return None, None
        pixels: npt.NDArray[np.uint8] = draw_picture(content)
        dataset = picture_dataset(
            pixels,
            self.headers[0],
            series_instance_uid=self._series_uid("sc"),
            sop_instance_uid=self._instance_uid(SECONDARY_CAPTURE_CLASS_UID, ""),
            instance_number=self.request.revision,
            software_version=self.request.software_version,
            device_serial_number=self.request.site.device_serial_number,
            institution=self.request.site.institution,
            contributing_equipment=self._equipment(),
        )
        return self._finish("sc", "", dataset), encode_png(pixels)

    def pdf(self) -> BuiltObject | None:
        content = self._picture_content()
        if content is None:
            return None
        dataset = pdf_dataset(
            draw_pdf(content),
            self.headers[0],
            title=self.request.wording.tables["label"]["title"],
            series_instance_uid=self._series_uid("pdf"),
            sop_instance_uid=self._instance_uid(ENCAPSULATED_PDF_CLASS_UID, ""),
            instance_number=self.request.revision,
            software_version=self.request.software_version,
            device_serial_number=self.request.site.device_serial_number,
            institution=self.request.site.institution,
            sources=instances(self._measured_slices()),
            contributing_equipment=self._equipment(),
        )
        return self._finish("pdf", "", dataset)

    def key_objects(self) -> BuiltObject | None:
        if not self.result.vertebrae or self.result.outcome is not Outcome.REPORTED:
            return None
        site = self.request.site
        dataset = key_objects_dataset(
            self._measured_slices(),
            observer(self.result, self.request.software_version, site.device_serial_number),
            f"{self.request.wording.tables['notice']['prefix']} {self.request.wording.conclusion(self.result)}",
            series_instance_uid=self._series_uid("kos"),
            sop_instance_uid=self._instance_uid(KEY_OBJECTS_CLASS_UID, ""),
            instance_number=self.request.revision,
            institution=site.institution,
            contributing_equipment=self._equipment(),
        )
        return self._finish("kos", "", dataset)

    def _picture_content(self) -> PictureContent | None:
        volume = self.request.volume
        if volume is None or not self.result.vertebrae or self.result.outcome is not Outcome.REPORTED:
            return None
        header = self.headers[0]
        study_date = str(header.get("StudyDate") or "")
        age = age_years(str(header.get("PatientAge") or ""), str(header.get("PatientBirthDate") or ""), study_date)
        return PictureContent(
            result=self.result,
            volume=volume,
            bodies=self.anatomy.bodies,
            trabecular=self.anatomy.trabecular,
            wording=self.request.wording,
            software_version=self.request.software_version,
            age_reference=None if age is None else l1_age_reference(age),
            earlier=self.request.earlier,
            study_date=_date(study_date),
        )

    def _measured_slices(self) -> tuple[Dataset, ...]:
        return self._content({})[1]

    def _content(
        self, segments: Mapping[Level, SegmentReference]
    ) -> tuple[sr.ContainerContentItem, tuple[Dataset, ...]]:
        return report_content(
            self.result,
            self.anatomy,
            self.request.wording,
            network_model=self._network_model(),
            segments=segments,
            software_version=self.request.software_version,
            device_serial_number=self.request.site.device_serial_number,
        )

    def _network_model(self) -> ModelReference | None:
        return next((model for model in self.result.models if model.bundle == self.request.network_bundle), None)

    def _series_uid(self, kind: str) -> str:
        return result_series_uid(kind, self.result.study_instance_uid, self.request.software_version)

    def _instance_uid(self, sop_class_uid: str, variant: str) -> str:
        study, version = self.result.study_instance_uid, self.request.software_version
        return result_instance_uid(sop_class_uid, variant, study, self.request.revision, self.digest, version)

    def _predecessors(self, variant: str) -> SeriesReference | None:
        predecessor = self.request.predecessors.get(variant)
        if predecessor is None:
            return None
        return SeriesReference(
            study_instance_uid=self.result.study_instance_uid,
            series_instance_uid=predecessor.series_instance_uid,
            sop_class_uid=predecessor.sop_class_uid,
            sop_instance_uid=predecessor.sop_instance_uid,
        )

    def _equipment(self) -> list[hd.ContributingEquipment]:
        # the Device UID stands in the report's observer context: validators of today do not know it here
        item = hd.ContributingEquipment(
            manufacturer="osteo_daemon",
            purpose_of_reference=codes.PROCESSING_EQUIPMENT,
            manufacturer_model_name="osteo_daemon",
            software_versions=[
                self.request.software_version,
                *(f"{model.bundle} {model.version}"[:64] for model in self.result.models),
            ],
            device_serial_number=self.request.site.device_serial_number,
            institution_name=self.request.site.institution or None,
            station_name=self.request.site.station_name[:16] or None,
            contribution_datetime=self.created,
            contribution_description="Automated measurement of vertebral attenuation",
        )
        return [item]

    def _finish(self, kind: str, variant: str, dataset: Dataset) -> BuiltObject:
        date, time = self.created.strftime("%Y%m%d"), self.created.strftime("%H%M%S.%f")
        for prefix in ("InstanceCreation", "Content", "Series"):
            setattr(dataset, f"{prefix}Date", date)
            setattr(dataset, f"{prefix}Time", time)
        if kind == "sc":
            dataset.DateOfSecondaryCapture, dataset.TimeOfSecondaryCapture = date, time
        for item in dataset.ContributingEquipmentSequence:
            # highdicom enters itself with the moment of the call
            if item.get("ManufacturerModelName") == "highdicom":
                item.ContributionDateTime = f"{date}{time}"
        dataset.TimezoneOffsetFromUTC = self.request.site.timezone_offset
        if self.request.site.station_name:
            dataset.StationName = self.request.site.station_name[:16]
        dataset.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
        dataset.file_meta.ImplementationVersionName = implementation_version_name(self.request.software_version)
        _declare_private_scheme(dataset)
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
        return BuiltObject(
            kind=kind,
            variant=variant,
            sop_class_uid=str(dataset.SOPClassUID),
            sop_instance_uid=str(dataset.SOPInstanceUID),
            series_instance_uid=str(dataset.SeriesInstanceUID),
            data=buffer.getvalue(),
        )


def _date(value: str) -> date | None:
    try:
        return datetime.strptime(value, "%Y%m%d").replace(tzinfo=UTC).date()
    except ValueError:
        return None


def _declare_private_scheme(dataset: Dataset) -> None:
    item = Dataset()
    item.CodingSchemeDesignator = codes.SCHEME
    item.CodingSchemeName = codes.SCHEME_NAME
    dataset.CodingSchemeIdentificationSequence = [item]
