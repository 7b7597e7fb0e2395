"""What the operators of experts refuse that choose, gather and put together; and DynamicQuant.

Letters: n tokens, k experts of each, H their width, E all experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from omforge.lowering.air_legality.limits import NN, TRANSFORMER, limit
from omforge.lowering.air_legality.subject import Call
from omforge.lowering.target import Target


def gating(call: Call, target: Target) -> Iterator[str]:
    """MoeGatingTopKSoftmax, V2: x of 2 or 3 dims, k up to the number of experts and 1024."""
    x, k = call.tensor("x").static, call.integer("k")
    if x is None or k is None:
        return
    if len(x) not in (2, 3) or 0 in x:
        yield f"x is {list(x)}: 2 or 3 dims, none of them 0"
        return
    if not 0 < k <= min(x[-1], 1024):
        yield f"the {k} best of {x[-1]} experts: 1 to 1024, and no more than there are"
    if target.family.name == "950" and x[-1] > 2048:
        yield f"{x[-1]} experts, more than 2048"
    finished = call.tensor("finished").static
    if finished is not None and finished != x[:-1]:
        yield f"finished {list(finished)} is not {list(x[:-1])}"


def routing(call: Call, target: Target) -> Iterator[str]:
    """MoeInitRouting, V2: x [n, H] and expert_idx [n, k]; numbers of experts where they count."""
    x, chosen = call.tensor("x").static, call.tensor("expert_idx").static
    if x is not None and chosen is not None and (len(x) != 2 or len(chosen) != 2):
        yield f"x {list(x)} and expert_idx {list(chosen)} are not [n, H] and [n, k]"
        return
    if x is not None and chosen is not None and x[0] != chosen[0]:
        yield f"x {list(x)} and expert_idx {list(chosen)} are of different tokens"
    if call.op.type == "MoeInitRouting":
        rows = call.tensor("row_idx").static
        if rows is not None and chosen is not None and rows != chosen:
            yield f"row_idx {list(rows)} is not {list(chosen)}, as expert_idx"
    else:
        yield from _routing_attributes(call, None if x is None else x[0])
    if (call.integer("active_num") or 0) < 0:
        yield f"active_num is {call.integer('active_num')}"


def _routing_attributes(call: Call, tokens: int | None) -> Iterator[str]:
    pad, counts = call.integer("drop_pad_mode"), call.integer("expert_tokens_count_or_cumsum_flag")
    experts, capacity = call.integer("expert_num") or 0, call.integer("expert_capacity") or 0
    if pad not in (0, 1) or counts not in (0, 1, 2):
        yield f"drop_pad_mode {pad}, expert_tokens_count_or_cumsum_flag {counts}: 0 or 1, 0 to 2"
        return
    if (pad or counts) and experts < 1:
        yield f"expert_num is {experts}, which is counted by"
    if pad and (capacity < 1 or (tokens is not None and capacity > tokens)):
        yield f"expert_capacity is {capacity} of {tokens} tokens"


def putting_together(call: Call, target: Target) -> Iterator[str]:
    """MoeFinalizeRoutingV2: n*k rows of H, n x k scales, and expert_idx where there is a bias."""
    mode, x = call.integer("drop_pad_mode"), call.tensor("expanded_x").static
    if mode not in (0, 1, 2, 3):
        yield f"drop_pad_mode is {mode}, not 0 to 3"
        return
    if call.has("bias") and not call.has("expert_idx"):
        yield "bias needs expert_idx"
    if call.has("x2") and not call.has("x1"):
        yield "x2 is there and x1 is not"
    if x is None:
        return
    if len(x) != (2 if mode in (0, 2) else 3):
        yield f"expanded_x {list(x)} with drop_pad_mode {mode}"
        return
    rows, scales = call.tensor("expanded_row_idx").static, call.tensor("scales").static
    if rows is not None and (len(rows) != 1 or (mode in (0, 2) and rows[0] != x[0])):
        yield f"expanded_row_idx {list(rows)} is not [{x[0]}]"
    elif rows is not None and scales is not None and math.prod(scales) != rows[0]:
        yield f"scales {list(scales)} are not of {rows[0]} rows"
    for name in ("x1", "x2"):
        shape = call.tensor(name).static
        if shape is not None and (len(shape) != 2 or shape[-1] != x[-1]):
            yield f"{name} {list(shape)} is not [n, {x[-1]}]"
    bias = call.tensor("bias").static
    if bias is not None and (len(bias) != 2 or bias[-1] != x[-1]):
        yield f"bias {list(bias)} is not [E, {x[-1]}]"


def dynamic_quant(call: Call, target: Target) -> Iterator[str]:
    """DynamicQuant: x of 2 dims or more, an even last one for int4, smooth_scales of it."""
    x, smooth = call.tensor("x").static, call.tensor("smooth_scales").static
    if x is None:
        return
    if len(x) < 2:
        yield f"x {list(x)} has not 2 dims"
        return
    if call.result("y").dtype == "int4" and x[-1] % 2:
        yield f"the last dim of x {list(x)} is odd, y int4"
    if smooth is not None and smooth[-1:] != x[-1:]:
        yield f"smooth_scales {list(smooth)} is not of {x[-1]}"
    elif smooth is not None and len(smooth) != (2 if call.has("group_index") else 1):
        yield f"smooth_scales {list(smooth)} has {len(smooth)} dims"


_MOE = f"{TRANSFORMER}:moe"

RULES = (
    limit(
        "air-expert-gating",
        ("MoeGatingTopKSoftmax", "MoeGatingTopKSoftmaxV2"),
        f"{_MOE}/moe_gating_top_k_softmax/op_host/moe_gating_top_k_softmax_tiling_base.cpp",
        gating,
    ),
    limit(
        "air-expert-routing",
        ("MoeInitRouting", "MoeInitRoutingV2"),
        f"{_MOE}/moe_init_routing_v2/op_host/moe_init_routing_v2_infershape.cpp",
        routing,
    ),
    limit(
        "air-expert-results",
        ("MoeFinalizeRoutingV2",),
        f"{_MOE}/moe_finalize_routing_v2/op_host/moe_finalize_routing_v2_infershape.cpp",
        putting_together,
    ),
    limit(
        "air-dynamic-quant",
        ("DynamicQuant",),
        f"{NN}:quant/dynamic_quant/op_host/dynamic_quant_tiling.cpp",
        dynamic_quant,
    ),
)
