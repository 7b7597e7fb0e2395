"""coverage: what was raised against what the graph shows and config.json promises."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from omforge import ir
from omforge.passes import make_pipeline
from omforge.passes.config import ModelConfig, read_config
from omforge.passes.coverage import measure
from omforge.testing import parse

Exported = Callable[[str, str], Path]


def _raised(path: Path) -> tuple[ir.Model, ModelConfig]:
    model = ir.load(path)
    make_pipeline("raise").run(model)
    config = read_config(path.parent)
    assert config is not None
    return model, config


@pytest.mark.parametrize("family", ["llama_gqa", "mistral"])
def test_a_raised_model_is_covered(exported: Exported, family: str) -> None:
    model, config = _raised(exported("dynamo", family))
    coverage = measure(model, config)
    assert coverage.complete
    assert {name: kind.found for name, kind in coverage.kinds.items()} == {
        "attention": 2,
        "rotary": 4,
        "norm": 5,
        "mlp": 2,
    }
    assert coverage.problems() == []


def test_layers_that_config_promises_and_the_graph_lacks_are_missed(exported: Exported) -> None:
    model, config = _raised(exported("dynamo", "llama_mha"))
    coverage = measure(model, replace(config, layers=3))
    assert not coverage.complete
    assert any("attention: 2 of 3" in line for line in coverage.problems())


def test_a_window_that_the_export_lost_is_named(exported: Exported) -> None:
    model, config = _raised(exported("dynamo", "llama_mha"))
    (problem,) = measure(model, replace(config, window=8)).problems()
    assert "sliding window of 8" in problem
    assert "the export has none" in problem


def test_another_window_than_promised_is_named(exported: Exported) -> None:
    model, config = _raised(exported("optimum", "mistral"))
    assert measure(model, config).complete
    (problem,) = measure(model, replace(config, window=16)).problems()
    assert "windows of [8]" in problem


def test_an_unraised_softmax_is_missed_with_its_reason() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids, float[1, 4] w) => (float[batch, seq, 4] logits)
    <float[8, 4] table = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}> {
        x = Gather (table, input_ids)
        s = Softmax <axis = -1> (x)
        logits = Mul (s, w) }""")
    make_pipeline("raise").run(model)
    coverage = measure(model, None)
    assert not coverage.complete
    assert "attention: 0 of 1" in coverage.problems()[0]
    assert "not from a product" in coverage.problems()[0]


def test_json_is_plain_data(exported: Exported) -> None:
    model, config = _raised(exported("hfexporter", "qwen2"))
    told = measure(model, config).to_json()
    assert told["attention"] == {"found": 2, "expected": 2, "missed": []}
    assert told["lost"] == []
