"""What a file of labels must be: one unit, BMD where BMD is said to be, a known scale. Whatever is odd is refused or
flagged; nothing is guessed or set right."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from statistics import fmean
from typing import Final

import numpy as np

from osteo_daemon.archive.label_files import Reading
from osteo_daemon.domain.densitometry import BMD_LEVELS, BMD_RANGE_G_CM2, MAKERS, T_SCORE_RANGE, maker_of, to_sbmd
from osteo_daemon.errors import Damaged

MG_PER_G: Final = 1000.0
FEW_READINGS: Final = 40
FEW_PATIENTS: Final = 12
"""A refit needs more (`train.site_data`); with fewer neither scale nor mix-ups can be judged."""

_UNITS: Final = {"g/cm2": 1.0, "mg/cm2": 1 / MG_PER_G}
_SHARE_OF_WRONG: Final = 0.2
"""So many values that can't be BMD are no slips of the pen: the column holds something else."""

_EXPECTED_CORRELATION: Final = 0.5
"""Of DXA and trabecular HU; the published ones lie between 0.4 and 0.7."""
_ONE_IN_A_HUNDRED: Final = 2.33  # standard deviations

_YOUNG_SBMD_G_CM2: Final = 1.13
"""Where every maker's own reference has its young women: Hologic 1.064 (NHANES) is 1.141 as sBMD, Lunar 1.18 1.121."""
_YOUNG_TOLERANCE_G_CM2: Final = 0.07
"""A Lunar's BMD taken for a Hologic's moves it by +0.12, the reverse by -0.15. Norland and Hologic look alike."""
_LINE_CORRELATION: Final = 0.9
"""On one machine T-scores are a straight line of BMD for each level and sex."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A reading that was not taken, and why."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class CheckedReading:
    """A reading in numbers: BMD in g/cm2 on the maker's scale."""

    reading: Reading
    measured_on: date
    maker: str
    bmd_g_cm2: float
    t_score: float | None


def check_readings(readings: Sequence[Reading], today: date) -> tuple[list[CheckedReading], list[Rejected], list[str]]:
    """Judge a file on its own.

    Args:
        readings: of the file.
        today: nothing was measured later.

    Returns:
        What is taken, what is not, and flags on the file as a whole.

    Raises:
        Damaged: the file as a whole can't be what it is said to be.
    """
    factor = _factor(readings)
    values = [(reading, _number(reading.bmd)) for reading in readings]
    _refuse_other_quantities([value for _, value in values if value is not None], factor)
    taken: list[CheckedReading] = []
    rejected = []
    for reading, value in values:
        answer = _checked(reading, None if value is None else value * factor, today)
        if isinstance(answer, str):
            rejected.append(Rejected(reading.where, answer))
        else:
            taken.append(answer)
    taken, repeated = _without_repeats(taken)
    return taken, rejected + repeated, _flags_on_scale(taken)


def flags_on_batch(patients: Iterable[tuple[str, float, float | None]], classes: Iterable[int]) -> list[str]:
    """Flags on what was matched as a whole.

    Args:
        patients: pseudonym, BMD on the standardised scale in g/cm2 and measured median HU of each vertebra.
        classes: 0 normal, 1 osteopenia, 2 osteoporosis of each vertebra.
    """
    flags = []
    by_patient: dict[str, list[tuple[float, float | None]]] = defaultdict(list)
    count = 0
    for patient, bmd, hu in patients:
        by_patient[patient].append((bmd, hu))
        count += 1
    if count < FEW_READINGS or len(by_patient) < FEW_PATIENTS:
        flags.append(
            f"only {count} vertebrae of {len(by_patient)} patients match: too few to see mixed-up patients or to refit"
        )
    found = set(classes)
    if len(found) == 1 and count:
        name = ("normal", "osteopenia", "osteoporosis")[found.pop()]
        flags.append(f"every vertebra is of one class ({name}): is this a selection?")
    pairs = [
        (fmean(bmd for bmd, _ in rows), fmean(hus))
        for rows in by_patient.values()
        if (hus := [hu for _, hu in rows if hu is not None])
    ]
    if len(pairs) >= FEW_PATIENTS:
        bmd_hu = np.array(pairs)
        spread = bmd_hu.std(axis=0)
        r = float(np.corrcoef(bmd_hu.T)[0, 1]) if (spread > 0).all() else 0.0
        least = math.tanh(math.atanh(_EXPECTED_CORRELATION) - _ONE_IN_A_HUNDRED / math.sqrt(len(pairs) - 3))
        if r < least:
            flags.append(
                f"BMD hardly goes along with the CTs' attenuation (correlation {r:.2f} over {len(pairs)} patients, at "
                f"least {least:.2f} expected): were patients mixed up?"
            )
    return flags


def _factor(readings: Sequence[Reading]) -> float:
    """From the file's unit to g/cm2."""
    units = {_unit(reading.unit) for reading in readings}
    if len(units) > 1:
        names = ", ".join(sorted(unit or "none" for unit in units))
        raise Damaged(f"mixed units ({names}): split the file by unit, or set one in the mapping's constants")
    unit = units.pop()
    if unit not in _UNITS:
        what = f"the unit {unit!r} is not known" if unit else "the unit is not told"
        raise Damaged(f'{what}: g/cm2 or mg/cm2, in a column or as constants.unit = "g/cm2" of the mapping')
    return _UNITS[unit]


def _unit(text: str) -> str:
    plain = text.casefold().replace(" ", "").replace("²", "2").replace("^", "").replace("**", "").replace("{bmd}", "")
    return plain.replace("gm/", "g/").replace("/sqcm", "/cm2")


def _refuse_other_quantities(values: Sequence[float], factor: float) -> None:
    if not values:
        raise Damaged("the BMD column holds no numbers")
    low, high = (limit / factor for limit in BMD_RANGE_G_CM2)
    wrong = [value for value in values if not low <= value <= high]
    other = MG_PER_G if factor == 1.0 else 1 / MG_PER_G
    in_other = sum(low * other <= value <= high * other for value in wrong)
    named, others = ("g/cm2", "mg/cm2") if factor == 1.0 else ("mg/cm2", "g/cm2")
    if in_other > 1 and len(wrong) < len(values):
        raise Damaged(f"mixed units: {in_other} of {len(values)} values look like {others}, the others like {named}")
    if in_other > _SHARE_OF_WRONG * len(values):
        raise Damaged(f"the unit is said to be {named}, but {in_other} of {len(values)} values look like {others}")
    if sum(value < 0 for value in values) > 1 or len(wrong) > _SHARE_OF_WRONG * len(values):
        smallest, largest = min(values), max(values)
        if all(T_SCORE_RANGE[0] <= value <= T_SCORE_RANGE[1] for value in values):
            raise Damaged(f"the BMD column holds what looks like T-scores ({smallest:g} to {largest:g})")
        raise Damaged(f"{len(wrong)} of {len(values)} values cannot be BMD of a vertebra ({smallest:g} to {largest:g})")


def _checked(reading: Reading, bmd_g_cm2: float | None, today: date) -> CheckedReading | str:
    """The reading in numbers, or why it is not taken."""
    if not reading.patient_id and not reading.accession:
        return "neither patient ID nor accession number"
    if reading.date is None:
        return "the date cannot be read; see date_format of the mapping"
    if reading.date > today:
        return "the date lies in the future"
    if reading.level.upper() not in BMD_LEVELS:
        return f"level {reading.level[:8]!r} is none of {', '.join(BMD_LEVELS)}"
    if bmd_g_cm2 is None:
        return "BMD is not a number"
    low, high = BMD_RANGE_G_CM2
    if not low <= bmd_g_cm2 <= high:
        return f"BMD {bmd_g_cm2:g} g/cm2 lies outside {low} to {high}"
    t_score = _number(reading.t_score)
    if reading.t_score and t_score is None:
        return "the T-score is not a number"
    if t_score is not None and not T_SCORE_RANGE[0] <= t_score <= T_SCORE_RANGE[1]:
        return f"T-score {t_score:g} lies outside {T_SCORE_RANGE[0]:g} to {T_SCORE_RANGE[1]:g}"
    maker = maker_of(reading.maker)
    if maker is None:
        told = f"the maker {reading.maker[:32]!r} has" if reading.maker else "the maker is not told: it has"
        return f"{told} no scale that is known ({', '.join(MAKERS)})"
    return CheckedReading(reading, reading.date, maker, bmd_g_cm2, t_score)


def _without_repeats(taken: Sequence[CheckedReading]) -> tuple[list[CheckedReading], list[Rejected]]:
    """Of one vertebra measured on one day a single value; none when there are two different ones."""
    groups: dict[tuple[object, ...], list[CheckedReading]] = defaultdict(list)
    for entry in taken:
        about = entry.reading
        who = (about.issuer, about.patient_id, about.birth_date) if about.patient_id else (about.accession,)
        groups[(*who, entry.measured_on, about.level.upper())].append(entry)
    kept, rejected = [], []
    for group in groups.values():
        if len({(entry.bmd_g_cm2, entry.t_score, entry.maker) for entry in group}) > 1:
            rejected += [Rejected(e.reading.where, "two different values for one vertebra on one day") for e in group]
            continue
        kept.append(group[0])
        first = group[0].reading.where
        rejected += [Rejected(entry.reading.where, f"a duplicate of {first}") for entry in group[1:]]
    return kept, rejected


def _flags_on_scale(taken: Sequence[CheckedReading]) -> list[str]:
    """T-scores tell where a machine's young women are, and with it whose scale its BMD is on."""
    flags = []
    for maker in MAKERS:
        own = [entry for entry in taken if entry.maker == maker]
        scored = [entry for entry in own if entry.t_score is not None]
        if own and len(scored) < FEW_PATIENTS:
            flags.append(f"{maker}: fewer than {FEW_PATIENTS} T-scores, so that the device's scale cannot be checked")
            continue
        zero, straight = {}, []
        for level, count in Counter(entry.reading.level.upper() for entry in scored).items():
            line = [
                (entry.t_score, entry.bmd_g_cm2)
                for entry in scored
                if entry.reading.level.upper() == level and entry.t_score is not None
            ]
            t, bmd = np.array(line).T
            if count >= 3 and t.std() > 0 and bmd.std() > 0:
                _, at_zero = np.polyfit(t, bmd, 1)
                zero[level] = float(at_zero)
                straight.append(float(np.corrcoef(t, bmd)[0, 1]))
        if straight and min(straight) < _LINE_CORRELATION:
            flags.append(
                f"{maker}: T-scores do not follow from BMD (correlation {min(straight):.2f}): shifted columns or "
                "several references?"
            )
        elif len(zero) == len(BMD_LEVELS):
            young = to_sbmd(fmean(zero.values()), maker)
            if abs(young - _YOUNG_SBMD_G_CM2) > _YOUNG_TOLERANCE_G_CM2:
                flags.append(
                    f"{maker}: T-score 0 lies at {fmean(zero.values()):.3f} g/cm2, which is no {maker}'s young women: "
                    "another maker's scale?"
                )
    return flags


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
