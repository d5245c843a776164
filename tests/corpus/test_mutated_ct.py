"""10,000 broken CT objects: none crashes or holds up anything; each is stored or refused with a reason."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import UID, CTImageStorage, DeflatedExplicitVRLittleEndian, EnhancedCTImageStorage
from pynetdicom import AE, build_context
from pynetdicom.dimse_primitives import C_STORE

from osteo_daemon.dicom.contexts import TRANSFER_SYNTAXES
from osteo_daemon.dicom.header import read_identifiers
from osteo_daemon.dicom.header_facts import read_facts
from osteo_daemon.dicom.received import ReceivedObject, received_file, received_object
from osteo_daemon.errors import Damaged, DataSetMismatch, NotDicom, NotEligible, UnsupportedSopClass
from osteo_daemon.imaging.selection import other_series, select_series
from osteo_daemon.imaging.slices import ct_slices, one_study, read_headers
from osteo_daemon.imaging.study_files import StudyFiles
from osteo_daemon.inference.patient import Patient
from osteo_daemon.jobs.store import JobStore
from tests import ct_series, enhanced_ct
from tests.corpus.mutations import MUTATIONS, Encoded, Mutant, bases, mutants
from tests.enhanced_ct import write_enhanced
from tests.fakes import CALLED, CALLING, LOOPBACK, local_receiver, until, write_ct

SEED = 20261122
COUNT = 10_000
SENT = 240
READ = 150
DEFLATED = 6
KNOWN = {0x0000, 0x0122, 0xA900, 0xC000, 0xC010}


@pytest.fixture(scope="module")
def same_uids() -> Iterator[None]:
    """The same UIDs in every run: only so the same seed breaks the same bytes."""
    numbers = itertools.count(100_000_000)
    with pytest.MonkeyPatch.context() as patch:
        for module in (ct_series, enhanced_ct):
            patch.setattr(module, "generate_uid", lambda: UID(f"1.2.826.0.1.3680043.9.7433.99.{next(numbers)}"))
        yield


@pytest.fixture(scope="module")
def healthy(same_uids: None, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_ct(tmp_path_factory.mktemp("healthy"), count=40, size=16)


@pytest.fixture(scope="module")
def whole(healthy: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Encoded]:
    frames = tmp_path_factory.mktemp("frames") / "frames.dcm"
    write_enhanced(frames, healthy[:5])
    return bases(healthy[5], frames)


def _received(mutant: Mutant) -> ReceivedObject:
    """As the listener takes it, whatever its command announces: here what the data set says itself."""
    found = read_identifiers(mutant.body, mutant.syntax)
    return received_object(
        memoryview(mutant.body),
        sop_class_uid=found.sop_class_uid,
        sop_instance_uid=found.sop_instance_uid,
        transfer_syntax_uid=mutant.syntax,
        source_ae=CALLING,
        address=LOOPBACK,
        association_id="1",
    )


def test_the_same_seed_gives_the_same_bytes(whole: list[Encoded]) -> None:
    first, second = (list(mutants(whole, 50, SEED)) for _ in range(2))
    assert first == second
    assert first != list(mutants(whole, 50, SEED + 1))


def test_10000_are_taken_or_refused_with_a_reason(whole: list[Encoded]) -> None:
    """Known classes of error only, and none that takes long: this runs before anything is written."""
    begun = time.process_time()
    taken = 0
    refused: Counter[type[Damaged]] = Counter()
    made: Counter[str] = Counter()
    reasons: set[str] = set()
    slowest = 0.0
    for mutant in mutants(whole, COUNT, SEED):
        start = time.process_time()
        try:
            received = _received(mutant)
        except Damaged as error:
            refused[type(error)] += 1
            reasons.add(error.detail)
        else:
            taken += 1
            for part in (received.identifiers.study_instance_uid, received.identifiers.sop_instance_uid):
                assert set(part) <= set("0123456789."), part
                assert len(part) <= 64
            again = received_file(b"".join(received.parts), source_ae="A", address=LOOPBACK, association_id="1")
            assert again.identifiers == received.identifiers
        slowest = max(slowest, time.process_time() - start)
        made.update(mutant.made_by.split(", "))
    assert taken + refused.total() == COUNT
    assert taken >= COUNT / 4
    assert refused[NotDicom] >= COUNT / 4
    assert set(refused) <= {NotDicom, UnsupportedSopClass, DataSetMismatch}
    assert min(made[mutation.__name__] for mutation in MUTATIONS) >= COUNT / 20
    assert all(reason.isprintable() and len(reason) < 200 for reason in reasons)
    assert slowest < 1.0
    assert time.process_time() - begun < 25.0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(body=st.binary(max_size=400), syntax=st.sampled_from(TRANSFER_SYNTAXES), framed=st.booleans())
def test_any_bytes_are_an_object_or_refused(body: bytes, syntax: str, framed: bool) -> None:
    prefix = bytes(128) + b"DICM" if framed else b""
    for take in (
        lambda: read_identifiers(body, syntax),
        lambda: received_file(prefix + body, source_ae="A", address=LOOPBACK, association_id="1"),
    ):
        try:
            taken = take()
        except Damaged as error:
            refusal = str(error)
        else:
            refusal = ""
            assert taken is not None
        assert refusal.isprintable()


def _store_raw(association: Any, context_id: int, sop_class: str, sop_instance: str, body: bytes) -> int:
    request = C_STORE()
    request.MessageID = 1
    request.AffectedSOPClassUID = sop_class
    request.AffectedSOPInstanceUID = sop_instance
    request.Priority = 2
    request.DataSet = BytesIO(body)
    association.dimse.send_msg(request, context_id)
    _context, answer = association.dimse.get_msg(block=True)
    assert answer is not None, "the listener hung up"
    return int(answer.Status)


def test_hundreds_over_one_association(whole: list[Encoded], healthy: list[Path], tmp_path: Path) -> None:
    """Every answer is a known one; what was acknowledged lies there byte by byte, what was not left nothing."""
    syntaxes = sorted({base.syntax for base in whole})
    with local_receiver(tmp_path) as port:
        entity = AE(ae_title=CALLING)
        entity.requested_contexts = [
            build_context(sop_class, syntax)
            for sop_class in (CTImageStorage, EnhancedCTImageStorage)
            for syntax in syntaxes
        ]
        entity.add_requested_context("1.2.840.10008.1.1")
        entity.dimse_timeout = 120  # a comparison takes as long as a busy machine needs
        association = entity.associate(LOOPBACK, port, ae_title=CALLED)
        assert association.is_established
        accepted = {(c.abstract_syntax, c.transfer_syntax[0]): c.context_id for c in association.accepted_contexts}
        association._reactor_checkpoint.clear()
        until(lambda: association._is_paused)
        statuses: Counter[int] = Counter()
        acknowledged: dict[str, bytes] = {}
        readable = [base for base in whole if base.syntax != DeflatedExplicitVRLittleEndian]
        uids = {read_identifiers(base.body, base.syntax).sop_instance_uid for base in readable}
        for number, mutant in enumerate(mutants(readable, SENT, SEED + 2)):
            for uid in uids if number % 15 else ():
                # most under a UID of their own: a conflict costs a comparison
                own = f"{uid[:-6]}{number:06d}"
                mutant = replace(mutant, body=mutant.body.replace(uid.encode(), own.encode()))
            try:
                found = read_identifiers(mutant.body, mutant.syntax)
                sop_class, sop_instance = found.sop_class_uid, found.sop_instance_uid
            except NotDicom:
                sop_class, sop_instance = str(CTImageStorage), "1.2.3.4"
            announced = sop_class if (sop_class, mutant.syntax) in accepted else str(CTImageStorage)
            status = _store_raw(association, accepted[announced, mutant.syntax], announced, sop_instance, mutant.body)
            statuses[status] += 1
            if status == 0x0000:
                acknowledged[sop_instance] = mutant.body
        association._reactor_checkpoint.set()
        assert association.send_c_echo().Status == 0x0000
        association.release()
    assert set(statuses) <= KNOWN
    assert statuses[0x0000] >= SENT / 20
    assert statuses[0xC000] >= SENT / 20
    assert statuses[0xC010] >= 1  # two broken copies of one image: the second is kept aside

    store = JobStore(f"sqlite:///{tmp_path / 'state' / 'jobs.sqlite'}")
    kept = [store.stored_instance(uid) for uid in acknowledged]
    assert all(entry is not None and entry.path.exists() for entry in kept)
    spool = tmp_path / "state" / "spool"
    assert not list((spool / "tmp").iterdir())
    files = [path for area in ("received", "quarantine") for path in (spool / area).rglob("*.dcm")]
    assert len(files) <= statuses[0x0000] + statuses[0xC010]
    assert all(path.resolve().is_relative_to(spool.resolve()) for path in files)
    store.close()


def _screenable(mutant: Mutant, path: Path, healthy: list[tuple[Path, Dataset]]) -> str:
    """What series selection and the volume's making say of a study with a broken slice in it."""
    received = _received(mutant)
    path.write_bytes(b"".join(received.parts))
    identifiers = received.identifiers
    facts = read_facts(path, identifiers.sop_class_uid, identifiers.series_instance_uid, mutant.syntax)
    assert facts.series_instance_uid == identifiers.series_instance_uid
    headers, unreadable = read_headers([path])
    if unreadable:
        assert unreadable[0].reason.isprintable()
        return "unreadable"
    header = headers[0][1]
    # the receiver and the screener must read one and the same identity out of the same bytes
    for keyword, filed in (
        ("StudyInstanceUID", received.identifiers.study_instance_uid),
        ("SeriesInstanceUID", received.identifiers.series_instance_uid),
        ("SOPInstanceUID", received.identifiers.sop_instance_uid),
    ):
        assert str(header.get(keyword)).strip("\0 ") == filed, (keyword, mutant.made_by)
    files = StudyFiles((*headers, *healthy), ())
    try:
        one_study(files.headers)
        Patient.of(header).check_age()
        series = ct_slices(files.headers)
        candidates, _ = select_series(series)
        other_series(files.headers, series.keys())
        if candidates:
            files.volume(candidates[0].stack)
        return "read" if candidates else "refused"
    except (Damaged, NotEligible) as error:
        return type(error).__name__ if str(error).isprintable() else "says what it was sent"


def test_hundreds_through_series_selection_and_volume(
    whole: list[Encoded], healthy: list[Path], tmp_path: Path
) -> None:
    headers, _ = read_headers([path for path in healthy if path != healthy[5]])
    outcomes: Counter[str] = Counter()
    deflated = 0
    for mutant in mutants(whole, READ * 4, SEED + 3):
        try:
            _received(mutant)
        except Damaged:
            continue
        deflated += mutant.syntax == DeflatedExplicitVRLittleEndian
        if mutant.syntax == DeflatedExplicitVRLittleEndian and deflated > DEFLATED:
            continue  # each costs a decoder's start
        start = time.process_time()
        outcomes[_screenable(mutant, tmp_path / "mutant.dcm", headers)] += 1
        assert time.process_time() - start < 10.0, mutant.made_by
        if outcomes.total() == READ:
            break
    assert outcomes.total() == READ
    assert outcomes["read"] >= READ / 2
    assert outcomes["unreadable"] >= 1
    assert not outcomes["says what it was sent"]
    assert outcomes["PixelDataUnreadable"] >= 1
