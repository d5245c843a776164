"""How much one peer may announce: objects and steps of one list, its bytes, and bytes in an hour, over a real port."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, generate_uid
from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import N_CREATE

from osteo_daemon.dicom import normalized
from osteo_daemon.dicom.performed_procedure import MAXIMUM_STEPS
from osteo_daemon.jobs.store import JobStore
from tests.fakes import CALLED, CALLING, LOOPBACK, local_receiver, settings_text, storescu, until, write_ct
from tests.integration.test_announcements import IAN, MPPS, begun, scu

DONE, TOO_MUCH = 0x0000, 0x0213
LIMIT = 40


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[int, JobStore]]:
    with local_receiver(tmp_path) as port:
        store = JobStore(f"sqlite:///{tmp_path / 'state' / 'jobs.sqlite'}")
        yield port, store
        store.close()


def references(count: int) -> list[Dataset]:
    found = []
    for _ in range(count):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, generate_uid()
        found.append(item)
    return found


def performed(count: int) -> Dataset:
    """A change that lists so many objects, in three series and as two kinds."""
    changes = Dataset()
    changes.PerformedSeriesSequence = []
    every = references(count)
    for part in (every[0::3], every[1::3], every[2::3]):
        series = Dataset()
        series.SeriesInstanceUID = generate_uid()
        series.ReferencedImageSequence, series.ReferencedNonImageCompositeSOPInstanceSequence = part[2:], part[:2]
        changes.PerformedSeriesSequence.append(series)
    return changes


def create_step(link: Any, study: str, count: int) -> int:
    attributes = begun(study)
    attributes.update(performed(count))
    return int(link.send_n_create(attributes, MPPS, generate_uid())[0].Status)


def change_step(link: Any, study: str, count: int) -> int:
    uid = generate_uid()
    assert link.send_n_create(begun(study), MPPS, uid)[0].Status == DONE
    return int(link.send_n_set(performed(count), MPPS, uid)[0].Status)


def notify(link: Any, study: str, count: int) -> int:
    notification = Dataset()
    notification.StudyInstanceUID = study
    notification.ReferencedSeriesSequence = []
    every = references(count)
    for part in (every[0::2], every[1::2]):
        for item in part:
            item.InstanceAvailability = "ONLINE"
        series = Dataset()
        series.SeriesInstanceUID, series.ReferencedSOPSequence = generate_uid(), part
        notification.ReferencedSeriesSequence.append(series)
    return int(link.send_n_create(notification, IAN, generate_uid())[0].Status)


@pytest.mark.parametrize("announce", [create_step, change_step, notify])
def test_objects_of_one_list(
    node: tuple[int, JobStore], monkeypatch: pytest.MonkeyPatch, announce: Callable[[Any, str, int], int]
) -> None:
    """As many as the bound are taken; with one more nothing of the list is, in whatever series it stands."""
    port, store = node
    monkeypatch.setattr(normalized, "MAXIMUM_ITEMS", LIMIT)
    with scu(port, MPPS, IAN) as link:
        for number, (count, status) in enumerate(((LIMIT, DONE), (LIMIT + 1, TOO_MUCH), (LIMIT, DONE))):
            study = f"1.2.3.{number + 1}"
            assert announce(link, study, count) == status
            assert store.lists(study, {CTImageStorage}).listed == (count if status == DONE else 0)


def test_steps_of_one_procedure(node: tuple[int, JobStore]) -> None:
    port, store = node
    with scu(port, MPPS) as link:
        for count, status in ((MAXIMUM_STEPS, DONE), (MAXIMUM_STEPS + 1, TOO_MUCH)):
            attributes = begun(f"1.2.{count}.0")
            for number in range(1, count):
                step = Dataset()
                step.StudyInstanceUID = f"1.2.{count}.{number}"
                attributes.ScheduledStepAttributesSequence.append(step)
            assert link.send_n_create(attributes, MPPS, generate_uid())[0].Status == status
            last = store.lists(f"1.2.{count}.{count - 1}", {CTImageStorage})
            assert bool(last.kinds) == (status == DONE)


def raw_status(port: int, attributes: bytes) -> int:
    """Status of an N-CREATE with these bytes as its attributes."""
    request = N_CREATE()
    request.MessageID, request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = 1, MPPS, generate_uid()
    request.AttributeList = BytesIO(attributes)
    entity = AE(ae_title=CALLING)
    entity.add_requested_context(MPPS, "1.2.840.10008.1.2")
    answers: list[Dataset] = []
    handlers = [(evt.EVT_DIMSE_RECV, lambda event: answers.append(event.message.command_set))]
    link = entity.associate(LOOPBACK, port, ae_title=CALLED, evt_handlers=handlers)
    link.dimse.send_msg(request, link.accepted_contexts[0].context_id)
    until(lambda: answers)
    link.abort()
    return int(answers[0].Status)


def sequence(items: int) -> bytes:
    """Performed Series Sequence of so many empty items, in Implicit VR Little Endian; nothing else is there."""
    return struct.pack("<HHI", 0x0040, 0x0340, 8 * items) + struct.pack("<HHI", 0xFFFE, 0xE000, 0) * items


def test_what_is_too_much_is_declined_before_it_is_decoded(
    node: tuple[int, JobStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, _store = node
    # decoded, it lacks a status
    assert raw_status(port, sequence(10)) == 0x0120
    assert raw_status(port, sequence(2 * normalized.MAXIMUM_ITEMS + 1)) == TOO_MUCH
    monkeypatch.setattr(normalized, "_MAXIMUM_BYTES", 79)
    assert raw_status(port, sequence(8)) == 0x0120
    assert raw_status(port, sequence(9)) == TOO_MUCH


def test_lists_count_against_the_bytes_of_an_hour(tmp_path: Path) -> None:
    extra = "[quotas]\nbytes_per_hour_per_ae_title = 3000\n"
    with local_receiver(tmp_path, settings_text(tmp_path / "state", 0, extra=extra)) as port:
        with scu(port, MPPS) as link:
            statuses = [create_step(link, "1.2.3", 5) for _ in range(8)]
        taken = statuses.count(DONE)
        assert 1 <= taken <= 4
        assert statuses == [DONE] * taken + [TOO_MUCH] * (8 - taken)
        assert storescu(port, write_ct(tmp_path / "ct", count=1)).returncode != 0
