"""Illegal by an operator of ONNX."""

from tests.lowering.illegal_parts import (
    IF,
    LEGAL,
    IllegalModel,
    Source,
    drop_attribute,
    flash,
    npu,
    one_branch,
    output_names,
    weight_quant,
)

LOOP = """g (float[2,2] x, bool t) => (float[2,2] y) <int64 n = {3}>
    { y = Loop (n, t, x) <body = b (int64 i, bool c, float[2,2] s) => (bool d, float[2,2] r)
        { d = Identity (c) r = Relu (s) }> }"""


SCAN = """g (float[2,2] x) => (float[2,2] y)
    { y = Scan <num_scan_inputs = 1, body = b (float[2] s) => (float[2] r) { r = Relu (s) }> (x) }"""


CLIPPED = "g (float[4] x) => (float[4] y) <float low = {0.0}> { y = Clip (x, low) }"


GATHER_ND = (
    """g (float[2,3] x, int64[2,1] r) => (float[2] y) { y = GatherND <batch_dims = 1> (x, r) }"""
)


SPLIT18 = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[4] x) => (float[2] a, float[2] b) { h = Relu (x) a, b = Split <num_outputs = 2> (h) }"""


LAYER_NORM = """<ir_version: 8, opset_import: ["" : 17]>
    g (float16[2,8] x, float16[8] w, float16[8] b) => (float16[2,8] y)
    { y = LayerNormalization (x, w, %s) }"""


ILLEGAL_OPERATORS: tuple[IllegalModel, ...] = (
    # --- operators ------------------------------------------------------------------------------
    *(
        IllegalModel(name, Source(body), "registered", "E13010", legal=legal)
        for name, body, legal in (
            ("a Loop", LOOP, None),
            ("a Scan", SCAN, None),
            (
                "QuantizeLinear",
                """g (float[2] x) => (uint8[2] y) <float s = {0.5}, uint8 z = {1}>
                { y = QuantizeLinear (x, s, z) }""",
                Source(
                    "g (float[2] x) => (int8[2] y) { y = AscendQuant <scale = 2.0, offset = 0.0> (x) }"
                ),
            ),
            (
                "DequantizeLinear",
                """g (uint8[2] x) => (float[2] y) <float s = {0.5}, uint8 z = {1}>
                { y = DequantizeLinear (x, s, z) }""",
                None,
            ),
            (
                "LayerNormalization at opset 16",
                LAYER_NORM.replace("17", "16").replace("%s", "b"),
                Source(LAYER_NORM % "b"),
            ),
            (
                "an operator of com.microsoft",
                """<ir_version: 8, opset_import: ["" : 16, "com.microsoft" : 1]>
                g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu (x) }""",
                None,
            ),
            ("version 2 of domain npu", npu("NPURmsNorm", 2), None),
            (
                "NPUGeluV2 in the default domain",
                "g (float[2] x) => (float[2] y) { y = NPUGeluV2 (x) }",
                Source("g (float[2] x) => (float[2] y) { y = NPUFastGelu (x) }"),
            ),
            (
                "the npu name of the weight-quantised product",
                weight_quant().replace("NPUWeight", "Weight"),
                Source(weight_quant()),
            ),
            (
                "prompt flash attention at opset 17",
                flash("q, q, q", opset=17),
                Source(flash("q, q, q")),
            ),
            (
                "QuantBatchMatMul at opset 17",
                """<ir_version: 8, opset_import: ["" : 17]>
                g (int8[2,4] x, uint64[2] s) => (float16[2,2] y)
                <int8[2,4] w = {1, 2, 3, 4, 5, 6, 7, 8}>
                { y = QuantBatchMatMul <transpose_x2 = 1> (x, w, s) }""",
                Source(
                    """g (int8[2,4] x, uint64[2] s) => (float16[2,2] y)
                    <int8[2,4] w = {1, 2, 3, 4, 5, 6, 7, 8}>
                    { y = QuantBatchMatMul <transpose_x2 = 1> (x, w, s) }"""
                ),
            ),
            (
                "Mish at opset 16",
                "g (float[2] x) => (float[2] y) { y = Mish (x) }",
                Source(
                    '<ir_version: 8, opset_import: ["" : 18]>'
                    "g (float[2] x) => (float[2] y) { y = Mish (x) }"
                ),
            ),
            ("an operator of nobody", "g (float[2] x) => (float[2] y) { y = FooBar (x) }", LEGAL),
        )
    ),
    IllegalModel(
        "an attribute of a later opset",
        Source("g (float[2] x) => (float16[2] y) { y = Cast <to = 10, saturate = 1> (x) }"),
        "onnx-schema",
        trap="SIM028",
        legal=Source("g (float[2] x) => (float16[2] y) { y = Cast <to = 10> (x) }"),
    ),
    IllegalModel(
        "a required attribute is missing",
        Source("g (float[2,4] x) => (int8[2,4] y) { y = AscendQuant <offset = 0.0> (x) }"),
        "quant-defaults",
        trap="SIM020",
        legal=Source(
            "g (float[2,4] x) => (int8[2,4] y) { y = AscendQuant <scale = 2.0, offset = 0.0> (x) }"
        ),
    ),
    IllegalModel(
        "a required input is missing",
        Source(
            """g (float16[2,64] x, int8[64,64] w) => (float16[2,64] y)
            { y = NPUWeightQuantBatchMatmulV2 (x, w) }"""
        ),
        "ge-requirements",
        trap="SIM038",
        legal=Source(weight_quant("2,64")),
    ),
    IllegalModel(
        "a required input of ONNX is missing",
        Source("g (float[2] x) => (float[2] y) { y = Add (x) }"),
        "onnx-schema",
        trap="SIM038",
        legal=Source("g (float[2] x) => (float[2] y) { y = Add (x, x) }"),
    ),
    IllegalModel(
        "an input too many",
        Source(
            """g (float[2,8] x, float[8] w) => (float[2,8] y)
            { y, r = NPURmsNorm (x, w, w) }"""
        ),
        "known-slots",
        "E19999",
        legal=Source("g (float[2,8] x, float[8] w) => (float[2,8] y) { y, r = NPURmsNorm (x, w) }"),
    ),
    IllegalModel(
        "an absent bias of LayerNormalization",
        Source(LAYER_NORM % "b", lambda proto: proto.graph.node[0].input.__setitem__(2, "")),
        "no-absent-inputs",
        "E19999",
        legal=Source(LAYER_NORM % "b"),
    ),
    IllegalModel(
        "an absent C of Gemm",
        Source(
            "g (float[2,2] x) => (float[2,2] y) { y = Gemm (x, x) }",
            lambda proto: proto.graph.node[0].input.append(""),
        ),
        "no-absent-inputs",
        "E19999",
        legal=Source("g (float[2,2] x) => (float[2,2] y) { y = Gemm (x, x) }"),
    ),
    IllegalModel(
        "an unnamed output beside an absent input",
        Source(
            """g (float[4] x) => (float[1] y) <int64[1] k = {1}, int64[1] from = {0}, int64[1] to = {1},
                int64[1] step = {1}>
            { t, rows = TopK (x, k) y = Slice (t, from, to, k, step) }""",
            lambda proto: (
                output_names(0, "t", "")(proto),
                proto.graph.node[1].input.__setitem__(3, ""),
            ),
        ),
        "outputs-named",
        trap="SIM036",
        legal=Source(
            """g (float[4] x) => (float[1] y) <int64[1] k = {1}, int64[1] from = {0}, int64[1] to = {1},
                int64[1] step = {1}>
            { t, rows = TopK (x, k) y = Slice (t, from, to, k, step) }""",
            lambda proto: proto.graph.node[1].input.__setitem__(3, ""),
        ),
    ),
    IllegalModel(
        "Clip without bounds",
        Source("g (float[4] x) => (float[4] y) { y = Clip (x) }"),
        "plugin-refuses",
        "EZ9999",
        legal=Source(CLIPPED),
    ),
    IllegalModel(
        "GatherND with batch_dims",
        Source(GATHER_ND),
        "plugin-refuses",
        "EZ9999",
        legal=Source(GATHER_ND, drop_attribute("batch_dims")),
    ),
    IllegalModel(
        "Split with num_outputs",
        Source(SPLIT18),
        "split-sizes",
        "E19999",
        legal=Source(
            """g (float[4] x) => (float[2] a, float[2] b) <int64[2] s = {2, 2}>
            { h = Relu (x) a, b = Split (h, s) }"""
        ),
    ),
    IllegalModel(
        "ScatterND with a reduction",
        Source(
            """g (float[4] x, int64[1,1] i, float[1] u) => (float[4] y)
            { y = ScatterND <reduction = "add"> (x, i, u) }"""
        ),
        "plugin-ignores",
        trap="SIM024",
        legal=Source(
            "g (float[4] x, int64[1,1] i, float[1] u) => (float[4] y) { y = ScatterND (x, i, u) }"
        ),
    ),
    IllegalModel(
        "Mod of integers without fmod",
        Source("g (int32[2] x, int32[2] z) => (int32[2] y) { y = Mod (x, z) }"),
        "mod-sign",
        trap="SIM024",
        legal=Source("g (int32[2] x, int32[2] z) => (int32[2] y) { y = Mod <fmod = 1> (x, z) }"),
    ),
    IllegalModel(
        "a part of a Shape",
        Source("g (float[2,3] x) => (int64[1] y) { y = Shape <start = 1> (x) }"),
        "plugin-ignores",
        trap="SIM024",
        legal=Source("g (float[2,3] x) => (int64[2] y) { y = Shape <start = 0> (x) }"),
    ),
    IllegalModel(
        "Cast to float8",
        Source("g (float[2] x) => (float[2] y) { h = Cast <to = 17> (x) y = Cast <to = 1> (h) }"),
        "plugin-changes",
        trap="SIM024",
        legal=Source("g (float[2] x) => (float16[2] y) { y = Cast <to = 10> (x) }"),
    ),
    IllegalModel(
        "If with one branch",
        Source(IF, one_branch),
        "if-branches",
        code="E19999",
        legal=Source(IF),
    ),
    IllegalModel(
        "a float16 LayerNormalization without bias",
        Source(LAYER_NORM % "b", lambda proto: proto.graph.node[0].input.pop()),
        "layer-norm-bias",
        sim=False,
        reason="dtypes are inferred behind the parser",
        legal=Source(LAYER_NORM % "b"),
    ),
)
