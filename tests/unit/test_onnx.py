"""The ONNX file answers as torch does, for any batch, and one that doesn't is not written."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from tests.unit.test_network_inference import CONFIG, make_bundle
from train.onnx_export import check_parity, export_bundle, network_of


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_onnx_answers_as_torch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "toy")
    parity = export_bundle(bundle, tmp_path / "toy.onnx")
    assert parity.within
    assert parity.largest["bmd"] < 1e-4
    assert parity.largest["class_logits"] < 1e-4
    content = (tmp_path / "toy.onnx").read_bytes()
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model)
    assert {entry.key: entry.value for entry in model.metadata_props}["sha256"] == bundle.sha256
    # the comparison can fail: another network's weights are noticed
    other = network_of(bundle)
    with torch.no_grad():
        other.bmd_head.hidden[2].bias += 0.01
    assert not check_parity(other, content).within
    monkeypatch.setattr("train.onnx_export.to_onnx", lambda _: model)
    monkeypatch.setattr("train.onnx_export.network_of", lambda _: other)
    with pytest.raises(ValueError, match="differ"):
        export_bundle(bundle, tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()
    assert CONFIG.voi_shape == tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)[1:]
