"""Bodies of GE's fused operators for transformers: norms, rotations, gates and attention.

All compute in float32 and round once, at the end. Letters: B batch, S queries, T keys, N heads,
K kv heads, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from omforge.air.reference.builder import Body, Call, Twin
from omforge.air.reference.elementwise import narrow, wide

_HIDDEN = -1e30
"""A score that is masked. What a kernel gives for a row that is masked throughout is not said."""


def _rms(twin: Twin, x: str, gamma: str, epsilon: float, axes: Sequence[int]) -> tuple[str, str]:
    mean = twin.op("ReduceMean", twin.op("Mul", x, x), twin.integers(axes), keepdims=1)
    shifted = twin.op("Add", mean, twin.constant(epsilon, "float32"))
    rstd = twin.op("Reciprocal", twin.op("Sqrt", shifted))
    return twin.op("Mul", twin.op("Mul", x, rstd), gamma), rstd


def _norm_axes(call: Call, weight: str) -> list[int]:
    rank = len(call.shape(weight))
    return list(range(-rank, 0))


def _rms_norm(twin: Twin, call: Call) -> list[str]:
    """Y = gamma * x / sqrt(mean(x^2) + epsilon): hicann/ops-nn:norm/rms_norm/op_graph."""
    dtype = call.desc("x").dtype
    x = wide(twin, call.input("x"), dtype)
    gamma = wide(twin, call.input("gamma"), call.desc("gamma").dtype)
    axes = _norm_axes(call, "gamma")
    y, rstd = _rms(twin, x, gamma, call.number("epsilon", 1e-6), axes)
    return [narrow(twin, y, dtype), rstd]


def _add_rms_norm(twin: Twin, call: Call) -> list[str]:
    """The norm of x1 + x2, and that sum: hicann/ops-nn:norm/add_rms_norm/op_graph."""
    dtype = call.desc("x1").dtype
    total = twin.op("Add", call.input("x1"), call.input("x2"))
    gamma = wide(twin, call.input("gamma"), call.desc("gamma").dtype)
    axes = _norm_axes(call, "gamma")
    y, rstd = _rms(twin, wide(twin, total, dtype), gamma, call.number("epsilon", 1e-6), axes)
    return [narrow(twin, y, dtype), rstd, total]


def _layer_norm_v3(twin: Twin, call: Call) -> list[str]:
    dtype, rank = call.desc("x").dtype, len(call.shape("x"))
    axes = list(range(call.integer("begin_norm_axis", 0) % rank, rank))
    x = wide(twin, call.input("x"), dtype)
    mean = twin.op("ReduceMean", x, twin.integers(axes), keepdims=1)
    centred = twin.op("Sub", x, mean)
    square = twin.op("Mul", centred, centred)
    variance = twin.op("ReduceMean", square, twin.integers(axes), keepdims=1)
    epsilon = twin.constant(call.number("epsilon", 1e-5), "float32")
    rstd = twin.op("Reciprocal", twin.op("Sqrt", twin.op("Add", variance, epsilon)))
    gamma = wide(twin, call.input("gamma"), call.desc("gamma").dtype)
    beta = wide(twin, call.input("beta"), call.desc("beta").dtype)
    y = twin.op("Add", twin.op("Mul", twin.op("Mul", centred, rstd), gamma), beta)
    return [narrow(twin, value, dtype) for value in (y, mean, rstd)]


def _swi_glu(twin: Twin, call: Call) -> list[str]:
    """Swish of the first half, times the second: hicann/ops-nn:activation/swi_glu/op_graph."""
    dtype = call.desc("x").dtype
    x = wide(twin, call.input("x"), dtype)
    axis = call.integer("dim", -1)
    half = call.shape("x")[axis] // 2
    gate, up = twin.ops("Split", 2, x, twin.integers([half, half]), axis=axis)
    y = twin.op("Mul", twin.op("Mul", gate, twin.op("Sigmoid", gate)), up)
    return [narrow(twin, y, dtype)]


def _turn_halves(twin: Twin, x: str, size: int) -> str:
    left, right = twin.ops("Split", 2, x, twin.integers([size // 2] * 2), axis=-1)
    return twin.op("Concat", twin.op("Neg", right), left, axis=-1)


def _turn_pairs(twin: Twin, x: str, shape: Sequence[int]) -> str:
    pairs = twin.reshape(x, [*shape[:-1], shape[-1] // 2, 2])
    even, odd = twin.ops("Split", 2, pairs, twin.integers([1, 1]), axis=-1)
    turned = twin.op("Concat", twin.op("Neg", odd), even, axis=-1)
    return twin.reshape(turned, shape)


def _rotated(twin: Twin, x: str, turned: str, cos: str, sin: str) -> str:
    return twin.op("Add", twin.op("Mul", x, cos), twin.op("Mul", turned, sin))


def _rotary_mul(twin: Twin, call: Call) -> list[str]:
    """X * r1 + turned(x) * r2, by halves: hicann/ops-math:math/rotary_mul/op_graph."""
    x = call.input("x")
    turned = _turn_halves(twin, x, call.shape("x")[-1])
    return [_rotated(twin, x, turned, call.input("r1"), call.input("r2"))]


def _rotary_position_embedding(twin: Twin, call: Call) -> list[str]:
    x, shape, mode = call.input("x"), call.shape("x"), call.integer("mode", 0)
    if mode not in (0, 1):
        raise call.fault(f"it turns in mode {mode}")
    turned = _turn_pairs(twin, x, shape) if mode else _turn_halves(twin, x, shape[-1])
    return [_rotated(twin, x, turned, call.input("cos"), call.input("sin"))]


def _apply_rotary(twin: Twin, call: Call) -> list[str]:
    """Query and key by the same angles, halves: mirror-cann/ops-transformer:posembedding."""
    results: list[str] = []
    for name in ("query", "key"):
        x = call.input(name)
        turned = _turn_halves(twin, x, call.shape(name)[-1])
        results.append(_rotated(twin, x, turned, call.input("cos"), call.input("sin")))
    return results


# Attention


def attend(
    twin: Twin,
    query: str,
    key: str,
    value: str,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    hidden: str = "",
    bias: str = "",
) -> str:
    """Softmax(scale * q k^T + bias, without what is hidden) v, [B, N, S, E] in float32.

    Args:
        twin: The graph.
        query: float32 [B, N, S, D].
        key: float32 [B, K, T, D].
        value: float32 [B, K, T, E].
        heads: N.
        kv_heads: K.
        scale: Of the scores.
        hidden: bool, broadcast to [B, N, S, T], true where a key is not seen; "" for none.
        bias: float32, broadcast to [B, N, S, T]; "" for none.
    """
    if heads != kv_heads:
        key, value = (_repeated(twin, x, heads, kv_heads) for x in (key, value))
    turned = twin.op("Transpose", key, perm=[0, 1, 3, 2])
    scores = twin.op("Mul", twin.op("MatMul", query, turned), twin.constant(scale, "float32"))
    if bias:
        scores = twin.op("Add", scores, bias)
    if hidden:
        scores = twin.op("Where", hidden, twin.constant(_HIDDEN, "float32"), scores)
    return twin.op("MatMul", twin.op("Softmax", scores, axis=-1), value)


def _repeated(twin: Twin, x: str, heads: int, kv_heads: int) -> str:
    """[B, K, T, D] to [B, N, T, D], each head as often as it has queries."""
    each = np.repeat(np.arange(kv_heads, dtype=np.int64), heads // kv_heads)
    return twin.op("Gather", x, twin.constant(each), axis=1)


_FROM: Mapping[str, Sequence[int]] = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3)}


def _by_head(twin: Twin, call: Call, name: str, layout: str, heads: int) -> str:
    """An operand as [B, N, S, D] in float32; of a dynamic input the one tensor that it has."""
    given = call.inputs(name)
    if len(given) != 1:
        raise call.fault(f"its {name} is {len(given)} tensors, and the reference knows one")
    x, dtype, shape = given[0], call.desc(name).dtype, call.shape(name)
    if dtype != "float32":
        x = twin.cast(x, "float32")
    if layout == "BSH":
        x = twin.reshape(x, [shape[0], shape[1], heads, shape[2] // heads])
        layout = "BSND"
    if layout not in _FROM:
        raise call.fault(f"the reference does not know the layout {layout}")
    order = list(_FROM[layout])
    return x if order == [0, 1, 2, 3] else twin.op("Transpose", x, perm=order)


def _attention(twin: Twin, call: Call, scale_name: str) -> str:
    """The part that the three operators have in common; block tables and lengths are not in it."""
    unknown = ("block_table", "actual_seq_lengths", "actual_seq_lengths_kv", "kv_padding_size")
    unknown += ("quant_scale1", "quant_scale2", "query_rope", "key_shared_prefix")
    for name in unknown:
        if call.input(name):
            raise call.fault(f"the reference does not know its input {name}")
    heads = call.integer("num_heads")
    # 0 stands for as many as there are queries' heads.
    kv_heads = call.integer("num_key_value_heads", 0) or heads
    layout, _, after = call.text("input_layout", "BSH").partition("_")
    query = _by_head(twin, call, "query", layout, heads)
    key, value = (_by_head(twin, call, name, layout, kv_heads) for name in ("key", "value"))
    key = _antiquant(twin, call, "key", key, kv_heads, 0)
    value = _antiquant(twin, call, "value", value, kv_heads, 1)
    bias = call.input("pse_shift")
    y = attend(
        twin,
        query,
        key,
        value,
        heads=heads,
        kv_heads=kv_heads,
        scale=call.number(scale_name, 1.0),
        hidden=_hidden(twin, call),
        bias=wide(twin, bias, call.desc("pse_shift").dtype) if bias else "",
    )
    dtype = call.output().dtype if call.output().dtype != "undefined" else call.desc("query").dtype
    if (after or layout) != "BNSD":
        y = twin.op("Transpose", y, perm=[0, 2, 1, 3])
    if layout == "BSH":
        y = twin.op("Reshape", y, twin.integers([0, 0, -1]))
    return narrow(twin, y, dtype)


def _hidden(twin: Twin, call: Call) -> str:
    """The mask as bool [B or 1, 1, S or 1, T], true where a key is hidden; "" without one."""
    mask = call.input("atten_mask")
    if not mask:
        return ""
    if call.integer("sparse_mode", 0):
        raise call.fault("the reference knows the sparse mode 0 only")
    desc, shape = call.desc("atten_mask"), call.shape("atten_mask")
    if desc.dtype != "bool":
        mask = twin.op("Cast", mask, to=9)
    if len(shape) == 4:
        return mask
    # [S, T]; [B, T] with one query; [B, S, T], [B, 1, T].
    single = call.shape("query")[2 if call.text("input_layout", "BSH") == "BNSD" else 1] == 1
    axes = [1] if len(shape) == 3 else [1, 2] if single else [0, 1]
    return twin.op("Unsqueeze", mask, twin.integers(axes))


def _antiquant(twin: Twin, call: Call, name: str, x: str, kv_heads: int, row: int) -> str:
    """Keys or values of int8 as floats: (x + offset) * scale, by tensor or by channel.

    The scale is [2], [2, K, 1, D], [2, K, D] or [2, H], keys' first; or each has its own.
    """
    if call.desc(name).dtype != "int8":
        return x
    for part, op_type in (("offset", "Add"), ("scale", "Mul")):
        own = call.input(f"{name}_antiquant_{part}")
        both = call.input(f"antiquant_{part}")
        if own:
            given = wide(twin, own, call.desc(f"{name}_antiquant_{part}").dtype)
            count = int(np.prod(call.shape(f"{name}_antiquant_{part}"), dtype=np.int64))
        elif both:
            whole = wide(twin, both, call.desc(f"antiquant_{part}").dtype)
            given = twin.slice(whole, 0, row, row + 1)
            count = int(np.prod(call.shape(f"antiquant_{part}"), dtype=np.int64)) // 2
        else:
            continue
        shape = [1, 1, 1, 1] if count == 1 else [1, kv_heads, 1, count // kv_heads]
        x = twin.op(op_type, x, twin.reshape(given, shape))
    return x


def _incre_flash_attention(twin: Twin, call: Call) -> list[str]:
    return [_attention(twin, call, "scale_value")]


def _fused_infer_attention_score(twin: Twin, call: Call) -> list[str]:
    if call.flag("softmax_lse_flag"):
        raise call.fault("its sums of exponentials are asked for")
    return [_attention(twin, call, "scale"), twin.constant(np.zeros(1), "float32")]


def _scaled_masked_softmax(twin: Twin, call: Call) -> list[str]:
    if call.flag("fixed_triu_mask"):
        raise call.fault("it makes a mask of its own")
    dtype = call.desc("x").dtype
    scores = wide(twin, call.input("x"), dtype)
    scores = twin.op("Mul", scores, twin.constant(call.number("scale", 1.0), "float32"))
    if call.input("mask"):
        fill = twin.constant(-10000.0, "float32")
        scores = twin.op("Where", call.input("mask"), fill, scores)
    return [narrow(twin, twin.op("Softmax", scores, axis=-1), dtype)]


BODIES: Mapping[str, Body] = {
    "AddRmsNorm": _add_rms_norm,
    "ApplyRotaryPosEmb": _apply_rotary,
    "FusedInferAttentionScore": _fused_infer_attention_score,
    "IncreFlashAttention": _incre_flash_attention,
    "LayerNormV3": _layer_norm_v3,
    "PromptFlashAttention": _incre_flash_attention,
    "RmsNorm": _rms_norm,
    "RotaryMul": _rotary_mul,
    "RotaryPositionEmbedding": _rotary_position_embedding,
    "ScaledMaskedSoftmax": _scaled_masked_softmax,
    "SwiGlu": _swi_glu,
}
