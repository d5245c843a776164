"""Objects that only travel with a CT and that the site does not want: acknowledged, counted, not written."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict

from osteo_daemon.dicom.contexts import ACCOMPANYING, group_of
from osteo_daemon.dicom.received import ReceivedObject
from osteo_daemon.log import get_logger
from osteo_daemon.settings import AccompanyingSettings

_REMEMBERED_STUDIES = 10_000
_OPEN_STUDIES = 8  # of one association that stays open all day


class Discards:
    """What was discarded, by study; several threads may use it at once.

    Args:
        settings: which groups are.
    """

    def __init__(self, settings: AccompanyingSettings) -> None:
        self._groups = frozenset(group for group in ACCOMPANYING if getattr(settings, group.value) == "discard")
        self._lock = threading.Lock()
        self._counts: OrderedDict[str, Counter[str]] = OrderedDict()
        self._untold: dict[str, OrderedDict[str, None]] = {}
        self._told: OrderedDict[str, None] = OrderedDict()

    def take(self, received: ReceivedObject) -> bool:
        """True for an object that is not kept: it is counted."""
        group = group_of(received.identifiers.sop_class_uid)
        if group not in self._groups or group is None:
            return False
        study = received.identifiers.study_instance_uid
        lines = []
        with self._lock:
            self._counts.setdefault(study, Counter())[group.value] += 1
            self._counts.move_to_end(study)
            while len(self._counts) > _REMEMBERED_STUDIES:
                self._counts.popitem(last=False)
            if study not in self._told:
                untold = self._untold.setdefault(received.association_id, OrderedDict())
                untold[study] = None
                untold.move_to_end(study)
                while len(untold) > _OPEN_STUDIES:
                    lines += self._tell([untold.popitem(last=False)[0]])
        _log(lines)
        return True

    def association_closed(self, association_id: str) -> None:
        """Say once for each study what was discarded of it."""
        with self._lock:
            lines = self._tell(sorted(self._untold.pop(association_id, ())))
        _log(lines)

    def _tell(self, studies: list[str]) -> list[tuple[str, Counter[str]]]:
        """What is to be said of those that nothing was said of yet."""
        new = [study for study in studies if study not in self._told]
        self._told.update(dict.fromkeys(new))
        while len(self._told) > _REMEMBERED_STUDIES:
            self._told.popitem(last=False)
        return [(study, Counter(self._counts.get(study, Counter()))) for study in new]


def _log(lines: list[tuple[str, Counter[str]]]) -> None:
    for study, counts in lines:
        get_logger().info(
            "accompanying_discarded",
            study_instance_uid=study,
            count=counts.total(),
            detail=", ".join(f"{name} {count}" for name, count in sorted(counts.items())),
        )
