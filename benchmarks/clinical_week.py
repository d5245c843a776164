"""The stream of a week: when studies, late slices and duplicates come, and a sender that keeps to it."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage  # type: ignore[attr-defined]

from tests.fakes import CALLED, CALLING, LOOPBACK

STUDIES_A_DAY = 400
SLICES = 3
LATE_SHARE, DUPLICATE_SHARE = 0.05, 0.05
BURSTS_A_DAY, BURST_STUDIES = 3, 12
HOURS = (1, 1, 1, 1, 1, 2, 4, 8, 11, 12, 12, 11, 9, 11, 12, 11, 9, 7, 5, 4, 3, 3, 2, 1)
"""Weight of each hour of a working day."""

WEEKEND_SHARE = 0.4
DAY_SECONDS = 86400.0


@dataclass(frozen=True, order=True)
class Arrival:
    """Something that comes over the network; ``at`` in simulated seconds, ``what``: study, late or duplicate."""

    at: float
    study: int
    what: str


def arrivals(days: float, seed: int) -> list[Arrival]:
    """The stream of one seed, in order of time."""
    rng = random.Random(seed)
    moments: list[float] = []
    total = sum(HOURS)
    for hour in range(math.ceil(days * 24)):
        weekday = (hour // 24) % 7 < 5
        scale = 7 / (5 + 2 * WEEKEND_SHARE) * (1.0 if weekday else WEEKEND_SHARE)
        burst_share = BURSTS_A_DAY * BURST_STUDIES / STUDIES_A_DAY
        expected = STUDIES_A_DAY * (1 - burst_share) * scale * HOURS[hour % 24] / total
        moments += [(hour + rng.random()) * 3600 for _ in range(_poisson(rng, expected))]
    for _ in range(max(1, round(days * BURSTS_A_DAY))):
        start = rng.random() * days * DAY_SECONDS
        moments += [start + 20 * position for position in range(BURST_STUDIES)]  # an archive that routes its backlog
    stream: list[Arrival] = []
    for study, at in enumerate(sorted(moment for moment in moments if moment < days * DAY_SECONDS)):
        stream.append(Arrival(at, study, "study"))
        if rng.random() < LATE_SHARE:
            stream.append(Arrival(at + rng.uniform(300, 1800), study, "late"))
        if rng.random() < DUPLICATE_SHARE:
            stream.append(Arrival(at + rng.uniform(60, 7200), study, "duplicate"))
    return sorted(stream)


def _poisson(rng: random.Random, expected: float) -> int:
    limit, count, product = math.exp(-expected), 0, rng.random()
    while product > limit:
        count, product = count + 1, product * rng.random()
    return count


class Sender(threading.Thread):
    """Sends each arrival at its compressed time; an association each, sent again until it is acknowledged."""

    def __init__(self, stream: Sequence[Arrival], port: int, compression: float, template: Sequence[Path]) -> None:
        super().__init__(name="sender", daemon=True)
        self._stream, self._port, self._compression = stream, port, compression
        self._slices = [pydicom.dcmread(path) for path in template]
        self.acknowledged = 0
        self.behind_s = 0.0
        self._late = {arrival.study for arrival in stream if arrival.what == "late"}
        self._entity = AE(ae_title=CALLING)
        self._entity.add_requested_context(CTImageStorage)

    def run(self) -> None:
        start = time.monotonic()
        for arrival in self._stream:
            due = start + arrival.at / self._compression
            time.sleep(max(due - time.monotonic(), 0.0))
            self.behind_s = max(self.behind_s, time.monotonic() - due)
            positions = list(range(SLICES))
            if arrival.study in self._late:
                positions = positions[-1:] if arrival.what == "late" else positions[:-1]
            while positions:
                self._send(arrival.study, positions)

    def _send(self, study: int, positions: list[int]) -> None:
        association = self._entity.associate(LOOPBACK, self._port, ae_title=CALLED)
        if not association.is_established:
            time.sleep(0.1)
            return
        for position in list(positions):
            dataset = self._slices[position]
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"2.25.{10**20 + study}", f"2.25.{10**21 + study}"
            uid = f"2.25.{10**22 + study * SLICES + position}"
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
            try:
                answer = association.send_c_store(dataset)
            except RuntimeError:
                break
            if "Status" not in answer or answer.Status != 0x0000:
                break
            self.acknowledged += 1
            positions.remove(position)
        if association.is_established:
            association.release()
