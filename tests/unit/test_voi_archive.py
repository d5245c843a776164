"""The archive of VOIs: what is kept, for how long, and that nobody is told whose it is without the key."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from osteo_daemon.archive.key import Identity, LinkKey, make_key, new_key_path, read_key
from osteo_daemon.archive.record import MARGIN_VOXELS, Acquisition, StudyVois, VertebraRecord
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.cli import cli
from osteo_daemon.errors import ConfigurationError, Damaged, SpoolFull
from osteo_daemon.imaging.preprocess import VoiSpec
from osteo_daemon.jobs.archive_rows import Label, LabelImport
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.readiness import check_node
from osteo_daemon.settings import Settings

TODAY = date(2026, 11, 23)
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
SPEC = VoiSpec((8, 8, 8), 1.0)
LEVELS = ("L1", "L2", "L3")


def settings_of(folder: Path, **archive: object) -> Settings:
    values = {"enabled": True, "consent": "vote 1", "key_file": folder / "keys" / "link.key", **archive}
    receiver = {"minimum_free_bytes": 0, "low_free_bytes": 1}
    return Settings.model_validate({"state_dir": folder / "state", "archive": values, "receiver": receiver})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = settings_of(tmp_path)
    assert made.archive.key_file is not None
    make_key(made.archive.key_file)
    return made


@pytest.fixture
def archive(settings: Settings) -> VoiArchive:
    return VoiArchive(settings, JobStore(settings.database_url))


def study(seed: int = 0) -> StudyVois:
    shape = tuple(n + 2 * MARGIN_VOXELS for n in SPEC.shape)
    return StudyVois(
        hu=np.random.default_rng(seed).integers(-1024, 3071, (len(LEVELS), *shape)).astype(np.int16),
        spacing_mm=1.0,
        order=1,
        acquisition=Acquisition(
            "MAKER", "MODEL", "B30f", "soft", 120.0, 3.0, (3.0, 0.8, 0.8), "unenhanced", 66, "F", "b 1"
        ),
        vertebrae=tuple(
            VertebraRecord(level, 1.0, 0.9, False, ("flag",), {"median_hu": 100.0 + seed}) for level in LEVELS
        ),
        flags=("other",),
    )


def identity(number: int, patient: int | None = None) -> Identity:
    who = number if patient is None else patient
    return Identity(f"PATIENT-{who}", "HOSPITAL", "19501231", f"1.2.3.{number}", f"ACC-{number}", "20261101")


def files(archive_root: Path) -> list[Path]:
    return sorted(path for path in archive_root.rglob("*") if path.is_file())


def test_what_was_kept_comes_back(archive: VoiArchive) -> None:
    kept = study(3)
    assert archive.add(kept, identity(1), 1, TODAY)
    (entry,) = archive.entries()
    back = archive.read(entry)
    assert np.array_equal(back.hu, kept.hu)
    assert (back.acquisition, back.vertebrae, back.flags, back.spacing_mm, back.order) == (
        kept.acquisition,
        kept.vertebrae,
        kept.flags,
        1.0,
        1,
    )
    ((_, who),) = archive.identities()
    assert who == identity(1)


def test_the_grid_is_the_networks_own_and_another_is_resampled(archive: VoiArchive) -> None:
    kept = study(1)
    whole = kept.on_grid(0, SPEC)
    assert np.array_equal(whole, kept.hu[0])
    assert np.array_equal(kept.on_grid(1, SPEC, 0), kept.hu[1][4:-4, 4:-4, 4:-4])
    ramp = np.broadcast_to(np.arange(24, dtype=np.int16)[:, None, None] * 10, (24, 24, 24)).copy()
    wide = StudyVois(ramp[None], 1.0, 1, kept.acquisition, kept.vertebrae[:1], ())
    other = wide.on_grid(0, VoiSpec((8, 8, 8), 2.0), 0)
    # the middle of both grids is one point: 115 HU, and 20 HU a voxel
    assert np.abs(other[:, 4, 4] - (115 + (np.arange(8) - 3.5) * 20)).max() <= 2.0


def test_a_revision_replaces_and_an_older_one_does_not(archive: VoiArchive, settings: Settings) -> None:
    assert archive.add(study(1), identity(1), 1, TODAY)
    assert archive.add(study(1), identity(1), 1, TODAY)
    (first,) = archive.entries()
    assert archive.add(study(2), identity(1), 2, TODAY)
    assert not archive.add(study(1), identity(1), 1, TODAY)
    (entry,) = archive.entries()
    assert (entry.entry, entry.patient, entry.revision) == (first.entry, first.patient, 2)
    assert np.array_equal(archive.read(entry).hu, study(2).hu)
    assert len(files(settings.archive_dir)) == 1


def test_studies_of_one_patient_share_a_pseudonym_and_unknown_patients_none(archive: VoiArchive) -> None:
    archive.add(study(), identity(1, patient=7), 1, TODAY)
    archive.add(study(), identity(2, patient=7), 1, TODAY)
    for number in (3, 4):
        nameless = Identity("", "", "", f"1.2.3.{number}", "", "")
        archive.add(study(), nameless, 1, TODAY)
    patients = [entry.patient for entry in archive.entries()]
    assert len(patients) == 4
    assert len(set(patients)) == 3


def test_no_identity_lies_in_the_folder_or_in_the_store(archive: VoiArchive, settings: Settings) -> None:
    archive.add(study(), identity(1), 1, TODAY)
    who = identity(1)
    secrets = [who.patient_id, who.issuer, who.birth_date, who.study_instance_uid, who.accession, who.study_date]
    everything = [*files(settings.archive_dir), *files(settings.state_dir)]
    for path in everything:
        data = path.read_bytes() + str(path).encode()
        for secret in secrets:
            assert secret.encode() not in data, (path, secret)
    midnight = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
    assert {path.stat().st_mtime for path in files(settings.archive_dir)} == {midnight}


def test_links_open_with_their_key_alone(archive: VoiArchive, settings: Settings, tmp_path: Path) -> None:
    archive.add(study(), identity(1), 1, TODAY)
    (entry,) = archive.entries()
    other = make_key(tmp_path / "other.key")
    with pytest.raises(Damaged):
        other.open(entry.entry, entry.link)
    with pytest.raises(Damaged):
        archive.key.open(entry.patient, entry.link)  # a link that was moved to another row
    path = settings.archive.key_file
    assert path is not None
    path.unlink()
    (tmp_path / "other.key").rename(path)
    wrong = VoiArchive(settings, JobStore(settings.database_url))
    with pytest.raises(ConfigurationError, match="not the key of this archive"):
        list(wrong.identities())
    with pytest.raises(ConfigurationError):
        wrong.add(study(), identity(2), 1, TODAY)
    assert [finding.problem for finding in wrong.verify()] == ["link_unreadable"]
    path.unlink()
    with pytest.raises(ConfigurationError, match="osteo archive init"):
        list(VoiArchive(settings, JobStore(settings.database_url)).identities())


def test_a_key_is_for_its_owner_alone_and_never_written_over(settings: Settings) -> None:
    path = settings.archive.key_file
    assert path is not None
    with pytest.raises(ConfigurationError, match="exists"):
        make_key(path)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="mode 640"):
        read_key(path)


def test_an_archive_says_on_what_ground_and_its_key_lies_outside(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="consent"):
        settings_of(tmp_path, consent=" ")
    with pytest.raises(ValueError, match="key_file"):
        settings_of(tmp_path, key_file=None)
    with pytest.raises(ValueError, match="must not lie in the archive"):
        settings_of(tmp_path, key_file=tmp_path / "state" / "archive" / "key")


@pytest.mark.parametrize("interrupted", [False, True])
def test_keys_are_exchanged(archive: VoiArchive, settings: Settings, tmp_path: Path, interrupted: bool) -> None:
    archive.add(study(), identity(1), 1, TODAY)
    archive.add(study(), Identity("", "", "", "1.9", "", ""), 1, TODAY)
    path = settings.archive.key_file
    assert path is not None
    before = path.read_bytes()
    config = tmp_path / "osteo.toml"
    config.write_text(
        f'state_dir = "{settings.state_dir}"\n[archive]\nenabled = true\nconsent = "x"\nkey_file = "{path}"\n'
    )
    if interrupted:  # the store is done, the file is not yet
        archive.rotate(make_key(new_key_path(path)))
    else:
        done = CliRunner().invoke(cli, ["archive", "rotate-key", "--config", str(config)])
        assert done.exit_code == 0, done.output
    fresh = VoiArchive(settings, JobStore(settings.database_url))
    assert {who.study_instance_uid for _, who in fresh.identities()} == {"1.2.3.1", "1.9"}
    assert path.read_bytes() != before
    assert not new_key_path(path).exists()
    assert fresh.add(study(5), identity(1), 2, TODAY)
    assert len(fresh.entries()) == 2
    with pytest.raises(Damaged):
        LinkKey(before).open(fresh.entries()[0].entry, fresh.entries()[0].link)


def test_a_running_node_takes_up_an_exchanged_key(archive: VoiArchive, settings: Settings) -> None:
    archive.add(study(), identity(1), 1, TODAY)
    path = settings.archive.key_file
    assert path is not None
    VoiArchive(settings, JobStore(settings.database_url)).rotate(make_key(new_key_path(path)))
    with pytest.raises(ConfigurationError, match="exchanged"):
        archive.add(study(), identity(2), 1, TODAY)
    assert archive.add(study(), identity(2), 1, TODAY)
    assert {who.study_instance_uid for _, who in archive.identities()} == {"1.2.3.1", "1.2.3.2"}
    assert len(files(settings.archive_dir)) == 2


def test_age_and_size_decide_what_goes_and_labels_keep(settings: Settings) -> None:
    size = len(study().to_bytes())
    limits = {"retention_days": 100, "labelled_retention_days": 0, "maximum_gb": 2.5 * size / 1e9}
    changed = settings.model_copy(update={"archive": settings.archive.model_copy(update=limits)})
    rows = JobStore(settings.database_url)
    archive = VoiArchive(changed, rows)
    for number, days in enumerate((400, 101, 99, 50, 10)):
        archive.add(study(number), identity(number), 1, TODAY - timedelta(days=days))
    by_study = {who.study_instance_uid: entry.entry for entry, who in archive.identities()}
    label = Label(by_study["1.2.3.0"], "L1", 0.9, None, "Hologic", "A", 3)
    assert rows.add_labels(LabelImport("0" * 64, NOW, "me", 1, 0, 0, 0), [label]) == 1
    assert archive.retain(NOW) == {"too old": 1, "beyond maximum_gb": 2, "leftovers": 0}
    assert {who.study_instance_uid for _, who in archive.identities()} == {"1.2.3.0", "1.2.3.4"}
    assert len(files(settings.archive_dir)) == 2
    assert len(rows.archive_labels()) == 1
    assert archive.verify() == []


def test_a_full_disk_keeps_nothing_half(settings: Settings) -> None:
    receiver = settings.receiver.model_copy(update={"low_free_bytes": 2**62})
    archive = VoiArchive(settings.model_copy(update={"receiver": receiver}), JobStore(settings.database_url))
    with pytest.raises(SpoolFull):
        archive.add(study(), identity(1), 1, TODAY)
    assert archive.entries() == []
    assert files(settings.archive_dir) == []


def test_a_patient_is_forgotten_and_may_object(archive: VoiArchive, settings: Settings) -> None:
    for number, patient in ((1, 7), (2, 7), (3, 8)):
        archive.add(study(number), identity(number, patient), 1, TODAY)
    assert archive.forget_patient("PATIENT-7", None, objects=True) == 2
    assert [who.patient_id for _, who in archive.identities()] == ["PATIENT-8"]
    assert len(files(settings.archive_dir)) == 1
    assert not archive.add(study(), identity(9, patient=7), 1, TODAY)
    assert archive.forget_patient("PATIENT-8", "ANOTHER", objects=False) == 0
    assert archive.forget_study("ACC-3") == 1
    assert files(settings.archive_dir) == []
    assert archive.add(study(), identity(3, patient=8), 2, TODAY)


def test_what_is_broken_is_found_and_repaired(archive: VoiArchive, settings: Settings) -> None:
    for number in range(3):
        archive.add(study(number), identity(number), 1, TODAY)
    first, second, third = archive.entries()
    paths = {path.name.split(".")[0]: path for path in files(settings.archive_dir)}
    paths[first.file].unlink()
    data = bytearray(paths[second.file].read_bytes())
    data[-1] ^= 1
    paths[second.file].write_bytes(data)
    assert sorted(finding.problem for finding in archive.verify()) == ["file_changed", "file_missing"]
    archive.verify(repair=True)
    assert archive.verify() == []
    assert [entry.entry for entry in archive.entries()] == [third.entry]


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.unit.test_voi_archive import TODAY, identity, settings_of, study
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.jobs.store import JobStore
settings = settings_of(Path(sys.argv[2]))
archive = VoiArchive(settings, JobStore(settings.database_url))
number = 0
print("begins", flush=True)
while True:
    archive.add(study(number), identity(number % 7), number, TODAY)
    number += 1
"""


def test_a_kill_at_any_moment_leaves_no_row_without_its_file(settings: Settings, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(root), str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begins\n"
    archive = VoiArchive(settings, JobStore(settings.database_url))
    deadline = time.monotonic() + 60
    while len(archive.entries()) < 7:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert archive.verify() == []
    named = {entry.file for entry in archive.entries()}
    assert named <= {path.name.split(".")[0] for path in files(settings.archive_dir)}
    # files whose row never came, or whose removal was cut off, go after an hour
    for path in files(settings.archive_dir):
        assert path.name.split(".")[0] in named or path.stat().st_ctime > time.time() - 3600
    stray = settings.archive_dir / "ab" / ("ab" * 16 + ".safetensors")
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"x")
    assert archive.retain(NOW)["leftovers"] == 0
    assert stray.exists()


def test_a_node_with_a_wrong_key_is_not_ready(settings: Settings, archive: VoiArchive, tmp_path: Path) -> None:
    found = {finding.name: finding for finding in check_node(settings)}
    assert found["archive of VOIs"].ok
    archive.add(study(), identity(1), 1, TODAY)
    path = settings.archive.key_file
    assert path is not None
    path.unlink()
    make_key(path)
    found = {finding.name: finding for finding in check_node(settings)}
    assert not found["archive of VOIs"].ok
    assert "not the key of this archive" in found["archive of VOIs"].detail
