"""The spine localizer's model card is what its bundle and the results files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from osteo_daemon.inference.bundle import MANIFEST_NAME, read_bundle
from train.localizer_card import CARD_NAME, RESULTS, ROOT, SOURCES, TIMES, model_card, renew_card

BUNDLE = ROOT / "model_zoo" / "spine-localizer"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for name in (*SOURCES, TIMES):
        shutil.copy(RESULTS / f"{name}.json", folder)
    return folder


def test_the_shipped_card_is_current() -> None:
    """Otherwise: python -m train.localizer_card."""
    assert (BUNDLE / CARD_NAME).read_text(encoding="utf-8") == model_card(read_bundle(BUNDLE))


def test_every_source_gives_its_figures(results: Path) -> None:
    card = model_card(read_bundle(BUNDLE), results)
    for name in (*SOURCES, TIMES):
        document = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        assert f"docs/results/{name}.json`, {document['date'][:10]}, commit `{document['commit']}`" in card
    strata = json.loads((results / "spine-phantoms.json").read_text(encoding="utf-8"))["figures"]["strata"]
    assert f"| {strata[0]['stratum']} | {strata[0]['patients']} |" in card
    for row in json.loads((results / "localizer-real-ct.json").read_text(encoding="utf-8"))["figures"]["levels"]:
        assert f"| {row['level']} | {row['named']} | yes | {row['centre_error_mm']:g} |" in card


def test_a_missing_evaluation_is_said(results: Path) -> None:
    (results / "spine-phantoms.json").unlink()
    assert "Not evaluated: `docs/results/spine-phantoms.json` is missing." in model_card(read_bundle(BUNDLE), results)


def test_figures_of_other_weights_are_refused(results: Path) -> None:
    path = results / "localizer-torso.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["figures"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match="other weights"):
        model_card(read_bundle(BUNDLE), results)


def test_a_renewed_card_leaves_the_rest(results: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(BUNDLE, copy)
    (results / "localizer-torso.json").unlink()
    renewed = renew_card(copy, results)
    assert "localizer-torso.json` is missing" in (copy / CARD_NAME).read_text(encoding="utf-8")
    shipped = read_bundle(BUNDLE)
    assert renewed.sha256 != shipped.sha256
    changed = {name for name, digest in renewed.files.items() if shipped.files[name] != digest}
    assert changed == {CARD_NAME}
    assert renew_card(copy).sha256 == shipped.sha256
    assert (copy / MANIFEST_NAME).read_bytes() == (BUNDLE / MANIFEST_NAME).read_bytes()
