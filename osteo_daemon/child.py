"""A child process that never outlives the process that started it, or that is held to little memory and time."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence

from osteo_daemon.errors import ConfigurationError

_PR_SET_PDEATHSIG = 1


def start_child(
    command: Sequence[str],
    death_signal: signal.Signals,
    *,
    pass_fds: Collection[int] = (),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: Ctrl-C reaches its parent alone, which ends it in its own order.

    Args:
        command: argument list.
        death_signal: what the kernel sends the child when its parent ends, however that ends.
        pass_fds: descriptors that the child inherits.
        environment: variables besides those of this process.

    Raises:
        ConfigurationError: the system is not Linux.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent(death_signal),
        start_new_session=True,
        pass_fds=pass_fds,
        env={**os.environ, **(environment or {})},
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


def confine(memory_bytes: int, *, cpu_seconds: float) -> None:
    """Hold this process, for good, to some address space and CPU time; it leaves no core and writes no file.

    For a process that is about to read bytes from the network with native code.
    """
    seconds = math.ceil(cpu_seconds)
    # SIGXCPU first, which says what happened; SIGKILL when that is not enough
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
