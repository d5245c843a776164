"""Vertebrae read from a DICOM segmentation of the study: what is measured there, and when the network takes over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from pydicom.dataset import Dataset

from osteo_daemon.dicom import codes
from osteo_daemon.domain.findings import Level, ModelReference
from osteo_daemon.imaging.region import Region
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.density import measure
from osteo_daemon.inference.masked_vertebrae import localize_masks
from osteo_daemon.inference.screening import Screening, StudyScreener
from osteo_daemon.inference.segment_codes import level_of_label
from osteo_daemon.inference.segmentation_reader import read_segmentation
from osteo_daemon.inference.vertebra import Localization
from osteo_daemon.inference.vertebra_source import Located, Scan
from osteo_daemon.phantom.dicom_series import write_series
from osteo_daemon.phantom.labels import body_mask, posterior_mask
from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import coarse_scanner
from osteo_daemon.phantom.study import PhantomStudy, TrueVertebra, render_study
from osteo_daemon.reporting import build_report
from osteo_daemon.settings import ScreenerSettings, Settings
from tests.segmentations import BONE, TISSUE, write_segmentation

SEED = 7_000_011
NAMES = ("T12", "L1", "L2", "L3", "L4", "L5")


@pytest.fixture(scope="module")
def study() -> PhantomStudy:
    patient = VirtualPatient(seed=SEED, age_years=66, sex="F", density_mg_cm3=90.0, bmi_kg_m2=24.0)
    return render_study(patient, coarse_scanner(3.0, noise_hu=12.0, seed=SEED), top="T11")


@pytest.fixture(scope="module")
def files(study: PhantomStudy, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_series(study, tmp_path_factory.mktemp("series"))


@pytest.fixture(scope="module")
def source(files: Sequence[Path]) -> list[Dataset]:
    return [pydicom.dcmread(path, stop_before_pixels=True) for path in files]


@pytest.fixture(scope="module")
def screener() -> StudyScreener:
    return StudyScreener.load(Settings(screener=ScreenerSettings(vertebrae="segmentation", network_enabled=False)))


def whole(study: PhantomStudy, level: str) -> npt.NDArray[np.bool_]:
    """A vertebra with its arch and processes."""
    return body_mask(study.labels, level) | posterior_mask(study.labels, level)


def whole_masks(study: PhantomStudy) -> dict[str, npt.NDArray[np.bool_]]:
    return {f"vertebrae_{level}": whole(study, level) for level in NAMES}


def _axes(vertebra: TrueVertebra) -> npt.NDArray[np.float64]:
    left, posterior, cranial = vertebra.axes.T
    return np.stack([-cranial, posterior, left])


def flags(screening: Screening) -> set[str]:
    return {flag.code for flag in screening.result.quality_flags}


def test_whole_vertebrae_are_cut_and_measured(study, files, source, screener, tmp_path: Path) -> None:
    path = write_segmentation(tmp_path / "seg.dcm", whole_masks(study), study.affine, source)
    screening = screener.screen([*files, path])
    volume = CtVolume(study.voxels.astype(np.float32), study.affine)
    truth = {v.level: v for v in study.vertebrae}
    found = {v.level.value: v for v in screening.result.vertebrae}
    assert set(found) == set(NAMES)
    for level, vertebra in found.items():
        assert vertebra.centre_lps_mm == pytest.approx(truth[level].centre_lps_mm, abs=3.0), level
        assert vertebra.attenuation_hu is not None
        body = Region(body_mask(study.labels, level), study.affine)
        drawn = measure(volume, body, _axes(truth[level])).attenuation
        assert drawn is not None
        assert vertebra.attenuation_hu.median == pytest.approx(drawn.median, abs=6.0), level
        assert vertebra.confidence > 0.95
        assert not vertebra.blocked
    dataset = pydicom.dcmread(path)
    (model,) = screening.result.models
    assert (model.bundle, model.version) == ("dicom-segmentation", dataset.SOPInstanceUID)
    assert screening.manifest["vertebrae"]["source"] == "segmentation"
    assert "vertebrae_from_segmentation" in flags(screening)


def test_bodies_alone_are_kept_whole(study, source, tmp_path: Path) -> None:
    bodies = {f"{level} vertebral body": body_mask(study.labels, level) for level in NAMES}
    types = dict.fromkeys(bodies, BONE)
    path = write_segmentation(tmp_path / "seg.dcm", bodies, study.affine, source, types=types)
    volume = CtVolume(study.voxels.astype(np.float32), study.affine)
    for vertebra in localize_masks(read_segmentation(path).regions, volume).vertebrae:
        drawn = np.count_nonzero(body_mask(study.labels, vertebra.level)) * volume.voxel_volume_mm3
        assert vertebra.body_region.volume_mm3 == pytest.approx(drawn, rel=0.1)


def test_axes_are_those_of_the_vertebra(study, source, tmp_path: Path) -> None:
    path = write_segmentation(tmp_path / "seg.dcm", whole_masks(study), study.affine, source)
    volume = CtVolume(study.voxels.astype(np.float32), study.affine)
    truth = {v.level: v.axes for v in study.vertebrae}
    for vertebra in localize_masks(read_segmentation(path).regions, volume).vertebrae:
        left, posterior, cranial = truth[vertebra.level].T
        assert vertebra.axes_lps[0] @ -cranial > np.cos(np.radians(12)), vertebra.level
        assert vertebra.axes_lps[1] @ posterior > np.cos(np.radians(12)), vertebra.level
        assert vertebra.axes_lps[2] @ left > np.cos(np.radians(12)), vertebra.level
        assert np.linalg.det(vertebra.axes_lps) == pytest.approx(1.0)


@pytest.mark.parametrize("change", ["finer", "shifted", "turned"])
def test_masks_on_another_grid_than_the_ct(study, source, tmp_path: Path, change: str) -> None:
    """Half a voxel more or less must show nowhere: the affine carries the masks, not the voxel index."""
    volume = CtVolume(study.voxels.astype(np.float32), study.affine)
    direct = write_segmentation(tmp_path / "direct.dcm", whole_masks(study), study.affine, source)
    step = {"finer": np.diag([0.5, 0.75, 0.75, 1.0]), "shifted": np.eye(4), "turned": np.eye(4)}[change]
    if change == "shifted":
        step[:3, 3] = (0.5, 0.25, 0.5)
    if change == "turned":  # a coronal grid
        step = np.eye(4)[:, [1, 0, 2, 3]]
        step[0, 1], step[0, 3] = -1.0, study.voxels.shape[0] - 1
    size = np.abs(np.linalg.inv(step[:3, :3])) @ np.array(study.voxels.shape)
    index = np.moveaxis(np.indices(np.rint(size).astype(int)), 0, -1) @ step[:3, :3].T + step[:3, 3]
    near = np.clip(np.rint(index).astype(int), 0, np.array(study.voxels.shape) - 1)
    masks = {name: mask[tuple(np.moveaxis(near, -1, 0))] for name, mask in whole_masks(study).items()}
    other = write_segmentation(tmp_path / "other.dcm", masks, study.affine @ step, source)
    one = localize_masks(read_segmentation(direct).regions, volume).vertebrae
    two = localize_masks(read_segmentation(other).regions, volume).vertebrae
    assert [v.level for v in one] == [v.level for v in two] == list(NAMES)
    # masks of 3 mm voxels taken to the nearest voxel move by at most half of one
    limit_mm = 1.0 if change == "turned" else 1.8
    for a, b in zip(one, two, strict=True):
        assert np.linalg.norm(a.centre_lps_mm - b.centre_lps_mm) < limit_mm, a.level
        first, second = (measure(volume, v.body_region, v.axes_lps).attenuation for v in (a, b))
        assert first is not None
        assert second is not None
        assert second.median == pytest.approx(first.median, abs=8.0), a.level


@pytest.mark.parametrize("form", [{"fractional": True}, {"fractional": True, "compressed": True}])
def test_every_coding_of_the_frames_reads_alike(study, source, tmp_path: Path, form: dict[str, bool]) -> None:
    masks = {"L1": whole(study, "L1"), "L2": whole(study, "L2")}
    plain = read_segmentation(write_segmentation(tmp_path / "a.dcm", masks, study.affine, source))
    other = read_segmentation(write_segmentation(tmp_path / "b.dcm", masks, study.affine, source, **form))
    for level in (Level.L1, Level.L2):
        assert np.array_equal(plain.regions[level].mask, other.regions[level].mask)
        assert np.count_nonzero(plain.regions[level].mask) == np.count_nonzero(masks[level.value])
        assert plain.regions[level].affine == pytest.approx(other.regions[level].affine)


def test_frames_that_do_not_begin_at_a_byte(study, source, tmp_path: Path) -> None:
    """Bit-packed frames follow each other without padding: with 125 x 127 pixels hardly one begins at a byte."""
    masks = {"L3": whole(study, "L3")[:, :125, :127]}
    read = read_segmentation(write_segmentation(tmp_path / "odd.dcm", masks, study.affine, source))
    where = np.argwhere(masks["L3"])
    low, high = where.min(axis=0), where.max(axis=0) + 1
    cut = masks["L3"][low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    assert np.array_equal(read.regions[Level.L3].mask, cut)
    assert read.regions[Level.L3].affine[:3, 3] == pytest.approx(study.affine[:3, :3] @ low + study.affine[:3, 3])


def test_other_segments_are_no_vertebrae(study, source, tmp_path: Path) -> None:
    types = {"L1": TISSUE, "L1 trabecular region": BONE, "L1 disc": BONE, "aorta": TISSUE}
    masks = dict.fromkeys(types, whole(study, "L1"))
    read = read_segmentation(write_segmentation(tmp_path / "seg.dcm", masks, study.affine, source, types=types))
    assert list(read.regions) == [Level.L1]


@pytest.mark.parametrize(
    ("label", "level"),
    [
        ("vertebrae_L1", "L1"),
        ("L5", "L5"),
        ("T10 vertebra", "T10"),
        ("l2 vertebral body", "L2"),
        ("Vertebra T12", "T12"),
        ("L1 disc", None),
        ("L1-L2", None),
        ("rib_left_11", None),
        ("T1", None),
        ("L15", None),
        ("", None),
    ],
)
def test_labels(label: str, level: str | None) -> None:
    assert level_of_label(label) == level


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("frame", "not in the frame of reference of the screened series"),
        ("own", "made by this product"),
        ("twice", "two segments stand for L1"),
        ("liar", "a segment's code says L2, its label L1"),
        ("none", "names no vertebra from T10 to L5"),
        ("canal", "no spinal canal behind the body"),
        ("swapped", "do not lie as their names say"),
        ("one", "fewer than two lumbar bodies"),
        ("huge", "L1 spans more than 250 mm"),
        ("far", "a grid of"),
        ("cut", "cannot be read"),
        ("no groups", "cannot be read (AttributeError)"),
    ],
)
def test_what_cannot_be_used_gives_way_to_the_network(
    study, files, source, screener, tmp_path: Path, change: str, reason: str
) -> None:
    masks, types, attributes = whole_masks(study), None, {}
    if change == "frame":
        attributes = {"FrameOfReferenceUID": "2.25.99"}
    elif change == "own":
        attributes = {"Manufacturer": "osteo_daemon"}
    elif change == "no groups":
        attributes = {"SharedFunctionalGroupsSequence": None}
    elif change == "twice":
        masks["L1"] = masks["vertebrae_L1"]
    elif change == "liar":
        types = dict.fromkeys(masks, BONE) | {"vertebrae_L1": _coded("L2")}
    elif change == "none":
        masks, types = {"aorta": masks["vertebrae_L1"]}, {"aorta": TISSUE}
    elif change == "canal":
        masks = {name: _convex(mask) for name, mask in masks.items()}
    elif change == "swapped":
        masks["vertebrae_L1"], masks["vertebrae_L3"] = masks["vertebrae_L3"], masks["vertebrae_L1"]
    elif change == "huge":
        masks["vertebrae_L1"] = np.ones_like(masks["vertebrae_L1"])
    elif change == "one":
        masks = {"vertebrae_L1": masks["vertebrae_L1"]}
    path = write_segmentation(tmp_path / "seg.dcm", masks, study.affine, source, types=types, **attributes)
    if change == "far":
        edited = pydicom.dcmread(path)
        last = edited.PerFrameFunctionalGroupsSequence[-1].PlanePositionSequence[0]
        last.ImagePositionPatient = [*last.ImagePositionPatient[:2], 1e6]
        edited.save_as(path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source_of = replace(screener._locate, otherwise=Nobody())
    headers = [(file, pydicom.dcmread(file, stop_before_pixels=True)) for file in (files[0], path)]
    volume = CtVolume(study.voxels.astype(np.float32), study.affine)
    located = source_of(Scan(volume, headers[0][1], headers))
    assert located.source == "network"
    (entry,) = located.passed_over
    assert entry[0] == str(headers[1][1].SOPInstanceUID)
    assert reason in entry[1]
    assert [flag.code for flag in located.localization.flags] == ["segmentation_not_used"]


class Nobody:
    """A network that finds nothing and says so."""

    model = ModelReference("nobody", "0", "0" * 64)

    def __call__(self, _scan: Scan) -> Located:
        return Located(Localization((), (), "s1"), "network", self.model)


def _coded(level: str):
    return codes.VERTEBRAE[Level(level)]


def _convex(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask's bounding box: no canal is left."""
    where = np.argwhere(mask)
    box = np.zeros_like(mask)
    box[tuple(slice(a, b + 1) for a, b in zip(where.min(axis=0), where.max(axis=0), strict=True))] = True
    return box


def test_our_own_segmentation_fed_back(files, screener, tmp_path: Path) -> None:
    """As it is it's passed over; under another maker's name it gives the vertebrae that the network found."""
    found = screener.screen(files)
    assert found.manifest["vertebrae"]["source"] == "network"
    assert {model.bundle for model in found.result.models} == {"spine-localizer"}
    assert not flags(found) & {"vertebrae_from_segmentation", "segmentation_not_used"}

    settings = Settings(screener=ScreenerSettings(network_enabled=False))
    report = build_report(found, settings, datetime(2026, 11, 22, tzinfo=UTC))
    own = tmp_path / "own.dcm"
    own.write_bytes(next(built.data for built in report.objects if built.kind == "seg"))
    again = screener.screen([*files, own])
    assert again.manifest["vertebrae"]["source"] == "network"
    assert [entry["reason"] for entry in again.manifest["vertebrae"]["passed_over"]] == ["made by this product"]

    edited = pydicom.dcmread(own)
    edited.Manufacturer = "Another maker"
    edited.save_as(tmp_path / "edited.dcm")
    fed_back = screener.screen([*files, own, tmp_path / "edited.dcm"])
    assert fed_back.manifest["vertebrae"]["source"] == "segmentation"
    before = {finding.level: finding for finding in found.result.vertebrae}
    after = {finding.level: finding for finding in fed_back.result.vertebrae}
    assert before.keys() == after.keys()
    for level, finding in after.items():
        assert np.linalg.norm(np.subtract(finding.centre_lps_mm, before[level].centre_lps_mm)) < 2.0, level
        assert finding.attenuation_hu is not None
        assert finding.attenuation_hu.median == pytest.approx(before[level].attenuation_hu.median, abs=8.0), level
