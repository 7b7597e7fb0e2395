"""Graphs whose layers read int8 (W8A8), or whose cache is int8, with the rounding to it taken out.

A number near the middle of two integers goes either way: a rounding error of float16 in one graph
is a whole step of int8 in the other, and no tolerance tells that from a wrong rewrite. Without the
rounding, both graphs compute what they compute with it, scales, saturation and integer weights
included, and what is left between them is float16. The cache then holds floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.int8_ops import decoded_scale, is_int8_product
from omforge.ir.values import attribute, constant_tensor

Array = npt.NDArray[Any]

_LOW, _HIGH = -128.0, 127.0
_MOVERS = ("Concat", "Identity", "Reshape", "TensorScatter", "Transpose")


def without_rounding(model: ir.Model) -> ir.Model:
    """Return a copy, canonical or lowered, that keeps the numbers between two integers.

    Args:
        model: As the bundle has it; shares its tensors with the copy.
    """
    copy = model.clone()
    infer_model(copy)
    for node in list(copy.graph):
        if node.op_type == "QuantizeLinear":
            # An export's own, with a zero point or for another reader, is the same in both graphs.
            readers = {use.node.op_type for use in node.outputs[0].uses()}
            if len(node.inputs) == 2 and readers == {"DequantizeLinear"}:
                _unround_canonical(node)
        elif node.op_type == "AscendQuant":
            _unround_input(node)
        elif node.op_type == "QuantBatchMatMul":
            turned = attribute(node, "transpose_x2", 0) == 1
            product, power = _product(node, node.inputs[2], turned=turned)
            _replace(node, _times(node, product, 1 / power))
        elif is_int8_product(node):
            dequant = _dequant(node)
            product, power = _product(node, dequant.inputs[1])
            for reader in _behind(node):  # Reshapes, whose type was int32
                reader.outputs[0].type = product.type
            _replace(node, product)
            _replace(dequant, _times(dequant, _input(dequant, 0), 1 / power))
    if _keep_floats(copy):
        infer_model(copy)
    return copy


def _keep_floats(model: ir.Model) -> bool:
    """Let an int8 cache hold what it would round (see `passes.quantize_kv`); whether there is one.

    Its numbers are clipped and in steps, as before, so what reads it stays as it is.
    """
    written: set[ir.DataType] = set()
    for node in list(model.graph):
        rounding = _rounding(node)
        if rounding is None:
            continue
        exact = _input(rounding, 0)
        assert exact.dtype is not None
        written.add(exact.dtype)
        node.replace_input_with(0, exact)
        if not rounding.outputs[0].uses():
            model.graph.remove(rounding, safe=True)
        node.attributes["to"] = ir.AttrInt64("to", int(exact.dtype))
    for value in model.graph.inputs:
        if written and value.dtype == ir.DataType.INT8:
            (dtype,) = written
            value.type = ir.TensorType(dtype)
    return bool(written)


def _rounding(node: ir.Node) -> ir.Node | None:
    """The Round of `Cast<int8>(Round(Clip(x)))` that leaves the graph."""
    if node.op_type != "Cast" or attribute(node, "to", 0) != int(ir.DataType.INT8):
        return None
    rounding = _input(node, 0).producer()
    if rounding is None or rounding.op_type != "Round" or not _leaves(node.outputs[0]):
        return None
    clip = _input(rounding, 0).producer()
    return rounding if clip is not None and clip.op_type == "Clip" else None


def _leaves(value: ir.Value) -> bool:
    """Whether a value, moved or joined with others, is an output of the graph."""
    movers = [use.node for use in value.uses() if use.node.op_type in _MOVERS]
    return value.is_graph_output() or any(_leaves(node.outputs[0]) for node in movers)


def _unround_canonical(node: ir.Node) -> None:
    """QuantizeLinear, step for step, and the DequantizeLinear behind it."""
    x, step = _input(node, 0), _input(node, 1)
    cut = _clipped(node, _op(node, "Div", x, step), x.dtype)
    for reader in [use.node for use in node.outputs[0].uses()]:
        _replace(reader, _op(reader, "Mul", cut, _input(reader, 1)))
    _graph(node).remove(node, safe=True)


def _unround_input(node: ir.Node) -> None:
    """AscendQuant, in float16 as its kernels compute; its readers see the type of x."""
    x = _input(node, 0)
    scaled = _times(node, x, attribute(node, "scale"))
    offset = _constant(node, "offset", _half(attribute(node, "offset", 0.0)))
    cut = _clipped(node, _op(node, "Add", scaled, offset), x.dtype)
    for reader in _behind(node):
        reader.outputs[0].type = cut.type
    _replace(node, cut)


def _clipped(node: ir.Node, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    assert dtype is not None
    low = _constant(node, "low", np.array(_LOW, dtype.numpy()))
    high = _constant(node, "high", np.array(_HIGH, dtype.numpy()))
    cut = _op(node, "Clip", value, low, high)
    cut.type = ir.TensorType(dtype)
    return cut


def _product(
    node: ir.Node, encoded: ir.Value | None, *, turned: bool = False
) -> tuple[ir.Value, float]:
    """The product of steps by weights in float16, times a power of two that keeps both normal.

    A cast of the product would be a rounding that a float MatMul does not have on the CPU (see
    `ir.weight_quant`): only the weight has casts.
    """
    tensor = constant_tensor(encoded)
    assert tensor is not None
    factors = decoded_scale(tensor.numpy().view(np.uint64)).reshape(-1)
    power = float(np.exp2(np.clip(np.floor(13 - np.log2(-_LOW * factors.max())), -14, 14)))
    weight = _op(node, "Cast", _input(node, 1), to=int(ir.DataType.FLOAT))
    if turned:
        weight = _op(node, "Transpose", weight, perm=[1, 0])
    wide = _op(node, "Mul", weight, _constant(node, "factors", factors * np.float32(power)))
    halves = _op(node, "Cast", wide, to=int(ir.DataType.FLOAT16))
    product = _op(node, "MatMul", _input(node, 0), halves)
    product.type = ir.TensorType(ir.DataType.FLOAT16)
    return product, power


def _times(node: ir.Node, value: ir.Value, factor: float) -> ir.Value:
    return _op(node, "Mul", value, _constant(node, "factor", _half(factor)))


def _half(number: float) -> Array:
    return np.array(number, np.float16)


def _behind(node: ir.Node) -> list[ir.Node]:
    """The nodes behind a node that move its numbers only, in order."""
    found: list[ir.Node] = []
    for use in node.outputs[0].uses():
        if use.node.op_type in ("Reshape", "Transpose"):
            found += [use.node, *_behind(use.node)]
    return found


def _dequant(node: ir.Node) -> ir.Node:
    """The AscendDequant behind a product."""
    for mover in (node, *_behind(node)):
        for use in mover.outputs[0].uses():
            if use.node.op_type == "AscendDequant":
                return use.node
    raise AssertionError(f"{node.name} has no AscendDequant behind it")


def _graph(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _op(node: ir.Node, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
    """The output of a new node in front of `node`."""
    made = ir.node(op_type, inputs, attributes)
    number = len(_graph(node))
    made.outputs[0].name = f"{node.outputs[0].name}.unrounded.{number}"
    _graph(node).insert_before(node, made)
    return made.outputs[0]


def _constant(node: ir.Node, what: str, array: Array) -> ir.Value:
    name = f"{node.outputs[0].name}.unrounded.{what}"
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    _graph(node).register_initializer(value)
    return value


def _replace(node: ir.Node, value: ir.Value) -> None:
    """Let all readers of a node's output read `value`, and remove the node."""
    old = node.outputs[0]
    if old.is_graph_output():
        value.shape, value.type = old.shape, old.type
        value.name, old.name = old.name, value.name
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    _graph(node).remove(node, safe=True)
