"""Transports of messages: HL7 over MLLP, FHIR over HTTP. A message is one object in the spool, sent as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from osteo_daemon.dicom.storage_scu import SpooledObject, Verdict
from osteo_daemon.errors import PeerBusy, PeerUnavailable, Refused
from osteo_daemon.messaging import fhir_client, hl7, mllp
from osteo_daemon.settings import DestinationSettings, Settings
from osteo_daemon.tls import peer_tls


class _MessageTransport(ABC):
    """Sends each message by itself; how is the subclass's."""

    def send(
        self,
        objects: Sequence[SpooledObject],
        choose: Callable[[SpooledObject, Sequence[Verdict]], bool],
        answered: Callable[[Verdict], None],
    ) -> Sequence[Verdict]:
        """As `osteo_daemon.delivery.transport.Transport.send`."""
        verdicts: list[Verdict] = []
        for entry in objects:
            if not choose(entry, verdicts):
                continue
            try:
                verdict = Verdict(entry.sop_instance_uid, self._post(entry), None)
            except Refused as error:
                verdict = Verdict(entry.sop_instance_uid, "message", error)
            except PeerBusy as error:
                verdict = Verdict(entry.sop_instance_uid, "no-answer", error)
            verdicts.append(verdict)
            answered(verdict)
            if isinstance(verdict.error, PeerUnavailable):
                break
        return verdicts

    @abstractmethod
    def _post(self, entry: SpooledObject) -> str:
        """Send one message; returns the status to record."""


class Hl7Transport(_MessageTransport):
    """ORU^R01 over MLLP; the probe is a connection."""

    def __init__(self, settings: Settings, destination: DestinationSettings) -> None:
        self._host, self._port = destination.host, destination.port
        self._security = peer_tls(settings.tls, destination)
        self._connect_seconds = settings.deliverer.connect_timeout_seconds
        self._answer_seconds = settings.deliverer.dimse_timeout_seconds

    def probe(self) -> None:
        """As `osteo_daemon.delivery.transport.Transport.probe`."""
        mllp.probe(self._host, self._port, connect_timeout_seconds=self._connect_seconds, security=self._security)

    def _post(self, entry: SpooledObject) -> str:
        code = mllp.send_message(
            self._host,
            self._port,
            Path(entry.path).read_bytes(),
            hl7.control_id(entry.sop_instance_uid),
            connect_timeout_seconds=self._connect_seconds,
            answer_timeout_seconds=self._answer_seconds,
            security=self._security,
        )
        return f"ack-{code}"


class FhirTransport(_MessageTransport):
    """A transaction by POST; the probe asks for the capability statement."""

    def __init__(self, settings: Settings, destination: DestinationSettings) -> None:
        self._url, self._token_file = destination.url, destination.token_file
        self._seconds = settings.deliverer.dimse_timeout_seconds

    def probe(self) -> None:
        """As `osteo_daemon.delivery.transport.Transport.probe`."""
        fhir_client.probe(self._url, timeout_seconds=self._seconds)

    def _post(self, entry: SpooledObject) -> str:
        status = fhir_client.post_transaction(
            self._url, Path(entry.path).read_bytes(), self._token_file, timeout_seconds=self._seconds
        )
        return f"http-{status}"
