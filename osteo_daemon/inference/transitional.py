"""What doubt about the count means for the category: it may stand where every likely count gives the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from osteo_daemon.domain.decision import decide
from osteo_daemon.domain.findings import Category, Level, QualityFlag, Severity, VertebraFinding
from osteo_daemon.inference.naming import RIB_ONLY
from osteo_daemon.inference.vertebra import Localization

_DISAGREEING = "possible_transitional_anatomy"
_UNCERTAIN = "level_uncertain"


def settled_flags(localization: Localization, findings: Sequence[VertebraFinding]) -> tuple[QualityFlag, ...]:
    """The localization's flags, each with the severity that the measured vertebrae leave it.

    Where the anchors disagree, L1-L4 are one of two sets of vertebrae; where the last rib stands alone, a short rib or
    a long transverse process would move every name by one, either way. A study whose category (`decide`) is the same
    under each of these counts keeps it with a caution; any other is blocked.

    Args:
        findings: of the vertebrae as named, attenuation included.
    """
    counts: tuple[int, ...]
    if localization.alternative:
        counts, code = (localization.alternative,), _DISAGREEING
    elif localization.anchor == RIB_ONLY:
        counts, code = (-1, 1), _UNCERTAIN
        if QualityFlag(_UNCERTAIN, Severity.CAUTION) not in localization.flags:
            return localization.flags
    else:
        return localization.flags
    severity = Severity.CAUTION if _same_category(findings, counts) else Severity.BLOCKING
    return tuple(QualityFlag(code, severity) if flag.code == code else flag for flag in localization.flags)


def _same_category(findings: Sequence[VertebraFinding], counts: Sequence[int]) -> bool:
    """Whether a category is reached, and by names that lie higher by each of ``counts`` too."""
    category = decide(findings, ()).category
    return category is not Category.INDETERMINATE and all(
        decide(_renamed(findings, levels_up), ()).category is category for levels_up in counts
    )


def _renamed(findings: Sequence[VertebraFinding], levels_up: int) -> list[VertebraFinding]:
    names = list(Level)
    places = [(names.index(finding.level) - levels_up, finding) for finding in findings]
    return [replace(finding, level=names[place]) for place, finding in places if 0 <= place < len(names)]
