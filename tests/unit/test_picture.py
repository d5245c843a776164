"""The picture: geometry of the curved view, sameness, no text over text."""

from __future__ import annotations

import dataclasses
import io
import warnings
from datetime import date

import numpy as np
import pydicom
import pytest
from matplotlib.figure import Figure
from PIL import Image

from osteo_daemon.dicom import fonts, picture
from osteo_daemon.dicom.fonts import font_families
from osteo_daemon.dicom.outline import on_native_grid, outlines
from osteo_daemon.dicom.report_objects import build_report_objects
from osteo_daemon.dicom.sagittal_view import region_on_view, sagittal_view
from osteo_daemon.domain.findings import Category, QualityFlag, Severity
from osteo_daemon.domain.references import l1_age_reference
from osteo_daemon.domain.trend import EarlierValue
from osteo_daemon.domain.wording import LANGUAGES, load_wording
from osteo_daemon.imaging.region import Region
from tests.conftest import missing
from tests.report_cases import indeterminate_case, synthetic_case, with_result, withheld_case


def test_the_view_follows_a_curved_spine() -> None:
    """A rod that leans to the side stays in the middle of every row; heights keep their millimetres."""
    request = synthetic_case()
    volume = request.volume
    assert volume is not None
    voxels = np.zeros_like(volume.voxels)
    for d in range(voxels.shape[0]):
        w = 30 + d // 2
        voxels[d, 44:47, w - 1 : w + 2] = 1000.0
    leaning = dataclasses.replace(volume, voxels=voxels)
    ends = [volume.to_lps((d, 45, 30 + d / 2)) for d in (2, 43)]
    view = sagittal_view(leaning, ends)
    centre_row = view.pixels.shape[0] // 2
    inside = view.pixels[centre_row - 100 : centre_row + 100]
    assert (inside.max(axis=1) > 900).all()
    points = view.points_lps()
    assert np.allclose(points[0, :, 2] - points[1, :, 2], view.step_mm)
    assert np.allclose(np.diff(points[0, :, 1]), view.step_mm)


def test_a_region_is_cut_where_it_lies() -> None:
    request = synthetic_case()
    volume = request.volume
    assert volume is not None
    centres = [finding.centre_lps_mm for finding in request.result.vertebrae]
    view = sagittal_view(volume, centres)
    finding = request.result.vertebrae[2]
    native = on_native_grid(request.regions[finding.level].body, volume)
    assert native is not None
    cut = region_on_view(native, volume, view)
    centre = view.points_lps()[cut].mean(axis=0)
    assert np.linalg.norm(centre - np.array(finding.centre_lps_mm)) < 2.0
    # an ellipsoid of 13 x 15 mm half axes cut through its middle
    assert np.count_nonzero(cut) * view.step_mm**2 == pytest.approx(np.pi * 13 * 15, rel=0.12)


def test_a_region_of_another_grid_lands_on_the_same_voxels() -> None:
    request = synthetic_case()
    volume = request.volume
    assert volume is not None
    body = request.regions[request.result.vertebrae[1].level].body
    native = on_native_grid(body, volume)
    assert native is not None
    assert np.count_nonzero(native.mask) == np.count_nonzero(body.mask)
    # twice as fine, shifted by half a voxel of it: the same voxel edges
    fine_affine = body.affine.copy()
    fine_affine[:3, :3] /= 2
    fine_affine[:3, 3] -= (body.affine[:3, :3] / 4).sum(axis=1)
    fine = body.mask.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    resampled = on_native_grid(Region(fine, fine_affine), volume)
    assert resampled is not None
    assert resampled.origin == native.origin
    assert np.array_equal(resampled.mask, native.mask)
    outside = body.affine.copy()
    outside[:3, 3] += 10_000
    assert on_native_grid(Region(body.mask, outside), volume) is None


def test_outlines_are_closed_and_largest_first() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:4, 2:4] = True
    mask[8:16, 8:16] = True
    first, second = outlines(mask)
    assert np.array_equal(first[0], first[-1])
    assert len(first) > len(second)
    assert first.mean(axis=0) == pytest.approx([11.5, 11.5], abs=0.3)


@pytest.mark.parametrize("make", [synthetic_case, indeterminate_case, withheld_case])
def test_the_secondary_capture_holds_the_picture(make: type) -> None:
    report = build_report_objects(make())
    assert report.picture_png is not None
    png = np.asarray(Image.open(io.BytesIO(report.picture_png)))
    capture = pydicom.dcmread(io.BytesIO(next(built.data for built in report.objects if built.kind == "sc")))
    assert np.array_equal(capture.pixel_array, png)
    assert png.shape == (1024, 1024, 3)
    assert capture.BodyPartExamined == "LSPINE"
    assert capture.BurnedInAnnotation == "NO"


def test_no_text_lies_over_another_or_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of text boxes of a crowded picture, as the renderer measures them."""
    figures: list[Figure] = []
    keep = picture.FigureCanvasAgg.__init__

    def remember(self: object, figure: Figure) -> None:
        figures.append(figure)
        keep(self, figure)

    monkeypatch.setattr(picture.FigureCanvasAgg, "__init__", remember)
    request = synthetic_case()
    flags = tuple(QualityFlag(f"a_rather_long_flag_number_{number}", Severity.CAUTION) for number in range(12))
    crowded = with_result(
        request,
        category=Category.INDETERMINATE,
        quality_flags=flags,
        vertebrae=tuple(
            dataclasses.replace(finding, quality_flags=(*flags[:3], QualityFlag("x", Severity.BLOCKING)))
            for finding in request.result.vertebrae
        ),
    )
    earlier = tuple(EarlierValue(date(2019 + year, 3, 1), 150.0 - 7 * year) for year in range(6))
    for language in LANGUAGES:
        wording = load_wording(language)
        for case in (crowded, indeterminate_case()) if language in ("en", "ja") else (crowded,):
            shown = dataclasses.replace(case, wording=wording, earlier=earlier if case is crowded else ())
            build_report_objects(shown, [])
    build_report_objects(request, [])
    assert len(figures) == len(LANGUAGES) + 3
    for figure in figures:
        renderer = figure.canvas.get_renderer()
        boxes = []
        for text in figure.findobj(lambda artist: hasattr(artist, "get_text")):
            if text.get_text() and text.get_visible():
                box = text.get_window_extent(renderer)
                assert box.x0 >= 0, text.get_text()
                assert box.x1 <= 1024, text.get_text()
                assert box.y0 >= 0, text.get_text()
                assert box.y1 <= 1024, text.get_text()
                boxes.append((text.get_text(), box))
        assert len(boxes) > 15
        for number, (one, box) in enumerate(boxes):
            for other, second in boxes[number + 1 :]:
                width = min(box.x1, second.x1) - max(box.x0, second.x0)
                height = min(box.y1, second.y1) - max(box.y0, second.y0)
                assert width <= 1 or height <= 1, (one, other)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_character_of_a_language_is_drawn(language: str) -> None:
    wording = load_wording(language)
    if font_families(wording) is None:
        missing("no font for Chinese or Japanese is installed (make system-packages)")
    assert picture.drawable(wording)[0] is wording
    request = dataclasses.replace(withheld_case(), wording=wording)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph")
        report = build_report_objects(request, [], frozenset({"pdf"}))
    english = build_report_objects(withheld_case(), [])
    assert (report.picture_png == english.picture_png) == (language == "en")


def test_without_a_font_the_picture_is_in_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts.font_manager, "findSystemFonts", list)
    monkeypatch.setattr(fonts.font_manager.fontManager, "ttflist", [
        entry for entry in fonts.font_manager.fontManager.ttflist if entry.name.startswith("DejaVu")
    ])  # fmt: skip
    fonts._families.cache_clear()
    try:
        wording, families = picture.drawable(load_wording("ja"))
        assert (wording.language, families) == ("en", (fonts.BASE_FAMILY,))
        assert picture.drawable(load_wording("de"))[0].language == "de"
    finally:
        fonts._families.cache_clear()


def test_the_age_reference_is_that_of_the_paper_at_its_ends() -> None:
    for age, mean, sd in ((20, 226, 44), (30, 226, 44), (90, 89, 38), (101, 89, 38)):
        reference = l1_age_reference(age)
        assert (reference.mean_hu, reference.sd_hu) == pytest.approx((mean, sd))
    assert l1_age_reference(60).mean_hu == pytest.approx(157.5)
    # its fitted slope is -2.5 HU a year; the line between its end groups must not be far from that
    assert l1_age_reference(70).mean_hu - l1_age_reference(60).mean_hu == pytest.approx(-25, abs=3)
