"""How objects reach a destination: one transport for each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from osteo_daemon.delivery.message_transport import FhirTransport, Hl7Transport
from osteo_daemon.delivery.web_transport import WebTransport
from osteo_daemon.dicom.storage_scu import SpooledObject, Verdict, send_objects
from osteo_daemon.dicom.verification import echo
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import Refused
from osteo_daemon.settings import DestinationSettings, Settings
from osteo_daemon.tls import peer_tls


class Transport(Protocol):
    """One destination's way in; used by one thread at a time."""

    def send(
        self,
        objects: Sequence[SpooledObject],
        choose: Callable[[SpooledObject, Sequence[Verdict]], bool],
        answered: Callable[[Verdict], None],
    ) -> Sequence[Verdict]:
        """Send objects in order until one fails for the time being.

        Args:
            choose: asked before each object with the verdicts so far; False leaves it out.
            answered: called with each verdict at once.

        Raises:
            PeerUnavailable: the destination cannot be reached for now.
            Refused: it does not talk to us.
        """

    def probe(self) -> None:
        """Ask whether the destination is there, without sending it anything.

        Raises:
            PeerUnavailable: it does not answer.
        """


class DicomTransport:
    """C-STORE to a peer; C-ECHO as the probe."""

    def __init__(self, settings: Settings, destination: DestinationSettings) -> None:
        self._peer = remote_ae(settings, destination)
        self._calling = settings.receiver.ae_title
        self._connect_seconds = settings.deliverer.connect_timeout_seconds
        self._dimse_seconds = settings.deliverer.dimse_timeout_seconds

    def send(
        self,
        objects: Sequence[SpooledObject],
        choose: Callable[[SpooledObject, Sequence[Verdict]], bool],
        answered: Callable[[Verdict], None],
    ) -> Sequence[Verdict]:
        """As `Transport.send`."""
        return send_objects(
            self._peer,
            self._calling,
            objects,
            connect_timeout_seconds=self._connect_seconds,
            dimse_timeout_seconds=self._dimse_seconds,
            choose=choose,
            answered=answered,
        )

    def probe(self) -> None:
        """As `Transport.probe`; a peer that refuses C-ECHO is there."""
        try:
            echo(self._peer, self._calling, timeout_seconds=self._connect_seconds)
        except Refused:
            return


TRANSPORTS: dict[str, Callable[[Settings, DestinationSettings], Transport]] = {
    "dicom": DicomTransport,
    "dicomweb": WebTransport,
    "hl7": Hl7Transport,
    "fhir": FhirTransport,
}
"""By the kind of a destination."""


def remote_ae(settings: Settings, destination: DestinationSettings) -> RemoteAE:
    """Where a DICOM destination is, and how it is spoken to."""
    security = peer_tls(settings.tls, destination)
    return RemoteAE(destination.ae_title, destination.host, destination.port, security)
