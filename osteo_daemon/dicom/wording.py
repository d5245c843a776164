"""What the report says in plain clinical language. No sentence ever calls a study normal."""

from __future__ import annotations

from osteo_daemon.domain.decision import decide
from osteo_daemon.domain.findings import AVERAGED_LEVELS, Category, Outcome, QualityFlag, ScreeningResult

DISCLAIMER = (
    "Automated opportunistic measurement, not verified by a physician. "
    "It cannot be used to rule out low bone density and does not replace DXA or clinical assessment."
)
SHORT_DISCLAIMER = "Automated screening - unverified - cannot rule out low bone density"
"""At most 64 characters of it fit a Series Description; see `series_description`."""

INVESTIGATIONAL = (
    "Investigational estimate of a neural network. It did not enter the category or the conclusion "
    "and must not be used for clinical decisions."
)

_CONCLUSIONS = {
    Category.LOW: (
        "Trabecular attenuation of the lumbar spine is low. This suggests low bone density. "
        "Consider DXA and an assessment of fracture risk."
    ),
    Category.REDUCED: (
        "Trabecular attenuation of the lumbar spine is reduced. Low bone density is possible. "
        "Consider DXA if clinical risk factors are present."
    ),
    Category.NOT_FLAGGED: "No finding below the screening threshold; this does not rule out low bone density.",
    Category.INDETERMINATE: (
        "The measurement is indeterminate: it allows no statement about bone density. See the quality flags."
    ),
}


def plain(slug: str) -> str:
    """A flag or exclusion code as words."""
    return slug.replace("_", " ")


def series_description(what: str) -> str:
    """Series Description (VR LO, 64 characters) with the short warning."""
    return f"Bone screening {what} - unverified, cannot rule out"[:64]


def conclusion(result: ScreeningResult) -> str:
    """The one or two sentences that a reader needs first."""
    if result.outcome is Outcome.EXCLUDED:
        reason = result.exclusion.reason.rstrip(".") if result.exclusion else "reason not recorded"
        return f"Not screened for low bone density: {reason}. This says nothing about bone density."
    return _CONCLUSIONS[result.category or Category.INDETERMINATE]


def impression(result: ScreeningResult) -> str:
    """The impression: conclusion, the measured attenuation it rests on, flags of the study."""
    parts = [f"[Automated, unverified] {conclusion(result)}"]
    measured = [
        f"{vertebra.level} {vertebra.attenuation_hu.mean:.0f}"
        for vertebra in result.vertebrae
        if vertebra.level in AVERAGED_LEVELS and vertebra.attenuation_hu is not None and not vertebra.blocked
    ]
    if measured:
        parts.append(f"Mean trabecular attenuation as measured, HU: {', '.join(measured)}.")
        index = decide(result.vertebrae, result.quality_flags).index_hu
        if index is not None:
            corrected = any(vertebra.attenuation_hu_corrected is not None for vertebra in result.vertebrae)
            scale = ", corrected to 120 kVp" if corrected else ""
            parts.append(f"Category decided by the mean of these levels' medians{scale}: {index:.0f} HU.")
    left_out = [str(vertebra.level) for vertebra in result.vertebrae if vertebra.blocked]
    if left_out:
        parts.append(f"Not used for the category: {', '.join(left_out)}.")
    if result.quality_flags:
        parts.append(f"Flags: {', '.join(plain(flag.code) for flag in result.quality_flags)}.")
    return " ".join(parts)


def flag_text(flag: QualityFlag) -> str:
    """A flag as words with its severity."""
    return f"{plain(flag.code)} ({flag.severity})"
