"""What disagreeing anchors mean for the category: it may stand where both counts give the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from osteo_daemon.domain.decision import decide
from osteo_daemon.domain.findings import Category, Level, QualityFlag, Severity, VertebraFinding
from osteo_daemon.inference.vertebra import Localization

_FLAG = "possible_transitional_anatomy"


def settled_flags(localization: Localization, findings: Sequence[VertebraFinding]) -> tuple[QualityFlag, ...]:
    """The localization's flags, ``possible_transitional_anatomy`` milder where it does not matter.

    The anchors disagree by whole levels, so L1-L4 are one of two sets of vertebrae. Where `decide` gives both the same
    category, whichever are meant, the flag becomes a caution; else it stays blocking.

    Args:
        findings: of the vertebrae as named, attenuation included.
    """
    if not localization.alternative:
        return localization.flags
    names = list(Level)
    renamed = []
    for finding in findings:
        place = names.index(finding.level) - localization.alternative
        if 0 <= place < len(names):
            renamed.append(replace(finding, level=names[place]))
    category = decide(findings, ()).category
    same = category is decide(renamed, ()).category and category is not Category.INDETERMINATE
    return tuple(
        QualityFlag(_FLAG, Severity.CAUTION) if same and flag.code == _FLAG else flag for flag in localization.flags
    )
