"""The computing process: what it reads ahead, and what it says of a study that it could not screen."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from osteo_daemon.ahead import Ahead
from osteo_daemon.errors import BundleError, Damaged, SpoolFull, StoreUnavailable
from osteo_daemon.inference.resident import ResidentModels
from osteo_daemon.link import Link
from osteo_daemon.screening_worker import ScreeningWorker
from osteo_daemon.settings import Settings
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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_who_is_charged_and_when_the_process_is_spent(
    tmp_path: Path, link: _Pair, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.model_validate(
        {"state_dir": tmp_path, "site": {"trend": False}, "screener": {"device": "cpu", "network_enabled": False}}
    )
    worker = ScreeningWorker(link, settings)
    monkeypatch.setattr(ResidentModels, "device", torch.device(device))  # only told: the models are on the CPU
    names = {key: getattr(settings.screener, key) for key in ("localizer_bundle", "network_bundle")}
    message = {**_message([]), "token": 1, "predecessors": {}, "lacks": None, **names}

    def answer(error: Exception) -> dict[str, Any]:
        def fail(*_arguments: object) -> None:
            raise error

        monkeypatch.setattr(ResidentModels, "screen", fail)
        said = worker._answer(message, None)
        return {key: value for key, value in said.items() if key != "detail"}

    for passing in (SpoolFull("no room"), StoreUnavailable("locked")):
        assert answer(passing) == {"type": "retry", "code": type(passing).__name__, "charged": False}
    assert answer(BundleError("changed")) == {"type": "retry", "code": "BundleError"}
    assert answer(Damaged("cut")) == {"type": "held", "code": "Damaged"}
    assert answer(MemoryError()) == {"type": "retry", "code": "MemoryError"}
    failed_kernel = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert answer(failed_kernel) == {"type": "retry", "code": "RuntimeError", "spent": device == "cuda"}
