"""What became of a claimed study, written to the store: the worker's answer, or what is written in its place."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from osteo_daemon.domain.job import Job
from osteo_daemon.domain.observation import Scanner
from osteo_daemon.domain.trend import EarlierValue, TrendPoint
from osteo_daemon.errors import LeaseLost, Transient
from osteo_daemon.jobs.claims import WALL_CLOCK_LIMIT
from osteo_daemon.jobs.records import NewDelivery, ReportKind, ReportObject, Shadow
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.lease import LeaseWatch
from osteo_daemon.log import get_logger
from osteo_daemon.settings import ScreenerSettings
from osteo_daemon.tally import TALLY

_COMMIT_PAUSE_SECONDS = 1.0


class OutcomeWriter:
    """The screener's pen.

    Args:
        store: of the node.
        settings: of the screener.
        stopping: the node stops.
    """

    def __init__(self, store: JobStore, settings: ScreenerSettings, stopping: threading.Event) -> None:
        self._store = store
        self._settings = settings
        self._stopping = stopping
        self._log = get_logger()

    def commit(self, job: Job, answer: Mapping[str, Any], watch: LeaseWatch) -> str:
        """Write what came of it. A store that does not answer is asked again as long as the lease may hold.

        Raises:
            LeaseLost: another worker has the job or its study changed: nothing was written.
            Transient: the store did not answer in time.
        """
        if answer["type"] == "released":
            return self.release(job)
        if answer["type"] == "cancelled":
            return "cancelled"
        if answer["type"] == WALL_CLOCK_LIMIT:
            limit = self._settings.wall_clock_seconds
            return self.retry(job, WALL_CLOCK_LIMIT, f"not done within {limit:g} s")
        if answer["type"] == "retry":
            return self.retry(job, answer["code"], answer["detail"], charged=answer.get("charged", True))
        if answer["type"] == "held":
            return self._end(lambda: self._store.hold(job, answer["code"], answer["detail"]), "held")
        while True:
            try:
                if answer["type"] == "excluded":
                    told = (_objects(answer), _deliveries(answer))
                    self._store.exclude(
                        job, answer["code"], answer["reason"], answer["result"], *told, scanner=_scanner(answer)
                    )
                    return str(answer["code"])
                self._store.commit_report(
                    job, answer["result"], _objects(answer), _deliveries(answer), scanner=_scanner(answer)
                )
                self._remember(job, answer.get("trend"))
                for stage, seconds in answer["result"].get("durations_s", {}).items():
                    TALLY.observe("osteo_stage_seconds", float(seconds), str(stage))
                return str(answer["summary"])
            except Transient:
                if watch.over() or self._stopping.wait(_COMMIT_PAUSE_SECONDS):
                    raise
            with suppress(Transient):
                self._store.heartbeat(job, self._settings.lease_seconds)

    def release(self, job: Job) -> str:
        """Give the study back: it had no share in what happened."""
        return self._end(lambda: self._store.release(job), "released")

    def retry(self, job: Job, code: str, detail: str, *, charged: bool = True) -> str:
        """Once more, later, or FAILED when its attempts are spent; what is not charged is tried for ever."""
        if charged and job.attempts >= self._settings.maximum_attempts:
            return self._end(lambda: self._store.fail(job, code, detail), f"failed, {code}")
        delay = self._settings.retry_base_seconds * 2 ** (job.attempts - 1)
        # jitter: several workers that failed for one reason don't come back at one moment
        not_before = datetime.now(UTC) + timedelta(seconds=delay * random.uniform(0.8, 1.2))  # noqa: S311
        return self._end(
            lambda: self._store.retry_later(job, code, detail, not_before, charged=charged), f"retry, {code}"
        )

    def keep_shadow(self, message: Mapping[str, Any]) -> None:
        """A candidate's values, to their own table; without them nothing is amiss."""
        shadow = Shadow(
            job_id=message["job"],
            revision=message["revision"],
            sha256=message["sha256"],
            deployed_sha256=message["deployed_sha256"],
            at=datetime.now(UTC),
            seconds=message["seconds"],
            error=message["error"],
            levels=message["levels"],
        )
        try:
            self._store.save_shadow(shadow)
        except Transient as error:
            self._log.warning("shadow_not_written", job_id=shadow.job_id, error=type(error).__name__)

    def _remember(self, job: Job, trend: Mapping[str, Any] | None) -> None:
        """Keep the value for the patient's next study; the report is committed and needs nothing of it."""
        if trend is None:
            return
        value = EarlierValue(date.fromisoformat(trend["study_date"]), float(trend["index_hu"]))
        try:
            self._store.remember_value(job.study_instance_uid, TrendPoint(str(trend["patient_key"]), value))
        except Transient as error:
            self._log.warning("trend_not_written", error=type(error).__name__)

    def _end(self, act: Callable[[], None], outcome: str) -> str:
        try:
            act()
        except (LeaseLost, Transient) as error:
            # the lease runs out by itself and another worker takes the study
            self._log.warning("outcome_not_written", error=type(error).__name__)
            return "not_written"
        return outcome


def _objects(answer: Mapping[str, Any]) -> list[ReportObject]:
    return [
        ReportObject(**{**entry, "kind": ReportKind(entry["kind"]), "path": Path(entry["path"])})
        for entry in answer["objects"]
    ]


def _scanner(answer: Mapping[str, Any]) -> Scanner:
    return Scanner(**answer["scanner"])


def _deliveries(answer: Mapping[str, Any]) -> list[NewDelivery]:
    return [NewDelivery(name, tuple(uids)) for name, uids in answer["deliveries"].items()]
