"""What a file must hold is checked once, on reading: one error with file, place and fault."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, TensorProto
from onnx.numpy_helper import from_array

from omforge import ir
from omforge.ir.read_check import check_message

TEXT = """<ir_version: 10, opset_import: ["" : 18]>
g (bool p, float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
    [cast] c = Cast <to = 1> (x)
    [constant] k = Constant <value = float[4] {1, 2, 3, 4}> ()
    [add] a = Add (c, k)
    [if] y = If (p) <
        then_branch = t () => (float[N, 4] u) { [neg] u = Neg (a) },
        else_branch = e () => (float[N, 4] v) { [mul] v = Mul (a, w) }
    >
}"""


def read(folder: Path, edit: Callable[[ModelProto], object]) -> None:
    message = onnx.parser.parse_model(TEXT)
    edit(message)
    (folder / "m.onnx").write_bytes(message.SerializeToString())
    ir.load(folder / "m.onnx")


def tensor(message: ModelProto) -> TensorProto:
    """The weight, of four floats."""
    return message.graph.initializer[0]


def tensor_of(array: np.ndarray, **fields: object) -> Callable[[ModelProto], None]:
    """Put an array in the weight's place, and change it."""

    def edit(message: ModelProto) -> None:
        tensor(message).CopyFrom(from_array(array, "w"))
        for name, value in fields.items():
            setattr(tensor(message), name, value)

    return edit


def typed(dtype: int, field: str, numbers: list[int], dims: list[int]) -> Callable[..., None]:
    def edit(message: ModelProto) -> None:
        new = TensorProto(name="w", data_type=dtype, dims=dims)
        getattr(new, field).extend(numbers)
        tensor(message).CopyFrom(new)

    return edit


def interior(message: ModelProto) -> onnx.NodeProto:
    return message.graph.node[3].attribute[1].g.node[0]


def attribute(name: str, **fields: object) -> AttributeProto:
    return AttributeProto(name=name, **fields)


ALLOWED: dict[str, Callable[[ModelProto], object]] = {
    "as it is": lambda m: None,
    "no elements": tensor_of(np.empty((0,), np.float32)),
    "large": tensor_of(np.zeros((1 << 17,), np.float32)),
    "large with a doc": tensor_of(np.zeros((1 << 17,), np.float32), doc_string="words"),
    "bool": typed(TensorProto.BOOL, "int32_data", [0, 1], [2]),
    "packed": typed(TensorProto.INT4, "int32_data", [33, 7], [3]),
    "float16": typed(TensorProto.FLOAT16, "int32_data", [15360, 65535], [2]),
    "complex": typed(TensorProto.COMPLEX64, "float_data", [1, 2, 3, 4], [2]),
    "uint32": typed(TensorProto.UINT32, "uint64_data", [1, 2], [2]),
    "an output without a type": lambda m: m.graph.output[0].ClearField("type"),
    "an initializer as default": lambda m: m.graph.input.add(name="w").type.CopyFrom(
        onnx.helper.make_tensor_type_proto(1, [4])
    ),
    "an unknown operator": lambda m: m.graph.node.add(op_type="New", output=["z"]),
}


@pytest.mark.parametrize("edit", ALLOWED.values(), ids=ALLOWED)
def test_what_is_well_formed_is_read(tmp_path: Path, edit: Callable[[ModelProto], object]) -> None:
    read(tmp_path, edit)


REFUSED: dict[str, Callable[[ModelProto], object]] = {
    "x has a dim of -3; dims are 0 or more": lambda m: setattr(
        m.graph.input[1].type.tensor_type.shape.dim[1], "dim_value", -3
    ),
    "x is of dtype 99, which onnx": lambda m: setattr(
        m.graph.input[1].type.tensor_type, "elem_type", 99
    ),
    "graph input x has no type": lambda m: m.graph.input[1].ClearField("type"),
    "graph input x has no dtype": lambda m: m.graph.input[1].type.tensor_type.ClearField(
        "elem_type"
    ),
    "graph input x is of type sequence": lambda m: m.graph.input[1].type.CopyFrom(
        onnx.helper.make_sequence_type_proto(onnx.helper.make_tensor_type_proto(1, [4]))
    ),
    "graph output y is of type optional": lambda m: m.graph.output[0].type.CopyFrom(
        onnx.helper.make_optional_type_proto(onnx.helper.make_tensor_type_proto(1, [4]))
    ),
    "graph output y is of type map": lambda m: setattr(
        m.graph.output[0].type.map_type, "key_type", 7
    ),
    "tensor w is of dtype 99": lambda m: setattr(tensor(m), "data_type", 99),
    "tensor w is of dtype 0": lambda m: setattr(tensor(m), "data_type", 0),
    "tensor w has the shape [-4]": lambda m: tensor(m).dims.__setitem__(0, -4),
    "tensor w holds 4 numbers, and FLOAT[5] needs 5": lambda m: tensor(m).dims.__setitem__(0, 5),
    "tensor w holds 16 bytes, and DOUBLE[4] needs 32": tensor_of(
        np.zeros(4, np.float32), data_type=TensorProto.DOUBLE
    ),
    "tensor w holds 524284 bytes, and FLOAT[131072] needs 524288": tensor_of(
        np.zeros(1 << 17, np.float32), raw_data=bytes((1 << 19) - 4)
    ),
    "tensor w holds 524292 bytes": tensor_of(
        np.zeros(1 << 17, np.float32), raw_data=bytes((1 << 19) + 4)
    ),
    "tensor w holds float_data, and INT64[4] is stored in int64_data": lambda m: setattr(
        tensor(m), "data_type", TensorProto.INT64
    ),
    "tensor w holds strings as raw data": tensor_of(
        np.zeros(4, np.float32), data_type=TensorProto.STRING
    ),
    "tensor w has shape [2] and no data": typed(TensorProto.BOOL, "int32_data", [], [2]),
    "tensor w holds 1000, and INT8 is -128 to 127": typed(
        TensorProto.INT8, "int32_data", [7, 1000], [2]
    ),
    "tensor w holds 3 numbers, and INT4[3] needs 2": typed(
        TensorProto.INT4, "int32_data", [1, 2, 3], [3]
    ),
    "tensor w is external data with offset 'x', which is no number": tensor_of(
        np.zeros(4, np.float32),
    ),
    "two initializers are called 'w'": lambda m: m.graph.initializer.append(tensor(m)),
    "two inputs are called 'x'": lambda m: m.graph.input.append(m.graph.input[1]),
    "Add add makes c, which Cast cast makes too": lambda m: m.graph.node[2].output.append("c"),
    "Add add makes w, which an initializer makes too": lambda m: m.graph.node[2].output.append("w"),
    "Neg extra has no output": lambda m: m.graph.node.add(op_type="Neg", name="extra", input=["x"]),
    "has no operator": lambda m: m.graph.node[2].ClearField("op_type"),
    "Constant constant has no value; a Constant has one": lambda m: m.graph.node[1].ClearField(
        "attribute"
    ),
    "Constant constant has 2 values": lambda m: m.graph.node[1].attribute.append(
        attribute("value_float", type=AttributeProto.FLOAT, f=1.0)
    ),
    "attribute value of Constant constant holds no tensor": lambda m: (
        m.graph.node[1].attribute[0].ClearField("t")
    ),
    "attribute value of Constant constant has shape [4] and no data": lambda m: (
        m.graph.node[1].attribute[0].t.ClearField("float_data")
    ),
    "attribute to of Cast cast has no type": lambda m: (
        m.graph.node[0].attribute[0].ClearField("type")
    ),
    "Cast cast has its attribute to twice": lambda m: m.graph.node[0].attribute.append(
        m.graph.node[0].attribute[0]
    ),
    "attribute then_branch of If if holds no graph": lambda m: (
        m.graph.node[3].attribute[0].ClearField("g")
    ),
    "refers to outer, and is not in a function": lambda m: interior(m).attribute.append(
        attribute("alpha", type=AttributeProto.FLOAT, ref_attr_name="outer")
    ),
    "attribute words of Mul mul is no UTF-8 text": lambda m: interior(m).attribute.append(
        attribute("words", type=AttributeProto.STRING, s=b"\xff")
    ),
    "tensor s is sparse": lambda m: setattr(m.graph.sparse_initializer.add().values, "name", "s"),
    # What the verifier knows:
    "a node uses an undefined value": lambda m: interior(m).input.__setitem__(0, "gone"),
    "Mul has 1 inputs": lambda m: interior(m).input.pop(),
    "a graph output is not produced": lambda m: setattr(m.graph.output[0], "name", "gone"),
    "attribute to of Cast is of type FLOAT": lambda m: (
        m.graph.node[0].attribute[0].CopyFrom(attribute("to", type=AttributeProto.FLOAT, f=1.0))
    ),
    "Cast lacks its attribute to": lambda m: m.graph.node[0].ClearField("attribute"),
    "domain 'other' is used but not imported": lambda m: setattr(
        m.graph.node[2], "domain", "other"
    ),
}


@pytest.mark.parametrize(("words", "edit"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_well_formed_is_refused(
    tmp_path: Path, words: str, edit: Callable[[ModelProto], object]
) -> None:
    def edited(message: ModelProto) -> None:
        edit(message)
        if "offset 'x'" in words:
            tensor(message).data_location = TensorProto.EXTERNAL
            tensor(message).external_data.add(key="location", value="m.data")
            tensor(message).external_data.add(key="offset", value="x")

    with pytest.raises(ir.InputError) as caught:
        read(tmp_path, edited)
    assert caught.value.what == f"{tmp_path / 'm.onnx'} is not a valid model"
    assert words in caught.value.why


def test_all_faults_are_listed_in_one_error() -> None:
    message = onnx.parser.parse_model(TEXT)
    tensor(message).dims[0] = 9
    message.graph.node[1].attribute[0].t.dims[0] = 9
    with pytest.raises(ir.InputError) as caught:
        check_message(Path("m.onnx"), message)
    first, *others = caught.value.why.splitlines()
    assert first == "2 faults"
    assert [line.strip().split(" holds")[0] for line in others] == [
        "tensor w",
        "attribute value of Constant constant",
    ]
