"""What becomes of one C-STORE: its bytes go to the spool while they come; then it is checked, stored, and answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from osteo_daemon.dicom.header import file_header, read_identifiers
from osteo_daemon.dicom.quota import Quota
from osteo_daemon.dicom.received import STORED_CLASSES, Incoming, ReceivedObject, printable, received_object
from osteo_daemon.dicom.refusals import Refusals, RefusedObject
from osteo_daemon.dicom.status import StoreStatus, status_of
from osteo_daemon.dicom.store_messages import StoreRequest
from osteo_daemon.errors import NotDicom, OsteoError, UnsupportedSopClass
from osteo_daemon.log import get_logger, where

Note = Callable[[Any, int], None]
"""Told of an association and the bytes just stored; 0: it only showed that it lives."""


class Arrivals:
    """Begins one `StoredArrival` for each C-STORE request.

    Args:
        begin_file: a place for an object's bytes; its errors refuse the object.
        store: makes an object durable; its OsteoError decides the answer.
        quota: what one sender may take.
        note: keeps the books of each association.
        identify: an association's id.
        refusals: told of what is not taken.
    """

    def __init__(
        self,
        begin_file: Callable[[], Incoming],
        store: Callable[[ReceivedObject], object],
        quota: Quota,
        note: Note,
        identify: Callable[[Any], str],
        refusals: Refusals,
    ) -> None:
        self.begin_file = begin_file
        self.store = store
        self.note = note
        self.identify = identify
        self.quota = quota
        self.refusals = refusals

    def begin(self, association: Any, request: StoreRequest) -> StoredArrival | None:
        """A data set begins to arrive; None under a presentation context that was not accepted."""
        context = association._accepted_cx.get(request.context_id)
        return None if context is None else StoredArrival(self, association, request, context)

    @contextmanager
    def charged(self, ae_title: str, address: str, size: int) -> Iterator[None]:
        """Count bytes against the sender's hour; those that are not stored are given back."""
        self.quota.charge(ae_title, address, size)
        try:
            yield
        except BaseException:
            self.quota.refund(ae_title, address, size)
            raise


class StoredArrival:
    """One object on its way; see `data_transfer.Arrival`."""

    def __init__(self, arrivals: Arrivals, association: Any, request: StoreRequest, context: Any) -> None:
        self._arrivals = arrivals
        self._association = association
        self._request = request
        self._transfer_syntax_uid = str(context.transfer_syntax[0])
        self._file: Incoming | None = None
        self._refusal: tuple[StoreStatus, str] | None = None
        self._study_instance_uid = ""
        arrivals.note(association, 0)
        with self._refusing():
            arrivals.quota.check(association.requestor.ae_title.strip(), association.requestor.address)
            if request.sop_class_uid != context.abstract_syntax:
                shown = printable(request.sop_class_uid)
                raise UnsupportedSopClass(f"{shown} under a context for {context.abstract_syntax}")
            if request.sop_class_uid in STORED_CLASSES:  # others are refused when all their bytes have come
                self._file = arrivals.begin_file()
                self._file.write(file_header(*self._announced, self._transfer_syntax_uid))

    @property
    def _announced(self) -> tuple[str, str]:
        return self._request.sop_class_uid, self._request.sop_instance_uid

    def write(self, fragment: memoryview) -> None:
        """The next bytes; after a failure they are read and dropped."""
        if self._file is not None:
            with self._refusing():
                self._file.write(fragment)

    def finish(self, data_set: memoryview) -> tuple[int, str]:
        """Store it; returns status and error comment when what was done is durable."""
        association = self._association
        source_ae, address = association.requestor.ae_title.strip(), association.requestor.address
        stored_bytes = 0
        if self._refusal is None:
            with self._refusing():
                sop_class_uid, sop_instance_uid = self._announced
                received = received_object(
                    data_set,
                    sop_class_uid=sop_class_uid,
                    sop_instance_uid=sop_instance_uid,
                    transfer_syntax_uid=self._transfer_syntax_uid,
                    source_ae=source_ae,
                    address=address,
                    association_id=self._arrivals.identify(association),
                    # a C-MOVE of our own: nobody waits for this study
                    fetched=self._request.move_originator == association.acceptor.ae_title.strip(),
                    file=self._file,
                )
                self._study_instance_uid = received.identifiers.study_instance_uid
                size = sum(map(len, received.parts))
                with self._arrivals.charged(source_ae, address, size):
                    self._arrivals.store(received)
                stored_bytes = size
        else:
            self._study_instance_uid = self._study_in(data_set)
        self._arrivals.note(association, stored_bytes)
        if self._refusal is None:
            return StoreStatus.SUCCESS, ""
        status, reason = self._refusal
        self._arrivals.refusals.tell_object(
            RefusedObject(
                status,
                printable(self._request.sop_class_uid),
                printable(self._request.sop_instance_uid),
                self._study_instance_uid,
            ),
            address=address,
            ae_title=printable(source_ae),
            reason=reason,
        )
        return status, reason

    def abandon(self) -> None:
        """The peer went away in the middle: nothing is left behind."""
        file, self._file = self._file, None
        if file is not None:
            file.discard()

    def _study_in(self, data_set: memoryview) -> str:
        """The study of an object that was refused before it was read; empty when it cannot be read."""
        try:
            return read_identifiers(data_set, self._transfer_syntax_uid).study_instance_uid
        except NotDicom:
            return ""

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
            return
        except OsteoError as error:
            self._refusal = status_of(error), str(error)
        except OSError as error:
            self._refusal = StoreStatus.OUT_OF_RESOURCES, f"the spool failed: {error.strerror}"
        except Exception as error:  # noqa: BLE001
            # the edge of this role's loop: the sender must hear a failure, and the next object is another chance
            get_logger().error("store_failed", error=type(error).__name__, detail=where(error.__traceback__))
            self._refusal = StoreStatus.PROCESSING_FAILURE, "an error of this node"
        self.abandon()
