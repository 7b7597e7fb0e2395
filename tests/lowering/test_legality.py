"""One deliberately illegal model per rule, and models that are legal."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from omforge import ir
from omforge.lowering.legality import ALL_RULES, FILE_RULES, RULES, check_legal
from omforge.lowering.legalize import legalize
from omforge.lowering.target import target
from tests.lowering.test_legalize import bucket

HEADER = '<ir_version: 8, opset_import: ["" : 16]>'


def parse(text: str, *, named: bool = True) -> ir.Model:
    """A model from text; nodes get names `n0`, `n1` … unless the text is about names."""
    proto = onnx.parser.parse_model(text if text.lstrip().startswith("<") else HEADER + text)
    for index, node in enumerate(proto.graph.node):
        if named and not node.name:
            node.name = f"n{index}"
    return ir.from_proto(proto)


def codes(model: ir.Model, soc: str = "Ascend310P3") -> set[str]:
    return {diagnostic.code for diagnostic in check_legal(model, target(soc))}


# (rule, model text, what the message says, SoC)
ILLEGAL: list[tuple[str, str, str, str]] = [
    (
        "one-opset-import",
        """<ir_version: 8, opset_import: ["" : 16, "com.microsoft" : 1]>
        g (float[2] x) => (float[2] y) { y = Relu (x) }""",
        "imports the domains com.microsoft",
        "Ascend310P3",
    ),
    (
        "opset-version",
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] y) { y = Relu (x) }""",
        "opsets 8 to 18 parse",
        "Ascend310P3",
    ),
    (
        "opset-version",
        """<ir_version: 8, opset_import: ["" : 24]>
        g (float[2] x) => (float[2] y) { y = Relu (x) }""",
        "almost none is registered beyond 18",
        "Ascend310P3",
    ),
    (
        "inputs-and-outputs",
        "g () => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Relu (w) }",
        "the graph has no inputs",
        "Ascend310P3",
    ),
    (
        "static-inputs",
        "g (float[batch, 2] x) => (float[batch, 2] y) { y = Relu (x) }",
        "the dims batch are not numbers",
        "Ascend310P3",
    ),
    (
        "static-inputs",
        "g (float[0, 2] x) => (float[0, 2] y) { y = Relu (x) }",
        "has a dim below 1",
        "Ascend310P3",
    ),
    (
        "int32-inputs",
        """g (int64[2] rows, float[3,4] x) => (float[2,4] y)
        { y = Gather (x, rows) }""",
        "the input is int64",
        "Ascend310P3",
    ),
    (
        "outputs-made",
        "g (float[2] x) => (float[2] x, float[2] y) { y = Relu (x) }",
        "an input or a constant",
        "Ascend310P3",
    ),
    (
        "outputs-distinct",
        "g (float[2] x) => (float[2] y, float[2] y) { y = Relu (x) }",
        "listed more than once",
        "Ascend310P3",
    ),
    (
        "soc-dtype",
        "g (bfloat16[2] x) => (bfloat16[2] y) { y = Relu (x) }",
        "bfloat16 on Ascend310P3",
        "Ascend310P3",
    ),
    (
        "soc-dtype",
        "g (float[2] x, double[2] z) => (float[2] y) { y = Relu (x) }",
        "float64 on Ascend910B4",
        "Ascend910B4",
    ),
    (
        "constant-value",
        "g (float[2] x) => (float[2] y) { c = Constant <value_float = 1.0> () y = Mul (x, c) }",
        "a Constant spelled with value_float",
        "Ascend310P3",
    ),
    (
        "default-domain",
        """<ir_version: 8, opset_import: ["" : 16, "npu" : 1]>
        g (float[2,8] x, float[8] w) => (float[2,8] y) { y, r = npu.NPURmsNorm (x, w) }""",
        "the node is in domain npu",
        "Ascend310P3",
    ),
    (
        "registered",
        "g (float[2] x, float[2] w) => (float[2] y) { y = LayerNormalization (x, w) }",
        "it is registered at opsets 17 to 18",
        "Ascend310P3",
    ),
    (
        "registered",
        """g (float[2,2] x, bool t) => (float[2,2] y)
        <int64 n = {3}>
        { y = Loop (n, t, x) <body = b (int64 i, bool c, float[2,2] s) => (bool d, float[2,2] r)
            { d = Identity (c) r = Relu (s) }> }""",
        "unroll the loop",
        "Ascend310P3",
    ),
    (
        "onnx-schema",
        "g (float[2] x) => (float16[2] y) { y = Cast <to = 10, saturate = 1> (x) }",
        "no attribute saturate at opset 16",
        "Ascend310P3",
    ),
    (
        "onnx-schema",
        """g (float[2,2] x) => (float[2,1] y) <int64[1] axes = {1}>
        { y = ReduceMean (x, axes) }""",
        "ReduceMean has 2 inputs",
        "Ascend310P3",
    ),
    (
        "plugin-needs",
        "g (float[2] x) => (float16[2] y) { y = Cast (x) }",
        "Cast without to",
        "Ascend310P3",
    ),
    (
        "ge-requirements",
        """g (float16[2,64] x, int8[64,64] w) => (float16[2,64] y)
        { y = NPUWeightQuantBatchMatmulV2 (x, w) }""",
        "its GE operator requires 3",
        "Ascend310P3",
    ),
    (
        "ge-requirements",
        "g (float16[2,4] x) => (int8[2,4] y) { y = AscendQuant <offset = 0.0> (x) }",
        "lacks the attribute scale",
        "Ascend310P3",
    ),
    (
        "ge-requirements",
        "g (float[2,8] x) => (float[2,8] y) { y, r = NPURmsNorm (x) }",
        "NPURmsNorm has 1 inputs",
        "Ascend310P3",
    ),
    (
        "ge-dtypes",
        "g (int64[2,2] a) => (int64[2,2] y) { y = MatMul (a, a) }",
        "MatMul with int64 at x1",
        "Ascend310P3",
    ),
    (
        "kernel-dtype",
        """g (int32[2,8] x, int32[8] w) => (int32[2,8] y)
        { y, r = NPURmsNorm (x, w) }""",
        "NPURmsNorm with int32 at x",
        "Ascend310P3",
    ),
    (
        "no-absent-inputs",
        """g (float16[1,2,8] q, float16[1,2,8] k, float16[1,2,8] v, bool[2,2] m)
            => (float16[1,2,8] y)
        { y = NPUMaskedSoftmaxWithRelPosBias (q, , v) }""",
        'with an absent input ""',
        "Ascend310P3",
    ),
    (
        "never-emitted",
        """g (float16[1,1,8] q, float16[1,4,8] k) => (float16[1,1,8] y)
        { y = NPUIncreFlashAttention <num_heads = 1, input_layout = "BSH"> (q, k, k, k, k, k) }""",
        "leaves key and value unconnected",
        "Ascend310P3",
    ),
    (
        "flash-310p",
        """g (float16[1,2,8] q, bool[2,2] m) => (float16[1,2,8] y)
        { y = NPUPromptFlashAttention <num_heads = 1, input_layout = "BSH", scale_value = 1.0,
                pre_tokens = 2147483647> (q, q, q, q, m) }""",
        "a mask or pse input on 310P",
        "Ascend310P3",
    ),
    (
        "flash-attributes",
        """g (float16[1,2,8] q) => (float16[1,2,8] y)
        { y = NPUPromptFlashAttention <num_heads = 1, input_layout = "BSH", scale_value = 1,
                pre_tokens = 2147483647> (q, q, q) }""",
        "scale_value is not given as FLOAT",
        "Ascend910B4",
    ),
    (
        "flash-inputs",
        """g (float16[1,2,8] q) => (float16[1,2,8] y)
        { y = NPUPromptFlashAttention <num_heads = 1, input_layout = "BSH", scale_value = 1.0,
                pre_tokens = 1099511627776> (q, q, q, q) }""",
        "only 3, 5, 7, 9 or 12 inputs parse",
        "Ascend910B4",
    ),
    (
        "rms-norm-epsilon",
        """g (float[2,8] x, float[8] w) => (float[2,8] y)
        { y, r = NPURmsNorm <epsilon = 1e-5> (x, w) }""",
        "always uses 1e-6",
        "Ascend310P3",
    ),
    (
        "rms-norm-shapes",
        "g (float[2,3,8] x, float[3,8] w) => (float[2,3,8] y) { y, r = NPURmsNorm (x, w) }",
        "gamma is [3, 8], x is [2, 3, 8]",
        "Ascend310P3",
    ),
    (
        "rms-norm-shapes",
        "g (float16[2,8] x, float[8] w) => (float16[2,8] y) { y, r = NPURmsNorm (x, w) }",
        "310P takes x and gamma of one dtype",
        "Ascend310P3",
    ),
    *(
        (
            "rotary-mul-shapes",
            f"""g (float16[{x}] x, float16[{r}] c, float16[{r}] s) => (float16[{x}] y)
            {{ y = NPURotaryMul (x, c, s) }}""",
            message,
            "Ascend310P3",
        )
        for x, r, message in (
            ("1,4,2,64", "1,4,1,64", "the head size is 64"),
            ("1,1025,2,128", "1,1025,1,128", "larger than documented"),
            ("2,4,2,128", "2,4,1,128", "varies along more than the tokens"),
            ("1,4,2,128", "1,3,1,128", "does not broadcast"),
            ("4,2,128", "4,1,128", "x is [4, 2, 128]"),
            ("1,33,4,128", "1,1,4,128", "has B*N > 8*S"),
        )
    ),
    (
        "target-op-attributes",
        """g (float[1,1,32,32] x, bool[1,1,32,32] m) => (float[1,1,32,32] y)
        { y = NPUScaledMaskedSoftmax <scale = 1> (x, m) }""",
        "with scale as INT",
        "Ascend310P3",
    ),
    (
        "split-sizes",
        "g (float[4] x) => (float[2] a, float[2] b) { a, b = Split (x) }",
        "Split without sizes",
        "Ascend310P3",
    ),
    (
        "plugin-refuses",
        "g (float[4] x) => (float[4] y) { y = Clip (x) }",
        "at least one of min and max is needed",
        "Ascend310P3",
    ),
    (
        "plugin-ignores",
        """g (float[4] x, int32[1] r, float[1] u) => (float[4] y)
        { i = Cast <to = 7> (r) k = Unsqueeze (i, one)
          y = ScatterND <reduction = "add"> (x, k, u) }""".replace(
            "{ i", "<int64[1] one = {1}> { i", 1
        ),
        "reduction add",
        "Ascend310P3",
    ),
    (
        "plugin-refuses",
        """g (float[2,3] x, int32[2,1] r) => (float[2] y)
        { i = Cast <to = 7> (r) y = GatherND <batch_dims = 1> (x, i) }""",
        "batch_dims 1",
        "Ascend310P3",
    ),
    (
        "mod-sign",
        "g (int32[2] x, int32[2] z) => (int32[2] y) { y = Mod (x, z) }",
        "the result has the divisor's sign",
        "Ascend310P3",
    ),
    (
        "plugin-ignores",
        "g (float[2,3] x) => (int64[1] y) { y = Shape <end = 1> (x) }",
        "Shape with end",
        "Ascend310P3",
    ),
    (
        "kernel-dtype",
        """g (float16[2,64] x, int32[64,8] w, float16[64] s) => (float16[2,64] y)
        { y = NPUWeightQuantBatchMatmulV2 (x, w, s) }""",
        "with int32 at weight",
        "Ascend310P3",
    ),
    (
        "weight-quant",
        """g (float16[1,2,64] x, int8[64,64] w, float16[2,64] s) => (float16[1,2,64] y)
        { y = NPUWeightQuantBatchMatmulV2 <antiquant_group_size = 48> (x, w, s) }""",
        "a group size of 48",
        "Ascend910B4",
    ),
    (
        "weight-quant",
        """g (float16[2,64] x, int8[32,64] w, float16[64] s) => (float16[2,64] y)
        { y = NPUWeightQuantBatchMatmulV2 (x, w, s) }""",
        "x is [2, 64], the weight [32, 64]",
        "Ascend910B4",
    ),
    (
        "weight-quant",
        """g (float16[2,64] x, int32[64,8] w, float16[2,32] s) => (float16[2,64] y)
        { y = NPUWeightQuantBatchMatmulV2 <antiquant_group_size = 32> (x, w, s) }""",
        "antiquant_scale is [2, 32]: it is [2, 64]",
        "Ascend910B4",
    ),
    (
        "weight-quant",
        """g (float16[2,64] x, int32[8,64] w, float16[1,64] s) => (float16[2,64] y)
        { y = NPUWeightQuantBatchMatmulV2 <antiquant_group_size = 64> (x, w, s) }""",
        "a group size of 64: it is less than k, which is 64",
        "Ascend910B4",
    ),
    (
        "weight-quant",
        """g (float16[2,64] x, int8[64,64] w, bfloat16[64] s) => (float16[2,64] y)
        { y = NPUWeightQuantBatchMatmulV2 (x, w, s) }""",
        "antiquant_scale is BFLOAT16, x is FLOAT16",
        "Ascend910B4",
    ),
    (
        "weight-quant",
        """g (float16[2,64] x, int8[64,64] w, float16[64] s, float16[1] z) => (float16[2,64] y)
        { y = NPUWeightQuantBatchMatmulV2 (x, w, s, z) }""",
        "antiquant_offset differs from antiquant_scale",
        "Ascend910B4",
    ),
]


@pytest.mark.parametrize(
    ("rule", "text", "message", "soc"),
    ILLEGAL,
    ids=[f"{i}-{row[0]}" for i, row in enumerate(ILLEGAL)],
)
def test_an_illegal_model_breaks_its_rule(rule: str, text: str, message: str, soc: str) -> None:
    found = [d for d in check_legal(parse(text), target(soc)) if d.code == rule]
    assert found
    assert any(message in str(diagnostic) for diagnostic in found), [str(d) for d in found]
    for diagnostic in found:
        assert diagnostic.remedy
        assert "atc: " in diagnostic.why


def test_functions() -> None:
    model = parse("""
        <ir_version: 8, opset_import: ["" : 16, "own" : 1]>
        g (float[2] x) => (float[2] y) { y = own.twice (x) }
        <domain: "own", opset_import: ["" : 16]>
        twice (a) => (b) { b = Add (a, a) }
    """)
    assert {"no-functions", "registered", "one-opset-import"} == codes(model)


def test_an_input_without_a_shape() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    model.graph.inputs[0].shape = None
    assert codes(model) == {"static-inputs"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["n0", "n1"], set[str]()),
        (["same", "same"], {"node-names-unique"}),
        (["x", "n1"], {"node-names-unique", "nodes-named"}),  # a graph input's name: E13009
        (["h", "n1"], {"nodes-named"}),  # a tensor's name
        (["", "n1"], {"nodes-named"}),
        (["", "Relu_0"], {"nodes-named", "node-names-unique"}),  # what the parser would call n0
        (["n0", "w_Initializer_3"], set[str]()),  # there is no initializer w
        (["a b", "n1"], {"names-safe"}),
    ],
)
def test_node_names(names: list[str], expected: set[str]) -> None:
    model = parse("g (float[2] x) => (float[2] y) { h = Relu (x) y = Neg (h) }", named=False)
    for node, name in zip(model.graph, names, strict=True):
        node.name = name
    assert codes(model) == expected


def test_tensor_names() -> None:
    model = parse("g (float[2] x) => (float[2] y) { h = Relu (x) y = Neg (h) }")
    model.graph[0].outputs[0].name = "h 1"
    assert codes(model) == {"names-safe"}
    model.graph[0].outputs[0].name = "h:1"
    assert codes(model) == set()
    model.graph.outputs[0].name = "y:1"  # an interface name: the .om's names are split at it
    assert codes(model) == {"names-safe"}


def test_names_inside_an_expanded_node() -> None:
    text = "g (float[2,3] x) => (float[3,2] y) { h = Transpose <perm = [1, 0]> (x) y = Neg (h) }"
    model = parse(text)
    for name in ("move_1", "PartitionedCall_move", "Output"):
        model.graph[0].name, model.graph[1].name = "move", name
        assert codes(model) == set()
    for name in ("PartitionedCall_move_Transpose_1", "Node_Output"):
        model.graph[1].name = name
        assert codes(model) == {"inner-names"}


def test_an_output_named_nothing() -> None:
    model = parse("""
        g (float[4] x) => (float[1] y) <int64[1] k = {1}> { y, rows = TopK (x, k) }
    """)
    assert codes(model) == set()
    model.graph[0].outputs[1].name = ""
    assert codes(model) == {"outputs-named"}


def with_constant(tensor: ir.TensorProtocol) -> ir.Model:
    model = parse("g (float[4] x) => (float[4] y) { y = Mul (x, w) }".replace("w", "x"))
    value = ir.Value(
        name="w",
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return model


def test_constants_of_dtypes_that_the_parser_lacks() -> None:
    uint4 = ir.tensor(np.zeros(4, np.uint8), dtype=ir.DataType.UINT8)
    assert codes(with_constant(uint4)) == set()
    proto = onnx.helper.make_tensor("w", onnx.TensorProto.UINT4, [4], [1, 2, 3, 4])
    assert codes(with_constant(ir.from_proto(proto))) == {"parser-dtype"}
    proto = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT8E4M3FN, [2], [1.0, 2.0])
    assert "parser-dtype" in codes(with_constant(ir.from_proto(proto)))


def test_int4_as_int32_data_and_as_raw_data() -> None:
    proto = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [4], [1, -2, 3, -4])
    model = with_constant(ir.from_proto(proto))
    assert codes(model, "Ascend910B4") == {"int4-raw"}
    assert codes(model, "Ascend310P3") == {"int4-raw", "soc-dtype"}

    kept = model.graph.initializers["w"]
    model.graph[0].replace_input_with(1, kept)
    legalize(model, target("Ascend910B4"))
    assert "int4-raw" not in codes(model, "Ascend910B4")
    stored = ir.to_proto(model).graph.initializer[0]
    assert stored.raw_data == bytes([0xE1, 0xC3])  # two a byte, low nibble first


def external(tmp_path: Path, dtype: ir.DataType, shape: list[int]) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        "w.bin", 0, None, dtype, shape=ir.Shape(shape), name="w", base_dir=tmp_path
    )


def test_a_constant_of_too_many_elements(tmp_path: Path) -> None:
    huge = external(tmp_path, ir.DataType.INT8, [1 << 16, 1 << 15])
    assert codes(with_constant(huge)) == {"constant-dims"}


def test_an_external_shape(tmp_path: Path) -> None:
    model = parse("g (float[4] x) => (float[2,2] y) { y = Reshape (x, x) }")
    shape = ir.Value(
        name="shape",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([2]),
        const_value=external(tmp_path, ir.DataType.INT64, [2]),
    )
    model.graph.register_initializer(shape)
    model.graph[0].replace_input_with(1, shape)
    assert codes(model) == {"shape-constants-inline"}


def test_an_external_tensor_inside_a_branch(tmp_path: Path) -> None:
    model = parse("""
        g (bool c, float[4] x) => (float[4] y)
        {
            y = If (c) <
                then_branch = t () => (float[4] a) { a = Relu (x) },
                else_branch = e () => (float[4] b) { b = Neg (x) }
            >
        }
    """)
    for index, node in enumerate(model.graph.all_nodes()):
        node.name = f"n{index}"
    assert codes(model) == set()
    (branch, _) = list(model.graph.subgraphs())
    branch.register_initializer(
        ir.Value(name="w", const_value=external(tmp_path, ir.DataType.FLOAT, [4]))
    )
    assert codes(model) == {"external-in-root"}


def test_every_rule_has_a_name_of_its_own_and_a_source() -> None:
    rules = (*FILE_RULES, *RULES)
    assert len({rule.id for rule in rules}) == len(rules) == len(ALL_RULES)
    assert all(rule.source and rule.atc and rule.check.__doc__ for rule in rules)


@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B4"])
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("new", [1, 5])
def test_a_lowered_bucket_is_legal(new: int, dtype: str, soc: str) -> None:
    model = bucket(2, new, dtype)
    assert check_legal(model, target(soc))
    legalize(model, target(soc))
    assert [str(diagnostic) for diagnostic in check_legal(model, target(soc))] == []


def test_all_offences_are_listed_at_once_with_place_and_remedy() -> None:
    """A canonical graph that was not lowered: every node without a plugin is named."""
    model = bucket(1, 1, "float")
    found = check_legal(model, target("Ascend310P3"))
    unregistered = [d for d in found if d.code == "registered"]
    assert len(unregistered) == 12  # two norms, two rotations, attention and Swish in two layers
    assert {d.remedy for d in unregistered} == {"make the graph by `omforge compile`"}
    assert all("E13010" in d.why and "hicann/ge" in d.why for d in unregistered)
    assert {"opset-version", "int32-inputs"} <= {d.code for d in found}


def test_why_a_legalisation_refused_is_quoted() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 24]>
        g (float[1,2,8] q, float[1,4,8] k, float[2,3] m) => (float[1,2,8] y)
        { y = Attention <q_num_heads = 1, kv_num_heads = 1> (q, k, k, m) }
    """)
    legalize(model, target("Ascend310P3"))
    (found,) = [d for d in check_legal(model, target("Ascend310P3")) if d.code == "registered"]
    assert "the mask [2, 3] does not fit" in found.why
    assert "Attention n0" in found.where


def test_checking_changes_nothing() -> None:
    model = bucket(1, 1, "float16")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    check_legal(model, target("Ascend310P3"))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
