"""A refit speaks for the scanners that it was made on; for every other one a bundle says what its parent said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from osteo_daemon.domain.observation import Scanner
from osteo_daemon.errors import BundleError
from osteo_daemon.imaging.preprocess import SUPINE_AXES_LPS
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.inference.bundle import ModelBundle, read_bundle, write_bundle
from osteo_daemon.inference.scope import ELSEWHERE_NAME, SCOPE_KEY
from osteo_daemon.inference.vertebra_network import Prediction, VertebraNetwork
from tests.easy_vois import NETWORK
from tests.refits import make_parts, site_rows, write_site
from tests.unit.test_refit import CPU, QUICK
from train.data import VoiRow, VoiSet
from train.refit import refit
from train.site_data import accept

OWN = Scanner.named("Acme ", "one  X", "soft")
RARE = Scanner.named("Acme", "Two", "soft")
STRANGERS = (Scanner(), Scanner.named("Acme", "", "soft"), Scanner.named("", "One X", ""), RARE)

Parts = tuple[ModelBundle, Path, Path, VoiSet]
Done = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    torch.set_num_threads(1)
    return make_parts(tmp_path_factory.mktemp("scope"))


def named(rows: Sequence[VoiRow], first: int = 0) -> list[VoiRow]:
    """Rows of one scanner, the ``first`` of them of another one."""
    return [
        replace(row, vendor="ACME", scanner_model="TWO" if number < first else "ONE X")
        for number, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def done(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Done:
    bundle, replay, _, data = parts
    folder = tmp_path_factory.mktemp("refit")
    site = write_site(folder / "site", data, named(site_rows(data), first=4))
    return folder / "out", refit(site, bundle, "fourth", folder / "out", QUICK, CPU, replay)


def said(bundle: ModelBundle, data: VoiSet, scanner: Scanner) -> list[Prediction]:
    """What a bundle says of some vertebrae of the data set, each in a scan of its own."""
    network = VertebraNetwork.from_bundle(bundle)
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(SUPINE_AXES_LPS).T * NETWORK.voi_spacing_mm
    found = []
    for voxels in data.hu[:3]:
        volume = CtVolume((voxels - 60).astype(np.float32), affine)
        centre = volume.to_lps((np.asarray(voxels.shape) - 1) / 2)
        found += network.predict(volume, [("L2", centre, SUPINE_AXES_LPS)], scanner=scanner)
    assert all(prediction.bmd_g_cm2 is not None for prediction in found)
    return found


@pytest.mark.parametrize("kind", ["refit", "affine"])
def test_other_scanners_hear_exactly_what_the_parent_says(done: Done, parts: Parts, kind: str) -> None:
    parent, data = parts[0], parts[3]
    candidate = read_bundle(done[0] / kind)
    before = said(parent, data, OWN)
    for stranger in STRANGERS:
        assert said(candidate, data, stranger) == before
    own = said(candidate, data, OWN)
    changes = [abs((a.bmd_g_cm2 or 0.0) - (b.bmd_g_cm2 or 0.0)) for a, b in zip(own, before, strict=True)]
    assert min(changes) > 0.03  # the site's densitometer reads 0.15 higher


def test_the_verdict_knows_that_others_lose_nothing(done: Done) -> None:
    verdict = done[1]
    for pair in ("refit minus parent", "affine minus parent"):
        change = verdict["figures"]["others"]["differences"][pair]["mae"]
        assert (change["value"], change["low"], change["high"]) == (0.0, 0.0, 0.0)
    # what it is spared: the recalibration alone would move everybody
    unbound = verdict["figures"]["others_without_scope"]["differences"]["affine minus parent"]["mae"]
    assert unbound["low"] > 0.05
    assert verdict["verdict"] == "better"
    assert verdict["figures"]["scanners"] == [["ACME", "ONE X"]]
    assert any(reason.startswith("speaks for ACME ONE X alone") for reason in verdict["reasons"])
    assert any(reason.startswith("ACME TWO has 2 patients only: left out") for reason in verdict["reasons"])
    assert "ACME ONE X" in (done[0] / "refit" / "docs" / "README.md").read_text()


def test_what_is_the_same_in_both_networks_is_kept_once(done: Done, parts: Parts) -> None:
    refitted = read_bundle(done[0] / "refit")
    kept = refitted.load_tensors(ELSEWHERE_NAME)
    assert not [name for name in kept if name.startswith("encoder.")]
    assert any(name.startswith("bmd_head.") for name in kept)
    assert ELSEWHERE_NAME not in read_bundle(done[0] / "affine").files


def test_a_refit_of_a_refit_leaves_others_with_what_the_first_parent_said(
    done: Done, parts: Parts, tmp_path: Path
) -> None:
    parent, replay, _, data = parts
    deployed = read_bundle(done[0] / "refit")
    rows = [replace(row, scanner_model="THREE") for row in named(site_rows(data, offset=-0.1))]
    refit(write_site(tmp_path / "site", data, rows), deployed, "fourth", tmp_path / "out", QUICK, CPU, replay)
    newer = read_bundle(tmp_path / "out" / "affine")
    assert [one["model"] for one in newer.inference[SCOPE_KEY]["scanners"]] == ["ONE X", "THREE"]
    assert said(newer, data, RARE) == said(parent, data, RARE)
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    # the deployed bundle does not speak for the new scanner yet: it is its base that the newer one is compared with
    assert abs(verdict["figures"]["site"]["models"]["parent"]["bias"]["value"]) < 0.25
    first = done[1]["figures"]["site"]["models"]["parent"]["bias"]["value"]
    assert verdict["figures"]["site"]["models"]["parent"]["bias"]["value"] == pytest.approx(first + 0.25, abs=0.02)


def test_rows_of_a_scanner_with_few_patients_are_not_learnt_from(parts: Parts) -> None:
    data = parts[3]
    rows = named(site_rows(data), first=4)
    site = accept(replace(data, rows=tuple(rows)), "0", ("L1", "L2"))
    assert site.scanners == frozenset({("ACME", "ONE X")})
    assert {row.scanner_model for row in site.rows} == {"ONE X"}
    nameless = accept(replace(data, rows=tuple(site_rows(data))), "0", ("L1", "L2"))
    assert nameless.scanners is None
    assert len(nameless.rows) == len(rows)
    assert any("speaks for every scanner" in note for note in nameless.notes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scanners": []}, "names no scanner"),
        ({"scanners": [{"manufacturer": "", "model": "X"}]}, "without a maker"),
        ({"scanners": [{"model": "X"}]}, "unusable scope"),
        ({"more": 1}, "exactly the keys"),
        ({"outliers": 3}, "unusable outliers"),
        ({"calibration": {}}, "calibration"),
    ],
)
def test_a_scope_that_cannot_be_is_refused(done: Done, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    candidate = read_bundle(done[0] / "affine")
    scope = {**candidate.inference[SCOPE_KEY], **change}
    written = write_bundle(
        tmp_path / "wrong",
        name=candidate.name,
        version="2.0.0",
        status="investigational",
        metadata={"task": "a test"},
        network=candidate.network,
        inference={**candidate.inference, SCOPE_KEY: scope},
        weights=candidate.load_weights(),
        model_card="a test",
        licence="none",
    )
    with pytest.raises(BundleError, match=reason):
        VertebraNetwork.from_bundle(written)
