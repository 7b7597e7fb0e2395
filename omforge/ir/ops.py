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

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from omforge.ir.errors import InputError
from omforge.ir.int8_ops import INT8_OPS, is_int8_product
from omforge.ir.target_op import Shapes, TargetAttribute, TargetInput, TargetOp, Typed
from omforge.ir.weight_quant import reference_body, twin_of

TARGET_DOMAIN = "npu"

# The bodies use CastLike (opset 15) and ReduceMean with an `axes` attribute (up to 17).
BODY_OPSETS = range(15, 18)

RMS_NORM_EPSILON = 1e-6


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

_MODERN_FLOATS = frozenset(("float16", "float32", "bfloat16"))

# RmsNorm and AddRmsNorm have kernels for 950 too, FastGelu for 950 and 310B.
_NORM_FLOATS = {**_FLOATS, "950": _MODERN_FLOATS}
_GELU_FLOATS = {**_NORM_FLOATS, "310b": frozenset(("float16", "float32"))}


_MODERN = {"910b": _MODERN_FLOATS, "910_93": _MODERN_FLOATS}
"""The families of A2 and A3, for what neither 310P nor 910 has."""


def _infer_rms_norm(inputs: Sequence[Typed]) -> Shapes:
    dtype, shape = inputs[0]
    return (dtype, shape), (ir.DataType.FLOAT, (*shape[:-1], 1))


def _infer_add_rms_norm(inputs: Sequence[Typed]) -> Shapes:
    y, rstd = _infer_rms_norm(inputs)
    return y, rstd, inputs[0]


def _infer_attention(inputs: Sequence[Typed]) -> Shapes:
    (dtype, of_query), (_, of_value) = inputs[0], inputs[2]
    return ((dtype, (*of_query[:-1], of_value[-1])),)


def _infer_weight_quant(inputs: Sequence[Typed]) -> Shapes:
    (dtype, of_x), (_, of_scale) = inputs[0], inputs[2]
    return ((dtype, (*of_x[:-1], of_scale[-1])),)


def _infer_first(inputs: Sequence[Typed]) -> Shapes:
    return (inputs[0],)


_RMS_NORM = TargetOp(
    name="NPURmsNorm",
    npu_name="NPURmsNorm",
    ge_type="RmsNorm",
    opsets=range(11, 19),
    inputs=(TargetInput("x", _NORM_FLOATS), TargetInput("gamma", _NORM_FLOATS)),
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

_ADD_RMS_NORM = TargetOp(
    name="NPUAddRmsNorm",
    npu_name="NPUAddRmsNorm",
    ge_type="AddRmsNorm",
    opsets=range(11, 19),
    inputs=(
        TargetInput("x1", _NORM_FLOATS),
        TargetInput("x2", _NORM_FLOATS),
        TargetInput("gamma", _NORM_FLOATS),
    ),
    outputs=("y", "rstd", "x"),
    attributes=(),
    infer=_infer_add_rms_norm,
    body="""
        <domain: "npu", opset_import: ["" : 16]>
        NPUAddRmsNorm (x1, x2, gamma) => (y, rstd, x)
        {
            x = Add (x1, x2)
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
    summary="x = x1 + x2; y = gamma * x / sqrt(mean(x^2) + 1e-6) over the last axis",
    limits=(
        "the plugin reads no attribute: epsilon is always 1e-6",
        "GE makes it of Add and RmsNorm by itself (AddRmsNormFusionGraphPass)",
    ),
    sources=(
        "hicann/ops-nn:norm/add_rms_norm/framework/npu_add_rms_norm_onnx_plugin.cpp",
        "hicann/ge:docs/zh/user_guides/atc_tools/references/fusion_rules_list.md",
    ),
)

_FAST_GELU = TargetOp(
    name="NPUFastGelu",
    npu_name="NPUFastGelu",
    ge_type="FastGelu",
    opsets=range(11, 19),
    inputs=(TargetInput("x", _GELU_FLOATS),),
    outputs=("y",),
    attributes=(),
    infer=_infer_first,
    body="""
        <domain: "npu", opset_import: ["" : 16]>
        NPUFastGelu (x) => (y)
        {
            wide = Cast <to = 1> (x)
            size = Abs (wide)
            slope = Constant <value = float {-1.702}> ()
            one = Constant <value = float {1.0}> ()
            half = Constant <value = float {0.851}> ()
            steep = Mul (size, slope)
            decay = Exp (steep)
            below = Add (decay, one)
            share = Div (wide, below)
            negative = Sub (wide, size)
            exponent = Mul (negative, half)
            correction = Exp (exponent)
            result = Mul (share, correction)
            y = CastLike (result, x)
        }
    """,
    summary="y = x / (1 + exp(-1.702 |x|)) * exp(0.851 (x - |x|)), which is x * sigmoid(1.702 x)",
    sources=("hicann/ops-nn:activation/fast_gelu/framework/npu_fast_gelu_onnx_plugin.cpp",),
)

_ROTARY_POSITION_EMBEDDING = TargetOp(
    name="NPURotaryPositionEmbedding",
    npu_name="NPURotaryPositionEmbedding",
    ge_type="RotaryPositionEmbedding",
    opsets=range(11, 19),
    inputs=(
        TargetInput("x", _MODERN),
        TargetInput("cos", _MODERN),
        TargetInput("sin", _MODERN),
    ),
    outputs=("y",),
    attributes=(TargetAttribute("mode", "INT", required=True),),
    infer=_infer_first,
    body="""
        <domain: "npu", opset_import: ["" : 16]>
        NPURotaryPositionEmbedding <mode> (x, cos, sin) => (y)
        {
            left, right = Split <axis = -1> (x)
            minus = Neg (right)
            halves = Concat <axis = -1> (minus, left)
            shape = Shape (x)
            start = Constant <value = int64[1] {0}> ()
            end = Constant <value = int64[1] {-1}> ()
            outer = Slice (shape, start, end)
            pair = Constant <value = int64[2] {-1, 2}> ()
            by_pair = Concat <axis = 0> (outer, pair)
            pairs = Reshape (x, by_pair)
            even, odd = Split <axis = -1> (pairs)
            negative = Neg (odd)
            turned = Concat <axis = -1> (negative, even)
            interleaved = Reshape (turned, shape)
            chosen = Constant <value_int: int = @mode> ()
            nought = Constant <value = int64 {0}> ()
            by_halves = Equal (chosen, nought)
            rotated = Where (by_halves, halves, interleaved)
            cosine = Mul (x, cos)
            sine = Mul (rotated, sin)
            y = Add (cosine, sine)
        }
    """,
    summary="y = x * cos + turned(x) * sin; mode 0 turns halves, mode 1 neighbouring pairs",
    limits=(
        "A2 and A3: modes 0 and 1; D even and up to 896; x 3-D or 4-D",
        "cos and sin [B or 1, S, 1, D] or [B or 1, 1, S, D] and the like",
        "not on 310P by CANN 8.1 (the newest definition file lists it, its README does not)",
        "omforge's reference body knows modes 0 and 1",
    ),
    sources=(
        "mirror-cann/ops-transformer:posembedding/rotary_position_embedding/framework/"
        "npu_rotary_position_embedding_onnx_plugin.cpp",
    ),
)

_HALVES = {
    "910b": frozenset(("float16", "bfloat16")),
    "910_93": frozenset(("float16", "bfloat16")),
}
_PROMPT_FLASH_ATTENTION = TargetOp(
    name="NPUPromptFlashAttention",
    npu_name="NPUPromptFlashAttention",
    ge_type="PromptFlashAttention",
    opsets=range(11, 17),
    inputs=(
        TargetInput("query", {"310p": frozenset(("float16",)), **_HALVES}),
        TargetInput("key", {"310p": frozenset(("float16",)), **_HALVES}),
        TargetInput("value", {"310p": frozenset(("float16",)), **_HALVES}),
        TargetInput("pse_shift", _HALVES, required=False),
        TargetInput(
            "atten_mask",
            {"910b": frozenset(("bool",)), "910_93": frozenset(("bool",))},
            required=False,
        ),
    ),
    outputs=("attention_out",),
    attributes=(
        TargetAttribute("num_heads", "INT", required=True),
        TargetAttribute("input_layout", "STRING", required=True),
        TargetAttribute("scale_value", "FLOAT", 1.0),
        TargetAttribute("pre_tokens", "INT", 0),
        TargetAttribute("next_tokens", "INT", 0),
        TargetAttribute("num_key_value_heads", "INT", 0),
        TargetAttribute("sparse_mode", "INT", 0),
        TargetAttribute("inner_precise", "INT", 1),
    ),
    infer=_infer_attention,
    # The layout is BNSD. What a fully masked row holds is not documented.
    body="""
        <domain: "npu", opset_import: ["" : 16]>
        NPUPromptFlashAttention
            <num_heads, input_layout, scale_value: float = 1.0, pre_tokens: int = 0,
             next_tokens: int = 0, num_key_value_heads: int = 0, sparse_mode: int = 0,
             inner_precise: int = 1>
            (query, key, value, pse_shift, atten_mask) => (attention_out)
        {
            zero = Constant <value = int64[1] {0}> ()
            two = Constant <value = int64[1] {2}> ()
            three = Constant <value = int64[1] {3}> ()
            four = Constant <value = int64[1] {4}> ()
            rest = Constant <value = int64[1] {-1}> ()
            of_query = Shape (query)
            of_key = Shape (key)
            of_value = Shape (value)
            kv = Slice (of_key, zero, two)
            keys = Slice (of_key, two, three)
            head = Slice (of_query, three, four)
            rows = Slice (of_query, zero, three)
            width = Slice (of_value, three, four)
            grouped = Concat <axis = 0> (kv, rest, head)
            wide_query = Cast <to = 1> (query)
            wide_key = Cast <to = 1> (key)
            wide_value = Cast <to = 1> (value)
            q = Reshape (wide_query, grouped)
            k = Transpose <perm = [0, 1, 3, 2]> (wide_key)
            raw = MatMul (q, k)
            factor = Constant <value_float: float = @scale_value> ()
            scaled = Mul (raw, factor)
            by_head = Concat <axis = 0> (rows, keys)
            scores = Reshape (scaled, by_head)
            fill = Constant <value = float {-1e9}> ()
            masked = Where (atten_mask, fill, scores)
            share = Softmax <axis = -1> (masked)
            by_group = Concat <axis = 0> (kv, rest, keys)
            shares = Reshape (share, by_group)
            weighed = MatMul (shares, wide_value)
            by_row = Concat <axis = 0> (rows, width)
            result = Reshape (weighed, by_row)
            attention_out = CastLike (result, query)
        }
    """,
    summary="softmax(scale * Q K^T, with masked (true) positions out) V, layout BNSD, native GQA",
    limits=(
        "3, 5, 7, 9 or 12 inputs parse, none of them absent: a mask needs a pse tensor",
        "310P takes no pse, hence no mask; no GQA; fp16 only",
        "A2 and A3: a zero-element pse counts as absent (read in the tiling, untested on a device)",
        "omforge's reference body needs the mask and the layout BNSD",
    ),
    sources=(
        "mirror-cann/ops-transformer:attention/prompt_flash_attention/framework/"
        "npu_prompt_flash_attention_onnx_plugin.cpp",
        "mirror-cann/ops-transformer:attention/prompt_flash_attention/docs/"
        "aclnnPromptFlashAttentionV3.md",
    ),
)


def _wide(narrow: Sequence[str], *wide: str) -> Mapping[str, frozenset[str]]:
    """`narrow` on 310P, `wide` on A2, A3 and 950."""
    rest = dict.fromkeys(("910b", "910_93", "950"), frozenset(wide))
    return {"310p": frozenset(narrow), **rest}


_WEIGHT_QUANT = TargetOp(
    name="NPUWeightQuantBatchMatmulV2",
    npu_name="WeightQuantBatchMatmulV2",
    ge_type="WeightQuantBatchMatmulV2",
    opsets=range(11, 20),
    inputs=(
        TargetInput("x", _wide(["float16"], "float16", "bfloat16")),
        TargetInput("weight", _wide(["int8"], "int8", "int4", "int32")),
        TargetInput("antiquant_scale", _wide(["float16"], "float16", "bfloat16")),
        TargetInput("antiquant_offset", _wide(["float16"], "float16", "bfloat16"), False),
        TargetInput("quant_scale", _wide([], "float32", "uint64"), False),
        TargetInput("quant_offset", _wide([], "float32"), False),
        TargetInput("bias", _wide(["float16"], "float16", "float32"), False),
    ),
    outputs=("y",),
    attributes=(
        TargetAttribute("antiquant_group_size", "INT", 0),
        TargetAttribute("dtype", "INT", -1),
    ),
    infer=_infer_weight_quant,
    body=reference_body("WeightQuantBatchMatmulV2"),
    variant=twin_of,
    summary="y = x @ ((weight + antiquant_offset) * antiquant_scale) + bias",
    limits=(
        "x [m, k], weight [k, n], k and n up to 65,535; scale and offset (n) or (ceil(k/g), n)",
        "the offset is added: it is the negative zero point, in x's dtype",
        "group size 0, or a multiple of 32 from 32 to k - 1; 310P: int8, one scale per channel",
        "an int32 weight holds eight int4 along the last axis of the stored tensor, which is "
        "[k, n / 8], or [n, k / 8] in front of a Transpose",
    ),
    sources=(
        "hicann/ops-nn:matmul/weight_quant_batch_matmul_v2/framework/"
        "npu_weight_quant_batchmatmul_v2_onnx_plugin.cpp",
        "hicann/ops-nn:matmul/weight_quant_batch_matmul_v2/docs/aclnnWeightQuantBatchMatmulV2.md",
    ),
)

TARGET_OPS: Mapping[str, TargetOp] = {
    op.name: op
    for op in (
        _RMS_NORM,
        _ADD_RMS_NORM,
        _ROTARY_MUL,
        _ROTARY_POSITION_EMBEDDING,
        _SCALED_MASKED_SOFTMAX,
        _PROMPT_FLASH_ATTENTION,
        _FAST_GELU,
        _WEIGHT_QUANT,
        *INT8_OPS,
    )
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
    used: dict[str, str] = {}
    for node in list(twin.graph.all_nodes()):
        if is_int8_product(node):
            node.op_type = "MatMulInteger"  # ONNX's own name for it
        if not is_target_op(node):
            continue
        op = TARGET_OPS[node.op_type]
        name, body = (op.npu_name, op.body) if op.variant is None else op.variant(node)
        used[name] = body
        node.domain = TARGET_DOMAIN
        node.op_type = name
        # ONNX Runtime's inference fails on a call that takes fewer outputs than the body gives.
        for index in range(len(node.outputs), len(op.outputs)):
            node.resize_outputs(index + 1)
            node.outputs[index].name = f"{node.outputs[0].name}.{op.outputs[index]}"
    for name in sorted(used):
        function = ir.from_proto(onnx.parser.parse_function(used[name]))
        twin.functions[function.identifier()] = function
    if used:
        twin.graph.opset_imports[TARGET_DOMAIN] = 1
    return twin
