"""Storage commitment as SCP, push model (PS3.4 annex J): take a sender's request, and report on it later.

The request is only taken here; what is promised is decided elsewhere, and reported on an association of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context, build_role

from osteo_daemon.dicom.commitment import STORAGE_COMMITMENT_CLASS_UID, STORAGE_COMMITMENT_INSTANCE_UID
from osteo_daemon.dicom.normalized import (
    INVALID_ARGUMENT_VALUE,
    MAXIMUM_ITEMS,
    NO_SUCH_ACTION,
    NO_SUCH_INSTANCE,
    NOT_AUTHORISED,
    RESOURCE_LIMITATION,
    SUCCESS,
    Service,
    calling,
    items_of,
    uid_in,
)
from osteo_daemon.dicom.peer import association
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import Declined, PeerBusy, Refused

_REQUEST_COMMITMENT: Final = 1  # Action Type ID, PS3.4 table J.3.2-1
_ALL_COMMITTED: Final = 1  # Event Type ID, PS3.4 table J.3.3-1
_FAILURES_EXIST: Final = 2

Items = Sequence[tuple[str, str]]
"""SOP Class UID and SOP Instance UID of each object."""


def commitment_service(requesters: frozenset[str], take: Callable[[str, str, Items], bool]) -> Service:
    """The service.

    Args:
        requesters: AE titles that may ask.
        take: makes a request durable: AE title, Transaction UID, objects; False when the transaction is in use.
    """

    def act(event: Any) -> Dataset | None:
        requester = calling(event)
        if requester not in requesters:
            raise Declined(NOT_AUTHORISED, "storage commitment is not set up for this AE title")
        if event.request.RequestedSOPInstanceUID != STORAGE_COMMITMENT_INSTANCE_UID:
            raise Declined(NO_SUCH_INSTANCE, "not the well-known instance of storage commitment")
        if event.action_type != _REQUEST_COMMITMENT:
            raise Declined(NO_SUCH_ACTION, "unknown Action Type ID")
        information = event.action_information
        transaction_uid = uid_in(information, "TransactionUID", INVALID_ARGUMENT_VALUE)
        items = [
            (
                uid_in(item, "ReferencedSOPClassUID", INVALID_ARGUMENT_VALUE),
                uid_in(item, "ReferencedSOPInstanceUID", INVALID_ARGUMENT_VALUE),
            )
            for item in items_of(information, "ReferencedSOPSequence")
        ]
        if not items:
            raise Declined(INVALID_ARGUMENT_VALUE, "no object is named")
        if len(items) > MAXIMUM_ITEMS:
            raise Declined(RESOURCE_LIMITATION, "too many objects")
        if not take(requester, transaction_uid, items):
            raise Declined(INVALID_ARGUMENT_VALUE, "the transaction was used for other objects")
        return None

    return Service(STORAGE_COMMITMENT_CLASS_UID, action=act)


def report_commitment(
    peer: RemoteAE,
    calling_ae_title: str,
    transaction_uid: str,
    items: Items,
    failures: Mapping[str, int],
    *,
    connect_timeout_seconds: float,
    dimse_timeout_seconds: float,
) -> None:
    """Tell a requester what is kept and what is not, on an association of its own.

    Args:
        items: everything it asked about.
        failures: Failure Reason (0008,1197) by SOP Instance UID.

    Raises:
        PeerUnavailable: no association for now.
        PeerBusy: it did not take the report, which has to come again.
        Refused: it accepts no such reports from us.
    """
    with association(
        peer,
        calling_ae_title,
        [build_context(STORAGE_COMMITMENT_CLASS_UID, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])],
        connect_timeout_seconds=connect_timeout_seconds,
        dimse_timeout_seconds=dimse_timeout_seconds,
        # we open the association and are the SCP nevertheless (PS3.7 D.3.3.4)
        roles=[build_role(STORAGE_COMMITMENT_CLASS_UID, scp_role=True)],
    ) as link:
        status = None
        accepted = [context for context in link.accepted_contexts if context.as_scp]
        if accepted:
            answer, _reply = link.send_n_event_report(
                _report(transaction_uid, items, failures),
                _FAILURES_EXIST if failures else _ALL_COMMITTED,
                STORAGE_COMMITMENT_CLASS_UID,
                STORAGE_COMMITMENT_INSTANCE_UID,
            )
            status = answer.get("Status")
    # after the block: the association has ended with a release, not an abort
    if not accepted:
        raise Refused(f"{peer.ae_title} does not let us be the SCP of storage commitment")
    if status is None:
        raise PeerBusy(f"{peer.ae_title} gave no answer to a storage commitment report")
    if status != SUCCESS:
        raise PeerBusy(f"{peer.ae_title} answered a storage commitment report with status 0x{status:04X}")


def _report(transaction_uid: str, items: Items, failures: Mapping[str, int]) -> Dataset:
    report = Dataset()
    report.TransactionUID = transaction_uid
    committed = [_reference(item) for item in items if item[1] not in failures]
    if committed:
        report.ReferencedSOPSequence = committed
    failed = []
    for item in items:
        if item[1] in failures:
            reference = _reference(item)
            reference.FailureReason = failures[item[1]]
            failed.append(reference)
    if failed:
        report.FailedSOPSequence = failed
    return report


def _reference(item: tuple[str, str]) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = item
    return reference
