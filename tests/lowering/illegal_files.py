"""Illegal by their files, names, tensors and interface."""

from onnx import ModelProto, TensorProto, helper

from tests.lowering.illegal_parts import (
    A2,
    CHAIN,
    CONVENTION,
    IF,
    LEGAL,
    LEGAL_CONSTANT,
    RELU,
    SQUARE,
    IllegalModel,
    Source,
    add_function,
    add_import,
    beside,
    constant,
    drop_import,
    empty_file,
    external,
    external_in_branch,
    external_shape,
    huge_file,
    input_dtype,
    link_to_strange_folder,
    no_shape,
    npu,
    output_names,
    rename_all,
    rename_node,
    sequence_input,
    sparse,
    tensor,
    text,
)

EXTERNAL_SHAPE = Source("g (float[4] x) => (float[2,2] y) { y = Reshape (x) }", external_shape)


def _int4_product(proto: ModelProto) -> None:
    """Multiply x [2, 64] by an int4 weight [64, 64] in raw data: what is legal of int4 on A2."""
    weight = tensor(TensorProto.INT4, [64, 64], b"\x21" * (64 * 32))
    weight.name = "w"
    scale = helper.make_tensor("s", TensorProto.FLOAT16, [64], [1.0] * 64)
    proto.graph.initializer.extend([weight, scale])
    node = proto.graph.node[0]
    node.op_type = "NPUWeightQuantBatchMatmulV2"
    del node.input[:]
    node.input.extend(["x", "w", "s"])


ILLEGAL_FILES: tuple[IllegalModel, ...] = (
    # --- the file -------------------------------------------------------------------------------
    IllegalModel("an empty file", LEGAL, "file-size", "E13015", writes=empty_file, legal=LEGAL),
    IllegalModel("a file of 2 GiB", LEGAL, "file-size", "E13015", writes=huge_file, legal=LEGAL),
    IllegalModel(
        "a space in the path",
        Source(RELU, file="my models/model.onnx"),
        "path-characters",
        "E10001",
        legal=Source(RELU, file="我的-models_1/model.onnx"),
    ),
    IllegalModel(
        "a link to a path with a space",
        LEGAL,
        "path-characters",
        "E10001",
        writes=link_to_strange_folder,
    ),
    # --- the model ------------------------------------------------------------------------------
    IllegalModel(
        "opset 20",
        Source('<ir_version: 9, opset_import: ["" : 20]>' + RELU),
        "opset-version",
        "E13010",
        legal=Source('<ir_version: 10, opset_import: ["" : 18]>' + RELU),
    ),
    IllegalModel(
        "opset 7",
        Source('<ir_version: 8, opset_import: ["" : 7]>' + RELU),
        "opset-version",
        "E13010",
        legal=Source('<ir_version: 8, opset_import: ["" : 8]>' + RELU),
    ),
    IllegalModel(
        "no opset of the domain",
        Source(npu("NPURmsNorm"), drop_import("npu")),
        "imported-domain",
        "E19999",
    ),
    IllegalModel(
        "two opset imports",
        Source(RELU, add_import("com.microsoft", 1)),
        "one-opset-import",
        "E16005",
        legal=LEGAL,
    ),
    IllegalModel(
        "one domain imported twice",
        Source(RELU, add_import("ai.onnx", 17)),
        "opsets-once",
        code="E16005",
        legal=LEGAL,
    ),
    IllegalModel("a function", Source(RELU, add_function), "no-functions", "E13010", legal=LEGAL),
    IllegalModel(
        "no inputs",
        Source("g () => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Relu (w) }"),
        "inputs-and-outputs",
        "E16001",
        legal=LEGAL,
    ),
    IllegalModel(
        "no outputs",
        Source(RELU, lambda proto: proto.graph.ClearField("output")),
        "inputs-and-outputs",
        "E16001",
        legal=LEGAL,
    ),
    IllegalModel(
        "an input without a shape",
        Source(RELU, no_shape),
        "static-inputs",
        trap="SIM031",
        legal=LEGAL,
    ),
    IllegalModel(
        "an input with a dim of 0",
        Source("g (float[0,2] x) => (float[0,2] y) { y = Relu (x) }"),
        "static-inputs",
        trap="SIM032",
        legal=Source("g (float[1,2] x) => (float[1,2] y) { y = Relu (x) }"),
    ),
    IllegalModel(
        "an output that is an input",
        Source("g (float[2] x) => (float[2] x, float[2] y) { y = Relu (x) }"),
        "outputs-made",
        trap="SIM039",
        legal=Source(
            "g (float[2] x) => (float[2] z, float[2] y) { z = Identity (x) y = Relu (x) }"
        ),
    ),
    IllegalModel(
        "an output that is a constant",
        Source(
            "g (float[2] x) => (float[2] w, float[2] y) <float[2] w = {1.0, 2.0}> { y = Add (x, w) }"
        ),
        "outputs-made",
        trap="SIM039",
    ),
    IllegalModel(
        "an output listed twice",
        Source("g (float[2] x) => (float[2] y, float[2] y) { y = Relu (x) }"),
        "outputs-distinct",
        trap="SIM039",
        legal=Source(
            "g (float[2] x) => (float[2] y, float[2] z) { y = Relu (x) z = Identity (y) }"
        ),
    ),
    # --- names ----------------------------------------------------------------------------------
    IllegalModel(
        "two nodes of one name",
        Source(CHAIN, rename_all("same", "same")),
        "node-names-unique",
        "E13009",
        legal=Source(CHAIN, rename_all("one", "other")),
    ),
    IllegalModel(
        "a node named like an input",
        Source(CHAIN, rename_node(1, "x")),
        "node-names-unique",
        "E13009",
        legal=Source(CHAIN, rename_node(1, "h")),
    ),
    IllegalModel(
        "a node named like an automatic name",
        Source(CHAIN, rename_all("", "Relu_0")),
        "node-names-unique",
        "E13009",
        legal=Source(CHAIN, rename_all("", "Neg_0")),
    ),
    IllegalModel(
        "a node named like an initializer's node",
        Source(
            "g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add (x, w) }",
            rename_node(0, "w_Initializer_0"),
        ),
        "node-names-unique",
        "E13009",
        legal=Source(
            "g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add (x, w) }",
            rename_node(0, "w_Initializer"),
        ),
    ),
    IllegalModel(
        "two inputs of one name",
        Source(
            "g (float[2] x, float[2] z) => (float[2] y) { y = Relu (x) }",
            lambda proto: setattr(proto.graph.input[1], "name", "x"),
        ),
        "input-names",
        "E13009",
        legal=Source("g (float[2] x, float[2] z) => (float[2] y) { y = Relu (x) }"),
    ),
    IllegalModel(
        "a node's name with a space",
        Source(CHAIN, rename_node(0, "my relu")),
        "names-safe",
        sim=False,
        reason=CONVENTION,
        legal=Source(CHAIN, rename_node(0, "my/relu-1.x")),
    ),
    IllegalModel(
        "a tensor made twice",
        Source(CHAIN, output_names(0, "y")),
        "tensor-made-once",
        trap="SIM035",
        legal=Source(CHAIN),
    ),
    IllegalModel(
        "a tensor made nowhere",
        Source(CHAIN, lambda proto: proto.graph.node[1].input.__setitem__(0, "nothing")),
        "tensor-made",
        trap="SIM037",
        legal=Source(CHAIN),
    ),
    # --- tensors --------------------------------------------------------------------------------
    IllegalModel(
        "a uint4 constant",
        constant(tensor(TensorProto.UINT4, [2], b"\x21")),
        "parser-dtype",
        "E19999",
        legal=LEGAL_CONSTANT,
    ),
    IllegalModel(
        "a float4 constant",
        constant(tensor(TensorProto.FLOAT4E2M1, [2], b"\x21")),
        "parser-dtype",
        "E19999",
        legal=LEGAL_CONSTANT,
    ),
    IllegalModel(
        "an inline float8 constant",
        constant(tensor(TensorProto.FLOAT8E4M3FN, [2], b"\x30\x38")),
        "parser-dtype",
        "E19999",
        legal=LEGAL_CONSTANT,
    ),
    IllegalModel(
        "a float8 of a kind without a dtype",
        constant(tensor(TensorProto.FLOAT8E5M2FNUZ, [2], b"\x30\x38")),
        "parser-dtype",
        "E19999",
    ),
    IllegalModel(
        "a constant of no dtype",
        constant(tensor(0, [2], b"\0\0\0\0\0\0\0\0")),
        "parser-dtype",
        "E19999",
    ),
    IllegalModel(
        "a uint4 input", Source(RELU, input_dtype(TensorProto.UINT4)), "parser-dtype", "E19999"
    ),
    IllegalModel(
        "an input that is a sequence",
        Source(RELU, sequence_input),
        "parser-dtype",
        "E19999",
        legal=LEGAL,
    ),
    IllegalModel(
        "int4 in int32_data",
        constant(tensor(TensorProto.INT4, [4], int32_data=[0x21, 0x43])),
        "int4-raw",
        trap="SIM011",
        soc=A2,
        legal=text(
            "g (float16[2,64] x) => (float16[2,64] y) { y = Mul (x, x) }",
            _int4_product,
        ),
    ),
    IllegalModel(
        "a constant without data",
        constant(tensor(TensorProto.FLOAT, [2])),
        "constant-data",
        "E19999",
        legal=LEGAL_CONSTANT,
    ),
    IllegalModel(
        "a constant with too few numbers",
        constant(tensor(TensorProto.FLOAT, [2], float_data=[1.0])),
        "constant-data",
        trap="SIM012",
        legal=constant(tensor(TensorProto.FLOAT, [2], float_data=[1.0, 2.0])),
    ),
    IllegalModel(
        "a constant with too few bytes",
        constant(tensor(TensorProto.FLOAT, [2], b"\0\0\0\0")),
        "constant-data",
        trap="SIM013",
        legal=LEGAL_CONSTANT,
    ),
    IllegalModel(
        "a constant with a negative dim",
        constant(tensor(TensorProto.FLOAT, [-2], b"\0\0\0\0\0\0\0\0")),
        "constant-dims",
        "E19999",
        legal=LEGAL_CONSTANT,
    ),
    IllegalModel(
        "a constant of 2^31 elements",
        constant(tensor(TensorProto.INT8, [1 << 16, 1 << 15], b"\0")),
        "constant-dims",
        trap="SIM010",
        legal=LEGAL_CONSTANT,
    ),
    IllegalModel(
        "a sparse initializer",
        Source(SQUARE, sparse),
        "nothing-ignored",
        trap="SIM037",
        legal=LEGAL_CONSTANT,
    ),
    *(
        IllegalModel(
            f"a Constant with {name}",
            Source(
                f"g ({kind}[2] x) => ({kind}[2] y) {{ c = Constant <{spelled}> () y = Mul (x, c) }}"
            ),
            "constant-value",
            trap="SIM033",
            legal=Source(
                f"g ({kind}[2] x) => ({kind}[2] y) "
                f"{{ c = Constant <value = {kind} {{1}}> () y = Mul (x, c) }}"
            ),
        )
        for name, kind, spelled in (
            ("value_float", "float", "value_float = 1.0"),
            ("value_floats", "float", "value_floats = [1.0, 2.0]"),
            ("value_int", "int32", "value_int = 1"),
            ("value_ints", "int32", "value_ints = [1, 2]"),
        )
    ),
    # --- external data --------------------------------------------------------------------------
    IllegalModel(
        "external data with a checksum",
        constant(external(location="w.bin", offset="0", length="8", checksum="da39a3")),
        "external-keys",
        "E10001",
        writes=beside("w.bin", b"\0" * 8)(
            constant(external(location="w.bin", offset="0", length="8", checksum="da39a3"))
        ),
    ),
    IllegalModel(
        "external data with another number",
        constant(external(location="w.bin", offset="0", length="8", checksum="77")),
        "external-keys",
        trap="SIM014",
        writes=beside("w.bin", b"\0" * 8)(
            constant(external(location="w.bin", offset="0", length="8", checksum="77"))
        ),
    ),
    IllegalModel(
        "external data with a length in words",
        constant(external(location="w.bin", offset="0", length="all")),
        "external-keys",
        "E10001",
    ),
    IllegalModel(
        "external data without a location",
        constant(external(offset="0", length="8")),
        "external-location",
        "E19999",
    ),
    IllegalModel(
        "external data at an absolute path",
        constant(external(location="/nowhere/w.bin", offset="0", length="8")),
        "external-location",
        trap="SIM015",
    ),
    IllegalModel(
        "external data that is missing",
        constant(external(location="w.bin", offset="0", length="8")),
        "external-files",
        code="E13001",
    ),
    IllegalModel(
        "external data that is cut off",
        constant(external(location="w.bin", offset="0", length="8")),
        "external-files",
        code="E13001",
        writes=beside("w.bin", b"\0" * 4)(
            constant(external(location="w.bin", offset="0", length="8"))
        ),
    ),
    IllegalModel(
        "external data inside a branch",
        Source(IF, external_in_branch),
        "external-in-root",
        trap="SIM034",
        legal=Source(IF),
    ),
    IllegalModel(
        "a shape in external data",
        EXTERNAL_SHAPE,
        "shape-constants-inline",
        sim=False,
        reason="shape inference comes behind the parser",
        writes=beside("s.bin", b"\2\0\0\0\0\0\0\0" * 2)(EXTERNAL_SHAPE),
        legal=Source(
            "g (float[4] x) => (float[2,2] y) <int64[2] s = {2, 2}> { y = Reshape (x, s) }"
        ),
    ),
)
