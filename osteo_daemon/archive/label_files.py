"""Files of densitometry, whatever their kind, as readings: CSV, Excel, HL7 ORU, DICOM structured reports."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any, Final

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from osteo_daemon.archive.label_mapping import LabelMapping
from osteo_daemon.errors import Damaged

_LEVEL: Final = re.compile(r"(?<![A-Z0-9])L([1-5])(?![0-9])(?!\s*[-–]\s*L?[0-9])", re.IGNORECASE)
_REGION: Final = re.compile(r"L\s*[1-4]\s*[-–]\s*L?\s*[1-4]", re.IGNORECASE)
_T_SCORE: Final = re.compile(r"\bT[\s_-]?score\b", re.IGNORECASE)
_BMD: Final = re.compile(r"\bBMD\b|bone mineral density", re.IGNORECASE)
_PREAMBLE_BYTES: Final = 132


@dataclass(frozen=True, slots=True)
class Reading:
    """One vertebra of one densitometry as the file gives it: texts, nothing interpreted.

    Attributes:
        where: row or segment of the file, for people.
        date: None where the file gives none that can be read.
    """

    where: str
    patient_id: str = ""
    issuer: str = ""
    birth_date: str = ""
    accession: str = ""
    date: date | None = None
    maker: str = ""
    model: str = ""
    unit: str = ""
    level: str = ""
    bmd: str = ""
    t_score: str = ""


def read_file(data: bytes, mapping: LabelMapping) -> list[Reading]:
    """The readings of a file, told by its content.

    Raises:
        Damaged: it is of no kind that is known, or lacks a column that the mapping names.
    """
    readings: list[Reading]
    if data[128:_PREAMBLE_BYTES] == b"DICM":
        readings = list(_structured_report(data))
    elif data.startswith(b"PK\x03\x04"):
        readings = list(_table(_workbook(data, mapping), mapping))
    elif data.lstrip(b"\x0b\xef\xbb\xbf\r\n").startswith((b"MSH|", b"FHS|", b"BHS|")):
        readings = list(_messages(data, mapping))
    else:
        readings = list(_table(_csv(data, mapping), mapping))
    filled = [_with_constants(reading, mapping.constants) for reading in readings]
    if not filled:
        raise Damaged("there is no reading of a single vertebra (L1 to L4) in this file")
    return filled


def _with_constants(reading: Reading, constants: Mapping[str, str]) -> Reading:
    told: dict[str, Any] = {name: text for name, text in constants.items() if not getattr(reading, name)}
    return replace(reading, **told)


def _csv(data: bytes, mapping: LabelMapping) -> list[list[Any]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Damaged("this is neither DICOM, HL7 nor Excel, and no text in UTF-8") from error
    try:
        return [*csv.reader(io.StringIO(text, newline=""), delimiter=mapping.delimiter)]
    except csv.Error as error:
        raise Damaged(f"the CSV cannot be read: {error}") from error


def _workbook(data: bytes, mapping: LabelMapping) -> list[list[Any]]:
    from openpyxl import load_workbook  # a third of a second that no other command needs
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = load_workbook(io.BytesIO(data), read_only=True, data_only=True)
    except (InvalidFileException, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise Damaged("this workbook cannot be read") from error
    if mapping.sheet and mapping.sheet not in book.sheetnames:
        raise Damaged(f"the workbook has no sheet {mapping.sheet!r}")
    if not mapping.sheet and len(book.sheetnames) > 1:
        raise Damaged("the workbook has several sheets; name one in the mapping: sheet = ...")
    rows = [list(row) for row in book[mapping.sheet or book.sheetnames[0]].iter_rows(values_only=True)]
    book.close()
    return rows


def _table(rows: Sequence[Sequence[Any]], mapping: LabelMapping) -> Iterator[Reading]:
    if not rows:
        return
    heads = [_text(cell) for cell in rows[0]]
    if len(set(filter(None, heads))) != len(list(filter(None, heads))):
        raise Damaged("two columns of this file have one name")
    columns = {name: heads.index(column) for name, column in mapping.columns.items() if column in heads}
    chosen = {
        level: tuple(heads.index(column) if column in heads else None for column in names)
        for level, names in mapping.levels.items()
        if names[0] in heads
    }
    for name in ("date", *(() if chosen else ("level", "bmd"))):
        if name not in columns:
            wanted = mapping.columns.get(name, name)
            raise Damaged(f"this file has no column {wanted!r} for {name}; name it in a mapping (--map)")
    if "patient_id" not in columns and "accession" not in columns:
        raise Damaged("this file has neither a column for patient_id nor for accession; name one in a mapping (--map)")
    for number, row in enumerate(rows[1:], start=2):
        cells = [*row, *([None] * (len(heads) - len(row)))]
        if not any(_text(cell) for cell in cells):
            continue

        def cell(name: str, cells: Sequence[Any] = cells) -> Any:
            return cells[columns[name]] if name in columns else None

        common = _common(f"row {number}", cell, mapping.date_format)
        if not chosen:
            yield replace(common, level=_text(cell("level")), bmd=_text(cell("bmd")), t_score=_text(cell("t_score")))
        for level, (bmd, t_score) in chosen.items():
            text = "" if bmd is None else _text(cells[bmd])
            if text:
                score = "" if t_score is None else _text(cells[t_score])
                yield replace(common, where=f"row {number} {level}", level=level, bmd=text, t_score=score)


def _common(where: str, cell: Callable[[str], Any], date_format: str) -> Reading:
    return Reading(
        where,
        **{name: _text(cell(name)) for name in ("patient_id", "issuer", "accession", "maker", "model", "unit")},
        birth_date=_digits(cell("birth_date"), date_format),
        date=_date(cell("date"), date_format),
    )


def _messages(data: bytes, mapping: LabelMapping) -> Iterator[Reading]:
    """ORU^R01 messages of HL7 v2, one after another."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    about = Reading("")
    separator, component = "|", "^"
    found: dict[str, Reading] = {}
    message = 0
    for segment in re.split(r"[\r\n\x0b\x1c]+", text):
        if segment.startswith("MSH"):
            yield from found.values()
            found, message = {}, message + 1
            separator, component = segment[3], segment[4]
            about = Reading(f"message {message}")
            continue
        fields = segment.split(separator)

        def at(number: int, part: int = 1, fields: Sequence[str] = fields, component: str = component) -> str:
            parts = fields[number].split("~")[0].split(component) if number < len(fields) else []
            return parts[part - 1].strip() if part <= len(parts) else ""

        if fields[0] == "PID":
            about = replace(about, patient_id=at(3), issuer=at(3, 4), birth_date=at(7)[:8])
        elif fields[0] == "OBR":
            yield from found.values()
            found = {}
            # OBR-18 is where placers of imaging put the accession number (IHE RAD TF-2)
            about = replace(about, accession=at(18), date=_date(at(7)[:8], "%Y%m%d"))
        elif fields[0] == "OBX":
            meaning = mapping.observations.get(at(3)) or (None if mapping.observations else _meaning(at(3, 2)))
            if meaning is None:
                continue
            level, what = meaning
            known = found.get(level, replace(about, where=f"{about.where} {level}", level=level))
            known = replace(known, bmd=at(5), unit=at(6)) if what == "bmd" else replace(known, t_score=at(5))
            equipment = at(18)
            found[level] = replace(known, model=equipment) if equipment else known
    yield from found.values()


def _structured_report(data: bytes) -> Iterator[Reading]:
    """Numbers of a structured report whose names or sites say which vertebra and what."""
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
    except (InvalidDicomError, EOFError, ValueError, AttributeError) as error:
        raise Damaged("this DICOM object cannot be read") from error
    if str(dataset.get("Modality") or "") != "SR" or "ContentSequence" not in dataset:
        raise Damaged("this DICOM object is no structured report")
    about = Reading(
        "report",
        patient_id=_text(dataset.get("PatientID")),
        issuer=_text(dataset.get("IssuerOfPatientID")),
        birth_date=_text(dataset.get("PatientBirthDate")),
        accession="",  # of the densitometry, not of the CT
        date=_date(dataset.get("StudyDate"), "%Y%m%d"),
        maker=_text(dataset.get("Manufacturer")),
        model=_text(dataset.get("ManufacturerModelName")),
    )
    found: dict[str, Reading] = {}
    for level, what, value, unit in _numbers(dataset, ""):
        known = found.get(level, replace(about, where=f"report {level}", level=level))
        if (known.bmd if what == "bmd" else known.t_score) not in ("", value):
            raise Damaged(f"this report gives two values of {what} for {level}")
        found[level] = replace(known, bmd=value, unit=unit) if what == "bmd" else replace(known, t_score=value)
    yield from (reading for reading in found.values() if reading.bmd)


def _numbers(item: Dataset, site: str) -> Iterator[tuple[str, str, str, str]]:
    """Level, quantity, value and unit of every number below an item; sites hold for what stands beside them."""
    site = next(_sites(item), site)
    for child in item.get("ContentSequence") or []:
        name = (
            _text(child.ConceptNameCodeSequence[0].get("CodeMeaning")) if child.get("ConceptNameCodeSequence") else ""
        )
        if child.get("ValueType") == "NUM" and child.get("MeasuredValueSequence"):
            own = next(_sites(child), "")
            meaning = _meaning(f"{own or site} {name}") if not _level_in(name) else _meaning(name)
            measured = child.MeasuredValueSequence[0]
            if meaning is not None:
                units = measured.get("MeasurementUnitsCodeSequence")
                unit = _text(units[0].get("CodeValue")) if units else ""
                yield (*meaning, _text(measured.get("NumericValue")), unit)
        yield from _numbers(child, name if _level_in(name) or _REGION.search(name) else site)


def _sites(item: Dataset) -> Iterator[str]:
    for child in item.get("ContentSequence") or []:
        if child.get("ValueType") == "CODE" and child.get("ConceptCodeSequence"):
            meaning = _text(child.ConceptCodeSequence[0].get("CodeMeaning"))
            if _level_in(meaning) or _REGION.search(meaning):
                yield meaning


def _meaning(text: str) -> tuple[str, str] | None:
    """Level and quantity that a name says; None for anything else, regions of several vertebrae included."""
    level = _level_in(text)
    if level is None or _REGION.search(text):
        return None
    if _T_SCORE.search(text):
        return level, "t_score"
    return (level, "bmd") if _BMD.search(text) else None


def _level_in(text: str) -> str | None:
    levels = {f"L{number}" for number in _LEVEL.findall(text)}
    return levels.pop() if len(levels) == 1 else None


def _text(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # Excel keeps an ID as a number
    return "" if value is None else str(value).strip()


def _date(value: object, date_format: str) -> date | None:
    if isinstance(value, datetime):
        return value.date()
    if isinstance(value, date):
        return value
    try:
        return datetime.strptime(_text(value), date_format).replace(tzinfo=UTC).date()
    except ValueError:
        return None


def _digits(value: object, date_format: str) -> str:
    """A birth date as DICOM writes it; empty when it cannot be read."""
    text = _text(value)
    if re.fullmatch(r"\d{8}", text):
        return text
    read = _date(value, date_format)
    return "" if read is None else read.strftime("%Y%m%d")
