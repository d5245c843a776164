"""Reading ahead: what was read is used for just that study, revision and set of files, and for nothing else."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from osteo_daemon.link import Link
from osteo_daemon.screening_worker import Ahead
from tests.ct_series import column, write_slices


@pytest.fixture
def link() -> Link:
    ours, theirs = socket.socketpair()
    return _Pair(ours, theirs)


class _Pair(Link):
    """A link whose other end is kept open, and read here."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        super().__init__(ours)
        self.other = Link(theirs)


def _message(paths: list[Path], revision: int = 1, study: str = "1.2.3") -> dict[str, object]:
    return {"job": 1, "study": study, "revision": revision, "paths": [str(path) for path in paths]}


def test_only_the_same_study_revision_and_files_are_used(tmp_path: Path, link: _Pair) -> None:
    paths = write_slices(tmp_path, np.zeros((50, 16, 16), dtype=np.int16), column(50, 2.5))
    for other in (_message(paths, revision=2), _message(paths[:-1]), _message(paths, study="1.2.4")):
        ahead = Ahead(2**30, link)
        ahead.start(_message(paths))
        assert ahead.take(other) is None
        assert ahead.take(_message(paths)) is None  # dropped: its memory is free
    ahead = Ahead(2**30, link)
    ahead.start(_message(paths))
    reading = ahead.take(_message(paths))
    assert reading is not None
    files = reading.result(10)
    assert files.decoded is not None
    assert files.decoded[1].voxels.shape == (50, 16, 16)
    assert link.other.receive(1) == {"type": "prefetched", "job": 1}


def test_the_next_order_does_not_touch_what_was_taken(tmp_path: Path, link: _Pair) -> None:
    paths = write_slices(tmp_path, np.zeros((50, 16, 16), dtype=np.int16), column(50, 2.5))
    ahead = Ahead(2**30, link)
    ahead.start(_message(paths))
    reading = ahead.take(_message(paths))
    ahead.start(_message(paths[:10], study="1.2.4"))
    assert reading is not None
    assert len(reading.result(10).headers) == 50


def test_a_file_that_went_meanwhile_is_no_crash(tmp_path: Path, link: _Pair) -> None:
    paths = write_slices(tmp_path, np.zeros((50, 16, 16), dtype=np.int16), column(50, 2.5))
    paths[20].unlink()
    ahead = Ahead(2**30, link)
    ahead.start(_message(paths))
    reading = ahead.take(_message(paths))
    assert reading is not None
    assert len(reading.result(10).unreadable) == 1


def test_messages_arrive_whole_in_order_and_the_end_is_told(link: _Pair) -> None:
    assert link.other.receive(0.05) is None
    sent = [{"type": "screen", "paths": ["x" * 1000] * 50}, {"type": "cancel", "token": 7}]
    for message in sent:
        link.send(message)
    assert [link.other.receive(1) for _ in sent] == sent
    link.close()
    with pytest.raises(EOFError):
        link.other.receive(1)
    with pytest.raises(EOFError):
        link.other.send({"type": "late", "paths": ["x" * 1000] * 1000})
