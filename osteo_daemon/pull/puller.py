"""One pull from its search to its last study; killed at any moment it goes on where it was.

What is stored here decides what is fetched and whether it came, not what the archive says of its own doing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from osteo_daemon.delivery.back_off import back_off_seconds
from osteo_daemon.domain.archive import Target
from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import ConfigurationError, IllegalTransition, LeaseLost, PeerBusy, Refused, Transient
from osteo_daemon.intake import DurableIntake
from osteo_daemon.jobs.pull_rows import PulledState, PullState
from osteo_daemon.jobs.pulls import OPEN_PULLS
from osteo_daemon.jobs.room import Room
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.lease import Heartbeat
from osteo_daemon.log import get_logger
from osteo_daemon.pull.archive import Archive
from osteo_daemon.pull.criteria import Criteria
from osteo_daemon.pull.pace import Hours, Rate
from osteo_daemon.pull.plan import Outcome, judge, plan_series
from osteo_daemon.pull.search import Identities, search
from osteo_daemon.settings import PullSettings

_LEASE_SECONDS = 15.0
_POLL_SECONDS = 2.0
_FOUND_PER_COMMIT = 500
_REFUSALS_IN_A_ROW = 3
"""So many studies in a row that an archive refuses are not the studies' fault."""

_WAITING_STATES = (JobState.RECEIVING, JobState.READY, JobState.SCREENING)


@dataclass(frozen=True, slots=True)
class Report:
    """What the person at the terminal is told.

    Attributes:
        waits: why nothing is fetched at the moment; empty while something is.
        instances: objects of the study in hand that came so far.
    """

    counts: Mapping[PulledState, int]
    waits: str = ""
    instances: int = 0


class Puller:
    """Runs one pull.

    Args:
        settings: patience and pace.
        store: of the node.
        room: on the disk: nothing is fetched that would have to be refused.
        archive: to fetch from.
        intake: takes what does not come to the receiver.
        maximum_matches: a question with so many answers is split.
        taken_classes: SOP classes that this node keeps.
        stopping: set by a signal: the study in hand is cancelled, nothing is lost.
        tell: called whenever there is something new to show.
    """

    def __init__(
        self,
        settings: PullSettings,
        store: JobStore,
        room: Room,
        archive: Archive,
        intake: DurableIntake,
        maximum_matches: int,
        taken_classes: frozenset[str],
        stopping: threading.Event,
        tell: Callable[[Report], None] = lambda _report: None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._room = room
        self._archive = archive
        self._intake = intake
        self._maximum_matches = maximum_matches
        self._taken_classes = taken_classes
        self._stopping = stopping
        self._tell = tell
        self._hours = Hours.parse(settings.between)
        self._rate = Rate(settings.studies_per_hour)
        self._holder = f"pull-{socket.gethostname()}-{os.getpid()}"
        self._unavailable = self._refused = 0
        self._counts: dict[PulledState, int] = {}

    def run(self, pull_id: int, identities: Identities | None = None) -> PullState:
        """Search, then fetch until nothing more is wanted; returns where the pull stands then.

        Args:
            identities: the list, while the pull still searches with one.

        Raises:
            PeerUnavailable: the archive does not answer to the search.
            Refused: it answers no questions, or does not send to us.
            IllegalTransition: another process has this pull in hand.
        """
        name = f"pull-{pull_id}"
        if not self._store.lead(name, self._holder, _LEASE_SECONDS, is_gone=holder_is_gone):
            raise IllegalTransition(f"pull {pull_id}: another process has it in hand")
        try:
            with Heartbeat(lambda: self._renew(pull_id, name), _LEASE_SECONDS):
                if self._store.pull(pull_id).state is PullState.SEARCHING:
                    self._search(pull_id, identities)
                self._fetch_all(pull_id)
        finally:
            self._store.resign(name, self._holder)
        return self._store.pull(pull_id).state

    def _renew(self, pull_id: int, name: str) -> None:
        if not self._store.lead(name, self._holder, _LEASE_SECONDS) or (
            self._store.pull(pull_id).state not in OPEN_PULLS
        ):
            # cancelled by hand, or this process was stopped for so long that another took over
            self._stopping.set()
            raise LeaseLost(name)

    def _search(self, pull_id: int, identities: Identities | None) -> None:
        criteria = Criteria.of(self._store.pull(pull_id).criteria)
        waiting: list[str] = []
        count = new = 0
        with self._archive.catalogue() as catalogue:
            for study in search(
                catalogue,
                criteria.wanted,
                criteria.span,
                self._maximum_matches,
                identities=identities,
                stopping=self._stopping,
            ):
                waiting.append(study.study_instance_uid)
                count += 1
                # asked for so many again and again, so many more come each time
                here = self._store.study_here(study.study_instance_uid) if criteria.limit else None
                new += here is not None and not (here.stored or here.removed)
                if criteria.limit and new == criteria.limit:
                    break
                if len(waiting) == _FOUND_PER_COMMIT:
                    self._found(pull_id, waiting)
        self._found(pull_id, waiting)
        if not self._stopping.is_set():
            self._go_on(pull_id, PullState.FETCHING)
            get_logger().info("pull_searched", count=count)

    def _found(self, pull_id: int, waiting: list[str]) -> None:
        self._store.pull_found(pull_id, waiting)
        waiting.clear()
        self._show(pull_id)

    def _go_on(self, pull_id: int, state: PullState) -> None:
        try:
            self._store.change_pull(pull_id, state)
        except IllegalTransition:
            self._stopping.set()  # cancelled by hand a moment ago

    def _fetch_all(self, pull_id: int) -> None:
        criteria = Criteria.of(self._store.pull(pull_id).criteria)
        self._show(pull_id)
        while not self._stopping.is_set():
            study = self._store.next_wanted(pull_id)
            if study is None:
                soonest = self._store.next_wanted_at(pull_id)
                if soonest is None:
                    self._go_on(pull_id, PullState.DONE)
                    return
                self._pause((soonest - datetime.now(UTC)).total_seconds(), "studies that did not come wait")
                continue
            if self._must_wait():
                continue
            self._one(pull_id, study.study_instance_uid, criteria)
            self._show(pull_id)

    def _must_wait(self) -> bool:
        """Wait a while when it is not the time to fetch; False when it is."""
        if (seconds := self._hours.wait_seconds(datetime.now().astimezone())) > 0:
            return self._pause(seconds, f"outside {self._settings.between}")
        if (seconds := self._rate.wait_seconds(time.monotonic())) > 0:
            return self._pause(seconds, f"{self._settings.studies_per_hour} studies an hour")
        if self._room.is_low:
            return self._pause(_POLL_SECONDS, "little room is left on the disk")
        if self._settings.maximum_waiting:
            counts = self._store.counts_by_state()
            if sum(counts[state] for state in _WAITING_STATES) >= self._settings.maximum_waiting:
                return self._pause(_POLL_SECONDS, "enough studies wait to be screened")
        return False

    def _pause(self, seconds: float, why: str) -> bool:
        self._tell(Report(self._counts, waits=why))
        # short waits: a cancellation by hand, a changed clock
        self._stopping.wait(min(max(seconds, 0.05), 30.0))
        return True

    def _one(self, pull_id: int, study_instance_uid: str, criteria: Criteria) -> None:
        log = get_logger().bind(study_instance_uid=study_instance_uid)
        attempt = self._store.pull_attempted(pull_id, study_instance_uid)
        started = time.monotonic()
        try:
            outcome = self._study(study_instance_uid, criteria)
            self._unavailable = self._refused = 0
        except PeerBusy as error:
            if self._stopping.is_set():
                self._give_back(pull_id, study_instance_uid, None)
                return
            outcome = Outcome(PulledState.WANTED, detail=error.detail)
        except Transient as error:
            # the archive as a whole, or this node: not the study's fault
            self._give_back(pull_id, study_instance_uid, error.detail)
            self._unavailable += 1
            pause = self._back_off(self._unavailable)
            log.warning("archive_unavailable", detail=error.detail, wait_s=round(pause))
            self._wait_long(pause, error.detail)
            return
        except Refused as error:
            self._refused += 1
            if self._refused == _REFUSALS_IN_A_ROW:
                self._give_back(pull_id, study_instance_uid, error.detail)
                raise
            outcome = Outcome(PulledState.WANTED, detail=error.detail)
        except ConfigurationError as error:
            self._give_back(pull_id, study_instance_uid, error.detail)
            raise
        outcome = self._settle(pull_id, study_instance_uid, attempt, outcome)
        log.info(
            "study_pulled",
            outcome=outcome.state.value.lower(),
            instances=outcome.instances,
            attempt=attempt,
            detail=outcome.detail,
            duration_s=round(time.monotonic() - started, 3),
        )

    def _settle(self, pull_id: int, study_instance_uid: str, attempt: int, outcome: Outcome) -> Outcome:
        """Write what an attempt came to: what did not all come is tried again, or fails with its last attempt."""
        not_before = None
        if outcome.state is PulledState.WANTED:
            if attempt >= self._settings.maximum_attempts:
                outcome = replace(outcome, state=PulledState.FAILED, detail=f"{outcome.detail}; {attempt} attempts")
            else:
                not_before = datetime.now(UTC) + timedelta(seconds=self._back_off(attempt))
        self._store.pull_settled(
            pull_id,
            study_instance_uid,
            outcome.state,
            instances=outcome.instances,
            detail=outcome.detail,
            not_before=not_before,
        )
        return outcome

    def _give_back(self, pull_id: int, study_instance_uid: str, detail: str | None) -> None:
        self._store.pull_settled(pull_id, study_instance_uid, PulledState.WANTED, detail=detail, uncharged=True)

    def _back_off(self, failures: int) -> float:
        base, longest = self._settings.retry_base_seconds, self._settings.retry_maximum_seconds
        return back_off_seconds(base, failures, longest)

    def _wait_long(self, seconds: float, why: str) -> None:
        until = time.monotonic() + seconds
        while not self._stopping.is_set() and (remaining := until - time.monotonic()) > 0:
            self._pause(remaining, why)

    def _study(self, study_instance_uid: str, criteria: Criteria) -> Outcome:
        here = self._store.study_here(study_instance_uid)
        if here.removed and not criteria.again:
            return Outcome(PulledState.PRESENT, detail="screened before; its images were removed")
        with self._archive.catalogue() as catalogue:
            series = criteria.wanted.chosen(catalogue.series(study_instance_uid))
            planned = [
                plan_series(
                    entry,
                    catalogue.images(study_instance_uid, entry.series_instance_uid),
                    here,
                    self._taken_classes,
                )
                for entry in series
            ]
        if not series:
            return Outcome(PulledState.SKIPPED, detail="no series of those that are wanted")
        plan = [entry for entry in planned if entry is not None]
        if not plan:
            return Outcome(PulledState.PRESENT, detail="all is here")
        self._rate.begun(time.monotonic())
        targets = [Target(study_instance_uid, entry.series_instance_uid, entry.asked_for) for entry in plan]
        retrieved = self._archive.fetch(
            targets, self._intake, lambda instances: self._tell(Report(self._counts, instances=instances))
        )
        return judge(plan, retrieved, here, self._store.study_here(study_instance_uid))

    def _show(self, pull_id: int) -> None:
        self._counts = self._store.pull_counts(pull_id)
        self._tell(Report(self._counts))


def holder_is_gone(holder: str) -> bool:
    """True for a pull of this machine whose process has ended."""
    place, _, pid = holder.rpartition("-")
    if place != f"pull-{socket.gethostname()}" or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
