"""The process that computes: models warm, one study at a time, the next one read ahead. Started by the screener.

It holds no lease and writes no row: a study that kills, hangs or exhausts this process is judged by the screener, which
lives on. Messages come and go over one `Link`; the first holds the settings.

======================= ====================================================================================
from the screener       ``settings``, ``screen``, ``prefetch``, ``cancel``
to the screener         ``ready``, ``refused``, ``models``, ``prefetched``, ``shadow``; one answer to each ``screen``:
                        ``reported``, ``excluded``, ``held``, ``retry`` or ``cancelled``
======================= ====================================================================================

A ``retry`` is charged to the study unless it says otherwise; with ``spent`` this process wants to be replaced.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from osteo_daemon.ahead import Ahead, read_ahead
from osteo_daemon.archive.archivist import Archivist
from osteo_daemon.dicom.report_forms import BuiltObject, BuiltReport
from osteo_daemon.domain.completeness import Lacks
from osteo_daemon.domain.findings import Outcome
from osteo_daemon.domain.trend import EarlierValue
from osteo_daemon.errors import BundleError, ConfigurationError, Damaged, OsteoError, Transient
from osteo_daemon.imaging.acquisition import scanner_of
from osteo_daemon.imaging.study_files import StudyFiles
from osteo_daemon.inference.resident import ResidentModels, gpu_memory
from osteo_daemon.inference.screening import Screening
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.trend import Trend
from osteo_daemon.link import Link
from osteo_daemon.log import configure_logging, get_logger, where
from osteo_daemon.patient_link import header_key, link_secret, study_date, trend_point
from osteo_daemon.registry.shadow import ShadowRunner
from osteo_daemon.reporting import PreviousReport, build_report, picture_language
from osteo_daemon.settings import DestinationSettings, Settings

CONFIGURATION_EXIT = 2
"""Exit status when the models cannot be loaded (see `osteo_daemon.cli`)."""


class _Cancelled(BaseException):
    """The screener does not want the result any more."""


_TREND_PATIENCE_SECONDS = 3.0


class ScreeningWorker:
    """Answers the screener's messages until it goes away."""

    def __init__(self, link: Link, settings: Settings) -> None:
        self._link = link
        self._settings = settings
        self._log = get_logger()
        self._spool = Spool(settings.spool_dir)
        self._ahead = Ahead(settings.screener.prefetch_maximum_bytes, link)
        self._inbox: queue.SimpleQueue[tuple[dict[str, Any], Future[StudyFiles] | None]] = queue.SimpleQueue()
        self._cancelled: int | None = None
        if (drawn := picture_language(settings)) != settings.site.language:
            detail = f"no installed font holds the characters of {settings.site.language}: pictures are in {drawn}"
            self._log.warning("picture_font_missing", detail=detail)
        self._trend = Trend(settings.database_url, busy_timeout_seconds=_TREND_PATIENCE_SECONDS)
        self._link_secret = link_secret(settings.state_dir) if settings.site.trend else None
        self._models = ResidentModels(settings)
        self._shadows = ShadowRunner(settings, self._models.device)
        self._archivist = Archivist(settings) if settings.archive.enabled else None
        self._screened: Screening | None = None

    def work(self) -> None:
        """Tell what is loaded, then answer one study after another."""
        self._link.send({"type": "ready", **self._loaded()})
        threading.Thread(target=self._listen, name="link", daemon=True).start()
        while True:
            message, files = self._inbox.get()
            self._link.send({"token": message["token"], **self._answer(message, files)})
            self._shadow(message)
            self._archive_screened(message["revision"])

    def _listen(self) -> None:
        try:
            while (message := self._link.receive()) is not None:
                if message["type"] == "prefetch":
                    self._ahead.start(message)
                elif message["type"] == "cancel":
                    self._cancelled = message["token"]
                else:
                    # taken here, in the order of the messages: the next prefetch may be the very next one
                    self._inbox.put((message, self._ahead.take(message)))
        except EOFError:
            os._exit(0)  # nobody wants an answer, and torch may be in the middle of one

    def _answer(self, message: Mapping[str, Any], ahead: Future[StudyFiles] | None) -> dict[str, Any]:
        try:
            return self._screen(message, read_ahead(ahead))
        except _Cancelled:
            return {"type": "cancelled"}
        except Damaged as error:
            return {"type": "held", "code": type(error).__name__, "detail": error.detail}
        except Transient as error:
            # a full disk, a store that is away: every study would fail now, so this one is not to blame
            return {"type": "retry", "code": type(error).__name__, "detail": error.detail, "charged": False}
        except (BundleError, ConfigurationError) as error:
            return {"type": "retry", "code": type(error).__name__, "detail": error.detail}
        except MemoryError:
            return {"type": "retry", "code": MemoryError.__name__, "detail": "the study does not fit the memory"}
        except Exception as error:  # noqa: BLE001 - the process's loop edge: one study must not end the worker
            # only the class: a library's message may quote what it was given
            self._log.error("screening_crashed", error=type(error).__name__, detail=where(error.__traceback__))
            detail = "an error inside the program, see its log"
            # a failed kernel leaves a context in which every later one fails, too: only a new process gets a new one
            spent = self._models.device.type != "cpu"
            return {"type": "retry", "code": type(error).__name__, "detail": detail, "spent": spent}

    def _shadow(self, message: Mapping[str, Any]) -> None:
        """Let a candidate look at the study, too; its report is made and no longer touched."""
        values = None if self._screened is None else self._shadows.run(self._screened)
        if values is not None:
            self._link.send({"type": "shadow", "job": message["job"], "revision": message["revision"], **values})

    def _archive_screened(self, revision: int) -> None:
        """Keep the VOIs of the study that was just answered; the answer is on its way and waits for nothing."""
        screened, self._screened = self._screened, None
        if self._archivist is None or screened is None:
            return
        try:
            self._archivist.take(screened, revision)
        except Exception as error:  # noqa: BLE001 - the process's loop edge: an archive must not end the worker
            self._log.error("study_not_archived", error=type(error).__name__, detail=where(error.__traceback__))

    def _screen(self, message: Mapping[str, Any], files: StudyFiles | None) -> dict[str, Any]:
        token = message["token"]

        def progress(_stage: str) -> None:
            if self._cancelled == token:
                raise _Cancelled

        if self._models.refresh(message["localizer_bundle"], message["network_bundle"]):
            self._link.send({"type": "models", **self._loaded()})
        source = files or StudyFiles.read(Path(path) for path in message["paths"])
        screening = self._models.screen(source, progress)
        if message["lacks"] is not None:
            screening = screening.of_incomplete_study(Lacks(message["lacks"]))
        progress("build report")
        exclusion = screening.result.exclusion
        destinations = [entry for entry in self._settings.destinations if exclusion is None or entry.report_exclusions]
        built = self._report(screening, message, destinations)
        answer = {
            "result": screening.result.to_json(),
            "scanner": asdict(scanner_of(screening.headers[0])),
            "gpu_memory": gpu_memory(self._models.device),
            "objects": [self._keep(message["study"], entry) for entry in built.objects],
            "deliveries": {
                destination.name: [entry.sop_instance_uid for entry in built.for_destination(destination)]
                for destination in (destinations if built.objects else ())
            },
        }
        if exclusion is not None:
            return {"type": "excluded", "code": exclusion.code, "reason": exclusion.reason, **answer}
        self._screened = screening
        return {"type": "reported", "summary": _summary(screening), "trend": self._trend_point(screening), **answer}

    def _report(
        self, screening: Screening, message: Mapping[str, Any], destinations: Sequence[DestinationSettings]
    ) -> BuiltReport:
        """The report for these destinations; of an excluded study nothing where nobody wants it or none can be made."""
        excluded = screening.result.exclusion is not None
        if excluded and not destinations:
            return BuiltReport((), None)
        settings = self._models.settings.model_copy(update={"destinations": tuple(destinations)})
        predecessors = {variant: PreviousReport.read(Path(path)) for variant, path in message["predecessors"].items()}
        try:
            return build_report(
                screening,
                settings,
                datetime.now(UTC),
                revision=message["revision"],
                predecessors=predecessors,
                earlier=self._earlier(screening),
            )
        except Damaged as error:
            if not excluded:
                raise
            # what can't even be referred to stays excluded, not held
            self._log.warning("exclusion_not_reported", error=type(error).__name__)
            return BuiltReport((), None)

    def _earlier(self, screening: Screening) -> tuple[EarlierValue, ...]:
        """Earlier values of the patient; none when the store doesn't answer: a trend is no reason to wait."""
        header = screening.headers[0]
        when = study_date(header)
        if self._link_secret is None or when is None or (key := header_key(header, self._link_secret)) is None:
            return ()
        try:
            return self._trend.earlier_values(key, when)
        except Transient as error:
            self._log.warning("trend_unavailable", error=type(error).__name__)
            return ()

    def _trend_point(self, screening: Screening) -> dict[str, Any] | None:
        if self._link_secret is None:
            return None
        point = trend_point(screening.result, screening.headers[0], self._link_secret)
        if point is None:
            return None
        value = point.value
        return {
            "patient_key": point.patient_key,
            "study_date": value.study_date.isoformat(),
            "index_hu": value.index_hu,
        }

    def _keep(self, study: str, entry: BuiltObject) -> dict[str, Any]:
        stored = self._spool.store_report(study, entry.sop_instance_uid, [entry.data])
        return {
            "kind": entry.kind,
            "sop_class_uid": entry.sop_class_uid,
            "sop_instance_uid": entry.sop_instance_uid,
            "path": str(stored.path),
            "size_bytes": stored.size_bytes,
            "sha256": stored.sha256,
            "variant": entry.variant,
        }

    def _loaded(self) -> dict[str, Any]:
        return {
            "device": str(self._models.device),
            "models": [
                {"bundle": model.bundle, "version": model.version, "digest": model.sha256}
                for model in self._models.models
            ],
            "refused_bundle": self._models.refused,
            "gpu_memory": gpu_memory(self._models.device),
        }


def _summary(screening: Screening) -> str:
    category = screening.result.category
    return Outcome.REPORTED.value if category is None else f"{Outcome.REPORTED.value}, {category.value}"


def main(descriptor: int) -> int:
    """Serve the screener at the other end of the inherited socket; returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # the screener decides when this process ends; systemd sends its signal to both
        signal.signal(number, signal.SIG_IGN)
    link = Link(socket.socket(fileno=descriptor))
    try:
        first = link.receive()
        if first is None or first["type"] != "settings":
            return 1
        settings = Settings.model_validate(first["settings"])
        configure_logging(settings.log, "screener")
        try:
            worker = ScreeningWorker(link, settings)
        except (BundleError, ConfigurationError) as error:
            link.send({"type": "refused", "error": type(error).__name__, "detail": error.detail})
            return CONFIGURATION_EXIT
        except OsteoError as error:
            link.send({"type": "failed", "error": type(error).__name__, "detail": error.detail})
            return 1
        worker.work()
    except EOFError:
        pass  # the screener has gone
    return 0
