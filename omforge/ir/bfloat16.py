"""bfloat16 on ONNX Runtime's CPU provider, which moves and casts it, and computes nothing in it.

`computed_wide` makes a graph that computes in float32 and rounds each operator's result: what a
tensor of bfloat16 holds is a number of bfloat16, as on a device, whose cube and vector units
accumulate in float32 as well. Inputs, outputs and weights stay bfloat16, the weights in their file.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from omforge.ir.edit import all_values
from omforge.ir.infer import infer_model

Array = npt.NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
"""numpy's, once ml_dtypes is imported. Its kind is V, and not f: ask `is_float`."""

_BRAIN, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT

# What ONNX Runtime has for tensors of bfloat16 (1.20 to 1.32, opsets 16 and 21): it computes none
# of them.
_NATIVE = frozenset(
    (
        *("Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "Flatten", "Gather"),
        *("GatherElements", "Identity", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze"),
        *("Transpose", "Unsqueeze"),
    )
)

# Attributes that name the dtype of a result.
_NAMED = ("dtype", "output_dtype")


def is_float(dtype: npt.DTypeLike) -> bool:
    """Whether a numpy dtype is a float's, bfloat16 included."""
    found = np.dtype(dtype)
    return found.kind == "f" or found == BFLOAT16


def has_bfloat16(model: ir.Model) -> bool:
    """Whether a graph reads, stores or makes bfloat16; bodies of functions are not looked at."""
    graph = model.graph
    if any(v.dtype == _BRAIN for v in (*graph.inputs, *graph.initializers.values())):
        return True
    return any(_makes(node) for node in graph)


def _makes(node: ir.Node) -> bool:
    to, value = node.attributes.get("to"), node.attributes.get("value")
    if to is not None and to.type == ir.AttributeType.INT and to.as_int() == _BRAIN:
        return True
    if value is None or value.type != ir.AttributeType.TENSOR:
        return False
    return value.as_tensor().dtype == _BRAIN


def computed_wide(model: ir.Model) -> ir.Model:
    """Return the graph with its arithmetic in float32, each result rounded to bfloat16.

    The model is not changed, and what is returned shares its tensors; it is the model itself where
    nothing is bfloat16. A body that a function has computes in float32 throughout, and is rounded
    where it ends, as kernels do. Graphs inside nodes are left alone.
    """
    if not has_bfloat16(model):
        return model
    made = model.clone()
    infer_model(made)
    _Widening(made.graph).run()
    return made


class _Widening:
    """Every value of bfloat16 keeps its name; what computes with one reads its cast."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._names = {value.name for value in all_values(graph)} | {node.name for node in graph}
        self._wide: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        for node in list(self.graph):
            if node.op_type in _NATIVE and node.domain in ("", "ai.onnx"):
                continue
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == _BRAIN:
                    node.replace_input_with(index, self._widened(value, node))
            for name in _NAMED:
                named = node.attributes.get(name)
                if named is not None and named.as_int() == _BRAIN:
                    node.attributes[name] = ir.AttrInt64(name, int(_FLOAT))
            for output in reversed(node.outputs):
                if output.dtype == _BRAIN:
                    self._round(node, output)

    def _widened(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """The value in float32, cast where it is first read: a weight no earlier than it must."""
        if value not in self._wide:
            cast = self._cast(value, _FLOAT, self._fresh(f"{value.name}.float32"))
            self.graph.insert_before(reader, cast)
            self._wide[value] = cast.outputs[0]
        return self._wide[value]

    def _round(self, node: ir.Node, output: ir.Value) -> None:
        """Let a cast's result take an output's place and name."""
        name, users = output.name or "", tuple(output.uses())
        output.name = self._fresh(f"{name}.unrounded")
        cast = self._cast(output, _BRAIN, name)
        output.type = ir.TensorType(_FLOAT)
        self.graph.insert_after(node, cast)
        for user, index in users:
            user.replace_input_with(index, cast.outputs[0])
        for index, value in enumerate(self.graph.outputs):
            if value is output:
                self.graph.outputs[index] = cast.outputs[0]

    def _cast(self, value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))])
        node.name = self._fresh(f"{name}.cast")
        made = node.outputs[0]
        made.name, made.type, made.shape = name, ir.TensorType(to), value.shape
        return node

    def _fresh(self, hint: str) -> str:
        name = hint
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name


def run_session(session: Any, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
    """Run an ONNX Runtime session; arrays of bfloat16 go in and come out as such.

    Its binding for numpy knows no such dtype: their bits are handed over as an OrtValue.

    Args:
        session: An `onnxruntime.InferenceSession`.
        names: The outputs that are wanted.
        feeds: By input.
    """
    outputs = [output.type for output in session.get_outputs() if output.name in set(names)]
    narrow = any(array.dtype == BFLOAT16 for array in feeds.values())
    if not narrow and "tensor(bfloat16)" not in outputs:
        return session.run(list(names), dict(feeds))
    import onnxruntime  # slow to import, and most of `ir` never runs a model

    make: Any = onnxruntime.OrtValue
    kept: list[Array] = []  # an OrtValue may look at the array's own memory

    def given(array: Array) -> Any:
        kept.append(np.asarray(array, order="C"))
        if array.dtype != BFLOAT16:
            return make.ortvalue_from_numpy(kept[-1])
        return make.ortvalue_from_numpy_with_onnx_type(kept[-1].view(np.uint16), int(_BRAIN))

    values = {name: given(array) for name, array in feeds.items()}
    return [_array(value) for value in session.run_with_ort_values(list(names), values)]


def _array(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    shape: tuple[int, ...] = tuple(value.shape())
    size = BFLOAT16.itemsize * math.prod(shape)
    content = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(bytearray(content), BFLOAT16).reshape(shape)
