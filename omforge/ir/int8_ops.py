"""Products of int8 by int8 (W8A8): `AscendQuant`, `AscendDequant` and `QuantBatchMatMul`.

ATC's MatMul multiplies int8 by int8 into int32; ONNX's does not, and has `MatMulInteger` for it.

A scale of what comes out is a uint64: its low 32 bits are a float32, of which kernels read sign,
exponent and ten bits of the mantissa (TransQuantParamV2; GE's SetM1Dequant, hicann/ge:
graph_metadef/register/graph_optimizer/graph_fusion/fusion_quant_util_impl.cc). Bit 46, which
QuantBatchMatMul wants set, and the bits of an offset lie above them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from omforge.ir.errors import InputError
from omforge.ir.target_op import Shapes, TargetAttribute, TargetInput, TargetOp, Typed

Array = npt.NDArray[Any]

FAMILIES = ("310p", "310b", "910b", "910_93", "950")
"""Those whose operator tables list AscendQuant and AscendDequant."""

QUANT_MATMUL_FAMILIES = ("310p", "910b", "910_93", "950")

OUTPUTS_DIVIDED = "omforge.outputs_divided"
"""Metadata key of a product whose outputs are divided on behalf of a layer behind it: the layer's
inputs are then easier to round to int8."""

INPUTS_MULTIPLIED = "omforge.inputs_multiplied"
"""Metadata key of that layer's product: its weight has the factors."""

_FLAG = np.uint64(1 << 46)
_DROPPED = np.uint32(0x1FFF)
"""The bits of a float32 that kernels do not read."""


def encoded_scale(scale: Array, *, flag: bool) -> Array:
    """Scales as uint64, each the nearest number that kernels read.

    Args:
        scale: float32, positive, neither subnormal nor infinite.
        flag: Set bit 46, as QuantBatchMatMul wants it; AscendDequant reads those bits as a shift
            and an offset.
    """
    bits = np.ascontiguousarray(scale, np.float32).view(np.uint32)
    half = (_DROPPED >> np.uint32(1)) + ((bits >> np.uint32(13)) & np.uint32(1))  # ties to even
    kept = ((bits + half) & ~_DROPPED).astype(np.uint64)
    return kept | _FLAG if flag else kept


def decoded_scale(codes: Array) -> Array:
    """What `encoded_scale` encodes, float32."""
    return codes.astype(np.uint32).view(np.float32)


# Shifts drop what lies above the float32, its sign, and then its exponent.
_DECODE = """
            high = Constant <value = uint64 {33}> ()
            above = Constant <value = uint64 {41}> ()
            down = Constant <value = uint64 {56}> ()
            left = BitShift <direction = "LEFT"> (SCALE, high)
            biased = BitShift <direction = "RIGHT"> (left, down)
            lifted = BitShift <direction = "LEFT"> (SCALE, above)
            fraction = BitShift <direction = "RIGHT"> (lifted, above)
            middle = Constant <value = float {127.0}> ()
            whole = Constant <value = float {8388608.0}> ()
            two = Constant <value = float {2.0}> ()
            wide_biased = Cast <to = 1> (biased)
            exponent = Sub (wide_biased, middle)
            power = Pow (two, exponent)
            wide_fraction = Cast <to = 1> (fraction)
            sum = Add (wide_fraction, whole)
            mantissa = Div (sum, whole)
            factor = Mul (mantissa, power)
"""


def _infer_quant(inputs: Sequence[Typed]) -> Shapes:
    return ((ir.DataType.INT8, inputs[0][1]),)


def _infer_dequant(inputs: Sequence[Typed]) -> Shapes:
    return ((ir.DataType.FLOAT16, inputs[0][1]),)


def _infer_quant_matmul(inputs: Sequence[Typed]) -> Shapes:
    (_, of_x), (_, of_scale) = inputs[0], inputs[2]
    return ((ir.DataType.FLOAT16, (*of_x[:-1], of_scale[-1])),)


def _on(families: Sequence[str], *dtypes: str) -> dict[str, frozenset[str]]:
    return dict.fromkeys(families, frozenset(dtypes))


ASCEND_QUANT = TargetOp(
    name="AscendQuant",
    npu_name="AscendQuant",
    ge_type="AscendQuant",
    opsets=range(8, 23),
    inputs=(TargetInput("x", _on(FAMILIES, "float16", "float32")),),
    outputs=("y",),
    attributes=(
        TargetAttribute("scale", "FLOAT", required=True),
        TargetAttribute("offset", "FLOAT", required=True),
        TargetAttribute("sqrt_mode", "INT", 0),
        TargetAttribute("round_mode", "STRING", "Round"),
        TargetAttribute("dst_type", "STRING", "INT8"),
    ),
    infer=_infer_quant,
    body="""
        <domain: "npu", opset_import: ["" : 16]>
        AscendQuant
            <scale, offset, sqrt_mode: int = 0, round_mode: string = "Round",
             dst_type: string = "INT8">
            (x) => (y)
        {
            wide_scale = Constant <value_float: float = @scale> ()
            wide_offset = Constant <value_float: float = @offset> ()
            half = Cast <to = 10> (x)
            factor = Cast <to = 10> (wide_scale)
            moved = Cast <to = 10> (wide_offset)
            scaled = Mul (half, factor)
            exact = Add (scaled, moved)
            wide = Cast <to = 1> (exact)
            rounded = Round (wide)
            low = Constant <value = float {-128.0}> ()
            high = Constant <value = float {127.0}> ()
            clipped = Clip (rounded, low, high)
            y = Cast <to = 3> (clipped)
        }
    """,
    summary="y = saturate(round(x * scale + offset)) as int8; scale is the reciprocal of a step",
    limits=(
        "one scale for the whole tensor; halves go to the even integer",
        "kernels before 950 compute in float16, as omforge's reference body does; 950 in float32",
        "a scale outside [2^-14, 65504] is applied as its root, twice: GE sets sqrt_mode by itself",
        "omforge's reference body knows round_mode Round, dst_type INT8 and no sqrt_mode",
    ),
    sources=(
        "hicann/ops-nn:quant/ascend_quant/framework/ascend_quant_onnx_plugin.cpp",
        "hicann/ops-nn:quant/ascend_quant/tests/assets/golden.py",
        "hicann/ge:compiler/engines/nn_engine/fusion/graph_optimizer/graph_fusion/"
        "fusion_pass_manager/builtin_pass/quant_pass/quant_host_cpu_op_common.cc",
    ),
)

ASCEND_DEQUANT = TargetOp(
    name="AscendDequant",
    npu_name="AscendDequant",
    ge_type="AscendDequant",
    opsets=range(8, 23),
    inputs=(
        TargetInput("x", _on(FAMILIES, "int32")),
        TargetInput("deq_scale", _on(FAMILIES, "uint64")),
    ),
    outputs=("y",),
    attributes=(
        TargetAttribute("dtype", "INT", 0),
        TargetAttribute("sqrt_mode", "INT", 0),
        TargetAttribute("relu_flag", "INT", 0),
    ),
    infer=_infer_dequant,
    body=f"""
        <domain: "npu", opset_import: ["" : 16]>
        AscendDequant <dtype: int = 0, sqrt_mode: int = 0, relu_flag: int = 0> (x, deq_scale) => (y)
        {{
            {_DECODE.replace("SCALE", "deq_scale")}
            wide = Cast <to = 1> (x)
            scaled = Mul (wide, factor)
            y = Cast <to = 10> (scaled)
        }}
    """,
    summary="y = x * deq_scale as float16, x the int32 of a MatMul or Conv",
    limits=(
        "deq_scale is a constant of one dimension, (1) or (n), for the last axis of x",
        "its low 32 bits are a float32; the bits above, a shift and an offset, are 0",
        "kernels give float16 only: dtype is 1; a uint64 deq_scale goes without sqrt_mode",
        "that a MatMul takes a scale for each output is in kernel and prototype; ATC's own "
        "calibration quantises MatMul with one scale for all (conflict)",
    ),
    sources=(
        "hicann/ops-nn:quant/ascend_dequant/framework/ascend_dequant_onnx_plugin.cpp",
        "hicann/ops-nn:quant/ascend_dequant/op_graph/ascend_dequant_proto.h",
        "hicann/ge:compiler/engines/nn_engine/fusion/graph_optimizer/graph_fusion/graph_fusion.cc "
        "(JudgeQuantMode)",
        "hicann/ge:docs/zh/user_guides/atc_tools/references/quantization_layers_constraints.md",
        "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/impl/ascend_dequant.py",
    ),
)


_OUTPUTS = {0: ir.DataType.FLOAT, 1: ir.DataType.FLOAT16, 27: ir.DataType.BFLOAT16}
"""By GE's number of a dtype."""


def _quant_matmul_body(name: str, *, turned: bool, dtype: int = 1) -> str:
    weight = "Transpose <perm = [1, 0]> (x2)" if turned else "Identity (x2)"
    return f"""
        <domain: "npu", opset_import: ["" : 16]>
        {name} <dtype: int = 1, transpose_x1: int = 0, transpose_x2: int = 0>
            (x1, x2, scale, offset, bias, pertoken_scale) => (y)
        {{
            {_DECODE.replace("SCALE", "scale")}
            weight = {weight}
            sums = MatMulInteger (x1, weight)
            wide = Cast <to = 1> (sums)
            scaled = Mul (wide, factor)
            y = Cast <to = {int(_OUTPUTS[dtype])}> (scaled)
        }}
    """


def _quant_matmul_twin(node: ir.Node) -> tuple[str, str]:
    """Return the name and the text of the body for a QuantBatchMatMul, as it is called.

    Raises:
        InputError: It has an input or an attribute that the bodies do not know.
    """
    settings = {name: node.attributes.get(name) for name in ("dtype", "transpose_x1")}
    asked = {name: value.as_int() for name, value in settings.items() if value is not None}
    more = any(value is not None for value in node.inputs[3:])
    dtype = asked.get("dtype", 1)
    if more or dtype not in _OUTPUTS or asked.get("transpose_x1", 0):
        raise InputError(
            f"{node.op_type} {node.name} is called in a way that has no reference body",
            "there is one for x1, x2 and scale alone, to floats, with transpose_x2 or without",
            "Add the bias behind the product",
        )
    attribute = node.attributes.get("transpose_x2")
    turned = attribute is not None and attribute.as_int() == 1
    name = f"QuantBatchMatMul{'_turned' * turned}{f'_{dtype}' * (dtype != 1)}"
    return name, _quant_matmul_body(name, turned=turned, dtype=dtype)


QUANT_MATMUL = TargetOp(
    name="QuantBatchMatMul",
    npu_name="QuantBatchMatMul",
    ge_type="QuantBatchMatmulV3",
    opsets=range(8, 17),
    inputs=(
        TargetInput("x1", _on(QUANT_MATMUL_FAMILIES, "int8")),
        TargetInput("x2", _on(QUANT_MATMUL_FAMILIES, "int8")),
        TargetInput("scale", _on(QUANT_MATMUL_FAMILIES, "uint64", "int64")),
        TargetInput("offset", _on(QUANT_MATMUL_FAMILIES, "float32"), False),
        TargetInput("bias", _on(QUANT_MATMUL_FAMILIES, "int32"), False),
        TargetInput("pertoken_scale", _on(QUANT_MATMUL_FAMILIES, "float32"), False),
    ),
    outputs=("y",),
    attributes=(
        TargetAttribute("dtype", "INT", 1),
        TargetAttribute("transpose_x1", "INT", 0),
        TargetAttribute("transpose_x2", "INT", 0),
    ),
    infer=_infer_quant_matmul,
    body=_quant_matmul_body("QuantBatchMatMul", turned=False),
    variant=_quant_matmul_twin,
    summary="y = (x1 @ x2) * scale as float16, x1 and x2 int8, the sums int32",
    limits=(
        "x2 [k, n], or [n, k] with transpose_x2; its last axis and x1's up to 65,535; scale (n)",
        "310P: x2 is a constant, [n, k] with transpose_x2 (FRACTAL_NZ); scale uint64 or int64",
        "bit 46 of a scale is set, its low 32 bits are a float32 of ten bits of mantissa",
        "omforge's reference body takes x1, x2 and a uint64 scale, and gives floats",
    ),
    sources=(
        "hicann/ops-nn:matmul/quant_batch_matmul_v3/framework/quant_batch_matmulV3_onnx_plugin.cpp",
        "hicann/ops-nn:matmul/quant_batch_matmul_v3/docs/aclnnQuantMatmulV4.md",
        "hicann/ops-nn:quant/trans_quant_param_v2/README.md",
    ),
)

INT8_OPS = (ASCEND_QUANT, ASCEND_DEQUANT, QUANT_MATMUL)


def is_int8_product(node: ir.Node) -> bool:
    """Say whether a node is a MatMul by a stored int8 matrix, as it is or turned: of int8 by int8.

    A weight is enough to tell: ATC has no product of int8 by anything else.
    """
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or len(node.inputs) < 2:
        return False
    weight = node.inputs[1]
    producer = None if weight is None else weight.producer()
    if producer is not None and producer.op_type in ("Reshape", "Transpose"):
        weight = producer.inputs[0]
    tensor = None if weight is None else weight.const_value
    return tensor is not None and tensor.dtype == ir.DataType.INT8
