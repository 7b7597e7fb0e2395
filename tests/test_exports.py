"""The refilled exports: complete, deterministic, and the same model by every route."""

import json

import numpy as np
import onnxruntime
import pytest

from omforge import ir
from tests.exports import FAMILIES, ROUTES, export


def logits(path) -> np.ndarray:
    """Prefill of 9 tokens at batch 2 by ONNX Runtime."""
    config = json.loads((path.parent / "config.json").read_text())
    past = [2, config["num_key_value_heads"], 0, config.get("head_dim") or 16]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds: dict[str, np.ndarray] = {}
    for item in session.get_inputs():
        if item.name == "input_ids":
            feeds[item.name] = np.arange(3, 21).reshape(2, 9)
        elif item.name == "attention_mask":
            feeds[item.name] = np.ones((2, 9), np.int64)
        elif item.name == "position_ids":
            feeds[item.name] = np.tile(np.arange(9), (2, 1))
        elif item.type == "tensor(float)":
            feeds[item.name] = np.zeros(past, np.float32)
        else:  # an unused bookkeeping input of the sliding-window cache
            feeds[item.name] = np.zeros([], np.int64)
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_route_gives_the_same_model(exported, family):
    reference = logits(exported(ROUTES[0], family))
    assert 0.5 < reference.std() < 2  # errors would show
    for route in ROUTES[1:]:
        np.testing.assert_allclose(logits(exported(route, family)), reference, atol=1e-5)


def test_same_arguments_same_bytes(tmp_path):
    first = export("dynamo", "qwen2", tmp_path / "a").read_bytes()
    assert export("dynamo", "qwen2", tmp_path / "b").read_bytes() == first


def test_the_folder_is_complete(exported):
    folder = exported("optimum", "mistral").parent
    expected = ["config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in folder.iterdir()) == expected


def test_tied_embeddings_stay_tied(exported):
    initializers = ir.load(exported("optimum", "qwen2")).graph.initializers
    tensors = [v.const_value for v in initializers.values() if v.const_value is not None]
    by_shape = {tuple(t.shape.numpy()): t.numpy() for t in tensors}
    np.testing.assert_array_equal(by_shape[320, 64], by_shape[64, 320].T)
