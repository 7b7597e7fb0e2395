"""Legal GE graphs, by name: what the illegal ones are made from."""

from omforge.air.graph import Air
from tests.lowering.air_legality.graphs import Builder

HALF = "float16"


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


def experts() -> Air:
    """A product of two experts, whose weights are in 310P's format."""
    b = Builder()
    x = b.data("x", HALF, 4, 64)
    weights = [
        b.op(
            "TransData",
            f"nz{at}",
            {"src": b.const(f"w{at}", HALF, 64, 32)},
            {"dst": (HALF, (64, 32))},
            src_format="ND",
            dst_format="FRACTAL_NZ",
        )
        for at in range(2)
    ]
    rows = b.const("rows", "int64", 2, values=(1, 4))
    product = b.op(
        "GroupedMatmul",
        "product",
        {"x": [x], "weight": weights, "group_list": rows},
        {"y0": (HALF, (4, 32))},
        split_item=3,
        group_type=0,
    )
    return b.air(product)


GRAPHS = {graph.__name__: graph for graph in (layer, decode, experts)}
