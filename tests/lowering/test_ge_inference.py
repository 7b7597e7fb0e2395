"""What GE's inference finds, asked of every operator of the tables."""

import warnings
from typing import Any, cast

import onnx
import pytest
from onnx import TensorProto, helper
from onnx.backend.test.case.node import collect_testcases

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.lowering.ge_inference import GeInference, Misfit, sizes_by_value
from omforge.lowering.target import all_registrations
from tests.lowering.test_legality import parse

HALF, FLOAT, INT32, INT64 = (
    TensorProto.FLOAT16,
    TensorProto.FLOAT,
    TensorProto.INT32,
    TensorProto.INT64,
)


def misfits(model: ir.Model, opset: int = 16) -> list[Misfit]:
    infer_model(model)
    return list(GeInference(model, opset).misfits())


def built(
    op: str, opset: int, types: list[tuple[int, list[int]]], outputs: int = 1, **attributes: Any
) -> ir.Model:
    names = [f"x{at}" for at in range(len(types))]
    made = [f"y{at}" for at in range(outputs)]
    node = helper.make_node(op, names, made, "n", **attributes)
    inputs = [
        helper.make_tensor_value_info(name, *type_)
        for name, type_ in zip(names, types, strict=True)
    ]
    results = [helper.make_tensor_value_info(name, FLOAT, None) for name in made]
    graph = helper.make_graph([node], "g", inputs, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return ir.from_proto(model)


def registered_ops() -> list[tuple[str, int, Any]]:
    """Each standard operator that ATC registers, at the newest opset."""
    found: dict[str, tuple[str, int, Any]] = {}
    for row in all_registrations():
        opset = max(row.opsets, default=0)
        if row.domain == "ai.onnx" and not row.experimental and opset:
            try:
                found[row.op] = (row.op, opset, onnx.defs.get_schema(row.op, opset, ""))
            except onnx.defs.SchemaError:
                continue
    return list(found.values())


def test_inputs_of_one_type_have_one_dtype_whatever_the_operator() -> None:
    """Every operator of the table whose schema binds two inputs to one type variable."""
    mixed = {"tensor(float16)": HALF, "tensor(float)": FLOAT, "tensor(int32)": INT32}
    mixed |= {"tensor(int64)": INT64}
    judged: list[str] = []
    for op, opset, schema in registered_ops():
        variables = {
            item.type_param_str: item.allowed_type_strs for item in schema.type_constraints
        }
        formals = [item for item in schema.inputs if item.type_str in variables]
        if schema.inputs and "Variadic" in str(schema.inputs[0].option):
            formals *= 2
        if len(formals) != max(len(schema.inputs), 2):
            continue
        bound: dict[str, list[int]] = {}
        for at, formal in enumerate(formals):
            bound.setdefault(formal.type_str, []).append(at)
        several = [variable for variable, places in bound.items() if len(places) > 1]
        if not several or "(seq" in str(variables[several[0]]):
            continue
        allowed = [mixed[each] for each in mixed if each in variables[several[0]]]
        if len(allowed) < 2:
            continue
        types: list[tuple[int, list[int]]] = []
        for formal in formals:
            places = [mixed[each] for each in mixed if each in variables[formal.type_str]]
            types.append((places[0] if places else TensorProto.BOOL, [2]))
        same = [m for m in misfits(built(op, opset, types), opset) if m.kind == "dtypes"]
        assert same == [], op
        types[bound[several[0]][-1]] = (allowed[1], [2])
        found = [m for m in misfits(built(op, opset, types), opset) if m.kind == "dtypes"]
        assert found, op
        judged.append(op)
    assert len(judged) > 35
    assert {"Add", "Where", "Concat", "MatMul", "Gemm", "LayerNormalization", "Clip"} <= set(judged)


def test_every_operator_whose_size_data_decide_is_named() -> None:
    """The inputs are fed; of the same operator with constants nothing is said."""
    schemas = {op: (opset, schema) for op, opset, schema in registered_ops()}
    for op, row in sizes_by_value().items():
        opset, schema = schemas.get(op, (16, None))
        count = max(row.inputs or (0,)) + 1 if schema is None else len(schema.inputs)
        kinds = [(INT64, [2])] * max(count, 1)
        found = [m for m in misfits(built(op, opset, kinds), opset) if m.kind == "sizes"]
        # NMSRotated is ATC's own, and in no domain of ONNX.
        assert [m.node.op_type for m in found] == [op], op
        assert found[0].source == row.source


@pytest.mark.parametrize(
    "op",
    ["Add", "Sub", "Mul", "Div", "Pow", "Equal", "Less", "Greater", "Max", "Min", "Mod", "PRelu"],
)
def test_what_does_not_broadcast(op: str) -> None:
    for small, fits in (([3], True), ([2, 1], True), ([2], False), ([4, 3], False)):
        attributes = {"fmod": 1} if op == "Mod" else {}
        found = misfits(built(op, 16, [(FLOAT, [2, 3]), (FLOAT, small)], **attributes))
        assert bool(found) is not fits, (op, small)
        assert all(m.kind == "shapes" for m in found)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "g (float[1,4,8] x, float[6,2,3] w) => (float[1,6,6] y) "
            "{ y = Conv <group = 2, kernel_shape = [3]> (x, w) }",
            "",
        ),
        (
            "g (float[1,4,8] x, float[5,2,3] w) => (float[1,5,6] y) "
            "{ y = Conv <group = 2, kernel_shape = [3]> (x, w) }",
            "5 results do not come in 2 groups",
        ),
        (
            "g (float[1,4,8] x, float[6,2,3] w) => (float[1,6,6] y) "
            "{ y = Conv <group = 2, kernel_shape = [5]> (x, w) }",
            "is not the weight's",
        ),
        (
            "g (float[1,4,8] x, float[3,2,3] w) => (float[1,2,10] y) "
            "{ y = ConvTranspose <kernel_shape = [3]> (x, w) }",
            "4 channels are not the weight's 3",
        ),
        (
            "g (float[1,2,8] x) => (float[1,2,1] y) { y = MaxPool <kernel_shape = [9]> (x) }",
            "a kernel of 9 does not fit into 8",
        ),
        (
            "g (float[1,2,8] x) => (float[1,2,2] y) "
            "{ y = MaxPool <kernel_shape = [9], pads = [1, 1]> (x) }",
            "",
        ),
        (
            "g (float[1,2,8] x, float[3] s) => (float[1,2,8] y) "
            "{ y = InstanceNormalization (x, s, s) }",
            "not one number for each of 2 channels",
        ),
        ("g (float[2,3] x, int64[1,2] i) => (float[1] y) { y = GatherND (x, i) }", ""),
        ("g (float[2,3] x, int64[1,3] i) => (float[1] y) { y = GatherND (x, i) }", "GatherND"),
        (
            "g (float[2,3] x, int64[3,3] i) => (float[3,3] y) "
            "{ y = GatherElements <axis = 1> (x, i) }",
            "go beyond [2, 3]",
        ),
        ("g (float[2,3] x, int64[3,3] i) => (float[3,3] y) { y = GatherElements (x, i) }", ""),
        (
            "g (float[2,3] x, int64[1,2] i, float[1,1] u) => (float[2,3] y) "
            "{ y = ScatterND (x, i, u) }",
            "updates [1, 1] are not [1]",
        ),
        (
            "g (float[2,3] x) => (float[2,3] y) <int64 a = {2}> { y = CumSum (x, a) }",
            "axis 2 of 2 axes",
        ),
        (
            "g (float[2,3] x) => (float[4,3] y) <int64[1] r = {2}> { y = Tile (x, r) }",
            "1 repeats for 2 axes",
        ),
        ("g (float[2,3] x) => (float[2,3] y) { y = Transpose <perm = [0, 2]> (x) }", "Transpose"),
        ("g (float[2,3] x) => (float[2,3] y) { y = Softmax <axis = 2> (x) }", "axis 2 of 2 axes"),
        ("g (float[2,3] x) => (float[2] y) <int64[1] a = {1}> { y = Squeeze (x, a) }", "Squeeze"),
        (
            "g (float[2,3] x) => (float[2,4] y, int64[2,4] i) <int64[1] k = {4}> "
            "{ y, i = TopK (x, k) }",
            "TopK",
        ),
        ("g (float[2,3] x) => (float[2,3] y) <int64[2] p = {1, 1}> { y = Pad (x, p) }", "Pad"),
        (
            "g (float[2,3] x) => (float[2,4] y) <int64[2] s = {2, 4}> { y = Expand (x, s) }",
            "does not broadcast",
        ),
        (
            "g (float[1,3] x) => (float[4,3] y) <int64[1] s = {3}> { y = Expand (x, s) }",
            "has fewer numbers than the input's 2 axes",
        ),
        (
            "g (float[3] x) => (float[0] y) <int64[2] p = {-2, -2}> { y = Pad (x, p) }",
            "4 are taken away from 3",
        ),
        (
            "g (float[2,4] x) => (int64[0] y) <int64 a = {4}, int64 b = {0}, int64 d = {1}> "
            "{ y = Range (a, b, d) }",
            "the other way",
        ),
        (
            "g (float[1,2,3,4] x) => (float[1,8,1,2] y) { y = SpaceToDepth <blocksize = 2> (x) }",
            "in blocks of 2",
        ),
    ],
)
def test_shapes_that_onnx_lets_pass_or_not(text: str, what: str) -> None:
    found = [m for m in misfits(parse(text)) if m.kind == "shapes"]
    assert bool(found) is bool(what), found
    if found:
        assert what in f"{found[0].what}: {found[0].why}"


def test_a_computed_size_is_known_where_its_parts_are() -> None:
    """As exporters write Expand and Reshape: of the shapes of what is there."""
    model = parse("""
        g (float[2,3] x, float[6] z) => (float[3,2] y, float[2,3] w)
        <int64[1] at = {0}, int64[1] rest = {-1}, int64[2] ones = {1, 1}, int64[1] minus = {-1}>
        {
            s = Shape (x) n = Gather (s, at) t = Concat <axis = 0> (rest, n) y = Reshape (z, t)
            filled = Equal (s, minus) target = Where (filled, ones, s) w = Expand (x, target)
        }
    """)
    assert misfits(model) == []


def test_what_is_behind_a_dynamic_size_has_no_known_shape() -> None:
    model = parse("""
        g (float[4] x) => (float[n] y) <float[1] one = {1.0}>
        { z = NonZero (x) s = Shape (z) y = Expand (one, s) }
    """)
    assert [m.node.op_type for m in misfits(model)] == ["NonZero", "Expand"]


def test_nodes_in_any_order_and_in_branches() -> None:
    model = parse("""
        g (float[2,8] x, bool c) => (int64[2,2] y) <int64[1] k = {2}, int64 one = {1}> {
            y = If (c) <
                then_branch = t () => (int64[2,2] p) { p = Add (i, one) },
                else_branch = e () => (int64[2,2] q) { q = Identity (i) }>
            v, i = TopK (x, k)
        }
    """)
    model.graph.sort()
    assert [(m.node.op_type, m.kind) for m in misfits(model)] == [("Add", "dtypes")]


def test_pow_is_of_the_wider_dtype() -> None:
    text = """
        g (float16[2] x) => (float16[2] y) <%s e = {2}> { h = Pow (x, e) y = Add (h, x) }
    """
    assert misfits(parse(text % "float16")) == []
    assert misfits(parse(text % "int64")) == []
    assert [(m.node.op_type, m.kind) for m in misfits(parse(text % "float"))] == [
        ("Add", "dtypes"),
        ("Add", "output"),
    ]


def node_cases() -> list[onnx.ModelProto]:
    """ONNX's own example of every operator that ATC registers: valid models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = cast("list[Any]", collect_testcases(None))
    known = {row.op for row in all_registrations() if row.domain == "ai.onnx"}
    models = [case.model for case in cases]
    return [m for m in models if {node.op_type for node in m.graph.node} <= known]


def test_no_valid_example_of_an_operator_is_refused() -> None:
    examples = node_cases()
    assert len(examples) > 900
    for proto in examples:
        model = ir.from_proto(proto)
        found = [
            m for m in misfits(model, model.opset_imports[""]) if m.kind in ("shapes", "dtypes")
        ]
        # What ATC is stricter at than ONNX: Sum broadcasts nothing, OneHot adds depth to indices.
        assert {m.node.op_type for m in found} <= {"Sum", "OneHot"}, found


def test_the_dtype_of_an_output_is_told() -> None:
    model = parse("""
        g (float[2,8] x) => (float[2,2] v, int64[2,2] i) <int64[1] k = {2}> { v, i = TopK (x, k) }
    """)
    (found,) = misfits(model)
    assert (found.kind, found.what) == ("output", "output i comes out as int32")
