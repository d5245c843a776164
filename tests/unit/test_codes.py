"""Codes fit their fields, are unique, and flags come back from theirs."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping

import pytest
from pydicom.sr.coding import Code

from osteo_daemon.dicom import codes
from osteo_daemon.dicom.uids import derived_uid
from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.domain.findings import Level
from tests.conftest import ROOT


def all_codes() -> Iterator[Code]:
    for value in vars(codes).values():
        if isinstance(value, Code):
            yield value
        elif isinstance(value, Mapping):
            yield from (entry for entry in value.values() if isinstance(entry, Code))
        elif isinstance(value, tuple):
            yield from (entry for entry in value if isinstance(entry, Code))


def test_codes_fit_their_fields() -> None:
    found = list(all_codes())
    assert len(found) > 50
    for code in found:
        assert 0 < len(code.value) <= 16
        assert 0 < len(code.meaning) <= 64
        assert code.scheme_designator in {"DCM", "SCT", "LN", "UCUM", "UMLS", codes.SCHEME}
        (code.value + code.meaning).encode("ascii")


def test_a_private_code_has_one_meaning() -> None:
    meanings: dict[str, set[str]] = {}
    for code in all_codes():
        if code.scheme_designator == codes.SCHEME:
            meanings.setdefault(code.value, set()).add(code.meaning)
    assert {value: found for value, found in meanings.items() if len(found) > 1} == {}


def test_every_level_has_a_code() -> None:
    assert set(codes.VERTEBRAE) == set(Level)
    assert len({code.value for code in codes.VERTEBRAE.values()}) == len(Level)


@pytest.mark.parametrize("slug", [*ExclusionCode, "high_noise", "age_below_classification", "calibration_unchecked"])
def test_slugs_come_back_from_their_codes(slug: str) -> None:
    code = codes.slug_code(slug)
    assert len(code.value) <= 16
    assert codes.slug_of(code.meaning) == slug


def test_long_slugs_do_not_meet() -> None:
    one, other = codes.slug_code("calibration_out_of_range"), codes.slug_code("calibration_out_of_reach")
    assert one.value != other.value


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        codes.private("A" * 17, "meaning")
    with pytest.raises(ValueError, match="too long"):
        codes.private("A", "m" * 65)


@functools.cache
def flags_in_the_source() -> set[str]:
    """First arguments of every QualityFlag(...) call of the product."""
    found = set()
    for path in (ROOT / "osteo_daemon").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "QualityFlag":
                arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
                found |= {each.value for each in arguments if isinstance(each, ast.Constant)}
    return found


def test_every_code_stands_in_the_documents() -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    flags = flags_in_the_source()
    assert len(flags) > 15
    private = {code.value for code in all_codes() if code.scheme_designator == codes.SCHEME}
    assert {name for name in (*flags, *ExclusionCode, *private) if f"`{name}`" not in text} == set()


def test_derived_uids_are_valid_and_keep_their_parts_apart() -> None:
    assert derived_uid("ab", "c") != derived_uid("a", "bc")
    assert derived_uid("a") == derived_uid("a")
    assert len(derived_uid("a")) <= 64
