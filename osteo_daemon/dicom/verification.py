"""Is a peer there: C-ECHO (PS3.7 9.1.5)."""

from __future__ import annotations

import time

from pynetdicom import build_context
from pynetdicom.presentation import PresentationContext

from osteo_daemon.dicom.contexts import VERIFICATION
from osteo_daemon.dicom.peer import association
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import PeerUnavailable, Refused

_SUCCESS = 0x0000


def echo_context() -> PresentationContext:
    """The presentation context proposed."""
    return build_context(VERIFICATION)


def echo(peer: RemoteAE, calling_ae_title: str, *, timeout_seconds: float = 10) -> float:
    """Seconds from opening the association to the answer.

    Raises:
        PeerUnavailable: no association for now, or no answer in time.
        Refused: the peer rejects us for good or answers with a failure.
    """
    start = time.monotonic()
    with association(
        peer,
        calling_ae_title,
        [echo_context()],
        connect_timeout_seconds=timeout_seconds,
        dimse_timeout_seconds=timeout_seconds,
    ) as link:
        if not link.accepted_contexts:
            raise Refused(f"{peer.ae_title} does not accept verification")
        status = link.send_c_echo().get("Status")
        if status is None:
            raise PeerUnavailable(f"{peer.ae_title} gave no answer to C-ECHO")
        if status != _SUCCESS:
            raise Refused(f"{peer.ae_title} answered C-ECHO with status 0x{status:04X}")
        return time.monotonic() - start
