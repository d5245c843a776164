"""What the console shows and does, over a real port: studies, acts and their history, peers, models, labels."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osteo_daemon.archive.key import Identity, make_key
from osteo_daemon.archive.record import MARGIN_VOXELS, Acquisition, StudyVois, VertebraRecord
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.audit import trail
from osteo_daemon.console.explanations import read_explanations
from osteo_daemon.domain.job import JobState, Priority
from osteo_daemon.jobs.records import Delivery, DeliveryState
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.registry.registry import Registry
from osteo_daemon.settings import Settings
from osteo_daemon.vitals import Vitals
from tests.candidates import NETWORK, tiny_candidate
from tests.consoles import (
    EXCLUDED,
    FAILED,
    HELD,
    RECEIVED,
    START,
    Person,
    add_people,
    add_reported,
    console_settings,
    fill,
    running,
)
from tests.fakes import LOOPBACK, CountingScp
from tests.ports import a_free_port
from tests.report_cases import STUDY_UID

_UIDS = re.compile(r'class="uid" href="/studies/([0-9.]+)"')


class Node:
    """A console, its store and its people."""

    def __init__(self, url: str, settings: Settings, store: JobStore, delivery: Delivery, scp: CountingScp) -> None:
        self.url, self.settings, self.store, self.delivery, self.scp = url, settings, store, delivery, scp
        self.vera, self.otto, self.ada = (Person(url, name) for name in ("vera", "otto", "ada"))

    def act(self, uid: str, act: str, **fields: str) -> str:
        """What an operator's act is answered with on the study's page."""
        answer = self.otto.post(
            f"/studies/{uid}/{act}", **{"reason": "asked by ward 3", "back": f"/studies/{uid}", **fields}
        )
        assert (answer.status_code, answer.headers["location"]) == (303, f"/studies/{uid}")
        notice = re.search(r'class="notice (\w+)"[^>]*>(.*?)</p>', self.otto.get(f"/studies/{uid}").text)
        assert notice is not None
        return notice[1]

    def state(self, uid: str) -> JobState:
        """Where a study stands."""
        job = self.store.job(uid)
        assert job is not None
        return job.state


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("console")
    make_key(folder / "link.key")
    with CountingScp() as scp:
        settings = console_settings(
            folder,
            destinations=[
                {"name": "pacs", "ae_title": "PACS", "host": LOOPBACK, "port": scp.port},
                {"name": "gone", "ae_title": "PACS", "host": LOOPBACK, "port": a_free_port()},
            ],
            archive={"enabled": True, "consent": "vote", "key_file": folder / "link.key"},
            refit={"enabled": True, "site": "here"},
        )
        add_people(settings)
        store = fill(settings)
        delivery = add_reported(store, settings)
        trail.open_trail(settings, "console")
        with running(settings) as url:
            yield Node(url, settings, store, delivery, scp)
        trail.open_trail(Settings(state_dir=folder), "test")
        store.close()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [STUDY_UID, FAILED, HELD, EXCLUDED, RECEIVED]),
        ("?state=excluded", [EXCLUDED]),
        ("?state=RECEIVING", [RECEIVED]),
        ("?code=worker_died", [FAILED]),
        ("?source=CT1&since=2026-11-02&until=2026-11-03", [HELD, EXCLUDED]),
        ("?source=CT2", []),
        ("?before=4", [HELD, EXCLUDED, RECEIVED]),
    ],
)
def test_studies_are_filtered_and_paged(node: Node, query: str, expected: list[str]) -> None:
    assert _UIDS.findall(node.vera.get(f"/studies{query}").text) == expected


@pytest.mark.parametrize("query", ["?state=lost", "?since=yesterday", "?before=-1", "?before=1e3"])
def test_filters_that_are_none_are_refused(node: Node, query: str) -> None:
    assert node.vera.get(f"/studies{query}").status_code == 409


def test_a_long_list_has_pages_that_lead_on(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osteo_daemon.console.studies._ROWS", 2)
    seen, path = [], "/studies?source=CT1"
    while path:
        text = node.vera.get(path).text
        seen += _UIDS.findall(text)
        found = re.search(r'href="([^"]+)" rel="next"', text)
        path = "" if found is None else found[1].replace("&amp;", "&")
    assert seen == [STUDY_UID, FAILED, HELD, EXCLUDED, RECEIVED]


def test_a_study_is_found_by_its_uid(node: Node) -> None:
    assert node.vera.post("/studies/find", uid=f" {HELD} ").headers["location"] == f"/studies/{HELD}"
    for other in ("1.2.3.4", "../peers", "Umbrella", ""):
        assert node.vera.post("/studies/find", uid=other).headers["location"] == "/studies"


def test_the_page_of_a_study_tells_all_of_it(node: Node) -> None:
    text = node.vera.get(f"/studies/{STUDY_UID}").text
    document = node.store.result(STUDY_UID)
    assert document is not None
    flags = {flag["code"] for flag in document["quality_flags"]}
    for vertebra in document["vertebrae"]:
        assert f'data-label="Level">{vertebra["level"]}<' in text
        assert f'data-label="Mean">{vertebra["attenuation_hu"]["mean"]:.0f}<' in text
        flags |= {flag["code"] for flag in vertebra["quality_flags"]}
    assert flags
    explanations = read_explanations()
    for code in flags:
        assert explanations.flag(code).replace("'", "&#39;") in text
    assert "does not rule out low bone density" in text
    assert "INVESTIGATIONAL" in text.upper()
    assert "0xA900: not our study" in text
    for event in node.store.events(STUDY_UID):
        assert event.event.replace("_", " ") in text
    assert "Act on this study" not in text  # a viewer only looks
    assert "Act on this study" in node.otto.get(f"/studies/{STUDY_UID}").text
    assert "the slices are too thick" not in text
    assert explanations.exclusion("slices_too_thick") in node.vera.get(f"/studies/{EXCLUDED}").text


def test_the_picture_is_the_report_s(node: Node) -> None:
    answer = node.vera.get(f"/studies/{STUDY_UID}/picture.png")
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG")
    assert struct.unpack(">II", answer.content[16:24]) == (1024, 1024)
    assert node.vera.get(f"/studies/{HELD}/picture.png").status_code == 404


def test_acts_on_a_study_leave_who_and_why(node: Node) -> None:
    before = set(trail.audit_dir(node.settings).iterdir())
    assert node.act(HELD, "release") == "done"
    assert node.state(HELD) is JobState.RECEIVING
    assert node.act(HELD, "prioritise", priority="stat") == "done"
    job = node.store.job(HELD)
    assert job is not None
    assert job.priority is Priority.STAT
    assert node.act(HELD, "hold") == "done"
    assert node.act(HELD, "retry") == "done"
    assert node.state(HELD) is JobState.READY
    assert node.act(HELD, "hold") == "done"
    assert node.act(HELD, "reprocess") == "done"
    last = node.store.events(HELD)[-1]
    assert (last.who, last.event, last.reason, last.revision) == ("otto", "study_reprocessed", "asked by ward 3", 2)
    assert node.act(HELD, "hold") == "done"
    assert node.act(EXCLUDED, "release") == "failed"
    assert node.state(EXCLUDED) is JobState.EXCLUDED
    assert node.act(HELD, "prioritise", priority="soon") == "failed"
    told = [path.read_text() for path in set(trail.audit_dir(node.settings).iterdir()) - before]
    changes = [text for text in told if 'EventActionCode="U"' in text]
    assert len(changes) == 7
    assert all('UserID="otto"' in text and HELD in text for text in changes)
    assert node.otto.post(f"/studies/{HELD}/purge", reason="x").status_code == 404


def test_a_refused_delivery_is_sent_again_or_settled(node: Node) -> None:
    number = node.delivery.delivery_id
    page = f"/studies/{STUDY_UID}"
    assert node.otto.post(f"/deliveries/{number}/resend", back=page).headers["location"] == page
    assert node.store.delivery(number).state is DeliveryState.PENDING
    node.otto.post(f"/deliveries/{number}/resend", back=page)
    assert "wait for a person" in node.otto.get(page).text
    claimed = node.store.claim_delivery("w", 60)
    assert claimed is not None
    node.store.delivery_refused(claimed, "0xA900: not our study")
    node.otto.post(f"/deliveries/{number}/accept", back=page)  # without a reason
    assert node.store.delivery(number).state is DeliveryState.REFUSED
    assert node.otto.post(f"/deliveries/{number}/accept", reason="by letter").status_code == 303
    settled = node.store.delivery(number)
    assert settled.state is DeliveryState.DELIVERED
    assert "otto" in str(node.store.events(STUDY_UID))
    text = node.vera.get("/peers").text
    assert "1 delivered" in text
    assert "<time" in text.partition('data-label="Last delivered"')[2].partition("</td>")[0]


def test_a_peer_is_asked_and_its_silence_is_said(node: Node) -> None:
    node.otto.get("/peers")  # what was said before
    for name, says in (("pacs", "pacs answered in"), ("gone", "gone: ")):
        assert node.otto.post(f"/peers/destinations/{name}/ask").headers["location"] == "/peers"
        notice = re.search(r'class="notice (\w+)"[^>]*>(.*?)</p>', node.otto.get("/peers").text)
        assert notice is not None
        assert notice[2].startswith(says)
        assert (notice[1] == "done") == (name == "pacs")
    assert node.otto.post("/peers/destinations/nobody/ask").status_code == 404
    assert node.otto.post("/peers/elsewhere/pacs/ask").status_code == 404


def test_the_overview_shows_roles_and_the_queue(node: Node) -> None:
    with Vitals(node.settings.state_dir, "receiver") as vitals:
        vitals.ready()
        assert '<span class="mark good">ready</span> receiver' in node.vera.get("/overview/part").text
    part = node.vera.get("/overview/part").text
    assert '<span class="mark bad">ended</span> receiver' in part
    assert '<span class="mark warn">not seen</span> scheduler' in part
    assert "<html" not in part
    for state, count in node.store.counts_by_state().items():
        found = re.search(rf'state={state.value}">\s*<span class="count">(\d+)</span>', part)
        assert found is not None
        assert int(found[1]) == count


def test_a_model_is_shadowed_promoted_and_taken_back(node: Node, tmp_path: Path) -> None:
    registry = Registry(node.settings, node.store)
    registry.register(tiny_candidate(tmp_path / "one", "9.0.0").path, who="test", reason="test")
    registry.register(tiny_candidate(tmp_path / "two", "9.0.1", verdict="worse").path, who="test", reason="test")
    shipped = registry.deployed(NETWORK).version
    text = node.vera.get("/models").text
    assert "9.0.0" in text
    assert "Roll back" not in text
    page = f"/models/{NETWORK}/9.0.0"
    assert "a test" in node.ada.get(page).text
    assert "Promote in place of" in node.ada.get(page).text
    assert "Promote in place of" not in node.ada.get(f"/models/{NETWORK}/9.0.1").text
    assert "<button>Promote" not in node.otto.get(page).text

    assert node.ada.post(f"{page}/shadow", reason="look", back=page).headers["location"] == "/models"
    assert (shadow := registry.shadow(NETWORK)) is not None
    assert shadow.version == "9.0.0"
    assert node.ada.post(f"/models/{NETWORK}/unshadow", reason="enough", back="/models").status_code == 303
    assert registry.shadow(NETWORK) is None
    worse = f"/models/{NETWORK}/9.0.1"
    assert node.ada.post(f"{worse}/promote", reason="x", back=worse).headers["location"] == worse
    assert "it is not promoted" in node.ada.get(worse).text
    assert registry.deployed(NETWORK).version == shipped
    assert node.ada.post(f"{page}/promote", reason="", back=page).headers["location"] == page
    assert registry.deployed(NETWORK).version == shipped
    assert node.ada.post(f"{page}/promote", reason="better here", back=page).headers["location"] == "/models"
    assert registry.deployed(NETWORK).version == "9.0.0"
    assert node.ada.post(f"/models/{NETWORK}/rollback", reason="worse there", back="/models").status_code == 303
    assert registry.deployed(NETWORK).version == shipped
    made = [(change.kind.value, change.who, change.reason) for change in registry.history(NETWORK)][-2:]
    assert made == [("promoted", "ada", "better here"), ("rolled_back", "ada", "worse there")]
    assert "worse there" in node.vera.get("/models").text


def test_labels_are_looked_at_before_they_are_imported(node: Node) -> None:
    keep_voi(node)
    good = labels_csv([("P001", "2026-10-03", "L1", "0.95"), ("P404", "2026-10-03", "L1", "0.95")])
    looked = upload(node.ada, good)
    assert looked.status_code == 200, looked.text
    assert re.search(r'<span class="count">1</span><span>matched', looked.text)
    assert "no archived CT of this patient" in looked.text
    assert "P001" not in looked.text
    assert node.store.archive_labels() == []
    key = re.search(r'name="key" value="([^"]+)"', looked.text)
    assert key is not None
    flagged = {"accept_flags": "yes"} if "accept_flags" in looked.text else {}
    assert node.otto.post("/labels/import", key=key[1]).status_code == 403
    assert node.ada.post("/labels/import", key=key[1], back="/labels", **flagged).headers["location"] == "/labels"
    (label,) = node.store.archive_labels()
    assert label.level == "L1"
    ((number, done),) = node.store.label_imports()
    assert done.who == "ada"
    node.ada.post("/labels/import", key=key[1], back="/labels", **flagged)
    assert "no longer here" in node.ada.get("/labels").text
    assert "imported before" in upload(node.ada, good).text
    assert node.ada.post("/labels/forget", number=str(number)).status_code == 303
    assert node.store.archive_labels() == []

    other = good.replace(b"patient_id", b"Pat")
    assert upload(node.ada, other).status_code == 303  # refused as a whole, and said so
    assert "notice failed" in node.ada.get("/labels").text
    columns = {name: name for name in ("date", "maker", "model", "unit", "level", "bmd", "t_score")}
    mapping = "[columns]\n" + "".join(
        f'{ours} = "{theirs}"\n' for ours, theirs in {**columns, "patient_id": "Pat"}.items()
    )
    assert re.search(r'<span class="count">1</span><span>matched', upload(node.ada, other, mapping).text)
    assert upload(node.ada, other, "[columns").status_code == 303
    assert "cannot be read" in node.ada.get("/labels").text


def keep_voi(node: Node) -> None:
    """One archived CT of patient P001."""
    side = 8 + 2 * MARGIN_VOXELS
    acquisition = Acquisition("M", "S", "B30f", "soft", 120.0, 3.0, (3.0, 0.8, 0.8), "unenhanced", 66, "F", "b 1")
    record = VertebraRecord("L1", 1.0, 0.9, False, (), {"median_hu": 120.0})
    study = StudyVois(np.zeros((1, side, side, side), np.int16), 1.0, 1, acquisition, (record,), ())
    identity = Identity("P001", "", "19500101", "1.2.1", "A1", "20261001")
    assert VoiArchive(node.settings, node.store).add(study, identity, 1, START.date())


def labels_csv(rows: list[tuple[str, str, str, str]]) -> bytes:
    """Readings of a densitometer."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["patient_id", "date", "maker", "model", "unit", "level", "bmd", "t_score"])
    writer.writerows(
        [patient, day, "Hologic", "Horizon A", "g/cm2", level, bmd, ""] for patient, day, level, bmd in rows
    )
    return text.getvalue().encode()


def upload(person: Person, data: bytes, mapping: str = "") -> Any:
    """Post a file as the form does."""
    fields = {"csrf": person.csrf, "back": "/labels", "window_days": "180", "mapping": mapping}
    return person.session.post(
        person.url + "/labels/preview", data=fields, files={"file": ("labels.csv", data)}, allow_redirects=False
    )


def test_a_refit_is_asked_for_and_followed(node: Node) -> None:
    assert node.ada.post("/refits", site="../x", reason="x", back="/labels").headers["location"] == "/labels"
    assert node.store.refits() == []
    assert node.ada.post("/refits", site="here", reason="new scanner", back="/labels").status_code == 303
    (asked,) = node.store.refits()
    assert (asked.requested_by, asked.reason) == ("ada", "new scanner")
    claimed = node.store.claim_refit("w", 60)
    assert claimed is not None
    node.store.refit_goes_on(claimed, 60, {"stage": "features", "done": 3, "total": 10, "seconds_left": 90.0})
    part = node.otto.get("/labels/refits").text
    assert "features" in part
    assert '<progress max="10" value="3"' in part
    assert "1 min 30 s left" in part


def test_drift_is_drawn_with_its_limits(node: Node) -> None:
    assert "There is no report yet" in node.vera.get("/drift").text
    folder = node.settings.state_dir / "drift"
    folder.mkdir()
    chart = {
        "scope": "CT1",
        "kind": "mean",
        "feature": "L1 HU",
        "reference": 150.0,
        "current": 162.0,
        "reference_studies": 400,
        "studies": 60,
        "probability": 1e-6,
        "tests": 3,
        "dispersion": 1.0,
        "alarm": True,
        "marks": [150.0, 155.0, 170.0],
        "limits": [140.0, 160.0],
    }
    stability = {
        **chart,
        "kind": "stability",
        "feature": "manufacturer <b>",
        "marks": [],
        "limits": None,
        "alarm": False,
    }
    scope = {
        "name": "CT1",
        "reference_studies": 400,
        "current_studies": 60,
        "enough": True,
        "charts": [chart, stability],
    }
    times = {name: START.isoformat() for name in ("made_at", "reference_since", "reference_until", "current_since")}
    document = {"schema": "osteo-drift/1", **times, "tests": 3, "limit": 0.001, "scopes": [scope], "alarms": {}}
    (folder / "2026-11-01T080000Z.json").write_text(json.dumps(document))
    (folder / "2026-10-31T080000Z.json").write_text(json.dumps({**document, "scopes": []}))
    text = node.vera.get("/drift").text
    assert text.count("<circle") == 3
    assert text.count('circle class="out"') == 1
    assert "1 of 2 alarm" in text
    assert "manufacturer &lt;b&gt;" in text
    assert node.vera.get("/drift?report=2026-10-31T080000Z").text.count("<circle") == 0


def test_the_audit_log_shows_and_records_its_reader(node: Node) -> None:
    node.vera.get(f"/studies/{RECEIVED}")
    text = node.ada.get("/audit").text
    assert "DICOM Instances Accessed" in text
    assert "vera" in text
    assert RECEIVED in text
    assert "first instance" in text
    assert "Audit Log Used" in node.ada.get("/audit").text
    assert node.ada.get("/audit?before=2").text.count("first instance") == 1
