"""Rules for products of int8 by int8: how their scales and weights are given."""

from __future__ import annotations

from collections.abc import Iterator

from omforge import ir
from omforge.lowering.legality.subject import Finding, Rule, Subject, present_inputs, static_shape

_LARGEST = 65535
_LOW = 1 << 32


def ascend_dequant(subject: Subject) -> Iterator[Finding]:
    """AscendDequant: deq_scale as GE's quantisation passes and the kernel read it."""
    for node in subject.typed("AscendDequant"):
        if present_inputs(node) < 2:
            continue  # reported by ge_requirements
        place, scale = ir.describe(node), node.inputs[1]
        assert scale is not None
        sums, shape = static_shape(node.inputs[0]), static_shape(scale)
        if scale.const_value is None:
            yield Finding(
                place,
                "deq_scale is computed",
                "GE reads its numbers while it optimises, and fails where there are none",
                "store it as an initializer",
            )
        fits = shape is None or sums is None or shape in ((1,), sums[-1:])
        if shape is not None and (len(shape) != 1 or not fits):
            yield Finding(
                place,
                f"deq_scale is {list(shape)}, x is {'unknown' if sums is None else list(sums)}",
                "it has one dimension, of 1 or of x's last one",
                "give one scale, or one for each output",
            )
        if scale.dtype == ir.DataType.UINT64:
            yield from _wide_scale(node, place, scale)


def _wide_scale(node: ir.Node, place: str, scale: ir.Value) -> Iterator[Finding]:
    root = node.attributes.get("sqrt_mode")
    if root is not None and root.value:
        yield Finding(
            place,
            "sqrt_mode with a uint64 deq_scale",
            "the kernel refuses it: a float32 in the low half needs no root",
            "leave sqrt_mode out",
        )
    if scale.const_value is not None and (scale.const_value.numpy() >= _LOW).any():
        yield Finding(
            place,
            "deq_scale has bits above the low 32",
            "those are a shift of the sums and an offset of the weight, not part of the float32",
            "give the bits of a float32 alone; bit 46 is for QuantBatchMatMul",
        )


def quant_matmul_operands(subject: Subject) -> Iterator[Finding]:
    """QuantBatchMatMul: its matrices fit, and each SoC gets the weight as it takes it."""
    for node in subject.typed("QuantBatchMatMul"):
        if present_inputs(node) < 3:
            continue  # reported by ge_requirements
        place = ir.describe(node)
        x, weight, scale = node.inputs[:3]
        attribute = node.attributes.get("transpose_x2")
        turned = attribute is not None and attribute.value == 1
        stored = weight is not None and weight.const_value is not None
        if subject.target.family.name == "310p" and not (turned and stored):
            yield Finding(
                place,
                "x2 is " + ("computed" if turned else "[k, n]") + " on 310P",
                "310P takes it as FRACTAL_NZ and turned, which GE makes of a constant [n, k]",
                "store x2 as [n, k] and write transpose_x2 = 1",
            )
        of_x, of_weight = static_shape(x), static_shape(weight)
        if not of_x or of_weight is None or len(of_weight) != 2:
            continue
        k, n = of_weight[::-1] if turned else of_weight
        if of_x[-1] != k:
            yield Finding(
                place,
                f"x1 is {list(of_x)}, x2 {list(of_weight)}",
                "x2 is [k, n], or [n, k] with transpose_x2",
                "give a weight of x1's width",
            )
        if max(of_x[-1], of_weight[-1]) > _LARGEST:
            yield Finding(
                place,
                f"x1 is {list(of_x)}, x2 {list(of_weight)}",
                f"their last axes are {_LARGEST} at most",
                "split the weight, or store it with its outputs outermost",
            )
        of_scale = static_shape(scale)
        if of_scale is not None and of_scale not in ((1,), (n,)):
            yield Finding(
                place,
                f"scale is {list(of_scale)}",
                f"it is [1] or [{n}] for this weight",
                "give one scale, or one for each output",
            )


def int8_matmul(subject: Subject) -> Iterator[Finding]:
    """MatMul multiplies int8 by int8 alone."""
    for node in subject.typed("MatMul"):
        kinds = [None if value is None else value.dtype for value in node.inputs]
        if ir.DataType.INT8 in kinds and set(kinds) - {ir.DataType.INT8, None}:
            yield Finding(
                ir.describe(node),
                f"MatMul of {' and '.join(str(kind) for kind in kinds)}",
                "kernels multiply int8 by int8 alone",
                "quantise the other side too (AscendQuant), or compute in floats",
            )


_NN = "hicann/ops-nn:"

RULES = (
    Rule(
        "ascend-dequant",
        "the build fails behind the parser, or wrong numbers",
        "hicann/ge:compiler/engines/nn_engine/fusion/graph_optimizer/graph_fusion/graph_fusion.cc "
        "(JudgeQuantMode)",
        ascend_dequant,
    ),
    Rule(
        "quant-matmul-operands",
        "no kernel",
        f"{_NN}matmul/quant_batch_matmul_v3/docs/aclnnQuantMatmulV4.md",
        quant_matmul_operands,
    ),
    Rule(
        "int8-matmul",
        "no kernel",
        "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/impl/dynamic/batch_matmul_v2.py",
        int8_matmul,
    ),
)
