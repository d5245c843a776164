"""The archive's rows in PostgreSQL."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from osteo_daemon.archive.key import make_key, new_key_path
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.jobs.archive_rows import Label, LabelImport
from osteo_daemon.jobs.store import JobStore
from tests.postgres import Cluster
from tests.unit.test_voi_archive import NOW, TODAY, identity, settings_of, study


def test_the_archive_on_postgresql(postgres: Cluster, tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    assert settings.archive.key_file is not None
    make_key(settings.archive.key_file)
    rows = JobStore(postgres.new())
    archive = VoiArchive(settings, rows)
    for number, patient in ((1, 7), (2, 7), (3, 8)):
        assert archive.add(study(number), identity(number, patient), 1, TODAY - timedelta(days=number))
    assert archive.add(study(9), identity(3, 8), 2, TODAY)
    newest = archive.entries()[-1]
    labels = [Label(newest.entry, level, 0.9, None, "Hologic", "A", 3) for level in ("L1", "L2")]
    done = LabelImport("0" * 64, NOW, "me", 2, 0, 0, 0)
    assert rows.add_labels(done, labels) is not None
    assert rows.add_labels(done, labels) is None
    rows.count_not_archived("reason")
    rows.count_not_archived("reason")
    path = settings.archive.key_file
    assert path is not None
    assert archive.rotate(make_key(new_key_path(path))) == 5
    status = VoiArchive(settings, rows).status()
    assert (status.studies, status.patients, status.labels, status.not_archived) == (3, 2, 2, {"reason": 2})
    assert archive.forget_patient("PATIENT-7", "HOSPITAL", objects=True) == 2
    assert not archive.add(study(), identity(1, 7), 2, TODAY)
    assert archive.verify() == []
    assert archive.retain(NOW + timedelta(days=1000)) == {"too old": 0, "beyond maximum_gb": 0, "leftovers": 0}
    assert rows.drop_import(rows.label_imports()[0][0]) == 2
    assert archive.retain(NOW + timedelta(days=1000))["too old"] == 1
    assert archive.entries() == []
