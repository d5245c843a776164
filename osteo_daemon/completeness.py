"""The sweep over studies that are being received: gather evidence, judge, and let the complete ones go on.

What a study lacks is asked for and read only once it is quiet; a study of which nothing has changed is looked at again
only when time alone may change the verdict.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from osteo_daemon.dicom.contexts import SCREENED_CLASSES
from osteo_daemon.dicom.header_facts import read_facts
from osteo_daemon.domain.completeness import (
    Evidence,
    Lists,
    Outcome,
    QuietLimits,
    Rhythm,
    Verdict,
    judge,
    largest_gap,
    rhythm_of,
)
from osteo_daemon.domain.job import Job
from osteo_daemon.domain.slice_order import ImageFacts, slices_of_study
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.inquiry import Inquiries, Inquiry
from osteo_daemon.jobs.completeness import Receiving
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import CompletenessSettings, Settings

_BUDGET_SECONDS = 10.0
"""Of one sweep: after a long outage many studies want their headers read; the next sweep goes on."""

_EVENTS = {Outcome.COMPLETE: "study_complete", Outcome.INCOMPLETE: "study_incomplete"}


@dataclass(frozen=True, slots=True)
class Completed:
    """A study that goes on, and why."""

    job: Job
    verdict: Verdict


@dataclass(slots=True)
class _Known:
    """A study as it was judged last, and until when the verdict holds if nothing changes."""

    study: Receiving
    inquiry: Inquiry | None
    until: datetime
    noted: bool = False


class CompletenessSweep:
    """One scheduler's sweep; it remembers between runs, and loses nothing that matters when it is made anew."""

    def __init__(
        self, settings: Settings, jobs: JobStore, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._jobs = jobs
        self._clock = clock
        self._limits = quiet_limits(settings.completeness)
        self._inquiries = Inquiries(settings)
        self._known: dict[str, _Known] = {}
        self._facts: dict[str, dict[str, ImageFacts]] = {}
        self._spoken_for: dict[str, dict[datetime, bool]] = {}

    def close(self) -> None:
        """Ask nothing more."""
        self._inquiries.close()

    def run(self) -> list[Completed]:
        """Judge every study that may be complete; the complete ones are READY when this returns.

        Raises:
            StoreUnavailable: the job store does not answer.
        """
        deadline = time.monotonic() + _BUDGET_SECONDS
        studies = self._jobs.receiving_studies(self._limits.shortest_seconds, now=self._clock())
        self._forget_others({study.study_instance_uid for study in studies})
        gaps = self._jobs.source_gaps() if studies else {}
        done = []
        for study in studies:
            completed = self._look_at(study, rhythm_of(gaps.get(study.source_ae, ()), self._limits))
            if completed is not None:
                done.append(completed)
            if time.monotonic() > deadline:
                break
        return done

    def _forget_others(self, present: set[str]) -> None:
        memories: tuple[dict[str, Any], ...] = (self._known, self._facts, self._spoken_for)
        for memory in memories:
            for uid in [uid for uid in memory if uid not in present]:
                del memory[uid]
        self._inquiries.keep(present)

    def _look_at(self, study: Receiving, rhythm: Rhythm) -> Completed | None:
        now = self._clock()
        known = self._known.get(study.study_instance_uid)
        quiet = study.quiet_seconds(now)
        # as it was when it was seen last: an association that ends before the next arrival speaks for nothing
        self._spoken_for.setdefault(study.study_instance_uid, {})[study.last_received_at] = study.open_association
        inquiry = self._inquiry(study) if quiet >= rhythm.early_seconds else None
        if known is not None and known.study == study and known.inquiry == inquiry and now < known.until:
            return None
        verdict = judge(self._evidence(study, quiet, rhythm, inquiry), rhythm, self._limits)
        if verdict.outcome is Outcome.WAIT:
            self._wait(study, inquiry, verdict, rhythm.quiet_seconds - quiet, now)
            return None
        job = self._jobs.complete_study(
            study,
            event=_EVENTS[verdict.outcome],
            reason=verdict.reason,
            lacks=verdict.lacks,
            gap_seconds=self._largest_gap(study),
            now=now,
        )
        return None if job is None else Completed(job, verdict)

    def _largest_gap(self, study: Receiving) -> float | None:
        seen = self._spoken_for.get(study.study_instance_uid, {})
        return largest_gap(
            [moment.timestamp() for moment in self._jobs.arrivals(study.study_instance_uid, study.source_ae)],
            self._limits,
            {moment.timestamp() for moment, is_open in seen.items() if is_open},
        )

    def _wait(
        self, study: Receiving, inquiry: Inquiry | None, verdict: Verdict, overdue_seconds: float, now: datetime
    ) -> None:
        """Remember until when; what a study lacks goes into its history once it would have gone on without that."""
        before = self._known.get(study.study_instance_uid)
        noted = before is not None and before.noted and before.study.last_received_at == study.last_received_at
        wait = verdict.wait_seconds
        if verdict.reason and not noted:
            if overdue_seconds <= 0:
                self._jobs.note_wait(study, verdict.reason, now=now)
                noted = True
            else:
                wait = min(wait, overdue_seconds)
        until = now + timedelta(seconds=wait)
        self._known[study.study_instance_uid] = _Known(study, inquiry, until, noted)

    def _inquiry(self, study: Receiving) -> Inquiry | None:
        moment = (study.study_instance_uid, study.last_received_at, study.instances)
        return self._inquiries.ask(study.source_ae, moment)

    def _evidence(self, study: Receiving, quiet: float, rhythm: Rhythm, inquiry: Inquiry | None) -> Evidence:
        lists = Lists()
        if study.announced_at is not None:
            lists = self._jobs.lists(study.study_instance_uid, SCREENED_CLASSES)
        plain = Evidence(quiet, study.open_association, study.source_ae, lists)
        if quiet < rhythm.early_seconds or lists.complete:
            return plain
        images = self._jobs.instances_of(study.study_instance_uid, SCREENED_CLASSES)
        count = None
        if inquiry is not None and inquiry.count is not None:
            here = Counter(image.series_instance_uid for image in images)
            count = inquiry.count.beside(here, study.instances)
        return Evidence(
            quiet,
            study.open_association,
            study.source_ae,
            lists,
            slices_of_study(self._facts_of(study.study_instance_uid, images)),
            count,
            asking=inquiry is not None and not inquiry.answered,
        )

    def _facts_of(self, study_instance_uid: str, images: list[SopInstance]) -> list[ImageFacts]:
        before = self._facts.get(study_instance_uid, {})
        # by path: a name tells the content, so that a replaced header is read anew
        facts = {
            str(image.path): before.get(str(image.path))
            or read_facts(image.path, image.sop_class_uid, image.series_instance_uid, image.transfer_syntax_uid)
            for image in images
        }
        self._facts[study_instance_uid] = facts
        return list(facts.values())


def quiet_limits(settings: CompletenessSettings) -> QuietLimits:
    """The site's limits."""
    return QuietLimits(
        quiet_seconds=settings.quiet_seconds,
        minimum_seconds=settings.quiet_minimum_seconds,
        maximum_seconds=settings.quiet_maximum_seconds,
        early_seconds=settings.early_quiet_seconds,
        missing_seconds=settings.missing_wait_seconds,
        series_seconds=settings.series_wait_seconds,
    )
