"""Store and compute floats in another dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.floats import FloatName
from omforge.ir.infer import infer_model
from omforge.ir.values import constant, tensor_shape
from omforge.recognition.interface import is_weight
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.splice import Names, insert

_FLOAT, _HALF, _BRAIN = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
DTYPES: Mapping[FloatName, ir.DataType] = {"fp16": _HALF, "bf16": _BRAIN, "fp32": _FLOAT}

# What holds positions or angles: float16 has no odd number above 2,048, bfloat16 none above 256.
_EXACT = {"Cos", "Sin", "Range"}

# Attributes that name the dtype of arithmetic inside an op.
_INNER = {"stash_type", "softmax_precision"}

_SMALL = 1024


@dataclass(frozen=True)
class ConvertPrecision(Pass):
    """Convert float weights, inputs, outputs and arithmetic to `dtype`.

    Towards half precision (float16, bfloat16), four things stay in float32, with a Cast behind
    them: what rotary angles are computed from, up to the cosine; what counts (integers that are
    computed with as floats, and become integers again); a LayerNormalization, scale and bias
    included; and what a half-precision model computes in float32 between two casts. Weights are
    converted when they are written, one at a time. A weight outside the range of the dtype is
    clipped to it, and is an event.
    """

    name: ClassVar[str] = "convert-precision"
    changes_interface: ClassVar[bool] = True
    dtype: FloatName = "fp16"

    def run(self, model: ir.Model) -> int:
        """Convert; the number of tensors and nodes that changed.

        Raises:
            InputError: A node holds a subgraph.
        """
        for node in model.graph:
            if any(attribute.type == ir.AttributeType.GRAPH for attribute in _attributes(node)):
                raise ir.InputError(
                    f"the precision of {node.op_type} {node.name} cannot be converted",
                    "it holds a subgraph",
                    "Export the model without control flow",
                )
        # A Constant may say its numbers in six ways, an initializer in one.
        ir.common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(
            model
        )
        infer_model(model)
        to = DTYPES[self.dtype]
        old = {_FLOAT, _HALF, _BRAIN} - {to}
        kept = set[ir.Value]()
        if to != _FLOAT:
            kept = _exact_values(model) | _counts(model) | _norms(model) | _islands(model)
        changed = _cast_behind(model, kept, to, self.name)
        changed += _cast_ahead(model, kept, self.name)
        for value in model.graph.initializers.values():
            if value not in kept and value.dtype in old and value.const_value is not None:
                value.const_value = _converted(model, value, to, self.name)
                value.type = ir.TensorType(to)
                changed += 1
        for value in model.graph.inputs:
            if value not in kept and value.dtype in old:
                value.type = ir.TensorType(to)
                changed += 1
        for node in model.graph:
            if not any(output in kept for output in node.outputs):
                changed += _retarget(node, old, to)
        infer_model(model)
        return changed


def _attributes(node: ir.Node) -> Iterable[ir.Attr]:
    return node.attributes.values()


def _exact_values(model: ir.Model) -> set[ir.Value]:
    """Cosines, sines and ranges in float32, and every float that they are made of."""
    pending = [n.outputs[0] for n in model.graph if n.op_type in _EXACT]
    found: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        if value in found or value.dtype != _FLOAT:
            continue
        found.add(value)
        node = value.producer()
        if node is not None:
            pending += [v for v in node.inputs if v is not None]
    return found


def _counts(model: ir.Model) -> set[ir.Value]:
    """Floats that are made of integers and constants alone, and become integers again.

    A histogram of what tokens chose is one: in half precision it ends at 2,048.
    """
    of_integers: set[ir.Value] = set()
    for node in model.graph:
        floats = [v for v in node.inputs if v is not None and v.dtype == _FLOAT]
        source = node.inputs[0] if node.inputs else None
        cast = node.op_type == "Cast" and source is not None and _is_integer(source.dtype)
        if cast or (floats and all(v in of_integers or _is_whole(v) for v in floats)):
            of_integers.update(v for v in node.outputs if v.dtype == _FLOAT)
    casts = [n for n in model.graph if n.op_type == "Cast" and _is_integer(n.outputs[0].dtype)]
    pending = [node.inputs[0] for node in casts if node.inputs[0] in of_integers]
    found: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        if value is None or value in found or value.dtype != _FLOAT:
            continue
        found.add(value)
        node = value.producer()
        if node is not None:
            pending += list(node.inputs)
    return found


def _is_whole(value: ir.Value) -> bool:
    """Whether it is a small constant of whole numbers, or one number: no embedding, no scales.

    T5's buckets of distances divide by a logarithm; in half precision some fall beside their own.
    """
    numbers = constant(value, limit=_SMALL)
    if numbers is None:
        return False
    return numbers.size == 1 or bool(np.all(numbers == np.round(numbers)))


def _is_integer(dtype: ir.DataType | None) -> bool:
    return dtype is not None and (dtype.is_integer() or dtype == ir.DataType.BOOL)


def _norms(model: ir.Model) -> set[ir.Value]:
    """Layer norms in float32, and their scales and biases: a few numbers, and in every product.

    No target has a kernel for one, so that most of it is in float32 already: what is added is the
    scale and the bias, which are then rounded once, with the sum, and not each and at each step.
    """
    found: set[ir.Value] = set()
    for node in model.graph:
        y = node.outputs[0]
        if node.op_type != "LayerNormalization" or y.dtype != _FLOAT or y.is_graph_output():
            continue
        found.add(y)
        found.update(v for v in node.inputs[1:] if v is not None and v.is_initializer())
    return found


def _islands(model: ir.Model) -> set[ir.Value]:
    """What a model in half precision computes in float32: from a cast up to casts down.

    What reaches an output without a cast down is none: there, float32 is what the model is in.
    """
    found: set[ir.Value] = set()
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is None or source.dtype not in (_HALF, _BRAIN) or is_weight(source):
            continue
        island = _behind(node)
        if not any(value.is_graph_output() for value in island):
            found |= island
    return found


def _behind(raised: ir.Node) -> set[ir.Value]:
    """The float32 values that are computed from a cast up, and the constants of those nodes."""
    found: set[ir.Value] = set()
    pending = [value for value in raised.outputs if value.dtype == _FLOAT]
    while pending:
        value = pending.pop()
        found.add(value)
        for user in value.consumers():
            made = [v for v in user.outputs if v.dtype == _FLOAT and v not in found]
            pending += made
            if made:
                constants = [v for v in user.inputs if v is not None and v.is_initializer()]
                found.update(v for v in constants if v.dtype == _FLOAT)
    return found


def _cast_behind(model: ir.Model, kept: set[ir.Value], to: ir.DataType, by: str) -> int:
    """Cast what stays in float32 where it meets what is converted; each value once."""
    names = Names(model) if kept else None
    cast: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type == "Cast" or any(output in kept for output in node.outputs):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value not in kept:
                continue
            if value not in cast:
                with Builder(model) as op:
                    cast[value] = op.Cast(value, to=int(to))
                    insert(op, node, by=by, names=names)
            node.replace_input_with(index, cast[value])
    return len(cast)


def _cast_ahead(model: ir.Model, kept: set[ir.Value], by: str) -> int:
    """Cast what is converted back where it meets what stays in float32; each value once."""
    names = Names(model) if kept else None
    cast: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if not any(output in kept for output in node.outputs):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value in kept or value.dtype != _FLOAT or value.is_initializer():
                continue
            if value not in cast:
                with Builder(model) as op:
                    cast[value] = op.Cast(value, to=int(_FLOAT))
                    insert(op, node, by=by, names=names)
                kept.add(cast[value])
            node.replace_input_with(index, cast[value])
    return len(cast)


def _retarget(node: ir.Node, old: set[ir.DataType], to: ir.DataType) -> bool:
    """Change the attributes that name a dtype."""
    changed = False
    for name in _named(node, old, to):
        node.attributes[name] = ir.AttrInt64(name, int(to))
        changed = True
    if node.op_type == "ConstantOfShape":
        fill = node.attributes.get("value")
        array = np.zeros(1, np.float32) if fill is None else fill.as_tensor().numpy()
        if ir.DataType.from_numpy(array.dtype) in old:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_rounded(array, to)[0]))
            changed = True
    return changed


def _named(node: ir.Node, old: set[ir.DataType], to: ir.DataType) -> Iterator[str]:
    """The attributes of a node that name one of the old dtypes, and shall name the new one."""
    for name in ("to", "dtype", "output_dtype"):
        found = node.attributes.get(name)
        if found is not None and found.type == ir.AttributeType.INT and found.as_int() in old:
            yield name
    for name in _INNER & set(node.attributes):
        # Arithmetic inside an op may be finer than its operands, and not coarser.
        if to == _FLOAT and node.attributes[name].as_int() in old:
            yield name


def _converted(model: ir.Model, value: ir.Value, to: ir.DataType, by: str) -> ir.TensorProtocol:
    source = value.const_value
    assert source is not None

    def make() -> ir.TensorProtocol:
        array = source.numpy()
        rounded, loss = _rounded(array, to)
        if loss:
            record(model, by, value, loss)
        return ir.tensor(rounded, name=value.name)

    if source.size <= _SMALL:
        return make()
    shape = ir.Shape(tensor_shape(source))
    return ir.LazyTensor(make, dtype=to, shape=shape, name=value.name)


def _rounded(array: npt.NDArray[Any], to: ir.DataType) -> tuple[npt.NDArray[Any], str]:
    """The nearest numbers, and what is lost besides digits ("" if nothing).

    Finite numbers stay finite, as atc's --is_weight_clip does.
    """
    limit = float(to.max)
    largest = _largest(array)
    if largest > limit:
        clipped = np.where(np.isfinite(array), np.clip(array, -limit, limit), array)
        return clipped.astype(to.numpy()), f"{largest:g} is beyond the range of {to}: clipped"
    rounded = array.astype(to.numpy())
    if rounded.size == 1 and largest and not rounded.any():
        return rounded, f"{largest:g} is below the range of {to}: it becomes 0"
    return rounded, ""


def _largest(array: npt.NDArray[Any]) -> float:
    """The largest finite magnitude, without a copy of the array where all of it is finite."""
    largest = max(float(np.max(array, initial=0.0)), -float(np.min(array, initial=0.0)))
    if np.isfinite(largest):
        return largest
    return float(np.max(np.abs(array), initial=0.0, where=np.isfinite(array)))
