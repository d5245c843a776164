"""STOW-RS as a way to a destination, and QIDO-RS as the proof that it keeps what it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pydicom

from osteo_daemon.dicom.storage_scu import SpooledObject, Verdict, judge
from osteo_daemon.dicomweb.client import DicomwebClient
from osteo_daemon.errors import PeerUnavailable, Refused
from osteo_daemon.settings import DestinationSettings, Settings


class WebTransport:
    """One request for each object: so each has an answer of its own. The probe is a query."""

    def __init__(self, settings: Settings, destination: DestinationSettings) -> None:
        self._client = _client(settings, destination)

    def send(
        self,
        objects: Sequence[SpooledObject],
        choose: Callable[[SpooledObject, Sequence[Verdict]], bool],
        answered: Callable[[Verdict], None],
    ) -> Sequence[Verdict]:
        """As `osteo_daemon.delivery.transport.Transport.send`.

        A failure reason in the store response has the meaning of the same C-STORE status (PS3.18 10.5.3): want of
        resources may pass, a refused class or data set is for good.
        """
        verdicts: list[Verdict] = []
        for entry in objects:
            if not choose(entry, verdicts):
                continue
            verdict = self._send(entry)
            verdicts.append(verdict)
            answered(verdict)
            if isinstance(verdict.error, PeerUnavailable):
                break
        return verdicts

    def _send(self, entry: SpooledObject) -> Verdict:
        uid = entry.sop_instance_uid
        try:
            answer = self._client.store(entry.path, uid)
        except PeerUnavailable as error:
            return Verdict(uid, "no-answer", error)
        except Refused as error:
            return Verdict(uid, "http", error)
        if answer.failure is None:
            return Verdict(uid, f"http-{answer.http_status}", None)
        return Verdict(uid, f"0x{answer.failure:04X}", judge(answer.failure, self._client.host))

    def probe(self) -> None:
        """As `osteo_daemon.delivery.transport.Transport.probe`."""
        self._client.probe()


def find_on_the_web(
    settings: Settings, destination: DestinationSettings, objects: Sequence[SpooledObject]
) -> frozenset[str]:
    """SOP Instance UIDs, of those asked for, that the destination lists.

    Raises:
        PeerUnavailable: it does not answer, or not for now.
        Refused: it answers no such questions of ours.
    """
    client = _client(settings, destination)
    found = set()
    for entry in objects:
        header = pydicom.dcmread(entry.path, specific_tags=["StudyInstanceUID", "SeriesInstanceUID"])
        uid = entry.sop_instance_uid
        if client.has_instance(str(header.StudyInstanceUID), str(header.SeriesInstanceUID), uid):
            found.add(uid)
    return frozenset(found)


def _client(settings: Settings, destination: DestinationSettings) -> DicomwebClient:
    return DicomwebClient(
        destination,
        connect_timeout_seconds=settings.deliverer.connect_timeout_seconds,
        answer_timeout_seconds=settings.deliverer.dimse_timeout_seconds,
    )
