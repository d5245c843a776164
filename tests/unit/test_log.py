from __future__ import annotations

import json
import logging
import warnings

import pytest
import structlog

from osteo_daemon.log import configure_logging, get_logger
from osteo_daemon.settings import LogSettings


@pytest.fixture(autouse=True)
def _plain_structlog():
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_only_listed_attributes_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogSettings(format="json"), "test")
    get_logger().info("instance_stored", job_id=7, patient_name="Doe^Jane", accession_number="4711")
    line = capsys.readouterr().err.strip()
    assert "Doe" not in line
    assert "4711" not in line
    written = json.loads(line)
    assert (written["event"], written["job_id"], written["role"]) == ("instance_stored", 7, "test")
    assert written["dropped"] == ["accession_number", "patient_name"]


def test_libraries_cannot_quote_values(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogSettings(format="json"), "test")
    warnings.showwarning("Invalid value for VR PN: 'Doe^Jane'", UserWarning, __file__, 1)
    logging.getLogger("pydicom").error("bad element (0010,0010) Doe^Jane")
    written = capsys.readouterr().err
    assert "Doe" not in written
    assert "pydicom: error" in written
