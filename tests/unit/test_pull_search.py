"""Searching and pacing of a pull, without an archive: spans, lists, hours, rate, and what a retrieval came to."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osteo_daemon.domain.archive import FoundSeries, FoundStudies, FoundStudy, Retrieved, Span, Wanted
from osteo_daemon.errors import ConfigurationError, OsteoError, PeerBusy, Refused
from osteo_daemon.jobs.pull_rows import PulledState, StudyHere
from osteo_daemon.pull.criteria import Criteria
from osteo_daemon.pull.pace import Hours, Rate
from osteo_daemon.pull.plan import judge, plan_series
from osteo_daemon.pull.search import Identities, read_identities, search

FIRST = date(2020, 1, 1)
CT = "1.2.840.10008.5.1.4.1.1.2"


@dataclass(frozen=True)
class Held:
    """A study of the archive of these tests."""

    uid: str
    day: date
    minute: int | None = 0  # None: no Study Time
    patient: str = "P"
    modalities: tuple[str, ...] = ("CT",)
    description: str = ""


@dataclass
class SlyCatalogue:
    """Answers no more than ``most``, with an error when that is not all; it may ignore who is asked for."""

    held: list[Held]
    most: int = 1000
    error: OsteoError | None = None
    names_patients: bool = True
    ignores_patients: bool = False
    questions: list[tuple[Span | None, str]] = field(default_factory=list)

    def studies(
        self, span: Span | None, modality: str, maximum: int, *, patient_id: str = "", accession_number: str = ""
    ) -> FoundStudies:
        self.questions.append((span, patient_id))
        matching = [
            entry
            for entry in self.held
            if (span is None or span.first <= entry.day <= span.last)
            and (span is None or not span.times or _in(entry.minute, span))
            and (self.ignores_patients or not patient_id or entry.patient == patient_id)
        ]
        given_ = matching[: min(self.most, maximum)]
        studies = tuple(
            FoundStudy(e.uid, modalities=e.modalities, description=e.description, patient_id=e.patient) for e in given_
        )
        whole = len(matching) < maximum and len(matching) <= self.most
        return FoundStudies(studies, None if whole else (self.error or PeerBusy("more")))

    def series(self, study_instance_uid: str) -> tuple[FoundSeries, ...]:
        raise NotImplementedError

    def images(self, study_instance_uid: str, series_instance_uid: str) -> Mapping[str, str] | None:
        raise NotImplementedError


def _in(minute: int | None, span: Span) -> bool:
    return minute is not None and span.first_minute <= minute <= span.last_minute


def _found(catalogue: SlyCatalogue, span: Span | None, maximum: int = 500, **more: object) -> list[str]:
    wanted = more.pop("wanted", Wanted())
    studies = search(catalogue, wanted, span, maximum, stopping=threading.Event(), **more)  # type: ignore[arg-type]
    return [study.study_instance_uid for study in studies]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1439)), max_size=60, unique=True),
    st.integers(2, 8),
    st.booleans(),
)
def test_ranges_are_split_until_everything_is_found_once(
    places: list[tuple[int, int]], most: int, refuses: bool
) -> None:
    held = [Held(f"1.{number}", FIRST + timedelta(days=day), minute) for number, (day, minute) in enumerate(places)]
    catalogue = SlyCatalogue(held, most, Refused("too many") if refuses else None)
    found = _found(catalogue, Span(FIRST, FIRST + timedelta(days=40)), maximum=most)
    assert sorted(found) == sorted(entry.uid for entry in held)
    assert len(set(found)) == len(found)


def test_more_in_one_minute_than_an_answer_holds_is_an_error_not_a_loss() -> None:
    held = [Held(f"1.{number}", FIRST, 77) for number in range(9)]
    with pytest.raises(PeerBusy):
        _found(SlyCatalogue(held, 5), Span(FIRST, FIRST), maximum=5)


def test_a_study_without_a_time_counts_when_it_was_told() -> None:
    held = [Held("1.0", FIRST, None), *(Held(f"1.{number}", FIRST, number) for number in range(1, 8))]
    assert len(_found(SlyCatalogue(held, 4), Span(FIRST, FIRST), maximum=4)) == 8


@given(st.dates(date(1990, 1, 1), date(2030, 1, 1)), st.integers(0, 400))
def test_halves_of_a_span_are_the_span(first: date, days: int) -> None:
    spans = [Span(first, first + timedelta(days=days))]
    minutes = 0
    while spans:
        span = spans.pop()
        if span.first != span.last:
            spans.extend(span.halves())
            continue
        minutes += span.last_minute - span.first_minute + 1
    assert minutes == (days + 1) * 1440
    assert Span(first, first, 5, 5).halves() == ()


def test_keys_of_a_span() -> None:
    assert Span(FIRST, FIRST).dates == "20200101"
    assert Span(FIRST, date(2020, 2, 3)).dates == "20200101-20200203"
    assert Span(FIRST, FIRST).times == ""
    assert Span(FIRST, FIRST, 61, 125).times == "010100-020559.999999"


def test_strangers_are_never_added_to_a_list() -> None:
    held = [Held("1.1", FIRST, patient="A"), Held("1.2", FIRST, patient="B"), Held("1.3", FIRST, patient="C")]
    catalogue = SlyCatalogue(held, ignores_patients=True)
    assert _found(catalogue, None, identities=Identities(("A", "C"))) == ["1.1", "1.3"]
    assert [question[1] for question in catalogue.questions] == ["A", "C"]


def test_a_list_for_the_web_is_compared_here() -> None:
    held = [Held("1.1", FIRST, patient="A"), Held("1.2", FIRST, patient="B")]
    catalogue = SlyCatalogue(held, names_patients=False)
    assert _found(catalogue, Span(FIRST, FIRST), identities=Identities(("B",))) == ["1.2"]
    assert [question[1] for question in catalogue.questions] == [""]
    with pytest.raises(ConfigurationError, match="range of dates"):
        _found(catalogue, None, identities=Identities(("B",)))


def test_what_is_wanted() -> None:
    held = [
        Held("1.1", FIRST, modalities=("CT", "SR"), description="ct abdomen nativ"),
        Held("1.2", FIRST, modalities=("MR",), description="CT ABDOMEN"),
        Held("1.3", FIRST, modalities=(), description="CT Abdomen"),  # the archive does not say
        Held("1.4", FIRST, description="CT Thorax"),
    ]
    wanted = Wanted(description="*Abdomen*")
    assert _found(SlyCatalogue(held), Span(FIRST, FIRST), wanted=wanted) == ["1.1", "1.3"]


SERIES = (
    FoundSeries("2.1", "CT", "ABDOMEN"),
    FoundSeries("2.2", "CT", ""),
    FoundSeries("2.3", "CT", "HEAD"),
    FoundSeries("2.4", "SR"),
)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (Wanted(), ["2.1", "2.2", "2.3"]),
        (Wanted(body_parts=("ABDOMEN",)), ["2.1", "2.2"]),
        (Wanted(body_parts=("ABDOMEN",), whole_study=True), ["2.1", "2.2", "2.3", "2.4"]),
        (Wanted(modalities=("PT",), whole_study=True), []),
        (Wanted(modalities=("SR", "CT"), body_parts=("HEAD",)), ["2.2", "2.3", "2.4"]),
    ],
)
def test_which_series(wanted: Wanted, chosen: list[str]) -> None:
    assert [entry.series_instance_uid for entry in wanted.chosen(SERIES)] == chosen


def test_lists_are_read_and_never_quoted(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("# for the study\n\nA-1\n B-2 \nA-1\n", encoding="utf-8")
    identities = read_identities(path, orders=True)
    assert identities.values == ("A-1", "B-2")
    assert "A-1" not in repr(identities)
    for wrong in ("A*\n", "A?\n", "A\\B\n", "x" * 65, "A\tB\n", "# nobody\n"):
        path.write_text(f"SECRET\n{wrong}" if wrong[0] != "#" else wrong, encoding="utf-8")
        with pytest.raises(ConfigurationError) as error:
            read_identities(path, orders=False)
        assert "SECRET" not in str(error.value)
        assert wrong.strip("#\n ")[:4] not in str(error.value).replace("names nobody", "")


NOON = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("hours", "at", "waits"),
    [
        ("", NOON, 0),
        ("20:00-06:00", NOON, 8 * 3600),
        ("20:00-06:00", NOON.replace(hour=20), 0),
        ("20:00-06:00", NOON.replace(hour=5, minute=59), 0),
        ("20:00-06:00", NOON.replace(hour=6), 14 * 3600),
        ("08:00-11:30", NOON, 20 * 3600),
        ("08:00-11:30", NOON.replace(hour=11, minute=29), 0),
        ("08:00-08:00", NOON, 0),
    ],
)
def test_hours(hours: str, at: datetime, waits: float) -> None:
    assert Hours.parse(hours).wait_seconds(at) == waits


def test_rate_is_even() -> None:
    rate = Rate(60)
    assert rate.wait_seconds(1000.0) == 0
    rate.begun(1000.0)
    assert rate.wait_seconds(1010.0) == 50.0
    assert rate.wait_seconds(1061.0) == 0
    free = Rate(0)
    free.begun(1000.0)
    assert free.wait_seconds(1000.0) == 0


def test_criteria_survive_the_store() -> None:
    wanted = Wanted(("CT", "PT"), ("ABDOMEN",), "*x*", True)
    for criteria in (Criteria(), Criteria(wanted, Span(FIRST, date(2021, 1, 1)), 7, 3, True)):
        assert Criteria.of(criteria.document()) == criteria


def _here(
    stored: Mapping[str, str] | None = None, own: tuple[str, ...] = (), quarantined: tuple[str, ...] = ()
) -> StudyHere:
    return StudyHere(stored or {}, frozenset(own), frozenset(quarantined), False)


def test_what_is_missing_of_a_series() -> None:
    series, taken = FoundSeries("2.1", "CT", instances=4), frozenset({CT})
    images = {"a": CT, "b": CT, "c": "", "d": "1.9.9"}
    planned = plan_series(series, {"a": CT, "b": CT}, _here(), taken)
    assert planned is not None
    assert planned.asked_for == ()  # all of it: the series at once
    planned = plan_series(series, images, _here({"a": "2.1"}, own=("x",)), taken)
    assert planned is not None
    assert planned.asked_for == ("b", "c")  # not the class that would be refused
    assert plan_series(series, images, _here({"a": "2.1", "b": "2.1"}, own=("c",)), taken) is None
    assert plan_series(series, images, _here({"a": "2.1", "c": "2.1"}, quarantined=("b",)), taken) is None
    # an archive that tells no images is asked for the series, until as many are here as it says
    assert plan_series(series, None, _here({"a": "2.1"}), taken) is not None
    assert plan_series(series, None, _here(dict.fromkeys("abcd", "2.1")), taken) is None


def test_what_a_retrieval_came_to() -> None:
    series = FoundSeries("2.1", "CT", instances=2)
    planned = plan_series(series, {"a": CT, "b": CT}, _here(), frozenset({CT}))
    assert planned is not None
    both, one = _here({"a": "2.1", "b": "2.1"}), _here({"a": "2.1"})
    assert judge([planned], Retrieved(), _here(), both).state is PulledState.FETCHED
    # the archive's list of failures does not count against what is stored
    assert judge([planned], Retrieved(frozenset({"a"})), _here(), both).state is PulledState.FETCHED
    partly = judge([planned], Retrieved(), _here(), one)
    assert (partly.state, partly.instances, partly.detail) == (PulledState.WANTED, 1, "1 of 2 objects did not come")
    refused = judge([planned], Retrieved(refused={"b": "no DICOM"}), _here(), one)
    assert (refused.state, refused.detail) == (PulledState.FAILED, "1 objects refused here: no DICOM")
    conflict = judge([planned], Retrieved(), _here(), _here({"a": "2.1"}, quarantined=("b",)))
    assert conflict.state is PulledState.FAILED
    untold = plan_series(series, None, _here(), frozenset({CT}))
    assert untold is not None
    assert judge([untold], Retrieved(), _here(), one).state is PulledState.WANTED
    assert judge([untold], Retrieved(), _here(), both).state is PulledState.FETCHED
