"""Rules for quantised operators: attributes as the plugins read them, and what each SoC takes."""

from __future__ import annotations

from collections.abc import Iterator

from omforge import ir
from omforge.lowering.legality.subject import Finding, Rule, Subject, present_inputs, static_shape


def weight_quant(subject: Subject) -> Iterator[Finding]:
    """NPUWeightQuantBatchMatmulV2: weights and groups that the SoC takes."""
    for node in subject.typed("NPUWeightQuantBatchMatmulV2"):
        if present_inputs(node) < 3:
            continue  # reported by ge_requirements
        place, weight = ir.describe(node), node.inputs[1]
        on_310p = subject.target.family.name == "310p"
        attribute = node.attributes.get("antiquant_group_size")
        if attribute is not None and attribute.type != ir.AttributeType.INT:
            yield Finding(
                place,
                f"antiquant_group_size as {attribute.type.name}",
                "it is read as INT, and of another type ignored",
                "write it as INT",
            )
            continue
        size = 0 if attribute is None else attribute.as_int()
        if size and (size < 32 or size % 32):
            yield Finding(
                place,
                f"a group size of {size}",
                "it is a multiple of 32, at least 32 and below k",
                "choose another group size",
            )
        if size and on_310p:
            yield Finding(
                place,
                "groups on 310P",
                "its prototype says per channel only; another document has groups there (conflict)",
                "quantise per channel, or try it on a device and --allow it",
            )
        x = static_shape(node.inputs[0])
        if not on_310p and x is not None and len(x) != 2:
            yield Finding(
                place,
                f"x is {list(x)}",
                "2-D only on this SoC",
                "flatten the leading dims with Reshape",
            )
        of_weight = static_shape(weight)
        if of_weight is not None and max(of_weight, default=0) > 65535:
            yield Finding(
                place,
                f"the weight is {list(of_weight)}",
                "k and n are at most 65535",
                "split the weight",
            )
        yield from _weight_quant_parameters(node, place, size)


def _weight_quant_parameters(node: ir.Node, place: str, size: int) -> Iterator[Finding]:
    """Scale and offset fit the weight, and the weight fits x."""
    x, weight, scale = node.inputs[:3]
    offset = node.inputs[3] if len(node.inputs) > 3 else None
    of_x, of_weight, of_scale = (static_shape(value) for value in (x, weight, scale))
    if not of_x or of_weight is None or len(of_weight) != 2 or of_scale is None:
        return
    assert x is not None
    assert weight is not None
    assert scale is not None
    k, (rows, n) = of_x[-1], of_weight
    if weight.dtype == ir.DataType.INT32:
        # The infershape takes it as packed along k where that fits, else along n.
        rows, n = (rows * 8, n) if rows * 8 == k else (rows, n * 8)
    if rows != k:
        yield Finding(
            place,
            f"x is {list(of_x)}, the weight {list(of_weight)}",
            "the weight is [k, n]; of int32 it is [k, n / 8], or [k / 8, n] behind a Transpose",
            "give a weight of x's width",
        )
        return
    if size >= k:
        yield Finding(
            place, f"a group size of {size}", f"it is less than k, which is {k}", "use no groups"
        )
    allowed = [(-(-k // size), n)] if size else [(1,), (1, 1), (n,), (1, n)]
    if of_scale not in allowed:
        yield Finding(
            place,
            f"antiquant_scale is {list(of_scale)}",
            f"it is {' or '.join(str(list(shape)) for shape in allowed)} for this weight",
            "give one scale a channel, or one a group of inputs and channel",
        )
    wide = scale.dtype in (ir.DataType.UINT64, ir.DataType.INT64)
    rounded = k % 64 == 0 and n % 64 == 0
    if wide and (size or x.dtype != ir.DataType.FLOAT16 or not rounded):
        yield Finding(
            place,
            f"antiquant_scale is {scale.dtype}",
            "as uint64 or int64 it is per channel, x float16, and k and n multiples of 64",
            "give the scale in x's dtype",
        )
    if scale.dtype != x.dtype and not wide:
        yield Finding(
            place,
            f"antiquant_scale is {scale.dtype}, x is {x.dtype}",
            "they are of one dtype",
            "cast the scale",
        )
    if offset is not None and not wide:
        same = static_shape(offset) in (None, of_scale) and offset.dtype == scale.dtype
        if not same:
            yield Finding(
                place,
                "antiquant_offset differs from antiquant_scale in shape or dtype",
                "they are alike",
                "give the offset the scale's shape and dtype",
            )


def quant_matmul(subject: Subject) -> Iterator[Finding]:
    """QuantBatchMatMul: what each SoC takes beside the dtypes."""
    for node in subject.typed("QuantBatchMatMul"):
        given = [value is not None for value in node.inputs]
        pertoken = len(given) > 5 and given[5]
        place = ir.describe(node)
        if subject.target.family.name == "310p":
            if pertoken:
                yield Finding(
                    place,
                    "pertoken_scale on 310P",
                    "310P has none",
                    "scale behind the product",
                )
            yield from _quant_matmul_on_310p(node, place)
            continue
        scale = node.inputs[2] if len(node.inputs) > 2 else None
        attribute = node.attributes.get("dtype")
        half = attribute is None or attribute.value == 1
        if scale is not None and scale.dtype == ir.DataType.FLOAT and half and not pertoken:
            yield Finding(
                place,
                "float16 out of a float32 scale without pertoken_scale",
                "float32 scales give bfloat16, or need a pertoken_scale",
                "encode the scale as uint64, or give pertoken_scale",
            )


def _quant_matmul_on_310p(node: ir.Node, place: str) -> Iterator[Finding]:
    attribute = node.attributes.get("dtype")
    if attribute is not None and attribute.value not in (1, 2):
        yield Finding(
            place,
            f"QuantBatchMatMul to GE dtype {attribute.value} on 310P",
            "310P gives float16 (1) or int8 (2)",
            "write dtype = 1",
        )
    bias = node.inputs[4] if len(node.inputs) > 4 else None
    if bias is not None and bias.dtype not in (None, ir.DataType.INT32):
        yield Finding(
            place,
            f"a bias of {bias.dtype} on 310P",
            "310P takes int32",
            "add it behind the product",
        )


def quant_defaults(subject: Subject) -> Iterator[Finding]:
    """Attributes whose default is no sensible value are written."""
    for op, name, told in (
        ("AscendQuant", "scale", "the plugin takes 0"),
        ("NPUQuantize", "dtype", "the plugin sets none"),
    ):
        for node in subject.typed(op):
            if name not in node.attributes:
                yield Finding(ir.describe(node), f"{op} without {name}", told, f"write {name}")
    for node in subject.typed("AscendDequant"):
        dtype = node.attributes.get("dtype")
        if dtype is None or dtype.value != 1:
            yield Finding(
                ir.describe(node),
                "AscendDequant to another dtype than float16",
                "kernels give float16 only, and the plugin's default is float32",
                "write dtype = 1",
            )
    for node in subject.typed("NPUGroupQuant"):
        dtype = node.attributes.get("dst_type")
        if dtype is None or dtype.value != 2:
            yield Finding(
                ir.describe(node), "NPUGroupQuant without dst_type 2", "it must be 2", "write it"
            )


def anti_quant(subject: Subject) -> Iterator[Finding]:
    """NPUAntiQuant on 310P has its offset."""
    if subject.target.family.name != "310p":
        return
    for node in subject.typed("NPUAntiQuant"):
        if present_inputs(node) < 3:
            yield Finding(
                ir.describe(node),
                "NPUAntiQuant without an offset on 310P",
                "310P's kernel requires it",
                "give an offset of zeros",
            )


_NN = "hicann/ops-nn:"
_WEIGHT_QUANT = f"{_NN}matmul/weight_quant_batch_matmul_v2"
_OPS_INFO = "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config/<soc>/aic-<soc>-ops-info.json"

RULES = (
    Rule(
        "quant-defaults",
        "wrong numbers",
        f"{_NN}quant/*/framework/*_onnx_plugin.cpp",
        quant_defaults,
    ),
    Rule(
        "weight-quant",
        "no kernel",
        f"{_WEIGHT_QUANT}/docs/aclnnWeightQuantBatchMatmulV2.md; "
        f"{_WEIGHT_QUANT}/op_graph/weight_quant_batch_matmul_v2_proto.h",
        weight_quant,
        "inferred",
    ),
    Rule("quant-matmul", "no kernel", f"{_NN}matmul/quant_batch_matmul_v3", quant_matmul),
    Rule("anti-quant-offset", "no kernel", _OPS_INFO, anti_quant),
)
