"""Illegal by an operator of ATC's own, a dtype or gears."""

from tests.lowering.illegal_parts import (
    A2,
    CONVENTION,
    DOCUMENT,
    KERNEL,
    LEGAL,
    IllegalModel,
    Source,
    drop_attribute,
    flash,
    npu,
    weight_quant,
)


def rotary(x: str, r: str) -> str:
    return f"""g (float16[{x}] x, float16[{r}] c, float16[{r}] s) => (float16[{x}] y)
        {{ y = NPURotaryMul (x, c, s) }}"""


LEGAL_ROTARY = Source(rotary("1,4,2,128", "1,4,1,128"))


ILLEGAL_TARGET_OPS: tuple[IllegalModel, ...] = (
    # --- ATC's own operators --------------------------------------------------------------------
    IllegalModel(
        "NPURmsNorm with an epsilon",
        Source(
            """g (float[2,8] x, float[8] w) => (float[2,8] y)
            { y, r = NPURmsNorm <epsilon = 1e-5> (x, w) }"""
        ),
        "rms-norm-epsilon",
        trap="SIM025",
        legal=Source(
            """g (float[2,8] x, float[8] w) => (float[2,8] y)
            { y, r = NPURmsNorm <epsilon = 1e-6> (x, w) }"""
        ),
    ),
    IllegalModel(
        "an epsilon in domain npu",
        Source(npu("NPURmsNorm").replace("(x, w)", "<epsilon = 1e-5> (x, w)")),
        "rms-norm-epsilon",
        trap="SIM025",
        release="9",
    ),
    IllegalModel(
        "a required input is missing in domain npu",
        Source(npu("NPURmsNorm").replace("(x, w)", "(x)")),
        "ge-requirements",
        trap="SIM038",
        release="9",
    ),
    IllegalModel(
        "NPURmsNorm with mixed dtypes on 310P",
        Source("g (float16[2,8] x, float[8] w) => (float16[2,8] y) { y, r = NPURmsNorm (x, w) }"),
        "rms-norm-shapes",
        sim=False,
        reason=KERNEL,
        legal_soc=A2,
    ),
    IllegalModel(
        "an INT scale of NPUScaledMaskedSoftmax",
        Source(
            """g (float[1,1,32,32] x, bool[1,1,32,32] m) => (float[1,1,32,32] y)
            { y = NPUScaledMaskedSoftmax <scale = 1> (x, m) }"""
        ),
        "target-op-attributes",
        trap="SIM027",
        legal=Source(
            """g (float[1,1,32,32] x, bool[1,1,32,32] m) => (float[1,1,32,32] y)
            { y = NPUScaledMaskedSoftmax <scale = 1.0> (x, m) }"""
        ),
    ),
    *(
        IllegalModel(
            f"NPURotaryMul: {why}",
            Source(rotary(x, r)),
            "rotary-mul-shapes",
            sim=False,
            reason=DOCUMENT,
            legal=LEGAL_ROTARY,
        )
        for why, x, r in (
            ("a head size of 64", "1,4,2,64", "1,4,1,64"),
            ("more than 1024 tokens", "1,1025,2,128", "1,1025,1,128"),
            ("decode in BNSD", "1,33,4,128", "1,1,4,128"),
        )
    ),
    IllegalModel(
        "NPURotaryPositionEmbedding without mode",
        Source(
            """g (float16[1,4,2,64] x, float16[1,4,1,64] c) => (float16[1,4,2,64] y)
            { y = NPURotaryPositionEmbedding (x, c, c) }"""
        ),
        "plugin-needs",
        "EZ9999",
        soc=A2,
        legal=Source(
            """g (float16[1,4,2,64] x, float16[1,4,1,64] c) => (float16[1,4,2,64] y)
            { y = NPURotaryPositionEmbedding <mode = 0> (x, c, c) }"""
        ),
    ),
    IllegalModel(
        "NPURotaryPositionEmbedding on 310P",
        Source(
            """g (float16[1,4,2,64] x, float16[1,4,1,64] c) => (float16[1,4,2,64] y)
            { y = NPURotaryPositionEmbedding <mode = 0> (x, c, c) }"""
        ),
        "kernel",
        sim=False,
        reason=KERNEL,
        legal_soc=A2,
    ),
    IllegalModel(
        "NPUMoeGatingTopKSoftmax without k",
        Source("g (float16[4,8] x) => (float16[4,2] y) { y, e, r = NPUMoeGatingTopKSoftmax (x) }"),
        "plugin-needs",
        "E19999",
        soc=A2,
        legal=Source(
            """g (float16[4,8] x) => (float16[4,2] y)
            { y, e, r = NPUMoeGatingTopKSoftmax <k = 2> (x) }"""
        ),
    ),
    IllegalModel(
        "NPUIncreFlashAttention",
        Source(
            """g (float16[1,1,64] q, float16[1,4,64] k) => (float16[1,1,64] y)
            { y = NPUIncreFlashAttention <num_heads = 1, input_layout = "BSH"> (q, k, k, k, k, k) }"""
        ),
        "never-emitted",
        trap="SIM022",
        soc=A2,
    ),
    IllegalModel(
        "NPUIncreFlashAttention with five inputs",
        Source(
            """g (float16[1,1,64] q, float16[1,4,64] k) => (float16[1,1,64] y)
            { y = NPUIncreFlashAttention <num_heads = 1, input_layout = "BSH"> (q, k, k, k, k) }"""
        ),
        "never-emitted",
        "EZ9999",
        soc=A2,
    ),
    IllegalModel(
        "NPUFlashAttention in BSND",
        Source(
            """g (float16[1,32,1,64] q, bool[32,32] m) => (float16[1,32,1,64] y)
            { y = NPUFlashAttention <head_num = 1, input_layout = "BSND">
                (q, q, q, q, m, m, q, q, q) }"""
        ),
        "never-emitted",
        "EZ9999",
        soc=A2,
    ),
    IllegalModel(
        "NPUFlashAttention behind another node",
        Source(
            """g (float16[1,32,64] x, bool[32,32] m) => (float16[1,32,64] y)
            { q = Relu (x)
              y = NPUFlashAttention <head_num = 1, input_layout = "BSH"> (q, q, q, q, m, m, q, q, q) }"""
        ),
        "never-emitted",
        "E19999",
        soc=A2,
    ),
    *(
        IllegalModel(
            f"{op}",
            Source(f"g (float[2] x) => (float[2] y) {{ y = {op} {attributes} (x) }}"),
            "never-emitted",
            trap="SIM026",
        )
        for op, attributes in (
            ("NPUDtypeCast", "<dtype = 1>"),
            ("NPUFormatCast", "<acl_format = 2>"),
        )
    ),
    IllegalModel(
        "prompt flash attention with four inputs",
        Source(flash("q, q, q, m")),
        "flash-inputs",
        "E19999",
        soc=A2,
        legal=Source(flash("q, q, q, none, m")),
    ),
    IllegalModel(
        "prompt flash attention with an absent pse",
        Source(flash("q, q, q, , m")),
        "flash-inputs",
        "E19999",
        soc=A2,
        legal=Source(flash("q, q, q, none, m")),
    ),
    IllegalModel(
        "prompt flash attention without num_heads",
        Source(flash("q, q, q"), drop_attribute("num_heads")),
        "plugin-needs",
        "EZ9999",
        soc=A2,
        legal=Source(flash("q, q, q")),
    ),
    IllegalModel(
        "prompt flash attention with an INT scale",
        Source(flash("q, q, q").replace("0.125", "1")),
        "flash-attributes",
        trap="SIM027",
        soc=A2,
        legal=Source(flash("q, q, q")),
    ),
    IllegalModel(
        "prompt flash attention with pre_tokens beyond int32",
        Source(flash("q, q, q").replace("2147483647", "1099511627776")),
        "flash-attributes",
        trap="SIM021",
        soc=A2,
        legal=Source(flash("q, q, q")),
    ),
    IllegalModel(
        "prompt flash attention without pre_tokens",
        Source(flash("q, q, q"), drop_attribute("pre_tokens")),
        "flash-attributes",
        trap="SIM020",
        soc=A2,
        legal=Source(flash("q, q, q")),
    ),
    IllegalModel(
        "prompt flash attention in another layout",
        Source(flash("q, q, q", layout="SBH")),
        "flash-layout",
        sim=False,
        reason=DOCUMENT,
        soc=A2,
        legal=Source(flash("q, q, q")),
    ),
    IllegalModel(
        "masked prompt flash attention on 310P",
        Source(flash("q, q, q, none, m")),
        "flash-310p",
        sim=False,
        reason="the kernel's tiling refuses it",
        legal_soc=A2,
    ),
    IllegalModel(
        "grouped prompt flash attention on 310P",
        Source(flash("q, q, q", ", num_key_value_heads = 1")),
        "flash-310p",
        sim=False,
        reason="the kernel's tiling refuses it",
        legal_soc=A2,
    ),
    IllegalModel(
        "prompt flash attention with heads of 1024",
        Source(flash("q, q, q").replace(",64]", ",1024]")),
        "flash-sizes",
        sim=False,
        reason=DOCUMENT,
        soc=A2,
        legal=Source(flash("q, q, q")),
    ),
    # --- quantisation ---------------------------------------------------------------------------
    IllegalModel(
        "an INT dst_type of AscendQuant",
        Source(
            """g (float16[2,4] x) => (int8[2,4] y)
            { y = AscendQuant <scale = 1.0, offset = 0.0, dst_type = 2> (x) }"""
        ),
        "target-op-attributes",
        trap="SIM027",
        legal=Source(
            """g (float16[2,4] x) => (int8[2,4] y)
            { y = AscendQuant <scale = 1.0, offset = 0.0, dst_type = "INT8"> (x) }"""
        ),
    ),
    IllegalModel(
        "NPUQuantize without dtype",
        Source(
            "g (float[2,4] x, float[4] s) => (int8[2,4] y) { y = NPUQuantize <axis = 1> (x, s) }"
        ),
        "quant-defaults",
        trap="SIM020",
        legal=Source(
            """g (float[2,4] x, float[4] s) => (int8[2,4] y)
            { y = NPUQuantize <axis = 1, dtype = 2> (x, s) }"""
        ),
    ),
    IllegalModel(
        "AscendDequant to float32",
        Source(
            """g (int32[2,2] x) => (float[2,2] y) <uint64[2] s = {1, 2}>
            { y = AscendDequant <dtype = 0> (x, s) }"""
        ),
        "quant-defaults",
        trap="SIM020",
        legal=Source(
            """g (int32[2,2] x) => (float16[2,2] y) <uint64[2] s = {1, 2}>
            { y = AscendDequant <dtype = 1> (x, s) }"""
        ),
    ),
    IllegalModel(
        "scales of AscendDequant that are computed",
        Source(
            """g (int32[2,2] x, uint64[2] s) => (float16[2,2] y)
            { y = AscendDequant <dtype = 1> (x, s) }"""
        ),
        "ascend-dequant",
        sim=False,
        reason=KERNEL,
        legal=Source(
            """g (int32[2,2] x) => (float16[2,2] y) <uint64[2] s = {1, 2}>
            { y = AscendDequant <dtype = 1> (x, s) }"""
        ),
    ),
    IllegalModel(
        "scales of QuantBatchMatMul in AscendDequant",
        Source(
            """g (int32[2,2] x) => (float16[2,2] y) <uint64[2] s = {70368744177665, 2}>
            { y = AscendDequant <dtype = 1> (x, s) }"""
        ),
        "ascend-dequant",
        sim=False,
        reason=KERNEL,
    ),
    IllegalModel(
        "a weight [k, n] of QuantBatchMatMul on 310P",
        Source(
            """g (int8[2,4] x, uint64[2] s) => (float16[2,2] y) <int8[4,2] w = {1,2,3,4,5,6,7,8}>
            { y = QuantBatchMatMul (x, w, s) }"""
        ),
        "quant-matmul-operands",
        sim=False,
        reason=DOCUMENT,
        legal=Source(
            """g (int8[2,4] x, uint64[2] s) => (float16[2,2] y) <int8[2,4] w = {1,2,3,4,5,6,7,8}>
            { y = QuantBatchMatMul <transpose_x2 = 1> (x, w, s) }"""
        ),
    ),
    IllegalModel(
        "a MatMul of int8 and float16",
        Source(
            """g (float16[2,4] x) => (float16[2,2] y) <int8[4,2] w = {1,2,3,4,5,6,7,8}>
            { y = MatMul (x, w) }"""
        ),
        "int8-matmul",
        trap="E89999",
        legal=Source(
            """g (int8[2,4] x) => (int32[2,2] y) <int8[4,2] w = {1,2,3,4,5,6,7,8}>
            { y = MatMul (x, w) }"""
        ),
    ),
    IllegalModel(
        "packed int4 weights on 310P",
        Source(weight_quant(w="int32[64,8]")),
        "kernel-dtype",
        sim=False,
        reason=KERNEL,
        legal_soc=A2,
    ),
    IllegalModel(
        "a group size of 48",
        Source(weight_quant(s="2,64", attributes="<antiquant_group_size = 48>")),
        "weight-quant",
        sim=False,
        reason=DOCUMENT,
        soc=A2,
        legal=Source(weight_quant(s="2,64", attributes="<antiquant_group_size = 32>")),
    ),
    IllegalModel(
        "weight-quantised groups on 310P",
        Source(weight_quant(s="2,64", attributes="<antiquant_group_size = 32>")),
        "weight-quant",
        sim=False,
        reason="the documents conflict",
        legal_soc=A2,
    ),
    IllegalModel(
        "three dims of a weight-quantised product on 910B",
        Source(weight_quant("1,16,64")),
        "weight-quant",
        sim=False,
        reason=DOCUMENT,
        soc=A2,
        legal_soc="Ascend310P3",
    ),
    IllegalModel(
        "a float scale of QuantBatchMatMul on 310P",
        Source(
            """g (int8[2,32] x, int8[32,32] w, float[32] s) => (float16[2,32] y)
            { y = QuantBatchMatMul (x, w, s) }"""
        ),
        "kernel-dtype",
        sim=False,
        reason=KERNEL,
    ),
    IllegalModel(
        "float16 out of a float scale on 910B",
        Source(
            """g (int8[2,32] x, int8[32,32] w, float[32] s) => (float16[2,32] y)
            { y = QuantBatchMatMul (x, w, s) }"""
        ),
        "quant-matmul",
        sim=False,
        reason=KERNEL,
        soc=A2,
        legal=Source(
            """g (int8[2,32] x, int8[32,32] w, uint64[32] s) => (float16[2,32] y)
            { y = QuantBatchMatMul (x, w, s) }"""
        ),
    ),
    IllegalModel(
        "QuantBatchMatMul to bfloat16 on 310P",
        Source(
            """g (int8[2,4] x, uint64[2] s) => (bfloat16[2,2] y) <int8[2,4] w = {1,2,3,4,5,6,7,8}>
            { y = QuantBatchMatMul <dtype = 27, transpose_x2 = 1> (x, w, s) }"""
        ),
        "quant-matmul",
        sim=False,
        reason=KERNEL,
        legal=Source(
            """g (int8[2,4] x, uint64[2] s) => (float16[2,2] y) <int8[2,4] w = {1,2,3,4,5,6,7,8}>
            { y = QuantBatchMatMul <dtype = 1, transpose_x2 = 1> (x, w, s) }"""
        ),
    ),
    IllegalModel(
        "a uint64 scale of a weight-quantised product with 32 outputs",
        Source(
            """g (float16[2,64] x, int8[64,32] w, uint64[32] s) => (float16[2,32] y)
            { y = NPUWeightQuantBatchMatmulV2 (x, w, s) }"""
        ),
        "weight-quant",
        sim=False,
        reason=DOCUMENT,
        soc=A2,
        legal=Source(
            """g (float16[2,64] x, int8[64,64] w, uint64[64] s) => (float16[2,64] y)
            { y = NPUWeightQuantBatchMatmulV2 (x, w, s) }"""
        ),
    ),
    IllegalModel(
        "NPUAntiQuant without an offset on 310P",
        Source("g (int8[2,4] x, float[1] s) => (float16[2,4] y) { y = NPUAntiQuant (x, s) }"),
        "anti-quant-offset",
        sim=False,
        reason=KERNEL,
        legal_soc=A2,
    ),
    # --- dtypes and gears -----------------------------------------------------------------------
    IllegalModel(
        "bfloat16 on 310P",
        Source("g (bfloat16[2] x) => (bfloat16[2] y) { y = Relu (x) }"),
        "soc-dtype",
        sim=False,
        reason=KERNEL,
        legal_soc=A2,
    ),
    IllegalModel(
        "double",
        Source("g (double[2] x) => (double[2] y) { y = Relu (x) }"),
        "soc-dtype",
        sim=False,
        reason=KERNEL,
        legal=LEGAL,
    ),
    IllegalModel(
        "strings",
        Source("g (string[2] x) => (string[2] y) { y = Identity (x) }"),
        "soc-dtype",
        sim=False,
        reason=KERNEL,
        legal=LEGAL,
    ),
    IllegalModel(
        "complex numbers",
        Source("g (complex64[2] x) => (complex64[2] y) { y = Identity (x) }"),
        "soc-dtype",
        sim=False,
        reason=KERNEL,
        legal=LEGAL,
    ),
    IllegalModel(
        "a MatMul of int64",
        Source("g (int64[2,2] a) => (int64[2,2] y) { y = MatMul (a, a) }"),
        "ge-dtypes",
        sim=False,
        reason=KERNEL,
        legal=Source("g (float16[2,2] a) => (float16[2,2] y) { y = MatMul (a, a) }"),
    ),
    IllegalModel(
        "gears of rank 5",
        Source("g (float[s,1,1,1,2] x) => (float[s,1,1,1,2] y) { y = Relu (x) }", gears=True),
        "gears",
        trap="SIM051",
        flags=("--input_shape=x:-1,1,1,1,2", "--dynamic_dims=1;4", "--input_format=ND"),
        legal=Source("g (float[s,1,1,2] x) => (float[s,1,1,2] y) { y = Relu (x) }", gears=True),
    ),
    IllegalModel(
        "gears of a quantised model",
        Source(
            """g (float16[s,4] x) => (int8[s,4] y)
            { y = AscendQuant <scale = 1.0, offset = 0.0> (x) }""",
            gears=True,
        ),
        "gears",
        trap="SIM052",
        flags=("--input_shape=x:-1,4", "--dynamic_dims=1;4", "--input_format=ND"),
        legal=Source(
            """g (float16[2,4] x) => (int8[2,4] y)
            { y = AscendQuant <scale = 1.0, offset = 0.0> (x) }""",
        ),
    ),
    IllegalModel(
        "an input with the name of the gears' own",
        Source(
            "g (float[s,2] ascend_mbatch_shape_data) => (float[s,2] y) "
            "{ y = Relu (ascend_mbatch_shape_data) }",
            gears=True,
        ),
        "gears",
        sim=False,
        reason=CONVENTION,
        flags=(
            "--input_shape=ascend_mbatch_shape_data:-1,2",
            "--dynamic_dims=1;4",
            "--input_format=ND",
        ),
        legal=Source("g (float[s,2] x) => (float[s,2] y) { y = Relu (x) }", gears=True),
    ),
)
