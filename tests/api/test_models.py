"""A model however it is given, and what is none."""

import onnx
import pytest

import omforge as of
from omforge import ir
from omforge.api.models import folder_of
from omforge.testing import parse

TEXT = """<ir_version: 10, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 4] y) { h = Identity (x) y = Relu (h) }"""


class Program:
    """What torch.onnx.export returns has the model under this name."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model


def test_every_kind(tmp_path) -> None:
    model = parse(TEXT)
    file = tmp_path / "model.onnx"
    ir.save(model, file)
    assert of.load(model) is model
    assert of.load(Program(model)) is model
    for given in (file, str(file), tmp_path, onnx.load(file)):
        assert [node.op_type for node in of.load(given).graph] == ["Identity", "Relu"]
    assert folder_of(file) == tmp_path
    assert folder_of(model) is None


def test_what_is_no_model_is_our_error(tmp_path) -> None:
    for given in (3, None, b"onnx", Program(3)):  # type: ignore[arg-type]
        with pytest.raises(of.InputError, match="is no model"):
            of.load(given)
    broken = ir.to_proto(parse(TEXT))
    broken.graph.node[1].input[0] = "gone"
    with pytest.raises(of.InputError, match="the model is not a valid model"):
        of.load(broken)
    with pytest.raises(of.InputError, match="does not exist"):
        of.load(tmp_path / "nowhere.onnx")


def test_what_is_given_stays_as_it_is() -> None:
    model = parse(TEXT)
    done = of.Pipeline.parse("remove-no-ops").run(model, compare=True)
    assert (done.rewrites, len(model.graph), len(done.model.graph)) == (1, 2, 1)
    program = Program(model)
    assert of.Pipeline.parse("remove-no-ops").run(program).model is not model
    assert of.Pipeline.parse("remove-no-ops").run(model, inplace=True).model is model
    assert len(model.graph) == 1


def test_pipelines_are_text() -> None:
    pipeline = of.Pipeline.parse("fold-shapes,convert-opset{target=23}")
    assert str(pipeline) == "fold-shapes,convert-opset{target=23}"
    assert of.Pipeline.parse(str(pipeline)) == pipeline
    with pytest.raises(of.InputError, match="there is no pass 'fold-shape'"):
        of.Pipeline.parse("fold-shape")
