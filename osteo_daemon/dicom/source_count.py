"""How many images of a study its source has: C-FIND at series level, else at study level (PS3.4 C.6.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pynetdicom import build_context

from osteo_daemon.dicom.peer import association
from osteo_daemon.dicom.query import STUDY_ROOT_FIND, Catalogue, ask
from osteo_daemon.domain.completeness import Count
from osteo_daemon.domain.study import RemoteAE

_MESSAGE_ID = 9  # another than those of `Catalogue`, which count from 1 and ask once here


@dataclass(frozen=True, slots=True)
class SourceCount:
    """What a source counts; None where it does not tell.

    Attributes:
        series: Number of Series Related Instances (0020,1209) of each CT series.
        study: Number of Study Related Instances (0020,1208), of every class.
    """

    series: Mapping[str, int | None]
    study: int | None

    def beside(self, here: Mapping[str, int], all_here: int) -> Count | None:
        """Compare with what is here; None where that proves nothing.

        Args:
            here: images by Series Instance UID.
            all_here: objects of every class.
        """
        counted = {uid: count for uid, count in self.series.items() if count is not None}
        if here and here.keys() <= counted.keys():
            missing = sum(max(counted[uid] - count, 0) for uid, count in here.items())
            text = f"{sum(here.values())} images of {len(here)} series are here"
            # perhaps the other series are not sent here, perhaps they come yet
            absent = sum(count != 0 for uid, count in self.series.items() if uid not in here)
            return Count(missing, text, absent)
        if self.series or self.study is None:
            return None
        return Count(max(self.study - all_here, 0), f"{all_here} objects are here")


def count_at_source(
    peer: RemoteAE, calling_ae_title: str, study_instance_uid: str, *, timeout_seconds: float
) -> SourceCount:
    """Ask.

    Raises:
        PeerUnavailable: no association for now.
        PeerBusy: it gives no answer for now.
        Refused: it answers no such questions of ours.
    """
    with association(
        peer,
        calling_ae_title,
        [build_context(STUDY_ROOT_FIND)],
        connect_timeout_seconds=timeout_seconds,
        dimse_timeout_seconds=timeout_seconds,
    ) as link:
        found = Catalogue(link, peer.ae_title).series(study_instance_uid)
        series = {entry.series_instance_uid: entry.instances for entry in found if entry.modality in ("CT", "")}
        if series and None not in series.values():
            return SourceCount(series, None)
        keys = Dataset()
        keys.QueryRetrieveLevel = "STUDY"
        keys.StudyInstanceUID = study_instance_uid
        keys.NumberOfStudyRelatedInstances = None
        answers = ask(link, keys, _MESSAGE_ID, peer.ae_title)
        if answers.error is not None:
            raise answers.error
        for match in answers.matches:
            if match.get("StudyInstanceUID") == study_instance_uid and match.get("NumberOfStudyRelatedInstances"):
                return SourceCount({}, int(match.NumberOfStudyRelatedInstances))
    return SourceCount(series, None)
