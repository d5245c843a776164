"""A console on a real port over a node with studies in every state, and people who use it with a plain HTTP client."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import requests
from argon2 import PasswordHasher
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from osteo_daemon.console.role import Console
from osteo_daemon.console.users import Role, UserFile, users_path
from osteo_daemon.domain.findings import Exclusion, Outcome, ScreeningResult
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.records import Delivery, NewDelivery
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import Settings
from tests.deliveries import built_report, spooled
from tests.fakes import LOOPBACK
from tests.report_cases import STUDY_UID, synthetic_case
from tests.stores import new_sqlite

START = datetime(2026, 11, 1, 8, tzinfo=UTC)
PATIENT_NAME, PATIENT_ID = "Umbrella^Ursula", "MRN-4711-X"
PASSWORD = "correct horse battery"  # noqa: S105
PEOPLE = {"vera": Role.VIEWER, "otto": Role.OPERATOR, "ada": Role.ADMINISTRATOR}
RECEIVED, EXCLUDED, HELD, FAILED = (f"1.2.840.99.{number}" for number in range(1, 5))
_CSRF = re.compile(r'name="csrf" value="([^"]+)"')


def console_settings(folder: Path, **values: Any) -> Settings:
    """A node whose console takes a free port."""
    console = {"idle_timeout_seconds": 5.0, **values.pop("console", {})}
    return Settings.model_validate(
        {
            "state_dir": folder / "state",
            "receiver": {"minimum_free_bytes": 0},
            "audit": {"enabled": True},
            "sources": [{"ae_title": "CT1", "addresses": [LOOPBACK]}],
            "console": console,
            **values,
        }
    )


def quick_users(settings: Settings) -> UserFile:
    """The node's users, hashed in a thousandth of the time: the console checks a hash by the parameters in it."""
    return UserFile(users_path(settings), PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


def add_people(settings: Settings) -> None:
    """One user of each role."""
    users = quick_users(settings)
    for name, role in PEOPLE.items():
        users.add(name, role, PASSWORD)


def fill(settings: Settings) -> JobStore:
    """A store with four studies: received, excluded, held, failed; each with one image of the same patient."""
    store, spool = new_sqlite(settings.state_dir), Spool(settings.spool_dir)
    for number, uid in enumerate((RECEIVED, EXCLUDED, HELD, FAILED)):
        when = START + timedelta(days=number)
        receive_image(store, spool, uid, when)
        if uid == RECEIVED:
            continue
        store.mark_complete(uid, who="test", reason="test", now=when)
        if uid == HELD:
            store.hold_study(uid, "test", "a reason <script>alert(1)</script>", now=when)
            continue
        job = store.claim("w", 60, now=when)
        assert job is not None
        if uid == EXCLUDED:
            why = Exclusion("slices_too_thick", "7 mm")
            result = ScreeningResult(uid, None, Outcome.EXCLUDED, why, None)
            store.exclude(job, why.code, why.reason, result.to_json(), now=when)
        else:
            store.fail(job, "worker_died", "it ended by itself", now=when)
    return store


def receive_image(store: JobStore, spool: Spool, uid: str, when: datetime) -> None:
    """One small CT image."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = CTImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = f"{uid}.1.1"
    image.StudyInstanceUID, image.SeriesInstanceUID, image.Modality = uid, f"{uid}.1", "CT"
    image.PatientName, image.PatientID = PATIENT_NAME, PATIENT_ID
    image.Rows = image.Columns = 2
    image.PixelData = np.zeros((2, 2), np.int16).tobytes()
    image.BitsAllocated = image.BitsStored = 16
    buffer = BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    stored = spool.store_instance(uid, f"{uid}.1", f"{uid}.1.1", [buffer.getvalue()])
    instance = SopInstance(
        uid,
        f"{uid}.1",
        CTImageStorage,
        f"{uid}.1.1",
        ExplicitVRLittleEndian,
        stored.path,
        stored.size_bytes,
        stored.sha256,
    )
    store.record_instance(instance, "CT1", now=when)


def add_reported(store: JobStore, settings: Settings) -> Delivery:
    """A study with a report, a picture, and a delivery that a PACS refused."""
    receive_image(store, Spool(settings.spool_dir), STUDY_UID, START + timedelta(days=9))
    store.mark_complete(STUDY_UID, who="test", reason="test")
    job = store.claim("w", 60)
    assert job is not None
    objects = spooled(settings.spool_dir, built_report())
    deliveries = [NewDelivery("pacs", tuple(entry.sop_instance_uid for entry in objects[:2]))]
    store.commit_report(job, synthetic_case().result.to_json(), objects, deliveries)
    delivery = store.claim_delivery("w", 60)
    assert delivery is not None
    store.delivery_refused(delivery, "0xA900: not our study")
    return delivery


@contextmanager
def running(settings: Settings) -> Iterator[str]:
    """The console in a thread of this process; gives its URL."""
    console = Console(settings)
    thread = threading.Thread(target=console.run)
    thread.start()
    try:
        scheme = "http" if settings.console.certificate_file is None else "https"
        yield f"{scheme}://{LOOPBACK}:{console.port}"
    finally:
        console.stop()
        thread.join(30)
        assert not thread.is_alive()


class Person:
    """Somebody with a browser that runs no script.

    Args:
        url: of the console.
        name: logs in under this name; empty: stays outside.
    """

    def __init__(self, url: str, name: str = "", password: str = PASSWORD, verify: Any = True) -> None:
        self.url = url
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.verify = verify
        self.csrf = ""
        if name:
            answer = self.log_in(name, password)
            assert answer.status_code == 303, answer.text
            self.csrf = self.token("/studies")

    def log_in(self, name: str, password: str = PASSWORD, **fields: str) -> requests.Response:
        """Fetch the form and post it."""
        token = self.token("/login")
        return self.post("/login", csrf=token, user=name, password=password, **fields)

    def token(self, path: str) -> str:
        """The CSRF token of a page's first form."""
        found = _CSRF.search(self.get(path).text)
        return "" if found is None else found[1]

    def get(self, path: str, **headers: str) -> requests.Response:
        """As a link."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.session.get(self.url + path, headers=fields, allow_redirects=False, timeout=60)

    def post(self, path: str, **fields: str) -> requests.Response:
        """As a form with the token of the session, unless ``csrf`` says otherwise."""
        form = {"csrf": self.csrf, **fields}
        return self.session.post(self.url + path, data=form, allow_redirects=False, timeout=60)
