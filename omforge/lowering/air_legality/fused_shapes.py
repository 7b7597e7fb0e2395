"""Shapes of results of the fused operators; what their operands must be is each one's limits."""

from __future__ import annotations

from collections.abc import Mapping

from omforge.lowering.air_legality.attention_limits import LAYOUTS, sizes
from omforge.lowering.air_legality.shapes import Infer, Shape, Shapes, of_first
from omforge.lowering.air_legality.subject import Call


def norm(call: Call) -> Shapes:
    """RmsNorm, AddRmsNorm, LayerNorm: y as x; of gamma's dims one number each in rstd."""
    first = "x" if call.has("x") else "x1"
    x, gamma = call.tensor(first).static, call.tensor("gamma").static
    if x is None:
        return None
    found: dict[str, list[Shape]] = {"y": [x]}
    if call.op.type in ("RmsNorm", "AddRmsNorm") and gamma is not None and len(gamma) <= len(x):
        found["rstd"] = [x[: len(x) - len(gamma)] + (1,) * len(gamma)]
    if call.op.type == "AddRmsNorm":
        found["x"] = [x]
    return found


def halved(call: Call) -> Shapes:
    """SwiGlu, GeGluV2: one dim is halved."""
    x, dim = call.tensor("x").static, call.integer("dim")
    if x is None or dim is None or not -len(x) <= dim < len(x) or x[dim] % 2:
        return None
    at = dim % len(x)
    y = (*x[:at], x[at] // 2, *x[at + 1 :])
    return {"y": [y], "gelu": [y]} if call.op.type == "GeGluV2" else {"y": [y]}


def written(call: Call) -> Shapes:
    """What is written keeps its shape: every output of an input's name has it."""
    assert call.prototype is not None
    found: dict[str, list[Shape]] = {}
    for name in call.prototype.refs:
        shapes = [operand.tensor.static for operand in call.inputs.get(name, ())]
        if shapes and None not in shapes:
            found[name] = [shape for shape in shapes if shape is not None]
    return found


def attention(call: Call) -> Shapes:
    """Fused attention: the query's sizes with the value's head size, in the output's layout."""
    query, value = call.tensor("query").static, call.tensor("value").static
    layouts = LAYOUTS.get(call.text("input_layout"))
    heads = call.integer("num_heads") or 0
    if query is None or value is None or layouts is None or call.has("block_table"):
        return None
    of = sizes(query, layouts[0], heads)
    of_value = sizes(value, layouts[0], call.integer("num_key_value_heads") or heads)
    if of is None or of_value is None:
        return None
    size = of_value.size
    named = {"B": of.batch, "N": of.heads, "S": of.tokens, "T": of.tokens, "D": size}
    named["H"] = heads * size
    found = {"attention_out": [tuple(named[letter] for letter in layouts[1])]}
    if call.op.type == "FusedInferAttentionScore" and call.flag("softmax_lse_flag"):
        packed = "T" in layouts[0]
        lse = (of.tokens, of.heads, 1) if packed else (of.batch, of.heads, of.tokens, 1)
        found["softmax_lse"] = [lse]
    return found


def weight_quant_product(call: Call) -> Shapes:
    """WeightQuantBatchMatmulV2: [m, n]."""
    x, weight = call.tensor("x").static, call.tensor("weight").static
    if x is None or weight is None or len(x) != 2 or len(weight) != 2:
        return None
    m = x[1] if call.flag("transpose_x") else x[0]
    transposed = call.flag("transpose_weight")
    packed = 8 if call.tensor("weight").dtype == "int32" and not transposed else 1
    return {"y": [(m, weight[0] if transposed else weight[1] * packed)]}


def quant_product(call: Call) -> Shapes:
    """QuantBatchMatmulV3: [..., m, n]."""
    x1, x2 = call.tensor("x1").static, call.tensor("x2").static
    if x1 is None or x2 is None or len(x1) < 2 or len(x1) != len(x2) or x1[:-2] != x2[:-2]:
        return None
    m = x1[-1] if call.flag("transpose_x1") else x1[-2]
    n = x2[-2] if call.flag("transpose_x2") else x2[-1]
    return {"y": [(*x1[:-2], m, n)]}


def grouped_product(call: Call) -> Shapes:
    """GroupedMatmul with one x and one y: [m, n]."""
    x, weight = call.tensor("x").static, call.tensor("weight").static
    if x is None or weight is None or len(x) != 2 or call.integer("group_type") != 0:
        return None
    if len(call.outputs.get("y", ())) != 1 or len(weight) not in (2, 3):
        return None
    return {"y": [(x[0], weight[-2] if call.flag("transpose_weight") else weight[-1])]}


def dynamic_quant(call: Call) -> Shapes:
    """DynamicQuant: y as x, one scale for each row."""
    x = call.tensor("x").static
    return None if not x else {"y": [x], "scale": [x[:-1]]}


def gating(call: Call) -> Shapes:
    """MoeGatingTopKSoftmax, V2: k of each token."""
    x, k = call.tensor("x").static, call.integer("k")
    if not x or k is None:
        return None
    found = {"y": [(*x[:-1], k)], "expert_idx": [(*x[:-1], k)]}
    return found if call.op.type.endswith("V2") else {**found, "row_idx": [(*x[:-1], k)]}


def routing(call: Call) -> Shapes:
    """MoeInitRouting, V2 without drops: a row for each token of each expert."""
    x, chosen = call.tensor("x").static, call.tensor("expert_idx").static
    active = call.integer("active_num") or 0
    if x is None or chosen is None or len(x) != 2 or len(chosen) != 2 or x[0] != chosen[0]:
        return None
    every = x[0] * chosen[1]
    if call.op.type == "MoeInitRouting":
        rows = [(every,)]
        made = [(min(x[0], active) * chosen[1], x[1])]
        return {"expanded_x": made, "expanded_row_idx": rows, "expanded_expert_idx": rows}
    if call.integer("drop_pad_mode"):
        return None
    found: dict[str, list[Shape]] = {
        "expanded_x": [(min(every, active) if active > 0 else every, x[1])],
        "expanded_row_idx": [(every,)],
    }
    experts = call.integer("expert_num") or 0
    if call.integer("expert_tokens_count_or_cumsum_flag") and experts > 0:
        found["expert_tokens_count_or_cumsum"] = [(experts,)]
    return found


def putting_together(call: Call) -> Shapes:
    """MoeFinalizeRoutingV2: a row for each token."""
    x, scales = call.tensor("expanded_x").static, call.tensor("scales").static
    if not x or scales is None or len(scales) != 2:
        return None
    return {"y": [(scales[0], x[-1])]}


FUSED: Mapping[str, Infer] = {
    **dict.fromkeys(("RmsNorm", "AddRmsNorm", "LayerNorm", "LayerNormV3", "LayerNormV4"), norm),
    **dict.fromkeys(("SwiGlu", "GeGluV2"), halved),
    **dict.fromkeys(
        (
            *("Scatter", "ScatterUpdate", "ScatterNdUpdate", "ScatterList", "QuantUpdateScatter"),
            *("ApplyRotaryPosEmb", "Assign", "InplaceUpdate"),
        ),
        written,
    ),
    **dict.fromkeys(("RotaryMul", "RotaryPositionEmbedding"), of_first),
    **dict.fromkeys(("MoeGatingTopKSoftmax", "MoeGatingTopKSoftmaxV2"), gating),
    **dict.fromkeys(("MoeInitRouting", "MoeInitRoutingV2"), routing),
    "MoeFinalizeRoutingV2": putting_together,
    **dict.fromkeys(
        ("IncreFlashAttention", "PromptFlashAttention", "FusedInferAttentionScore"), attention
    ),
    "WeightQuantBatchMatmulV2": weight_quant_product,
    "QuantBatchMatmulV3": quant_product,
    "GroupedMatmul": grouped_product,
    "DynamicQuant": dynamic_quant,
}
