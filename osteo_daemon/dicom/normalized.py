"""Normalised services of the listener (N-CREATE, N-SET, N-ACTION): one table of who answers what, one edge for errors.

What is answered with success is durable. What cannot be read, or is not ours to do, is declined with a status of PS3.7
annex C; nothing a peer sends ends a role or shows in a log with its content.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Final

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context, evt
from pynetdicom.presentation import PresentationContext

from osteo_daemon.dicom.quota import Quota
from osteo_daemon.dicom.received import printable
from osteo_daemon.dicom.refusals import REQUEST_DECLINED, Refusals
from osteo_daemon.domain.announcement import AnnouncedInstance
from osteo_daemon.errors import Declined, OsteoError, QuotaExceeded, Transient
from osteo_daemon.log import get_logger, where

SUCCESS: Final = 0x0000
INVALID_ATTRIBUTE_VALUE: Final = 0x0106
PROCESSING_FAILURE: Final = 0x0110
DUPLICATE_INSTANCE: Final = 0x0111
NO_SUCH_INSTANCE: Final = 0x0112
INVALID_ARGUMENT_VALUE: Final = 0x0115
INVALID_INSTANCE: Final = 0x0117
NO_SUCH_CLASS: Final = 0x0118
MISSING_ATTRIBUTE: Final = 0x0120
NO_SUCH_ACTION: Final = 0x0123
NOT_AUTHORISED: Final = 0x0124
RESOURCE_LIMITATION: Final = 0x0213
"""Statuses of PS3.7 annex C."""

MAXIMUM_ITEMS: Final = 100_000
"""Objects in one list or request."""

_MAXIMUM_BYTES: Final = 32 << 20
_ITEM: Final = b"\xfe\xff\x00\xe0"  # (FFFE,E000), little endian as all transfer syntaxes offered here are
TOO_MANY: Final = "more objects than one list may have"
_UID: Final = re.compile(r"[0-9.]{1,64}")

Handler = Callable[[Any], Dataset | None]
"""Does what an event of pynetdicom asks and gives what is answered beside the status; raises Declined or Transient."""


Answer = tuple[Dataset | int, Dataset | None]
"""Status, with or without more of the command, and the data set."""


@dataclass(frozen=True, slots=True)
class _Request:
    """One DIMSE-N operation: pynetdicom's event, the service's handler, and the names of its primitive's parts."""

    event: Any
    what: str
    sop_class: str
    data_set: str


_REQUESTS: Final = (
    _Request(evt.EVT_N_CREATE, "create", "AffectedSOPClassUID", "AttributeList"),
    _Request(evt.EVT_N_SET, "set", "RequestedSOPClassUID", "ModificationList"),
    _Request(evt.EVT_N_ACTION, "action", "RequestedSOPClassUID", "ActionInformation"),
)


@dataclass(frozen=True, slots=True)
class Service:
    """What one SOP class lets a peer do."""

    sop_class_uid: str
    create: Handler | None = None
    set: Handler | None = None
    action: Handler | None = None


@dataclass(frozen=True, slots=True)
class NormalizedServices:
    """The services that a listener offers."""

    services: Sequence[Service] = ()
    _by_class: Mapping[str, Service] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Index the services."""
        object.__setattr__(self, "_by_class", {service.sop_class_uid: service for service in self.services})

    @property
    def has_actions(self) -> bool:
        """One of them is storage commitment."""
        return any(service.action is not None for service in self.services)

    def contexts(self) -> list[PresentationContext]:
        """Presentation contexts of all but storage commitment, which peers need for their reports, too."""
        return [
            build_context(service.sop_class_uid, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
            for service in self.services
            if service.action is None
        ]

    def handlers(self, refusals: Refusals, quota: Quota) -> list[tuple[Any, Callable[[Any], Answer]]]:
        """Event handlers for pynetdicom.

        Args:
            refusals: told of what is not done.
            quota: what is sent here counts as objects do.
        """
        return [(request.event, partial(self._answer, request, refusals, quota)) for request in _REQUESTS]

    def _answer(self, request: _Request, refusals: Refusals, quota: Quota, event: Any) -> Answer:
        sop_class_uid, data_set = (getattr(event.request, name) for name in (request.sop_class, request.data_set))
        address = event.assoc.requestor.address
        name = printable(event.assoc.requestor.ae_title.strip())
        status, detail, error_id = PROCESSING_FAILURE, "", None
        try:
            service = self._by_class.get(str(sop_class_uid))
            handler = None if service is None else getattr(service, request.what)
            if handler is None or str(sop_class_uid) != event.context.abstract_syntax:
                raise Declined(NO_SUCH_CLASS, "no such service under this presentation context")
            quota.charge(calling(event), address, _measured(data_set))
            return SUCCESS, handler(event)
        except Declined as error:
            status, detail, error_id = error.status, error.detail, error.error_id
        except QuotaExceeded as error:
            status, detail = RESOURCE_LIMITATION, str(error)
        except Transient as error:
            detail = str(error)
        except OsteoError as error:
            detail = str(error)
            get_logger().error("request_failed", error=type(error).__name__, ae_title=name)
        except Exception as error:  # noqa: BLE001 - the listener's loop edge: the peer must hear a failure
            detail = "an error of this node, or a data set that cannot be read"
            get_logger().error("request_failed", error=type(error).__name__, detail=where(error.__traceback__))
        told = {"ae_title": name, "kind": request.what, "status": f"0x{status:04X}"}
        refusals.tell(REQUEST_DECLINED, address=address, reason=detail, **told)
        return _status(status, detail, error_id), None


def calling(event: Any) -> str:
    """AE title of the peer."""
    return str(event.assoc.requestor.ae_title).strip()


def _measured(data_set: Any) -> int:
    """Bytes of a request's data set, unless it is too much to be decoded: scanners would wait for their answers.

    Raises:
        Declined: it is too long, or has more items than lists of `MAXIMUM_ITEMS` objects have.
    """
    if data_set is None:
        return 0
    encoded = data_set.getvalue()
    if len(encoded) > _MAXIMUM_BYTES:
        raise Declined(RESOURCE_LIMITATION, "the data set is too long")
    # each object is an item, and so are its series, its step and their codes
    if encoded.count(_ITEM) > 2 * MAXIMUM_ITEMS:
        raise Declined(RESOURCE_LIMITATION, TOO_MANY)
    return len(encoded)


def uid_in(data_set: Dataset, keyword: str, status: int = MISSING_ATTRIBUTE) -> str:
    """A UID that must be there.

    Raises:
        Declined: it is missing, with ``status``, or malformed.
    """
    value = data_set.get(keyword)
    if not value:
        raise Declined(status, f"no {keyword}")
    if not _UID.fullmatch(str(value)):
        raise Declined(INVALID_ATTRIBUTE_VALUE, f"malformed {keyword}")
    return str(value)


def well_formed(uid: object) -> str | None:
    """A UID of a command; None when it is missing or malformed."""
    return str(uid) if uid and _UID.fullmatch(str(uid)) else None


def items_of(data_set: Dataset, keyword: str) -> Iterable[Dataset]:
    """Items of a sequence that may be missing."""
    return data_set.get(keyword) or ()


def _status(status: int, comment: str, error_id: int | None) -> Dataset:
    answer = Dataset()
    answer.Status = status
    if comment:
        answer.ErrorComment = comment[:64]  # (0000,0902) is LO
    if error_id is not None:
        answer.ErrorID = error_id
    return answer


def announced_instances(
    series: Iterable[Dataset], references: Callable[[Dataset], Iterable[Dataset]]
) -> tuple[AnnouncedInstance, ...]:
    """The objects that a list of series names.

    Args:
        series: items with a Series Instance UID.
        references: gives the items of one series that name an object.

    Raises:
        Declined: a UID is missing or malformed, or there are too many.
    """
    found = tuple(
        AnnouncedInstance(
            series_instance_uid=uid_in(item, "SeriesInstanceUID"),
            sop_class_uid=uid_in(reference, "ReferencedSOPClassUID"),
            sop_instance_uid=uid_in(reference, "ReferencedSOPInstanceUID"),
        )
        for item, reference in islice(
            ((item, reference) for item in series for reference in references(item)), MAXIMUM_ITEMS + 1
        )
    )
    if len(found) > MAXIMUM_ITEMS:
        raise Declined(RESOURCE_LIMITATION, TOO_MANY)
    return found
