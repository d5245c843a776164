"""Labels: files of every kind, right ones matched, wrong ones refused or flagged in one line."""

from __future__ import annotations

import csv
import io
import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pydicom
import pytest
from click.testing import CliRunner
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedSRStorage, ExplicitVRLittleEndian

from osteo_daemon.archive.export import export_dataset
from osteo_daemon.archive.key import Identity, make_key
from osteo_daemon.archive.label_files import read_file
from osteo_daemon.archive.label_mapping import LabelMapping, read_mapping
from osteo_daemon.archive.labels import Matching, import_labels, match_file
from osteo_daemon.archive.record import MARGIN_VOXELS, Acquisition, StudyVois, VertebraRecord
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.cli import cli
from osteo_daemon.domain.densitometry import maker_of, to_sbmd
from osteo_daemon.errors import ConfigurationError, Damaged
from osteo_daemon.imaging.preprocess import VoiSpec
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.network.config import BmdScale
from osteo_daemon.settings import Settings
from train.data import open_set
from train.truth import LEVEL_OFFSET_G_CM2, REFERENCE_MEAN_G_CM2, REFERENCE_SD_G_CM2
from train.truth import to_sbmd as trained_to_sbmd

TODAY = date(2026, 11, 23)
CT_DAY = date(2026, 10, 1)
SPEC = VoiSpec((8, 8, 8), 1.0)
LEVELS = ("L1", "L2", "L3", "L4")
PATIENTS = 40
YOUNG = {"L1": 0.974, "L2": 1.054, "L3": 1.104, "L4": 1.124}
HEADS = ["patient_id", "date", "maker", "model", "unit", "level", "bmd", "t_score"]
Row = dict[str, Any]


def density(number: int) -> float:
    """BMD above or below the young women's, in g/cm2."""
    return -0.45 + 0.5 * number / PATIENTS


def _study(number: int) -> StudyVois:
    shape = tuple(n + 2 * MARGIN_VOXELS for n in SPEC.shape)
    hu = 200 + 300 * density(number) + 15 * np.sin(number)
    acquisition = Acquisition("M", "S", "B30f", "soft", 120.0, 3.0, (3.0, 0.8, 0.8), "unenhanced", 66, "F", "b 1")
    records = [VertebraRecord(level, 1.0, 0.9, False, (), {"median_hu": hu}) for level in LEVELS]
    return StudyVois(np.full((4, *shape), number, np.int16), 1.0, 1, acquisition, tuple(records), ())


def _identity(number: int, *, day: date = CT_DAY, study: str = "", issuer: str = "") -> Identity:
    uid = f"1.2.{study or number}"
    return Identity(f"P{number:03}", issuer, "19500101", uid, f"A{study or number}", day.strftime("%Y%m%d"))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("node")
    settings = Settings.model_validate(
        {
            "state_dir": folder / "state",
            "archive": {"enabled": True, "consent": "vote", "key_file": folder / "link.key"},
            "receiver": {"minimum_free_bytes": 0, "low_free_bytes": 1},
        }
    )
    make_key(folder / "link.key")
    archive = VoiArchive(settings, JobStore(settings.database_url))
    for number in range(PATIENTS):
        archive.add(_study(number), _identity(number), 1, TODAY)
    return settings


@pytest.fixture
def rows(node: Settings) -> JobStore:
    store = JobStore(node.database_url)
    for number, _ in store.label_imports():
        store.drop_import(number)
    return store


def table(maker: str = "Hologic", unit: str = "g/cm2") -> list[Row]:
    made = []
    for number in range(PATIENTS):
        for level in LEVELS:
            bmd = YOUNG[level] + density(number)
            score = density(number) / 0.11
            made.append(
                {
                    "patient_id": f"P{number:03}",
                    "date": str(CT_DAY + timedelta(days=number % 30)),
                    "maker": maker,
                    "model": "Horizon A",
                    "unit": unit,
                    "level": level,
                    "bmd": f"{bmd:.4f}",
                    "t_score": f"{score:.2f}",
                }
            )
    return made


def as_csv(made: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(made[0]))
    writer.writeheader()
    writer.writerows(made)
    return text.getvalue().encode()


def match(node: Settings, rows: JobStore, data: bytes, mapping: LabelMapping | None = None) -> Matching:
    archive = VoiArchive(node, rows)
    return match_file(data, mapping or LabelMapping(), archive, rows, window_days=180, today=TODAY)


def test_a_right_file_is_imported_once(node: Settings, rows: JobStore) -> None:
    data = as_csv(table())
    found = match(node, rows, data)
    assert (len(found.labels), found.ambiguous, found.rejected, found.flags) == (4 * PATIENTS, (), (), ())
    assert rows.archive_labels() == []
    done = import_labels(found, rows, "me", accept_flags=False)
    assert done.imported is not None
    assert len(rows.archive_labels()) == 4 * PATIENTS
    again = match(node, rows, data)
    assert again.repeated
    assert import_labels(found, rows, "me", accept_flags=False).repeated
    other_bytes = match(node, rows, data + b"\r\n")
    assert (len(other_bytes.labels), other_bytes.known) == (0, 4 * PATIENTS)
    assert len(rows.label_imports()) == 1
    database = node.database_file
    assert database is not None
    assert b"P007" not in database.read_bytes()


def _mixed(made: list[Row]) -> list[Row]:
    return [{**row, "unit": "mg/cm2" if n % 2 else "g/cm2"} for n, row in enumerate(made)]


def _mixed_untold(made: list[Row]) -> list[Row]:
    return [{**row, "bmd": float(row["bmd"]) * (1000 if n % 3 == 0 else 1)} for n, row in enumerate(made)]


def _other_unit(made: list[Row]) -> list[Row]:
    return [{**row, "bmd": float(row["bmd"]) * 1000} for row in made]


def _t_scores(made: list[Row]) -> list[Row]:
    return [{**row, "bmd": row["t_score"]} for row in made]


def _no_unit(made: list[Row]) -> list[Row]:
    return [{**row, "unit": ""} for row in made]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_mixed, "mixed units (g/cm2, mg/cm2)"),
        (_mixed_untold, "mixed units: 54 of 160 values look like mg/cm2"),
        (_other_unit, "said to be g/cm2, but 160 of 160 values look like mg/cm2"),
        (_t_scores, "looks like T-scores"),
        (_no_unit, "the unit is not told"),
    ],
)
def test_wrong_files_are_refused_in_one_line(node: Settings, rows: JobStore, change: Any, says: str) -> None:
    with pytest.raises(Damaged) as refused:
        match(node, rows, as_csv(change(table())))
    assert says in refused.value.detail
    assert "\n" not in refused.value.detail


def _shuffled(made: list[Row]) -> list[Row]:
    order = np.random.default_rng(5).permutation(PATIENTS)
    return [{**row, "patient_id": f"P{order[int(row['patient_id'][1:])]:03}"} for row in made]


def _one_class(made: list[Row]) -> list[Row]:
    # the same vertebrae on a machine whose every T-score lies above -1
    return [row for row in made if float(row["t_score"]) > -0.99]


def _of_another_maker(made: list[Row]) -> list[Row]:
    # Hologic's T-scores, with the BMD that a Lunar would give
    lunar = [(1.0550 * (float(row["bmd"]) - 0.972)) / 0.9683 + 1.100 for row in made]
    return [{**row, "bmd": f"{value:.4f}"} for row, value in zip(made, lunar, strict=True)]


def _shifted_column(made: list[Row]) -> list[Row]:
    scores = [row["t_score"] for row in made]
    return [{**row, "t_score": scores[(n * 37) % len(scores)]} for n, row in enumerate(made)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_shuffled, "were patients mixed up?"),
        (_one_class, "every vertebra is of one class (normal)"),
        (lambda made: made[:10], "only 10 vertebrae of 3 patients match"),
        (_of_another_maker, "another maker's scale?"),
        (_shifted_column, "T-scores do not follow from BMD"),
        (lambda made: [{**row, "t_score": ""} for row in made], "scale cannot be checked"),
    ],
)
def test_odd_files_are_flagged_and_wait_for_a_word(node: Settings, rows: JobStore, change: Any, says: str) -> None:
    found = match(node, rows, as_csv(change(table())))
    assert [flag for flag in found.flags if says in flag], found.flags
    with pytest.raises(Damaged, match="--accept-flags"):
        import_labels(found, rows, "me", accept_flags=False)
    assert rows.archive_labels() == []
    assert import_labels(found, rows, "me", accept_flags=True).imported is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"patient_id": "P999"}, "no archived CT of this patient"),
        ({"patient_id": ""}, "neither patient ID nor accession number"),
        ({"date": "23.11.2026"}, "the date cannot be read; see date_format of the mapping"),
        ({"date": "2027-01-01"}, "the date lies in the future"),
        ({"date": "2026-01-01"}, "the nearest CT is 273 days away, more than 180"),
        ({"level": "L1-L4"}, "level 'L1-L4' is none of L1, L2, L3, L4"),
        ({"bmd": "n/a"}, "BMD is not a number"),
        ({"bmd": "980"}, "BMD 980 g/cm2 lies outside 0.3 to 2.2"),
        ({"t_score": "-9"}, "T-score -9 lies outside -8 to 8"),
        ({"maker": "Toshiba"}, "the maker 'Toshiba' has no scale that is known (Hologic, Lunar, Norland)"),
        ({"maker": ""}, "the maker is not told: it has no scale that is known (Hologic, Lunar, Norland)"),
    ],
)
def test_a_wrong_row_is_rejected_with_its_reason(node: Settings, rows: JobStore, change: Row, reason: str) -> None:
    made = table()
    made[0] |= change
    found = match(node, rows, as_csv(made))
    assert [(row.where, row.reason) for row in found.rejected] == [("row 2", reason)]
    assert len(found.labels) == 4 * PATIENTS - 1


def test_duplicates_and_contradictions(node: Settings, rows: JobStore) -> None:
    made = table()
    twice = [*made, made[4], {**made[8], "bmd": "1.0"}]
    found = match(node, rows, as_csv(twice))
    reasons = sorted((row.where, row.reason) for row in found.rejected)
    assert reasons == [
        ("row 10", "two different values for one vertebra on one day"),
        ("row 162", "a duplicate of row 6"),
        ("row 163", "two different values for one vertebra on one day"),
    ]
    assert len(found.labels) == 4 * PATIENTS - 1
    later = [*made, {**made[0], "date": str(CT_DAY + timedelta(days=40)), "bmd": "0.9"}]
    assert [row.reason for row in match(node, rows, as_csv(later)).rejected] == [
        "another densitometry is nearer to the CT"
    ]


def test_what_could_be_two_is_none(tmp_path: Path) -> None:
    make_key(tmp_path / "key")
    settings = Settings.model_validate(
        {
            "state_dir": tmp_path / "state",
            "archive": {"enabled": True, "consent": "vote", "key_file": tmp_path / "key"},
            "receiver": {"minimum_free_bytes": 0, "low_free_bytes": 1},
        }
    )
    rows = JobStore(settings.database_url)
    archive = VoiArchive(settings, rows)
    archive.add(_study(1), _identity(1, day=CT_DAY, study="a"), 1, TODAY)
    archive.add(_study(1), _identity(1, day=CT_DAY + timedelta(days=20), study="b"), 1, TODAY)
    archive.add(_study(2), _identity(2, study="c", issuer="EAST"), 1, TODAY)
    archive.add(_study(2), _identity(2, study="d", issuer="WEST"), 1, TODAY)
    base = {**table()[4], "accession": "", "issuer": ""}
    between = str(CT_DAY + timedelta(days=10))

    def one(**values: str) -> Matching:
        return match(settings, rows, as_csv([{**base, **values}]))

    assert one(date=between).ambiguous[0].reason == "2 CTs are 10 days away: give the accession number"
    assert len(one(date=between, accession="Ab").labels) == 1
    assert one(date=between, accession="Ac").rejected[0].reason == (
        "accession number and patient ID belong to different patients"
    )
    assert one(patient_id="P002").ambiguous[0].reason.startswith("several patients have this ID")
    assert len(one(patient_id="P002", issuer="WEST").labels) == 1
    assert one(patient_id="P002", issuer="SOUTH").rejected[0].reason == "the patient ID is of another issuer"


def test_excel_with_one_row_for_each_patient(node: Settings, rows: JobStore, tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.append(["MRN", "Exam", *[f"{level} BMD" for level in LEVELS], *[f"{level} T" for level in LEVELS]])
    for number in range(PATIENTS):
        values = [YOUNG[level] + density(number) for level in LEVELS]
        sheet.append([f"P{number:03}", CT_DAY, *(v * 1000 for v in values), *[density(number) / 0.11] * 4])
    book.save(tmp_path / "dxa.xlsx")
    mapping = tmp_path / "map.toml"
    lines = [f'[levels.{level}]\nbmd = "{level} BMD"\nt_score = "{level} T"' for level in LEVELS]
    mapping.write_text(
        '[columns]\npatient_id = "MRN"\ndate = "Exam"\n'
        '[constants]\nmaker = "Hologic, Inc."\nmodel = "Horizon"\nunit = "mg/cm²"\n' + "\n".join(lines)
    )
    found = match(node, rows, (tmp_path / "dxa.xlsx").read_bytes(), read_mapping(mapping))
    assert (len(found.labels), found.rejected, found.flags) == (4 * PATIENTS, (), ())
    assert {label.maker for label in found.labels} == {"Hologic"}
    assert all(0.3 < label.bmd_g_cm2 < 1.3 for label in found.labels)
    for wrong in ('[column]\npatient_id = "x"', '[columns]\nname = "x"', '[levels.L9]\nbmd = "x"', "= 3"):
        mapping.write_text(wrong)
        with pytest.raises(ConfigurationError):
            read_mapping(mapping)


def test_hl7_results(node: Settings, rows: JobStore) -> None:
    segments = []
    for number in range(PATIENTS):
        segments += [
            f"MSH|^~\\&|DXA|R|EHR|H|20261101||ORU^R01|{number}|P|2.5.1",
            f"PID|1||P{number:03}^^^||DOE^JANE||19500101|F",
            "OBR|1|||BMD^Spine||||".replace("||||", "|||") + "20261003101500",
        ]
        for level in LEVELS:
            bmd, score = YOUNG[level] + density(number), density(number) / 0.11
            segments += [
                f"OBX|1|NM|x^{level} BMD||{bmd:.3f}|g/cm2|||||F",
                f"OBX|2|NM|y^{level} T-score||{score:.2f}||||||F",
            ]
        segments.append("OBX|9|NM|z^L1-L4 BMD||1.000|g/cm2|||||F")
    data = "\r".join(segments).encode()
    found = match(node, rows, data, LabelMapping(constants={"maker": "GE Lunar", "model": "Prodigy"}))
    assert len(found.labels) == 4 * PATIENTS
    assert {label.days_apart for label in found.labels} == {2}
    assert [flag for flag in found.flags if "another maker's scale" in flag]  # these are a Hologic's numbers
    codes = LabelMapping(observations={"x": ("L3", "bmd")}, constants={"maker": "Hologic"})
    assert {reading.level for reading in read_file(data, codes)} == {"L3"}


def _code(meaning: str, value: str = "1") -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "99TEST", meaning
    return item


def _number(name: str, value: str, unit: str) -> Dataset:
    item, measured = Dataset(), Dataset()
    item.RelationshipType, item.ValueType = "CONTAINS", "NUM"
    item.ConceptNameCodeSequence = [_code(name)]
    measured.NumericValue = value
    measured.MeasurementUnitsCodeSequence = [_code(unit, unit)]
    item.MeasuredValueSequence = [measured]
    return item


def _report(patient: str, values: dict[str, tuple[str, str]], maker: str, model: str) -> bytes:
    """A densitometer's report: level to BMD and T-score."""
    report = Dataset()
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID = EnhancedSRStorage
    report.file_meta.MediaStorageSOPInstanceUID = report.SOPInstanceUID = "1.2.3"
    report.Modality, report.PatientID, report.PatientBirthDate = "SR", patient, "19500101"
    report.StudyDate, report.AccessionNumber = "20261005", "DXA1"
    report.Manufacturer, report.ManufacturerModelName = maker, model
    groups = []
    for level, (bmd, t_score) in values.items():
        group, site = Dataset(), Dataset()
        group.RelationshipType, group.ValueType = "CONTAINS", "CONTAINER"
        group.ConceptNameCodeSequence = [_code("Region")]
        site.RelationshipType, site.ValueType = "CONTAINS", "CODE"
        site.ConceptNameCodeSequence, site.ConceptCodeSequence = [_code("Finding Site")], [_code(f"{level} vertebra")]
        numbers = [_number("BMD", bmd, "g/cm2"), _number("T-score", t_score, "1")]
        group.ContentSequence = [site, *numbers]
        groups.append(group)
    report.ContentSequence = groups
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, report, enforce_file_format=True)
    return buffer.getvalue()


def test_a_structured_report_of_a_densitometer(node: Settings, rows: JobStore) -> None:
    values = dict.fromkeys(("L1", "L2", "L1-L4"), ("0.987", "-1.6"))
    data = _report("P005", values, "GE Medical Systems Lunar", "iDXA")
    readings = read_file(data, LabelMapping())
    assert [(r.level, r.bmd, r.t_score, r.unit) for r in readings] == [
        ("L1", "0.987", "-1.6", "g/cm2"),
        ("L2", "0.987", "-1.6", "g/cm2"),
    ]
    found = match(node, rows, data)
    assert {(label.level, label.maker, label.model, label.days_apart) for label in found.labels} == {
        ("L1", "Lunar", "iDXA", 4),
        ("L2", "Lunar", "iDXA", 4),
    }


def test_reports_of_many_patients_are_one_batch(node: Settings, rows: JobStore, tmp_path: Path) -> None:
    folder = tmp_path / "from-the-pacs"
    folder.mkdir()
    for number in range(PATIENTS):
        values = {level: (f"{YOUNG[level] + density(number):.3f}", f"{density(number) / 0.11:.2f}") for level in LEVELS}
        (folder / f"DOE^JANE-{number:03}.dcm").write_bytes(_report(f"P{number:03}", values, "Hologic", "Horizon"))
    (folder / "README.txt").write_text("what is this")
    config = tmp_path / "osteo.toml"
    config.write_text(
        f'state_dir = "{node.state_dir}"\n[archive]\nenabled = true\nconsent = "x"\n'
        f'key_file = "{node.archive.key_file}"\n'
    )

    def imported() -> dict[str, Any]:
        command = ["labels", "import", str(folder), "--json", "--config", str(config)]
        done = CliRunner().invoke(cli, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert "JANE" not in done.output
        return dict(json.loads(done.stdout))

    first = imported()
    # alone each would wait for a word: of one patient neither scale nor mix-ups can be judged
    assert (first["matched"], first["ambiguous"], first["flags"]) == (4 * PATIENTS, [], [])
    assert [row["where"] for row in first["rejected"]] == [f"file {PATIENTS + 1}"]
    assert imported()["repeated"]
    (folder / "README.txt").unlink()
    assert (again := imported())["known"] == 4 * PATIENTS
    assert (again["matched"], again["rejected"]) == (0, [])


def test_makers_are_told_by_known_names_only() -> None:
    assert maker_of("GE-Lunar") == maker_of("GE Healthcare Lunar") == "Lunar"
    assert maker_of("Hologic Inc.") == "Hologic"
    assert maker_of("Osteometer") is None
    for maker in ("Hologic", "Lunar", "Norland"):
        assert to_sbmd(0.9, maker) == pytest.approx(trained_to_sbmd(0.9, maker))  # type: ignore[arg-type]


def test_the_data_set_of_a_refit(node: Settings, rows: JobStore, tmp_path: Path) -> None:
    import_labels(match(node, rows, as_csv(table("GE Lunar"))), rows, "me", accept_flags=True)
    scale = BmdScale("sBMD", "young", REFERENCE_MEAN_G_CM2, REFERENCE_SD_G_CM2, LEVEL_OFFSET_G_CM2)
    written = []
    for name in ("one", "two"):
        summary = export_dataset(
            tmp_path / name,
            archive=VoiArchive(node, rows),
            labels=rows.archive_labels(),
            site="north",
            voi=SPEC,
            scale=scale,
        )
        written.append([(tmp_path / name / file).read_bytes() for file in ("table.json", "voi.npy")])
    assert written[0] == written[1]
    assert (summary.vertebrae, summary.labelled, summary.patients) == (4 * PATIENTS, 4 * PATIENTS, PATIENTS)
    assert summary.devices == ("Lunar",)
    assert b"P007" not in written[0][0]
    data = open_set(tmp_path / "one")
    assert data.hu.shape == (4 * PATIENTS, 16, 16, 16)
    for index, row in enumerate(data.rows):
        number = int(data.hu[index, 0, 0, 0])
        assert row.reading_g_cm2 == pytest.approx(YOUNG[row.level] + density(number), abs=1e-4)
        assert row.target_sbmd_g_cm2 == pytest.approx(trained_to_sbmd(row.reading_g_cm2 or 0, "Lunar"))
        t_score = scale.t_score(row.target_sbmd_g_cm2 or 0, row.level)
        assert t_score is not None
        assert row.diagnosis == (2 if t_score <= -2.5 else 1 if t_score <= -1 else 0)
    with pytest.raises(ConfigurationError, match="holds a data set"):
        export_dataset(tmp_path / "one", archive=VoiArchive(node, rows), labels=[], site="n", voi=SPEC, scale=scale)


def test_the_commands(node: Settings, rows: JobStore, tmp_path: Path) -> None:
    config = tmp_path / "osteo.toml"
    config.write_text(
        f'state_dir = "{node.state_dir}"\n[archive]\nenabled = true\nconsent = "x"\n'
        f'key_file = "{node.archive.key_file}"\n'
    )
    file = tmp_path / "dxa.csv"
    made = table()
    made[0]["patient_id"] = "SOMEBODY"
    file.write_bytes(as_csv(made))

    def osteo(*arguments: str) -> str:
        done = CliRunner().invoke(cli, [*arguments, "--config", str(config)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    dry = osteo("labels", "import", str(file), "--dry-run")
    assert "rejected   row 2: no archived CT of this patient" in dry
    assert "159 matched, 0 known, 0 ambiguous, 1 rejected" in dry
    assert "nothing was written" in dry
    assert "SOMEBODY" not in dry
    assert "import " in osteo("labels", "import", str(file))
    assert "imported before" in osteo("labels", "import", str(file))
    picture = tmp_path / "labels.png"
    status = osteo("labels", "status", "--plot", str(picture))
    assert "Hologic Horizon A: 159" in status
    assert picture.read_bytes().startswith(b"\x89PNG")
    kept = osteo("archive", "status")
    assert "on, by x" in kept
    assert "159 labels on 40 studies" in kept
    ((number, _),) = rows.label_imports()
    assert "159 labels removed" in osteo("labels", "forget", str(number))
