"""The right half of the picture: a bar of attenuation per level, the conclusion, flags and estimates in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from osteo_daemon.dicom.picture_text import BODY, MUTED, REGION, TEXT, Page
from osteo_daemon.domain.findings import AVERAGED_LEVELS, Level, ScreeningResult, Severity, VertebraFinding
from osteo_daemon.domain.references import AgeReference

LEFT: Final = 0.555
RIGHT: Final = 0.98
_BAR_FULL_SCALE_HU: Final = 300.0
_SIGN: Final = {Severity.INFO: "i", Severity.CAUTION: "!", Severity.BLOCKING: "×"}
_BOTTOM: Final = 0.105
_ROW: Final = 0.053


def draw_table(page: Page, result: ScreeningResult, age_reference: AgeReference | None) -> float:
    """Levels, numbers and bars; returns the height below them."""
    top = 0.905
    label = page.wording.tables["label"]
    with_corrected = any(finding.attenuation_hu_corrected is not None for finding in result.vertebrae)
    head = page.fitting(label["level"], 0.095, 16)
    page.text(LEFT, top, label["level"], color=MUTED, size=head, va="center")
    page.text(LEFT + 0.175, top, "HU", color=MUTED, size=16, va="center", ha="right")
    if with_corrected:
        page.text(LEFT + 0.275, top, label["corrected"], color=MUTED, size=16, va="center", ha="right")
    axes = page.figure.add_axes((0.0, 0.0, 1.0, 1.0), facecolor="none")
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    bar_left = LEFT + (0.295 if with_corrected else 0.195)
    bar_right = RIGHT - 0.035
    bracket = False
    y = top
    for finding in result.vertebrae:
        y -= _ROW
        page.text(LEFT, y, str(finding.level), size=22, va="center", weight="bold")
        measured, corrected = finding.attenuation_hu, finding.attenuation_hu_corrected
        decides = finding.level in AVERAGED_LEVELS and not finding.blocked
        colour = TEXT if decides else MUTED
        number = "–" if measured is None else f"{measured.mean:.0f}"
        page.text(LEFT + 0.175, y, number, color=colour, size=22, va="center", ha="right")
        if with_corrected:
            number = "–" if corrected is None else f"{corrected.mean:.0f}"
            page.text(LEFT + 0.275, y, number, color=colour, size=20, va="center", ha="right")
        if measured is not None:
            reach = bar_left + _share(measured.mean) * (bar_right - bar_left)
            for end, shade in ((bar_right, "#2A323A"), (reach, BODY if decides else MUTED)):
                axes.plot([bar_left, end], [y, y], color=shade, linewidth=12, solid_capstyle="butt")
        if finding.level is Level.L1 and age_reference is not None:
            bracket = True
            ends = [
                bar_left + _share(age_reference.mean_hu + sign * age_reference.sd_hu) * (bar_right - bar_left)
                for sign in (-1, 0, 1)
            ]
            axes.plot([ends[0], ends[2]], [y, y], color=TEXT, linewidth=2)
            for end, half in zip(ends, (0.012, 0.018, 0.012), strict=True):
                axes.plot([end, end], [y - half, y + half], color=TEXT, linewidth=2.5)
        if finding.quality_flags:
            worst = max(finding.quality_flags, key=lambda flag: list(Severity).index(flag.severity)).severity
            page.text(RIGHT, y, _SIGN[worst], color=REGION, size=22, va="center", ha="right", weight="bold")
    notes = [label["bar"].format(full=f"{_BAR_FULL_SCALE_HU:.0f}")]
    index = page.index_hu(result)
    if index is not None:
        notes.append(label["decided"].format(value=f"{index:.0f}"))
    if bracket and age_reference is not None:
        notes.append(
            label["age_reference"].format(
                mean=f"{age_reference.mean_hu:.0f}", sd=f"{age_reference.sd_hu:.0f}", source=age_reference.source
            )
        )
    y -= 0.034
    for note in notes:
        for line in page.wrap(note, RIGHT - LEFT, 13):
            page.text(LEFT, y, line, color=MUTED, size=13, va="top")
            y -= 0.0235
    return y - 0.012


def draw_notes(page: Page, result: ScreeningResult, top: float) -> None:
    """Conclusion, next step, estimates and flags, as many as there is room for; what is left out is counted."""
    wording = page.wording
    blocks = [
        (wording.conclusion(result), TEXT, 16.0, "bold"),
        (wording.next_step(result), TEXT, 14.0, "normal"),
        *((text, MUTED, 13.0, "normal") for text in _network_lines(page, result)),
    ]
    blocks += [
        (f"{_SIGN[flag.severity]} {wording.flag(flag.code)}", REGION, 14.0, "normal") for flag in result.quality_flags
    ]
    blocks += [(text, REGION, 14.0, "normal") for text in _by_flag(page, result.vertebrae)]
    y = top
    for number, (text, colour, size, weight) in enumerate(blocks):
        lines = page.wrap(text, RIGHT - LEFT, size, weight)
        line_height = size * 0.00185
        last = number == len(blocks) - 1
        # the line that says what is left out needs room itself
        if y - line_height * (len(lines) + (0 if last else 1)) < _BOTTOM:
            left_over = wording.text("label", "more", count=len(blocks) - number)
            page.text(LEFT, y, left_over, color=colour, size=page.fitting(left_over, RIGHT - LEFT, 14), va="top")
            break
        for line in lines:
            page.text(LEFT, y, line, color=colour, size=size, va="top", weight=weight)
            y -= line_height
        y -= 0.006


def _share(hu: float) -> float:
    return float(np.clip(hu / _BAR_FULL_SCALE_HU, 0.0, 1.0))


def _by_flag(page: Page, vertebrae: Sequence[VertebraFinding]) -> list[str]:
    levels: dict[tuple[str, Severity], list[str]] = {}
    for finding in vertebrae:
        for flag in finding.quality_flags:
            levels.setdefault((flag.code, flag.severity), []).append(str(finding.level))
    return [
        f"{_SIGN[severity]} {', '.join(names)}: {page.wording.flag(code)}" for (code, severity), names in levels.items()
    ]


def _network_lines(page: Page, result: ScreeningResult) -> list[str]:
    values = [
        f"{finding.level} {finding.network.bmd_g_cm2:.2f}"
        for finding in result.vertebrae
        if finding.network is not None and finding.network.bmd_g_cm2 is not None
    ]
    statuses = {finding.network.status for finding in result.vertebrae if finding.network is not None}
    if not statuses:
        return []
    status = page.wording.tables["status"]["investigational" if "investigational" in statuses else "clinical"]
    lines = page.wording.withheld(result)
    if values:
        lines.insert(0, f"{page.wording.text('label', 'network', status=status)}: {', '.join(values)}")
    return lines
