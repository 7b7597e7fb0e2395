"""The target ops: operators of ATC that ONNX does not define, each defined once.

ATC's ONNX parser knows operators of its own (`NPU*`). A `TargetOp` holds all that omforge says of
one: names, ordered inputs and outputs, attributes, dtypes per SoC family, the shapes it returns and
a reference body. Signature checks, shapes, CPU numerics and documentation are read from here.

ONNX Runtime takes functions in any domain but the default one, and inlines a body at the *model's*
opset. So `reference_model` makes the CPU twin of a lowered model: its `NPU*` nodes move to domain
`npu`, and the bodies, written for opset 16, are attached as model functions.

Sources of facts about ATC are written `repository:path`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import onnx
import onnx_ir as ir

from omforge.ir.errors import InputError

TARGET_DOMAIN = "npu"

# The bodies use CastLike (opset 15) and ReduceMean with an `axes` attribute (up to 17).
BODY_OPSETS = range(15, 18)

RMS_NORM_EPSILON = 1e-6

Shapes = tuple[tuple[ir.DataType, tuple[int, ...]], ...]
Infer = Callable[[Sequence[tuple[ir.DataType, tuple[int, ...]]]], Shapes]


@dataclass(frozen=True)
class TargetInput:
    """One input in ATC's order; `dtypes` are the ONNX names allowed per SoC family."""

    name: str
    dtypes: Mapping[str, frozenset[str]]
    required: bool = True


@dataclass(frozen=True)
class TargetAttribute:
    """One attribute that the plugin reads; a wrong type or name is silently ignored by ATC."""

    name: str
    type: Literal["INT", "FLOAT", "STRING"]
    default: int | float | str | None = None
    required: bool = False


@dataclass(frozen=True)
class TargetOp:
    """One operator of the target.

    Attributes:
        name: The op type in the default domain.
        npu_name: The op type in domain `npu`, version 1 (they differ for a few ops).
        ge_type: The GE operator that the plugin makes of it.
        opsets: The default-domain opsets that register it.
        inputs: In ATC's order.
        outputs: Names, in order.
        attributes: What the plugin reads.
        infer: From the inputs' dtypes and static shapes to the outputs'.
        body: The reference body, ONNX function text for opset 16.
        summary: One line for the documentation table.
        limits: What the documentation restricts, in words.
        sources: Where the facts come from.
    """

    name: str
    npu_name: str
    ge_type: str
    opsets: range
    inputs: tuple[TargetInput, ...]
    outputs: tuple[str, ...]
    attributes: tuple[TargetAttribute, ...]
    infer: Infer
    body: str
    summary: str
    limits: tuple[str, ...] = ()
    sources: tuple[str, ...] = field(default=())

    @cached_property
    def function(self) -> onnx.FunctionProto:
        """The reference body as a function of domain `npu`."""
        return onnx.parser.parse_function(self.body)

    @property
    def required_inputs(self) -> int:
        """How many leading inputs a node must give."""
        return sum(item.required for item in self.inputs)


def _families(
    narrow: Sequence[str], wide: Sequence[str] | None = None
) -> Mapping[str, frozenset[str]]:
    """`narrow` on the families without bf16, `wide` (default: the same) on those with it."""
    wide = narrow if wide is None else wide
    return {
        "310p": frozenset(narrow),
        "910": frozenset(narrow),
        "910b": frozenset(wide),
        "910_93": frozenset(wide),
    }


_FLOATS = _families(("float16", "float32"), ("float16", "float32", "bfloat16"))


def _infer_rms_norm(inputs: Sequence[tuple[ir.DataType, tuple[int, ...]]]) -> Shapes:
    dtype, shape = inputs[0]
    return (dtype, shape), (ir.DataType.FLOAT, (*shape[:-1], 1))


def _infer_first(inputs: Sequence[tuple[ir.DataType, tuple[int, ...]]]) -> Shapes:
    return (inputs[0],)


_RMS_NORM = TargetOp(
    name="NPURmsNorm",
    npu_name="NPURmsNorm",
    ge_type="RmsNorm",
    opsets=range(11, 19),
    inputs=(TargetInput("x", _FLOATS), TargetInput("gamma", _FLOATS)),
    outputs=("y", "rstd"),
    attributes=(),
    infer=_infer_rms_norm,
    body="""
        <domain: "npu", opset_import: ["" : 16]>
        NPURmsNorm (x, gamma) => (y, rstd)
        {
            wide = Cast <to = 1> (x)
            square = Mul (wide, wide)
            mean = ReduceMean <axes = [-1], keepdims = 1> (square)
            epsilon = Constant <value = float {1e-6}> ()
            shifted = Add (mean, epsilon)
            root = Sqrt (shifted)
            rstd = Reciprocal (root)
            normal = Mul (wide, rstd)
            weight = Cast <to = 1> (gamma)
            scaled = Mul (normal, weight)
            y = CastLike (scaled, x)
        }
    """,
    summary="y = gamma * x / sqrt(mean(x^2) + 1e-6) over the last axis, in fp32 inside",
    limits=(
        "the plugin reads no attribute: epsilon is always 1e-6",
        "310P: x and gamma of one dtype",
        "omforge's reference body normalises over the last axis only (gamma of rank 1)",
    ),
    sources=(
        "hicann/ops-nn:norm/rms_norm/framework/npu_rms_norm_onnx_plugin.cpp",
        "hicann/ops-nn:norm/rms_norm/op_graph/rms_norm_proto.h",
    ),
)

_ROTARY_MUL = TargetOp(
    name="NPURotaryMul",
    npu_name="NPURotaryMul",
    ge_type="RotaryMul",
    opsets=range(11, 19),
    inputs=(
        TargetInput("x", _FLOATS),
        TargetInput("r1", _FLOATS),
        TargetInput("r2", _FLOATS),
    ),
    outputs=("y",),
    attributes=(),
    infer=_infer_first,
    body="""
        <domain: "npu", opset_import: ["" : 16]>
        NPURotaryMul (x, r1, r2) => (y)
        {
            left, right = Split <axis = -1> (x)
            negative = Neg (right)
            turned = Concat <axis = -1> (negative, left)
            cosine = Mul (r1, x)
            sine = Mul (r2, turned)
            y = Add (cosine, sine)
        }
    """,
    summary="y = r1 * x + r2 * concat(-x2, x1) with x1, x2 the halves of the last axis",
    limits=(
        "x [B, N, S, D], [B, S, N, D] or [S, B, N, D]; r1 and r2 of x's rank, with 1 for B and N",
        "D = 128; B and N up to 1000; the broadcast axes' product up to 1024",
        "[B, N, S, D] with B*N > 8*S is outside the documented range",
    ),
    sources=("hicann/ops-math:common/src/framework/npu_rotary_mul_onnx_plugin.cpp",),
)

_SCALED_MASKED_SOFTMAX = TargetOp(
    name="NPUScaledMaskedSoftmax",
    npu_name="NPUScaledMaskedSoftmax",
    ge_type="ScaledMaskedSoftmax",
    opsets=range(11, 19),
    inputs=(
        TargetInput("x", _FLOATS),
        TargetInput("mask", _families(("bool",)), required=False),
    ),
    outputs=("y",),
    attributes=(
        TargetAttribute("scale", "FLOAT", 1.0),
        TargetAttribute("fixed_triu_mask", "INT", 0),
    ),
    infer=_infer_first,
    # -10000 is what Huawei's comparison tool fills in; the operator guide says -inf. The two differ
    # only in rows that are masked throughout (conflicting sources, hardware needed).
    body="""
        <domain: "npu", opset_import: ["" : 16]>
        NPUScaledMaskedSoftmax <scale: float = 1.0, fixed_triu_mask: int = 0> (x, mask) => (y)
        {
            wide = Cast <to = 1> (x)
            factor = Constant <value_float: float = @scale> ()
            scores = Mul (wide, factor)
            fill = Constant <value = float {-10000.0}> ()
            masked = Where (mask, fill, scores)
            share = Softmax <axis = -1> (masked)
            y = CastLike (share, x)
        }
    """,
    summary="y = softmax(scale * x, with masked (true) positions out), over the last axis",
    limits=(
        "x 4-D with both last dims in 32..4096 and multiples of 32; mask broadcast to x",
        "fixed_triu_mask only 0; omforge's reference body needs the mask",
        "what a masked position holds is stated as -inf in one source and -10000 in another",
    ),
    sources=(
        "mirror-cann/ops-transformer:common/src/framework/npu_scaled_masked_softmax_onnx_plugin.cpp",
    ),
)

TARGET_OPS: Mapping[str, TargetOp] = {
    op.name: op for op in (_RMS_NORM, _ROTARY_MUL, _SCALED_MASKED_SOFTMAX)
}


def is_target_op(node: ir.Node) -> bool:
    """Say whether the node is a target op of the table, spelled as in the default domain."""
    return node.domain in ("", "ai.onnx") and node.op_type in TARGET_OPS


def reference_model(model: ir.Model) -> ir.Model:
    """Return the CPU twin of a lowered model: same graph, `NPU*` ops with their reference bodies.

    The model is not changed, and the twin shares its tensors. Graph inputs, outputs and their names
    are the same. Needs an opset that the bodies are written for (15 to 17; the ATC dialect has 16).

    Raises:
        InputError: The model's opset is another one.
    """
    opset = model.opset_imports.get("")
    if opset not in BODY_OPSETS:
        raise InputError(
            f"cannot attach reference bodies to a model of opset {opset}",
            f"they are written for opsets {BODY_OPSETS.start} to {BODY_OPSETS.stop - 1}",
            "Lower the model first",
        )
    twin = model.clone()
    used: dict[str, TargetOp] = {}
    for node in twin.graph.all_nodes():
        if not is_target_op(node):
            continue
        op = TARGET_OPS[node.op_type]
        used[op.name] = op
        node.domain = TARGET_DOMAIN
        node.op_type = op.npu_name
        # ONNX Runtime's inference fails on a call that takes fewer outputs than the body gives.
        for index in range(len(node.outputs), len(op.outputs)):
            node.resize_outputs(index + 1)
            node.outputs[index].name = f"{node.outputs[0].name}.{op.outputs[index]}"
    for name in sorted(used):
        function = ir.from_proto(used[name].function)
        twin.functions[function.identifier()] = function
    if used:
        twin.graph.opset_imports[TARGET_DOMAIN] = 1
    return twin
