"""Compressed pixels to stored values, in a child with bounded memory and time.

Decoders are native code that meets bytes from the network: they crash, loop and allocate by what a header claims. None
of them runs in a process that holds a study. What ends the child ends the decoding of one image and says why.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom

from osteo_daemon.child import confine
from osteo_daemon.errors import PixelDataUnreadable, WorkerDied
from osteo_daemon.imaging.codecs import choose_decoders
from osteo_daemon.imaging.enhanced import read_frames

MEMORY_BYTES = 2 << 30
"""Address space of a decoder: a frame of 4096 x 4096 takes a tenth of it."""

IMAGE_SECONDS = 60.0
"""For one image; 512 x 512 pixels take less than a tenth of a second."""

STACK_SECONDS = 60.0
"""For all images together, with `SECONDS_PER_IMAGE` for each."""

SECONDS_PER_IMAGE = 2.0

Wanted = Sequence[tuple[Path, Sequence[int]]]
"""Files, each with the numbers of the frames that are wanted, from 1 on; none for an object of one image."""

_START_SECONDS = 60.0  # a busy machine may load the libraries slowly
_REAP_SECONDS = 5.0
_PIPE_BYTES = 1 << 20
_MAXIMUM_DIMENSIONS = 4
_HEAD = struct.Struct(f"<B3s{_MAXIMUM_DIMENSIONS}Q")  # number of dimensions, dtype, shape
_READY, _REFUSED = 0xFE, 0xFF  # in place of the number of dimensions; a refusal's shape[0] is the length of its reason
_MAXIMUM_REASON_BYTES = 200

_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the decoder is not to blame


def decode(wanted: Wanted) -> Generator[npt.NDArray[Any]]:
    """Stored values of images and frames, in the order asked for.

    Args:
        wanted: which.

    Raises:
        PixelDataUnreadable: an image cannot be decoded within the limits, or it ended the decoder.
        WorkerDied: the decoder did not start, or was ended from outside.
    """
    count = sum(max(len(numbers), 1) for _, numbers in wanted)
    if not count:
        return
    child = _Child(wanted, STACK_SECONDS + SECONDS_PER_IMAGE * count)
    try:
        for _ in range(count):
            yield child.image()
    finally:
        child.end()


class _Child:
    """This module as a process: `_main`."""

    def __init__(self, wanted: Wanted, seconds: float) -> None:
        self._end = time.monotonic() + _START_SECONDS + seconds
        requests = os.memfd_create("wanted", os.MFD_CLOEXEC)
        self._pipe, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            with suppress(OSError):  # a smaller pipe only costs more turns
                fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            document = {
                "seconds": seconds,
                "wanted": [[str(path), [int(number) for number in numbers]] for path, numbers in wanted],
            }
            with os.fdopen(os.dup(requests), "wb") as sink:
                sink.write(json.dumps(document).encode())
            os.lseek(requests, 0, os.SEEK_SET)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "osteo_daemon.imaging.decoder", str(theirs)],
                stdin=requests,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs],
                env=_environment(),
            )
        except OSError as error:
            os.close(self._pipe)
            raise WorkerDied(f"a decoder could not be started: {error.strerror}") from error
        finally:
            os.close(requests)
            os.close(theirs)
        try:
            self._await_ready()
        except BaseException:
            self.end()
            raise

    def image(self) -> npt.NDArray[Any]:
        """The next image.

        Raises:
            PixelDataUnreadable, WorkerDied: as `decode`.
        """
        deadline = min(time.monotonic() + IMAGE_SECONDS, self._end)
        dimensions, dtype, *shape = _HEAD.unpack(self._read(_HEAD.size, deadline))
        if dimensions == _REFUSED:
            reason = self._read(min(shape[0], _MAXIMUM_REASON_BYTES), deadline)
            raise PixelDataUnreadable(reason.decode("ascii", "replace"))
        kind = np.dtype(dtype.decode("ascii"))
        shape = shape[:dimensions]
        size = int(np.prod(shape, dtype=object)) * kind.itemsize
        if size > MEMORY_BYTES:
            raise PixelDataUnreadable("larger than its decoder's memory")
        return np.frombuffer(self._read(size, deadline), dtype=kind).reshape(shape)

    def end(self) -> None:
        """Kill it, if it still runs."""
        self._process.kill()
        self._process.wait()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def _await_ready(self) -> None:
        try:
            head = self._read(_HEAD.size, time.monotonic() + _START_SECONDS)
        except PixelDataUnreadable as error:  # it saw no pixel yet
            raise WorkerDied(f"a decoder did not start: {error.detail}") from error
        if head[0] != _READY:
            raise WorkerDied("a decoder did not start")

    def _read(self, size: int, deadline: float) -> bytearray:
        """Exactly ``size`` bytes."""
        received = bytearray(size)
        view = memoryview(received)
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        while view:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not poll.poll(remaining * 1000):
                if time.monotonic() < deadline:
                    continue
                raise PixelDataUnreadable("its decoder took too long")
            step = os.readv(self._pipe, [view])
            if not step:
                raise self._ended()
            view = view[step:]
        return received

    def _ended(self) -> PixelDataUnreadable | WorkerDied:
        try:
            status = self._process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            return WorkerDied("a decoder said no more")
        if -status in _OUTSIDE:
            return WorkerDied(f"a decoder was ended by {signal.Signals(-status).name}")
        if status < 0:
            known = -status in signal.valid_signals()
            name = signal.Signals(-status).name if known else f"signal {-status}"
            return PixelDataUnreadable(f"it ended its decoder by {name}")
        return PixelDataUnreadable(f"it ended its decoder with status {status}")


def _environment() -> dict[str, str]:
    from osteo_daemon.settings import ENVIRONMENT_PREFIX  # the child needs none of it and starts sooner

    # no setting of the node, which may be a password; one thread, because each reserves memory
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _images(wanted: Sequence[tuple[str, list[int]]]) -> Iterator[npt.NDArray[Any]]:
    for path, numbers in wanted:
        if numbers:
            yield from read_frames(Path(path), numbers)
        else:
            yield pydicom.dcmread(path).pixel_array


def _main(descriptor: int) -> int:
    """In the child: decode what standard input names, write it to the pipe."""
    document = json.load(sys.stdin)
    choose_decoders()
    confine(MEMORY_BYTES, cpu_seconds=document["seconds"])
    with os.fdopen(descriptor, "wb", buffering=0) as sink:
        _write(sink, _HEAD.pack(_READY, b"", *[0] * _MAXIMUM_DIMENSIONS))
        try:
            for pixels in _images(document["wanted"]):
                shape = (*pixels.shape, *[0] * (_MAXIMUM_DIMENSIONS - pixels.ndim))
                _write(sink, _HEAD.pack(pixels.ndim, pixels.dtype.str.encode("ascii"), *shape))
                _write(sink, pixels.tobytes())
        except BrokenPipeError:
            return 0  # nobody wants more
        except Exception as error:  # noqa: BLE001 - the edge of this process
            # only the class: a library's message may quote what it was given
            memory = f"it needs more than {MEMORY_BYTES >> 20} MiB"
            reason = (memory if isinstance(error, MemoryError) else type(error).__name__).encode("ascii")
            _write(sink, _HEAD.pack(_REFUSED, b"", len(reason), *[0] * (_MAXIMUM_DIMENSIONS - 1)))
            _write(sink, reason)
    return 0


def _write(sink: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[sink.write(view) :]


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1])))
