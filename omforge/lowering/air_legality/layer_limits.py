"""What the fused operators of a layer refuse: rotary embeddings, norms, gated activations."""

from __future__ import annotations

import math
from collections.abc import Iterator

from omforge.lowering.air_legality.limits import NN, TRANSFORMER, limit
from omforge.lowering.air_legality.subject import Call
from omforge.lowering.legality.special_rules import rotary_problems
from omforge.lowering.target import Target


def apply_rotary(call: Call, target: Target) -> Iterator[str]:
    """ApplyRotaryPosEmb: [B, S, N, D] of D 64 or 128, cos and sin [B, S, 1, D], layout 1, half."""
    if call.integer("layout") != 1 and target.family.name != "950":
        yield f"layout is {call.integer('layout')}, not 1"
    if call.text("rotary_mode") not in ("half", "") and target.family.name != "950":
        yield f"rotary_mode is {call.text('rotary_mode')}, not half"
    query, key, cos, sin = (call.tensor(n).static for n in ("query", "key", "cos", "sin"))
    if query is None or key is None or cos is None or sin is None or call.integer("layout") != 1:
        return
    if {len(query), len(key), len(cos), len(sin)} != {4} or cos != sin:
        yield f"query {list(query)}, key {list(key)}, cos {list(cos)}, sin {list(sin)}: all 4-D"
        return
    if query[:2] != key[:2] or query[3] != key[3]:
        yield f"query {list(query)} and key {list(key)} differ in more than their heads"
    if cos[:2] != query[:2] or cos[2] != 1:
        yield f"cos {list(cos)} is not [B, S, 1, D] of query {list(query)}"
    if query[3] not in (64, 128) or cos[3] not in (64, 128) or cos[3] > query[3]:
        yield f"head sizes {query[3]} and {cos[3]}: 64 and 128 are taken"
    if query[2] + key[2] > 255:
        yield f"{query[2]} + {key[2]} heads, more than 255"


def rotary_mul(call: Call, target: Target) -> Iterator[str]:
    """RotaryMul: x of 4 dims, r1 and r2 along its tokens, within the documented sizes."""
    x, r1, r2 = (call.tensor(name).static for name in ("x", "r1", "r2"))
    if x is not None and r1 is not None and r2 is not None:
        yield from rotary_problems(x, r1, r2)


def rotary_position(call: Call, target: Target) -> Iterator[str]:
    """RotaryPositionEmbedding: 4 dims, an even D up to 896, cos and sin of D that broadcast."""
    newest = target.family.name == "950"
    if call.integer("mode") not in ((0, 1, 2, 3) if newest else (0, 1)):
        yield f"mode is {call.integer('mode')}, not 0 or 1"
    x, cos, sin = (call.tensor(name).static for name in ("x", "cos", "sin"))
    if x is None or cos is None or sin is None:
        return
    if len(x) != 4 or len(cos) != 4 or cos != sin or cos[3] != x[3]:
        yield f"x {list(x)}, cos {list(cos)}, sin {list(sin)}: 4 dims of one D"
        return
    if x[3] % 2 or x[3] > (1024 if newest else 896):
        yield f"the head size is {x[3]}: even, and at most {1024 if newest else 896}"
    if any(own not in (1, dim) for own, dim in zip(cos, x, strict=True)):
        yield f"cos {list(cos)} does not broadcast to x {list(x)}"


def swiglu(call: Call, target: Target) -> Iterator[str]:
    """SwiGlu: the dim along which x is halved is even."""
    x, dim = call.tensor("x").static, call.integer("dim")
    if x is None or dim is None:
        return
    if not -len(x) <= dim < len(x):
        yield f"x {list(x)} has no dim {dim}"
    elif x[dim] % 2:
        yield f"the dim {dim} of x {list(x)} is odd"
    elif target.family.name == "310p" and math.prod(x[dim:]) // 2 * _width(call) % 64:
        yield f"310P takes halves of a multiple of 64 bytes: x {list(x)} along dim {dim}"


def _width(call: Call) -> int:
    return 4 if call.tensor("x").dtype == "float32" else 2


def norm(call: Call, target: Target) -> Iterator[str]:
    """RmsNorm, AddRmsNorm: gamma has the last dims of x, epsilon is not negative."""
    x, gamma = call.tensor("x").static, call.tensor("gamma").static
    if call.op.type != "RmsNorm":
        x, other = call.tensor("x1").static, call.tensor("x2").static
        if x is not None and other is not None and x != other:
            yield f"x1 {list(x)} and x2 {list(other)} differ"
            return
    if x is not None and gamma is not None and (not gamma or x[-len(gamma) :] != gamma):
        yield f"gamma {list(gamma)} is not the last dims of x {list(x)}"
    epsilon = call.number("epsilon")
    if epsilon is not None and not epsilon >= 0:
        yield f"epsilon is {epsilon:g}"


RULES = (
    limit(
        "air-apply-rotary",
        ("ApplyRotaryPosEmb",),
        f"{TRANSFORMER}:posembedding/apply_rotary_pos_emb/op_host/apply_rotary_pos_emb_tiling.cpp",
        apply_rotary,
    ),
    limit(
        "air-rotary-mul",
        ("RotaryMul",),
        "hiascend:torch_npu npu_rotary_mul",
        rotary_mul,
        certainty="inferred",
    ),
    limit(
        "air-rotary-position",
        ("RotaryPositionEmbedding",),
        f"{TRANSFORMER}:posembedding/rotary_position_embedding/op_host/rope_rotate_half_tiling.cpp",
        rotary_position,
    ),
    limit("air-swiglu", ("SwiGlu",), f"{NN}:activation/swi_glu/op_host/swi_glu_tiling.cpp", swiglu),
    limit(
        "air-norms",
        ("RmsNorm", "AddRmsNorm", "InplaceAddRmsNorm"),
        f"{NN}:norm/rms_norm/op_graph/rms_norm_proto.h",
        norm,
    ),
)
