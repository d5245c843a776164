"""The texture feature pool: who enters, on whose scale, and that stops and changes are noticed."""

from __future__ import annotations

import hashlib
import hmac
import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch

from tests.easy_vois import NETWORK, easy_set
from train.data import VoiRow, open_set, write_table
from train.pool import TABLE_NAME, VALUES_NAME, Pool, PoolConfig, build_pool, main, open_pool
from train.radiomics import Radiomics
from train.scans import KEY_NAME, archive_scans
from train.splits import part_of
from train.strata import Acquisition, Strata, uncorrelated


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return easy_set(tmp_path_factory.mktemp("vois") / "set")


@pytest.fixture(scope="module")
def pool(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return build_pool([source], tmp_path_factory.mktemp("pool") / "pool", NETWORK)


# --- strata -----------------------------------------------------------------------------------------------------

SOFT = Acquisition("soft", "thin", "120", "A", "native")
RARE = Acquisition("soft", "thin", "100", "B", "portal")
SHARP = Acquisition("bone", "thick", "120", "A", "native")


def test_a_stratum_forgets_from_the_end_until_it_is_large_enough() -> None:
    rng = np.random.default_rng(0)
    acquisitions = [SOFT] * 60 + [RARE] * 5 + [SHARP] * 40
    values = np.concatenate([rng.normal(10, 2, (60, 3)), rng.normal(20, 4, (5, 3)), rng.normal(50, 9, (40, 3))])
    patients = [f"p{i // 2}" for i in range(105)]
    strata = Strata.fit(values, acquisitions, patients, 30, 5)
    assert strata.names[strata.stratum_of(SOFT)] == "soft/thin/120/A/native"
    assert strata.names[strata.stratum_of(RARE)] == "soft/thin"
    assert strata.names[strata.stratum_of(Acquisition("lung", "thin", "80", "", "native"))] == "all"
    scaled = strata.standardise(values, acquisitions)
    np.testing.assert_allclose(scaled[:60].mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(scaled[:60].std(0), 1, atol=1e-9)
    np.testing.assert_allclose(scaled[65:].std(0), 1, atol=1e-9)
    np.testing.assert_allclose(scaled[60:65], (values[60:65] - values[:65].mean(0)) / values[:65].std(0))


def test_many_vertebrae_of_few_patients_are_no_stratum() -> None:
    values = np.random.default_rng(0).normal(size=(80, 2))
    patients = ["p0"] * 40 + [f"q{i}" for i in range(40)]
    strata = Strata.fit(values, [SHARP] * 40 + [SOFT] * 40, patients, 30, 5)
    assert strata.names == (
        "soft", "soft/thin", "soft/thin/120", "soft/thin/120/A", "soft/thin/120/A/native", "all"
    )  # fmt: skip


def test_features_that_repeat_another_are_left_out_in_a_stable_order() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 200))
    columns = [first, np.zeros(200), second, -first + 0.01 * second, first + 2 * second]
    assert uncorrelated(np.stack(columns, axis=1), 0.95).tolist() == [0, 2, 4]


# --- the pool ---------------------------------------------------------------------------------------------------


def test_only_training_patients_enter_and_none_of_an_external_site(source: Path, pool: Pool, tmp_path: Path) -> None:
    data = open_set(source)
    training = {row.patient for row in data.rows if row.part == "train"}
    assert set(pool.patients) == training
    assert len(pool.rows) == len(data.indices("train"))
    # other parts change no number of the pool
    document = json.loads((source / "table.json").read_text())
    hu = np.array(data.hu)
    hu[data.indices("val", "test", "external")] = 1000
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "voi.npy", hu)
    write_table(other, [VoiRow(**row) for row in document["rows"]], document["config"])
    again = build_pool([other], tmp_path / "pool", NETWORK)
    np.testing.assert_array_equal(again.values, pool.values)
    with pytest.raises(ValueError, match="training part"):
        build_pool([source], tmp_path / "none", NETWORK, PoolConfig(external_sites=("s",)))


def test_values_are_standardised_uncorrelated_and_clipped(pool: Pool) -> None:
    assert np.abs(pool.values).max() <= PoolConfig().clip_sd
    assert np.abs(pool.values.mean(0)).max() < 0.2
    correlation = np.abs(np.corrcoef(pool.values, rowvar=False)) - np.eye(len(pool.features))
    assert correlation.max() < 0.99
    assert list(pool.features) == sorted(pool.features)


def test_others_are_projected_onto_the_pools_scale(source: Path, pool: Pool) -> None:
    data = open_set(source)
    radiomics = Radiomics(NETWORK)
    rows = [row["row"] for row in pool.rows[:6]]
    hu = torch.from_numpy(np.stack([data.hu[i][data.crop(NETWORK)] for i in rows]).astype(np.float32))
    acquisitions = [Acquisition.of(data.rows[i]) for i in rows]
    found = pool.project(radiomics(hu), radiomics.names, acquisitions)
    np.testing.assert_allclose(found, pool.values[:6], atol=1e-5)
    with pytest.raises(ValueError, match="needs the features"):
        pool.project(radiomics(hu)[:, :3], radiomics.names[:3], acquisitions)


def test_neighbours_are_the_nearest_of_other_patients(pool: Pool) -> None:
    found = pool.neighbours(3, block=17)
    patients = pool.patients
    for i in (0, 5, len(patients) - 1):
        distance = np.linalg.norm(pool.values - pool.values[i], axis=1)
        distance[patients == patients[i]] = np.inf
        assert set(found[i]) == set(np.argsort(distance, kind="stable")[:3])
    with pytest.raises(ValueError, match="too few patients"):
        pool.neighbours(len(patients))


def test_the_same_sources_are_not_computed_twice_and_another_setting_is_another_version(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_pool([source], tmp_path, NETWORK)
    parts = sorted((tmp_path / "parts").iterdir())
    (tmp_path / TABLE_NAME).unlink()  # stopped before the end: the vectors are there
    monkeypatch.setattr(Radiomics, "__call__", lambda *_: pytest.fail("computed again"))
    again = build_pool([source], tmp_path, NETWORK)
    assert again.version == first.version
    np.testing.assert_array_equal(again.values, first.values)
    assert sorted((tmp_path / "parts").iterdir()) == parts
    other = build_pool([source], tmp_path, NETWORK, PoolConfig(maximum_correlation=0.5))
    assert other.version != first.version
    assert len(other.features) < len(first.features)


def test_files_that_do_not_belong_together_are_refused(pool: Pool, tmp_path: Path) -> None:
    pool.write(tmp_path)
    read = open_pool(tmp_path)
    assert read.rows == pool.rows
    np.testing.assert_array_equal(read.strata.mean, pool.strata.mean)
    replace(pool, values=pool.values + 1).write(tmp_path / "other")
    (tmp_path / "other" / VALUES_NAME).replace(tmp_path / VALUES_NAME)
    with pytest.raises(ValueError, match="build the pool again"):
        open_pool(tmp_path)


# --- from DICOM -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_of_ct(real_series: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies mixed in one folder, the second with a lung kernel only, and a file that is no DICOM."""
    folder = tmp_path_factory.mktemp("ct")
    for name in ("acrin_flt_breast_001_abdomen", "cptac_pda_C3L-00189_lungbases"):
        for file in sorted(path for path in real_series(name).rglob("*") if path.is_file()):
            (folder / f"{name[:4]}-{file.name}").symlink_to(file)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.real_ct
def test_a_folder_of_dicom_becomes_a_pool(
    folder_of_ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command; the patient's name is keyed, the refused study is counted, and a second call computes nothing."""
    out = tmp_path / "pool"
    out.mkdir()
    header = pydicom.dcmread(next(folder_of_ct.glob("acri-*")), stop_before_pixels=True)
    patient_id = str(header.PatientID)
    keys = (hashlib.sha256(bytes([n])).digest() for n in range(100))
    named = {key: f"scan-{hmac.new(key, patient_id.encode(), hashlib.sha256).hexdigest()[:24]}" for key in keys}
    key, patient = next((key, name) for key, name in named.items() if part_of(name, False) == "train")
    (out / KEY_NAME).write_bytes(key)
    monkeypatch.setattr("sys.argv", ["pool", str(folder_of_ct), "--out", str(out), "--site", "here"])
    main()
    said = json.loads(capsys.readouterr().out)
    archive = next((out / "scans").iterdir())
    data = open_set(archive)
    assert {row.level for row in data.rows} == {"T12", "L1", "L2", "L3", "L4", "L5"}
    assert said["vertebrae"] == len(data.rows) == 6
    assert said["patients"] == 1
    assert list(data.config["left_out"].values()) == ["unsuitable_kernel"]
    row = data.rows[0]
    assert (row.patient, row.part, row.site, row.phase) == (patient, "train", "here", "unenhanced")
    assert row.kvp == float(header.KVP)
    assert row.thickness_mm == float(header.SliceThickness)
    assert row.vendor == str(header.Manufacturer).upper()
    assert row.target_sbmd_g_cm2 is None
    core = data.hu[:, 20:28, 24:32, 28:36].mean((1, 2, 3))
    assert ((core > 100) & (core < 250)).all()  # trabecular bone of this patient reads 150 to 178 HU
    written = "".join(path.read_text() for path in (*archive.rglob("*.json"), out / TABLE_NAME))
    assert patient_id not in written
    assert str(header.StudyInstanceUID) not in written
    monkeypatch.setattr("train.scans._study", lambda *_: pytest.fail("located again"))
    main()
    assert json.loads(capsys.readouterr().out) == said


def test_the_key_of_names_is_private_and_kept(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert archive_scans(tmp_path / "empty", tmp_path / "vois", "here") == 0
    key = (tmp_path / "vois" / KEY_NAME).read_bytes()
    assert len(key) == 32
    assert stat.S_IMODE((tmp_path / "vois" / KEY_NAME).stat().st_mode) == 0o600
    assert archive_scans(tmp_path / "empty", tmp_path / "vois", "here") == 0
    assert (tmp_path / "vois" / KEY_NAME).read_bytes() == key
    assert len(open_set(tmp_path / "vois").rows) == 0
