"""Every family from every exporter raises to the ideal, and keeps its numbers."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from omforge import ir
from omforge.passes import make_pipeline
from omforge.recognition.config import read_config
from omforge.recognition.coverage import measure
from tests.exports import EXPORTS, export
from tests.matrix import measure_cell

# Nodes of the graphs that onnxruntime-genai's builder makes of the same models from their weights.
BUILT = {"llama_mha": 33, "llama_gqa": 33, "qwen2": 36, "qwen3": 51, "gemma2": 42, "phi3": 33}

ROTATES = {"bloom": 0, "gpt2": 0, "opt": 0}
NORMS = {"bloom": 6, "qwen3": 9, "gemma2": 9}
UNGATED = ("bloom", "gpt2", "gpt_neox", "opt")


@pytest.mark.parametrize(("route", "family"), EXPORTS)
def test_every_cell_is_ideal(route: str, family: str, tmp_path: Path) -> None:
    cell = measure_cell(route, family, export(route, family, tmp_path))
    found = {name: (kind.found, kind.expected) for name, kind in cell.coverage.kinds.items()}
    rotary, norms = ROTATES.get(family, 4), NORMS.get(family, 5)
    gates = 0 if family in UNGATED else 2
    assert found == {
        "attention": (2, 2),
        "rotary": (rotary, rotary),
        "norm": (norms, norms),
        "mlp": (gates, gates),
    }
    assert cell.max_abs_diff < 1e-4
    assert cell.canonical <= 1.5 * BUILT.get(family, 48)
    # The one export that has lost a feature says so, and no other does.
    assert bool(cell.coverage.lost) == ((route, family) == ("genai", "mistral"))


@pytest.mark.parametrize("route", ["optimum", "dynamo", "genai"])
def test_untrained_norms_raise_too(route: str, tmp_path: Path) -> None:
    path = export(route, "llama_gqa", tmp_path)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if list(tensor.dims) == [64]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(64, np.float32), tensor.name))
    onnx.save(proto, path)
    model = ir.load(path)
    make_pipeline("raise").run(model)
    assert measure(model, read_config(tmp_path)).kinds["norm"].found == 5
