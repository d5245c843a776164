"""The picture for readers whose viewer shows no structured report: a curved sagittal view beside the numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage
from scipy import ndimage

from osteo_daemon.dicom import wording
from osteo_daemon.dicom.outline import NativeMask, outlines
from osteo_daemon.domain.decision import decide
from osteo_daemon.domain.findings import (
    AVERAGED_LEVELS,
    Category,
    Level,
    ScreeningResult,
    Severity,
    VertebraFinding,
)
from osteo_daemon.imaging.volume import CtVolume

SC_SERIES_NUMBER = 9103
SECONDARY_CAPTURE_CLASS_UID = str(SecondaryCaptureImageStorage)
SIZE_PIXELS = 1024
_DPI = 100
_VIEW_HEIGHT_MM = 300.0  # at most; less when the spine found is shorter
_VIEW_HEIGHT_MINIMUM_MM = 200.0  # shows the neighbours that tell which level it is
_VIEW_STEP_MM = 0.6
_MARGIN_MM = 35.0
_WINDOW_HU = (-150.0, 550.0)  # shows trabecular bone and soft tissue at once
_BACKGROUND = "#101418"
_TEXT = "#F2F2F2"
_MUTED = "#A9B4BF"
_BODY = "#56B4E9"  # Okabe and Ito: told apart with every common colour vision deficiency
_REGION = "#E69F00"
_CATEGORY_LOOK = {
    # colour and sign: colour alone never carries the meaning
    Category.LOW: ("#D55E00", "▼ LOW"),
    Category.REDUCED: ("#E69F00", "◆ REDUCED"),
    Category.NOT_FLAGGED: ("#56B4E9", "● NOT FLAGGED"),
    Category.INDETERMINATE: ("#CC79A7", "? INDETERMINATE"),
}
_SIGN = {Severity.INFO: "i", Severity.CAUTION: "!", Severity.BLOCKING: "×"}
_BAR_FULL_SCALE_HU = 300.0


@dataclass(frozen=True, slots=True, eq=False)
class SagittalView:
    """A curved sagittal reformation.

    Attributes:
        pixels: (rows, columns) HU; rows run cranial to caudal, columns anterior to posterior, square pixels of
            ``step_mm``.
        z_top_mm, y_left_mm: LPS coordinates of the first row's and column's centres.
        x_at_row_mm: (rows,) LPS x at which each row was sampled.
    """

    pixels: npt.NDArray[np.float32]
    z_top_mm: float
    y_left_mm: float
    x_at_row_mm: npt.NDArray[np.float64]
    step_mm: float = _VIEW_STEP_MM

    def points_lps(self) -> npt.NDArray[np.float64]:
        """(rows, columns, 3) LPS coordinates of the pixels' centres."""
        rows, columns = self.pixels.shape
        points = np.empty((rows, columns, 3))
        points[..., 0] = self.x_at_row_mm[:, None]
        points[..., 1] = self.y_left_mm + self.step_mm * np.arange(columns)[None, :]
        points[..., 2] = (self.z_top_mm - self.step_mm * np.arange(rows))[:, None]
        return points


def sagittal_view(volume: CtVolume, centres_lps_mm: npt.ArrayLike) -> SagittalView:
    """Reformat through vertebral centres: each height is sampled in the sagittal plane that meets the spine there.

    Only the left-right curve is straightened, so lengths and angles in the sagittal plane stay true.

    Args:
        centres_lps_mm: (n, 3) at least one centre.
    """
    centres = np.asarray(centres_lps_mm, dtype=np.float64).reshape(-1, 3)
    centres = centres[np.argsort(centres[:, 2])]
    top, bottom = centres[-1, 2] + _MARGIN_MM, centres[0, 2] - _MARGIN_MM
    height = max(min(top - bottom, _VIEW_HEIGHT_MM), _VIEW_HEIGHT_MINIMUM_MM)
    middle = (top + bottom) / 2
    rows = round(height / _VIEW_STEP_MM)
    z = middle + height / 2 - _VIEW_STEP_MM * np.arange(rows)
    width = round(height * 0.62 / _VIEW_STEP_MM)
    # the spine lies in the posterior half of the view: bodies in the middle, canal and processes behind
    y_left = float(np.median(centres[:, 1])) - 0.52 * width * _VIEW_STEP_MM
    view = SagittalView(
        pixels=np.zeros((rows, width), dtype=np.float32),
        z_top_mm=float(z[0]),
        y_left_mm=y_left,
        x_at_row_mm=np.interp(z, centres[:, 2], centres[:, 0]),
    )
    index = volume.to_index(view.points_lps())
    pixels = ndimage.map_coordinates(
        volume.voxels, np.moveaxis(index, -1, 0), order=1, mode="constant", cval=-1024.0, output=np.float32
    )
    return SagittalView(pixels, view.z_top_mm, view.y_left_mm, view.x_at_row_mm)


def region_on_view(native: NativeMask, volume: CtVolume, view: SagittalView) -> npt.NDArray[np.bool_]:
    """(rows, columns) where the view cuts a region."""
    index = np.moveaxis(volume.to_index(view.points_lps()), -1, 0)
    shifted = index - np.array(native.origin, dtype=np.float64)[:, None, None]
    padded = np.pad(native.mask, 1).astype(np.float32)
    # linear interpolation of the mask, cut at one half, rounds off the slice steps
    return np.asarray(ndimage.map_coordinates(padded, shifted + 1, order=1, mode="constant", cval=0.0) > 0.5)


def draw_picture(
    result: ScreeningResult,
    volume: CtVolume,
    bodies: Mapping[Level, NativeMask],
    trabecular: Mapping[Level, NativeMask],
    *,
    software_version: str,
) -> npt.NDArray[np.uint8]:
    """(1024, 1024, 3) RGB picture of a screened study; contains no patient identity."""
    figure = Figure(figsize=(SIZE_PIXELS / _DPI, SIZE_PIXELS / _DPI), dpi=_DPI, facecolor=_BACKGROUND)
    canvas = FigureCanvasAgg(figure)
    _draw_header(figure, result)
    _draw_view(figure, result, volume, bodies, trabecular)
    bottom = _draw_table(figure, result)
    _draw_notes(figure, result, bottom)
    _draw_footer(figure, result, software_version)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def encode_png(picture: npt.NDArray[np.uint8]) -> bytes:
    """The picture as PNG without time stamps: the same picture gives the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture, mode="RGB").save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def _draw_header(figure: Figure, result: ScreeningResult) -> None:
    colour, sign = _CATEGORY_LOOK[result.category or Category.INDETERMINATE]
    figure.text(0.02, 0.972, "Opportunistic bone screening on CT", color=_TEXT, fontsize=19, va="center", weight="bold")
    figure.text(
        0.98,
        0.972,
        sign,
        color="#000000",
        fontsize=19,
        va="center",
        ha="right",
        weight="bold",
        bbox={"facecolor": colour, "edgecolor": "none", "boxstyle": "round,pad=0.3"},
    )


def _draw_view(
    figure: Figure,
    result: ScreeningResult,
    volume: CtVolume,
    bodies: Mapping[Level, NativeMask],
    trabecular: Mapping[Level, NativeMask],
) -> None:
    view = sagittal_view(volume, [finding.centre_lps_mm for finding in result.vertebrae])
    rows, columns = view.pixels.shape
    axes = figure.add_axes((0.02, 0.10, 0.515, 0.83))
    axes.set_axis_off()
    axes.imshow(
        view.pixels, cmap="gray", vmin=_WINDOW_HU[0], vmax=_WINDOW_HU[1], interpolation="bilinear", aspect="equal"
    )
    for finding in result.vertebrae:
        left_edge = None
        for masks, colour, width in ((bodies, _BODY, 2.0), (trabecular, _REGION, 2.0)):
            native = masks.get(finding.level)
            cut = None if native is None else region_on_view(native, volume, view)
            if cut is None or not cut.any():
                continue
            for line in outlines(cut):
                axes.plot(
                    line[:, 0], line[:, 1], color=colour, linewidth=width, linestyle="-" if masks is bodies else "--"
                )
            left_edge = float(np.argwhere(cut)[:, 1].min()) if left_edge is None else left_edge
        row = (view.z_top_mm - finding.centre_lps_mm[2]) / view.step_mm
        centre_column = (finding.centre_lps_mm[1] - view.y_left_mm) / view.step_mm
        if left_edge is None:
            axes.plot([centre_column], [row], marker="+", color=_BODY, markersize=14, markeredgewidth=2)
            left_edge = centre_column - 15 / view.step_mm
        axes.text(
            left_edge - 4 / view.step_mm,
            row,
            str(finding.level),
            color=_TEXT,
            fontsize=20,
            weight="bold",
            ha="right",
            va="center",
            bbox={"facecolor": _BACKGROUND, "alpha": 0.65, "edgecolor": "none", "boxstyle": "round,pad=0.15"},
        )
    scale = 50 / view.step_mm
    axes.plot([columns * 0.06] * 2, [rows * 0.97 - scale, rows * 0.97], color=_TEXT, linewidth=3)
    axes.text(columns * 0.08, rows * 0.97 - scale / 2, "5 cm", color=_TEXT, fontsize=16, va="center")
    for x, y, letter in ((0.03, 0.5, "A"), (0.97, 0.5, "P"), (0.5, 0.97, "S"), (0.5, 0.02, "I")):
        axes.text(x, y, letter, transform=axes.transAxes, color=_MUTED, fontsize=16, ha="center", va="center")
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)


def _table_note(result: ScreeningResult) -> str:
    index = decide(result.vertebrae, result.quality_flags).index_hu
    if index is None:
        return f"mean trabecular attenuation; bar: 0 to {_BAR_FULL_SCALE_HU:.0f} HU"
    return f"bar: 0 to {_BAR_FULL_SCALE_HU:.0f} HU; decided by {index:.0f} (medians)"


def _draw_table(figure: Figure, result: ScreeningResult) -> float:
    left, right, top, step = 0.555, 0.98, 0.905, 0.058
    with_corrected = any(finding.attenuation_hu_corrected is not None for finding in result.vertebrae)
    figure.text(left, top, "Level", color=_MUTED, fontsize=16, va="center")
    figure.text(left + 0.175, top, "HU", color=_MUTED, fontsize=16, va="center", ha="right")
    if with_corrected:
        figure.text(left + 0.275, top, "corr.", color=_MUTED, fontsize=16, va="center", ha="right")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), facecolor="none")
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    bar_left = left + (0.295 if with_corrected else 0.195)
    bar_right = right - 0.035
    y = top
    for finding in result.vertebrae:
        y -= step
        figure.text(left, y, str(finding.level), color=_TEXT, fontsize=22, va="center", weight="bold")
        measured = finding.attenuation_hu
        decides = finding.level in AVERAGED_LEVELS and not finding.blocked
        figure.text(
            left + 0.175,
            y,
            "–" if measured is None else f"{measured.mean:.0f}",
            color=_TEXT if decides else _MUTED,
            fontsize=22,
            va="center",
            ha="right",
        )
        if with_corrected:
            corrected = finding.attenuation_hu_corrected
            shown = "–" if corrected is None else f"{corrected.mean:.0f}"
            colour = _TEXT if decides else _MUTED
            figure.text(left + 0.275, y, shown, color=colour, fontsize=20, va="center", ha="right")
        if measured is not None:
            share = float(np.clip(measured.mean / _BAR_FULL_SCALE_HU, 0.0, 1.0))
            axes.plot([bar_left, bar_right], [y, y], color="#2A323A", linewidth=12, solid_capstyle="butt")
            axes.plot(
                [bar_left, bar_left + share * (bar_right - bar_left)],
                [y, y],
                color=_BODY if decides else _MUTED,
                linewidth=12,
                solid_capstyle="butt",
            )
        if finding.quality_flags:
            worst = max(finding.quality_flags, key=lambda flag: list(Severity).index(flag.severity)).severity
            figure.text(right, y, _SIGN[worst], color=_REGION, fontsize=22, va="center", ha="right", weight="bold")
    figure.text(
        left,
        y - 0.045,
        _table_note(result),
        color=_MUTED,
        fontsize=12.5,
    )
    return y - 0.065


def _draw_notes(figure: Figure, result: ScreeningResult, top: float) -> None:
    left, bottom = 0.555, 0.105
    blocks: list[tuple[str, str, float, str]] = [(wording.conclusion(result), _TEXT, 16, "bold")]
    flags = [f"{_SIGN[flag.severity]} {wording.plain(flag.code)}" for flag in result.quality_flags]
    blocks += [(flag, _REGION, 14, "normal") for flag in (*flags, *_by_flag(result.vertebrae))]
    network = _network_line(result)
    if network:
        # before the flags, of which the last may have to give way
        blocks.insert(1, (network, _MUTED, 14, "normal"))
    y = top
    for number, (text, colour, size, weight) in enumerate(blocks):
        lines = _wrap(figure, text, 0.98 - left, size, weight)
        line_height = size * 1.3 / 72 * _DPI / SIZE_PIXELS
        last = number == len(blocks) - 1
        # the line that says what is left out needs room itself
        if y - line_height * (len(lines) + (0 if last else 1)) < bottom:
            left_over = f"… {len(blocks) - number} more in the structured report"
            figure.text(left, y, left_over, color=colour, fontsize=14, va="top")
            break
        figure.text(left, y, "\n".join(lines), color=colour, fontsize=size, va="top", weight=weight, linespacing=1.2)
        y -= line_height * len(lines) + 0.008


def _wrap(figure: Figure, text: str, width: float, size: float, weight: str) -> list[str]:
    """Lines of at most ``width`` (a fraction of the figure), measured in the font that draws them."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    font = FontProperties(size=size, weight=weight)
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and renderer.get_text_width_height_descent(longer, font, ismath=False)[0] <= width * SIZE_PIXELS:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _by_flag(vertebrae: Sequence[VertebraFinding]) -> list[str]:
    levels: dict[tuple[str, Severity], list[str]] = {}
    for finding in vertebrae:
        for flag in finding.quality_flags:
            levels.setdefault((flag.code, flag.severity), []).append(str(finding.level))
    return [
        f"{_SIGN[severity]} {', '.join(names)}: {wording.plain(code)}" for (code, severity), names in levels.items()
    ]


def _network_line(result: ScreeningResult) -> str:
    values = [
        f"{finding.level} {finding.network.bmd_g_cm2:.2f}"
        for finding in result.vertebrae
        if finding.network is not None and finding.network.bmd_g_cm2 is not None
    ]
    statuses = {finding.network.status for finding in result.vertebrae if finding.network is not None}
    if not values:
        return ""
    status = "INVESTIGATIONAL, not for decisions" if "investigational" in statuses else "released by the site"
    return f"Network BMD estimate ({status}), g/cm²: {', '.join(values)}"


def _draw_footer(figure: Figure, result: ScreeningResult, software_version: str) -> None:
    models = ", ".join(f"{model.bundle} {model.version}" for model in result.models)
    lines = _wrap(figure, wording.DISCLAIMER, 0.96, 14, "normal")
    figure.text(0.02, 0.080, "\n".join(lines), color=_TEXT, fontsize=14, va="top", linespacing=1.2)
    about = f"osteo_daemon {software_version}" + (f"; {models}" if models else "")
    shown = _wrap(figure, about, 0.96, 12, "normal")[0]
    figure.text(0.02, 0.012, shown, color=_MUTED, fontsize=12, va="bottom")


def picture_dataset(
    picture: npt.NDArray[np.uint8],
    header: Dataset,
    *,
    series_instance_uid: str,
    sop_instance_uid: str,
    instance_number: int,
    software_version: str,
    device_serial_number: str,
    institution: str,
    contributing_equipment: Sequence[hd.ContributingEquipment],
) -> Dataset:
    """The picture as a Secondary Capture in the source study (PS3.3 A.8.1)."""
    extra: dict[str, Any] = {"institution_name": institution} if institution else {}
    dataset: Dataset = hd.sc.SCImage.from_ref_dataset(
        ref_dataset=header,
        pixel_array=picture,
        photometric_interpretation=hd.PhotometricInterpretationValues.RGB,
        bits_allocated=8,
        coordinate_system=hd.CoordinateSystemNames.PATIENT,
        series_instance_uid=series_instance_uid,
        series_number=SC_SERIES_NUMBER,
        sop_instance_uid=sop_instance_uid,
        instance_number=instance_number,
        manufacturer="osteo_daemon",
        manufacturer_model_name="osteo_daemon",
        software_versions=software_version,
        device_serial_number=device_serial_number,
        patient_orientation=("P", "F"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        series_description=wording.series_description("picture"),
        contributing_equipment=contributing_equipment,
        **extra,
    )
    # without a body part the Laterality of a paired one would be asked for (PS3.3 C.7.3.1)
    dataset.BodyPartExamined = "LSPINE"
    dataset.BurnedInAnnotation = "NO"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    return dataset
