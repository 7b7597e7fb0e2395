"""Which form an operator is lowered to, on which SoC, and why: the table.

Rows of one operator are in order of preference. Of the forms that a node can take, the one that
moves the fewest bytes is chosen, and among equals the first. A row that is `opt_in` is out of the
running unless it is asked for by name (`forms={"Attention": "NPUPromptFlashAttention"}`): there the
sources are uncertain or contradict each other, and the default is the conservative reading. What
was seen on a device (`target.facts`, by `data/claims.tsv`) goes before both: a form that was seen
to be right is in the running, one that was seen not to be is refused.
A row without `families` is never emitted; it says why.

The conditions in `when` are checked by the function that makes the form; what it refuses, it
refuses in words (`builder.NotLegal`), which `omforge check --why` prints.

Sources of facts are written `repository:path`.
"""

from __future__ import annotations

from omforge.lowering.legalize.choice import (
    ALL,
    DECOMPOSED,
    NORMS,
    NOWHERE,
    ONNX,
    QUANT_MATMUL,
    WEIGHT_QUANT,
    Choice,
)
from omforge.lowering.legalize.ge_choices import GE_CHOICES

_NN, _MATH = "hicann/ops-nn", "hicann/ops-math"
_TRANSFORMER = "mirror-cann/ops-transformer"
_STANDARD = f"{_MATH}:common/src/framework/similar_opp_onnx_plugin.cpp"
_OPS_INFO = "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config/<soc>/aic-<soc>-ops-info.json"

CHOICES: tuple[Choice, ...] = (
    *GE_CHOICES,
    Choice(
        "RMSNormalization",
        "NPURmsNorm",
        NORMS,
        "over the last axis; x scaled by sqrt(1e-6/epsilon) first where epsilon is not 1e-6",
        "one kernel; its plugin ignores epsilon and always uses 1e-6",
        f"{_NN}:norm/rms_norm/framework/npu_rms_norm_onnx_plugin.cpp",
        "parser",
        fronts=ONNX,
    ),
    Choice(
        "RMSNormalization",
        "NPUAddRmsNorm",
        NORMS,
        "x is a sum of two tensors of its shape; epsilon is 1e-6",
        "no gain: GE makes AddRmsNorm of Add and RmsNorm by itself (AddRmsNormFusionGraphPass); "
        "its bytes contain the Add's",
        f"{_NN}:norm/add_rms_norm/framework/npu_add_rms_norm_onnx_plugin.cpp; "
        "hicann/ge:docs/zh/user_guides/atc_tools/references/fusion_rules_list.md",
        "source",
        opt_in=True,
        fronts=ONNX,
    ),
    Choice(
        "RMSNormalization",
        DECOMPOSED,
        ALL,
        "always",
        "Mul, ReduceMean, Add, Sqrt, Div, Mul are registered everywhere",
        _STANDARD,
        "parser",
    ),
    Choice(
        "LayerNormalization",
        DECOMPOSED,
        ALL,
        "always",
        "ReduceMean, Sub, Mul, Add, Sqrt, Div are registered at opset 16",
        _STANDARD,
        "parser",
    ),
    Choice(
        "LayerNormalization",
        "LayerNormalization",
        NOWHERE,
        "opset 17 or 18",
        "registered at opsets 17 and 18 only, and the dialect is opset 16 for the sake of "
        "QuantBatchMatMul and NPUPromptFlashAttention",
        f"{_NN}:common/src/framework/layer_normalization_onnx_plugin.cpp",
        "parser",
        fronts=ONNX,
    ),
    Choice(
        "RotaryEmbedding",
        "NPURotaryMul",
        frozenset(("310p", "910b", "910_93")),
        "halves, not interleaved; the whole head of size 128; B = 1; N <= 1000; S <= 1024; "
        "[B, N, S, D] only with N <= 8*S",
        "one kernel, inside its documented limits",
        f"{_MATH}:common/src/framework/npu_rotary_mul_onnx_plugin.cpp",
        "parser",
    ),
    Choice(
        "RotaryEmbedding",
        "NPURotaryPositionEmbedding",
        frozenset(("910b", "910_93")),
        "rotated width even and up to 896; halves or interleaved; any batch",
        "one kernel for what NPURotaryMul does not take; older releases have no ONNX plugin for it",
        f"{_TRANSFORMER}:posembedding/rotary_position_embedding/framework; {_OPS_INFO}",
        "uncertain",
        opt_in=True,
    ),
    Choice(
        "RotaryEmbedding",
        DECOMPOSED,
        ALL,
        "always: partial, interleaved, 3-D and 4-D",
        "Split, Neg, Concat, Mul, Add are registered everywhere",
        _STANDARD,
        "parser",
    ),
    Choice(
        "Attention",
        "MatMul-Softmax",
        ALL,
        "any mask, window, softcap and head grouping; with and without a past",
        "parses everywhere; grouped heads are rows of one matrix, so that nothing is repeated, and "
        "scores against past and new keys are joined, so that the cache is never copied; all C "
        "slots are read, valid or not",
        _STANDARD,
        "parser",
    ),
    Choice(
        "Attention",
        "NPUScaledMaskedSoftmax",
        frozenset(("310p", "910b", "910_93")),
        "MatMul-Softmax with mask and softmax in one kernel; the mask is one that the runtime "
        "makes; S and C + S are 32 to 4096 and multiples of 32; no softcap",
        "two passes over the scores less; what it puts at masked places is -inf in one source and "
        "-10000 in another, and the former makes NaN of a row that is masked throughout",
        f"{_TRANSFORMER}:common/src/framework/npu_scaled_masked_softmax_onnx_plugin.cpp",
        "uncertain",
        opt_in=True,
    ),
    Choice(
        "Attention",
        "NPUPromptFlashAttention",
        frozenset(("910b", "910_93")),
        "fp16 or bf16; a mask that the runtime makes; no softcap; heads of equal key and value "
        "size, up to 512; a pse of zero elements",
        "no scores in memory, but past and new keys must be one tensor, so that the cache is "
        "copied: for prefill only; that a zero-element pse counts as absent was read in the "
        "tiling and never run",
        f"{_TRANSFORMER}:attention/prompt_flash_attention/framework/"
        "npu_prompt_flash_attention_onnx_plugin.cpp",
        "uncertain",
        opt_in=True,
        fronts=ONNX,
    ),
    Choice(
        "Attention",
        "NPUPromptFlashAttention (310P)",
        NOWHERE,
        "310P: without a mask",
        "310P refuses any pse tensor, and a mask needs a pse slot: no causal attention",
        f"{_TRANSFORMER}:attention/prompt_flash_attention (tiling.cpp:1870)",
        "source",
        fronts=ONNX,
    ),
    Choice(
        "Attention",
        "NPUIncreFlashAttention",
        NOWHERE,
        "",
        "its plugin leaves key and value unconnected",
        f"{_TRANSFORMER}:attention/incre_flash_attention/framework/"
        "npu_incre_flash_attention_onnx_plugin.cpp",
        "parser",
        fronts=ONNX,
    ),
    Choice(
        "Attention",
        "NPUFlashAttention",
        NOWHERE,
        "",
        "a training kernel: nine inputs, B*N*S*S of drop mask, and the parser crashes on a query "
        "that is no graph input",
        f"{_TRANSFORMER}:attention/flash_attention_score/framework/"
        "npu_flash_attention_score_onnx_plugin.cpp",
        "parser",
        fronts=ONNX,
    ),
    Choice(
        "Gelu",
        DECOMPOSED,
        ALL,
        "approximate none (Erf) and tanh",
        "Erf, Tanh, Mul, Add are registered everywhere",
        _STANDARD,
        "parser",
    ),
    Choice(
        "Gelu",
        "NPUGeluV2",
        NOWHERE,
        "domain npu",
        "registered in domain npu only; a second domain is refused by older releases (E16005)",
        f"{_NN}:activation/gelu_v2/framework/npu_geluv2_onnx_plugin.cpp",
        "source",
        fronts=ONNX,
    ),
    Choice(
        "Gelu",
        "NPUGeglu",
        NOWHERE,
        "gate and value are halves of one tensor",
        "canonical graphs compute them by two products; joining them costs what it saves",
        f"{_NN}:activation/ge_glu_v2/framework/npu_geglu_onnx_plugin.cpp",
        "source",
    ),
    Choice(
        "Swish",
        "NPUFastGelu",
        frozenset(("310p", "310b", "910b", "910_93", "950")),
        "alpha is 1.702",
        "x * sigmoid(1.702 x) is its formula, in one kernel",
        f"{_NN}:activation/fast_gelu/framework/npu_fast_gelu_onnx_plugin.cpp",
        "source",
    ),
    Choice(
        "Swish",
        DECOMPOSED,
        ALL,
        "any alpha, static and dynamic shapes",
        "x * Sigmoid(alpha x); ATC registers no ONNX operator that becomes Swish or SwiGlu",
        _STANDARD,
        "parser",
    ),
    Choice(
        "QuantizedMatMul",
        "NPUWeightQuantBatchMatmulV2",
        WEIGHT_QUANT,
        "int8 per channel; on A2, A3 and 950 also in groups, and int4, eight to an int32; x in "
        "float16; K and N up to 65,535, more outputs in blocks of rows of [N, K]",
        "one kernel that reads integers; 310P has it for int8 per channel, stored [N, K], alone: "
        "its prototype excludes the groups that its document lists",
        f"{_NN}:matmul/weight_quant_batch_matmul_v2/docs/aclnnWeightQuantBatchMatmulV2.md; "
        f"{_NN}:matmul/weight_quant_batch_matmul_v2/op_graph/weight_quant_batch_matmul_v2_proto.h",
        "parser",
    ),
    Choice(
        "QuantizedMatMul",
        "NPUWeightQuantBatchMatmulV2-INT4",
        frozenset(("910b", "910_93", "950")),
        "the same with int4 weights of dtype INT4",
        "the same bytes; that a release's parser takes INT4 initializers is certain of August 2026 "
        "only",
        "hicann/ge:parser/parser/onnx/onnx_constant_parser.cc",
        "parser",
        opt_in=True,
    ),
    Choice(
        "Int8MatMul",
        "QuantBatchMatMul",
        QUANT_MATMUL,
        "x int8 with one step, the weight int8 with one scale per output; the product in float16; "
        "the last axes up to 65,535; on 310P a weight stored [N, K]",
        "one kernel, whose int32 sums never reach memory",
        f"{_NN}:matmul/quant_batch_matmul_v3/docs/aclnnQuantMatmulV4.md; "
        f"{_NN}:quant/trans_quant_param_v2/README.md",
        "parser",
    ),
    Choice(
        "Int8MatMul",
        "AscendDequant",
        ALL,
        "the same, of any size whose sums fit int32",
        "MatMul to int32, then AscendDequant: the form that ATC's own quantisation writes, and the "
        "only one of 310B; kernel and prototype take a scale per output, while ATC's list of what "
        "can be quantised has MatMul with one scale alone",
        f"{_NN}:quant/ascend_dequant/op_graph/ascend_dequant_proto.h; "
        "hicann/ge:docs/zh/user_guides/atc_tools/references/quantization_layers_constraints.md",
        "uncertain",
    ),
    Choice(
        "DequantizeLinear",
        DECOMPOSED,
        ALL,
        "int8 that a step computes or reads, as an int8 cache; products with quantised weights "
        "have a lowering of their own, which takes node and MatMul together",
        "Cast and Mul are registered everywhere; ATC registers no DequantizeLinear",
        "hicann/ge:parser/parser/onnx/onnx_parser.cc (E13010)",
        "parser",
    ),
    Choice(
        "DequantizeLinear",
        "NPUAntiQuant",
        NOWHERE,
        "one scale, or one for each of the last two axes",
        "NPUAntiQuant has no scale per head, which is one along the second axis of four",
        f"{_NN}:quant/ascend_anti_quant_v2/framework/npu_anti_quant_onnx_plugin.cpp",
        "source",
    ),
    Choice(
        "QuantizeLinear",
        "AscendQuant",
        ALL,
        "one step for the whole tensor, for products of int8",
        "one kernel; a cache has a scale for each head, which it has not",
        f"{_NN}:quant/ascend_quant/framework/ascend_quant_onnx_plugin.cpp; {_OPS_INFO}",
        "parser",
    ),
    Choice(
        "QuantizeLinear",
        DECOMPOSED,
        ALL,
        "to int8; one scale, or one along an axis",
        "Div, Round, Clip and Cast are registered everywhere; ATC registers no QuantizeLinear",
        "hicann/ge:parser/parser/onnx/onnx_parser.cc (E13010)",
        "parser",
    ),
    Choice(
        "QuantizeLinear",
        "NPUQuantize",
        NOWHERE,
        "310P, A2 and A3: scales in float32",
        "NPUQuantize is one kernel, but not on 310B and 950, and a graph with it cannot have gears",
        f"{_NN}:quant/quantize/framework/npu_quantize_onnx_plugin.cpp",
        "source",
    ),
    Choice(
        "Experts",
        "gathered",
        ALL,
        "a static graph; experts whose matrices are stacked; T tokens that choose k of E experts "
        "each; int8 anywhere, int4 on A2, A3 and 950",
        "Gather reads the chosen experts' matrices and no others, and a product of T*k matrices "
        "reads what it wrote: fewer bytes where T*k is below a third of E",
        f"{_OPS_INFO}; {_NN}:matmul/weight_quant_batch_matmul_v2/docs/"
        "aclnnWeightQuantBatchMatmulV2.md (its weight is a tensor like any other)",
        "documented",
    ),
    Choice(
        "Experts",
        "dense",
        ALL,
        "always",
        "each matrix is read once, whoever chose it: what many tokens are cheapest with, and all "
        "that a graph with gears can have",
        _STANDARD,
        "parser",
    ),
    Choice(
        "cache",
        "per-layer",
        ALL,
        "two inputs and two outputs a layer",
        "attention reads the inputs as they lie: nothing is copied",
        "hicann/ge:docs/zh/design/features/memory_conflict.md",
        "source",
    ),
    Choice(
        "cache",
        "stacked",
        ALL,
        "one input and one output, [2*L*B, K, C, D]",
        "the Split into layers copies the whole cache once a step. GE takes a static Split on "
        "axis 0 whose readers are AI Core kernels for no task at all (SplitNOptimizer: _no_task, "
        "outputs are parts of the input), but where the input is the model's own and the model is "
        "built offline, as atc always does, it puts an Identity in between, which copies as much",
        "hicann/ge:compiler/engines/nn_engine/fusion/graph_optimizer/node_optimizer/"
        "split_n_optimizer.cc (NeedSkip); hicann/ge:compiler/graph/optimize/"
        "mem_layout_conflict_optimize/mem_layout_conflict_util.cc "
        "(IsSupportUserInputNopaddingContinuousOutput); hicann/ge:api/atc/main_impl.cc:109",
        "source",
    ),
)


def choices(op: str, family: str | None = None) -> tuple[Choice, ...]:
    """Return the forms of an operator in order of preference; those that a family has, if given."""
    return tuple(
        row for row in CHOICES if row.op == op and (family is None or family in row.families)
    )


def forms_by_op() -> dict[str, tuple[str, ...]]:
    """Return the names of the forms that may be asked for, by operator."""
    found: dict[str, tuple[str, ...]] = {}
    for row in CHOICES:
        if row.families and row.op != "cache":
            found[row.op] = (*found.get(row.op, ()), row.form)
    return found
