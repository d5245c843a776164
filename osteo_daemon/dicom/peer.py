"""Associations that this node opens: how they are made and what their failures mean."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.presentation import PresentationContext

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.codes import EventType
from osteo_daemon.audit.events import Peer
from osteo_daemon.dicom.uids import ASSOCIATION_VERSION_NAME, IMPLEMENTATION_CLASS_UID
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import ConfigurationError, PeerUnavailable, Refused
from osteo_daemon.tls import client_context, reason_of

MAXIMUM_PDU_BYTES = 131072
_ACCEPTED = 0
_REJECTED_PERMANENT = 1  # PS3.8 9.3.4, table 9-21: Result
_REJECT_SOURCE_PRESENTATION = 3
_TRANSIENT_PRESENTATION_REASONS = frozenset({1, 2})  # temporary congestion, local limit exceeded

_open: set[Association] = set()
_lock = threading.Lock()


@contextmanager
def association(
    peer: RemoteAE,
    calling_ae_title: str,
    contexts: Sequence[PresentationContext],
    *,
    connect_timeout_seconds: float,
    dimse_timeout_seconds: float,
    handlers: Sequence[Any] = (),
    roles: Sequence[Any] = (),
) -> Iterator[Association]:
    """Open an association, release it at the end, abort it when the body raises.

    Args:
        handlers: further event handlers of pynetdicom.
        roles: role selection items (PS3.7 D.3.3.4).

    Raises:
        PeerUnavailable: no connection, no TLS, no answer in time, aborted, or rejected for now (PS3.8 9.3.4 result 2).
        Refused: rejected for good (result 1).
    """
    entity = AE(ae_title=calling_ae_title)
    entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    entity.implementation_version_name = ASSOCIATION_VERSION_NAME
    entity.connection_timeout = connect_timeout_seconds
    entity.acse_timeout = connect_timeout_seconds
    entity.dimse_timeout = dimse_timeout_seconds
    entity.network_timeout = dimse_timeout_seconds
    entity.requested_contexts = list(contexts)
    security, failures = _security(peer)
    link = entity.associate(
        peer.host,
        peer.port,
        ae_title=peer.ae_title,
        max_pdu=MAXIMUM_PDU_BYTES,
        evt_handlers=[(evt.EVT_CONN_OPEN, _no_delay), *handlers],
        ext_neg=list(roles),
        tls_args=security,
    )
    if failures:
        reason = f"TLS: {reason_of(failures[0])}"
        asked = Peer(peer.ae_title, peer.host)
        trail.record(events.security_alert(EventType.NODE_AUTHENTICATION, reason, performing=asked))
        raise PeerUnavailable(f"{peer.ae_title} at {peer.host}:{peer.port}: {reason}")
    if not link.is_established:
        raise _failure(link, peer)
    with _lock:
        _open.add(link)
    try:
        yield link
    except BaseException:  # whatever ends the body, a signal too: the peer must not wait for us
        link.abort()
        raise
    else:
        link.release()
    finally:
        with _lock:
            _open.discard(link)


def _security(peer: RemoteAE) -> tuple[tuple[ssl.SSLContext, str] | None, list[OSError]]:
    """The library's arguments for TLS, and where a failure of the handshake will stand: the library keeps it back."""
    failures: list[OSError] = []
    if peer.tls is None:
        return None, failures
    try:
        return (client_context(peer.tls, failures.append), peer.tls.server_name or peer.host), failures
    except ConfigurationError as error:
        # files may be missing for a moment while they are replaced; a person can mend them without a new report
        raise PeerUnavailable(f"{peer.ae_title} at {peer.host}:{peer.port}: {error.detail}") from error


def hang_up_all() -> None:
    """End every association that this process has open: who waits in one for an answer is told that none comes."""
    with _lock:
        links = list(_open)
    for link in links:
        connection = link.dul.socket
        if connection is not None and connection.socket is not None:
            with suppress(OSError):  # it went first
                # of the plain socket, under TLS too: another thread is reading
                socket.socket.shutdown(connection.socket, socket.SHUT_RDWR)


def _no_delay(event: Event) -> None:
    # with Nagle's algorithm the last short segment of each message waits for the peer's delayed acknowledgement
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _answer(link: Association) -> Any:
    """What the peer said to our request (an A-ASSOCIATE primitive); None: nothing.

    On a busy machine the library's reactor has read a rejection and closed before the thread that asked looks whether
    there is a connection; that one takes it for a failure then, and leaves the answer where it is.
    """
    if link.acceptor.primitive is not None:
        return link.acceptor.primitive
    return next((entry for entry in list(link.dul.to_user_queue.queue) if isinstance(entry, A_ASSOCIATE)), None)


def _failure(link: Association, peer: RemoteAE) -> PeerUnavailable | Refused:
    name = f"{peer.ae_title} at {peer.host}:{peer.port}"
    answer = _answer(link)
    if answer is not None and int(answer.result) == _ACCEPTED:
        # accepted without a single context, which the library ends by itself
        return Refused(f"{name} accepts none of our presentation contexts")
    if answer is None:
        return PeerUnavailable(f"{name}: no association (no connection, no answer in time, or aborted)")
    result, source, reason = int(answer.result), int(answer.result_source), int(answer.diagnostic)
    text = f"{name} rejected the association: {answer.reason_str} (result {result}, source {source}, reason {reason})"
    # some peers call a full house permanent: the reason tells better (PS3.8 table 9-21)
    full = source == _REJECT_SOURCE_PRESENTATION and reason in _TRANSIENT_PRESENTATION_REASONS
    return Refused(text) if result == _REJECTED_PERMANENT and not full else PeerUnavailable(text)
