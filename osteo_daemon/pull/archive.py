"""An archive to fetch from, whichever way it speaks: a catalogue to ask, and a retrieval into the durable intake."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from osteo_daemon.dicom.contexts import ACCOMPANYING, SCREENED_CLASSES
from osteo_daemon.dicom.peer import association
from osteo_daemon.dicom.query import Catalogue, find_context
from osteo_daemon.dicom.received import received_file
from osteo_daemon.dicom.retrieve import Retrieval
from osteo_daemon.dicomweb.client import DicomwebClient
from osteo_daemon.domain.archive import FoundSeries, FoundStudies, Retrieved, Span, Target
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import ConfigurationError, Damaged, Transient
from osteo_daemon.intake import DurableIntake
from osteo_daemon.settings import AccompanyingSettings, ArchiveSettings, Settings
from osteo_daemon.tls import peer_tls

Progress = Callable[[int], None]
"""Called with how many objects of the study in hand came so far."""


class ArchiveCatalogue(Protocol):
    """What an archive has."""

    @property
    def names_patients(self) -> bool:
        """Whether a patient may be named in a question: not where it would stand in a URL."""

    def studies(
        self, span: Span | None, modality: str, maximum: int, *, patient_id: str = "", accession_number: str = ""
    ) -> FoundStudies:
        """Studies with a series of this modality; those of a span, of a patient or of an order."""

    def series(self, study_instance_uid: str) -> tuple[FoundSeries, ...]:
        """Every series of a study."""

    def images(self, study_instance_uid: str, series_instance_uid: str) -> Mapping[str, str] | None:
        """SOP Instance UIDs of a series with their classes; None where the archive does not tell all."""


class Archive(Protocol):
    """One archive; used by one thread at a time.

    Every method raises `PeerUnavailable` when it cannot be reached or asks to wait, and `Refused` when it says no.
    """

    def catalogue(self) -> AbstractContextManager[ArchiveCatalogue]:
        """Questions over one connection."""

    def fetch(self, targets: Sequence[Target], intake: DurableIntake, progress: Progress) -> Retrieved:
        """Have the targets stored here, by ``intake`` where they do not come to the receiver."""


class DicomArchive:
    """C-FIND with C-MOVE to our own receiver, or with C-GET."""

    def __init__(self, settings: Settings, archive: ArchiveSettings, stopping: threading.Event) -> None:
        titles = {source.ae_title for source in settings.sources}
        if archive.retrieve == "c-move" and archive.ae_title not in titles:
            raise ConfigurationError(
                f"archive {archive.name}: {archive.ae_title} is not among [[sources]], so that what it moves here "
                "would be refused; add it with its address"
            )
        security = peer_tls(settings.tls, archive)
        self._peer = RemoteAE(archive.ae_title, archive.host, archive.port, security)
        self._calling = settings.receiver.ae_title
        self._gets = archive.retrieve == "c-get"
        self._pull = settings.pull
        self._retrieval = Retrieval(
            self._peer,
            self._calling,
            settings.pull.connect_timeout_seconds,
            settings.pull.answer_timeout_seconds,
            stopping,
        )

    @contextmanager
    def catalogue(self) -> Iterator[ArchiveCatalogue]:
        """As `Archive.catalogue`."""
        with association(
            self._peer,
            self._calling,
            [find_context()],
            connect_timeout_seconds=self._pull.connect_timeout_seconds,
            dimse_timeout_seconds=self._pull.answer_timeout_seconds,
        ) as link:
            yield Catalogue(link, self._peer.ae_title)

    def fetch(self, targets: Sequence[Target], intake: DurableIntake, progress: Progress) -> Retrieved:
        """As `Archive.fetch`."""
        if not self._gets:
            return self._retrieval.move(targets, progress)
        association_id = uuid.uuid4().hex
        try:
            return self._retrieval.get(targets, intake.accept, association_id, progress)
        finally:
            intake.association_closed(association_id)


class WebArchive:
    """QIDO-RS and WADO-RS."""

    def __init__(self, settings: Settings, archive: ArchiveSettings, stopping: threading.Event) -> None:
        self._source = archive.ae_title or archive.name[:16].upper()
        self._client = DicomwebClient(
            archive,
            connect_timeout_seconds=settings.pull.connect_timeout_seconds,
            answer_timeout_seconds=settings.pull.answer_timeout_seconds,
        )
        self._stopping = stopping
        self._longest_part = settings.dicomweb.maximum_part_bytes

    @contextmanager
    def catalogue(self) -> Iterator[ArchiveCatalogue]:
        """As `Archive.catalogue`."""
        yield self._client

    def fetch(self, targets: Sequence[Target], intake: DurableIntake, progress: Progress) -> Retrieved:
        """As `Archive.fetch`."""
        association_id = uuid.uuid4().hex
        refused: dict[str, str] = {}
        count = 0
        try:
            for target in targets:
                for part in self._client.retrieve(target, self._longest_part, self._stopping):
                    uid = f"object {count}"
                    count += 1
                    try:
                        received = received_file(
                            part,
                            source_ae=self._source,
                            address=self._client.host,
                            association_id=association_id,
                            fetched=True,
                        )
                        uid = received.identifiers.sop_instance_uid
                        intake.accept(received)
                    except Damaged as error:
                        refused[uid] = str(error)
                    except OSError as error:
                        raise Transient(f"the spool failed: {error.strerror}") from error
                    progress(count)
        finally:
            intake.association_closed(association_id)
        return Retrieved(refused=refused)


def taken_classes(settings: AccompanyingSettings) -> frozenset[str]:
    """SOP classes that this node keeps."""
    kept = (uids for group, uids in ACCOMPANYING.items() if getattr(settings, group.value) == "keep")
    return frozenset((*SCREENED_CLASSES, *(uid for uids in kept for uid in uids)))


def open_archive(settings: Settings, archive: ArchiveSettings, stopping: threading.Event) -> Archive:
    """The archive of an entry of [[archives]].

    Raises:
        ConfigurationError: it could not send to us.
    """
    kind = WebArchive if archive.retrieve == "dicomweb" else DicomArchive
    return kind(settings, archive, stopping)
