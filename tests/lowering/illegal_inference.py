"""Illegal by what plugins do with attributes, and by what inference finds behind the parser."""

from onnx import AttributeProto, ModelProto, helper

from tests.lowering.illegal_parts import IllegalModel, Source, drop_attribute


def _set_attribute(name: str, **fields: object) -> object:
    def edit(proto: ModelProto) -> None:
        node = proto.graph.node[0]
        for attribute in [*node.attribute]:
            if attribute.name == name:
                node.attribute.remove(attribute)
        node.attribute.append(AttributeProto(name=name, **fields))  # type: ignore[arg-type]

    return edit


def _twice(proto: ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("axis", 0))


SOFTMAX = "g (float16[2,4] x) => (float16[2,4] y) { y = Softmax <axis = 1> (x) }"
TRANSPOSE = "g (float16[2,3] x) => (float16[3,2] y) { y = Transpose <perm = [1, 0]> (x) }"
CONV = """g (float[1,4,8] x, float[4,1,3] w) => (float[1,4,6] y)
    { y = Conv <group = 4, kernel_shape = [3]> (x, w) }"""
GEMM = """g (float16[2,3] x, float16[3,4] w, float16[4] c) => (float16[2,4] y)
    { y = Gemm <alpha = 0.5> (x, w, c) }"""
BLOCKS = (
    """g (float16[1,4,2,2] x) => (float16[1,1,4,4] y) { y = DepthToSpace <blocksize = %d> (x) }"""
)
LAYER_NORM = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2,8] x, %s[8] w) => (float[2,8] y) { y = LayerNormalization (x, w) }"""

ILLEGAL_ATTRIBUTES = (
    IllegalModel(
        "Transpose without perm",
        Source(TRANSPOSE, drop_attribute("perm")),
        "plugin-needs",
        "EZ9999",
        legal=Source(TRANSPOSE),
    ),
    IllegalModel(
        "Conv without what tells its axes",
        Source(CONV, drop_attribute("kernel_shape")),
        "plugin-needs",
        "EZ9999",
        legal=Source(CONV),
    ),
    IllegalModel(
        "ArgMax of the last index",
        Source("g (float16[2,4] x) => (int64[2,1] y) { y = ArgMax <select_last_index = 1> (x) }"),
        "plugin-refuses",
        "EZ9999",
        legal=Source("g (float16[2,4] x) => (int64[1,4] y) { y = ArgMax <axis = 0> (x) }"),
    ),
    IllegalModel(
        "DepthToSpace in blocks of 1",
        Source(BLOCKS % 1),
        "plugin-refuses",
        "EZ9999",
        legal=Source(BLOCKS % 2),
    ),
    *(
        IllegalModel(
            f"{op} without {name}",
            Source(text, drop_attribute(name)),
            "plugin-needs",
            "EZ9999",
            legal=Source(text),
        )
        for op, name, text in (
            ("Cast", "to", "g (float16[4] x) => (float[4] y) { y = Cast <to = 1> (x) }"),
            (
                "Einsum",
                "equation",
                'g (float16[2,3] x) => (float16[3,2] y) { y = Einsum <equation = "ab->ba"> (x) }',
            ),
        )
    ),
    IllegalModel(
        "Gemm with alpha and without C",
        Source(GEMM, lambda proto: proto.graph.node[0].input.pop()),
        "plugin-ignores",
        trap="SIM024",
        legal=Source(GEMM),
    ),
    IllegalModel(
        "an axis that is a float",
        Source(SOFTMAX, _set_attribute("axis", type=AttributeProto.FLOAT, f=0.0)),
        "attribute-types",
        trap="SIM027",
        legal=Source(SOFTMAX),
    ),
    IllegalModel(
        "an axis without a type",
        Source(SOFTMAX, _set_attribute("axis", i=0)),
        "attribute-types",
        trap="SIM027",
        legal=Source(SOFTMAX),
    ),
    IllegalModel(
        "an axis given twice",
        Source(SOFTMAX, _twice),
        "attributes-once",
        trap="SIM042",
        legal=Source(SOFTMAX),
    ),
    IllegalModel(
        "an attribute that no plugin of ATC's own reads",
        Source(
            """g (float16[2,4] x, float16[2,4] z, float16[4] w) => (float16[2,4] y)
            { y, r, s = NPUAddRmsNorm <axis = 1> (x, z, w) }"""
        ),
        "target-op-attributes",
        trap="SIM028",
        legal=Source(
            """g (float16[2,4] x, float16[2,4] z, float16[4] w) => (float16[2,4] y)
            { y, r, s = NPUAddRmsNorm (x, z, w) }"""
        ),
    ),
    IllegalModel(
        "an attribute that BatchMatMul does not read",
        Source(
            """g (float16[2,2,4] x, float16[2,4,2] w) => (float16[2,2,2] y)
            { y = BatchMatMul <adj_x2 = 0> (x, w) }"""
        ),
        "own-attributes",
        trap="SIM028",
    ),
)

E1 = """g (int64 a, int64 b, float16[4,8] x) => (float16[m,4] y, float16[m,4] z)
    <int64 o = {0}, int64 one = {1}, int64 n = {4}, int64[2] s = {4, 4}>
    {
        r0 = Range (o, a, one) r1 = Range (a, b, one) r2 = Range (b, n, one)
        p0 = Gather (x, r0) p1 = Gather (x, r1) p2 = Gather (x, r2)
        c = Concat <axis = 0> (p0, p1, p2)
        y, z = Split <axis = 1> (c, s)
    }"""
TOPK = """g (float16[2,8] x, int64[2,2] z) => (int64[2,2] y) <int64[1] k = {2}>
    { v, i = TopK (x, k) %s }"""

# (what, the graph, the mended graph)
_SIZES = (
    ("a Range of run-time length", E1, None),
    (
        "a Range whose limit is data",
        "g (int64 n) => (int64[m] y) <int64 o = {0}, int64 d = {1}> { y = Range (o, n, d) }",
        "g (int64 n) => (int64[4] y) <int64 o = {0}, int64 d = {1}, int64 e = {4}> "
        "{ r = Range (o, e, d) y = Add (r, n) }",
    ),
    ("NonZero", "g (float[4] x) => (int64[1,n] y) { y = NonZero (x) }", None),
    ("Unique", "g (float[4] x) => (float[n] y) { y = Unique (x) }", None),
    ("Compress", "g (float[4] x, bool[4] c) => (float[n] y) { y = Compress (x, c) }", None),
    (
        "a Reshape to a fed shape",
        "g (float[4] x, int64[2] s) => (float[a,b] y) { y = Reshape (x, s) }",
        """g (float[4] x, float[2,2] z) => (float[2,2] y)
        { s = Shape (z) y = Reshape (x, s) }""",
    ),
    (
        "an Expand to a fed shape",
        "g (float[1] x, int64[2] s) => (float[a,b] y) { y = Expand (x, s) }",
        "g (float[1] x) => (float[2,2] y) <int64[2] s = {2, 2}> { y = Expand (x, s) }",
    ),
    (
        "a Slice up to a fed end",
        """g (float[4] x, int64[1] e) => (float[n] y) <int64[1] b = {0}> { y = Slice (x, b, e) }""",
        "g (float[4] x) => (float[2] y) <int64[1] b = {0}, int64[1] e = {2}> { y = Slice (x, b, e) }",
    ),
    (
        "a ConstantOfShape of a fed shape",
        "g (int64[2] s) => (float[a,b] y) { y = ConstantOfShape (s) }",
        None,
    ),
    (
        "a Tile by fed repeats",
        "g (float[4] x, int64[1] r) => (float[n] y) { y = Tile (x, r) }",
        None,
    ),
    (
        "a TopK of a fed k",
        "g (float[4] x, int64[1] k) => (float[n] y) { y, i = TopK (x, k) }",
        None,
    ),
    (
        "a Pad by fed numbers",
        "g (float[4] x, int64[2] p) => (float[n] y) { y = Pad (x, p) }",
        None,
    ),
)

# (what, the graph, the mended graph)
_SHAPES = (
    (
        "a MatMul of other sizes",
        "g (float16[2,3] x, float16[4,5] w) => (float16[2,5] y) { y = MatMul (x, w) }",
        "g (float16[2,4] x, float16[4,5] w) => (float16[2,5] y) { y = MatMul (x, w) }",
    ),
    (
        "an Add that does not broadcast",
        "g (float[2,3] x, float[2] z) => (float[2,3] y) { y = Add (x, z) }",
        "g (float[2,3] x, float[3] z) => (float[2,3] y) { y = Add (x, z) }",
    ),
    (
        "a Where that does not broadcast",
        "g (bool[2] c, float[3] x) => (float[3] y) { y = Where (c, x, x) }",
        None,
    ),
    (
        "Split sizes that do not add up",
        "g (float[4] x) => (float[1] y, float[2] z) <int64[2] s = {1, 2}> { y, z = Split (x, s) }",
        "g (float[4] x) => (float[1] y, float[3] z) <int64[2] s = {1, 3}> { y, z = Split (x, s) }",
    ),
    (
        "a Concat of other sizes",
        "g (float[2,2] x, float[3,3] z) => (float[5,2] y) { y = Concat <axis = 0> (x, z) }",
        "g (float[2,2] x, float[3,2] z) => (float[5,2] y) { y = Concat <axis = 0> (x, z) }",
    ),
    (
        "a Reshape that loses elements",
        "g (float[2,3] x) => (float[4] y) <int64[1] s = {4}> { y = Reshape (x, s) }",
        "g (float[2,3] x) => (float[6] y) <int64[1] s = {-1}> { y = Reshape (x, s) }",
    ),
    (
        "a Gather beyond its axis",
        "g (float[2,3] x) => (float[1,3] y) <int64[1] i = {2}> { y = Gather (x, i) }",
        "g (float[2,3] x) => (float[1,3] y) <int64[1] i = {-2}> { y = Gather (x, i) }",
    ),
    (
        "a Gemm of other sizes",
        "g (float[2,3] x, float[4,5] w) => (float[2,5] y) { y = Gemm (x, w) }",
        "g (float[2,3] x, float[5,3] w) => (float[2,5] y) { y = Gemm <transB = 1> (x, w) }",
    ),
    (
        "a Conv of other channels",
        CONV.replace("float[4,1,3]", "float[4,2,3]"),
        CONV,
    ),
    (
        "a kernel that is larger than its input",
        CONV.replace("[1,4,8]", "[1,4,2]"),
        CONV,
    ),
    (
        "a Sum that would broadcast",
        "g (float[2,3] x, float[3] z) => (float[2,3] y) { y = Sum (x, z) }",
        "g (float[2,3] x, float[2,3] z) => (float[2,3] y) { y = Sum (x, z) }",
    ),
    (
        "an Einsum of other sizes",
        """g (float[2,3] x, float[4,5] w) => (float[2,5] y)
        { y = Einsum <equation = "ab,bc->ac"> (x, w) }""",
        None,
    ),
    (
        "a scale of another width",
        LAYER_NORM.replace("%s[8]", "float[4]"),
        LAYER_NORM.replace("%s", "float"),
    ),
)

PRODUCT = """g (float16[2,3,%d] x, float16[2,4,2] w) => (float16[2,3,2] y)
    { y = BatchMatMul (x, w) }"""
MASKED = """g (float16[1,2,32,32] x, bool[%s,32,32] m) => (float16[1,2,32,32] y)
    { y = NPUScaledMaskedSoftmax <scale = 1.0> (x, m) }"""
GEGLU = """g (float16[2,%d] x) => (float16[2,4] y) { y, g = NPUGeglu (x) }"""
ADDED = """g (float16[2,8] x, float16[%d,8] z, float16[8] w) => (float16[2,8] y)
    { y, r, s = NPUAddRmsNorm (x, z, w) }"""

# ATC's own operators: (what, the graph, the mended graph)
_OWN_SHAPES = (
    ("a BatchMatMul of other sizes", PRODUCT % 5, None),
    ("a mask that does not broadcast", MASKED % "1,3", MASKED % "1,1"),
    ("an NPUGeglu of an odd width", GEGLU % 9, None),
    ("an NPUAddRmsNorm of two shapes", ADDED % 1, ADDED % 2),
)

ILLEGAL_INFERENCE = (
    *(
        IllegalModel(
            name,
            Source(text),
            "static-sizes",
            trap="SIM054",
            legal=Source(mended) if mended else None,
        )
        for name, text, mended in _SIZES
    ),
    *(
        IllegalModel(
            name,
            Source(text),
            "shapes-fit",
            "EZ9999",
            legal=Source(mended) if mended else None,
        )
        for name, text, mended in (*_SHAPES, *_OWN_SHAPES)
    ),
    IllegalModel(
        "indices of TopK added to int64",
        Source(TOPK % "y = Add (i, z)"),
        "one-dtype",
        "E89999",
        legal=Source(TOPK % "w = Cast <to = 7> (i) y = Add (w, z)"),
    ),
    IllegalModel(
        "indices of ArgMin beside int64, behind a Reshape",
        Source(
            """g (float16[2,8] x, int64[2] z) => (int64[2] y) <int64[1] s = {2}>
            { i = ArgMin <axis = 1> (x) j = Reshape (i, s) y = Mul (j, z) }"""
        ),
        "one-dtype",
        "E89999",
        legal=Source(
            """g (float16[2,8] x, int64[2] z) => (int64[2] y) <int64[1] s = {2}>
            { i = ArgMax <axis = 1> (x) j = Reshape (i, s) y = Mul (j, z) }"""
        ),
    ),
    IllegalModel(
        "a LayerNormalization of two dtypes",
        Source(LAYER_NORM % "float16"),
        "one-dtype",
        "E89999",
        legal=Source(LAYER_NORM % "float"),
    ),
    IllegalModel(
        "a Clip of opset 10, which gives float32",
        Source(
            """<ir_version: 8, opset_import: ["" : 10]> g (float16[4] x) => (float16[4] y)
            { c = Clip <min = 0.0> (x) y = Add (c, x) }"""
        ),
        "one-dtype",
        "E89999",
        legal=Source(
            """<ir_version: 8, opset_import: ["" : 10]> g (float[4] x) => (float[4] y)
            { c = Clip <min = 0.0> (x) y = Add (c, x) }"""
        ),
    ),
)
