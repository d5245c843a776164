"""The picture for readers whose viewer shows no structured report: a curved sagittal view beside the numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from osteo_daemon.dicom.fonts import font_families
from osteo_daemon.dicom.outline import NativeMask, outlines
from osteo_daemon.dicom.picture_table import draw_notes, draw_table
from osteo_daemon.dicom.picture_text import (
    BACKGROUND,
    BODY,
    MUTED,
    REGION,
    SIZE_PIXELS,
    TEXT,
    Page,
)
from osteo_daemon.dicom.sagittal_view import region_on_view, sagittal_view
from osteo_daemon.domain.findings import Category, Level, ScreeningResult
from osteo_daemon.domain.references import AgeReference
from osteo_daemon.domain.trend import EarlierValue
from osteo_daemon.domain.wording import Wording, load_wording
from osteo_daemon.imaging.volume import CtVolume

_DPI = 100
_WINDOW_HU = (-150.0, 550.0)  # shows trabecular bone and soft tissue at once
_CATEGORY_LOOK = {
    # colour and sign: colour alone never carries the meaning
    Category.LOW: ("#D55E00", "▼"),
    Category.REDUCED: ("#E69F00", "◆"),
    Category.NOT_FLAGGED: ("#56B4E9", "●"),
    Category.INDETERMINATE: ("#CC79A7", "?"),
}


@dataclass(frozen=True, slots=True, eq=False)
class PictureContent:
    """Everything that a picture shows.

    Attributes:
        result: of a screened study.
        bodies, trabecular: regions on the native grid of ``volume``.
        age_reference: what to expect at the patient's age, None when that is not known.
        earlier: earlier studies, oldest first.
        study_date: of this study, None when not known.
    """

    result: ScreeningResult
    volume: CtVolume
    bodies: Mapping[Level, NativeMask]
    trabecular: Mapping[Level, NativeMask]
    wording: Wording
    software_version: str
    age_reference: AgeReference | None = None
    earlier: Sequence[EarlierValue] = ()
    study_date: date | None = None


def drawable(wording: Wording) -> tuple[Wording, tuple[str, ...]]:
    """The wording that pictures can use here, and its fonts: English where no font holds the language's characters."""
    families = font_families(wording)
    if families is not None:
        return wording, families
    english = load_wording()
    return english, font_families(english) or ()


def draw_picture(content: PictureContent) -> npt.NDArray[np.uint8]:
    """(1024, 1024, 3) RGB picture of a screened study; contains no patient identity."""
    figure = _figure(content)
    canvas = figure.canvas
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])  # type: ignore[attr-defined]


def draw_pdf(content: PictureContent) -> bytes:
    """The same page as PDF: text stays text, the same input gives the same bytes."""
    # a quarter of a second with its tools for fonts, and few sites want a PDF
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    buffer = io.BytesIO()
    # no creation date, which would differ from run to run
    metadata = {"CreationDate": None, "Creator": "osteo_daemon", "Producer": None, "Title": "Bone screening"}
    FigureCanvasPdf(_figure(content)).print_pdf(buffer, metadata=metadata)
    return buffer.getvalue()


def encode_png(picture: npt.NDArray[np.uint8]) -> bytes:
    """The picture as PNG without time stamps: the same picture gives the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture, mode="RGB").save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def _figure(content: PictureContent) -> Figure:
    wording, families = drawable(content.wording)
    figure = Figure(figsize=(SIZE_PIXELS / _DPI, SIZE_PIXELS / _DPI), dpi=_DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    page = Page(figure, families, wording)
    _draw_header(page, content.result)
    _draw_view(page, content)
    bottom = draw_table(page, content.result, content.age_reference)
    if content.earlier and content.study_date is not None:
        bottom = _draw_trend(page, content, content.study_date, bottom)
    draw_notes(page, content.result, bottom)
    _draw_footer(page, content)
    return figure


def _draw_header(page: Page, result: ScreeningResult) -> None:
    category = result.category or Category.INDETERMINATE
    colour, sign = _CATEGORY_LOOK[category]
    label = f"{sign} {page.wording.tables['category'][category.value]}"
    badge = page.text(
        0.98, 0.972, label, color="#000000", size=19, ha="right", va="center", weight="bold",
        bbox={"facecolor": colour, "edgecolor": "none", "boxstyle": "round,pad=0.3"},
    )  # fmt: skip
    left = page.left_edge(badge) - 0.03
    title = page.wording.tables["label"]["title"]
    page.text(0.02, 0.972, title, size=page.fitting(title, left - 0.02, 19, "bold"), va="center", weight="bold")


def _draw_view(page: Page, content: PictureContent) -> None:
    result = content.result
    view = sagittal_view(content.volume, [finding.centre_lps_mm for finding in result.vertebrae])
    rows, columns = view.pixels.shape
    axes = page.figure.add_axes((0.02, 0.10, 0.515, 0.83))
    axes.set_axis_off()
    axes.imshow(
        view.pixels, cmap="gray", vmin=_WINDOW_HU[0], vmax=_WINDOW_HU[1], interpolation="bilinear", aspect="equal"
    )
    for finding in result.vertebrae:
        left_edge = None
        for masks, colour, line_style in ((content.bodies, BODY, "-"), (content.trabecular, REGION, "--")):
            native = masks.get(finding.level)
            cut = None if native is None else region_on_view(native, content.volume, view)
            if cut is None or not cut.any():
                continue
            for line in outlines(cut):
                axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=2.0, linestyle=line_style)
            left_edge = float(np.argwhere(cut)[:, 1].min()) if left_edge is None else left_edge
        row = (view.z_top_mm - finding.centre_lps_mm[2]) / view.step_mm
        centre_column = (finding.centre_lps_mm[1] - view.y_left_mm) / view.step_mm
        if left_edge is None:
            axes.plot([centre_column], [row], marker="+", color=BODY, markersize=14, markeredgewidth=2)
            left_edge = centre_column - 15 / view.step_mm
        axes.text(
            left_edge - 4 / view.step_mm,
            row,
            str(finding.level),
            color=TEXT,
            fontsize=20,
            weight="bold",
            ha="right",
            va="center",
            bbox={"facecolor": BACKGROUND, "alpha": 0.65, "edgecolor": "none", "boxstyle": "round,pad=0.15"},
        )
    scale = 50 / view.step_mm
    axes.plot([columns * 0.06] * 2, [rows * 0.97 - scale, rows * 0.97], color=TEXT, linewidth=3)
    axes.text(columns * 0.08, rows * 0.97 - scale / 2, "5 cm", color=TEXT, fontsize=16, va="center")
    for x, y, letter in ((0.03, 0.5, "A"), (0.97, 0.5, "P"), (0.5, 0.97, "S"), (0.5, 0.02, "I")):
        axes.text(x, y, letter, transform=axes.transAxes, color=MUTED, fontsize=16, ha="center", va="center")
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)


def _draw_trend(page: Page, content: PictureContent, today: date, top: float) -> float:
    index = page.index_hu(content.result)
    values = [(entry.study_date, entry.index_hu) for entry in content.earlier if entry.study_date < today][-4:]
    if not values:
        return top
    values += [] if index is None else [(today, index)]
    left, height = 0.555, 0.06
    page.text(left, top, page.wording.tables["label"]["trend"], color=MUTED, size=13, va="top")
    axes = page.figure.add_axes((left + 0.02, top - 0.04 - height, 0.385, height), facecolor="none")
    axes.set_axis_off()
    numbers = np.array([hu for _, hu in values])
    # studies on neighbouring days would write over each other: even steps, the date below each
    steps = np.arange(len(values), dtype=np.float64)
    axes.plot(steps, numbers, color=BODY, linewidth=2.5, marker="o", markersize=8)
    spread = max(float(np.ptp(numbers)), 20.0)
    axes.set_ylim(float(numbers.min()) - 0.9 * spread, float(numbers.max()) + 0.9 * spread)
    axes.set_xlim(-0.4, max(len(steps) - 0.6, 0.4))
    for step, (when, hu) in zip(steps, values, strict=True):
        page.on(axes, step, hu + 0.25 * spread, f"{hu:.0f}", size=14, ha="center", va="bottom", weight="bold")
        page.on(axes, step, float(numbers.min()) - 0.9 * spread, f"{when:%Y-%m}", MUTED, 12, ha="center", va="top")
    return top - 0.04 - height - 0.03


def _draw_footer(page: Page, content: PictureContent) -> None:
    models = ", ".join(f"{model.bundle} {model.version}" for model in content.result.models)
    disclaimer = page.wording.disclaimer
    size = 14.0
    while len(lines := page.wrap(disclaimer, 0.96, size)) > 2 and size > 11:
        size -= 0.5
    page.text(0.02, 0.080, "\n".join(lines), size=size, va="top", linespacing=1.2)
    about = f"osteo_daemon {content.software_version}" + (f"; {models}" if models else "")
    page.text(0.02, 0.012, page.wrap(about, 0.96, 12)[0], color=MUTED, size=12, va="bottom")
