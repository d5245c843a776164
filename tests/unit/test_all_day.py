"""An association that stays open all day: what is told of its studies does not wait for its end, and is told once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from osteo_daemon.audit import trail
from osteo_daemon.audit.spool import AuditSpool
from osteo_daemon.dicom.received import ReceivedObject, received_file
from osteo_daemon.discards import Discards
from osteo_daemon.jobs.records import RecordOutcome
from osteo_daemon.settings import AccompanyingSettings, AuditSettings, Settings
from osteo_daemon.transfers import OPEN_STUDIES, ReceivedTransfers
from tests.audit_repository import kind_of, xml_of
from tests.fakes import CALLING, LOOPBACK, write_ct

STUDIES = 3 * OPEN_STUDIES
PICTURE = "1.2.840.10008.5.1.4.1.1.7"


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[ReceivedObject, Path]]]:
    """Two pictures of each study, over one association."""
    folder = tmp_path_factory.mktemp("day")
    return [
        [
            (received_file(path.read_bytes(), source_ae=CALLING, address=LOOPBACK, association_id="day"), path)
            for path in write_ct(folder / str(number), count=2, size=4, seed=number, SOPClassUID=PICTURE)
        ]
        for number in range(STUDIES)
    ]


@pytest.fixture
def audit(tmp_path: Path) -> Iterator[AuditSpool]:
    trail.open_trail(Settings(state_dir=tmp_path, audit=AuditSettings(enabled=True)), "receiver")
    yield AuditSpool(tmp_path / "audit", 1 << 20)
    trail.open_trail(Settings(state_dir=tmp_path), "test")


def _transferred(audit: AuditSpool) -> Counter[str]:
    """How many objects of each study the messages tell."""
    found: Counter[str] = Counter()
    for path in audit.waiting(1000):
        message = xml_of(path.read_bytes())
        if kind_of(message) == "DICOM Instances Transferred":
            (sop_class,) = message.iter("SOPClass")
            study = message.findall("ParticipantObjectIdentification")[0].attrib["ParticipantObjectID"]
            found[study] += int(sop_class.attrib["NumberOfInstances"])
    return found


def test_transfers(day: list[list[tuple[ReceivedObject, Path]]], audit: AuditSpool) -> None:
    transfers = ReceivedTransfers()
    studies = []
    for pair in day:
        for received, path in pair:
            transfers.note(received, path, RecordOutcome.STORED)
        studies.append(pair[0][0].identifiers.study_instance_uid)
    assert _transferred(audit) == Counter(dict.fromkeys(studies[:-OPEN_STUDIES], 2))
    transfers.note(*day[-1][0], RecordOutcome.DUPLICATE)
    transfers.ended("day")
    assert _transferred(audit) == Counter(dict.fromkeys(studies, 2)) + Counter(studies[-1:])


def test_discards(day: list[list[tuple[ReceivedObject, Path]]]) -> None:
    discards = Discards(AccompanyingSettings(pictures="discard"))
    with capture_logs() as lines:
        for pair in day:
            assert all(discards.take(received) for received, _path in pair)
        assert len(lines) == STUDIES - OPEN_STUDIES
        discards.association_closed("day")
        assert discards.take(day[0][0][0])  # again: told already
        discards.association_closed("day")
    assert [line["event"] for line in lines] == ["accompanying_discarded"] * STUDIES
    assert len({line["study_instance_uid"] for line in lines}) == STUDIES
    assert {line["detail"] for line in lines} == {"pictures 2"}
