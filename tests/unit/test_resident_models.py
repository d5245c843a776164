"""Models between studies: what happens when the GPU's memory is short, and when bundles change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from osteo_daemon.errors import BundleError
from osteo_daemon.imaging.study_files import StudyFiles
from osteo_daemon.inference.localize import SpineLocalizer
from osteo_daemon.inference.resident import ResidentModels
from osteo_daemon.settings import Settings
from tests.ct_series import column, write_slices


class FullMemory:
    """A GPU whose memory is full for the first calls of the localizer's network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.devices: list[int] = []  # of each call: which localizer it was
        honest = SpineLocalizer.label

        def label(localizer: SpineLocalizer, canonical: Any) -> Any:
            self.devices.append(id(localizer))
            if len(self.devices) <= times:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return honest(localizer, canonical)

        monkeypatch.setattr(SpineLocalizer, "label", label)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFiles:
    folder = tmp_path_factory.mktemp("empty")
    return StudyFiles.read(write_slices(folder, np.zeros((50, 16, 16), dtype=np.int16), column(50, 2.5)))


def _models(**screener: Any) -> ResidentModels:
    return ResidentModels(
        Settings.model_validate({"screener": {"device": "cpu", "network_enabled": False, **screener}})
    )


def _code(resident: ResidentModels, study: StudyFiles) -> str:
    exclusion = resident.screen(study, lambda _stage: None).result.exclusion
    assert exclusion is not None
    return exclusion.code


def test_memory_that_was_short_for_a_moment_costs_one_retry(monkeypatch: pytest.MonkeyPatch, study: StudyFiles) -> None:
    resident, memory = _models(), FullMemory(monkeypatch, 1)
    assert _code(resident, study) == "no_lumbar_vertebra"
    assert len(memory.devices) == 2
    assert len(set(memory.devices)) == 1


def test_memory_that_stays_short_ends_on_the_cpu(monkeypatch: pytest.MonkeyPatch, study: StudyFiles) -> None:
    resident, memory = _models(), FullMemory(monkeypatch, 2)
    assert _code(resident, study) == "no_lumbar_vertebra"
    first, second, third = memory.devices
    assert first == second != third  # the third run was another localizer's, on the CPU
    assert _code(resident, study) == "no_lumbar_vertebra"
    assert memory.devices[3] == first  # the next study has the GPU again


def test_without_leave_the_cpu_is_not_used(monkeypatch: pytest.MonkeyPatch, study: StudyFiles) -> None:
    resident, memory = _models(cpu_fallback=False), FullMemory(monkeypatch, 2)
    with pytest.raises(torch.OutOfMemoryError):
        resident.screen(study, lambda _stage: None)
    assert len(memory.devices) == 2


def test_a_bundle_that_a_person_asks_for_is_loaded_for_that_study_only() -> None:
    resident = _models()
    shipped = resident.settings.screener
    assert not resident.refresh(shipped.localizer_bundle, shipped.network_bundle)
    with pytest.raises(BundleError, match="no-such-bundle"):
        resident.refresh("no-such-bundle", shipped.network_bundle)
    assert resident.models[0].bundle == shipped.localizer_bundle
    assert resident.refused is None


def test_what_was_read_ahead_gives_the_same_volume(study: StudyFiles) -> None:
    ahead = study.decode_ahead(2**30)
    assert ahead.decoded is not None
    assert study.decode_ahead(50 * 16 * 16 * 4 - 1).decoded is None
    assert ahead.decode_ahead(0).decoded is not None  # nothing is thrown away
