"""Questions to sources how many images a study has, asked beside the scheduler's steps: a slow one holds up nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from osteo_daemon.delivery.back_off import back_off_seconds
from osteo_daemon.dicom.source_count import SourceCount, count_at_source
from osteo_daemon.domain.breaker import Breaker, BreakerState
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import OsteoError, PeerUnavailable
from osteo_daemon.log import get_logger, where
from osteo_daemon.settings import Settings
from osteo_daemon.tls import source_peer

_FAILURES = 2
"""So many in a row, and a source is left alone for a while."""

_PAUSE_SECONDS = 60.0
_LONGEST_PAUSE_SECONDS = 1800.0
_LONGEST_QUEUE = 20
"""More studies of one source wait for no answer: their quiet time decides."""

Moment = tuple[str, datetime, int]
"""A study as it was asked about: Study Instance UID, time of its last arrival, how many objects were here."""


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What became of a question: asked, and answered (with a count or in vain)."""

    answered: bool = False
    count: SourceCount | None = None


class _Source:
    """One source that is asked: one question at a time, and none while its breaker is open."""

    def __init__(self, peer: RemoteAE) -> None:
        self.peer = peer
        self.pool = ThreadPoolExecutor(1, thread_name_prefix=f"inquiry-{peer.ae_title}")
        self.breaker = Breaker(BreakerState.CLOSED, datetime.now(UTC))
        self.waiting = 0


class Inquiries:
    """Questions under way and answers, by study; the caller forgets what it no longer needs."""

    def __init__(self, settings: Settings) -> None:
        self._calling = settings.receiver.ae_title
        self._timeout_seconds = settings.completeness.query_timeout_seconds
        self._sources = {
            source.ae_title: _Source(source_peer(settings.tls, source.query))
            for source in settings.sources
            if source.query is not None
        }
        self._lock = threading.Lock()
        self._found: dict[Moment, Inquiry] = {}

    def ask(self, source_ae: str, moment: Moment) -> Inquiry | None:
        """The question about a study as it is, asked if it was not; None when it is not asked."""
        source = self._sources.get(source_ae)
        with self._lock:
            if source is None or moment in self._found:
                return self._found.get(moment)
            resting = source.breaker.wait_seconds(datetime.now(UTC), _LONGEST_PAUSE_SECONDS * 1.25) > 0
            if resting or source.waiting >= _LONGEST_QUEUE:
                return None
            source.waiting += 1
            self._found[moment] = Inquiry()
            source.pool.submit(self._put, source, moment)
            return self._found[moment]

    def keep(self, studies: Iterable[str]) -> None:
        """Forget every answer on other studies than these."""
        wanted = set(studies)
        with self._lock:
            for moment in [moment for moment in self._found if moment[0] not in wanted]:
                del self._found[moment]

    def close(self) -> None:
        """Ask nothing more; a question under way ends by its time-out."""
        for source in self._sources.values():
            source.pool.shutdown(wait=False, cancel_futures=True)

    def _put(self, source: _Source, moment: Moment) -> None:
        count = None
        try:
            count = count_at_source(source.peer, self._calling, moment[0], timeout_seconds=self._timeout_seconds)
            self._note(source, None)
        except PeerUnavailable as error:
            self._note(source, error)
        except OsteoError as error:
            # it answers, and not this: asking again at once would not change that
            self._note(source, error)
        except Exception as error:  # noqa: BLE001 - the thread's loop edge: an answer that cannot be read is none
            get_logger().error("inquiry_failed", error=type(error).__name__, detail=where(error.__traceback__))
            self._note(source, OsteoError(type(error).__name__))
        with self._lock:
            source.waiting -= 1
            if moment in self._found:
                self._found[moment] = Inquiry(answered=True, count=count)

    def _note(self, source: _Source, error: OsteoError | None) -> None:
        now, before = datetime.now(UTC), source.breaker
        if error is None:
            after = before.answered(now)
        else:
            pause = back_off_seconds(_PAUSE_SECONDS, before.failures + 2 - _FAILURES, _LONGEST_PAUSE_SECONDS)
            text = f"{type(error).__name__}: {error.detail}"
            after = before.failed(text, now, limit=_FAILURES, pause_seconds=pause)
        with self._lock:
            source.breaker = after
        if error is not None and before.failures == 0:
            # once, not for every study: until the source answers again its quiet time decides
            get_logger().warning(
                "source_gives_no_count",
                ae_title=source.peer.ae_title,
                error=type(error).__name__,
                reason=error.detail,
            )
        elif error is None and before.failures:
            get_logger().info("source_counts_again", ae_title=source.peer.ae_title)
