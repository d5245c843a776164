"""Questions to a peer about what it has: C-FIND of the Study Root model (PS3.4 C.6.2)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pydicom
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.association import Association
from pynetdicom.dsutils import encode

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.events import Peer
from osteo_daemon.dicom.peer import association
from osteo_daemon.dicom.storage_scu import SpooledObject
from osteo_daemon.domain.archive import FoundSeries, FoundStudies, FoundStudy, Span
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import PeerBusy, Refused

STUDY_ROOT_FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
_SUCCESS: Final = 0x0000
_CANCELLED: Final = 0xFE00  # by us, or by a peer that has more matches than it gives
_PENDING: Final = frozenset({0xFF00, 0xFF01})  # with a match; 01: an optional key is not supported (PS3.4 C.4.1.1.4)
_OUT_OF_RESOURCES: Final = range(0xA700, 0xA800)
_UID: Final = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a peer answered to one question.

    Attributes:
        matches: in their order.
        error: why these are not all that it has; None when they are.
    """

    matches: tuple[Dataset, ...]
    error: PeerBusy | Refused | None


def find_context() -> object:
    """The presentation context of these questions."""
    return build_context(STUDY_ROOT_FIND)


def find_instances(
    peer: RemoteAE,
    calling_ae_title: str,
    objects: Sequence[SpooledObject],
    *,
    connect_timeout_seconds: float,
    dimse_timeout_seconds: float,
) -> frozenset[str]:
    """SOP Instance UIDs, of those asked for, that a peer says it has; one question for each, over one association.

    Raises:
        PeerUnavailable: no association for now.
        PeerBusy: it answers, and not this question for now.
        Refused: it answers no such questions of ours.
    """
    found: set[str] = set()
    with association(
        peer,
        calling_ae_title,
        [build_context(STUDY_ROOT_FIND)],
        connect_timeout_seconds=connect_timeout_seconds,
        dimse_timeout_seconds=dimse_timeout_seconds,
    ) as link:
        for number, entry in enumerate(objects, start=1):
            keys = _keys(entry)
            answers = ask(link, keys, number, peer.ae_title)
            if answers.error is not None:
                raise answers.error
            # a peer that does not match on the key answers with whatever it has
            if any(match.get("SOPInstanceUID") == keys.SOPInstanceUID for match in answers.matches):
                found.add(entry.sop_instance_uid)
    return frozenset(found)


class Catalogue:
    """What an archive has, asked over one association.

    Args:
        link: an association with `find_context` accepted.
        peer: how errors name the archive.
    """

    def __init__(self, link: Association, peer: str) -> None:
        self._link = link
        self._peer = peer
        self._asked = 0

    @property
    def names_patients(self) -> bool:
        """A patient may be named in a question."""
        return True

    def studies(
        self, span: Span | None, modality: str, maximum: int, *, patient_id: str = "", accession_number: str = ""
    ) -> FoundStudies:
        """Studies of a span (or of any date) with a series of this modality; no more than ``maximum``.

        A peer that ignores a key answers with more than was asked for: whoever names a patient compares.

        Raises:
            PeerBusy: it gives no answer.
        """
        keys = Dataset()
        keys.QueryRetrieveLevel = "STUDY"
        if not (patient_id + accession_number).isascii():
            keys.SpecificCharacterSet = "ISO_IR 192"
        keys.StudyInstanceUID = ""
        keys.StudyDate = "" if span is None else span.dates
        keys.StudyTime = "" if span is None else span.times
        keys.PatientID = patient_id
        keys.AccessionNumber = accession_number
        keys.ModalitiesInStudy = modality
        keys.StudyDescription = ""
        keys.NumberOfStudyRelatedInstances = None
        answers = self._ask(keys, maximum)
        return FoundStudies(tuple(study for match in answers.matches if (study := _study(match))), answers.error)

    def series(self, study_instance_uid: str) -> tuple[FoundSeries, ...]:
        """Every series of a study.

        Raises:
            PeerBusy: it gives no answer, or not all, for now.
            Refused: it answers no such questions.
        """
        keys = Dataset()
        keys.QueryRetrieveLevel = "SERIES"
        keys.StudyInstanceUID = study_instance_uid
        keys.SeriesInstanceUID = ""
        keys.Modality = ""
        keys.BodyPartExamined = ""
        keys.NumberOfSeriesRelatedInstances = None
        answers = self._ask(keys)
        if answers.error is not None:
            raise answers.error
        return tuple(
            FoundSeries(
                uid,
                modality=_text(match, "Modality"),
                body_part=_text(match, "BodyPartExamined"),
                instances=_count(match, "NumberOfSeriesRelatedInstances"),
            )
            for match in answers.matches
            if _UID.fullmatch(uid := _text(match, "SeriesInstanceUID"))
        )

    def images(self, study_instance_uid: str, series_instance_uid: str) -> Mapping[str, str] | None:
        """SOP Instance UIDs of a series with their SOP classes (empty where the archive doesn't tell).

        Returns:
            None where the archive does not tell all of them.

        Raises:
            PeerBusy: it gives no answer.
        """
        keys = Dataset()
        keys.QueryRetrieveLevel = "IMAGE"
        keys.StudyInstanceUID = study_instance_uid
        keys.SeriesInstanceUID = series_instance_uid
        keys.SOPInstanceUID = ""
        keys.SOPClassUID = ""
        answers = self._ask(keys)
        if answers.error is not None:
            return None
        return {
            uid: _text(match, "SOPClassUID")
            for match in answers.matches
            if _UID.fullmatch(uid := _text(match, "SOPInstanceUID"))
        }

    def _ask(self, keys: Dataset, maximum: int | None = None) -> Answers:
        self._asked += 1
        return ask(self._link, keys, self._asked, self._peer, maximum)


def ask(link: Association, keys: Dataset, message_id: int, peer: str, maximum: int | None = None) -> Answers:
    """One C-FIND to its end; from ``maximum`` matches on it is cancelled.

    Raises:
        PeerBusy: no answer, or not to its end.
    """
    if not link.is_established:
        raise PeerBusy(f"{peer} ended the association")
    _tell(link, keys)
    matches: list[Dataset] = []
    error: PeerBusy | Refused | None = None
    for answer, match in link.send_c_find(keys, STUDY_ROOT_FIND, msg_id=message_id):
        status = answer.get("Status")
        if status is None:
            raise PeerBusy(f"{peer} gave no answer to C-FIND in time")
        text = f"{peer} answered C-FIND with status 0x{status:04X}"
        if status in _PENDING:
            if match is None or error is not None:
                continue
            matches.append(match)
            if len(matches) == maximum:
                error = PeerBusy(f"{peer} has {maximum} matches or more")
                link.send_c_cancel(message_id, query_model=STUDY_ROOT_FIND)
        elif status in _OUT_OF_RESOURCES or status == _CANCELLED:
            error = error or PeerBusy(text)
        elif status != _SUCCESS:
            error = error or Refused(text)
    return Answers(tuple(matches), error)


def _tell(link: Association, keys: Dataset) -> None:
    if not trail.is_open():
        return
    encoded = encode(keys, is_implicit_vr=True, is_little_endian=True) or b""
    asked = Peer(link.acceptor.ae_title.strip(), link.acceptor.address or "")
    trail.record(events.queried(STUDY_ROOT_FIND, encoded, ImplicitVRLittleEndian, trail.node(), asked))


def _keys(entry: SpooledObject) -> Dataset:
    # all unique keys: only so may a peer answer at image level without relational queries (PS3.4 C.4.1.2.1)
    header = pydicom.dcmread(entry.path, specific_tags=["StudyInstanceUID", "SeriesInstanceUID"])
    keys = Dataset()
    keys.QueryRetrieveLevel = "IMAGE"
    keys.StudyInstanceUID = header.StudyInstanceUID
    keys.SeriesInstanceUID = header.SeriesInstanceUID
    keys.SOPInstanceUID = entry.sop_instance_uid
    return keys


def _study(match: Dataset) -> FoundStudy | None:
    uid = _text(match, "StudyInstanceUID")
    if not _UID.fullmatch(uid):
        return None
    modalities = match.get("ModalitiesInStudy")
    return FoundStudy(
        uid,
        study_date=_text(match, "StudyDate"),
        modalities=_texts(modalities if isinstance(modalities, MultiValue) else (modalities or "",)),
        description=_text(match, "StudyDescription"),
        instances=_count(match, "NumberOfStudyRelatedInstances"),
        patient_id=_text(match, "PatientID"),
        accession_number=_text(match, "AccessionNumber"),
    )


def _texts(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(text for value in values if (text := str(value).strip()))


def _text(match: Dataset, keyword: str) -> str:
    return str(match.get(keyword) or "").strip()


def _count(match: Dataset, keyword: str) -> int | None:
    text = _text(match, keyword)
    return int(text) if text.isdecimal() else None
