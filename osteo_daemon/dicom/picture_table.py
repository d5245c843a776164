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
_NO_BREAK: Final = "\N{NO-BREAK SPACE}"
_BOTTOM: Final = 0.105
_ROW: Final = 0.047
_HU: Final = LEFT + 0.14  # right edges of the numbers
_CORRECTED: Final = LEFT + 0.225


def draw_table(page: Page, result: ScreeningResult, age_reference: AgeReference | None) -> float:
    """Levels, numbers and bars; returns the height below them."""
    top = 0.905
    label = page.wording.tables["label"]
    with_corrected = any(finding.attenuation_hu_corrected is not None for finding in result.vertebrae)
    head = page.fitting(label["level"], 0.08, 16)
    page.text(LEFT, top, label["level"], color=MUTED, size=head, va="center")
    page.text(_HU, top, "HU", color=MUTED, size=16, va="center", ha="right")
    if with_corrected:
        page.text(_CORRECTED, top, label["corrected"], color=MUTED, size=16, va="center", ha="right")
    axes = page.figure.add_axes((0.0, 0.0, 1.0, 1.0), facecolor="none")
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    bar_left = (_CORRECTED if with_corrected else _HU) + 0.02
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
        page.text(_HU, y, number, color=colour, size=22, va="center", ha="right")
        if with_corrected:
            number = "–" if corrected is None else f"{corrected.mean:.0f}"
            page.text(_CORRECTED, y, number, color=colour, size=20, va="center", ha="right")
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
    y -= 0.03
    for note in notes:
        for line in page.wrap(note, RIGHT - LEFT, 13):
            page.text(LEFT, y, line, color=MUTED, size=13, va="top")
            y -= 0.0225
    return y - 0.01


def draw_notes(page: Page, result: ScreeningResult, top: float) -> None:
    """Conclusion, next step, flags and estimates, as many as there is room for; what is left out is counted."""
    wording = page.wording
    y = _block(page, top, wording.conclusion(result), TEXT, 16.0, "bold")
    y = _block(page, y, wording.next_step(result), TEXT, 14.0)
    said = [
        (flag.severity, f"{_SIGN[flag.severity]}{_NO_BREAK}{wording.flag(flag.code)}") for flag in result.quality_flags
    ]
    said += _by_flag(page, result.vertebrae)
    # the gravest first: the last may have to give way
    flags = [text for _, text in sorted(said, key=lambda entry: -list(Severity).index(entry[0]))]
    estimates = _network_lines(page, result)
    # flags before estimates: of those an investigational network's are the first that may give way
    shown, kept = "", 0
    for number in range(1, len(flags) + 1):
        text = " · ".join(flags[:number])
        if _height(page, text, 14.0) + (_line(14.0) if number < len(flags) + len(estimates) else 0.0) > y - _BOTTOM:
            break
        shown, kept = text, number
    if shown:
        y = _block(page, y, shown, REGION, 14.0)
    left_out = len(flags) - kept
    for number, text in enumerate(estimates):
        rest = _line(14.0) if left_out or number < len(estimates) - 1 else 0.0
        if left_out or _height(page, text, 13.0) + rest > y - _BOTTOM:
            left_out += 1
            continue
        y = _block(page, y, text, MUTED, 13.0)
    if left_out:
        more = wording.text("label", "more", count=left_out)
        page.text(LEFT, y, more, color=REGION, size=page.fitting(more, RIGHT - LEFT, 14), va="top")


def _line(size: float) -> float:
    return size * 0.00185


def _height(page: Page, text: str, size: float, weight: str = "normal") -> float:
    return _line(size) * len(page.wrap(text, RIGHT - LEFT, size, weight)) + 0.006


def _block(page: Page, y: float, text: str, colour: str, size: float, weight: str = "normal") -> float:
    """Write a paragraph; returns the height below it."""
    for line in page.wrap(text, RIGHT - LEFT, size, weight):
        page.text(LEFT, y, line, color=colour, size=size, va="top", weight=weight)
        y -= _line(size)
    return y - 0.006


def _share(hu: float) -> float:
    return float(np.clip(hu / _BAR_FULL_SCALE_HU, 0.0, 1.0))


def _by_flag(page: Page, vertebrae: Sequence[VertebraFinding]) -> list[tuple[Severity, str]]:
    levels: dict[tuple[str, Severity], list[str]] = {}
    for finding in vertebrae:
        for flag in finding.quality_flags:
            levels.setdefault((flag.code, flag.severity), []).append(str(finding.level))
    return [
        (severity, f"{_SIGN[severity]}{_NO_BREAK}{', '.join(names)}: {page.wording.flag(code)}")
        for (code, severity), names in levels.items()
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
