"""What the legalisation tests share: run a canonical text and its lowered form, and compare."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from omforge import ir
from omforge.ir.ops import TARGET_OPS, reference_model
from omforge.lowering.legalize import legalize
from omforge.lowering.target import target

# fp32: a few dozen roundings of values of order one. fp16: the lowered form rounds after every op
# where ONNX Runtime's fused kernel computes inside in fp32, over values up to a few units.
TOLERANCE = {np.dtype("float32"): 2e-5, np.dtype("float16"): 1e-2}

Feeds = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Lowered:
    """A lowered model, the number of nodes that were replaced, and both models' outputs."""

    model: ir.Model
    replaced: int
    expected: list[npt.NDArray[Any]]
    found: list[npt.NDArray[Any]]

    @property
    def ops(self) -> list[str]:
        return [node.op_type for node in self.model.graph]

    def consumers(self, name: str) -> set[str]:
        """The op types that read the graph input of that name."""
        (value,) = (value for value in self.model.graph.inputs if value.name == name)
        return {node.op_type for node in value.consumers()}


def parse(text: str, opset: int = 24) -> ir.Model:
    """A model from ONNX text, with the shapes of all values."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def run(model: ir.Model, feeds: Feeds) -> list[npt.NDArray[Any]]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    kinds = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
    given = {
        item.name: feeds[item.name].astype(kinds.get(item.type, feeds[item.name].dtype))
        for item in session.get_inputs()
    }
    return [np.asarray(array) for array in session.run(None, given)]


def check_shapes(model: ir.Model) -> None:
    """Every value says the dtype and shape that ONNX infers for it (target ops by their bodies)."""
    twin = ir.to_proto(reference_model(model))
    del twin.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(twin, strict_mode=True, data_prop=True)
    found = {
        value.name: value
        for graph_value in ir.from_proto(inferred).graph.all_nodes()
        for value in graph_value.outputs
    }
    for node in model.graph.all_nodes():
        for value in node.outputs:
            assert value.shape is not None, value
            assert value.shape.is_static(), value
            other = found[value.name]
            if other.shape is not None:
                assert (value.dtype, value.shape) == (other.dtype, other.shape), value


def check_onnx(model: ir.Model) -> None:
    """onnx.checker accepts the model, once its target ops have moved to a domain of their own."""
    proto = ir.to_proto(model)
    for node in proto.graph.node:
        if node.op_type in TARGET_OPS:
            node.domain = "npu"
    proto.opset_import.append(onnx.helper.make_opsetid("npu", 1))
    onnx.checker.check_model(proto, full_check=False)


Lower = Callable[..., Lowered]


@pytest.fixture
def lower() -> Lower:
    """Lower a text; both forms must give the same numbers on the feeds."""

    def lower_and_compare(
        text: str,
        feeds: Feeds,
        *,
        soc: str = "Ascend310P3",
        atol: float | None = None,
        forms: Mapping[str, str] | None = None,
    ) -> Lowered:
        model = parse(text)
        expected = run(model, feeds)
        replaced = legalize(model, target(soc), forms=forms)
        assert dict(model.graph.opset_imports) == {"": 16}
        check_shapes(model)
        check_onnx(model)
        found = run(reference_model(model), feeds)
        for want, have in zip(expected, found, strict=True):
            assert have.dtype == want.dtype
            assert have.shape == want.shape
            tolerance = atol if atol is not None else TOLERANCE.get(want.dtype, 0)
            np.testing.assert_allclose(
                have.astype(np.float64), want.astype(np.float64), rtol=0, atol=tolerance
            )
        return Lowered(model, replaced, expected, found)

    return lower_and_compare


@pytest.fixture
def text_to_model() -> Callable[[str], ir.Model]:
    return parse
