"""`check` of a damaged file ends as every other command does: in the one error of reading it."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

import omforge as of
from omforge import ir
from omforge.cli.app import app

SOC = "Ascend310P3"
TEXT = """<ir_version: 10, opset_import: ["" : 16]>
g (float[2, 4] x) => (float[2, 4] y) <float[4] w = {1, 2, 3, 4}> {
    [constant] k = Constant <value = float[4] {1, 2, 3, 4}> ()
    [add] a = Add (x, w)
    [softmax] s = Softmax <axis = 1> (a)
    [mul] y = Mul (s, k)
}"""

Edit = Callable[[onnx.ModelProto], object]


def sequence(model: onnx.ModelProto) -> None:
    elem = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [2])
    model.graph.input[0].type.CopyFrom(onnx.helper.make_sequence_type_proto(elem))


def raw(content: bytes) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        weight.ClearField("float_data")
        weight.raw_data = content

    return edit


def in_another_file(model: onnx.ModelProto) -> None:
    """The weight is where `DATA` lies, which ends in the middle of it."""
    weight = model.graph.initializer[0]
    weight.ClearField("float_data")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "w.data"), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)


def in_no_file(model: onnx.ModelProto) -> None:
    in_another_file(model)
    model.graph.initializer[0].external_data[0].value = "gone.data"


DATA = bytes(15)
DAMAGED: dict[str, Edit] = {
    "a dim below 0": lambda m: setattr(
        m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", -7
    ),
    "a weight with a dim below 0": lambda m: m.graph.initializer[0].dims.__setitem__(0, -4),
    "a sequence": sequence,
    "a weight cut off": raw(bytes(14)),
    "a weight without data": lambda m: m.graph.initializer[0].ClearField("float_data"),
    "a weight of no dtype": lambda m: m.graph.initializer[0].ClearField("data_type"),
    "a constant of nothing": lambda m: m.graph.node[0].ClearField("attribute"),
    "a node of nothing": lambda m: m.graph.node[1].ClearField("op_type"),
    "weights in a file cut off": in_another_file,
    "weights in a file that is gone": in_no_file,
}
JUDGED: dict[str, tuple[Edit, set[str]]] = {
    "too many bytes": (raw(bytes(24)), set()),
    "an attribute without a type": (
        lambda m: m.graph.node[2].attribute[0].ClearField("type"),
        {"attribute-types"},
    ),
    "an attribute given twice": (
        lambda m: m.graph.node[2].attribute.add(name="axis", type=2, i=0),
        {"attributes-once"},
    ),
    "a tensor made twice": (
        lambda m: m.graph.node[1].output.__setitem__(0, "k"),
        {"tensor-made-once", "tensor-made"},
    ),
}
"""What atc reads by a rule of its own, with the rules that say so."""


def written(folder: Path, edit: Edit) -> Path:
    model = onnx.parser.parse_model(TEXT)
    edit(model)
    (folder / "w.data").write_bytes(DATA)
    file = folder / "model.onnx"
    file.write_bytes(model.SerializeToString())
    return file


@pytest.mark.parametrize("edit", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_the_error_that_reading_gives(tmp_path: Path, edit: Edit) -> None:
    file = written(tmp_path, edit)
    with pytest.raises(of.InputError) as read:
        ir.load(file)
    with pytest.raises(of.InputError) as checked:
        of.check(file, SOC)
    assert str(checked.value) == str(read.value)


@pytest.mark.parametrize(("edit", "rules"), JUDGED.values(), ids=JUDGED)
def test_what_atc_reads_is_judged(tmp_path: Path, edit: Edit, rules: set[str]) -> None:
    found = of.check(written(tmp_path, edit), SOC)
    assert {offence.code for offence in found.errors} == rules


def test_the_command_ends_as_for_a_file_that_is_missing(tmp_path: Path) -> None:
    file = written(tmp_path, in_another_file)
    result = CliRunner().invoke(app, ["check", str(file), "--target", SOC])
    assert result.exit_code == 2
    assert not result.stdout
    assert result.stderr.startswith(f"error: the weights of {file} are incomplete\n")
