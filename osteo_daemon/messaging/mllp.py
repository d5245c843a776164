"""HL7 v2 messages over MLLP (HL7 Transport Specification: MLLP, Release 1): one frame out, one acknowledgement back.

MLLP is plain text without identity of either side: only for a network that the site trusts, or over TLS.
"""

from __future__ import annotations

import socket
import ssl
import time
from typing import Final

from osteo_daemon.domain.study import PeerTls
from osteo_daemon.errors import ConfigurationError, PeerBusy, PeerUnavailable, Refused
from osteo_daemon.tls import client_context, reason_of

START: Final = b"\x0b"
END: Final = b"\x1c\r"
LONGEST_ACKNOWLEDGEMENT_BYTES: Final = 1 << 16

_TAKEN: Final = frozenset({"AA", "CA"})
_FOR_NOW: Final = frozenset({"AE", "CE"})
_FOR_GOOD: Final = frozenset({"AR", "CR"})


def send_message(
    host: str,
    port: int,
    message: bytes,
    control_id: str,
    *,
    connect_timeout_seconds: float,
    answer_timeout_seconds: float,
    security: PeerTls | None = None,
) -> str:
    """Send one message and wait for its acknowledgement.

    Returns:
        The acknowledgement code: ``AA`` or ``CA``.

    Raises:
        PeerUnavailable: no connection, or no complete acknowledgement of this message in time.
        PeerBusy: the receiver had an error of its own (``AE``, ``CE``).
        Refused: it rejects the message (``AR``, ``CR``).
    """
    where = f"{host}:{port}"
    deadline = time.monotonic() + connect_timeout_seconds + answer_timeout_seconds
    try:
        with _connection(host, port, security, connect_timeout_seconds) as link:
            link.settimeout(answer_timeout_seconds)
            _send(link, START + message + END)
            answer = _read_frame(link, deadline)
    except OSError as error:
        raise PeerUnavailable(f"{where}: {reason_of(error, over_tls=security is not None)}") from error
    if answer is None:
        raise PeerUnavailable(f"{where} closed the connection without an acknowledgement")
    return _judge(answer, control_id, where)


def probe(host: str, port: int, *, connect_timeout_seconds: float, security: PeerTls | None = None) -> None:
    """Connect, make the TLS handshake where there is one, and say nothing.

    Raises:
        PeerUnavailable: nobody listens.
    """
    try:
        with _connection(host, port, security, connect_timeout_seconds):
            return
    except OSError as error:
        raise PeerUnavailable(f"{host}:{port}: {reason_of(error, over_tls=security is not None)}") from error


def _connection(host: str, port: int, security: PeerTls | None, seconds: float) -> socket.socket:
    link = socket.create_connection((host, port), timeout=seconds)
    if security is None:
        return link
    try:
        return client_context(security).wrap_socket(link, server_hostname=security.server_name or host)
    except ConfigurationError as error:
        link.close()
        raise PeerUnavailable(f"{host}:{port}: {error.detail}") from error
    except OSError:
        link.close()
        raise


def _send(link: socket.socket, data: bytes) -> None:
    try:
        link.sendall(data)
    except (ConnectionError, ssl.SSLEOFError):
        if isinstance(link, ssl.SSLSocket):
            # with TLS 1.3 a peer refuses our certificate when we believe the handshake done: its alert may lie here
            link.recv(1)
        raise


def _read_frame(link: socket.socket, deadline: float) -> bytes | None:
    received = bytearray()
    while END not in received:
        # a peer that sends a byte now and then would hold the lane for ever
        if time.monotonic() > deadline or len(received) > LONGEST_ACKNOWLEDGEMENT_BYTES:
            raise TimeoutError
        part = link.recv(4096)
        if not part:
            return None
        received += part
    start = received.find(START)
    return bytes(received[start + 1 : received.index(END)]) if start >= 0 else None


def _judge(answer: bytes, control_id: str, where: str) -> str:
    segments = [line.split("|") for line in answer.decode("utf-8", errors="replace").split("\r") if line]
    acknowledgement = next((fields for fields in segments if fields[0] == "MSA" and len(fields) >= 3), None)
    if acknowledgement is None:
        raise PeerUnavailable(f"{where} answered with something else than an acknowledgement")
    code, answered = acknowledgement[1].strip().upper(), acknowledgement[2].strip()
    if answered != control_id:
        raise PeerUnavailable(f"{where} acknowledged another message")
    # MSA-3 and ERR may quote the patient: only the code goes into a log
    if code in _TAKEN:
        return code
    if code in _FOR_NOW:
        raise PeerBusy(f"{where}: acknowledgement {code}")
    if code in _FOR_GOOD:
        raise Refused(f"{where}: acknowledgement {code}")
    raise PeerUnavailable(f"{where}: unknown acknowledgement code")
