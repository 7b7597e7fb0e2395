"""What the fused products refuse: with quantised weights, with quantised inputs, and of experts.

Letters: [m, k] x [k, n]; e experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from omforge.lowering.air_legality.limits import NN, TRANSFORMER, limit
from omforge.lowering.air_legality.subject import Call
from omforge.lowering.target import Target

Shape = tuple[int, ...]
_INNER = 65535  # of a last dim


def weight_quant_product(call: Call, target: Target) -> Iterator[str]:
    """WeightQuantBatchMatmulV2: 2-D operands of one k, groups of 32, scales that fit them."""
    group = call.integer("antiquant_group_size") or 0
    on_310p = target.family.name == "310p"
    if call.integer("inner_precise") not in (0, 1):
        yield f"inner_precise is {call.integer('inner_precise')}, not 0 or 1"
    if on_310p:
        yield from _weight_quant_310p(call, group)
    x, weight = call.tensor("x").static, call.tensor("weight").static
    if x is None or weight is None:
        return
    if not on_310p and (len(x) != 2 or len(weight) != 2):
        yield f"x {list(x)} and weight {list(weight)} are not 2-D"
        return
    if len(x) < 2 or len(weight) < 2:
        yield f"x {list(x)} and weight {list(weight)} are not matrices"
        return
    (_, k), (k_of_weight, n) = _matrix(call, x, "transpose_x"), _weight(call, weight)
    if call.tensor("weight").dtype == "int4" and weight[-1] % 2:
        yield f"the last dim of an int4 weight {list(weight)} is odd"
    if k != k_of_weight:
        yield f"x {list(x)} has k = {k}, weight {list(weight)} has {k_of_weight}"
        return
    if target.family.name != "950" and max(k, n) > _INNER:
        yield f"k = {k} and n = {n}: at most {_INNER}"
    if group and (group % 32 or not 0 < group < k):
        yield f"antiquant_group_size is {group}: 0, or a multiple of 32 below k = {k}"
    else:
        yield from _scales(call, k, n, group)
    yield from _bias(call, n)


def _weight_quant_310p(call: Call, group: int) -> Iterator[str]:
    if group:
        yield f"310P takes no groups, and antiquant_group_size is {group}"
    if not call.flag("transpose_weight"):
        yield "310P takes a transposed weight, [n, k], alone"
    if call.has("quant_scale") or call.has("quant_offset"):
        yield "310P takes no quant_scale and quant_offset"


def _weight(call: Call, weight: Shape) -> tuple[int, int]:
    """Return k and n of a weight; an int32 holds eight int4 of its last dim."""
    width = 8 if call.tensor("weight").dtype == "int32" else 1
    shape = (*weight[:-1], weight[-1] * width)
    return _matrix(call, shape, "transpose_weight")


def _scales(call: Call, k: int, n: int, group: int) -> Iterator[str]:
    scale, offset = call.tensor("antiquant_scale"), call.tensor("antiquant_offset")
    shape = scale.static
    if shape is not None and math.prod(shape) != 1:
        groups = -(-k // group) if group else 1
        grouped = (n, groups) if call.flag("transpose_weight") else (groups, n)
        fits = (grouped,) if group else ((n,), (1, n), (n, 1))
        if shape not in fits:
            told = ", ".join(str(list(each)) for each in fits)
            yield f"antiquant_scale {list(shape)} is not {told}"
    if None not in (shape, offset.static) and shape != offset.static:
        yield f"antiquant_scale is {scale}, antiquant_offset {offset}"
    if call.has("antiquant_offset") and None not in (scale.dtype, offset.dtype):
        wanted = "int32" if scale.dtype in ("uint64", "int64") else scale.dtype
        if offset.dtype != wanted:
            yield f"antiquant_scale is {scale}, antiquant_offset {offset}, not {wanted}"


def _bias(call: Call, n: int) -> Iterator[str]:
    bias = call.tensor("bias").static
    if bias is not None and bias not in ((0,), (n,), (1, n)):
        yield f"bias {list(bias)} is not [{n}]"


def quant_product(call: Call, target: Target) -> Iterator[str]:
    """QuantBatchMatmulV3: operands of one k, last dims up to 65535, scales of 1 or n."""
    x1, x2 = call.tensor("x1").static, call.tensor("x2").static
    if target.family.name == "310p" and call.has("pertoken_scale"):
        yield "310P takes no pertoken_scale"
    yield from _quant_dtypes(call)
    if x1 is None or x2 is None:
        return
    ranks = (len(x1), len(x2))
    if call.tensor("x2").layout == "FRACTAL_NZ" and ranks[1] >= 4:
        return  # its storage shape, in blocks
    if not 2 <= min(ranks) <= max(ranks) <= 6:
        yield f"x1 {list(x1)} and x2 {list(x2)} have not 2 to 6 dims"
        return
    (m, k), (k_of_x2, n) = _matrix(call, x1, "transpose_x1"), _matrix(call, x2, "transpose_x2")
    if k != k_of_x2:
        yield f"x1 {list(x1)} has k = {k}, x2 {list(x2)} has {k_of_x2}"
    if target.family.name in ("910b", "910_93") and max(x1[-1], x2[-1]) > _INNER:
        yield f"the last dims of x1 {list(x1)} and x2 {list(x2)}: at most {_INNER}"
    if call.tensor("x1").dtype == "int4" and (x1[-1] % 2 or x2[-1] % 2):
        yield f"the last dims of int4 x1 {list(x1)} and x2 {list(x2)} are not even"
    if call.tensor("x1").dtype == "int4" and call.flag("transpose_x1"):
        yield "an int4 x1 is transposed"
    for name, sizes in (("scale", (1, n)), ("offset", (1, n)), ("pertoken_scale", (m,))):
        shape = call.tensor(name).static
        if shape is not None and (len(shape) != 1 or shape[0] not in sizes):
            yield f"{name} {list(shape)} is not {' or '.join(f'[{size}]' for size in sizes)}"
    bias = call.tensor("bias").static
    if bias is not None and (bias[-1:] != (n,) or len(bias) not in (1, 3)):
        yield f"bias {list(bias)} is not [{n}]"


def _quant_dtypes(call: Call) -> Iterator[str]:
    """What goes together beyond the columns of the kernel's table."""
    x1, x2 = call.tensor("x1").dtype, call.tensor("x2").dtype
    y, scale = call.result("y").dtype, call.tensor("scale").dtype
    if None not in (x1, x2) and x1 != x2:
        yield f"x1 is {x1}, x2 {x2}"
    if call.has("pertoken_scale"):
        if y not in (None, "float16", "bfloat16"):
            yield f"with pertoken_scale y is {y}, not float16 or bfloat16"
    elif y in ("float16", "int8") and scale == "float32":
        yield f"y is {y}, scale float32: without pertoken_scale it is uint64 or int64"


def grouped_product(call: Call, target: Target) -> Iterator[str]:
    """GroupedMatmul: one x and one weight [e, k, n] on 310P, operands of one k, lists that fit."""
    kind, split = call.integer("group_type"), call.integer("split_item")
    counts = {name: len(call.inputs.get(name, ())) for name in ("x", "weight")}
    outputs = len(call.outputs.get("y", ()))
    if kind not in (-1, 0, 2) or split not in (0, 1, 2, 3):
        yield f"group_type is {kind}, split_item {split}: -1, 0 or 2, and 0 to 3 are taken"
        return
    if not 0 <= (call.integer("act_type") or 0) < 6 or call.integer("act_type") == 3:
        yield f"act_type is {call.integer('act_type')}"
    if not all(counts.values()) or not outputs:
        yield f"it has {counts['x']} x, {counts['weight']} weight and {outputs} y"
        return
    if target.family.name == "310p":
        if (kind, counts["x"], counts["weight"], outputs) != (0, 1, 1, 1):
            yield "310P takes group_type 0 with one x, one weight and one y alone"
        if call.has("scale") or call.has("antiquant_scale") or call.has("per_token_scale"):
            yield "310P takes no quantised operands"
    if kind == 0 and call.flag("transpose_x"):
        yield "x is transposed with group_type 0"
    if kind == -1 and not counts["x"] == counts["weight"] == outputs:
        yield f"{counts['x']} x, {counts['weight']} weight and {outputs} y with group_type -1"
    if kind != -1 and not call.has("group_list"):
        yield f"group_type {kind} needs a group_list"
    if split in (2, 3) and outputs != 1:
        yield f"split_item {split} makes one y, not {outputs}"
    yield from _grouped_sizes(call, kind)


def _grouped_sizes(call: Call, kind: int) -> Iterator[str]:
    rows = call.tensor("group_list").static
    weights = call.inputs["weight"]
    first, x = weights[0].tensor.static, call.tensor("x").static
    if first is None or x is None:
        return
    if kind == 0 and len(weights) == 1 and len(first) != 3:
        if not (weights[0].tensor.layout == "FRACTAL_NZ" and len(first) == 5):
            yield f"one weight of all experts is {list(first)}, not [e, k, n]"
        return
    if kind != 0 or len(x) < 2 or len(first) < 2:
        return
    experts = first[0] if len(weights) == 1 else len(weights)
    if rows is not None and rows != (experts,) and call.integer("group_list_type") != 2:
        yield f"group_list {list(rows)} is not [{experts}], one number for each expert"
    if experts > 1024:
        yield f"{experts} experts, more than 1024"
    k, _ = _matrix(call, first, "transpose_weight")
    if x[-1] != k:
        yield f"x {list(x)} has k = {x[-1]}, weight {list(first)} has {k}"
    if x[-1] > _INNER or first[-1] > _INNER:
        yield f"the last dims of x {list(x)} and weight {list(first)}: at most {_INNER}"


def _matrix(call: Call, shape: Shape, transposed: str) -> tuple[int, int]:
    """The last two dims as they are multiplied."""
    rows, columns = shape[-2:]
    return (columns, rows) if call.flag(transposed) else (rows, columns)


RULES = (
    limit(
        "air-weight-quant-product",
        ("WeightQuantBatchMatmulV2",),
        f"{NN}:matmul/weight_quant_batch_matmul_v2/op_host/op_tiling/"
        "weight_quant_batch_matmul_v2_tiling.cpp",
        weight_quant_product,
    ),
    limit(
        "air-quant-product",
        ("QuantBatchMatmulV3",),
        f"{NN}:matmul/quant_batch_matmul_v3/op_host/op_tiling/quant_batch_matmul_v3_tiling.cpp",
        quant_product,
    ),
    limit(
        "air-grouped-product",
        ("GroupedMatmul",),
        f"{TRANSFORMER}:gmm/grouped_matmul/op_host/grouped_matmul_infershape.cpp",
        grouped_product,
    ),
)
