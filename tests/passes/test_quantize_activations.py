"""quantize-activations: the form that it writes, and that the function stays near."""

from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.ir.numerics import run
from omforge.passes import make_pipeline
from omforge.passes.quantize_activations import QuantizeActivations
from omforge.quantization.report import quantized_layers
from omforge.rewriting.events import events
from tests.quantization.test_activations import TOKENS, model

HELD_OUT = {"ids": np.random.default_rng(9).integers(0, 40, (1, 100))}


def quantized(**options: object) -> ir.Model:
    made = model()
    QuantizeActivations(tokens=TOKENS, **options).run(made)
    ir.check(made)
    return made


def error(made: ir.Model) -> float:
    """Relative, of the logits on tokens that were not calibrated on."""
    expected = run(model(), HELD_OUT)["logits"]
    return float(
        np.linalg.norm(run(made, HELD_OUT)["logits"] - expected) / np.linalg.norm(expected)
    )


def product(made: ir.Model, name: str) -> ir.Node:
    """The MatMul whose result has that name."""
    return next(n for n in made.graph if n.op_type == "MatMul" and n.outputs[0].name == name)


def test_before_and_after() -> None:
    made = quantized(limit=1.0)
    for name in ("g", "u", "d", "logits"):
        wide = product(made, name).inputs[0].producer()
        assert wide.op_type == "DequantizeLinear"
        assert wide.inputs[1].const_value.shape == ()
        rounding = wide.inputs[0].producer()
        assert rounding.op_type == "QuantizeLinear"
        assert rounding.inputs[1] is wide.inputs[1]
        assert rounding.outputs[0].dtype == ir.DataType.INT8
    gate, up = product(made, "g"), product(made, "u")
    assert gate.inputs[0] is up.inputs[0], "integers are shared"
    weight = gate.inputs[1].producer()
    assert weight.op_type == "DequantizeLinear"
    assert weight.inputs[0].dtype == ir.DataType.INT8
    assert weight.inputs[1].const_value.shape == (64,)
    assert len(quantized_layers(made)) == 4


def test_the_function_stays_near_and_smoothing_brings_it_nearer() -> None:
    smooth, plain = error(quantized(limit=1.0)), error(quantized(limit=1.0, smooth=False))
    assert smooth < 0.08
    assert smooth < plain / 1.5


@pytest.mark.parametrize("otherwise", ["int8", "float"])
def test_layers_above_the_limit_read_floats(otherwise: str) -> None:
    made = quantized(limit=0.0, otherwise=otherwise)
    kinds = {node.op_type for node in made.graph}
    assert "QuantizeLinear" not in kinds
    assert ("DequantizeLinear" in kinds) == (otherwise == "int8")
    told = [event for event in events(made) if event.pass_name == "quantize-activations"]
    assert len(told) == 4
    assert all("reads floats, and its weight" in event.reason for event in told)
    assert all("the limit is 0.0%" in event.reason for event in told)
    # Factors of the norm are in the weights, whatever they are stored as.
    assert error(made) < (0.02 if otherwise == "int8" else 1e-4)


def test_kept_layers_are_left_alone() -> None:
    made = quantized(keep=("down",))
    assert product(made, "d").inputs[1].name == "down"
    reasons = {event.where: event.reason for event in events(made)}
    assert reasons["down"] == "kept as it is, because keep names it"
    with pytest.raises(ir.InputError, match="keep=nothing names no linear layer"):
        quantized(keep=("nothing",))


def test_it_can_be_written_in_a_pipeline(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array(TOKENS))
    made = model()
    text = f"quantize-activations{{smooth=false limit=0.5 calibration={tmp_path / 't.npy'}}}"
    make_pipeline(text).run(made)
    given = quantized(smooth=False, limit=0.5)
    for name, value in given.graph.initializers.items():
        assert made.graph.initializers[name].const_value.tobytes() == value.const_value.tobytes()


def test_progress_counts_every_weight() -> None:
    told: list[tuple[int, int]] = []
    quantized(progress=lambda done, total: told.append((done, total)))
    total = (40 * 64 + 3 * 64 * 64) * 4
    assert told[-1] == (total, total)
    assert len(told) == 4


def test_without_a_text_is_an_error() -> None:
    with pytest.raises(ir.InputError, match="int8 activations need a calibration text"):
        QuantizeActivations().run(model())
