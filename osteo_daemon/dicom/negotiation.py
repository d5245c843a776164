"""What peers propose and the listener does not take: a class refused here fails many senders' whole study."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, Final

from osteo_daemon.dicom.contexts import class_name
from osteo_daemon.dicom.received import printable
from osteo_daemon.dicom.refusals import Refusals
from osteo_daemon.log import get_logger

_REMEMBERED: Final = 1024
_NAMED: Final = 5


class Negotiation:
    """The log of presentation contexts that were not accepted.

    An association without any is a refusal. Single contexts that were not accepted beside others are told once for each
    AE title: many senders propose all that they know, with every association.

    Args:
        refusals: told of associations without any context.
    """

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals
        self._lock = threading.Lock()
        self._told: OrderedDict[tuple[str, str], None] = OrderedDict()

    def accepted(self, event: Any) -> None:
        """An association was accepted (EVT_ACCEPTED)."""
        association = event.assoc
        ae_title = printable(association.requestor.ae_title.strip())
        declined = [str(context.abstract_syntax) for context in association.rejected_contexts]
        if not association.accepted_contexts:
            reason = "none of its presentation contexts is taken"
            address = association.requestor.address
            self._refusals.tell(
                "contexts_refused", address=address, reason=reason, ae_title=ae_title, detail=_names(declined)
            )
        elif new := self._not_told(ae_title, declined):
            get_logger().info("contexts_declined", ae_title=ae_title, count=len(new), detail=_names(new))

    def _not_told(self, ae_title: str, classes: list[str]) -> list[str]:
        with self._lock:
            new = [uid for uid in dict.fromkeys(classes) if (ae_title, uid) not in self._told]
            self._told.update(dict.fromkeys((ae_title, uid) for uid in new))
            while len(self._told) > _REMEMBERED:
                self._told.popitem(last=False)
        return new


def _names(classes: list[str]) -> str:
    names = [class_name(printable(uid)) for uid in dict.fromkeys(classes)]
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
