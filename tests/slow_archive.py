"""An archive that tests hold up, count and cancel: pynetdicom's C-FIND and C-GET on loopback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, evt

from tests.fakes import LOOPBACK, write_ct

FIND = "1.2.840.10008.5.1.4.1.2.2.1"
GET = "1.2.840.10008.5.1.4.1.2.2.3"
CT = "1.2.840.10008.5.1.4.1.1.2"
_ANSWERED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality", "PatientID")


@dataclass
class SlowArchive:
    """An archive on loopback that counts what it sends, and waits before each object when told to.

    Attributes:
        sent: how often each SOP Instance UID was sent and acknowledged.
        asked: identifiers of C-GET requests: level, and how many SOP Instance UIDs they named.
        cancelled: C-GET requests that ended by C-CANCEL.
        dates: keys of the questions.
        patients: likewise; they choose nothing: such archives exist.
        gate: called before each object is sent with what asks, once, whether a C-CANCEL has come; gives its answer.
    """

    studies: dict[str, list[Dataset]]
    sent: Counter[str] = field(default_factory=Counter)
    asked: list[tuple[str, int]] = field(default_factory=list)
    cancelled: int = 0
    dates: list[str] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    gate: Callable[[Callable[[], bool]], bool] = lambda cancelled: cancelled()
    port: int = 0
    _server: Any = None

    def __enter__(self) -> SlowArchive:
        entity = AE(ae_title="SLOW")
        entity.add_supported_context(FIND)
        entity.add_supported_context(GET)
        entity.supported_contexts = [*entity.supported_contexts, build_context(CT)]
        for context in entity.supported_contexts:
            if context.abstract_syntax == CT:
                context.scu_role, context.scp_role = False, True
        handlers = [(evt.EVT_C_FIND, self._find), (evt.EVT_C_GET, self._get)]
        self._server = entity.start_server((LOOPBACK, 0), block=False, evt_handlers=handlers)
        self.port = self._server.server_address[1]
        return self

    def __exit__(self, *_reason: object) -> None:
        self._server.shutdown()

    @property
    def images(self) -> set[str]:
        """Every SOP Instance UID."""
        return {str(image.SOPInstanceUID) for images in self.studies.values() for image in images}

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset]]:
        keys = event.identifier
        self.dates.append(str(keys.get("StudyDate", "")))
        self.patients.append(str(keys.get("PatientID", "")))
        for uid, images in self.studies.items():
            if keys.QueryRetrieveLevel != "STUDY" and uid != keys.StudyInstanceUID:
                continue
            for image in images if keys.QueryRetrieveLevel == "IMAGE" else images[:1]:
                answer = Dataset()
                answer.QueryRetrieveLevel = keys.QueryRetrieveLevel
                for keyword in _ANSWERED:
                    if keyword in keys:
                        setattr(answer, keyword, image.get(keyword))
                yield 0xFF00, answer

    def _get(self, event: Any) -> Iterator[Any]:
        keys = event.identifier
        wanted = keys.get("SOPInstanceUID")
        named = [wanted] if isinstance(wanted, str) else list(wanted or ())
        self.asked.append((keys.QueryRetrieveLevel, len(named)))
        images = [image for image in self.studies[keys.StudyInstanceUID] if not named or image.SOPInstanceUID in named]
        yield len(images)
        for image in images:
            if self.gate(lambda: event.is_cancelled):
                self.cancelled += 1
                yield 0xFE00, None
                return
            self.sent[str(image.SOPInstanceUID)] += 1
            yield 0xFF00, image

    def text(self) -> str:
        """An entry of [[archives]]."""
        return f'''[[archives]]
name = "slow"
retrieve = "c-get"
ae_title = "SLOW"
host = "{LOOPBACK}"
port = {self.port}
'''


@contextmanager
def running_slow_archive(folder: Path) -> Iterator[SlowArchive]:
    """Three studies of six slices, of patients P0, P1 and P2."""
    series = [
        [dcmread(path) for path in write_ct(folder / str(n), count=6, seed=n, PatientID=f"P{n}")] for n in range(3)
    ]
    with SlowArchive({str(images[0].StudyInstanceUID): images for images in series}) as running:
        yield running
