"""Arrivals of any order and rhythm, any announcements: no study waits for ever, none starts while it lacks something.

The sweep, its store and its headers are the real ones; only the clock is made.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from osteo_daemon.completeness import CompletenessSweep
from osteo_daemon.domain.announcement import AnnouncedInstance, Announcement, AnnouncementKind, StepState
from osteo_daemon.domain.completeness import OPEN_ASSOCIATION_FACTOR
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import CompletenessSettings, Settings
from tests.ct_series import column, write_slices
from tests.stores import new_sqlite

CT, EXPLICIT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"
START = datetime(2026, 1, 2, 3, tzinfo=UTC)
SLICES = 12
LIMITS = CompletenessSettings(
    quiet_seconds=60,
    quiet_minimum_seconds=20,
    quiet_maximum_seconds=100,
    early_quiet_seconds=10,
    missing_wait_seconds=300,
)
SWEEP_SECONDS = 19.0
LONGEST_SECONDS = max(LIMITS.quiet_maximum_seconds * OPEN_ASSOCIATION_FACTOR, LIMITS.missing_wait_seconds)
RHYTHMS = {"unknown": 0.0, "quick": 0.5, "slow": 45.0}
STEPS_MM = (3.0, 24.0)  # too short for a lumbar spine, and long enough


@dataclass(frozen=True)
class Sending:
    """One study: slice numbers in the order of sending, the pause before each, and what else is said and when.

    Attributes:
        step_after: a procedure step begins before this many-th slice; None: there is none.
        ended_after: from the last slice to the end of the step; None: it never ends.
        listed: the step lists the slices 1 to this at its end.
        association: closed at the end, open for ever, or one for each slice.
    """

    order: tuple[int, ...]
    pauses: tuple[float, ...]
    step_after: int | None
    ended_after: float | None
    listed: int
    association: str
    rhythm: str
    step_mm: float


_NUMBERS = st.lists(st.integers(1, SLICES), min_size=1, max_size=SLICES, unique=True)
_SENDINGS = st.builds(
    Sending,
    st.one_of(_NUMBERS, _NUMBERS.map(sorted), st.integers(1, SLICES).map(lambda n: [*range(1, n + 1)])).map(tuple),
    st.tuples(*[st.sampled_from([0.0, 0.4, 3.0, 15.0, 40.0, 110.0])] * SLICES),
    st.none() | st.integers(0, SLICES - 1),
    st.none() | st.sampled_from([0.0, 12.0, 100.0]),
    st.integers(0, SLICES),
    st.sampled_from(["closed", "open", "single"]),
    st.sampled_from(sorted(RHYTHMS)),
    st.sampled_from(STEPS_MM),
)


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> dict[float, list[Path]]:
    """Headers of even stacks by spacing; entry n - 1 is that of instance number n."""
    voxels = np.zeros((SLICES, 2, 2), int)
    folder = tmp_path_factory.mktemp("headers")
    return {step: write_slices(folder / f"{step}", voxels, column(SLICES, step)) for step in STEPS_MM}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a store that knows the source by so many studies of one rhythm."""
    folders = {}
    for name, gap in RHYTHMS.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        store = new_sqlite(folder)
        for number in range(10 if gap else 0):
            record(store, f"8.{number}", f"8.{number}.1", Path("/none"), START)
            (study,) = store.receiving_studies(0, now=START)
            store.complete_study(study, event="study_complete", reason="test", gap_seconds=gap, now=START)
        store.close()
    return folders


def record(store: JobStore, study: str, uid: str, path: Path, now: datetime, association: str | None = None) -> None:
    instance = SopInstance(study, f"{study}.7", CT, uid, EXPLICIT, path, 1, "0" * 64)
    store.record_instance(instance, "CT1", association_id=association, now=now)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sending=_SENDINGS)
def test_no_study_waits_for_ever_and_none_starts_while_it_lacks_something(
    sending: Sending, stacks: dict[float, list[Path]], stores: dict[str, Path]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(stores[sending.rhythm], folder, dirs_exist_ok=True)
        store = JobStore(f"sqlite:///{folder}/jobs.sqlite")
        try:
            _Simulation(store, sending, stacks[sending.step_mm]).run()
        finally:
            store.close()


class _Simulation:
    def __init__(self, store: JobStore, sending: Sending, paths: list[Path]) -> None:
        self.store, self.sending, self.paths = store, sending, paths
        self.now = START
        self.sweep = CompletenessSweep(Settings(completeness=LIMITS), store, clock=lambda: self.now)
        self.here: set[int] = set()
        self.last = START
        self.step = ""
        self.starts = 0

    def run(self) -> None:
        arrivals = list(itertools.accumulate(self.sending.pauses[: len(self.sending.order)]))
        events = [(when, 1, number) for when, number in zip(arrivals, self.sending.order, strict=True)]
        if self.sending.step_after is not None:
            events.append((arrivals[min(self.sending.step_after, len(arrivals) - 1)], 0, 0))
            if self.sending.ended_after is not None:
                events.append((arrivals[-1] + self.sending.ended_after, 2, 0))
        if self.sending.association == "closed":
            events.append((arrivals[-1], 3, 0))
        end = arrivals[-1] + LONGEST_SECONDS + 3 * SWEEP_SECONDS
        events += [(SWEEP_SECONDS * number, 4, 0) for number in range(int(end / SWEEP_SECONDS) + 1)]
        for when, kind, number in sorted(events):
            self.now = START + timedelta(seconds=when)
            (self._begin, lambda n=number: self._arrive(n), self._finish, self._close, self._sweep)[kind]()
        job = self.store.job("7")
        assert job is not None
        assert job.state is JobState.READY
        assert job.revision == self.starts  # every further start is a revision of its own

    def _begin(self) -> None:
        step = Announcement("9", AnnouncementKind.MPPS, "CT1", StepState.IN_PROGRESS, frozenset({"7"}), ())
        self.store.announce(step, now=self.now)
        self.step = "in progress"

    def _arrive(self, number: int) -> None:
        association = None if self.sending.association == "single" else "a"
        record(self.store, "7", f"7.7.{number}", self.paths[number - 1], self.now, association)
        self.here.add(number)
        self.last = self.now

    def _finish(self) -> None:
        listed = tuple(AnnouncedInstance("7.7", CT, f"7.7.{n}") for n in range(1, self.sending.listed + 1))
        self.store.amend_announcement("9", "CT1", StepState.COMPLETED, listed, now=self.now)
        self.step = "ended"

    def _close(self) -> None:
        self.store.association_closed("a")

    def _sweep(self) -> None:
        for completed in self.sweep.run():
            self.starts += 1
            quiet = (self.now - self.last).total_seconds()
            listed = set(range(1, self.sending.listed + 1)) if self.step == "ended" else set()
            event(completed.verdict.outcome.value)
            assert completed.verdict.reason
            if self.step == "in progress" or listed - self.here or _has_hole(self.here):
                assert quiet >= LIMITS.missing_wait_seconds, completed.verdict
            elif listed != self.here:
                assert quiet >= LIMITS.early_quiet_seconds, completed.verdict


def _has_hole(numbers: set[int]) -> bool:
    """Numbers and places are missing between others, and neighbours show the spacing."""
    ordered = sorted(numbers)
    steps = [after - before for before, after in itertools.pairwise(ordered)]
    return len(ordered) >= 5 and min(steps) == 1 < max(steps)
