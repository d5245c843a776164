"""Log lines that can't carry patient identity: an allow-list of attributes, one event slug per line.

A key that isn't on the list is dropped and its name kept under ``dropped``: a mistake is seen but never leaks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import structlog

from osteo_daemon.settings import LogSettings

LOGGABLE = frozenset(
    {
        "abort_source",
        "address",
        "ae_title",
        "affected",
        "associations",
        "attempt",
        "attempts",
        "bundle",
        "bytes",
        "called_ae_title",
        "category",
        "certificate",
        "code",
        "count",
        "delivery_id",
        "destination",
        "detail",
        "device",
        "digest",
        "duration_s",
        "error",
        "event",
        "exception",
        "exit_code",
        "fencing_token",
        "free_bytes",
        "host",
        "instances",
        "job_id",
        "kind",
        "level",
        "not_before",
        "object",
        "outcome",
        "pid",
        "port",
        "quiet_s",
        "reason",
        "revision",
        "role",
        "series_instance_uid",
        "signal",
        "sop_class_uid",
        "sop_instance_uid",
        "state",
        "status",
        "study_instance_uid",
        "timestamp",
        "transfer_syntax_uid",
        "transition",
        "version",
        "wait_s",
        "worker",
    }
)


def keep_loggable(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """structlog processor: drop every key that is not in `LOGGABLE`, name the dropped ones."""
    dropped = sorted(key for key in event if key not in LOGGABLE)
    kept = {key: value for key, value in event.items() if key in LOGGABLE}
    if dropped:
        kept["dropped"] = dropped
    return kept


_LISTENERS: list[Callable[[MutableMapping[str, Any]], None]] = []


def listen(listener: Callable[[MutableMapping[str, Any]], None]) -> None:
    """Have every line of `INFO` and above given to ``listener`` too, whether it is written or not; it must be quick."""
    if listener not in _LISTENERS:
        _LISTENERS.append(listener)


def _tell_listeners(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for listener in _LISTENERS:
        listener(event)
    return event


class _NotBelow:
    """structlog processor: lines below a level end here."""

    def __init__(self, level: int) -> None:
        self._level = level

    def __call__(self, _logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if structlog.processors.NAME_TO_LEVEL[event.get("level", method)] < self._level:
            raise structlog.DropEvent
        return event


def configure_logging(settings: LogSettings, role: str) -> None:
    """Send log lines of this process to standard error with ``role`` on each.

    Warnings of libraries (pydicom quotes element values in them) are reduced to their logger's name.
    """
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0)
    )
    level = getattr(logging, settings.level.upper())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            keep_loggable,
            _tell_listeners,
            _NotBelow(level),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(min(level, logging.INFO)),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(role=role)
    logging.captureWarnings(capture=True)
    root = logging.getLogger()
    root.handlers = [_NameOnly()]
    root.setLevel(logging.ERROR)


class _NameOnly(logging.Handler):
    """Foreign records: say that a library complained, never what it quoted."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            get_logger().warning("library_message", detail=f"{record.name}: {record.levelname.lower()}")


def get_logger() -> structlog.stdlib.BoundLogger:
    """The process's logger: call with a stable event slug and loggable attributes."""
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger())


def where(trace: TracebackType | None) -> str:
    """File and line of the innermost frames: says where without quoting a value."""
    frames: list[str] = []
    while trace is not None:
        frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(frames[-4:])
