"""When a study is complete: headers, rhythm, verdicts, and the store's part in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from osteo_daemon.completeness import CompletenessSweep
from osteo_daemon.dicom.header_facts import read_facts
from osteo_daemon.dicom.source_count import SourceCount
from osteo_daemon.domain.announcement import (
    AnnouncedInstance,
    Announcement,
    AnnouncementKind,
    AnnounceOutcome,
    StepState,
)
from osteo_daemon.domain.completeness import (
    GAPS_KEPT,
    GAPS_NEEDED,
    OPEN_ASSOCIATION_FACTOR,
    Count,
    Evidence,
    Lacks,
    Lists,
    Outcome,
    QuietLimits,
    Rhythm,
    SliceOrder,
    Slices,
    judge,
    largest_gap,
    rhythm_of,
    with_gap,
)
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.slice_order import LUMBAR_EXTENT_MM, ImageFacts, slices_of_study
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.pledges import RequestState
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import Settings
from tests.ct_series import column, write_slices
from tests.fakes import write_ct
from tests.postgres import Cluster
from tests.stores import new_sqlite

CT, SR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.88.33"
ENHANCED = "1.2.840.10008.5.1.4.1.1.2.1"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
LIMITS = QuietLimits(60, 20, 300, 10, 900, 300)
RHYTHM = Rhythm(60, 10)
START = datetime(2026, 1, 2, 3, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def image(number: int | None, place_mm: float, series: str = "1", **more: object) -> ImageFacts:
    facts = {"position_mm": (5.0, -3.0, place_mm), "directions": AXIAL, "acquisition_number": 1}
    return ImageFacts(series, instance_number=number, **{**facts, **more})  # type: ignore[arg-type]


def stack(numbers: Sequence[int], step_mm: float = 5.0, series: str = "1", **more: object) -> list[ImageFacts]:
    return [image(number, -step_mm * number, series, **more) for number in numbers]


WHOLE = range(1, 61)
SHORT = range(1, int(LUMBAR_EXTENT_MM // 5))


@pytest.mark.parametrize(
    ("images", "order"),
    [
        (stack(WHOLE), SliceOrder.EVEN),
        (stack(WHOLE)[::-1], SliceOrder.EVEN),
        (stack([*WHOLE][1:]), SliceOrder.UNKNOWN),  # the first is missing, or they are numbered so
        (stack([*WHOLE][::2]), SliceOrder.UNKNOWN),  # every other one: perhaps it was made so
        (stack(SHORT), SliceOrder.UNKNOWN),  # too short for a lumbar spine
        (stack([n for n in WHOLE if n != 30]), SliceOrder.HOLE),
        (stack([n for n in WHOLE if n not in (2, 3, 40)]), SliceOrder.HOLE),
        (stack([3, 9, 10, 14, 30]), SliceOrder.HOLE),  # any order of sending
        # the numbers know of no slice between: two stacks
        ([*stack(range(1, 31)), *(image(n, -5.0 * (n + 4)) for n in range(31, 61))], SliceOrder.UNKNOWN),
        # a number is left out and no place is
        ([image(n + (n > 30), -5.0 * n) for n in WHOLE], SliceOrder.UNKNOWN),
        # the spacing changes
        ([*stack(range(1, 31)), *(image(n, -150.0 - 3.0 * (n - 30)) for n in range(31, 61))], SliceOrder.UNKNOWN),
        # two phases at the same places
        ([*stack(range(1, 31)), *(image(n, -5.0 * (n - 30)) for n in range(31, 61))], SliceOrder.UNKNOWN),
        (stack(WHOLE, directions=None), SliceOrder.UNKNOWN),
        ([*stack(WHOLE), image(61, -305.0, directions=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0))], SliceOrder.UNKNOWN),
        ([image(None, -5.0 * n) for n in WHOLE], SliceOrder.UNKNOWN),
        ([image(n, -5.0 * n + 0.1 * (n % 2)) for n in WHOLE], SliceOrder.EVEN),  # rounded positions
        (stack(WHOLE, images_in_acquisition=60), SliceOrder.COUNTED),
        (stack(SHORT, images_in_acquisition=len(SHORT)), SliceOrder.COUNTED),
        (stack(WHOLE, images_in_acquisition=61), SliceOrder.EVEN),  # of several reconstructions
        (stack([*WHOLE][:40], images_in_acquisition=60, acquisition_number=None), SliceOrder.UNKNOWN),
        ([image(n, 0.0, images_in_acquisition=60) for n in WHOLE], SliceOrder.UNKNOWN),  # all at one place
        (
            [
                *stack(range(1, 31), images_in_acquisition=30),
                *stack(range(31, 61), images_in_acquisition=30, acquisition_number=2),
            ],
            SliceOrder.COUNTED,
        ),
        ([*stack(WHOLE), *stack([n for n in WHOLE if n != 5], series="2")], SliceOrder.HOLE),
        ([*stack(WHOLE), *stack(range(1, 4), series="2")], SliceOrder.UNKNOWN),  # the second has only begun
        ([*stack(WHOLE), *stack(WHOLE, series="2", images_in_acquisition=60)], SliceOrder.EVEN),
        ([*stack(WHOLE), *stack([1, 2], series="2", localizer=True)], SliceOrder.EVEN),
        (stack([1, 2], localizer=True), SliceOrder.UNKNOWN),
        ([ImageFacts("1", multi_frame=True)], SliceOrder.COUNTED),
        ([ImageFacts("1", multi_frame=True, concatenation_uid="9", parts=2)], SliceOrder.HOLE),
        ([ImageFacts("1", multi_frame=True, concatenation_uid="9", parts=2)] * 2, SliceOrder.COUNTED),
        ([ImageFacts("1", multi_frame=True, concatenation_uid="9")], SliceOrder.UNKNOWN),
        ([], SliceOrder.UNKNOWN),
    ],
)
def test_what_headers_prove(images: list[ImageFacts], order: SliceOrder) -> None:
    found = slices_of_study(images)
    assert found.order is order
    assert bool(found.detail) == (order is not SliceOrder.UNKNOWN)


def test_facts_are_read_from_real_headers(tmp_path: Path) -> None:
    paths = write_ct(tmp_path, count=60, ImagesInAcquisition=60, AcquisitionNumber=2)
    facts = [read_facts(path, CT, "1.2", ExplicitVRLittleEndian) for path in paths]
    assert facts[2] == ImageFacts("1.2", 3, 2, 60, (-10.0, -20.0, 6.0), AXIAL)
    assert slices_of_study(facts).order is SliceOrder.COUNTED
    voxels, places = np.zeros((1, 4, 4), int), column(1, 1.0)
    (scout,) = write_slices(tmp_path / "scout", voxels, places, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert read_facts(scout, CT, "1", ExplicitVRLittleEndian).localizer
    (bare,) = write_slices(tmp_path / "bare", voxels, places, InstanceNumber=None, ImagePositionPatient=None)
    assert read_facts(bare, CT, "1", ExplicitVRLittleEndian).instance_number is None
    # unknown, never an error
    assert read_facts(paths[0], CT, "1", DeflatedExplicitVRLittleEndian) == ImageFacts("1")
    assert read_facts(tmp_path / "none", CT, "1", ExplicitVRLittleEndian) == ImageFacts("1")
    broken = tmp_path / "broken"
    for cut in (0, 100, 140, 200, 400):
        broken.write_bytes(paths[0].read_bytes()[:cut])
        read_facts(broken, CT, "1", ExplicitVRLittleEndian)


def test_the_rhythm_of_a_source_is_learnt_within_bounds_and_outliers_do_not_count() -> None:
    assert rhythm_of([1.0] * (GAPS_NEEDED - 1), LIMITS) == Rhythm(60, 10)
    assert rhythm_of([1.0] * GAPS_NEEDED, LIMITS) == Rhythm(20, 10)
    assert rhythm_of([*[1.0] * (GAPS_NEEDED - 1), 200.0], LIMITS) == Rhythm(20, 10)
    assert rhythm_of([40.0] * 20, LIMITS) == Rhythm(80, 60)
    assert rhythm_of([*[1.0] * 38, 290.0, 290.0], LIMITS) == Rhythm(20, 10)
    assert rhythm_of([*[1.0] * 30, *[200.0] * 10], LIMITS) == Rhythm(300, 300)
    # a site that sets less than the bounds means it
    assert rhythm_of([0.1] * 40, QuietLimits(2, 20, 300, 10, 900)) == Rhythm(2, 2)
    assert rhythm_of((), QuietLimits(2, 20, 300, 10, 900)) == Rhythm(2, 2)
    gaps: list[float] = []
    for gap in range(GAPS_KEPT + 5):
        gaps = with_gap(gaps, gap)
    assert gaps == list(range(5, GAPS_KEPT + 5))
    assert largest_gap([30.0, 0.0, 1.0], LIMITS) == 29.0
    assert largest_gap([0.0, 1.0, 5000.0, 5002.0], LIMITS) == 2.0  # another sending
    assert largest_gap([7.0], LIMITS) is None
    assert largest_gap([0.0, 50.0, 53.0], LIMITS, {0.0}) == 3.0  # an open association spoke for it
    assert largest_gap([0.0, 50.0], LIMITS, {0.0}) == 0.0
    assert largest_gap([0.0, 5000.0], LIMITS) is None


DONE = Lists("MPPS", ended=True, listed=60, here=60)
ABSENT = Lists("MPPS", ended=True, listed=90, here=60, absent=1)
HOLE = Slices(SliceOrder.HOLE, "a hole")
EVEN = Slices(SliceOrder.EVEN, "60 images")
COUNTED = Slices(SliceOrder.COUNTED, "all 60 images")


@pytest.mark.parametrize(
    ("evidence", "complete_after", "outcome"),
    [
        (Evidence(0, False, "CT"), 60, Outcome.COMPLETE),
        (Evidence(0, True, "CT"), 60 * OPEN_ASSOCIATION_FACTOR, Outcome.COMPLETE),
        (Evidence(0, True, "CT", DONE), 0, Outcome.COMPLETE),
        (Evidence(0, False, "CT", Lists("MPPS", ended=True, listed=60, here=60, unlisted=1)), 60, Outcome.COMPLETE),
        # a series that was listed and of which nothing came: perhaps it comes yet, perhaps it is not sent here
        (Evidence(0, False, "CT", ABSENT), 300, Outcome.INCOMPLETE),
        (Evidence(0, True, "CT", ABSENT), 60 * OPEN_ASSOCIATION_FACTOR, Outcome.INCOMPLETE),
        (Evidence(0, False, "CT", ABSENT, EVEN), 300, Outcome.INCOMPLETE),
        (Evidence(0, False, "CT", slices=COUNTED, count=Count(0, "60", absent=2)), 300, Outcome.INCOMPLETE),
        (Evidence(0, False, "CT", slices=HOLE, count=Count(0, "60", absent=2)), 900, Outcome.INCOMPLETE),
        (Evidence(0, False, "CT", Lists("MPPS", ended=True, listed=60, here=59, missing=1)), 900, Outcome.INCOMPLETE),
        (Evidence(0, False, "CT", Lists("MPPS", in_progress=True, listed=60, here=60)), 900, Outcome.INCOMPLETE),
        (Evidence(0, False, "CT", Lists("MPPS", True, True, 60, 60)), 900, Outcome.INCOMPLETE),
        (Evidence(0, True, "CT", count=Count(0, "60")), 10, Outcome.COMPLETE),
        (Evidence(0, False, "CT", count=Count(3, "57")), 900, Outcome.INCOMPLETE),
        (Evidence(0, False, "CT", slices=EVEN), 10, Outcome.COMPLETE),
        (Evidence(0, True, "CT", slices=EVEN), 600, Outcome.COMPLETE),
        (Evidence(0, True, "CT", slices=COUNTED), 10, Outcome.COMPLETE),
        (Evidence(0, False, "CT", slices=EVEN, asking=True), 60, Outcome.COMPLETE),
        (Evidence(0, False, "CT", slices=EVEN, count=Count(1, "59")), 900, Outcome.INCOMPLETE),
        (Evidence(0, False, "CT", slices=HOLE), 900, Outcome.INCOMPLETE),
        (Evidence(0, False, "CT", DONE, HOLE), 900, Outcome.INCOMPLETE),
    ],
)
def test_verdicts(evidence: Evidence, complete_after: float, outcome: Outcome) -> None:
    if complete_after:
        before = judge(_quiet(evidence, complete_after - 0.001), RHYTHM, LIMITS)
        assert before.outcome is Outcome.WAIT
    verdict = judge(_quiet(evidence, complete_after), RHYTHM, LIMITS)
    assert verdict.outcome is outcome
    assert verdict.reason
    assert (verdict.lacks is None) == (outcome is Outcome.COMPLETE)


@pytest.mark.parametrize(
    ("evidence", "complete_after"),
    [
        (Evidence(0, False, "CT", ABSENT), 60),
        (Evidence(0, False, "CT", ABSENT, EVEN), 10),
        (Evidence(0, False, "CT", slices=EVEN, count=Count(0, "60", absent=2)), 10),
        (Evidence(0, False, "CT", count=Count(0, "60", absent=2)), 60),  # a count of some series proves nothing
    ],
)
def test_a_site_that_gets_some_series_only_waits_for_no_other(evidence: Evidence, complete_after: float) -> None:
    limits = QuietLimits(60, 20, 300, 10, 900, 0)
    assert judge(_quiet(evidence, complete_after - 0.001), RHYTHM, limits).outcome is Outcome.WAIT
    verdict = judge(_quiet(evidence, complete_after), RHYTHM, limits)
    assert (verdict.outcome, verdict.lacks) == (Outcome.COMPLETE, None)


def _quiet(evidence: Evidence, seconds: float) -> Evidence:
    return Evidence(seconds, *(getattr(evidence, name) for name in Evidence.__slots__[1:]))


def _evidence() -> st.SearchStrategy[Evidence]:
    few = st.integers(0, 3)
    lists = st.builds(Lists, st.just("MPPS"), st.booleans(), st.booleans(), few, few, few, few, few)
    slices = st.sampled_from([Slices(), HOLE, EVEN, COUNTED])
    count = st.none() | st.builds(Count, few, st.just("n"), few)
    return st.builds(Evidence, st.floats(0, 5000), st.booleans(), st.just("CT"), lists, slices, count, st.booleans())


@given(_evidence(), st.lists(st.floats(0, 300), max_size=GAPS_KEPT))
def test_every_wait_ends_and_what_is_missing_is_waited_for(evidence: Evidence, gaps: list[float]) -> None:
    rhythm = rhythm_of(gaps, LIMITS)
    verdict = judge(evidence, rhythm, LIMITS)
    lacks = (
        evidence.lists.missing
        or evidence.lists.in_progress
        or evidence.slices.order is SliceOrder.HOLE
        or (evidence.count is not None and evidence.count.missing)
    )
    absent = evidence.lists.absent or (evidence.count is not None and evidence.count.absent)
    if verdict.outcome is Outcome.WAIT:
        # the time that is named is the time at which it ends, if nothing more is learnt
        assert 0 < verdict.wait_seconds <= LIMITS.maximum_seconds * OPEN_ASSOCIATION_FACTOR
        later, looks = verdict, 0
        quiet = evidence.quiet_seconds
        while later.outcome is Outcome.WAIT:
            quiet += later.wait_seconds + 1e-6
            later = judge(_quiet(evidence, quiet), rhythm, LIMITS)
            looks += 1
        assert looks <= 2  # once when headers and counts are worth looking at, once at the end
    elif lacks:
        assert (verdict.outcome, verdict.lacks) == (Outcome.INCOMPLETE, Lacks.IMAGES)
        assert evidence.quiet_seconds >= LIMITS.missing_seconds
    elif absent:
        assert (verdict.outcome, verdict.lacks) == (Outcome.INCOMPLETE, Lacks.SERIES)
        assert evidence.quiet_seconds >= LIMITS.series_seconds
    else:
        assert verdict.outcome is Outcome.COMPLETE


@pytest.mark.parametrize(
    ("count", "here", "all_here", "expected"),
    [
        (SourceCount({"1": 60}, None), {"1": 60}, 61, Count(0, "60 images of 1 series are here")),
        (SourceCount({"1": 60}, None), {"1": 57}, 58, Count(3, "57 images of 1 series are here")),
        (SourceCount({"1": 60}, None), {"1": 61}, 61, Count(0, "61 images of 1 series are here")),
        # one does not make up for another
        (SourceCount({"1": 60, "2": 5}, None), {"1": 61, "2": 4}, 65, Count(1, "65 images of 2 series are here")),
        (SourceCount({"1": 60, "2": 5}, None), {"1": 60}, 60, Count(0, "60 images of 1 series are here", 1)),
        (SourceCount({"1": 60, "2": 5}, None), {"1": 59}, 59, Count(1, "59 images of 1 series are here", 1)),
        (SourceCount({"1": 60, "2": None}, None), {"1": 60}, 60, Count(0, "60 images of 1 series are here", 1)),
        (SourceCount({"1": 60, "2": 0}, None), {"1": 60}, 60, Count(0, "60 images of 1 series are here")),
        (SourceCount({"1": None}, None), {"1": 60}, 60, None),
        (SourceCount({}, 61), {"1": 60}, 60, Count(1, "60 objects are here")),
        (SourceCount({}, 60), {"1": 59}, 60, Count(0, "60 objects are here")),
        (SourceCount({}, None), {"1": 60}, 60, None),
    ],
)
def test_counts_are_compared_by_series(
    count: SourceCount, here: dict[str, int], all_here: int, expected: Count | None
) -> None:
    assert count.beside(here, all_here) == expected


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobStore]:
    """A store of each kind: what holds on one must hold on the other."""
    if request.param == "sqlite":
        store = new_sqlite(tmp_path)
        yield store
        store.close()
        return
    server: Cluster = request.getfixturevalue("postgres")
    store = JobStore(url := server.new())
    yield store
    store.close()
    server.drop(url)


def receive(store: JobStore, uid: str, seconds: float, *, series: str = "7.1", sop_class: str = CT) -> None:
    instance = SopInstance("7", series, sop_class, uid, "1.2", Path("/x"), 1, "0" * 64)
    store.record_instance(instance, "CT1", screenable=sop_class == CT, now=at(seconds))


def listed(*uids: str, series: str = "7.1", sop_class: str = CT) -> tuple[AnnouncedInstance, ...]:
    return tuple(AnnouncedInstance(series, sop_class, uid) for uid in uids)


def step(*instances: AnnouncedInstance, uid: str = "9", state: StepState = StepState.IN_PROGRESS) -> Announcement:
    return Announcement(uid, AnnouncementKind.MPPS, "CT1", state, frozenset({"7"}), instances)


def test_lists_are_compared_with_what_is_here(store: JobStore) -> None:
    assert store.lists("7", [CT]) == Lists()
    assert store.announce(step(), now=at(0)) is AnnounceOutcome.DONE
    assert store.announce(step(), now=at(0)) is AnnounceOutcome.DUPLICATE
    assert store.lists("7", [CT]) == Lists("MPPS", in_progress=True)
    for uid in ("7.1.1", "7.1.2"):
        receive(store, uid, 1)
    receive(store, "7.3.1", 1, series="7.3", sop_class=SR)
    change = ("9", "CT1", StepState.IN_PROGRESS, listed("7.1.1", "7.1.9"))
    assert store.amend_announcement(*change, now=at(2)) is AnnounceOutcome.DONE
    assert store.lists("7", [CT]) == Lists("MPPS", True, False, listed=2, here=1, missing=1, unlisted=1)
    # a change brings all there is
    whole = (*listed("7.1.1", "7.1.2"), *listed("7.2.1", series="7.2"), *listed("7.3.9", series="7.3", sop_class=SR))
    assert store.amend_announcement("9", "CT1", StepState.COMPLETED, whole, now=at(3)) is AnnounceOutcome.DONE
    assert store.lists("7", [CT]) == Lists("MPPS", False, True, listed=3, here=2, absent=1)
    assert not store.lists("7", [CT]).complete
    receive(store, "7.2.1", 4, series="7.2")
    assert store.lists("7", [CT]).complete
    for uid, peer, outcome in (
        ("9", "CT1", AnnounceOutcome.ENDED),
        ("9", "CT2", AnnounceOutcome.FOREIGN),
        ("8", "CT1", AnnounceOutcome.UNKNOWN),
    ):
        assert store.amend_announcement(uid, peer, StepState.COMPLETED, None) is outcome
    second = Announcement("10", AnnouncementKind.IAN, "PACS", StepState.COMPLETED, frozenset({"7"}), listed("7.1.3"))
    store.announce(second, now=at(5))
    lists = store.lists("7", [CT])
    assert (lists.kinds, lists.listed, lists.missing) == ("IAN and MPPS", 4, 1)
    assert store.forget_announcements(at(4)) == 1
    assert store.lists("7", [CT]) == Lists("IAN", False, True, listed=1, here=0, missing=1, unlisted=3)
    assert store.forget_announcements(at(6)) == 1
    assert store.lists("7", [CT]) == Lists()


def test_a_study_that_changed_since_it_was_judged_goes_nowhere(store: JobStore) -> None:
    receive(store, "7.1.1", 0)
    assert store.receiving_studies(10, now=at(9)) == []
    (study,) = store.receiving_studies(10, now=at(10))
    assert study.quiet_seconds(at(25)) == 25
    receive(store, "7.1.2", 10)
    assert store.complete_study(study, event="study_complete", reason="test", now=at(30)) is None
    (study,) = store.receiving_studies(10, now=at(30))
    store.announce(step(), now=at(30))
    assert store.complete_study(study, event="study_complete", reason="test", now=at(30)) is None
    (study,) = store.receiving_studies(1000, now=at(30))  # something is announced: looked at whatever the time
    done = store.complete_study(study, event="study_complete", reason="why", gap_seconds=10.0, now=at(31))
    assert done is not None
    assert done.state is JobState.READY
    assert store.source_gaps() == {"CT1": [10.0]}
    assert [(entry.event, entry.reason) for entry in store.events("7")][-1] == ("study_complete", "why")
    assert store.receiving_studies(0, now=at(99)) == []


def test_a_pause_that_an_open_association_speaks_for_teaches_nothing(store: JobStore) -> None:
    now = [0.0]
    sweep = CompletenessSweep(Settings(), store, clock=lambda: at(now[0]))

    def arrive(uid: str, seconds: float, association: str | None) -> None:
        instance = SopInstance("7", "7.1", CT, uid, "1.2", Path("/x"), 1, "0" * 64)
        store.record_instance(instance, "CT1", association_id=association, now=at(seconds))

    def swept(*moments: float) -> int:
        done = 0
        for moment in moments:
            now[0] = moment
            done += len(sweep.run())
        return done

    arrive("1", 0, "a")
    arrive("2", 1, "a")
    assert swept(20, 60, 119) == 0  # open
    arrive("3", 120, "a")
    store.association_closed("a")
    assert swept(135, 150) == 0
    arrive("4", 160, None)  # forty seconds after an association has ended
    assert swept(200, 219) == 0
    assert swept(220) == 1
    assert store.source_gaps() == {"CT1": [40.0]}
    assert store.events("7")[-1].reason == "nothing came for 60 s, the quiet time of CT1"
    assert swept(221) == 0
    arrive("5", 230, "b")
    arrive("6", 231, "b")
    assert swept(290) == 0
    arrive("7", 291, "b")
    store.association_closed("b")
    assert swept(351) == 1  # what came late tells how long the pause was that looked like the end
    assert store.source_gaps() == {"CT1": [40.0, 70.0]}
    sweep.close()


def test_requests_and_promises_are_rows(store: JobStore) -> None:
    for uid in ("7.1.1", "7.1.2"):
        receive(store, uid, 0)
    items = [(CT, "7.1.1"), (CT, "7.1.2"), (CT, "7.1.3"), (CT, "7.1.1")]
    assert store.request_pledge("CT1", "5", items, now=at(1))
    assert store.request_pledge("CT1", "5", items[::-1], now=at(2))
    assert not store.request_pledge("CT1", "5", items[:1], now=at(2))
    assert store.request_pledge("CT2", "5", items[:1], now=at(2))  # transactions are a requester's own
    first, second = store.due_pledges(now=at(3))
    assert (first.requester_ae, first.state, len(first.items)) == ("CT1", RequestState.ASKED, 3)
    found = store.asked_instances(first.items)
    assert {uid: ae for uid, (_, ae) in found.items()} == {"7.1.1": "CT1", "7.1.2": "CT1"}
    judged = store.pledge(first, [instance for instance, _ in found.values()], {"7.1.3": 0x0112}, now=at(4))
    assert (judged.state, judged.failures) == (RequestState.JUDGED, {"7.1.3": 0x0112})
    assert store.is_committed("7")
    assert store.pledge(second, [found["7.1.1"][0]], {}, now=at(4)).failures == {}  # promised twice is promised
    store.pledge_unreported(judged, at(60), "away", now=at(5))
    assert [entry.requester_ae for entry in store.due_pledges(now=at(59))] == ["CT2"]
    (judged, _) = store.due_pledges(now=at(60))
    assert (judged.attempts, judged.detail) == (1, "away")
    store.pledge_reported(judged, now=at(61))
    store.pledge_reported(judged, now=at(62))
    assert store.request_pledge("CT1", "5", items, now=at(70))
    (_, again) = store.due_pledges(now=at(70))
    assert (again.state, again.attempts, again.requested_at) == (RequestState.ASKED, 0, at(70))
    assert store.purgeable_images(at(999)) == []
