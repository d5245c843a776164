"""When whom is told what: once for each problem, not for what passes by itself, not at night unless it must be.

What was told stands in a file, so that a restart tells nothing twice. Each channel keeps its own account: a mail server
that is down does not hold up the webhook, and what it missed is told in one message when it answers.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from osteo_daemon.delivery.back_off import back_off_seconds
from osteo_daemon.errors import ConfigurationError, Transient
from osteo_daemon.log import get_logger
from osteo_daemon.monitor.channels import Channel
from osteo_daemon.monitor.messages import Message, Writer
from osteo_daemon.monitor.problems import Problem, Severity
from osteo_daemon.pull.pace import Hours
from osteo_daemon.settings import NotificationSettings

_HOUR_SECONDS: Final = 3600.0


@dataclass
class _Account:
    """What one channel has been told.

    Attributes:
        told: problems by key, with when they were told last (seconds since 1970).
        failures: attempts in a row that failed.
        not_before: no further attempt until then (seconds since 1970).
        open_identifier: of a message that was tried and not taken; its repetition carries the same.
        open_keys: what that message tells.
    """

    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: int = 0
    not_before: float = 0.0
    open_identifier: str = ""
    open_keys: list[str] = field(default_factory=list)


class Notifier:
    """Tells people of problems.

    Args:
        settings: of the notifications.
        state_dir: of the node.
        channels: ways out.
        clock: gives the present with this machine's time zone.

    Raises:
        ConfigurationError: the site's templates cannot be used.
    """

    def __init__(
        self,
        settings: NotificationSettings,
        state_dir: Path,
        channels: Sequence[Channel],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC).astimezone(),
    ) -> None:
        self._settings = settings
        self._channels = channels
        self._clock = clock
        self._path = state_dir / "notifications.json"
        self._writer = Writer(settings.templates_dir, socket.gethostname())
        self._since: dict[str, float] = {}
        self._accounts = {channel.name: _Account() for channel in channels}
        self._read()

    def tell(self, problems: Sequence[Problem], ending: threading.Event) -> None:
        """Tell what is to be told now; what cannot be is tried again with a later look."""
        now = self._clock().timestamp()
        self._since = {problem.key: self._since.get(problem.key, now) for problem in problems}
        for channel in self._channels:
            if ending.is_set():
                return
            account = self._accounts[channel.name]
            if now < account.not_before:
                continue
            begun, over = self._news(account, problems, now)
            if begun or over:
                self._send(channel, account, begun, over, now)

    def _news(self, account: _Account, problems: Sequence[Problem], now: float) -> tuple[list[Problem], list[Problem]]:
        quiet = self._is_quiet()
        again = self._settings.repeat_hours * _HOUR_SECONDS
        begun: list[Problem] = []
        for problem in problems:
            told = account.told.get(problem.key)
            if told is None:
                due = now - self._since[problem.key] >= self._settings.after_seconds
            else:
                due = bool(again) and now - float(told["at"]) >= again
            if due and not (quiet and problem.severity is not Severity.CRITICAL):
                begun.append(problem)
        present = {problem.key for problem in problems}
        over = [_problem(key, told) for key, told in account.told.items() if key not in present]
        # that something is over wakes nobody
        return begun, [] if quiet and not begun else over

    def _is_quiet(self) -> bool:
        window = self._settings.quiet_hours
        return bool(window) and Hours.parse(window).wait_seconds(self._clock()) == 0.0

    def _send(
        self, channel: Channel, account: _Account, begun: Sequence[Problem], over: Sequence[Problem], now: float
    ) -> None:
        keys = [*(f"+{problem.key}" for problem in begun), *(f"-{problem.key}" for problem in over)]
        if account.open_keys != keys:
            account.open_identifier, account.open_keys = uuid.uuid4().hex, keys
        log = get_logger().bind(kind=channel.name, count=len(begun) + len(over))
        try:
            message: Message = self._writer.write(account.open_identifier, begun, over)
            channel.send(message)
        except (Transient, ConfigurationError) as error:
            account.failures += 1
            wait = back_off_seconds(
                self._settings.retry_base_seconds, account.failures, self._settings.retry_maximum_seconds
            )
            account.not_before = now + wait
            log.warning("notification_failed", error=type(error).__name__, detail=error.detail, wait_s=round(wait))
        else:
            for problem in over:
                del account.told[problem.key]
            for problem in begun:
                account.told[problem.key] = {"at": now, "severity": problem.severity.value, "text": problem.text}
            account.failures, account.not_before, account.open_identifier, account.open_keys = 0, 0.0, "", []
            log.info("notification_sent")
        self._write()

    def _read(self) -> None:
        """What was told before; an unreadable file counts as nothing told: rather twice than never."""
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            document = json.loads(self._path.read_bytes())
            for name, account in document.items():
                if name in self._accounts:
                    self._accounts[name] = _Account(**account)

    def _write(self) -> None:
        document = {name: asdict(account) for name, account in self._accounts.items()}
        part = self._path.with_suffix(".part")
        try:
            self._path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            with part.open("w", encoding="utf-8") as sink:
                json.dump(document, sink)
                sink.flush()
                os.fsync(sink.fileno())
            part.replace(self._path)
        except OSError as error:
            get_logger().warning("notifications_not_noted", error=type(error).__name__)


def _problem(key: str, told: dict[str, Any]) -> Problem:
    return Problem(key, Severity(told["severity"]), str(told["text"]))
