"""Independent validators accept every object that the node makes, from varied studies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest
from pydicom.misc import is_dicom

from osteo_daemon.dicom.report_forms import BuiltObject, sr_candidates
from osteo_daemon.dicom.report_objects import ReportRequest, build_report_objects
from osteo_daemon.dicom.report_reader import parse_report, read_report
from osteo_daemon.dicom.reported_values import as_reported
from osteo_daemon.domain.findings import Category
from osteo_daemon.domain.wording import load_wording
from tests import validators
from tests.report_cases import (
    acrin_case,
    encoded_name_case,
    enhanced_case,
    enhanced_header,
    excluded_case,
    excluded_source_case,
    indeterminate_case,
    short_case,
    synthetic_case,
    with_result,
    withheld_case,
)

CASES: dict[str, Callable[[], ReportRequest]] = {
    "six levels": synthetic_case,
    "plain": short_case,
    "indeterminate": indeterminate_case,
    "withheld": withheld_case,
    "low": lambda: with_result(short_case(), category=Category.LOW),
    "tilted, cranial first, mirrored": lambda: short_case(columns_left=False, cranial_first=True, tilt_degrees=15),
    "bare header": lambda: short_case(
        PatientName="", PatientID="", PatientBirthDate="", PatientSex="", StudyDate="", StudyTime="", StudyID=None,
        AccessionNumber=None, ReferringPhysicianName=None, Manufacturer=None, ManufacturerModelName=None,
        PatientAge=None, SeriesDate=None, SeriesTime=None, SpecificCharacterSet=None,
    ),
    "one-component name": lambda: short_case(PatientName="STUDY-0017", ReferringPhysicianName="REMOVED"),
    "Japanese": lambda: encoded_name_case(["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    "Chinese": lambda: encoded_name_case("GB18030", "Wang^XiaoDong=王^小东"),
    "Korean": lambda: encoded_name_case(["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    "excluded": excluded_case,
    "UTF-8": lambda: encoded_name_case("ISO_IR 192", "Šťastný^Žofie"),
    "feet first": lambda: short_case(columns_left=False, PatientPosition="FFS"),
    "enhanced multi-frame, excluded": lambda: excluded_source_case(enhanced_header(), "no_ct_series"),
    "enhanced multi-frame": enhanced_case,
    "report in Japanese": lambda: dataclasses.replace(withheld_case(), wording=load_wording("ja")),
    "report in Chinese": lambda: dataclasses.replace(excluded_case(), wording=load_wording("zh-Hans")),
    "report in French": lambda: dataclasses.replace(excluded_case(), wording=load_wording("fr")),
    "report in Spanish": lambda: dataclasses.replace(excluded_case(), wording=load_wording("es")),
    "report in German": lambda: dataclasses.replace(indeterminate_case(), wording=load_wording("de")),
}  # fmt: skip


# dozens of objects are made and each is given to several programs
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ALL_VARIANTS = sr_candidates("comprehensive-3d", with_segmentation=True)
PLAIN_VARIANTS = ("comprehensive-3d+seg", "comprehensive", "basic-text+seg")
ALL_KINDS = frozenset({"seg", "sr", "sc", "kos", "pdf"})
BASIC_TEXT = "basic-text"


@dataclass(frozen=True)
class Validated:
    """The objects of every case as files, and what PixelMed says of each report."""

    requests: dict[str, ReportRequest]
    files: dict[str, list[tuple[BuiltObject, Path]]]
    pixelmed: dict[Path, list[str]]


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Validated:
    folder = tmp_path_factory.mktemp("objects")
    requests = {name: make() for name, make in CASES.items()}
    files = {}
    for number, (name, request) in enumerate(requests.items()):
        variants = ALL_VARIANTS if name == "six levels" else PLAIN_VARIANTS
        report = build_report_objects(request, variants, ALL_KINDS)
        files[name] = [(built, folder / f"{number}-{built.kind}-{built.variant}.dcm") for built in report.objects]
        for built, path in files[name]:
            path.write_bytes(built.data)
    reports = [path for entries in files.values() for built, path in entries if pixelmed_sees(built)]
    return Validated(requests, files, validators.pixelmed([*reports, _with_one_outline(files["plain"], folder)]))


def pixelmed_sees(built: BuiltObject) -> bool:
    """Every selection of key objects, and reports whose template it knows: Basic Text follows none."""
    return built.kind == "kos" or (built.kind == "sr" and not built.variant.startswith(BASIC_TEXT))


def _with_one_outline(files: list[tuple[BuiltObject, Path]], folder: Path) -> Path:
    """A report with one outline in all: PixelMed must complain of a group that lacks what a planar region needs."""
    dataset = pydicom.dcmread(next(path for built, path in files if built.variant == "comprehensive-3d+seg"))
    measurements = next(
        item for item in dataset.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "126010"
    )
    group = measurements.ContentSequence[0]
    assert [item.ValueType for item in group.ContentSequence[-2:]] == ["SCOORD", "SCOORD"]
    group.ContentSequence = group.ContentSequence[:-1]
    path = folder / "broken.dcm"
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("name", CASES)
def test_validators_accept_the_objects_of(name: str, validated: Validated, tmp_path: Path) -> None:
    request = validated.requests[name]
    for built, path in validated.files[name]:
        found = validators.dciodvfy(path)
        if name == "bare header":
            # what the source does not say is not made up
            found = [line for line in found if "needed to build DICOMDIR" not in line]
        assert found == []
        assert (path in validated.pixelmed) == pixelmed_sees(built)
        assert validated.pixelmed.get(path, []) == []
        if built.kind in ("sr", "kos"):
            assert validators.dsrdump(path) == []
        if built.kind == "pdf":
            assert validators.pdf_pages(path, tmp_path) == 1
        if built.kind == "sr":
            # every class, every language: what went in comes out
            assert parse_report(read_report(path)) == as_reported(request.result)
            if request.result.vertebrae and not built.variant.startswith(BASIC_TEXT):
                groups = validators.measured_groups(path, tmp_path)
                networks = sum(finding.network is not None for finding in request.result.vertebrae)
                assert len(groups) == len(request.result.vertebrae) + networks
                assert all(group["TrackingUniqueIdentifier"] for group in groups)


def test_which_objects_are_made(validated: Validated) -> None:
    kinds = {name: {built.kind for built, _ in entries} for name, entries in validated.files.items()}
    for name in [name for name in kinds if validated.requests[name].result.exclusion]:
        assert kinds.pop(name) == {"sr"}
    assert set(map(frozenset, kinds.values())) == {ALL_KINDS}
    plain = [built for built, _ in validated.files["six levels"] if built.kind == "sr"]
    assert {built.variant for built in plain} == set(ALL_VARIANTS)
    assert len({built.sop_instance_uid for built in plain}) == len(ALL_VARIANTS) == 8


@pytest.mark.real_ct
def test_validators_accept_the_objects_of_a_real_ct(acrin: Path, tmp_path: Path) -> None:
    reports = []
    for built in build_report_objects(acrin_case(acrin), PLAIN_VARIANTS, ALL_KINDS).objects:
        path = tmp_path / f"{built.kind}-{built.variant}.dcm"
        path.write_bytes(built.data)
        assert validators.dciodvfy(path) == []
        if pixelmed_sees(built):
            reports.append(path)
        if built.kind == "sr":
            assert validators.dsrdump(path) == []
            if not built.variant.startswith(BASIC_TEXT):
                assert len(validators.measured_groups(path, tmp_path)) == 12
    assert validators.pixelmed(reports) == {path: [] for path in reports}
    assert {path.name for path in reports} > {"sr-comprehensive-3d+seg.dcm"}


@pytest.mark.real_ct
@pytest.mark.parametrize("series", ["cptac_pda_C3L-00189_lungbases", "dcm_qa_ct_ge_tilt_head"])
def test_validators_accept_the_report_of_a_real_excluded_study(
    series: str, real_series: Callable[[str], Path], tmp_path: Path
) -> None:
    """Real headers: a lung kernel; a tilted gantry with an identity that was removed without saying how."""
    source = next(path for path in sorted(real_series(series).rglob("*")) if path.is_file() and is_dicom(path))
    header = pydicom.dcmread(source, stop_before_pixels=True)
    for built in build_report_objects(excluded_source_case(header), PLAIN_VARIANTS, ALL_KINDS).objects:
        path = tmp_path / f"{built.variant}.dcm"
        path.write_bytes(built.data)
        found = [line for line in validators.dciodvfy(path) if "needed to build DICOMDIR" not in line]
        assert found == []
        assert validators.dsrdump(path) == []
        assert parse_report(read_report(path)).exclusion is not None


def test_the_validators_see_a_broken_report(validated: Validated, tmp_path: Path) -> None:
    """A check that cannot fail is none: each validator complains about the mistake that it is there for."""
    complaints = [line for path, lines in validated.pixelmed.items() if path.name == "broken.dcm" for line in lines]
    assert any("Missing conditional content item" in line for line in complaints)
    source = next(path for built, path in validated.files["plain"] if built.kind == "sr")
    broken = tmp_path / "broken.dcm"
    dataset = pydicom.dcmread(source)
    del dataset.CompletionFlag
    dataset.save_as(broken)
    assert any("CompletionFlag" in line for line in validators.dciodvfy(broken))
    dataset = pydicom.dcmread(source)
    dataset.ContentSequence[0].RelationshipType = "INFERRED FROM"
    dataset.save_as(broken)
    assert validators.dsrdump(broken)
