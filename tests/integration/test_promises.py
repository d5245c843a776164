"""Storage commitment for senders: what is promised, what never is, how they hear of it; pynetdicom and Orthanc ask."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt

from osteo_daemon.dicom.commitment import STORAGE_COMMITMENT_CLASS_UID as COMMITMENT
from osteo_daemon.dicom.commitment import STORAGE_COMMITMENT_INSTANCE_UID as WELL_KNOWN
from osteo_daemon.domain.job import JobState
from osteo_daemon.errors import IllegalTransition
from osteo_daemon.jobs.pledges import RequestState
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.promises import Promises
from osteo_daemon.receiver import Receiver
from osteo_daemon.scheduler import Scheduler
from osteo_daemon.settings import Settings, load_settings
from tests.fakes import (
    CALLED,
    CALLING,
    LOOPBACK,
    RoleProcess,
    a_free_port,
    local_receiver,
    settings_text,
    storescu,
    until,
    write_ct,
)
from tests.orthanc import AE_TITLE, running_orthanc

CT, SR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.88.33"


@dataclass
class Node:
    settings: Settings
    port: int
    store: JobStore
    ahead_seconds: float = 0.0

    def promises(self) -> Promises:
        ahead = timedelta(seconds=self.ahead_seconds)
        return Promises(self.settings, self.store, clock=lambda: datetime.now(UTC) + ahead)


@contextmanager
def running_node(folder: Path, peer_port: int, *, keep: str = CALLING, peer: str = CALLING) -> Iterator[Node]:
    """A receiver whose one source may ask, and reports go to ``peer_port``."""
    address = f'commitment = {{ ae_title = "{peer}", host = "{LOOPBACK}", port = {peer_port} }}'
    text = settings_text(folder / "state", 0).replace("[completeness]", f"{address}\n\n[completeness]")
    text = text.replace(f'"{CALLING}"', f'"{peer}"')
    kept = f'"{peer}"' if keep == CALLING else keep
    config = folder / "osteo.toml"
    config.write_text(text + f"\n[keep]\nsources = [{kept}]\n[commitment_scp]\nenabled = true\n")
    settings = load_settings(config)
    receiver = Receiver(settings)
    receiver.start()
    store = JobStore(settings.database_url)
    try:
        yield Node(settings, receiver.port, store)
    finally:
        store.close()
        receiver.stop(grace_seconds=0.0)


class Requester:
    """A modality that asks for commitments and hears the reports."""

    def __init__(self, port: int = 0, status: int = 0x0000) -> None:
        self.status = status
        self.reports: list[tuple[int, Dataset]] = []
        entity = AE(ae_title=CALLING)
        entity.add_supported_context(COMMITMENT, scu_role=False, scp_role=True)
        handlers = [(evt.EVT_N_EVENT_REPORT, self._heard)]
        self._server = entity.start_server((LOOPBACK, port), block=False, evt_handlers=handlers)
        self.port = self._server.server_address[1]

    def __enter__(self) -> Requester:
        return self

    def __exit__(self, *_reason: object) -> None:
        self._server.shutdown()

    def _heard(self, event: Any) -> tuple[int, None]:
        self.reports.append((event.event_type, event.event_information))
        return self.status, None

    @property
    def last(self) -> tuple[int, set[str], dict[str, int]]:
        """Event type, committed UIDs and failed UIDs with their reasons."""
        event_type, information = self.reports[-1]
        return (
            event_type,
            {item.ReferencedSOPInstanceUID for item in information.get("ReferencedSOPSequence", [])},
            {item.ReferencedSOPInstanceUID: item.FailureReason for item in information.get("FailedSOPSequence", [])},
        )


def ask(port: int, transaction: str, items: list[tuple[str, str]], **more: Any) -> int:
    """Send a request; gives the status."""
    information = Dataset()
    information.TransactionUID = transaction
    information.ReferencedSOPSequence = []
    for sop_class, uid in items:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        information.ReferencedSOPSequence.append(item)
    entity = AE(ae_title=CALLING)
    entity.add_requested_context(COMMITMENT)
    link = entity.associate(LOOPBACK, port, ae_title=CALLED)
    try:
        answer, _ = link.send_n_action(information, more.get("action", 1), COMMITMENT, more.get("instance", WELL_KNOWN))
        return int(answer.Status)
    finally:
        link.release()


def item_of(path: Path) -> tuple[str, str]:
    header = dcmread(path, stop_before_pixels=True)
    return str(header.SOPClassUID), str(header.SOPInstanceUID)


def finished(store: JobStore, study: str) -> None:
    """Bring a study to EXCLUDED long ago."""
    past = datetime.now(UTC) - timedelta(days=400)
    store.mark_complete(study, who="test", reason="test", now=past)
    job = store.claim("w", 60, now=past)
    assert job is not None
    store.exclude(job, "no_ct_series", "none", {}, now=past)


def test_what_is_kept_is_promised_and_nothing_removes_it(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=3)
    items = [item_of(path) for path in files]
    study = str(dcmread(files[0]).StudyInstanceUID)
    with Requester() as modality, running_node(tmp_path, modality.port) as node:
        assert storescu(node.port, files).returncode == 0
        assert ask(node.port, "1.2.3.1", items) == 0
        assert modality.reports == []
        assert node.promises().run() == "1 reported"
        assert modality.last == (1, {uid for _, uid in items}, {})
        assert modality.reports[0][1].TransactionUID == "1.2.3.1"
        assert node.promises().run() == ""

        finished(node.store, study)
        spool = Spool(node.settings.spool_dir)
        here = spool.received_files(study)
        # the site changes its mind: what was promised stays
        plain = node.settings.model_copy(update={"keep": Settings().keep})
        scheduler = Scheduler(plain)
        assert "images" not in scheduler.retain()
        before = datetime.now(UTC)
        assert not node.store.purge_finished(study, spool, before=before, images=True, reports=False)
        for force in (False, True):
            with pytest.raises(IllegalTransition, match="promised"):
                node.store.purge_study(study, spool, "operator", "test", force=force)
        assert spool.received_files(study) == here
        # a person who says so
        node.store.purge_study(study, spool, "operator", "test", also_committed=True)
        assert spool.received_files(study) == []
        assert not node.store.is_committed(study)


def test_a_source_that_is_kept_keeps_its_images_before_anybody_asks(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=2)
    study = str(dcmread(files[0]).StudyInstanceUID)
    with running_node(tmp_path, 1) as node:
        assert storescu(node.port, files).returncode == 0
        finished(node.store, study)
        scheduler = Scheduler(node.settings)
        assert "images" not in scheduler.retain()
        plain = Scheduler(node.settings.model_copy(update={"keep": Settings().keep}))
        assert plain.retain() == "1 images"
        # gone is gone: asked about it now, we say so
        assert ask(node.port, "1.2.3.9", [item_of(files[0])]) == 0
        node.promises().run()
        request = node.store.pledge_request(CALLING, "1.2.3.9")
        assert request is not None
        assert request.failures == {item_of(files[0])[1]: 0x0112}


def test_each_failure_has_its_reason_and_what_is_not_kept_is_never_promised(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=4)
    items = [item_of(path) for path in files]
    with Requester() as modality, running_node(tmp_path, modality.port) as node:
        assert storescu(node.port, files).returncode == 0
        damaged = node.store.stored_instance(items[1][1])
        assert damaged is not None
        content = bytearray(damaged.path.read_bytes())
        content[-1] ^= 1
        damaged.path.write_bytes(content)
        lost = node.store.stored_instance(items[2][1])
        assert lost is not None
        lost.path.unlink()
        unknown, odd = generate_uid(), ("1.2.840.10008.5.1.4.1.1.4", generate_uid())
        wanted = [items[0], items[1], items[2], (SR, items[3][1]), (CT, unknown), odd]
        assert ask(node.port, "1.2.3.2", wanted) == 0
        node.promises().run()
        assert modality.last == (
            2,
            {items[0][1]},
            {items[1][1]: 0x0110, items[2][1]: 0x0110, items[3][1]: 0x0119, unknown: 0x0112, odd[1]: 0x0122},
        )
    (tmp_path / "other").mkdir()
    with Requester() as modality, running_node(tmp_path / "other", modality.port, keep="") as node:
        assert storescu(node.port, files).returncode == 0
        assert ask(node.port, "1.2.3.3", items) == 0
        node.promises().run()
        assert modality.last == (2, set(), {uid: 0x0110 for _, uid in items})
        assert not node.store.is_committed(str(dcmread(files[0]).StudyInstanceUID))


def test_a_transaction_asked_twice_is_one_and_one_used_for_other_objects_is_refused(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=2)
    items = [item_of(path) for path in files]
    with Requester() as modality, running_node(tmp_path, modality.port) as node:
        assert storescu(node.port, files[:1]).returncode == 0
        assert ask(node.port, "1.2.3.4", items) == 0
        assert ask(node.port, "1.2.3.4", items[::-1]) == 0
        assert ask(node.port, "1.2.3.4", items[:1]) == 0x0115
        node.promises().run()
        assert modality.last[2] == {items[1][1]: 0x0112}
        assert len(modality.reports) == 1
        # asked again after the report: looked at anew, since it was not heard or the rest has come
        assert storescu(node.port, files[1:]).returncode == 0
        assert ask(node.port, "1.2.3.4", items) == 0
        node.promises().run()
        assert modality.last == (1, {uid for _, uid in items}, {})
        assert len(modality.reports) == 2


def test_requests_that_cannot_be_taken_are_declined(tmp_path: Path) -> None:
    with running_node(tmp_path, 1) as node:
        for transaction, items, more, status in (
            ("1.2.3.5", [], {}, 0x0115),
            ("1.2.3.5", [(CT, "no UID")], {}, 0x0106),
            ("", [(CT, "1.2")], {}, 0x0115),
            ("1.2.3.5", [(CT, "1.2")], {"action": 2}, 0x0123),
            ("1.2.3.5", [(CT, "1.2")], {"instance": "1.2.3"}, 0x0112),
        ):
            assert ask(node.port, transaction, items, **more) == status, (transaction, items, more)
        assert node.store.due_pledges() == []
    text = settings_text(tmp_path / "state", 0) + "\n[commitment_scp]\nenabled = true\n"
    (tmp_path / "none.toml").write_text(text)
    receiver = Receiver(load_settings(tmp_path / "none.toml"))  # no address to report to: nobody may ask
    receiver.start()
    try:
        assert ask(receiver.port, "1.2.3.5", [(CT, "1.2")]) == 0x0124
    finally:
        receiver.stop(grace_seconds=0.0)
    # off, while the class is offered all the same: a destination reports on it
    archive = f'\n[[destinations]]\nname = "pacs"\nae_title = "PACS"\nhost = "{LOOPBACK}"\nport = 104\n'
    with local_receiver(tmp_path, settings_text(tmp_path / "state", 0, extra=archive)) as port:
        assert ask(port, "1.2.3.5", [(CT, "1.2")]) == 0x0118


def test_a_report_that_nobody_takes_is_repeated_and_at_last_given_up(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=1)
    port = a_free_port()
    with running_node(tmp_path, port) as node:
        assert storescu(node.port, files).returncode == 0
        for transaction in ("1.2.3.6", "1.2.3.7"):
            assert ask(node.port, transaction, [item_of(files[0])]) == 0
        node.promises().run()  # nobody listens
        first, second = (node.store.pledge_request(CALLING, uid) for uid in ("1.2.3.6", "1.2.3.7"))
        assert first is not None
        assert second is not None
        # promised and owed; the second did not wait for the same time-out
        assert (first.state, first.attempts, second.state, second.attempts) == (
            RequestState.JUDGED,
            1,
            RequestState.JUDGED,
            0,
        )
        assert node.store.is_committed(str(dcmread(files[0]).StudyInstanceUID))
        with Requester(port, status=0x0110) as deaf:
            node.promises().run()
            assert len(deaf.reports) == 1
            node.ahead_seconds = 60
            node.promises().run()  # a new process: nothing lives but in the store
            assert len(deaf.reports) == 2
        with Requester(port) as modality:
            node.ahead_seconds = 7200
            assert node.promises().run() == "2 reported"
            assert {report.TransactionUID for _, report in modality.reports} == {"1.2.3.6", "1.2.3.7"}
        assert ask(node.port, "1.2.3.8", [item_of(files[0])]) == 0
        node.ahead_seconds = 8 * 24 * 3600
        node.promises().run()
        third = node.store.pledge_request(CALLING, "1.2.3.8")
        assert third is not None
        assert third.state is RequestState.GIVEN_UP
        assert node.store.forget_pledge_requests(datetime.now(UTC) + timedelta(days=30)) == 3
        assert node.store.is_committed(str(dcmread(files[0]).StudyInstanceUID))


def test_a_scheduler_that_was_killed_reports_after_its_start(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=2)
    items = [item_of(path) for path in files]
    port = a_free_port()
    with running_node(tmp_path, port) as node:
        config = tmp_path / "osteo.toml"
        config.write_text(config.read_text().replace("enabled = true", "enabled = true\npoll_seconds = 0.2"))
        assert storescu(node.port, files).returncode == 0
        assert ask(node.port, "1.2.3.11", items) == 0
        command = ["run", "scheduler", "--config", str(config)]
        first = RoleProcess(command, tmp_path / "first.log").start()
        first.wait_for("commitment_untold", 40)
        assert first.stop(signal.SIGKILL) != 0
        # the promise outlived it; the report is owed
        with Requester(port) as modality:
            request = node.store.pledge_request(CALLING, "1.2.3.11")
            assert request is not None
            assert request.state is RequestState.JUDGED
            node.store.pledge_unreported(request, datetime.now(UTC), "the pause is over")
            second = RoleProcess(command, tmp_path / "second.log").start()
            try:
                until(lambda: modality.reports, 60)
            finally:
                assert second.stop() == 0
            assert modality.last == (1, {uid for _, uid in items}, {})
    assert not any(uid in (tmp_path / "first.log").read_text() for uid in ("Virtual", "V1^"))


def test_what_changes_between_look_and_promise_is_not_promised(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=2)
    items = [item_of(path) for path in files]
    with running_node(tmp_path, 1) as node:
        assert storescu(node.port, files).returncode == 0
        assert ask(node.port, "1.2.3.10", items) == 0
        (request,) = node.store.due_pledges()
        seen = [instance for instance, _ in node.store.asked_instances(items).values()]
        header = dcmread(files[1])
        header.PatientName = "Other^Name"
        header.save_as(files[1])
        assert storescu(node.port, files[1:]).returncode == 0
        judged = node.store.pledge(request, seen, {})
        assert judged.failures == {items[1][1]: 0x0110}
        study = seen[0].study_instance_uid
        job = node.store.job(study)
        assert job is not None
        assert job.state is JobState.RECEIVING
        node.store.purge_study(study, Spool(node.settings.spool_dir), "op", "test", force=True, also_committed=True)
        assert node.store.pledge(request, seen, {}).failures.keys() == {uid for _, uid in items}
        assert not node.store.is_committed(study)


def test_orthanc_asks_and_hears(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct", count=3)
    ports = a_free_port(), a_free_port()
    modalities: dict[str, Any] = {}
    with running_node(tmp_path, ports[0], peer=AE_TITLE) as node:
        modalities["osteo"] = {"AET": CALLED, "Host": LOOPBACK, "Port": node.port, "AllowStorageCommitment": True}
        with running_orthanc(tmp_path / "orthanc", *ports, modalities=modalities) as orthanc:
            uploaded = [_post(orthanc.url, "/instances", path.read_bytes())["ID"] for path in files]
            sent = _post(orthanc.url, "/modalities/osteo/store", json.dumps(uploaded[:2]).encode())
            assert sent["FailedInstancesCount"] == 0
            asked = _post(
                orthanc.url, "/modalities/osteo/storage-commitment", json.dumps({"Resources": uploaded}).encode()
            )
            transaction = asked["ID"]
            assert orthanc.get(f"/storage-commitment/{transaction}")["Status"] == "Pending"
            assert node.promises().run() == "1 reported"
            shown = until(lambda: _ended(orthanc.get(f"/storage-commitment/{transaction}")))
            assert shown["Status"] == "Failure"
            assert {entry["SOPInstanceUID"] for entry in shown["Success"]} == {item_of(path)[1] for path in files[:2]}
            (failure,) = shown["Failures"]
            assert failure["SOPInstanceUID"] == item_of(files[2])[1]
            # its words for 0x0112
            assert failure["Description"].startswith("One or more of the elements in the Referenced SOP Instance Sequ")


def _ended(shown: dict[str, Any]) -> dict[str, Any] | None:
    return shown if shown["Status"] != "Pending" else None


def _post(url: str, path: str, body: bytes) -> Any:
    request = urllib.request.Request(f"{url}{path}", data=body, method="POST")  # noqa: S310 - loopback http
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.loads(answer.read())
