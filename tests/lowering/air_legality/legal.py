"""Legal GE graphs, by name: what the illegal ones are made from."""

from omforge.air.graph import Air
from tests.lowering.air_legality.graphs import Builder

HALF = "float16"
EVERYWHERE = ("Ascend310P3", "Ascend910B4")


def layer() -> Air:
    """Norm, a product with a weight that lies outside, a cast, a residual."""
    b = Builder()
    x = b.data("x", HALF, 1, 4, 64)
    norm = b.op(
        "RmsNorm",
        "norm",
        {"x": x, "gamma": b.const("gamma", HALF, 64)},
        {"y": (HALF, (1, 4, 64)), "rstd": ("float32", (1, 4, 1))},
        epsilon=1e-5,
    )
    weight = b.stored("weight", "weights.bin", HALF, 64, 64, length=8192)
    flat = b.op(
        "Reshape",
        "flat",
        {"x": norm, "shape": b.const("rows", "int64", 2, values=(4, 64))},
        {"y": (HALF, (4, 64))},
        axis=0,
        num_axes=-1,
    )
    product = b.op(
        "MatMulV2",
        "product",
        {"x1": flat, "x2": weight},
        {"y": (HALF, (4, 64))},
        transpose_x1=False,
        transpose_x2=True,
    )
    summed = b.op("Add", "sum", {"x1": product, "x2": x}, {"y": (HALF, (1, 4, 64))})
    cast = b.op("Cast", "cast", {"x": summed}, {"y": ("float32", (1, 4, 64))}, dst_type=0)
    return b.air(cast)


def decode() -> Air:
    """A step: the key and value are written into caches, and attention reads those."""
    b = Builder()
    new = {name: b.data(name, HALF, 1, 4, 1, 64) for name in ("q", "k", "v")}
    at = b.data("at", "int64", 1)
    mask = b.data("mask", "bool", 1, 1, 1, 256)
    written: dict[str, str] = {}
    for name in ("k", "v"):
        cache = b.data(f"{name}_cache", HALF, 1, 4, 256, 64, reference=True)
        written[name] = b.op(
            "Scatter",
            f"write_{name}",
            {"var": cache, "indices": at, "updates": new[name]},
            {"var": (HALF, (1, 4, 256, 64))},
            reduce="update",
            axis=-2,
        )
    attended = b.op(
        "IncreFlashAttention",
        "attention",
        {"query": new["q"], "key": [written["k"]], "value": [written["v"]], "atten_mask": mask},
        {"attention_out": (HALF, (1, 4, 1, 64))},
        num_heads=4,
        scale_value=0.125,
        input_layout="BNSD",
        num_key_value_heads=4,
    )
    return b.air(attended)


def decode_int8() -> Air:
    """A step with an int8 cache that is quantised as it is written, and heads that share it."""
    b = Builder()
    query = b.data("q", HALF, 2, 8, 1, 64)
    new = {name: b.data(name, HALF, 2, 2, 1, 64) for name in ("k", "v")}
    at = b.data("at", "int64", 2)
    scales = b.const("scales", "float32", 64)
    written: dict[str, str] = {}
    for name in ("k", "v"):
        cache = b.data(f"{name}_cache", "int8", 2, 2, 256, 64, reference=True)
        written[name] = b.op(
            "QuantUpdateScatter",
            f"write_{name}",
            {"var": cache, "indices": at, "updates": new[name], "quant_scales": scales},
            {"var": ("int8", (2, 2, 256, 64))},
            reduce="update",
            axis=-2,
            quant_axis=-1,
        )
    attended = b.op(
        "IncreFlashAttention",
        "attention",
        {
            "query": query,
            "key": [written["k"]],
            "value": [written["v"]],
            "antiquant_scale": b.const("antiquant", HALF, 2, 2, 1, 64),
        },
        {"attention_out": (HALF, (2, 8, 1, 64))},
        num_heads=8,
        input_layout="BNSD",
        num_key_value_heads=2,
    )
    return b.air(attended)


def prefill() -> Air:
    """A first chunk with a mask."""
    b = Builder()
    query, key, value = (b.data(name, HALF, 1, 4, 32, 64) for name in ("q", "k", "v"))
    mask = b.data("mask", "bool", 1, 1, 32, 32)
    attended = b.op(
        "PromptFlashAttention",
        "attention",
        {"query": query, "key": key, "value": value, "atten_mask": mask},
        {"attention_out": (HALF, (1, 4, 32, 64))},
        num_heads=4,
        scale_value=0.125,
        pre_tokens=65536,
        next_tokens=0,
        input_layout="BNSD",
    )
    return b.air(attended)


def infer() -> Air:
    """A chunk behind a past, with heads that share key and value."""
    b = Builder()
    query = b.data("q", HALF, 1, 8, 32, 64)
    key, value = (b.data(name, HALF, 1, 2, 256, 64) for name in ("k", "v"))
    mask = b.data("mask", "bool", 1, 1, 32, 256)
    attended = b.op(
        "FusedInferAttentionScore",
        "attention",
        {"query": query, "key": [key], "value": [value], "atten_mask": mask},
        {"attention_out": (HALF, (1, 8, 32, 64)), "softmax_lse": ("float32", (1, 8, 32, 1))},
        num_heads=8,
        scale=0.125,
        input_layout="BNSD",
        num_key_value_heads=2,
    )
    return b.air(attended)


def pages() -> Air:
    """A step over pages of a cache."""
    b = Builder()
    query = b.data("q", HALF, 2, 1, 512)
    table, lengths = b.data("table", "int32", 2, 4), b.data("lengths", "int64", 2)
    key, value = (b.data(f"{name}_pages", HALF, 16, 128, 512) for name in ("k", "v"))
    attended = b.op(
        "IncreFlashAttention",
        "attention",
        {
            "query": query,
            "key": [key],
            "value": [value],
            "actual_seq_lengths": lengths,
            "block_table": table,
        },
        {"attention_out": (HALF, (2, 1, 512))},
        num_heads=8,
        input_layout="BSH",
        num_key_value_heads=8,
        block_size=128,
    )
    return b.air(attended)


def rotary() -> Air:
    """Query and key turned in place, and a tensor turned beside them."""
    b = Builder()
    turned = {
        name: b.op("Relu", f"new_{name}", {"x": b.data(name, HALF, 1, 8, heads, 128)}, {"y": (HALF, (1, 8, heads, 128))})
        for name, heads in (("q", 8), ("k", 2))
    }  # fmt: skip
    cos, sin = (b.data(name, HALF, 1, 8, 1, 128) for name in ("cos", "sin"))
    both = b.op(
        "ApplyRotaryPosEmb",
        "turn",
        {"query": turned["q"], "key": turned["k"], "cos": cos, "sin": sin},
        {"query": (HALF, (1, 8, 8, 128)), "key": (HALF, (1, 8, 2, 128))},
        layout=1,
    )
    x = b.data("x", HALF, 1, 8, 4, 128)
    one = b.op("RotaryMul", "turn_x", {"x": x, "r1": cos, "r2": sin}, {"y": (HALF, (1, 8, 4, 128))})
    return b.air(both, f"{both}:1", one)


def gated() -> Air:
    """A sum that is normalised, and a gated activation."""
    b = Builder()
    x1, x2 = b.data("x1", HALF, 4, 128), b.data("x2", HALF, 4, 128)
    norm = b.op(
        "AddRmsNorm",
        "norm",
        {"x1": x1, "x2": x2, "gamma": b.const("gamma", HALF, 128)},
        {"y": (HALF, (4, 128)), "rstd": ("float32", (4, 1)), "x": (HALF, (4, 128))},
        epsilon=1e-5,
    )
    gate = b.op("SwiGlu", "gate", {"x": norm}, {"y": (HALF, (4, 64))}, dim=-1)
    return b.air(gate, f"{norm}:2")


def quantised() -> Air:
    """A product with an int8 weight, and one of int8 operands."""
    b = Builder()
    x = b.data("x", HALF, 4, 128)
    weights_alone = b.op(
        "WeightQuantBatchMatmulV2",
        "weights_alone",
        {
            "x": x,
            "weight": b.const("w8", "int8", 64, 128),
            "antiquant_scale": b.const("w8_scale", HALF, 64),
        },
        {"y": (HALF, (4, 64))},
        transpose_weight=True,
    )
    small = b.op(
        "AscendQuantV2",
        "small",
        {"x": x, "scale": b.const("x_scale", HALF, 1)},
        {"y": ("int8", (4, 128))},
        dst_type=2,
        axis=-1,
    )
    both = b.op(
        "QuantBatchMatmulV3",
        "both",
        {
            "x1": small,
            "x2": b.op(
                "TransData",
                "nz",
                {"src": b.const("w", "int8", 128, 64)},
                {"dst": ("int8", (128, 64))},
                src_format="ND",
                dst_format="FRACTAL_NZ",
            ),
            "scale": b.const("w_scale", "uint64", 64),
        },
        {"y": (HALF, (4, 64))},
        dtype=1,
    )
    return b.air(weights_alone, both)


def experts() -> Air:
    """A product of two experts, whose weights are in the format of 310P."""
    b = Builder()
    x = b.data("x", HALF, 4, 64)
    weight = b.op(
        "TransData",
        "nz",
        {"src": b.const("w", HALF, 2, 64, 32)},
        {"dst": (HALF, (2, 64, 32))},
        src_format="ND",
        dst_format="FRACTAL_NZ",
    )
    rows = b.const("rows", "int64", 2, values=(1, 4))
    product = b.op(
        "GroupedMatmul",
        "product",
        {"x": [x], "weight": [weight], "group_list": rows},
        {"y0": (HALF, (4, 32))},
        split_item=3,
        group_type=0,
    )
    return b.air(product)


def scatters() -> Air:
    """Caches that 310B can write, too."""
    b = Builder()
    rows, at = b.data("rows", "int64", 2), b.data("at", "int64", 2, 2)
    new, few = b.data("new", HALF, 2, 4, 64), b.data("few", HALF, 2, 64)
    flat = b.data("flat", HALF, 256, 4, 64, reference=True)
    deep = b.data("deep", HALF, 256, 4, 64, reference=True)
    one = b.op(
        "ScatterUpdate",
        "write_rows",
        {"var": flat, "indices": rows, "updates": new},
        {"var": (HALF, (256, 4, 64))},
    )
    other = b.op(
        "ScatterNdUpdate",
        "write_few",
        {"var": deep, "indices": at, "updates": few},
        {"var": (HALF, (256, 4, 64))},
    )
    picked = [
        b.op(
            "GatherV2",
            f"read_{at}",
            {"x": cache, "indices": rows, "axis": b.const(f"axis_{at}", "int64", 1, values=(0,))},
            {"y": (HALF, (2, 4, 64))},
        )
        for at, cache in enumerate((one, other))
    ]
    return b.air(*picked)


def moved() -> Air:
    """Numbers that are moved, joined, parted and summed up."""
    b = Builder()
    x, y = b.data("x", HALF, 2, 6, 32), b.data("y", HALF, 2, 2, 32)
    joined = b.op("ConcatD", "joined", {"x": [x, y]}, {"y": (HALF, (2, 8, 32))}, concat_dim=1, N=2)
    parts = b.op(
        "SplitVD",
        "parts",
        {"x": joined},
        {"y0": (HALF, (2, 5, 32)), "y1": (HALF, (2, 3, 32))},
        size_splits=(5, 3),
        split_dim=1,
        num_split=2,
    )
    order = b.const("order", "int64", 3, values=(0, 2, 1))
    turned = b.op(
        "Transpose", "turned", {"x": f"{parts}:1", "perm": order}, {"y": (HALF, (2, 32, 3))}
    )
    product = b.op(
        "BatchMatMulV2", "product", {"x1": parts, "x2": turned}, {"y": (HALF, (2, 5, 3))}
    )
    begin = b.const("begin", "int64", 3, values=(0, 1, 0))
    size = b.const("size", "int64", 3, values=(2, 4, 3))
    cut = b.op(
        "Slice", "cut", {"x": product, "offsets": begin, "size": size}, {"y": (HALF, (2, 4, 3))}
    )
    deep = b.op("Unsqueeze", "deep", {"x": cut}, {"y": (HALF, (2, 1, 4, 3))}, axes=(1,))
    flat = b.op("Squeeze", "flat", {"x": deep}, {"y": (HALF, (2, 4, 3))}, axis=(1,))
    mean = b.op(
        "ReduceMean",
        "mean",
        {"x": flat, "axes": b.const("last", "int64", 1, values=(-1,))},
        {"y": (HALF, (2, 4, 1))},
        keep_dims=True,
    )
    less = b.op("Sub", "less", {"x1": flat, "x2": mean}, {"y": (HALF, (2, 4, 3))})
    return b.air(less)


def gathered() -> Air:
    """Numbers that are cut out, padded, stacked and picked."""
    b = Builder()
    x = b.data("x", HALF, 4, 6, 32)
    begin, end, strides = (
        b.const(name, "int64", 3, values=values)
        for name, values in (("begin", (0, 1, 0)), ("end", (4, 5, 99)), ("strides", (1, 2, 1)))
    )
    cut = b.op(
        "StridedSlice",
        "cut",
        {"x": x, "begin": begin, "end": end, "strides": strides},
        {"y": (HALF, (4, 2, 32))},
        begin_mask=1,
    )
    wide = b.op(
        "PadV3",
        "wide",
        {"x": cut, "paddings": b.const("paddings", "int64", 6, values=(0, 0, 1, 0, 0, 0))},
        {"y": (HALF, (4, 3, 32))},
        mode="constant",
        paddings_contiguous=True,
    )
    both = b.op("Pack", "both", {"x": [wide, wide]}, {"y": (HALF, (4, 2, 3, 32))}, axis=1, N=2)
    at = b.data("at", "int32", 5, 2)
    picked = b.op("GatherNd", "picked", {"x": both, "indices": at}, {"y": (HALF, (5, 3, 32))})
    return b.air(picked)


def routed() -> Air:
    """Tokens that are sent to two experts each, and put together again."""
    b = Builder()
    x, scores = b.data("x", HALF, 4, 64), b.data("scores", HALF, 4, 8)
    chosen = b.op(
        "MoeGatingTopKSoftmax",
        "choose",
        {"x": scores},
        {"y": (HALF, (4, 2)), "expert_idx": ("int32", (4, 2)), "row_idx": ("int32", (4, 2))},
        k=2,
    )
    sent = b.op(
        "MoeInitRoutingV2",
        "send",
        {"x": x, "expert_idx": f"{chosen}:1"},
        {
            "expanded_x": (HALF, (8, 64)),
            "expanded_row_idx": ("int32", (8,)),
            "expert_tokens_count_or_cumsum": ("int32", (8,)),
            "expert_tokens_before_capacity": ("int32", (8,)),
        },
        expert_num=8,
        expert_tokens_count_or_cumsum_flag=1,
    )
    rows = b.op("Cast", "rows", {"x": f"{sent}:2"}, {"y": ("int64", (8,))}, dst_type=9)
    product = b.op(
        "GroupedMatmul",
        "product",
        {"x": [sent], "weight": [b.const("w", HALF, 8, 64, 32)], "group_list": rows},
        {"y0": (HALF, (8, 32))},
        split_item=3,
        group_type=0,
    )
    whole = b.op(
        "MoeFinalizeRoutingV2",
        "whole",
        {"expanded_x": product, "expanded_row_idx": f"{sent}:1", "scales": chosen},
        {"y": (HALF, (4, 32))},
    )
    return b.air(whole)


def turned() -> Air:
    """A tensor turned by its positions, and quantised by its rows."""
    b = Builder()
    x = b.data("x", HALF, 1, 4, 2, 64)
    cos, sin = (b.data(name, HALF, 1, 4, 1, 64) for name in ("cos", "sin"))
    y = b.op(
        "RotaryPositionEmbedding",
        "turn",
        {"x": x, "cos": cos, "sin": sin},
        {"y": (HALF, (1, 4, 2, 64))},
        mode=0,
    )
    return b.air(y)


def small() -> Air:
    """Rows that are quantised by what is in them."""
    b = Builder()
    x = b.data("x", HALF, 4, 64)
    outputs = {"y": ("int8", (4, 64)), "scale": ("float32", (4,))}
    y = b.op(
        "DynamicQuant",
        "quantise",
        {"x": x, "smooth_scales": b.const("smooth", HALF, 64)},
        outputs,
        dst_type=2,
    )
    return b.air(y, f"{y}:1")


GRAPHS = {
    graph.__name__: graph
    for graph in (
        *(layer, decode, decode_int8, prefill, infer, pages, rotary, gated, quantised, experts),
        *(scatters, moved, gathered, routed, turned, small),
    )
}
SOCS = {
    **dict.fromkeys(("infer", "routed", "turned", "small"), ("Ascend910B4",)),
    "scatters": (*EVERYWHERE, "Ascend310B4"),
    "moved": (*EVERYWHERE, "Ascend310B4"),
}
"""Where a graph is legal; the others are on 310P and 910B."""
