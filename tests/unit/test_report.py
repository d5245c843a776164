"""The structured report: what no validator sees. Numbers, identity, references, tracking, sameness, round trip."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from osteo_daemon.dicom import codes
from osteo_daemon.dicom.report import SR_CLASSES
from osteo_daemon.dicom.report_forms import BuiltReport, needed_variants, sr_candidates
from osteo_daemon.dicom.report_objects import ReportRequest, build_report_objects
from osteo_daemon.dicom.report_reader import NotOurReport, parse_report, read_report
from osteo_daemon.dicom.report_source import ReportSource
from osteo_daemon.dicom.report_text import format_report
from osteo_daemon.dicom.reported_values import as_reported
from osteo_daemon.domain.findings import Category, Level
from osteo_daemon.domain.wording import LANGUAGES, load_wording
from osteo_daemon.errors import NotDicom
from osteo_daemon.settings import DestinationSettings
from tests.report_cases import (
    CREATED,
    LEVELS,
    SERIES_UID,
    STUDY_UID,
    encoded_name_case,
    excluded_case,
    indeterminate_case,
    short_case,
    synthetic_case,
    with_result,
    withheld_case,
)


def dataset_of(report: BuiltReport, kind: str = "sr") -> Dataset:
    return pydicom.dcmread(io.BytesIO(next(built.data for built in report.objects if built.kind == kind)))


@pytest.fixture(scope="module")
def request_() -> ReportRequest:
    return synthetic_case()


@pytest.fixture(scope="module")
def report(request_: ReportRequest) -> BuiltReport:
    return build_report_objects(request_)


@pytest.fixture(scope="module")
def sr(report: BuiltReport) -> Dataset:
    return dataset_of(report)


def walk(item: Dataset) -> Iterator[Dataset]:
    for child in item.get("ContentSequence", ()):
        yield child
        yield from walk(child)


def groups(sr: Dataset) -> list[Dataset]:
    return [item for item in walk(sr) if item.ConceptNameCodeSequence[0].CodeValue == "125007"]


def child(item: Dataset, value: str) -> Dataset:
    return next(each for each in item.ContentSequence if each.ConceptNameCodeSequence[0].CodeValue == value)


@pytest.mark.parametrize("make", [synthetic_case, indeterminate_case, withheld_case, excluded_case])
def test_a_report_read_back_is_the_result_as_reported(make: type) -> None:
    request = make()
    assert parse_report(dataset_of(build_report_objects(request))) == as_reported(request.result)


@pytest.mark.parametrize("variant", sr_candidates("comprehensive-3d", with_segmentation=True))
def test_every_class_reads_back_as_the_same_result(variant: str, request_: ReportRequest) -> None:
    report = build_report_objects(request_, [variant])
    dataset = dataset_of(report)
    assert dataset.SOPClassUID == SR_CLASSES[variant.removesuffix("+seg")]
    assert parse_report(dataset) == as_reported(request_.result)
    segmentation = next(built.sop_instance_uid for built in report.objects if built.kind == "seg")
    assert (segmentation in dataset.to_json()) == variant.endswith("+seg")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_reads_back_and_is_shown(language: str) -> None:
    wording = load_wording(language)
    for make in (withheld_case, excluded_case):
        request = dataclasses.replace(make(), wording=wording)
        for variant in ("comprehensive-3d", "basic-text"):
            dataset = dataset_of(build_report_objects(request, [variant]))
            assert dataset.SpecificCharacterSet == "ISO_IR 192"
            assert parse_report(dataset) == as_reported(request.result)
            assert child(dataset, "121049").ConceptCodeSequence[0].CodeValue == wording.language_in_dicom
            text = format_report(dataset)
            for expected in (wording.conclusion(request.result), wording.next_step(request.result)):
                assert expected in text
            assert "".join(wording.disclaimer.split()) in "".join(text.split())


def test_basic_text_has_no_number_and_no_coordinate() -> None:
    dataset = dataset_of(build_report_objects(withheld_case(), ["basic-text+seg"]))
    types = {(item.ValueType, item.RelationshipType) for item in walk(dataset)}
    assert {value for value, _ in types} == {"CODE", "CONTAINER", "IMAGE", "TEXT", "UIDREF"}
    # relationships of PS3.3 A.35.1.3.1.2
    assert {relation for _, relation in types} == {"CONTAINS", "HAS CONCEPT MOD", "HAS OBS CONTEXT"}
    assert not [item for item in walk(dataset) if "MeasuredValueSequence" in item or "GraphicData" in item]
    # the conclusion is what a viewer shows first
    first = next(item for item in dataset.ContentSequence if item.RelationshipType == "CONTAINS")
    assert first.ConceptNameCodeSequence[0].CodeValue == codes.QUALITATIVE_EVALUATIONS.value


def test_rounding_is_what_the_documents_say(request_: ReportRequest) -> None:
    finding = request_.result.vertebrae[0]
    reported = as_reported(request_.result).vertebrae[0]
    assert finding.attenuation_hu is not None
    assert reported.attenuation_hu is not None
    assert finding.network is not None
    assert reported.network is not None
    assert reported.attenuation_hu.mean == round(finding.attenuation_hu.mean, 1)
    assert reported.attenuation_hu.volume_mm3 == round(finding.attenuation_hu.volume_mm3)
    assert reported.network.bmd_g_cm2 == 0.912
    assert reported.network.t_score == -1.3
    assert reported.network.expert_weights == (0.25, 0.333, 0.417)
    assert as_reported(request_.result).durations_s == {}


def test_the_same_input_gives_the_same_bytes(request_: ReportRequest, report: BuiltReport) -> None:
    # durations differ from run to run and must not count
    again = build_report_objects(with_result(synthetic_case(), durations_s={"decode": 99.0}))
    assert [built.data for built in again.objects] == [built.data for built in report.objects]
    assert again.picture_png == report.picture_png


@pytest.mark.parametrize(
    "changed",
    [
        lambda request: with_result(request, category=Category.LOW),
        lambda request: dataclasses.replace(request, revision=2),
        lambda request: dataclasses.replace(request, software_version="0.2.0"),
        lambda request: dataclasses.replace(request, effective_settings="other"),
    ],
)
def test_a_changed_result_has_new_uids(changed: object) -> None:
    report = build_report_objects(short_case())
    other = build_report_objects(changed(short_case()))  # type: ignore[operator]
    assert not {built.sop_instance_uid for built in other.objects} & {
        built.sop_instance_uid for built in report.objects
    }


def test_uids_are_valid_and_one_series_holds_one_kind(report: BuiltReport) -> None:
    assert len({built.series_instance_uid for built in report.objects}) == 3
    for built in report.objects:
        for uid in (built.sop_instance_uid, built.series_instance_uid):
            assert uid.startswith("2.25.")
            assert pydicom.uid.UID(uid).is_valid


def test_every_group_is_tracked_and_lies_at_its_vertebra(sr: Dataset) -> None:
    found = groups(sr)
    assert len(found) == 2 * len(LEVELS)
    assert len({child(group, "112040").UID for group in found}) == len(found)
    sites = [child(group, "363698007").ConceptCodeSequence[0].CodeValue for group in found]
    assert sites == [codes.VERTEBRAE[level].value for level in LEVELS for _ in range(2)]


def test_numbers_stand_in_the_report_with_their_units(request_: ReportRequest, sr: Dataset) -> None:
    for finding, group in zip(as_reported(request_.result).vertebrae, groups(sr)[::2], strict=True):
        assert finding.attenuation_hu is not None
        numbers = [item for item in group.ContentSequence if item.ValueType == "NUM"]
        attenuation = [item for item in numbers if item.ConceptNameCodeSequence[0].CodeValue == "112031"]
        assert [float(item.MeasuredValueSequence[0].NumericValue) for item in attenuation] == [
            finding.attenuation_hu.mean,
            finding.attenuation_hu.median,
            finding.attenuation_hu.sd,
        ]
        units = {item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue for item in attenuation}
        assert units == {"[hnsf'U]"}


def test_the_outline_lies_on_the_slice_through_the_vertebra(request_: ReportRequest, sr: Dataset) -> None:
    headers = {str(header.SOPInstanceUID): header for header in request_.source.headers}
    for finding, group in zip(request_.result.vertebrae, groups(sr)[::2], strict=True):
        region = child(group, "111030")
        header = headers[str(region.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID)]
        points = np.array(region.GraphicData, dtype=float).reshape(-1, 2)
        assert region.GraphicType == "POLYLINE"
        assert np.array_equal(points[0], points[-1])
        # from pixel edges to patient coordinates as PS3.3 C.7.6.2.1.1 says, independently of the writer
        position = np.array(header.ImagePositionPatient, dtype=float)
        rows, columns = np.array(header.ImageOrientationPatient, dtype=float).reshape(2, 3)
        spacing = np.array(header.PixelSpacing, dtype=float)
        centre = points[:-1].mean(axis=0) - 0.5
        lps = position + rows * centre[0] * spacing[1] + columns * centre[1] * spacing[0]
        assert np.linalg.norm(lps - np.array(finding.centre_lps_mm)) < 3.0


def test_references_are_evidence_and_point_to_what_is_sent(report: BuiltReport, sr: Dataset) -> None:
    evidence = {
        str(instance.ReferencedSOPInstanceUID)
        for study in sr.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    }
    referenced = {
        str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) for item in walk(sr) if item.ValueType == "IMAGE"
    }
    segmentation = next(built.sop_instance_uid for built in report.objects if built.kind == "seg")
    assert referenced == evidence
    assert segmentation in referenced
    assert {uid for uid in referenced if uid != segmentation} <= {f"{SERIES_UID}.{d + 1}" for d in range(46)}


def test_identity_comes_from_the_source(request_: ReportRequest, report: BuiltReport) -> None:
    source = request_.source.headers[0]
    for kind in ("seg", "sr", "sc"):
        dataset = dataset_of(report, kind)
        for keyword in (
            "PatientName",
            "PatientID",
            "PatientBirthDate",
            "PatientSex",
            "AccessionNumber",
            "StudyID",
            "StudyDate",
            "StudyTime",
            "ReferringPhysicianName",
        ):
            assert dataset[keyword].value == source[keyword].value
        assert dataset.StudyInstanceUID == STUDY_UID
        assert dataset.SpecificCharacterSet == "ISO_IR 192"
        assert (dataset.ContentDate, dataset.ContentTime) == ("20261122", "133000.000000")
        assert dataset.TimezoneOffsetFromUTC == "+0100"
        assert dataset.SoftwareVersions == "0.1.0"


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 100", "Müller^Jörg"),
    ],
)
def test_names_survive_their_character_set(character_set: str | list[str], name: str) -> None:
    dataset = dataset_of(build_report_objects(encoded_name_case(character_set, name)))
    assert str(dataset.PatientName) == name


def test_illegal_header_values_cost_no_report() -> None:
    request = synthetic_case()
    for header in request.source.headers:
        header.PatientSex = "X"
        header["StudyDate"] = pydicom.DataElement("StudyDate", "LO", "2026.01.05")
        header["StudyTime"] = pydicom.DataElement("StudyTime", "LO", "ten")
    dataset = dataset_of(build_report_objects(request))
    assert (dataset.PatientSex, dataset.StudyDate, dataset.StudyTime) == ("", "", "")


def test_nothing_is_called_normal(report: BuiltReport, sr: Dataset) -> None:
    texts = [str(element.value) for item in walk(sr) for element in item.iterall() if element.VR in ("LO", "UT", "LT")]
    assert texts
    assert not [text for text in texts if "normal" in text.lower()]
    for category in Category:
        result = dataclasses.replace(synthetic_case().result, category=category)
        assert "normal" not in load_wording().impression(result).lower()
    assert "does not rule out" in load_wording().conclusion(synthetic_case().result)


def test_flags_of_completeness_and_verification(sr: Dataset) -> None:
    assert (sr.CompletionFlag, sr.PreliminaryFlag, sr.VerificationFlag) == ("COMPLETE", "PRELIMINARY", "UNVERIFIED")
    partial = dataset_of(build_report_objects(indeterminate_case()))
    assert partial.CompletionFlag == "PARTIAL"


def test_investigational_values_stand_apart_and_say_so(sr: Dataset) -> None:
    measured, estimated = groups(sr)[::2], groups(sr)[1::2]
    of_status = {
        status: {estimates.bmd, *estimates.interval_90, estimates.t_score, *estimates.class_probabilities.values()}
        for status, estimates in codes.ESTIMATES.items()
    }
    # a viewer that shows single values shows their meanings
    assert all("nvestigational" in code.meaning for code in of_status["investigational"])
    assert not any("nvestigational" in code.meaning for code in of_status["clinical"])
    investigational, clinical = ({code.value for code in of_status[name]} for name in ("investigational", "clinical"))
    assert not investigational & clinical
    for group in measured:
        assert not (investigational | clinical) & {item.ConceptNameCodeSequence[0].CodeValue for item in walk(group)}
    for group in estimated:
        status = child(group, codes.NETWORK_STATUS.value).ConceptCodeSequence[0]
        assert status.CodeMeaning.startswith("Investigational")
        named = {item.ConceptNameCodeSequence[0].CodeValue for item in walk(group)}
        assert investigational <= named
        assert not clinical & named
        assert "investigational" in child(group, "112039").TextValue
    comments = [item.TextValue for item in walk(sr) if item.ConceptNameCodeSequence[0].CodeValue == "121106"]
    english = load_wording()
    assert comments[:2] == [english.disclaimer, english.investigational]
    # the reference of the T-scores is named where people read, once
    assert comments[2:] == ["T-scores compare with: NHANES 2005-14, women 21-30 y, sBMD."]


def test_a_new_revision_names_its_predecessor(request_: ReportRequest, report: BuiltReport) -> None:
    old = next(built for built in report.objects if built.kind == "sr")
    later = dataclasses.replace(request_, revision=2, predecessors={old.variant: old})
    dataset = dataset_of(build_report_objects(later))
    study = dataset.PredecessorDocumentsSequence[0]
    instance = study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert (study.StudyInstanceUID, instance.ReferencedSOPInstanceUID) == (STUDY_UID, old.sop_instance_uid)
    assert dataset.InstanceNumber == 2


def test_no_segmentation_no_reference_to_one(request_: ReportRequest) -> None:
    report = build_report_objects(dataclasses.replace(request_, regions={}))
    assert [(built.kind, built.variant) for built in report.objects] == [("sr", "comprehensive-3d"), ("sc", "")]
    regions = [child(group, "111030") for group in groups(dataset_of(report))]
    assert {region.GraphicType for region in regions} == {"POINT"}


def test_destinations_get_their_class_and_its_fallbacks(request_: ReportRequest) -> None:
    plain = DestinationSettings(name="a", ae_title="A", host="h", port=1)
    narrow = DestinationSettings(name="b", ae_title="B", host="h", port=1, objects=("sr",), sr_class="comprehensive")
    variants = needed_variants([plain, narrow])
    assert set(variants) == {*sr_candidates("comprehensive-3d", True), *sr_candidates("comprehensive", False)}
    report = build_report_objects(request_, variants)
    assert [built.variant for built in report.for_destination(narrow)] == ["comprehensive", "enhanced", "basic-text"]
    assert [(built.kind, built.variant) for built in report.for_destination(plain)] == [
        ("seg", ""),
        *(("sr", variant) for variant in sr_candidates("comprehensive-3d", True)),
        ("sc", ""),
    ]
    assert needed_variants([]) == ("comprehensive-3d+seg",)


def test_a_volume_of_another_series_is_refused(request_: ReportRequest) -> None:
    with pytest.raises(ValueError, match="slices"):
        build_report_objects(dataclasses.replace(request_, source=ReportSource(request_.source.headers[1:])))
    with pytest.raises(ValueError, match="time zone"):
        build_report_objects(dataclasses.replace(request_, created=CREATED.replace(tzinfo=None)))


def test_time_changes_the_bytes_and_not_the_uids(request_: ReportRequest, report: BuiltReport) -> None:
    later = build_report_objects(dataclasses.replace(request_, created=CREATED + timedelta(minutes=1)))
    for one, other in zip(report.objects, later.objects, strict=True):
        assert one.sop_instance_uid == other.sop_instance_uid
        assert one.data != other.data


def test_text_for_people(request_: ReportRequest, sr: Dataset) -> None:
    text = format_report(sr)
    for finding in request_.result.vertebrae:
        assert finding.attenuation_hu is not None
        assert f"{finding.attenuation_hu.mean:.1f}" in text
    for expected in (
        "does not rule out low bone density",
        "INVESTIGATIONAL",
        "no correction for this tube",
        "osteo-moe 0.2.0",
    ):
        assert expected in text
    assert "Doe" not in text
    withheld = format_report(dataset_of(build_report_objects(withheld_case())))
    assert "Withheld: T-score, diagnosis class (the header gives no age)." in withheld
    excluded = format_report(dataset_of(build_report_objects(excluded_case())))
    assert "Not screened" in excluded
    assert "lung kernel" in excluded


def test_other_files_are_told_apart(tmp_path: object, report: BuiltReport) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    (folder / "text.dcm").write_text("no")
    with pytest.raises(NotDicom):
        read_report(folder / "text.dcm")
    (folder / "picture.dcm").write_bytes(next(built.data for built in report.objects if built.kind == "sc"))
    with pytest.raises(NotOurReport):
        read_report(folder / "picture.dcm")
    (folder / "report.dcm").write_bytes(next(built.data for built in report.objects if built.kind == "sr"))
    assert parse_report(read_report(folder / "report.dcm")).study_instance_uid == STUDY_UID
    dataset = read_report(folder / "report.dcm")
    dataset.ContentSequence = dataset.ContentSequence[:-1]
    with pytest.raises(NotOurReport):
        parse_report(dataset)


def test_segmentation_is_the_regions(request_: ReportRequest, report: BuiltReport) -> None:
    """Read by pydicom alone: frames, positions and pixel counts against the regions."""
    seg = dataset_of(report, "seg")
    pixels = seg.pixel_array
    counted: dict[int, int] = {}
    slices = {str(header.SOPInstanceUID): header for header in request_.source.headers}
    for frame, groups_ in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
        number = groups_.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        counted[number] = counted.get(number, 0) + int(frame.sum())
        source = groups_.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        position = groups_.PlanePositionSequence[0].ImagePositionPatient
        assert np.allclose([float(v) for v in position], [float(v) for v in slices[str(source)].ImagePositionPatient])
    labels = [item.SegmentLabel for item in seg.SegmentSequence]
    assert labels == [
        *(f"{level} vertebral body" for level in LEVELS),
        *(f"{level} trabecular region" for level in LEVELS),
    ]
    regions = request_.regions
    expected = [int(regions[level].body.mask.sum()) for level in LEVELS]
    expected += [int(regions[level].trabecular.mask.sum()) for level in LEVELS]
    assert [counted[number + 1] for number in range(len(labels))] == expected
    assert seg.SegmentationType == "BINARY"
    site = seg.SegmentSequence[len(LEVELS)].AnatomicRegionSequence[0]
    assert site.CodeValue == codes.VERTEBRAE[Level.T12].value
