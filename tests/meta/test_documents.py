"""Documents are tested: what the code can say must be explained, what the README shows must exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from osteo_daemon.domain.decision import TABLE
from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import Category
from osteo_daemon.domain.job import JobState
from tests.conftest import ROOT

PACKAGE = ROOT / "osteo_daemon"


def _flag_codes() -> set[str]:
    return {
        code
        for path in PACKAGE.rglob("*.py")
        for code in re.findall(r'QualityFlag\(\s*"([a-z0-9_]+)"', path.read_text(encoding="utf-8"))
    }


def test_every_quality_flag_is_explained() -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    codes = _flag_codes()
    assert len(codes) > 10  # the search itself works
    assert not {code for code in codes if f"`{code}`" not in text}


@pytest.mark.parametrize("values", [ExclusionCode, Category])
def test_every_code_is_explained(values: type) -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert not {value.value for value in values if f"`{value.value}`" not in text}


def test_decision_table_in_the_document_is_the_one_in_the_code() -> None:
    text = (ROOT / "docs" / "decision.md").read_text(encoding="utf-8")
    lower = None
    for bound, category in TABLE:
        row = next(line for line in text.splitlines() if line.startswith("|") and f"`{category.value}`" in line)
        numbers = [float(number) for number in re.findall(r"\d+", row.split("|")[1])]
        assert numbers == [value for value in (lower, bound) if value not in (None, float("inf"))], row
        lower = bound


def test_every_state_is_drawn() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not {state.value for state in JobState if state.value not in text}


def test_the_readme_tree_exists_and_is_complete() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("## The tree")[2].partition("## ")[0]
    named = set(re.findall(r"([a-z_]+(?:\.py|/))", tree))
    assert not {name for name in named if not (ROOT / name).exists() and not (PACKAGE / name).exists()}
    there = {path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
    there |= {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert not there - named


def test_the_version_has_a_dated_entry() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$", _changelog(), re.MULTILINE)


def test_every_link_between_documents_leads_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken


def _changelog() -> str:
    return Path(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
