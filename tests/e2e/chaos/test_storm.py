"""The short form of `make chaos`: some rounds, a full disk and a refusing archive; nothing lost, nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.chaos.storm import Storm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_some_rounds(tmp_path: Path) -> None:
    said: list[str] = []
    storm = Storm(tmp_path, 5, said.append)
    try:
        for disturbance in ("disk-full", "pacs-refuses"):
            verdict = storm.batch(4, disturbance, kinds=("reported", "short"))
            assert verdict.faults == [], said
        assert storm.rounds == 8
        assert sum(storm.kills.values()) >= 6
        assert (verdict.reported, verdict.excluded) == (2, 2)
    finally:
        storm.close()
