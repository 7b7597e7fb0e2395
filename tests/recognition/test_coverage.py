"""coverage: what was raised against what the graph shows and config.json promises."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from omforge import ir
from omforge.passes import make_pipeline
from omforge.passes.fuse_attention import FuseAttention
from omforge.recognition.config import ModelConfig, read_config
from omforge.recognition.coverage import Coverage, Covered, measure
from omforge.testing import parse
from tests.passes import recurrent, test_dense_experts
from tests.passes.blocks import Block, named
from tests.recognition import test_interface
from tests.recognition.rotary import test_pairs as test_rotary_pairs

DYNAMIC_BIAS = """m = Add (scaled, bias) t = Transpose <perm = [0, 1, 3, 2]> (present_key_n)
first = ReduceMean <keepdims = 1> (t, i_2) masked = Add (m, first)"""

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


@pytest.mark.parametrize(("promised", "complete"), [(3, True), (4, True), (5, True), (7, False)])
def test_a_window_on_both_sides_may_be_told_by_its_width(promised: int, complete: bool) -> None:
    """EmbeddingGemma's window of 512 is 256 tokens back and 256 ahead; the graph's is 3 here."""
    model = parse(Block(visible="near", cache=False).text())
    make_pipeline("raise").run(model)
    problems = measure(model, ModelConfig(window=promised)).problems()
    assert (problems == []) == complete


def test_a_vector_of_length_one_is_no_norm() -> None:
    """A sentence's embedding is divided by its length in the end, as torch's normalize does."""
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids) => (float[batch, seq, 2] y)
    <float[3, 2] table = {1, 2, 3, 4, 5, 6}, int64[1] last = {-1}, float least = {1e-12}> {
        x = Gather (table, input_ids)
        length = ReduceL2 (x, last)
        safe = Clip (length, least)
        y = Div (x, safe)
    }""")
    make_pipeline("raise").run(model)
    assert measure(model, None).kinds["norm"].expected == 0


def test_an_unraised_softmax_is_missed_with_its_reason() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids) => (float[batch, seq, 4] logits)
    <float[8, 4] table = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}> {
        x = Gather (table, input_ids)
        s = Softmax <axis = -1> (x)
        t = Transpose <perm = [0, 2, 1]> (x)
        weighted = MatMul (s, t)
        logits = MatMul (weighted, x) }""")
    make_pipeline("raise").run(model)
    coverage = measure(model, None)
    assert not coverage.complete
    assert "attention: 0 of 1" in coverage.problems()[0]
    assert "not from a product" in coverage.problems()[0]


def test_blocks_that_are_missed_for_one_reason_are_one_problem() -> None:
    told = [f"fuse-attention: left Softmax {n} alone: why" for n in range(3)]
    missed = Covered(1, 4, tuple(told), (f"{told[0]} (and 2 more)",))
    assert Coverage({"attention": missed}).problems() == [
        "attention: 1 of 4; fuse-attention: left Softmax 0 alone: why (and 2 more)"
    ]
    assert Coverage({"attention": missed}).to_json()["attention"]["missed"] == told


TOKENS = """<ir_version: 11, opset_import: ["" : 24]>
g (int64[batch, seq] input_ids) => (float[batch, seq, 4] logits)
<float[2, 4] table = {0,0,0,0,0,0,0,0}, float[4, 4] w = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0},
 float one = {1.0}, float third = {0.3}> { x = Gather (table, input_ids) u = MatMul (x, w) %s }"""


@pytest.mark.parametrize(
    ("body", "curves"),
    [
        ("t = Mul (x, third) e = Erf (t) c = Add (e, one) g = Mul (x, c) logits = Mul (g, u)", 1),
        ("t = Mul (x, third) e = Tanh (t) c = Add (e, one) g = Mul (x, c) logits = Mul (g, u)", 1),
        ("n = Neg (u) e = Exp (n) b = Add (one, e) g = Div (x, b) logits = Mul (g, w)", 1),
        ("s = Sigmoid (u) logits = Mul (x, s)", 1),
        ("d = Div (x, third) e = Tanh (d) logits = Mul (e, third)", 0),  # a softcap
        ("s = Sigmoid (x) g = Mul (x, s) logits = Mul (g, u)", 0),  # raised
    ],
)
def test_an_activation_that_stays_is_missed(body: str, curves: int) -> None:
    model = parse(TOKENS % body)
    make_pipeline("raise").run(model)
    mlp = measure(model, None).kinds["mlp"]
    assert mlp.expected - mlp.found == curves
    assert bool(mlp.missed) == bool(curves)


def test_json_is_plain_data(exported: Exported) -> None:
    model, config = _raised(exported("hfexporter", "qwen2"))
    told = measure(model, config).to_json()
    assert told["attention"] == {"found": 2, "expected": 2, "missed": []}
    assert told["lost"] == []


@pytest.mark.parametrize("written", ["as a sum", "pair by pair"])
def test_rotations_that_are_left_are_counted_however_they_are_written(written: str) -> None:
    """Two products and a sum, or four products and two sums, are one rotation."""
    pairs = test_rotary_pairs.block()
    model = named(pairs if written == "pair by pair" else test_rotary_pairs.ROTARY)
    rotary = measure(model, None).kinds["rotary"]
    assert (rotary.found, rotary.expected) == (0, 2)  # of the queries, and of the keys


def test_states_and_routers_of_unknown_kinds_are_listed() -> None:
    model = parse(test_interface.RECURRENT)
    make_pipeline("raise").run(model)
    listed = measure(model, None).unrecognised
    assert any("2 x recurrent state" in line and "conv, ssm" in line for line in listed)
    # The gates of its linear attention are sigmoids, and no MLP that was missed.
    model = parse(recurrent.model())
    make_pipeline("raise").run(model)
    assert measure(model, None).complete
    assert not measure(model, ModelConfig(layers=1, gated=True)).complete
    model = parse(test_dense_experts.MODEL_OF_TWO_EXPERTS)
    listed = measure(model, None).unrecognised
    assert any("2 x NonZero" in line for line in listed)


def test_an_attention_with_a_bias_made_of_tokens_is_a_kind_of_its_own() -> None:
    block = Block(edits=(("masked = Add (scaled, bias)", DYNAMIC_BIAS),))
    model = named(block)
    FuseAttention().run(model)
    coverage = measure(model, ModelConfig(layers=1))
    assert coverage.kinds["attention"].complete
    assert any("1 x attention with a bias of its own" in line for line in coverage.unrecognised)


def test_an_export_in_bfloat16_says_what_to_do() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids, bfloat16[batch, 2, past, 4] past_key) => (float[batch, seq, 2] y)
    <float[2, 2] table = {1, 2, 3, 4}> { y = Gather (table, input_ids) }""")
    (problem,) = measure(model, None).problems()
    assert "the export computes in bfloat16" in problem
    assert "convert-precision{dtype=fp32}" in problem


@pytest.mark.parametrize(
    ("body", "norms", "listed"),
    [
        ("m = ReduceMean (s, last) e = Add (m, third) r = Sqrt (e) logits = Div (x, r)", 1, 0),
        ("m = ReduceMean (s, last) r = Sqrt (m) y = Div (x, r) logits = Mul (y, u)", 0, 1),
        ("m = ReduceMean (s, first) e = Add (m, third) r = Sqrt (e) logits = Div (x, r)", 0, 0),
    ],
    ids=["a norm", "a magnitude", "a mean of rows"],
)
def test_what_reduces_otherwise_is_no_norm(body: str, norms: int, listed: int) -> None:
    text = (TOKENS % f"s = Mul (x, u) {body}").replace(
        "float one", "int64[1] last = {-1}, int64[1] first = {0}, float one"
    )
    coverage = measure(parse(text), None)
    assert coverage.kinds["norm"].expected == norms
    assert sum("a magnitude" in line for line in coverage.unrecognised) == listed


def test_layers_with_a_state_need_not_attend() -> None:
    model = parse(test_interface.RECURRENT)
    make_pipeline("raise").run(model)
    caches = len(test_interface.find_interface(model).caches) // 2
    assert measure(model, ModelConfig(layers=9)).kinds["attention"].expected == caches


def test_a_state_space_has_no_attention_to_miss() -> None:
    """config.json has its layers, and none of them attends."""
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids, float[batch, 4, 3] state)
      => (float[batch, seq, 8] logits, float[batch, 4, 3] new_state)
    <float[8, 4] table = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7},
     float[4, 1, 4] kernel = {1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8}, int64[1] i_m3 = {-3},
     int64[1] far = {9999}, int64[1] i_2 = {2}> {
        x = Gather (table, input_ids)
        xt = Transpose <perm = [0, 2, 1]> (x)
        all = Concat <axis = 2> (state, xt)
        new_state = Slice (all, i_m3, far, i_2)
        y = Conv <group = 4, kernel_shape = [4]> (all, kernel)
        yt = Transpose <perm = [0, 2, 1]> (y)
        head = Transpose <perm = [1, 0]> (table)
        logits = MatMul (yt, head)
    }""")
    make_pipeline("raise").run(model)
    found = measure(model, ModelConfig(layers=2)).kinds["attention"]
    assert (found.found, found.expected) == (0, 0)
