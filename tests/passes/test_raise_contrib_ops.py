"""raise-contrib-ops: what com.microsoft operators become."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from omforge import ir
from omforge.ir.numerics import run, tolerance, within
from omforge.passes.raise_contrib_ops import RaiseContribOps
from omforge.rewriting.events import events
from omforge.testing import assert_leaves_alone, assert_rewrites, parse

HEADER = '<ir_version: 11, opset_import: ["" : 24, "com.microsoft" : 1]>\n'
STANDARD = '<ir_version: 11, opset_import: ["" : 24]>\n'
SKIP = "g (float[B, S, 8] x, float[B, S, 8] r, float[8] w) => (float[B, S, 8] y, float[B, S, 8] t)"

POINTWISE = {
    "QuickGelu": ("QuickGelu (x)", "Swish <alpha = 1.702> (x)"),
    "Gelu": ("Gelu (x)", "Gelu (x)"),
    "FastGelu": ("FastGelu (x)", 'Gelu <approximate = "tanh"> (x)'),
}


@pytest.mark.parametrize("op", POINTWISE)
def test_activations(op: str) -> None:
    graph = "g (float[N, 8] x) => (float[N, 8] y) {{ y = {} }}"
    before, after = POINTWISE[op]
    assert_rewrites(
        RaiseContribOps(),
        HEADER + graph.format("com.microsoft." + before),
        STANDARD + graph.format(after),
    )


def test_a_skip_norm_becomes_an_add_and_a_norm() -> None:
    before = (
        HEADER
        + SKIP
        + """{
        y, m, i, t = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (x, r, w) }"""
    )
    after = (
        STANDARD
        + SKIP
        + """{
        t = Add (x, r) y = RMSNormalization <axis = -1, epsilon = 0.00001> (t, w) }"""
    )
    assert_rewrites(RaiseContribOps(), before, after)


GQA = (
    HEADER
    + """g (int64[B, S] input_ids, int64[B, T] attention_mask, float[B, S, %d] q,
   float[B, 2, P, 16] pk, float[B, 2, P, 16] pv, float[32, 8] cos, float[32, 8] sin%s)
   => (float[B, S, 64] y, float[B, 2, Q, 16] key, float[B, 2, Q, 16] value)
<int64[1] one = {1}, int64 first = {1}> {
    n = ReduceSum <keepdims = 0> (attention_mask, one)
    n1 = Sub (n, one)
    lengths = Cast <to = 6> (n1)
    shape = Shape (attention_mask)
    t = Gather (shape, first)
    total = Cast <to = 6> (t)
    y, key, value = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2%s>
        (q, %s, pk, pv, lengths, total, cos, sin)
}"""
)


KEYS = ", float[B, S, 32] k, float[B, S, 32] v"


def _feeds(batch: int, seq: int, past: int, width: int) -> dict[str, npt.NDArray[Any]]:
    random = np.random.default_rng(batch + seq + past)

    def floats(*shape: int) -> npt.NDArray[Any]:
        return random.standard_normal(shape).astype(np.float32)

    return {
        "input_ids": np.zeros((batch, seq), np.int64),
        "attention_mask": np.ones((batch, past + seq), np.int64),
        "q": floats(batch, seq, width),
        "k": floats(batch, seq, 32),
        "v": floats(batch, seq, 32),
        "pk": floats(batch, 2, past, 16),
        "pv": floats(batch, 2, past, 16),
        "cos": np.cos(np.outer(np.arange(32), 0.5 ** np.arange(8))).astype(np.float32),
        "sin": np.sin(np.outer(np.arange(32), 0.5 ** np.arange(8))).astype(np.float32),
    }


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ("", False),
        (", do_rotary = 1", False),
        (", do_rotary = 1, rotary_interleaved = 1", False),
        (", do_rotary = 1", True),
        (", local_window_size = 3", False),
        (", scale = 0.25, softcap = 5.0", False),
    ],
)
# ONNX Runtime's kernel takes several rows with a past only one token at a time.
@pytest.mark.parametrize("sizes", [(1, 5, 0), (2, 5, 0), (1, 1, 6), (2, 1, 6), (1, 3, 4)])
def test_group_query_attention(options: str, packed: bool, sizes: tuple[int, int, int]) -> None:
    width = 128 if packed else 64
    text = GQA % ((width, "", options, ",") if packed else (width, KEYS, options, "k, v"))
    model, raised = parse(text), parse(text)
    assert RaiseContribOps().run(raised) == 1
    assert {node.domain for node in raised.graph} == {""}
    feeds = _feeds(*sizes, width)
    _assert_same(run(raised, feeds), run(model, feeds))


def _assert_same(
    actual: Mapping[str, npt.NDArray[Any]], expected: Mapping[str, npt.NDArray[Any]]
) -> None:
    for name, wanted in expected.items():
        assert within(actual[name], wanted, tolerance("float32")), name


def test_smooth_softmax_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    extra = (64, KEYS, ", smooth_softmax = 1", "k, v")
    assert_leaves_alone(RaiseContribOps(), GQA % extra, "smooth softmax", caplog)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("num_heads = 4, ", "", "its num_heads is 0, or missing"),
        ("kv_num_heads = 2", "kv_num_heads = -2", "its kv_num_heads is -2, or missing"),
    ],
)
def test_heads_that_are_no_number_are_left_alone(
    caplog: pytest.LogCaptureFixture, old: str, new: str, reason: str
) -> None:
    """No schema of ONNX's holds the operator against what it must have."""
    text = GQA % (64, KEYS, ", do_rotary = 1", "k, v")
    assert old in text
    assert_leaves_alone(RaiseContribOps(), text.replace(old, new), reason, caplog)


def test_what_nobody_uses_is_left_to_be_removed() -> None:
    graph = "g (float[N, 8] x) => (float[N, 8] y) { a = com.microsoft.Gelu (x) y = Neg (x) }"
    model = parse(HEADER + graph)
    assert not RaiseContribOps().run(model)
    assert [node.op_type for node in model.graph] == ["Gelu", "Neg"]


def test_standard_models_are_untouched() -> None:
    model = ir.from_onnx_text(STANDARD + "g (float[N] x) => (float[N] y) { y = Neg (x) }")
    assert RaiseContribOps().run(model) == 0


def test_an_operator_of_another_domain_is_an_event_wherever_it_is() -> None:
    model = parse(
        '<ir_version: 11, opset_import: ["" : 24, "com.acme" : 1]>\n'
        "g (bool b, float[N, 8] x) => (float[N, 8] y) {"
        " t = com.acme.Fast (x)"
        " y = If (b) <"
        "   then_branch = then () => (float[N, 8] u) { u = com.acme.Faster (t) },"
        "   else_branch = other () => (float[N, 8] v) { v = Identity (t) }> }"
    )
    assert RaiseContribOps().run(model) == 0
    assert [str(event) for event in events(model)] == [
        "raise-contrib-ops: left com.acme.Fast -> t alone: operators of domain com.acme are not known",
        "raise-contrib-ops: left com.acme.Faster -> u alone: operators of domain com.acme are not known",
    ]
