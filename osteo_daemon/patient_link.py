"""Which studies are of one patient: the secret behind the digests, and what a source header gives for them."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from datetime import UTC, date, datetime
from pathlib import Path

from pydicom.dataset import Dataset

from osteo_daemon.domain.decision import decide
from osteo_daemon.domain.findings import Category, ScreeningResult
from osteo_daemon.domain.trend import EarlierValue, TrendPoint, patient_key
from osteo_daemon.errors import ConfigurationError

LINK_FILE = "patient-link.key"
_SECRET_BYTES = 32


def link_secret(state_dir: Path) -> bytes:
    """The node's secret, made at its first use; without it no digest tells a patient. Losing it only ends the links.

    Raises:
        ConfigurationError: the file can be neither read nor made.
    """
    path = state_dir / LINK_FILE
    try:
        if not path.exists():
            _write_new(path, os.urandom(_SECRET_BYTES))
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}, which links studies of one patient: {error.strerror}") from error
    if len(secret) != _SECRET_BYTES:
        raise ConfigurationError(f"{path} is not the key that this node wrote; remove it, and links begin anew")
    return secret


def trend_point(result: ScreeningResult, header: Dataset, secret: bytes) -> TrendPoint | None:
    """What is remembered of a study; None without an ID, a birth date or a study date, or when no value decided."""
    decided = result.category not in (None, Category.INDETERMINATE)
    index = decide(result.vertebrae, result.quality_flags).index_hu if decided else None
    key = header_key(header, secret)
    when = study_date(header)
    return (
        None if index is None or key is None or when is None else TrendPoint(key, EarlierValue(when, round(index, 1)))
    )


def header_key(header: Dataset, secret: bytes) -> str | None:
    """The digest of a header's patient, None where the header says too little."""
    parts = (str(header.get(keyword) or "") for keyword in ("PatientID", "IssuerOfPatientID", "PatientBirthDate"))
    return patient_key(secret, *parts)


def study_date(header: Dataset) -> date | None:
    """The date of a header's study, None where it has none."""
    try:
        return datetime.strptime(str(header.get("StudyDate") or ""), "%Y%m%d").replace(tzinfo=UTC).date()
    except ValueError:
        return None


def _write_new(path: Path, secret: bytes) -> None:
    # whole or not at all, and never over another process's: a link appears with its content, or not when one is there
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name) as part:
        part.write(secret)
        part.flush()
        os.fsync(part.fileno())
        with suppress(FileExistsError):
            os.link(part.name, path)
