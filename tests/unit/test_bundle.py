"""Bundles: written, read back, and every kind of damage refused with the file's name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from osteo_daemon.errors import BundleError
from osteo_daemon.inference import bundle as bundle_module
from osteo_daemon.inference.bundle import MANIFEST_NAME, ModelBundle, find_bundle, read_bundle, write_bundle


def make(path: Path, **changes: object) -> ModelBundle:
    values: dict[str, object] = {
        "name": "toy",
        "version": "0.1.0",
        "status": "investigational",
        "metadata": {"task": "test", "description": "a toy", "authorship": "tests"},
        "network": {"width": 3},
        "inference": {"spacing_mm": [1.0, 1.0, 1.0]},
        "weights": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3).expand(2, 3)},
        "model_card": "# toy\n",
        "licence": "none\n",
    }
    values.update(changes)
    return write_bundle(path, **values)  # type: ignore[arg-type]


def rewrite_manifest(root: Path) -> None:
    """Make the digests agree again after an edit, so that only the edit itself can be refused."""
    lines = []
    for file in sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST_NAME):
        lines.append(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(root).as_posix()}\n")
    (root / MANIFEST_NAME).write_text("".join(lines))


def test_round_trip(tmp_path: Path) -> None:
    written = make(tmp_path / "toy", extra_files={"docs/figure.svg": b"<svg/>"})
    read = read_bundle(tmp_path / "toy")
    assert read == written
    assert (read.name, read.version, read.status) == ("toy", "0.1.0", "investigational")
    assert read.network == {"width": 3}
    assert read.sha256 == hashlib.sha256((tmp_path / "toy" / MANIFEST_NAME).read_bytes()).hexdigest()
    weights = read.load_weights()
    assert torch.equal(weights["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(weights["b"], torch.ones(2, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["toy"], "no staging folder stays behind"


def test_same_content_same_digest_other_weights_other_digest(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    assert make(tmp_path / "b").sha256 == first.sha256
    assert make(tmp_path / "c", weights={"w": torch.zeros(1)}).sha256 != first.sha256


def test_sha256sum_format(tmp_path: Path) -> None:
    import subprocess

    make(tmp_path / "toy")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", MANIFEST_NAME], cwd=tmp_path / "toy", check=True)


def test_replaces_a_whole_bundle(tmp_path: Path) -> None:
    make(tmp_path / "toy", extra_files={"docs/old.txt": b"old"})
    make(tmp_path / "toy", version="0.2.0")
    assert read_bundle(tmp_path / "toy").version == "0.2.0"
    assert not (tmp_path / "toy" / "docs" / "old.txt").exists()


@pytest.mark.parametrize("name", [*bundle_module.REQUIRED_FILES])
@pytest.mark.parametrize("damage", ["missing", "changed", "unlisted"])
def test_every_file_counts(tmp_path: Path, name: str, damage: str) -> None:
    make(tmp_path / "toy")
    path = tmp_path / "toy" / name
    if damage == "missing":
        path.unlink()
    elif damage == "changed":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        manifest = tmp_path / "toy" / MANIFEST_NAME
        manifest.write_text("".join(line for line in manifest.read_text().splitlines(True) if name not in line))
    with pytest.raises(BundleError, match=name):
        read_bundle(tmp_path / "toy")


def test_extra_file_and_link(tmp_path: Path) -> None:
    make(tmp_path / "toy")
    extra = tmp_path / "toy" / "models" / "model.pt"
    extra.write_bytes(b"pickle")
    with pytest.raises(BundleError, match=r"model\.pt"):
        read_bundle(tmp_path / "toy")
    extra.unlink()
    (tmp_path / "toy" / "docs" / "link").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match="link"):
        read_bundle(tmp_path / "toy")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("configs/network.json", b"{"),
        ("configs/inference.json", b"[1, 2]"),
        ("configs/network.json", b'{"x": "$__import__(\'os\').getpid()"}'),
        ("configs/network.json", b'{"x": [{"_target_": "os.system"}]}'),
        ("configs/inference.json", b'{"x": "%configs/metadata.json"}'),
        ("configs/metadata.json", b'{"osteo_schema": "osteo-bundle/999"}'),
        ("configs/metadata.json", b'{"osteo_schema": "osteo-bundle/1", "status": "approved"}'),
        ("configs/metadata.json", b'{"osteo_schema": "osteo-bundle/1", "status": "clinical"}'),
    ],
)
def test_content_is_refused_even_with_right_digests(tmp_path: Path, file: str, content: bytes) -> None:
    make(tmp_path / "toy")
    (tmp_path / "toy" / file).write_bytes(content)
    rewrite_manifest(tmp_path / "toy")
    with pytest.raises(BundleError, match=file):
        read_bundle(tmp_path / "toy")


@pytest.mark.parametrize(
    "line", ["nonsense", "0" * 64 + "  ../outside", "0" * 64 + "  /etc/passwd", "0" * 63 + "  LICENSE"]
)
def test_bad_manifest_line(tmp_path: Path, line: str) -> None:
    make(tmp_path / "toy")
    with (tmp_path / "toy" / MANIFEST_NAME).open("a") as manifest:
        manifest.write(line + "\n")
    with pytest.raises(BundleError, match=r"MANIFEST\.sha256 line"):
        read_bundle(tmp_path / "toy")


def test_weights_are_checked_when_they_are_loaded(tmp_path: Path) -> None:
    bundle = make(tmp_path / "toy")
    (tmp_path / "toy" / "models" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(BundleError, match="changed after"):
        bundle.load_weights()
    rewrite_manifest(tmp_path / "toy")
    with pytest.raises(BundleError, match="safetensors format"):
        read_bundle(tmp_path / "toy").load_weights()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../toy"},
        {"network": {"x": float("nan")}},
        {"network": {"x": object()}},
        {"inference": {"x": "$1+1"}},
        {"extra_files": {"../x": b""}},
        {"extra_files": {"LICENSE": b""}},
        {"status": "approved"},
    ],
)
def test_writer_refuses(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(BundleError):
        make(tmp_path / "toy", **changes)
    assert list(tmp_path.iterdir()) == []


def test_find_prefers_the_site_and_names_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_shipped_places", lambda: [tmp_path / "shipped"])
    make(tmp_path / "shipped" / "toy")
    assert find_bundle("toy").path == tmp_path / "shipped" / "toy"
    assert find_bundle("toy", tmp_path / "site").path == tmp_path / "shipped" / "toy"
    make(tmp_path / "site" / "toy")
    assert find_bundle("toy", tmp_path / "site").path == tmp_path / "site" / "toy"
    (tmp_path / "site" / "toy" / "LICENSE").unlink()
    with pytest.raises(BundleError, match="LICENSE"):  # a damaged site bundle is never silently passed over
        find_bundle("toy", tmp_path / "site")
    with pytest.raises(BundleError, match="shipped"):
        find_bundle("absent", tmp_path / "site")
    with pytest.raises(BundleError, match="form"):
        find_bundle("../toy", tmp_path / "site")


def test_metadata_carries_what_monai_asks_for(tmp_path: Path) -> None:
    make(tmp_path / "toy")
    metadata = json.loads((tmp_path / "toy" / "configs" / "metadata.json").read_text())
    assert {"schema", "version", "monai_version", "pytorch_version", "numpy_version"} <= metadata.keys()
