"""Rules for single operators: what their plugins ignore, break or limit."""

from __future__ import annotations

import math
from collections.abc import Iterator

from omforge import ir
from omforge.ir.ops import RMS_NORM_EPSILON, TARGET_OPS
from omforge.lowering.legality.subject import (
    Finding,
    Rule,
    Subject,
    present_inputs,
    static_shape,
)


def rms_norm(subject: Subject) -> Iterator[Finding]:
    """NPURmsNorm and NPUAddRmsNorm use 1e-6 whatever the node says."""
    for node in subject.typed("NPURmsNorm", "NPUAddRmsNorm"):
        epsilon = node.attributes.get("epsilon")
        if epsilon is None:
            continue
        value = epsilon.value if isinstance(epsilon.value, float) else math.nan
        if not math.isclose(value, RMS_NORM_EPSILON, rel_tol=1e-6):
            yield Finding(
                ir.describe(node),
                f"{node.op_type} with an epsilon of {epsilon.value}",
                "the plugin ignores it and always uses 1e-6",
                "scale x by sqrt(1e-6/epsilon) first, as `omforge compile` does",
            )


def rms_norm_shapes(subject: Subject) -> Iterator[Finding]:
    """NPURmsNorm: gamma of rank 1 and of x's width, both of one dtype on 310P."""
    for node in subject.typed("NPURmsNorm"):
        if present_inputs(node) < 2:
            continue  # reported by ge_requirements
        x, gamma = node.inputs[0], node.inputs[1]
        of_x, of_gamma = static_shape(x), static_shape(gamma)
        if of_x and of_gamma is not None and of_gamma != of_x[-1:]:
            yield Finding(
                ir.describe(node),
                f"gamma is {list(of_gamma)}, x is {list(of_x)}",
                "the reference body normalises over the last axis, with gamma of that width",
                "normalise over the last axis, or decompose",
            )
        same = x is None or gamma is None or x.dtype == gamma.dtype
        if not same and subject.target.family.name == "310p":
            yield Finding(
                ir.describe(node),
                "x and gamma have different dtypes",
                "310P takes x and gamma of one dtype",
                "cast gamma to x's dtype",
            )


def rotary_mul(subject: Subject) -> Iterator[Finding]:
    """NPURotaryMul: the documented shapes."""
    for node in subject.typed("NPURotaryMul"):
        if present_inputs(node) < 3:
            continue  # reported by ge_requirements
        x, r1, r2 = (static_shape(value) for value in node.inputs[:3])
        if x is None or r1 is None or r2 is None:
            continue
        for problem in rotary_problems(x, r1, r2):
            yield Finding(
                ir.describe(node),
                problem,
                "; ".join(TARGET_OPS["NPURotaryMul"].limits),
                "decompose the rotation, as `omforge compile` does outside the limits",
            )


def rotary_problems(x: tuple[int, ...], r1: tuple[int, ...], r2: tuple[int, ...]) -> Iterator[str]:
    """What the documents of RotaryMul say against shapes: x, and the cosines and sines."""
    if len(x) != 4 or len(r1) != 4 or r1 != r2:
        yield f"x is {list(x)}, r1 {list(r1)}, r2 {list(r2)}"
        return
    if x[3] != 128 or r1[3] != 128:
        yield f"the head size is {x[3]}, must be 128"
    if any(own not in (1, size) for own, size in zip(r1, x, strict=True)):
        yield f"r1 {list(r1)} does not broadcast to x {list(x)}"
    tokens_axis = next((axis for axis in (1, 2, 0) if r1[axis] == x[axis] != 1), None)
    tokens = 1 if tokens_axis is None else x[tokens_axis]
    if math.prod(r1[:3]) != tokens:
        yield f"r1 {list(r1)} varies along more than the tokens"
    if tokens > 1024 or any(size > 1000 for axis, size in enumerate(x[:3]) if axis != tokens_axis):
        yield f"x {list(x)} is larger than documented"
    if tokens_axis == 2 and x[0] * x[1] > 8 * tokens:
        yield f"[B, N, S, D] = {list(x)} has B*N > 8*S"


def target_op_attributes(subject: Subject) -> Iterator[Finding]:
    """Target ops have no attribute that their plugin does not read, and none of another type."""
    for node in subject.typed(*TARGET_OPS):
        known = {item.name: item.type for item in TARGET_OPS[node.op_type].attributes}
        for name, attribute in node.attributes.items():
            if name == "epsilon":
                continue  # judged by rms_norm
            if known.get(name) != attribute.type.name:
                yield Finding(
                    ir.describe(node),
                    f"{node.op_type} with {name} as {attribute.type.name}",
                    f"the plugin reads {known or 'no attributes'}",
                    "remove it, or write it as the plugin reads it",
                )


def split_sizes(subject: Subject) -> Iterator[Finding]:
    """Split has its sizes as an input."""
    for node in subject.typed("Split"):
        if present_inputs(node) >= 2 or "split" in node.attributes:
            continue
        x = node.inputs[0] if node.inputs else None
        axis = node.attributes.get("axis")
        readable = x is not None and x.is_graph_input()
        backwards = axis is not None and axis.as_int() < 0
        fixed = readable and not backwards
        code = "EZ9999" if readable and subject.opset >= 18 else None
        yield Finding(
            ir.describe(node),
            "Split without sizes",
            "with num_outputs the plugin reads out of bounds or crashes on unknown dims"
            if subject.opset >= 18
            else "at this opset atc makes a Split of equal parts",
            "make the graph by `omforge compile`, which writes the sizes",
            # On a graph input of known dims, from the front, the plugin was seen to work.
            atc="" if fixed or subject.opset < 18 else code,
            level="advice" if subject.opset < 18 or fixed else None,
        )


def if_branches(subject: Subject) -> Iterator[Finding]:
    """If has a then_branch and an else_branch, and nothing else."""
    for node in subject.typed("If"):
        if set(node.attributes) != {"then_branch", "else_branch"}:
            yield Finding(
                ir.describe(node),
                f"If with {', '.join(sorted(node.attributes)) or 'no branches'}",
                "it has exactly two attributes, then_branch and else_branch",
                "fold the If, or write both branches",
            )


def layer_norm_bias(subject: Subject) -> Iterator[Finding]:
    """LayerNormalization in float16 has its bias."""
    for node in subject.typed("LayerNormalization"):
        x = node.inputs[0] if node.inputs else None
        narrow = x is not None and x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        if present_inputs(node) == 2 and len(node.inputs) == 2 and narrow:
            yield Finding(
                ir.describe(node),
                "LayerNormalization without a bias",
                "the plugin makes a float32 beta, whatever x is",
                "give a bias of zeros in x's dtype",
            )


def scatter_elements(subject: Subject) -> Iterator[Finding]:
    """ScatterElements has no AI Core kernel on 310P."""
    if subject.target.family.name != "310p":
        return
    for node in subject.typed("ScatterElements"):
        yield Finding(
            ir.describe(node),
            "ScatterElements on 310P",
            "CANN 8.1.RC1 lists no AI Core kernel: it runs on the AICPU",
            "use ScatterND, or Where with a mask",
        )


RULES = (
    Rule(
        "rms-norm-epsilon",
        "wrong numbers",
        "hicann/ops-nn:norm/rms_norm/framework/npu_rms_norm_onnx_plugin.cpp",
        rms_norm,
        "seen",
    ),
    Rule(
        "rms-norm-shapes",
        "no kernel",
        "hicann/ops-nn:norm/rms_norm/op_graph/rms_norm_proto.h",
        rms_norm_shapes,
    ),
    Rule(
        "rotary-mul-shapes",
        "outside the documented range",
        "hicann/ops-math:common/src/framework/npu_rotary_mul_onnx_plugin.cpp; "
        "hiascend:torch_npu npu_rotary_mul",
        rotary_mul,
        "inferred",
    ),
    Rule(
        "target-op-attributes",
        "silently the default",
        "hicann/ops-nn:*/framework/*_onnx_plugin.cpp",
        target_op_attributes,
    ),
    Rule(
        "split-sizes",
        "a crash of the parser, E19999 at best",
        "hicann/ops-math:conversion/split_d/framework/split_onnx_plugin.cpp",
        split_sizes,
        "seen",
    ),
    Rule(
        "if-branches",
        "E19999: adapt subgraph failed",
        "hicann/ge:parser/parser/onnx/subgraph_adapter/if_subgraph_adapter.cc",
        if_branches,
    ),
    Rule(
        "layer-norm-bias",
        "a float32 beta beside a float16 x",
        "hicann/ops-nn:common/src/framework/layer_normalization_onnx_plugin.cpp",
        layer_norm_bias,
        "inferred",
    ),
    Rule(
        "scatter-elements-310p",
        "no AI Core kernel",
        "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config/ascend310p",
        scatter_elements,
        level="advice",
    ),
)
