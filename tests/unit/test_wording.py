"""Texts of reports: every language is complete, says nothing forbidden; a site's own texts are checked at start."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import Category, Exclusion, Outcome, ScreeningResult, Severity
from osteo_daemon.domain.wording import FORBIDDEN, LANGUAGES, Wording, load_wording, placeholders
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.reporting import picture_language
from osteo_daemon.settings import Settings, SiteSettings
from tests.conftest import ROOT
from tests.unit.test_codes import flags_in_the_source


def texts(wording: Wording) -> dict[tuple[str, str], str]:
    return {(name, key): text for name, table in wording.tables.items() for key, text in table.items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_the_texts_and_placeholders_of_english(language: str) -> None:
    english, other = texts(load_wording("en")), texts(load_wording(language))
    assert other.keys() == english.keys()
    assert {where: placeholders(text) for where, text in other.items()} == {
        where: placeholders(text) for where, text in english.items()
    }
    assert all(text.strip() and text.isprintable() for text in other.values())
    if language != "en":
        # a sentence left in English would pass every other test
        assert not [
            where
            for where in other
            if where[0] in ("conclusion", "next_step", "notice", "exclusion") and other[where] == english[where]
        ]


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_language_calls_anything_normal(language: str) -> None:
    assert FORBIDDEN[language]
    found = [
        (where, word) for where, text in texts(load_wording(language)).items() for word in FORBIDDEN[language]
        if word in text.lower()
    ]  # fmt: skip
    assert found == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_code_has_words(language: str) -> None:
    tables = load_wording(language).tables
    assert flags_in_the_source() - tables["flag"].keys() == set()
    assert {code.value for code in ExclusionCode} - tables["exclusion"].keys() == set()
    assert tables["category"].keys() == {category.value for category in Category}
    assert tables["severity"].keys() == {severity.value for severity in Severity}


def test_settings_offer_the_languages_that_exist() -> None:
    folder = ROOT / "osteo_daemon" / "domain" / "texts"
    assert {path.stem for path in folder.glob("*.toml")} == set(LANGUAGES) == FORBIDDEN.keys()
    for language in LANGUAGES:
        assert SiteSettings.model_validate({"language": language}).language == language
        assert tomllib.loads((folder / f"{language}.toml").read_text())["language"]["code"] == language


def test_an_excluded_study_says_why_in_every_language() -> None:
    result = ScreeningResult("1.2", None, Outcome.EXCLUDED, Exclusion("slices_too_thick", "6 mm slices"), None)
    assert "6 mm slices" in load_wording("en").conclusion(result)
    for language in LANGUAGES[1:]:
        wording = load_wording(language)
        assert wording.tables["exclusion"]["slices_too_thick"] in wording.impression(result)


def site(folder: Path, text: str) -> Wording:
    (folder / "en.toml").write_text(text, encoding="utf-8")
    load_wording.cache_clear()
    return load_wording("en", folder)


NEXT_STEP = """
[next_step]
low = "Refer to the fracture liaison service."
reduced = "Tell the referrer."
not_flagged = "None from this measurement."
indeterminate = "None from this measurement."
excluded = "None from this measurement."
"""


def test_a_site_replaces_a_table(tmp_path: Path) -> None:
    wording = site(tmp_path, NEXT_STEP)
    assert wording.tables["next_step"]["low"] == "Refer to the fracture liaison service."
    assert wording.tables["conclusion"] == load_wording("en").tables["conclusion"]
    assert wording.digest != load_wording("en").digest


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NEXT_STEP.replace("reduced", "reduce"), "lacks reduced"),
        (NEXT_STEP + 'more = "x"', "more is not a text"),
        (NEXT_STEP.replace("Tell", "{who}"), "placeholders, each plain: none"),
        (NEXT_STEP.replace("Tell", "{"), "write a brace of the text twice"),
        (NEXT_STEP.replace("Tell the referrer", "All normal"), "'normal'"),
        (NEXT_STEP.replace('"Tell the referrer."', "3"), "one line of text"),
        (NEXT_STEP.replace("Tell the referrer.", "a\\tb"), "one line of text"),
        ("[nonsense]\na = 'b'", r"\[nonsense\]"),
        ("[language]\ncode = 'en'", r"\[language\]"),
        ("[flag]\nimplant = '{0.__class__}'", "placeholders"),
        ("no toml", "cannot be read as TOML"),
    ],
)
def test_a_wrong_text_of_a_site_is_named_at_start(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        site(tmp_path, text)


def test_the_node_refuses_to_start_with_a_wrong_text(tmp_path: Path) -> None:
    (tmp_path / "en.toml").write_text(NEXT_STEP.replace("reduced", "reduce"), encoding="utf-8")
    load_wording.cache_clear()
    settings = Settings(state_dir=tmp_path / "state", site=SiteSettings(templates_dir=tmp_path))
    with pytest.raises(ConfigurationError, match="lacks reduced"):
        picture_language(settings)


def test_a_missing_file_or_language_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"de\.toml"):
        load_wording("de", tmp_path)
    with pytest.raises(ConfigurationError, match="zh-Hans"):
        load_wording("tlh")
