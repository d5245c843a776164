"""Storage commitment, push model (PS3.4 annex J): ask a peer whether it keeps objects, and read what it reports.

The request (N-ACTION) is only received at once; the report (N-EVENT-REPORT) comes when the peer has looked: on the same
association, if that is still open, or on one that the peer opens to our own listener.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context, evt
from pynetdicom.association import Association
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.presentation import PresentationContext

from osteo_daemon.dicom.contexts import VERIFICATION
from osteo_daemon.dicom.peer import association
from osteo_daemon.dicom.storage_scu import SpooledObject
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import DataSetMismatch, OsteoError, Refused, Transient
from osteo_daemon.log import get_logger, where

STORAGE_COMMITMENT_CLASS_UID: Final = "1.2.840.10008.1.20.1"
STORAGE_COMMITMENT_INSTANCE_UID: Final = "1.2.840.10008.1.20.1.1"
"""The well-known instance that requests and reports name (PS3.4 J.3.5)."""

_REQUEST_COMMITMENT: Final = 1  # Action Type ID, PS3.4 table J.3.2-1
_EVENT_SUCCESS: Final = 1  # Event Type ID, PS3.4 table J.3.3-1
_EVENT_FAILURES: Final = 2

_SUCCESS: Final = 0x0000
_PROCESSING_FAILURE: Final = 0x0110  # PS3.7 10.1.1.1.8
_NO_SUCH_EVENT_TYPE: Final = 0x0113
_INVALID_ARGUMENT: Final = 0x0115


@dataclass(frozen=True, slots=True)
class CommitmentReport:
    """What a peer reports on one transaction.

    Attributes:
        committed: SOP Instance UIDs that the peer keeps.
        failed: SOP Instance UIDs that it does not keep, each with its Failure Reason (0008,1197).
    """

    transaction_uid: str
    committed: frozenset[str]
    failed: Mapping[str, int]


def new_transaction_uid() -> str:
    """A Transaction UID (0008,1195) that nobody has used (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid4().int}"


def commitment_context() -> PresentationContext:
    """The context under which a peer may report to our listener: it acts as SCP, proposed by role selection or not."""
    context = build_context(STORAGE_COMMITMENT_CLASS_UID, [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
    context.scu_role = True
    context.scp_role = True
    return context


def request_commitment(
    peer: RemoteAE,
    calling_ae_title: str,
    transaction_uid: str,
    objects: Sequence[SpooledObject],
    *,
    connect_timeout_seconds: float,
    dimse_timeout_seconds: float,
    linger_seconds: float,
    accepted: Callable[[], None],
    reported: Callable[[CommitmentReport], None],
) -> None:
    """Ask a peer to commit to objects, and listen for a while whether it reports on the same association.

    Args:
        transaction_uid: see `new_transaction_uid`; noted durably before, since the report may be quick.
        linger_seconds: how long the association stays open for the report.
        accepted: called when the peer has taken the request.
        reported: as in `answer_report`.

    Raises:
        PeerUnavailable: no association for now.
        Refused: the peer does no storage commitment for us, or does not answer a request for it.
    """
    ear = _Ear(reported)
    refusal = None
    with association(
        peer,
        calling_ae_title,
        [
            build_context(STORAGE_COMMITMENT_CLASS_UID, [ExplicitVRLittleEndian, ImplicitVRLittleEndian]),
            # a peer without storage commitment accepts this one: the association ends with a release, not an abort
            build_context(VERIFICATION),
        ],
        connect_timeout_seconds=connect_timeout_seconds,
        dimse_timeout_seconds=dimse_timeout_seconds,
        handlers=ear.handlers,
    ) as link:
        refusal = _ask(link, transaction_uid, objects)
        if refusal is None:
            accepted()
            ear.listen(link, linger_seconds, dimse_timeout_seconds)
    if refusal is not None:
        raise Refused(f"{peer.ae_title} {refusal}")


class _Ear:
    """Hears a report on the association that asked for it, and keeps it open until our answer to it has left.

    Without that a release overtakes the answer: the library's reactor counts as idle while a handler runs.
    """

    def __init__(self, reported: Callable[[CommitmentReport], None]) -> None:
        self._reported = reported
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._started = False
        self._over = False
        self.handlers = [
            (evt.EVT_N_EVENT_REPORT, self._on_report),
            (evt.EVT_PDU_SENT, self._on_sent),
            (evt.EVT_CONN_CLOSE, lambda _event: self._ended.set()),
        ]

    def listen(self, link: Association, linger_seconds: float, answer_seconds: float) -> None:
        """Wait for a report, or release the association when none has begun to come."""
        self._ended.wait(linger_seconds)
        with self._lock:
            if not self._started:
                self._over = True
                link.release()
                return
        self._ended.wait(answer_seconds)

    def _on_report(self, event: Any) -> tuple[int, None]:
        with self._lock:
            if self._over:
                return _PROCESSING_FAILURE, None  # never sent: the association is released; the peer reports anew
            self._started = True
            return answer_report(event, self._reported), None

    def _on_sent(self, event: Any) -> None:
        if self._started and isinstance(event.pdu, P_DATA_TF):
            self._ended.set()


def answer_report(event: Any, reported: Callable[[CommitmentReport], None]) -> int:
    """Take an N-EVENT-REPORT; gives the status to answer.

    Args:
        event: pynetdicom's.
        reported: makes the report durable; its KeyError says that there is no such transaction with this peer.
    """
    try:
        if event.event_type not in (_EVENT_SUCCESS, _EVENT_FAILURES):
            return _NO_SUCH_EVENT_TYPE
        reported(_read(event.event_information))
    except KeyError:
        get_logger().warning("commitment_unknown", ae_title=_printable(event.assoc.remote["ae_title"]))
        return _INVALID_ARGUMENT
    except DataSetMismatch as error:
        get_logger().warning("commitment_unreadable", reason=error.detail)
        return _INVALID_ARGUMENT
    except Transient as error:
        # a failure tells the peer to report again
        get_logger().warning("store_unavailable", error=type(error).__name__)
        return _PROCESSING_FAILURE
    except OsteoError as error:
        get_logger().error("commitment_failed", error=type(error).__name__)
        return _PROCESSING_FAILURE
    except Exception as error:  # noqa: BLE001 - the listener's loop edge: the peer must hear a failure
        get_logger().error("commitment_failed", error=type(error).__name__, detail=where(error.__traceback__))
        return _PROCESSING_FAILURE
    return _SUCCESS


def _ask(link: Association, transaction_uid: str, objects: Sequence[SpooledObject]) -> str | None:
    """Send the request; gives why it was not taken, None when it was."""
    if not any(context.abstract_syntax == STORAGE_COMMITMENT_CLASS_UID for context in link.accepted_contexts):
        return "accepts no presentation context for storage commitment"
    answer, _reply = link.send_n_action(
        _request(transaction_uid, objects),
        _REQUEST_COMMITMENT,
        STORAGE_COMMITMENT_CLASS_UID,
        STORAGE_COMMITMENT_INSTANCE_UID,
    )
    status = answer.get("Status")
    if status is None:
        return "gave no answer to a storage commitment request"
    return None if status == _SUCCESS else f"answered a storage commitment request with status 0x{status:04X}"


def _request(transaction_uid: str, objects: Sequence[SpooledObject]) -> Dataset:
    dataset = Dataset()
    dataset.TransactionUID = transaction_uid
    items = []
    for entry in objects:
        item = Dataset()
        item.ReferencedSOPClassUID = entry.sop_class_uid
        item.ReferencedSOPInstanceUID = entry.sop_instance_uid
        items.append(item)
    dataset.ReferencedSOPSequence = items
    return dataset


def _read(information: Dataset) -> CommitmentReport:
    try:
        return CommitmentReport(
            transaction_uid=str(information.TransactionUID),
            committed=frozenset(
                str(item.ReferencedSOPInstanceUID) for item in information.get("ReferencedSOPSequence", None) or ()
            ),
            failed={
                str(item.ReferencedSOPInstanceUID): int(item.get("FailureReason", None) or _PROCESSING_FAILURE)
                for item in information.get("FailedSOPSequence", None) or ()
            },
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise DataSetMismatch("the report of a storage commitment lacks its transaction or an instance") from error


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:16])
