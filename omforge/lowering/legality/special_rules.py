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
from omforge.lowering.target import dtype_name

_INT32_MAX = 2147483647

_NEVER = {
    "NPUIncreFlashAttention": "its plugin leaves key and value unconnected",
    "NPUFlashAttention": "its plugin crashes on a query that is no graph input",
    "NPUDtypeCast": "it becomes a Cast without a destination type",
    "NPUFormatCast": "it becomes an Identity: acl_format is ignored",
    "NPUScatter": "it maps to ArgMaxGrad, which is another operator",
}


def never_emitted(subject: Subject) -> Iterator[Finding]:
    """Operators that parse and do not do what they say."""
    for node in subject.typed(*_NEVER):
        yield Finding(
            ir.describe(node),
            f"{node.op_type} must not be used",
            _NEVER[node.op_type],
            "use standard operators: attention as MatMul and Softmax, Cast, ScatterND",
        )


def prompt_flash_attention(subject: Subject) -> Iterator[Finding]:
    """NPUPromptFlashAttention: the forms that parse and that the SoC runs."""
    for node in subject.typed("NPUPromptFlashAttention"):
        place = ir.describe(node)
        decompose = "lower attention to MatMul and Softmax (the default)"
        given = present_inputs(node)
        if given != len(node.inputs) or given not in (3, 5, 7, 9, 12):
            yield Finding(
                place,
                f"{given} of {len(node.inputs)} inputs given",
                "only 3, 5, 7, 9 or 12 inputs parse, none of them absent",
                decompose,
            )
        if subject.target.family.name == "310p" and len(node.inputs) > 3:
            yield Finding(
                place,
                "a mask or pse input on 310P",
                "310P refuses any pse tensor, and a mask needs a pse slot",
                decompose,
            )
        for name, kind in (
            ("num_heads", ir.AttributeType.INT),
            ("input_layout", ir.AttributeType.STRING),
            ("scale_value", ir.AttributeType.FLOAT),
            ("pre_tokens", ir.AttributeType.INT),
        ):
            attribute = node.attributes.get(name)
            if attribute is None or attribute.type != kind:
                yield Finding(
                    place,
                    f"{name} is not given as {kind.name}",
                    "absent or of another type it is silently 1.0, 0 or an error",
                    f"write {name} explicitly, as {kind.name}",
                )
            elif kind == ir.AttributeType.INT and attribute.as_int() > _INT32_MAX:
                yield Finding(place, f"{name} exceeds int32", "it is truncated", "use 2147483647")


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
                "scale x by sqrt(1e-6/epsilon) first, as `legalize` does for RMSNormalization",
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
        for problem in _rotary_problems(x, r1, r2):
            yield Finding(
                ir.describe(node),
                problem,
                "; ".join(TARGET_OPS["NPURotaryMul"].limits),
                "decompose the rotation, as `legalize` does outside the limits",
            )


def _rotary_problems(x: tuple[int, ...], r1: tuple[int, ...], r2: tuple[int, ...]) -> Iterator[str]:
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
        if present_inputs(node) < 2:
            yield Finding(
                ir.describe(node),
                "Split without sizes",
                "with num_outputs the plugin reads out of bounds or crashes on unknown dims",
                "run `legalize`, which writes the sizes",
            )


def clip_bounds(subject: Subject) -> Iterator[Finding]:
    """Clip has a bound."""
    for node in subject.typed("Clip"):
        if all(value is None for value in node.inputs[1:]):
            yield Finding(
                ir.describe(node),
                "Clip with neither bound",
                "at least one of min and max is needed",
                "remove the Clip",
            )


def scatter_reduction(subject: Subject) -> Iterator[Finding]:
    """ScatterND has no reduction."""
    for node in subject.typed("ScatterND"):
        reduction = node.attributes.get("reduction")
        if reduction is not None and reduction.as_string() != "none":
            yield Finding(
                ir.describe(node),
                f"ScatterND with reduction {reduction.as_string()}",
                "two plugins register it; the one that maps to TensorScatterUpdate drops it",
                "write the reduction as operators of its own",
            )


def gather_nd_batch(subject: Subject) -> Iterator[Finding]:
    """GatherND has no batch dims."""
    for node in subject.typed("GatherND"):
        batch = node.attributes.get("batch_dims")
        if batch is not None and batch.as_int() != 0:
            yield Finding(
                ir.describe(node),
                f"GatherND with batch_dims {batch.as_int()}",
                "the plugin supports 0 only",
                "use GatherElements, or fold the batch into the indices",
            )


def mod_fmod(subject: Subject) -> Iterator[Finding]:
    """Mod has no fmod."""
    for node in subject.typed("Mod"):
        fmod = node.attributes.get("fmod")
        if fmod is not None and fmod.as_int():
            yield Finding(
                ir.describe(node),
                "Mod with fmod",
                "fmod is dropped, so negative operands may give another result",
                "write it as x - y * trunc(x / y)",
            )


def quant_attribute_types(subject: Subject) -> Iterator[Finding]:
    """AscendQuant's dst_type is a STRING."""
    for node in subject.typed("AscendQuant"):
        dst_type = node.attributes.get("dst_type")
        if dst_type is not None and dst_type.type != ir.AttributeType.STRING:
            yield Finding(
                ir.describe(node),
                f"AscendQuant with dst_type as {dst_type.type.name}",
                "an INT is silently ignored, and the result is int8",
                'write "INT8", "INT16" or "INT4"',
            )


def weight_quant(subject: Subject) -> Iterator[Finding]:
    """NPUWeightQuantBatchMatmulV2: weights and groups that the SoC takes."""
    for node in subject.typed("NPUWeightQuantBatchMatmulV2"):
        if present_inputs(node) < 3:
            continue  # reported by ge_requirements
        place, weight = ir.describe(node), node.inputs[1]
        on_310p = subject.target.family.name == "310p"
        kind = "" if weight is None else dtype_name(weight.dtype)
        if on_310p and kind not in ("int8", ""):
            yield Finding(
                place, f"{kind} weights on 310P", "310P takes int8 weights only", "quantise to int8"
            )
        group = node.attributes.get("antiquant_group_size")
        size = 0 if group is None else group.as_int()
        if size and (size < 32 or size % 32):
            yield Finding(
                place,
                f"a group size of {size}",
                "it is a multiple of 32, at least 32 and below k",
                "choose another group size",
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


_TRANSFORMER = "mirror-cann/ops-transformer:attention"

RULES = (
    Rule("never-emitted", "parses, and is wrong", f"{_TRANSFORMER}/*/framework", never_emitted),
    Rule(
        "prompt-flash-attention",
        "EZ9999, E19999 or wrong numbers",
        f"{_TRANSFORMER}/prompt_flash_attention/framework/"
        "npu_prompt_flash_attention_onnx_plugin.cpp",
        prompt_flash_attention,
    ),
    Rule(
        "rms-norm-epsilon",
        "wrong numbers",
        "hicann/ops-nn:norm/rms_norm/framework/npu_rms_norm_onnx_plugin.cpp",
        rms_norm,
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
        "hicann/ops-math:common/src/framework/npu_rotary_mul_onnx_plugin.cpp",
        rotary_mul,
    ),
    Rule(
        "target-op-attributes",
        "silently the default",
        "hicann/ops-nn:*/framework/*_onnx_plugin.cpp",
        target_op_attributes,
    ),
    Rule(
        "split-sizes",
        "a crash",
        "hicann/ops-math:conversion/split_d/framework/split_onnx_plugin.cpp",
        split_sizes,
    ),
    Rule(
        "clip-bounds",
        "E11010",
        "hicann/ops-math:conversion/clip_by_value/framework/clip_onnx_plugin.cpp",
        clip_bounds,
    ),
    Rule(
        "scatter-reduction",
        "wrong numbers",
        "hicann/ge:graph_metadef/register/register.cpp",
        scatter_reduction,
    ),
    Rule(
        "gather-nd-batch",
        "EZ9999",
        "hicann/ops-nn:index/gather_nd/framework",
        gather_nd_batch,
    ),
    Rule("mod-fmod", "wrong numbers", "hicann/ops-math:math/mod/framework", mod_fmod),
    Rule(
        "quant-attribute-types",
        "silently the default",
        "hicann/ops-nn:quant/ascend_quant/framework",
        quant_attribute_types,
    ),
    Rule(
        "weight-quant",
        "no kernel",
        "hicann/ops-nn:matmul/weight_quant_batch_matmul_v2/docs/aclnnWeightQuantBatchMatmulV2.md",
        weight_quant,
    ),
)
