"""quantize-weights: integers and scales in place of weights, and the same function of them."""

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from omforge import ir
from omforge.ir.numerics import TOLERANCES, run, within
from omforge.passes import make_pipeline
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.quantization.report import quantized_layers
from tests.quantization.weights import weighted

TIED = """<ir_version: 11, opset_import: ["" : 24]>
tied (int64[B, S] ids, float[50, 64] embedding, float[64, 96] up, float[96, 64] down)
    => (float[B, S, 50] logits)
{
    x = Gather (embedding, ids)
    u = MatMul (x, up)
    a = Relu (u)
    d = MatMul (a, down)
    head = Transpose <perm = [1, 0]> (embedding)
    logits = MatMul (d, head)
}"""
IDS = {"ids": np.array([[0, 7, 49], [3, 3, 1]])}
FORMS = [
    QuantizeWeights(bits, group, symmetric)
    for bits in (8, 4)
    for group in (0, 32, 64, 128)
    for symmetric in (True, False)
]


def tied(dtype: type = np.float32) -> ir.Model:
    """The model with random weights."""
    text = TIED.replace("float[", "float16[") if dtype is np.float16 else TIED
    return weighted(ir.from_onnx_text(text), 1)


def single(body: str) -> ir.Model:
    """A model around one square weight w."""
    return weighted(
        ir.from_onnx_text(f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float[B, 64] x, float[64, 64] w) => (float[B, 64] y) {{ {body} }}"""),
        1,
    )


def with_rounded_weights(model: ir.Model, quantized: ir.Model) -> ir.Model:
    """The model before, each weight replaced by what its integers stand for."""
    for node in quantized.graph:
        if node.op_type != "DequantizeLinear":
            continue
        source = node.inputs[0].name.removesuffix("_quantized")
        model.graph.initializers[source].const_value = onnx_ir.tensor(
            dequantized(quantized, node.outputs[0]), name=source
        )
    return model


def dequantized(model: ir.Model, value: ir.Value) -> np.ndarray:
    """The value of a node's output, by ONNX Runtime."""
    probe = model.clone()
    wanted = next(
        output for node in probe.graph for output in node.outputs if output.name == value.name
    )
    probe.graph.outputs[:] = [wanted]
    return run(probe, IDS)[value.name]


@pytest.mark.parametrize("step", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numbers_are_those_of_the_rounded_weights(step: QuantizeWeights, dtype: type) -> None:
    model = tied(dtype)
    assert step.run(model) == 3
    ir.check(model)
    expected = run(with_rounded_weights(tied(dtype), model), IDS)["logits"]
    assert within(run(model, IDS)["logits"], expected, TOLERANCES[expected.dtype.name])


def test_before_and_after() -> None:
    model = single("y = MatMul (x, w)")
    QuantizeWeights(4, 32).run(model)
    dequantize, product = model.graph
    assert dequantize.op_type == "DequantizeLinear"
    assert {k: a.value for k, a in dequantize.attributes.items()} == {"axis": 0, "block_size": 32}
    assert [v.name for v in dequantize.inputs] == ["w_quantized", "w_scale"]
    assert product.inputs[1] is dequantize.outputs[0]
    assert set(model.graph.initializers) == {"w_quantized", "w_scale"}


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    model = tied()
    QuantizeWeights(4, 32).run(model)
    ir.save(model, tmp_path / "m.onnx", external="m.bin", threshold=64)
    stored = (tmp_path / "m.bin").stat().st_size
    halves = (50 * 64 + 2 * 64 * 96) // 2
    scales = (50 * 2 + 2 * 96 + 3 * 64) * 4
    assert halves + scales <= stored < halves + scales + 16 * 64  # alignment
    expected = run(model, IDS)["logits"]
    np.testing.assert_array_equal(run(ir.load(tmp_path / "m.onnx"), IDS)["logits"], expected)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        model = tied()
        QuantizeWeights(4, 64, symmetric=False).run(model)
        ir.save(model, tmp_path / f"{name}.onnx", external="w.bin")
        (tmp_path / "w.bin").rename(tmp_path / f"{name}.bin")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_what_was_quantised_is_reported() -> None:
    model = tied()
    QuantizeWeights(4, 32, keep=("down",)).run(model)
    layers = {layer.name: layer for layer in quantized_layers(model)}
    assert sorted(layers) == ["embedding", "up"]
    assert layers["embedding"].shared
    assert not layers["up"].shared
    assert layers["up"].bytes_before == 64 * 96 * 4
    assert layers["up"].bytes_after == 64 * 48 + 2 * 96 * 4


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    model = tied()
    QuantizeWeights(4, 32, progress=lambda done, total: told.append((done, total))).run(model)
    assert not told, "nothing is read before it is written"
    ir.save(model, tmp_path / "m.onnx", external="m.bin")
    total = (50 * 64 + 2 * 64 * 96) * 4
    assert told[-1] == (total, total)


def test_a_layer_that_cannot_be_quantised_is_an_error() -> None:
    model = single("a = MatMul (x, w) r = Relu (w) y = MatMul (a, r)")
    with pytest.raises(ir.CheckError, match="1 of 1 linear layers cannot be quantised: w: Relu"):
        QuantizeWeights(4, 32).run(model)


def test_a_wrong_name_in_keep_is_an_error() -> None:
    with pytest.raises(ir.InputError, match="keep=lm_head names no linear layer"):
        QuantizeWeights(keep=("lm_head",)).run(tied())


@pytest.mark.parametrize("group", [-32, 16, 100])
def test_a_group_that_no_kernel_takes_is_an_error(group: int) -> None:
    with pytest.raises(ir.InputError, match="makes no sense"):
        QuantizeWeights(4, group).run(tied())


def test_it_is_written_in_a_pipeline() -> None:
    (step,) = make_pipeline("quantize-weights{bits=4 group=64 keep=up,*head}").passes
    assert step == QuantizeWeights(4, 64, keep=("up", "*head"))
    assert str(step) == "quantize-weights{bits=4 group=64 keep=up,*head}"
    with pytest.raises(ir.InputError, match=r"bits=8\|4|bits=4\|8"):
        make_pipeline("quantize-weights{bits=5}")


def test_a_budget_is_written_in_a_pipeline_and_kept(tmp_path: Path) -> None:
    # The head is tied, so int8 stores it once and int4 its bytes twice.
    (step,) = make_pipeline("quantize-weights{bits=4 group=32 budget=14KiB}").passes
    assert str(step) == "quantize-weights{bits=4 group=32 budget=14KiB}"
    model = tied()
    done = step.run(model)
    assert done == len(quantized_layers(model))
    assert len({layer.bits for layer in quantized_layers(model)}) == 2
    ir.save(model, tmp_path / "m.onnx", external="m.bin", threshold=64)
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) <= 14 << 10
    plain = tied()
    expected = run(plain, IDS)["logits"]
    assert np.abs(run(model, IDS)["logits"] - expected).max() < 0.2 * np.abs(expected).max()
