"""The conformance statement says what the code does, and the file in docs is the present one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from osteo_daemon.cli import cli
from osteo_daemon.conformance import networking
from osteo_daemon.conformance.sample import sample_objects
from osteo_daemon.conformance.statement import conformance_statement
from osteo_daemon.dicom.contexts import ACCOMPANYING_CLASSES, SCREENED_CLASSES, TRANSFER_SYNTAXES
from osteo_daemon.dicom.report_forms import SENDING_ORDER
from osteo_daemon.dicom.status import StoreStatus
from osteo_daemon.settings import Settings
from tests.conftest import ROOT
from tests.fakes import CALLED, CALLING, LOOPBACK, local_receiver

STATEMENT = ROOT / "docs" / "conformance-statement.md"


@pytest.fixture(scope="module")
def statement() -> str:
    return conformance_statement(Settings())


def test_the_file_in_docs_is_current(statement: str) -> None:
    assert STATEMENT.read_text(encoding="utf-8") == statement, "make docs-results"


def test_everything_that_is_negotiated_is_in_it(statement: str) -> None:
    for uid in (*SCREENED_CLASSES, *ACCOMPANYING_CLASSES, *TRANSFER_SYNTAXES):
        assert f"`{uid}`" in statement, uid
    for status in StoreStatus:
        assert f"`0x{status:04X}`" in statement
    for name in Settings.model_fields["receiver"].default.model_fields_set | {"maximum_associations", "ae_title"}:
        assert f"`receiver.{name}`" in statement
    assert not re.search(r"\$\w|\bNone\b|<osteo|0x[0-9a-f]{8,}", statement)  # no hole, no object's default text


def test_a_listener_accepts_what_the_statement_says_and_nothing_else(tmp_path: Path) -> None:
    """Asked over the network for every class that the library knows."""
    from pynetdicom import AE, AllStoragePresentationContexts
    from pynetdicom.sop_class import _SERVICE_CLASSES

    said = set(re.findall(r"^\| [^|]+ \| `([0-9.]+)`", networking.accepted_contexts(Settings()), flags=re.MULTILINE))
    known = {str(context.abstract_syntax) for context in AllStoragePresentationContexts}
    asked = sorted(known | said | set(map(str, _SERVICE_CLASSES)))
    accepted: set[str] = set()
    with local_receiver(tmp_path) as port:
        for start in range(0, len(asked), 100):
            entity = AE(ae_title=CALLING)
            for uid in asked[start : start + 100]:
                entity.add_requested_context(uid)
            association = entity.associate(LOOPBACK, port, ae_title=CALLED)
            accepted |= {str(context.abstract_syntax) for context in association.accepted_contexts}
            if association.is_established:
                association.release()
    commitment = {"1.2.840.10008.1.20.1"}  # where a destination or a source is set up for it
    assert accepted - commitment == said - commitment
    assert not accepted & commitment  # nobody may ask for a promise unless the site says so


def test_the_sample_gives_every_object_and_no_private_attribute() -> None:
    made = sample_objects()
    assert set(made) == set(SENDING_ORDER)
    for dataset in made.values():
        assert not [element.tag for element in dataset.iterall() if element.tag.is_private]
        assert dataset.SpecificCharacterSet == "ISO_IR 192"


def test_the_command_writes_the_statement_of_a_site(tmp_path: Path) -> None:
    config, out = tmp_path / "osteo.toml", tmp_path / "statement.md"
    config.write_text('[receiver]\nae_title = "SITE_AE"\nmaximum_associations = 7\n[completeness]\nmpps = false\n')
    done = CliRunner().invoke(cli, ["conformance", "--config", str(config), "--out", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text(encoding="utf-8")
    assert "`SITE_AE`" in text
    assert "| associations at a time | 7 |" in text
    assert "| Modality Performed Procedure Step SOP Class |  | off |" in text
    assert "`1.2.840.10008.3.1.2.3.3`" not in text
