"""Illegal in shapes, and in what the tilings of fused operators refuse."""

from omforge.air.graph import Air, Desc, Op
from omforge.air.names import naming
from tests.lowering.air_legality.graphs import added, described, fed, numbered, resized, told
from tests.lowering.air_legality.illegal_parts import Illegal

A2 = "Ascend910B4"


def shaped(air: Air, shapes: dict[str, tuple[int, ...]]) -> Air:
    """Give tensors other shapes: "name", or "name:output"."""
    for item, shape in shapes.items():
        name, _, output = item.partition(":")
        air = described(air, name, int(output or 0), shape=shape)
    return air


def pair(one: str, its: tuple[int, ...], other: str, others: tuple[int, ...]) -> Op:
    """A sum of two tensors of float16."""
    descs = (Desc("x1", "float16", its), Desc("x2", "float16", others))
    made = Desc("y", "float16", (1, *its))
    return Op("pair", "Add", (one, other), descs, (made,), naming(("x1", "x2"), ("y",)))


SHAPES = (
    Illegal("air-shapes-fit", "a product of other sizes", "moved", lambda air: told(air, "product", adj_x2=True)),
    Illegal("air-shapes-fit", "a sum that does not broadcast", "layer", lambda air: added(air, pair("weight:0", (64, 64), "x:0", (1, 4, 64)))),
    Illegal("air-shapes-fit", "a join of other sizes", "moved", lambda air: described(air, "y", shape=(2, 2, 16))),
    Illegal("air-shapes-fit", "parts that are too many", "moved", lambda air: told(air, "parts", size_splits=(5, 4))),
    Illegal("air-shapes-fit", "a slice beyond the end", "moved", lambda air: numbered(air, "size", 2, 5, 3)),
    Illegal("air-shapes-fit", "an order of other dims", "moved", lambda air: numbered(air, "order", 0, 2, 2)),
    Illegal("air-shapes-fit", "a dim of 4 squeezed", "moved", lambda air: told(air, "flat", axis=(2,))),
    Illegal("air-shapes-fit", "a stride of 0", "gathered", lambda air: numbered(air, "strides", 1, 0, 1)),
    Illegal("air-shapes-fit", "indices of too many dims", "gathered", lambda air: described(air, "at", shape=(5, 7))),
    Illegal("air-output-shapes", "a cut with another stride", "gathered", lambda air: numbered(air, "strides", 1, 1, 1)),
    Illegal("air-output-shapes", "rows padded on both sides", "gathered", lambda air: numbered(air, "paddings", 0, 0, 1, 1, 0, 0)),
    Illegal("air-output-shapes", "a stack along another axis", "gathered", lambda air: told(air, "both", axis=2)),
    Illegal("air-output-shapes", "a sum of another shape", "layer", lambda air: described(air, "sum", shape=(1, 2, 64))),
    Illegal("air-output-shapes", "rows that are read", "scatters", lambda air: described(air, "read_0", shape=(2, 4, 32))),
    Illegal("air-output-shapes", "a mean without its dim", "moved", lambda air: told(air, "mean", keep_dims=False)),
    Illegal("air-output-shapes", "attention in another layout", "prefill", lambda air: described(air, "attention", shape=(1, 32, 4, 64))),
    Illegal("air-output-dtypes", "a moved tensor of another dtype", "moved", lambda air: described(air, "deep", dtype="float32")),
)  # fmt: skip

ATTENTION = (
    Illegal("air-incre-attention", "a layout that it has not", "decode", lambda air: told(air, "attention", input_layout="TND")),
    Illegal("air-incre-attention", "heads that do not share evenly", "decode", lambda air: told(air, "attention", num_key_value_heads=3)),
    Illegal("air-incre-attention", "heads as the default has them", "decode", lambda air: told(air, "attention", num_key_value_heads=None)),
    Illegal("air-incre-attention", "another head size in the cache", "pages", lambda air: described(described(air, "k_pages", shape=(16, 128, 1024)), "v_pages", shape=(16, 128, 1024))),
    Illegal("air-incre-attention", "a mask shorter than the cache", "decode", lambda air: described(air, "mask", shape=(1, 1, 1, 128))),
    Illegal("air-incre-attention", "a mask that is added", "decode", lambda air: described(air, "mask", dtype="float16")),
    Illegal("air-incre-attention", "int8 without scales", "decode_int8", lambda air: fed(air, "attention", 11, "")),
    Illegal("air-incre-attention", "scales of one half", "decode_int8", lambda air: resized(air, "antiquant", 1, 2, 1, 64)),
    Illegal("air-incre-attention", "many rows on 310P", "pages", lambda air: shaped(air, {"q": (300, 1, 512), "table": (300, 4), "lengths": (300,), "attention": (300, 1, 512)})),
    Illegal("air-incre-attention", "another layout than the tensors", "decode_int8", lambda air: told(air, "attention", input_layout="BSND")),
    Illegal("air-incre-attention", "two tokens", "decode", lambda air: described(described(air, "q", shape=(1, 4, 2, 64)), "attention", shape=(1, 4, 2, 64))),
    Illegal("air-incre-attention", "a precision that is none", "decode", lambda air: told(air, "attention", inner_precise=2)),
    Illegal("air-incre-attention", "pages of 100", "pages", lambda air: told(air, "attention", block_size=100)),
    Illegal("air-incre-attention", "pages without lengths", "pages", lambda air: fed(air, "attention", 5, "")),
    Illegal("air-prompt-attention", "a mask that is not square on 310P", "prefill", lambda air: shaped(air, {"q": (1, 4, 16, 64), "mask": (1, 1, 16, 32), "attention": (1, 4, 16, 64)})),
    Illegal("air-prompt-attention", "a window on 310P", "prefill", lambda air: told(air, "attention", pre_tokens=8)),
    Illegal("air-prompt-attention", "a band on 310P", "prefill", lambda air: told(air, "attention", sparse_mode=4)),
    Illegal("air-prompt-attention", "a small mask for a band", "prefill", lambda air: told(air, "attention", sparse_mode=4), A2),
    Illegal("air-prompt-attention", "a mask that does not cover", "prefill", lambda air: described(air, "mask", shape=(1, 1, 32, 16)), A2),
    Illegal("air-prompt-attention", "a sparse_mode that is none", "prefill", lambda air: told(air, "attention", sparse_mode=7), A2),
    Illegal("air-infer-attention", "a layout that it has not", "infer", lambda air: told(air, "attention", input_layout="BDNS"), A2),
    Illegal("air-infer-attention", "a mask of the chunk alone", "infer", lambda air: described(air, "mask", shape=(1, 1, 32, 32)), A2),
    Illegal("air-infer-attention", "a head size of 40", "infer", lambda air: shaped(air, {"q": (1, 8, 32, 40), "k": (1, 2, 256, 40), "v": (1, 2, 256, 40), "attention": (1, 8, 32, 40)}), A2),
    Illegal("air-infer-attention", "heads that are not stated", "infer", lambda air: told(air, "attention", num_key_value_heads=None), A2),
)  # fmt: skip

WRITERS = (
    Illegal("air-scatter", "updates of more heads", "decode", lambda air: described(air, "k", shape=(1, 8, 1, 64))),
    Illegal("air-scatter", "an index for no row", "decode", lambda air: described(air, "at", shape=(2,))),
    Illegal("air-scatter", "an axis too far from behind", "decode", lambda air: told(air, "write_k", axis=-3)),
    Illegal("air-scatter", "an axis that is none", "decode", lambda air: told(air, "write_k", axis=4)),
    Illegal("air-scatter-axis", "the axis is left out", "decode", lambda air: told(air, "write_k", axis=None)),
    Illegal("air-quant-update-scatter", "quantised along the heads", "decode_int8", lambda air: told(air, "write_k", quant_axis=1)),
    Illegal("air-quant-update-scatter", "scales for another width", "decode_int8", lambda air: resized(air, "scales", 32)),
    Illegal("air-scatter-update", "updates of other rows", "scatters", lambda air: described(air, "new", shape=(2, 4, 32))),
    Illegal("air-scatter-nd-update", "indices of too many dims", "scatters", lambda air: described(air, "at", shape=(2, 4))),
)  # fmt: skip

LAYERS = (
    Illegal("air-apply-rotary", "another layout", "rotary", lambda air: told(air, "turn", layout=3)),
    Illegal("air-apply-rotary", "cosines for each head", "rotary", lambda air: fed(fed(air, "turn", 2, "x:0"), "turn", 3, "x:0")),
    Illegal("air-rotary-mul", "cosines for some heads", "rotary", lambda air: fed(fed(air, "turn_x", 1, "k:0"), "turn_x", 2, "k:0")),
    Illegal("air-swiglu", "a dim that is none", "gated", lambda air: told(air, "gate", dim=2)),
    Illegal("air-swiglu", "halves that are not aligned on 310P", "gated", lambda air: shaped(resized(air, "gamma", 80), {"x1": (4, 80), "x2": (4, 80), "norm": (4, 80), "norm:2": (4, 80), "gate": (4, 40)})),
    Illegal("air-norms", "gamma of another width", "gated", lambda air: resized(air, "gamma", 64)),
    Illegal("air-norms", "sums of other shapes", "gated", lambda air: described(air, "x2", shape=(8, 128))),
)  # fmt: skip

PRODUCTS = (
    Illegal("air-weight-quant-product", "a weight that is not transposed on 310P", "quantised", lambda air: told(resized(air, "w8", 128, 64), "weights_alone", transpose_weight=False)),
    Illegal("air-weight-quant-product", "groups on 310P", "quantised", lambda air: told(resized(air, "w8_scale", 64, 4), "weights_alone", antiquant_group_size=32)),
    Illegal("air-weight-quant-product", "groups of 48", "quantised", lambda air: told(resized(air, "w8_scale", 64, 3), "weights_alone", antiquant_group_size=48), A2),
    Illegal("air-weight-quant-product", "scales for other columns", "quantised", lambda air: resized(air, "w8_scale", 32)),
    Illegal("air-weight-quant-product", "a weight of another k", "quantised", lambda air: resized(air, "w8", 64, 64)),
    Illegal("air-quant-product", "scales for other columns", "quantised", lambda air: resized(air, "w_scale", 32)),
    Illegal("air-quant-product", "a weight of another k", "quantised", lambda air: described(resized(air, "w", 64, 64), "nz", shape=(64, 64))),
    Illegal("air-grouped-product", "another kind of groups on 310P", "experts", lambda air: told(air, "product", group_type=-1)),
    Illegal("air-grouped-product", "no list of groups", "experts", lambda air: fed(air, "product", 2, "")),
    Illegal("air-grouped-product", "a list for three experts", "experts", lambda air: resized(air, "rows", 3)),
    Illegal("air-grouped-product", "weights of another k", "experts", lambda air: described(resized(air, "w", 2, 32, 32), "nz", shape=(2, 32, 32))),
)  # fmt: skip

EXPERTS = (
    Illegal("air-expert-gating", "more experts chosen than there are", "routed", lambda air: shaped(air, {"scores": (4, 1)}), A2),
    Illegal("air-expert-gating", "scores of one token", "routed", lambda air: shaped(told(air, "choose", k=0), {"choose": (4, 0), "choose:1": (4, 0), "choose:2": (4, 0), "send": (0, 64), "send:1": (0,), "product": (0, 32)}), A2),
    Illegal("air-expert-routing", "experts of other tokens", "routed", lambda air: shaped(air, {"x": (2, 64)}), A2),
    Illegal("air-expert-routing", "counts of no experts", "routed", lambda air: told(air, "send", expert_num=0), A2),
    Illegal("air-expert-results", "rows of another number", "routed", lambda air: fed(air, "whole", 1, "choose:1"), A2),
    Illegal("air-dynamic-quant", "smooth scales of another width", "small", lambda air: resized(air, "smooth", 32), A2),
    Illegal("air-rotary-position", "a mode of 950 alone", "turned", lambda air: told(air, "turn", mode=2), A2),
    Illegal("air-rotary-position", "an odd head size", "turned", lambda air: shaped(air, {"x": (1, 4, 2, 63), "cos": (1, 4, 1, 63), "sin": (1, 4, 1, 63), "turn": (1, 4, 2, 63)}), A2),
)  # fmt: skip

LIMITS: tuple[Illegal, ...] = (*SHAPES, *ATTENTION, *WRITERS, *LAYERS, *PRODUCTS, *EXPERTS)
