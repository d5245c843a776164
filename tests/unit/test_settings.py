from __future__ import annotations

import json
from pathlib import Path

import pytest

from osteo_daemon.errors import ConfigurationError
from osteo_daemon.settings import DestinationSettings, Settings, SourceSettings, load_settings
from tests.conftest import ROOT

EXAMPLE = ROOT / "deploy" / "osteo.example.toml"


def test_example_holds_the_defaults() -> None:
    settings = load_settings(EXAMPLE, {})
    assert settings.model_copy(update={"sources": (), "destinations": ()}) == Settings()
    assert settings.destinations[0].ae_title == "PACS"


def test_example_names_every_key() -> None:
    text = EXAMPLE.read_text()
    sections = [Settings, DestinationSettings, SourceSettings]
    sections += [
        field.annotation for field in Settings.model_fields.values() if hasattr(field.annotation, "model_fields")
    ]
    names = {name for section in sections for name in section.model_fields}
    assert not {name for name in names if f"{name} = " not in text and f"[{name}]" not in text}


def test_environment_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "osteo.toml"
    path.write_text("[receiver]\nport = 1\n")
    settings = load_settings(path, {"OSTEO_RECEIVER__PORT": "11113", "OSTEO_STATE_DIR": "/x", "PATH": "/bin"})
    assert (settings.receiver.port, settings.state_dir) == (11113, Path("/x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[receiver]\nport = 99999", r"receiver\.port \(is 99999\)"),
        ("[receiver]\nae_title = 'A TITLE THAT IS TOO LONG'", "1 to 16 printable ASCII"),
        ("[receiver]\nprot = 1", "receiver.prot is not a setting"),
        ("[[sources]]\nae_title = 'A'\naddresses = ['300.1.1.1']", "sources.0.addresses.0"),
        ("[[sources]]\nae_title = 'A'\naddresses = []", "sources.0.addresses"),
        (
            "[[sources]]\nae_title='A'\naddresses=['10.0.0.1']\n[[sources]]\nae_title='A'\naddresses=['10.0.0.2']",
            "share one",
        ),
        ("[site]\ntimezone_offset = 'CET'", "site.timezone_offset"),
        (
            "[[destinations]]\nname='ris'\nkind='hl7'\nhost='h'\nport=1\nreport_exclusions=true",
            "destination ris takes no structured report",
        ),
        ("[screener]\nvertebrae = 'guess'", "screener.vertebrae"),
        ("state_dir = ", "is not TOML"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "osteo.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load_settings(path, {})


@pytest.mark.parametrize("name", ["OSTEO_RECEIVER__PORT", "OSTEO_RECEIVER__PROT"])
def test_a_wrong_variable_is_named(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"set by the variable {name}"):
        load_settings(EXAMPLE, {name: "abc"})


def test_missing_file_says_where_an_example_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"osteo\.example\.toml"):
        load_settings(tmp_path / "none.toml", {})


def test_nobody_may_send_by_default() -> None:
    assert Settings().sources == ()
    assert Settings().receiver.address == "127.0.0.1"


def test_the_password_of_the_store_is_nowhere_but_in_its_url(tmp_path: Path) -> None:
    path, password = tmp_path / "osteo.toml", "a/b@c d"
    path.write_text("[store]\nurl = 'postgresql://osteo@db.example:5433/osteo'\n")
    settings = load_settings(path, {"OSTEO_STORE__PASSWORD": password})
    assert settings.database_url == "postgresql+pg8000://osteo:a%2Fb%40c%20d@db.example:5433/osteo"
    assert settings.database_file is None
    assert password not in repr(settings)
    (tmp_path / "password").write_text("other\n")
    path.write_text(path.read_text() + f"password_file = '{tmp_path / 'password'}'\n")
    assert ":other@" in load_settings(path, {}).database_url
    (tmp_path / "password").unlink()
    with pytest.raises(ConfigurationError, match="password_file"):
        _ = load_settings(path, {}).database_url


@pytest.mark.parametrize("url", ["postgresql://osteo:geheim@db/osteo", "mysql://osteo:geheim@db/osteo", "geheim"])
def test_a_url_that_is_refused_is_not_quoted(url: str) -> None:
    with pytest.raises(ConfigurationError, match="url: ") as caught:
        load_settings(None, {"OSTEO_STORE__URL": url})
    assert "geheim" not in str(caught.value)


def test_settings_survive_the_way_to_the_screening_worker(tmp_path: Path) -> None:
    """The screener hands them on as JSON: every kind of peer must come out as it went in, defaults included."""
    (tmp_path / "osteo.toml").write_text(
        "[tls]\nca_file = '/ca.pem'\n"
        "[[sources]]\nae_title = 'A'\naddresses = ['10.0.0.1']\n"
        "query = { ae_title = 'A', host = 'a', port = 104, tls = true }\n"
        "[[destinations]]\nname = 'pacs'\nae_title = 'PACS'\nhost = 'h'\nport = 104\n"
        "[[destinations]]\nname = 'web'\nkind = 'dicomweb'\nurl = 'https://h/dicom-web'\n"
        "[[destinations]]\nname = 'ris'\nkind = 'hl7'\nhost = 'h'\nport = 2575\n"
        "[[destinations]]\nname = 'fhir'\nkind = 'fhir'\nurl = 'https://h/r4'\n"
        "[[archives]]\nname = 'pacs'\nretrieve = 'dicomweb'\nurl = 'https://h/dicom-web'\n"
        "[[pulls]]\nname = 'nightly'\narchive = 'pacs'\ncron = '0 19 * * *'\n"
        "[[pulls]]\nname = 'hourly'\narchive = 'pacs'\nevery_hours = 1\nbetween = '20:00-06:00'\n"
    )
    settings = load_settings(tmp_path / "osteo.toml", {"OSTEO_STORE__PASSWORD": "a/b"})
    assert Settings.model_validate(json.loads(json.dumps(settings.document()))) == settings
