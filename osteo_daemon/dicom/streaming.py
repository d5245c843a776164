"""An association whose C-STOREs one thread reads: where `data_transfer` meets the library's threads.

Overrides private names of pynetdicom 3.0: the dependency is pinned below 3.1.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider

from osteo_daemon.dicom.data_transfer import ABORTED, CLOSED, WAIT_SECONDS, MessageReader


class _StreamingDul(DULServiceProvider):  # type: ignore[misc]
    reader: MessageReader

    def idle_timer_expired(self) -> bool:
        # an object that is being stored, or compared, is no silence of its sender
        return not self.reader.answering and bool(super().idle_timer_expired())

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # noqa: BLE001
            # the edge of this thread: the library's decoders raise what they like
            self.reader.refuse(f"a message that cannot be read ({type(error).__name__})")
        finally:
            connection = None if self.socket is None else self.socket.socket
            if connection is not None:
                # the library leaves it open when its reactor fails; shut down alone, it would hold the peer's bytes
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
                connection.close()
            self.reader.abandon()
            self.reader.release()
            self.reader.library_works.set()

    def _is_transport_event(self) -> bool:
        association, reader = self.assoc, self.reader
        if self.state_machine.current_state != "Sta6":
            moved = bool(super()._is_transport_event())
            over = not {ABORTED, CLOSED}.isdisjoint(self.event_queue.queue)
            if over and self.state_machine.current_state == "Sta2":
                # no request will come of it: the thread that waits for one ends now, not when the time for it is over
                self.to_user_queue.put(None)
            return moved
        if not association.is_established:
            # its thread has accepted and not yet noted so, or ends it just now: to the library nothing may be given
            # that is ours to read, and a sender's first object may come at once
            return False if association.is_alive() else bool(super()._is_transport_event())
        if association.dimse.message is not None:  # the data set of a message that the library assembles
            return bool(super()._is_transport_event())
        moved = False
        while not (self._kill_thread or self.to_provider_queue.queue):
            lent = reader.lent
            if lent and not self.socket.ready:
                break
            if not lent and not reader.wait(WAIT_SECONDS):
                break
            moved = True
            self._idle_timer.restart()
            if (event := reader.read_pdu()) is not None:
                self.event_queue.put(event)
                break
            self._idle_timer.restart()
        return moved


class _PatientDimse(DIMSEServiceProvider):  # type: ignore[misc]
    def get_msg(self, block: bool = False) -> Any:
        # the association's thread asks every millisecond; the library has work only when it was given something
        if not block:
            self.assoc.dul.reader.library_works.wait(WAIT_SECONDS)
        return super().get_msg(block)


def stream_stores(association: Any, reader: MessageReader) -> None:
    """Let ``reader`` read an association's messages; before its threads start."""
    association.dul.reader = reader
    association.dul.__class__ = _StreamingDul
    association.dimse.__class__ = _PatientDimse


def is_busy(association: Any) -> bool:
    """True while a message of the association has begun and is not answered."""
    reader: MessageReader | None = getattr(association.dul, "reader", None)
    queued = association.dimse.message is not None or association.dimse.msg_queue.qsize() > 0
    return queued or (reader is not None and reader.busy)
