"""Earlier studies of one patient: linked by a keyed digest, never by a name."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from osteo_daemon.dicom.report_objects import build_report_objects
from osteo_daemon.domain.findings import Category
from osteo_daemon.domain.trend import EarlierValue, TrendPoint, patient_key
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.patient_link import LINK_FILE, link_secret, trend_point
from tests.deliveries import receive, settings_for
from tests.report_cases import STUDY_UID, indeterminate_case, synthetic_case

SECRET = b"s" * 32


def test_a_key_tells_patients_apart_and_no_name() -> None:
    key = patient_key(SECRET, "P-17", "HOSPITAL", "19560101")
    assert key is not None
    assert len(key) == 64
    assert key == patient_key(SECRET, " P-17 ", "HOSPITAL", "19560101")
    others = {
        patient_key(b"t" * 32, "P-17", "HOSPITAL", "19560101"),
        patient_key(SECRET, "P-18", "HOSPITAL", "19560101"),
        patient_key(SECRET, "P-17", "OTHER", "19560101"),
        patient_key(SECRET, "P-17", "HOSPITAL", "19560102"),
        # parts can't run into each other
        patient_key(SECRET, "P-171", "HOSPITAL", "9560101"),
    }
    assert len(others | {key}) == 6


@pytest.mark.parametrize(("patient_id", "birth_date"), [("", "19560101"), ("P-17", ""), (" ", "19560101")])
def test_who_is_not_known_is_linked_to_nobody(patient_id: str, birth_date: str) -> None:
    assert patient_key(SECRET, patient_id, "", birth_date) is None


def test_the_secret_is_made_once_by_whoever_comes_first(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _number: link_secret(state), range(32)))
    assert len(secrets) == 1
    assert [path.name for path in state.iterdir()] == [LINK_FILE]
    assert (state / LINK_FILE).stat().st_mode & 0o077 == 0
    (state / LINK_FILE).write_bytes(b"short")
    with pytest.raises(ConfigurationError, match="remove it"):
        link_secret(state)


def test_the_store_gives_earlier_values_of_the_same_patient(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    store = JobStore(settings.database_url)
    receive(store, settings)
    store.remember_value(STUDY_UID, TrendPoint("a" * 64, EarlierValue(date(2024, 5, 1), 151.0)))
    store.remember_value(STUDY_UID, TrendPoint("a" * 64, EarlierValue(date(2024, 5, 1), 149.5)))
    assert store.earlier_values("a" * 64, date(2026, 1, 5)) == (EarlierValue(date(2024, 5, 1), 149.5),)
    assert store.earlier_values("a" * 64, date(2024, 5, 1)) == ()
    assert store.earlier_values("b" * 64, date(2026, 1, 5)) == ()
    store.close()


def test_only_a_value_that_decided_is_remembered() -> None:
    request = synthetic_case()
    point = trend_point(request.result, request.source.headers[0], SECRET)
    assert point is not None
    assert point.value.study_date == date(2026, 1, 5)
    assert 150 < point.value.index_hu < 170
    header = Dataset()
    header.update(request.source.headers[0])
    header.StudyDate = ""
    assert trend_point(request.result, header, SECRET) is None
    doubtful = dataclasses.replace(request.result, category=Category.INDETERMINATE)
    assert trend_point(doubtful, request.source.headers[0], SECRET) is None
    assert indeterminate_case().result.category is Category.INDETERMINATE
    assert trend_point(indeterminate_case().result, request.source.headers[0], SECRET) is None


def test_a_trend_changes_the_picture_and_so_the_uids() -> None:
    request = synthetic_case()
    plain = build_report_objects(request)
    earlier = (EarlierValue(date(2021, 3, 1), 171.0), EarlierValue(date(2024, 11, 2), 149.0))
    with_trend = build_report_objects(dataclasses.replace(request, earlier=earlier))
    assert plain.picture_png != with_trend.picture_png
    uids = [{built.sop_instance_uid for built in report.objects} for report in (plain, with_trend)]
    assert not uids[0] & uids[1]
