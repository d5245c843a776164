"""Does a peer have an object: C-FIND of the Study Root model at image level (PS3.4 C.6.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pydicom
from pydicom.dataset import Dataset
from pynetdicom import build_context
from pynetdicom.association import Association

from osteo_daemon.dicom.peer import association
from osteo_daemon.dicom.storage_scu import SpooledObject
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import PeerBusy, Refused

_STUDY_ROOT_FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
_SUCCESS: Final = 0x0000
_PENDING: Final = frozenset({0xFF00, 0xFF01})  # with a match; 01: an optional key is not supported (PS3.4 C.4.1.1.4)
_OUT_OF_RESOURCES: Final = range(0xA700, 0xA800)


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
        [build_context(_STUDY_ROOT_FIND)],
        connect_timeout_seconds=connect_timeout_seconds,
        dimse_timeout_seconds=dimse_timeout_seconds,
    ) as link:
        for number, entry in enumerate(objects, start=1):
            if _ask(link, _keys(entry), number, peer.ae_title):
                found.add(entry.sop_instance_uid)
    return frozenset(found)


def _keys(entry: SpooledObject) -> Dataset:
    # all unique keys: only so may a peer answer at image level without relational queries (PS3.4 C.4.1.2.1)
    header = pydicom.dcmread(entry.path, specific_tags=["StudyInstanceUID", "SeriesInstanceUID"])
    keys = Dataset()
    keys.QueryRetrieveLevel = "IMAGE"
    keys.StudyInstanceUID = header.StudyInstanceUID
    keys.SeriesInstanceUID = header.SeriesInstanceUID
    keys.SOPInstanceUID = entry.sop_instance_uid
    return keys


def _ask(link: Association, keys: Dataset, message_id: int, peer: str) -> bool:
    if not link.is_established:
        raise PeerBusy(f"{peer} ended the association")
    found = False
    for answer, match in link.send_c_find(keys, _STUDY_ROOT_FIND, msg_id=message_id):
        status = answer.get("Status")
        if status is None:
            raise PeerBusy(f"{peer} gave no answer to C-FIND in time")
        if status in _PENDING:
            # a peer that does not match on the key answers with whatever it has
            found = found or (match is not None and match.get("SOPInstanceUID") == keys.SOPInstanceUID)
        elif status in _OUT_OF_RESOURCES:
            raise PeerBusy(f"{peer} answered C-FIND with status 0x{status:04X}")
        elif status != _SUCCESS:
            raise Refused(f"{peer} answered C-FIND with status 0x{status:04X}")
    return found
