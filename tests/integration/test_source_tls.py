"""What this node asks and tells sources over TLS, with Orthanc at the other end: counts, commitment reports, pulls."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from osteo_daemon.dicom.source_count import count_at_source
from osteo_daemon.domain.archive import Span
from osteo_daemon.errors import ConfigurationError, PeerUnavailable
from osteo_daemon.inquiry import Inquiries
from osteo_daemon.intake import DurableIntake
from osteo_daemon.jobs.pull_rows import PulledState, PullState
from osteo_daemon.jobs.room import Room
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.promises import Promises
from osteo_daemon.pull.archive import open_archive, taken_classes
from osteo_daemon.pull.criteria import Criteria
from osteo_daemon.pull.puller import Puller
from osteo_daemon.receiver import Receiver
from osteo_daemon.settings import Settings, load_settings
from osteo_daemon.tls import source_peer
from tests.authority import Authority, Issued
from tests.fakes import CALLED, LOOPBACK, a_free_port, until
from tests.foreign import Study, write_study
from tests.orthanc import AE_TITLE, Orthanc, running_orthanc

MOVED = "OSTEOTLS"


@dataclass(frozen=True)
class World:
    """Orthanc with TLS alone, a study in it, and certificates."""

    orthanc: Orthanc
    study: Study
    our_port: int
    our_tls_port: int
    node: Issued
    imposter: Issued
    authority: Authority
    pacs_sha256: str
    other_sha256: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("tls")
    authority, stranger = Authority(folder), Authority(folder, "Other CA")
    pacs, node = authority.issue("pacs"), authority.issue("node", rsa_bits=2048)
    imposter, our_port, our_tls_port = stranger.issue("node", stem="imposter"), a_free_port(), a_free_port()
    tls = {
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(pacs.certificate),
        "DicomTlsPrivateKey": str(pacs.key),
        "DicomTlsTrustedCertificates": str(authority.file),
        "DicomTlsRemoteCertificateRequired": True,
    }
    # it asks in plain, and hears over TLS
    us = {"AET": CALLED, "Host": LOOPBACK, "Port": our_port, "AllowStorageCommitment": True, "AllowGet": True}
    # under this name it moves to us over TLS
    moved = {"AET": MOVED, "Host": LOOPBACK, "Port": our_tls_port, "AllowMove": True, "UseDicomTls": True}
    known = {"osteo": us, "moved": moved}
    study = write_study(folder / "study")
    with running_orthanc(folder / "orthanc", a_free_port(), a_free_port(), known, more=tls) as orthanc:
        for path in study.files:
            _post(orthanc, "/instances", path.read_bytes())
        yield World(orthanc, study, our_port, our_tls_port, node, imposter, authority, pacs.sha256, node.sha256)


def _post(orthanc: Orthanc, path: str, body: bytes) -> Any:
    request = urllib.request.Request(f"{orthanc.url}{path}", data=body, method="POST")  # noqa: S310 - loopback http
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return json.loads(answer.read())


def settings_of(folder: Path, world: World, *, shown: Issued | None = None, **tls: Any) -> Settings:
    own = shown or world.node
    peer = {"ae_title": AE_TITLE, "host": LOOPBACK, "port": world.orthanc.dicom_port}
    peer |= {"tls": True, "certificates": [f"sha256:{world.pacs_sha256}"], **tls}
    return Settings.model_validate(
        {
            "state_dir": folder / "state",
            "receiver": {"port": world.our_port, "minimum_free_bytes": 0},
            "tls": {
                "certificate_file": own.certificate,
                "key_file": own.key,
                "ca_file": world.authority.file,
            },
            "sources": [{"ae_title": AE_TITLE, "addresses": [LOOPBACK], "query": peer, "commitment": peer}],
            "keep": {"sources": [AE_TITLE]},
            "commitment_scp": {"enabled": True},
            "archives": [{"name": "pacs", "retrieve": "c-get", **peer}],
        }
    )


@contextmanager
def running(settings: Settings) -> Iterator[JobStore]:
    receiver = Receiver(settings)
    receiver.start()
    store = JobStore(settings.database_url)
    try:
        yield store
    finally:
        store.close()
        receiver.stop(grace_seconds=0.0)


def test_counts_reports_and_pulls_go_over_tls(world: World, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, world)
    with running(settings) as store:
        archive = open_archive(settings, settings.archives[0], threading.Event())
        puller = Puller(
            settings.pull,
            store,
            Room(settings.spool_dir, 0, 0),
            archive,
            DurableIntake(Spool(settings.spool_dir), store),
            500,
            taken_classes(settings.accompanying),
            threading.Event(),
        )
        pull = store.create_pull("pacs", Criteria(span=Span(date(1990, 1, 1), date(2100, 1, 1))).document())
        assert puller.run(pull) is PullState.DONE
        assert len(store.study_here(world.study.uid).stored) == len(world.study.files)
        inquiries = Inquiries(settings)
        moment = (world.study.uid, datetime.now(UTC), 1)
        until(lambda: (found := inquiries.ask(AE_TITLE, moment)) is not None and found.answered)
        asked = inquiries.ask(AE_TITLE, moment)
        inquiries.close()
        assert asked is not None
        assert asked.count is not None
        assert sum(count or 0 for count in asked.count.series.values()) == len(world.study.files)
        # reported over TLS: Orthanc has no other port
        resources = [entry["ID"] for entry in world.orthanc.get("/instances?expand")]
        transaction = _post(
            world.orthanc, "/modalities/osteo/storage-commitment", json.dumps({"Resources": resources}).encode()
        )["ID"]
        assert Promises(settings, store).run() == "1 reported"
        until(lambda: world.orthanc.get(f"/storage-commitment/{transaction}")["Status"] != "Pending")


def test_a_move_comes_back_over_tls_alone(world: World, tmp_path: Path) -> None:
    text = settings_of(tmp_path, world).model_dump()
    text["receiver"] |= {"ae_title": MOVED}
    text["tls"] |= {"port": world.our_tls_port}
    (source,), (entry,) = text["sources"], text["archives"]
    source |= {"certificates": [f"sha256:{world.pacs_sha256}"], "tls_required": True}
    entry |= {"retrieve": "c-move"}
    settings = Settings.model_validate(text)
    with running(settings) as store:
        archive = open_archive(settings, settings.archives[0], threading.Event())
        puller = Puller(
            settings.pull.model_copy(update={"maximum_attempts": 1}),
            store,
            Room(settings.spool_dir, 0, 0),
            archive,
            DurableIntake(Spool(settings.spool_dir), store),
            500,
            taken_classes(settings.accompanying),
            threading.Event(),
        )
        pull = store.create_pull("pacs", Criteria(span=Span(date(1990, 1, 1), date(2100, 1, 1))).document())
        assert puller.run(pull) is PullState.DONE
        (study,) = store.pulled_studies(pull)
        assert (study.state, study.detail) == (PulledState.FETCHED, None)
        assert store.study_here(world.study.uid).stored.keys() == world.study.ct


@pytest.mark.parametrize(
    ("changes", "shown", "reason"),
    [
        ({"certificates": ["sha256:" + "0" * 64]}, None, "not one of the certificates in the settings"),
        ({"certificates": [], "server_name": "elsewhere.example.org"}, None, "Hostname mismatch"),
        ({"ca_file": "imposter"}, None, "certificate not accepted"),
        ({}, "imposter", "unknown ca|no association|perhaps it does not accept our certificate"),
        ({"tls": False}, None, "no association"),
    ],
    ids=["pinned to another", "another name", "another CA", "ours is refused", "we speak plain"],
)
def test_a_refused_certificate_gives_one_clear_line(
    world: World,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    shown: str | None,
    reason: str,
) -> None:
    if changes.get("ca_file") == "imposter":
        changes = {"ca_file": tmp_path / "other" / "ca.pem"}
        (tmp_path / "other").mkdir()
        changes["ca_file"] = Authority(tmp_path / "other", "Yet another CA").file
    settings = settings_of(tmp_path, world, shown=world.imposter if shown else None, **changes)
    (source,) = settings.sources
    assert source.query is not None
    with pytest.raises(PeerUnavailable, match=reason):
        count_at_source(source_peer(settings.tls, source.query), CALLED, world.study.uid, timeout_seconds=10)
    inquiries = Inquiries(settings)
    for number in range(3):
        moment = (world.study.uid, datetime.now(UTC), number)
        until(lambda moment=moment: (found := inquiries.ask(AE_TITLE, moment)) is None or found.answered)
    inquiries.close()
    out, err = capfd.readouterr()
    lines = [line for line in (out + err).splitlines() if "source_gives_no_count" in line]
    assert len(lines) == 1
    assert AE_TITLE in lines[0]


def test_tls_without_an_authority_refuses_to_start(tmp_path: Path) -> None:
    for key in ("query", "commitment"):
        (tmp_path / "osteo.toml").write_text(
            f'[[sources]]\nae_title = "CT1"\naddresses = ["{LOOPBACK}"]\n'
            f'{key} = {{ ae_title = "CT1", host = "{LOOPBACK}", port = 104, tls = true }}\n'
        )
        with pytest.raises(ConfigurationError, match=f"{key} of source CT1 with tls = true needs a ca_file"):
            load_settings(tmp_path / "osteo.toml")
