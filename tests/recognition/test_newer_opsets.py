"""convert-opset from opsets 25 to 28: what they add, at 24."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.passes import make_pipeline
from omforge.passes.convert_opset import ConvertOpset
from omforge.testing import parse


def converted(opset: int, signature: str, body: str) -> ir.Model:
    text = f'<ir_version: 12, opset_import: ["" : {opset}]>\ng {signature} {{ {body} }}'
    model = ir.from_onnx_text(text)
    assert ConvertOpset().run(model) == 1
    assert model.opset_imports[""] == 24
    ir.check(model)
    return model


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("opset", [25, 26, 27, 28])
def test_what_only_takes_more_types_stays(opset: int) -> None:
    body = "a = Cast <to = 1> (x) b = Transpose (a) y = Identity (b)"
    model = converted(opset, "(float16[N, 8] x) => (float[8, N] y)", body)
    assert ops(model) == ["Cast", "Transpose", "Identity"]


def test_swiglu_is_a_gated_swish() -> None:
    signature = "(float[N, 8] a, float[N, 8] b) => (float[N, 8] y)"
    model = converted(28, signature, "y = SwiGLU <alpha = 0.5> (a, b)")
    assert ops(model) == ["Swish", "Mul"]
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((3, 8)).astype(np.float32) for _ in range(2))
    (y,) = numerics.run(model, {"a": a, "b": b}).values()
    np.testing.assert_allclose(y, a / (1 + np.exp(-0.5 * a)) * b, rtol=1e-5)


def test_a_range_in_half_precision_counts_in_float() -> None:
    signature = "(float16 first, float16 last, float16 step) => (float16[N] y)"
    model = converted(27, signature, "y = Range <stash_type = 1> (first, last, step)")
    assert ops(model) == ["Cast", "Cast", "Cast", "Range", "Cast"]
    feeds = {"first": np.float16(2040), "last": np.float16(2060), "step": np.float16(1)}
    (y,) = numerics.run(model, {k: np.array(v) for k, v in feeds.items()}).values()
    np.testing.assert_array_equal(y, np.arange(2040, 2060).astype(np.float16))


QKV = "float[B, 2, S, 4] q, float[B, 2, T, 4] k, float[B, 2, T, 4] v"
PASTS = "float[B, 2, P, 4] pk, float[B, 2, P, 4] pv"
WINDOWS = {
    "to the left, causal": ("left_window_size = 2, is_causal = 1", "", 5, 0),
    "to both sides": ("left_window_size = 1, right_window_size = 2", "", 5, 0),
    "to the right alone": ("right_window_size = 0", "", 5, 0),
    "behind a past": ("left_window_size = 2, is_causal = 1", ", , pk, pv", 3, 4),
    "within a boolean mask": ("left_window_size = 2", ", seen", 5, 0),
    "within a mask that is added": ("left_window_size = 2, right_window_size = 0", ", bias", 5, 0),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_window_of_attention_becomes_part_of_its_mask(case: str) -> None:
    options, more, seq, past = WINDOWS[case]
    outputs = "y, a, b" if past else "y"
    inputs = [QKV, PASTS if past else "", "bool[S, T] seen", "float[S, T] bias"]
    signature = f"({', '.join(filter(None, inputs))}) => (float[B, 2, S, 4] y)"
    body = f"{outputs} = Attention <scale = 1.0, {options}> (q, k, v{more})"
    model = converted(25, signature, body)
    node = next(node for node in model.graph if node.op_type == "Attention")
    assert not [name for name in node.attributes if "window" in name]
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, 2, seq, 4)).astype(np.float32) for _ in range(3))
    pasts = [random.standard_normal((1, 2, past, 4)).astype(np.float32) for _ in range(2)]
    seen, bias = random.random((seq, seq)) < 0.7, random.standard_normal((seq, seq))
    np.fill_diagonal(seen, True)
    feeds = {"q": q, "k": k, "v": v, "pk": pasts[0], "pv": pasts[1], "seen": seen,
             "bias": bias.astype(np.float32)}  # fmt: skip
    names = {value.name for value in model.graph.inputs}
    (y,) = numerics.run(model, {n: a for n, a in feeds.items() if n in names}).values()
    given = dict(part.split(" = ") for part in options.split(", "))
    i, j = np.arange(seq)[:, None] + past, np.arange(seq + past)[None, :]
    left, right = (int(given.get(f"{side}_window_size", -1)) for side in ("left", "right"))
    shown = np.ones((seq, seq + past), dtype=np.bool_)
    shown &= (j <= i) | ("is_causal" not in given)
    shown &= (i - j <= left) | (left < 0)
    shown &= (j - i <= right) | (right < 0)
    shown &= seen if "seen" in more else True
    keys, values = (np.concatenate(pair, axis=2) for pair in zip(pasts, (k, v), strict=True))
    scores = q @ keys.swapaxes(-1, -2) + (bias if "bias" in more else 0)
    shares = np.exp(np.where(shown, scores, -np.inf))
    np.testing.assert_allclose(
        y, (shares / shares.sum(-1, keepdims=True)) @ values, rtol=1e-4, atol=1e-5
    )


def test_windows_that_are_open_go() -> None:
    signature = f"({QKV}) => (float[B, 2, S, 4] y)"
    model = converted(26, signature, "y = Attention <left_window_size = -1> (q, k, v)")
    assert ops(model) == ["Attention"]


@pytest.mark.parametrize(
    ("opset", "body"),
    [(26, "y = CumProd (x, axis)"), (26, "b = BitCast <to = 6> (x) y = Cast <to = 1> (b)")],
)
def test_names_what_has_no_form(opset: int, body: str) -> None:
    model = parse(
        f'<ir_version: 12, opset_import: ["" : {opset}]>\n'
        f"g (float[8] x, int64 axis) => (float[8] y) {{ {body} }}"
    )
    with pytest.raises(ir.InputError, match="cannot be written at opset 24: the operator came"):
        make_pipeline("canonicalize").run(model)
