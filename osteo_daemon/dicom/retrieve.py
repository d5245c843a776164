"""Fetch from an archive: C-MOVE to ourselves and C-GET, Study Root model (PS3.4 C.4.2, C.4.3).

What came is judged by what is stored, never by the peer's counters: they tell of progress.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from pydicom.dataset import Dataset
from pynetdicom import build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from osteo_daemon.dicom.contexts import ACCOMPANYING_CLASSES, SCREENED_CLASSES, TRANSFER_SYNTAXES
from osteo_daemon.dicom.peer import association
from osteo_daemon.dicom.received import ReceivedObject, received_object
from osteo_daemon.dicom.status import StoreStatus, status_of
from osteo_daemon.domain.archive import Retrieved, Target
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import ConfigurationError, Damaged, OsteoError, PeerBusy, Refused
from osteo_daemon.log import get_logger, where

STUDY_ROOT_MOVE: Final = "1.2.840.10008.5.1.4.1.2.2.2"
STUDY_ROOT_GET: Final = "1.2.840.10008.5.1.4.1.2.2.3"

_SUCCESS: Final = 0x0000
_SOME_FAILED: Final = 0xB000  # sub-operations complete, one or more failures or warnings
_PENDING: Final = frozenset({0xFF00, 0xFF01})
_CANCELLED: Final = 0xFE00
_DESTINATION_UNKNOWN: Final = 0xA801
_IDENTIFIER_MISMATCH: Final = range(0xA900, 0xAA00)
_UNABLE: Final = range(0xC000, 0xD000)
_CLASS_UNSUPPORTED: Final = 0x0122
_NOT_AUTHORISED: Final = 0x0124

_CANCEL_PATIENCE_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.2
_UIDS_PER_REQUEST: Final = 200  # a value of VR UI ends at 65534 bytes

Progress = Callable[[int], None]
"""Called with how many objects of the present request came so far."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Where to fetch from and how patiently.

    Attributes:
        calling_ae_title: ours; with C-MOVE the destination as well.
        answer_timeout_seconds: longest silence of the archive.
        stopping: when set, the archive is asked to cancel.
    """

    peer: RemoteAE
    calling_ae_title: str
    connect_timeout_seconds: float
    answer_timeout_seconds: float
    stopping: threading.Event

    def move(self, targets: Sequence[Target], progress: Progress) -> Retrieved:
        """Have the archive send the targets to our receiver.

        Raises:
            PeerUnavailable: it cannot, for now.
            Refused: it does not, whatever is asked.
            ConfigurationError: it does not know our AE title.
        """
        contexts = [build_context(STUDY_ROOT_MOVE)]
        with self._association(contexts) as link:
            requests = [keys for target in targets for keys in _identifiers(target)]

            def send(keys: Dataset, number: int) -> Any:
                return link.send_c_move(keys, self.calling_ae_title, STUDY_ROOT_MOVE, msg_id=number)

            return Retrieved(self._run(link, requests, send, STUDY_ROOT_MOVE, progress))

    def get(
        self,
        targets: Sequence[Target],
        store: Callable[[ReceivedObject], object],
        association_id: str,
        progress: Progress,
    ) -> Retrieved:
        """Take the targets over this association; ``store`` makes each object durable before it is acknowledged.

        Raises:
            PeerUnavailable: it cannot, for now, or this node cannot store.
            Refused: it does not, whatever is asked.
        """
        taker = _Taker(store, self.peer, association_id)
        contexts, roles = storage_contexts()
        handlers = [(evt.EVT_C_STORE, taker.take)]
        with self._association([build_context(STUDY_ROOT_GET), *contexts], handlers, roles) as link:
            requests = [keys for target in targets for keys in _identifiers(target)]

            def send(keys: Dataset, number: int) -> Any:
                return link.send_c_get(keys, STUDY_ROOT_GET, msg_id=number)

            failed = self._run(link, requests, send, STUDY_ROOT_GET, progress)
        if taker.unable is not None and failed:
            raise PeerBusy(f"this node could not store: {taker.unable}")
        return Retrieved(failed, taker.refused)

    @contextmanager
    def _association(
        self, contexts: list[PresentationContext], handlers: list[Any] | None = None, roles: list[Any] | None = None
    ) -> Iterator[Association]:
        with association(
            self.peer,
            self.calling_ae_title,
            contexts,
            connect_timeout_seconds=self.connect_timeout_seconds,
            dimse_timeout_seconds=self.answer_timeout_seconds,
            handlers=handlers or (),
            roles=roles or (),
        ) as link:
            yield link

    def _run(
        self,
        link: Association,
        requests: list[Dataset],
        send: Callable[[Dataset, int], Any],
        model: str,
        progress: Progress,
    ) -> frozenset[str]:
        failed: set[str] = set()
        before = 0
        for number, keys in enumerate(requests, start=1):
            if self.stopping.is_set():
                raise PeerBusy("stopped")
            if not link.is_established:
                raise PeerBusy(f"{self.peer.ae_title} ended the association")
            with self._cancelling(link, number, model):
                for answer, identifier in send(keys, number):
                    status = answer.get("Status")
                    done = _done(answer)
                    if status in _PENDING:
                        progress(before + done)
                        continue
                    self._judge(status, model)
                    if identifier is not None:
                        failed |= _uids(identifier.get("FailedSOPInstanceUIDList"))
                    before += done
                    progress(before)
        return frozenset(failed)

    @contextmanager
    def _cancelling(self, link: Association, number: int, model: str) -> Iterator[None]:
        """While the block runs a stop is passed on to the archive; one that goes on sending is hung up on."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_POLL_SECONDS):
                if self.stopping.is_set():
                    if link.is_established:
                        link.send_c_cancel(number, query_model=model)
                    if not ended.wait(_CANCEL_PATIENCE_SECONDS):
                        link.abort()
                    return

        thread = threading.Thread(target=watch, name="cancel", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _judge(self, status: int | None, model: str) -> None:
        name = self.peer.ae_title
        if self.stopping.is_set():
            raise PeerBusy("stopped")
        # Orthanc hangs up when it does not know the destination, others say no more than that they are unable
        hint = f"; does it know {self.calling_ae_title} as a destination?" if model == STUDY_ROOT_MOVE else ""
        if status is None:
            raise PeerBusy(f"{name} gave no answer in time or ended the association{hint}")
        text = f"{name} answered with status 0x{status:04X}"
        if status in (_SUCCESS, _SOME_FAILED):
            return
        if status == _DESTINATION_UNKNOWN:
            raise ConfigurationError(
                f"{text}: it does not know the move destination {self.calling_ae_title}; enter it there"
            )
        if status in _IDENTIFIER_MISMATCH or status in (_CLASS_UNSUPPORTED, _NOT_AUTHORISED):
            raise Refused(text)
        # A7xx, Cxxx, a cancellation that we did not ask for: another time
        raise PeerBusy(text + hint if status in _UNABLE else text)


class _Taker:
    """The storage SCP on an association of ours (C-GET): an object is acknowledged when it is durable."""

    def __init__(self, store: Callable[[ReceivedObject], object], peer: RemoteAE, association_id: str) -> None:
        self._store = store
        self._peer = peer
        self._association_id = association_id
        self.refused: dict[str, str] = {}
        self.unable: OsteoError | OSError | None = None

    def take(self, event: Any) -> int:
        request, context = event.request, event.context
        uid = str(request.AffectedSOPInstanceUID or "")
        try:
            self._store(
                received_object(
                    request.DataSet.getbuffer(),
                    sop_class_uid=str(request.AffectedSOPClassUID),
                    sop_instance_uid=uid,
                    transfer_syntax_uid=str(context.transfer_syntax),
                    source_ae=self._peer.ae_title,
                    address=self._peer.host,
                    association_id=self._association_id,
                    fetched=True,
                )
            )
        except Damaged as error:
            self.refused[uid] = str(error)
            return status_of(error)
        except OsteoError as error:
            self.unable = error
            return status_of(error)
        except OSError as error:
            self.unable = error
            return StoreStatus.OUT_OF_RESOURCES
        except Exception as error:  # noqa: BLE001 - the edge of the library's loop: the archive must hear a failure
            get_logger().error("store_failed", error=type(error).__name__, detail=where(error.__traceback__))
            return StoreStatus.PROCESSING_FAILURE
        return StoreStatus.SUCCESS


def _identifiers(target: Target) -> Iterator[Dataset]:
    """The keys of each request that a target takes."""
    uids = target.sop_instance_uids
    if not uids:
        yield _keys(target, "SERIES")
    for start in range(0, len(uids), _UIDS_PER_REQUEST):
        keys = _keys(target, "IMAGE")
        keys.SOPInstanceUID = list(uids[start : start + _UIDS_PER_REQUEST])
        yield keys


def _keys(target: Target, level: str) -> Dataset:
    keys = Dataset()
    keys.QueryRetrieveLevel = level
    keys.StudyInstanceUID = target.study_instance_uid
    keys.SeriesInstanceUID = target.series_instance_uid
    return keys


def storage_contexts() -> tuple[list[PresentationContext], list[Any]]:
    """CT in a context for each transfer syntax, so that the archive sends what it has; 128 contexts are the most."""
    contexts = [build_context(uid, syntax) for uid in SCREENED_CLASSES for syntax in TRANSFER_SYNTAXES]
    contexts += [build_context(uid, list(TRANSFER_SYNTAXES)) for uid in ACCOMPANYING_CLASSES]
    return contexts, [build_role(uid, scp_role=True) for uid in (*SCREENED_CLASSES, *ACCOMPANYING_CLASSES)]


def _done(answer: Dataset) -> int:
    return sum(
        int(answer.get(keyword) or 0)
        for keyword in (
            "NumberOfCompletedSuboperations",
            "NumberOfFailedSuboperations",
            "NumberOfWarningSuboperations",
        )
    )


def _uids(value: Any) -> set[str]:
    if not value:
        return set()
    return {str(value)} if isinstance(value, str) else {str(entry) for entry in value}
