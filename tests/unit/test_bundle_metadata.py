"""The metadata of every bundle pass ``monai.bundle verify_metadata``, without a connection.

MONAI downloads the schema that the metadata name unless the file is there already. The rules below are those of the
schema in MONAI's own repository (monai/bundle/meta_schema.json after its change of July 2024), written anew: what is
required and which types are asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import verify_metadata

from osteo_daemon.network.config import MoEConfig
from tests.conftest import ROOT
from train.export import _metadata

TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "type": {"type": "string"},
        "format": {"type": "string"},
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "dtype": {"type": "string"},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
VALUES = {"type": "object", "additionalProperties": {"anyOf": [{"type": ["number", "string", "boolean"]}, TENSOR]}}
FORMAT = {"type": "object", "required": ["inputs", "outputs"], "properties": {"inputs": VALUES, "outputs": VALUES}}
TEXTS = (
    "schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors",
    "copyright",
)  # fmt: skip
OBJECTS = ("required_packages_version", "optional_packages_version")
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "type": "object",
    "required": [*TEXTS, *OBJECTS, "network_data_format"],
    "properties": {
        **{name: {"type": "string"} for name in (*TEXTS, "data_source", "intended_use")},
        **{name: {"type": "object"} for name in (*OBJECTS, "changelog")},
        "network_data_format": FORMAT,
    },
}


def verify(metadata: Path, folder: Path) -> None:
    """MONAI's own check with the schema already in place."""
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    verify_metadata(meta_file=str(metadata), filepath=str(folder / "schema.json"))


@pytest.mark.parametrize("name", ["osteo-moe", "spine-localizer"])
def test_shipped_bundles_pass(name: str, tmp_path: Path) -> None:
    verify(ROOT / "model_zoo" / name / "configs" / "metadata.json", tmp_path)


def test_what_the_export_writes_passes_and_a_missing_key_does_not(tmp_path: Path) -> None:
    from osteo_daemon.inference.bundle import _library_versions

    written = {
        "schema": "https://example.org/schema.json",
        "version": "1",
        **_library_versions(),
        **_metadata(MoEConfig(), "1", {"sha256": "0" * 64}),
    }
    (tmp_path / "metadata.json").write_text(json.dumps(written))
    verify(tmp_path / "metadata.json", tmp_path)
    for missing in ("authors", "task", "network_data_format", "optional_packages_version"):
        (tmp_path / "bad.json").write_text(json.dumps({k: v for k, v in written.items() if k != missing}))
        with pytest.raises(ValueError, match="Failed validating"):
            verify(tmp_path / "bad.json", tmp_path)
    bad = json.loads(json.dumps(written))
    del bad["network_data_format"]["outputs"]["bmd"]["format"]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(ValueError, match="Failed validating"):
        verify(tmp_path / "bad.json", tmp_path)
