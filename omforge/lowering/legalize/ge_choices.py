"""The forms that the front air alone can say: GE's own operators, as no ONNX plugin makes them.

They come ahead of those that both fronts have. None was run on a device: what is read in sources
and documents is marked so, and `uncertain` where they leave it open or contradict each other.
"""

from __future__ import annotations

from omforge.lowering.legalize.choice import AIR, ALL, NORMS, NOWHERE, Choice

_NN = "hicann/ops-nn"
_TRANSFORMER = "mirror-cann/ops-transformer"
_PROTO = "CANN 8.1.RC1:opp/built-in/op_proto/inc"
_OPS_INFO = "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config/<soc>/aic-<soc>-ops-info.json"

GE_CHOICES: tuple[Choice, ...] = (
    Choice(
        "TensorScatter",
        "Scatter",
        frozenset(("310p", "910b", "910_93", "950")),
        "a cache [B, K, C, D] that is an input of the graph; float16, float32, int8, and bfloat16 "
        "on A2, A3 and 950",
        "the new slots alone are moved: the cache is a RefData, written where it lies",
        f"{_PROTO}/matrix_calculation_ops.h (Scatter); {_OPS_INFO}; "
        "hicann/ge:runtime/v1/graph/load/model_manager/davinci_model.cc (RefData, zero copy)",
        "source",
        fronts=AIR,
    ),
    Choice(
        "TensorScatter",
        "ScatterNdUpdate",
        ALL,
        "float16 and float32, on A2 and later bfloat16 and int8",
        "the same by the number of each row: what 310B has, where Scatter has no kernel; an int8 "
        "cache cannot be written in place there",
        f"{_PROTO}/matrix_calculation_ops.h (ScatterNdUpdate); {_OPS_INFO}",
        "source",
        fronts=AIR,
    ),
    Choice(
        "TensorScatter",
        "QuantUpdateScatter",
        NOWHERE,
        "one vector of scales, along one axis, and zero points that are integers",
        "an int8 cache has a scale for each channel of each head, and a middle that is no integer: "
        "its integers are made by Clip, Round and Cast, and written by Scatter",
        f"{_NN}:index/quant_update_scatter/docs; {_PROTO}/matrix_calculation_ops.h",
        "source",
        fronts=AIR,
    ),
    Choice(
        "QuantizeLinear",
        "AscendQuantV2",
        NOWHERE,
        "a scale and an offset along one of the last two axes",
        "whether it saturates is not documented, and a key far from those of the calibration must",
        f"{_NN}:quant/ascend_quant_v2/README.md",
        "source",
        fronts=AIR,
    ),
    Choice(
        "Attention",
        "FusedInferAttentionScore",
        frozenset(("910b", "910_93", "950")),
        "a cache in place; float16 or bfloat16; heads of equal key and value size, multiples of 16 "
        "up to 512; a mask that the runtime makes; no softcap, no sinks",
        "one kernel for prefill and decode: no scores in memory, grouped heads as they are; all C "
        "slots are read, valid or not, since lengths that change would be tiled anew at every step",
        f"{_TRANSFORMER}:attention/fused_infer_attention_score/docs/"
        "aclnnFusedInferAttentionScoreV3.md",
        "documented",
        fronts=AIR,
    ),
    Choice(
        "Attention",
        "IncreFlashAttention",
        frozenset(("310p", "910b", "910_93")),
        "the same for one query a row; up to 65,536 keys; on 310P as many heads of keys as of "
        "queries",
        "one kernel, which reads the cache once: all C slots, valid or not, since lengths that "
        "change would be tiled anew at every step",
        f"{_TRANSFORMER}:attention/incre_flash_attention/op_host/"
        "incre_flash_attention_tiling_check.cpp",
        "source",
        fronts=AIR,
    ),
    Choice(
        "Attention",
        "IncreFlashAttention-grouped",
        frozenset(("310p",)),
        "the same on 310P with grouped heads: groups of up to 32, heads of up to 128",
        "its tiling takes them, and its document says that num_key_value_heads must be 0",
        f"{_TRANSFORMER}:attention/incre_flash_attention/op_host/incre_flash_attention_tiling.cpp; "
        f"{_TRANSFORMER}:attention/incre_flash_attention/docs/aclnnIncreFlashAttentionV4.md",
        "uncertain",
        opt_in=True,
        fronts=AIR,
    ),
    Choice(
        "Attention",
        "PromptFlashAttention",
        NOWHERE,
        "310P: a mask, as many queries as keys",
        "a step attends to the cache of C slots, and 310P takes a mask only where there are as "
        "many queries",
        f"{_TRANSFORMER}:attention/prompt_flash_attention/op_host/"
        "prompt_flash_attention_tiling.cpp",
        "source",
        fronts=AIR,
    ),
    Choice(
        "RMSNormalization",
        "AddRmsNorm",
        NORMS,
        "x is a sum of two tensors of its shape, which the norm reads first; any epsilon",
        "sum and norm in one kernel, which hands out both",
        f"{_NN}:norm/add_rms_norm/op_graph/add_rms_norm_proto.h; {_OPS_INFO}",
        "source",
        fronts=AIR,
    ),
    Choice(
        "RMSNormalization",
        "RmsNorm",
        NORMS,
        "over the last axis; any epsilon",
        "one kernel, with the model's own epsilon",
        f"{_NN}:norm/rms_norm/op_graph/rms_norm_proto.h; {_OPS_INFO}",
        "source",
        fronts=AIR,
    ),
    Choice(
        "Conv",
        "sum of taps",
        ALL,
        "over time, channel by channel, of up to 8 taps; static sizes",
        "StridedSlice, Mul and Add are kernels everywhere; Conv2D wants images in formats of its "
        "own, and how an .air says them was not read",
        f"{_OPS_INFO}",
        "source",
        fronts=AIR,
    ),
    Choice(
        "Gelu",
        "GeluV2",
        ALL,
        "approximate none and tanh",
        "one kernel",
        f"{_NN}:activation/gelu_v2/op_graph; {_OPS_INFO}",
        "source",
        fronts=AIR,
    ),
    Choice(
        "Swish",
        "SwiGlu",
        NOWHERE,
        "gate and value are halves of one tensor",
        "canonical graphs compute them by two products; joining them copies more than it saves",
        f"{_NN}:activation/swi_glu/op_graph; {_OPS_INFO}",
        "source",
        fronts=AIR,
    ),
    Choice(
        "RotaryEmbedding",
        "ApplyRotaryPosEmb",
        NOWHERE,
        "query and key together, [B, S, N, D]",
        "it writes what it reads, and layers rotate queries and keys in two places: RotaryMul is "
        "taken, one for each, where its limits hold",
        f"{_TRANSFORMER}:posembedding/apply_rotary_pos_emb; {_OPS_INFO}",
        "source",
        fronts=AIR,
    ),
    Choice(
        "Swish",
        "Swish",
        ALL,
        "any alpha",
        "one kernel, with alpha as its scale",
        f"{_PROTO}/nonlinear_fuc_ops.h (Swish); {_OPS_INFO}",
        "source",
        fronts=AIR,
    ),
)
