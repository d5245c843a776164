"""A child process that never outlives the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Collection, Sequence

from osteo_daemon.errors import ConfigurationError

_PR_SET_PDEATHSIG = 1


def start_child(
    command: Sequence[str], death_signal: signal.Signals, *, pass_fds: Collection[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: Ctrl-C reaches its parent alone, which ends it in its own order.

    Args:
        command: argument list.
        death_signal: what the kernel sends the child when its parent ends, however that ends.
        pass_fds: descriptors that the child inherits.

    Raises:
        ConfigurationError: the system is not Linux.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent(death_signal),
        start_new_session=True,
        pass_fds=pass_fds,
    )


def die_with_parent(death_signal: signal.Signals) -> Callable[[], None]:
    """What a child calls between fork and exec, so that the kernel ends it with the thread that started it.

    Raises:
        ConfigurationError: the system is not Linux.
    """
    parent = os.getpid()
    try:
        libc = ctypes.CDLL(None, use_errno=True)
    except OSError as error:
        raise ConfigurationError("child processes need Linux; run each role by itself") from error

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # the parent may have gone before the request was made
            os._exit(0)

    return ask
