"""Another order of a model's channels: the same function, but other neighbours in a group.

A model whose weights were once stored in groups of 32 (a GGUF file, say) is all but free of loss
when it is stored in the same groups again, which says nothing about a quantiser. The channels of
the residual stream, of the MLPs and of the values in each head have no order of their own, so they
are put into a random one.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir

Array = npt.NDArray[Any]
Axis = tuple[ir.Value, int]
"""An axis of an initializer or, as -1, the last one of another value."""

_SAME = ("Add", "Mul", "Swish", "Gelu", "Relu", "Sigmoid", "Cast", "Identity")
_NORMS = ("RMSNormalization", "LayerNormalization")


class _Classes:
    """Axes that have one order: sets that are merged."""

    def __init__(self) -> None:
        self._parents: dict[Axis | str, Axis | str] = {}

    def __contains__(self, axis: Axis) -> bool:
        """Whether anything is known of the axis."""
        return axis in self._parents

    def find(self, axis: Axis | str) -> Axis | str:
        """Return what stands for the axis's set."""
        while (parent := self._parents.setdefault(axis, axis)) != axis:
            axis = parent
        return axis

    def merge(self, first: Axis | str, second: Axis | str) -> None:
        """Let two axes have the same order; "fixed" is the order they come in."""
        one, other = self.find(first), self.find(second)
        if one != "fixed":
            self._parents[one] = other
        else:
            self._parents[other] = one


def shuffled(model: ir.Model, seed: int = 0) -> dict[str, Array]:
    """Return the weights in a random order of channels, by name.

    Args:
        model: Canonical: its norms, rotary embeddings and attention are single operators.
        seed: Of the order.
    """
    random, classes = np.random.default_rng(seed), _Classes()
    for node in model.graph:
        _merge(classes, node)
    for value in model.graph.outputs:
        classes.merge((value, -1), "fixed")
    orders: dict[Axis | str, Array] = {}
    given: dict[Axis, Array] = {}
    for node in model.graph:
        if node.op_type == "Attention":
            given.update(_value_orders(node, random))
    made: dict[str, Array] = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        shape = value.const_value.shape.numpy()
        array = value.const_value.numpy()
        for axis, length in enumerate(shape):
            place = (value, axis)
            if place in given:
                array = np.take(array, given[place], axis)
            elif place in classes and (root := classes.find(place)) != "fixed":
                if root not in orders:
                    orders[root] = random.permutation(length)
                array = np.take(array, orders[root], axis)
        if array is not value.const_value.numpy():
            made[name] = array
    return made


def _last(value: ir.Value | None) -> Axis:
    assert value is not None
    if value.is_initializer() and value.const_value is not None:
        return value, len(value.const_value.shape) - 1
    return value, -1


def _merge(classes: _Classes, node: ir.Node) -> None:
    """Say which axes of a node's values have one order."""
    inputs = [value for value in node.inputs if value is not None]
    output = _last(node.outputs[0])
    if node.op_type == "Gather" and inputs[0].is_initializer():
        classes.merge((inputs[0], 1), output)
    elif node.op_type in _NORMS or node.op_type in _SAME:
        for value in inputs:
            if value.const_value is None or value.const_value.size > 1:
                classes.merge(_last(value), output)
    elif node.op_type == "MatMul" and _weight(inputs[1]) is not None:
        weight = _weight(inputs[1])
        assert weight is not None
        classes.merge(weight[0], _last(inputs[0]))
        classes.merge(weight[1], output)
    elif node.op_type == "Transpose" and inputs[0].is_initializer():
        pass
    else:
        for value in [*inputs, *node.outputs]:
            classes.merge(_last(value), "fixed")


def _weight(value: ir.Value) -> tuple[Axis, Axis] | None:
    """Return the axes (K, N) of a product's weight."""
    if value.is_initializer():
        return (value, 0), (value, 1)
    maker = value.producer()
    if maker is not None and maker.op_type == "Transpose" and maker.inputs[0] is not None:
        source = maker.inputs[0]
        return ((source, 1), (source, 0)) if source.is_initializer() else None
    return None


def _value_orders(node: ir.Node, random: np.random.Generator) -> dict[Axis, Array]:
    """Orders of the values' channels, one for each head, where products come before and behind."""
    value, output = node.inputs[2], node.outputs[0]
    maker = None if value is None else value.producer()
    users = list(output.consumers())
    if maker is None or maker.op_type != "MatMul" or any(u.op_type != "MatMul" for u in users):
        return {}
    before, behind = maker.inputs[1], users[0].inputs[1] if users else None
    if before is None or behind is None or not before.is_initializer() or len(users) != 1:
        return {}
    if before.const_value is None or not behind.is_initializer():
        return {}
    heads = node.attributes["kv_num_heads"].as_int()
    shared = node.attributes["q_num_heads"].as_int() // heads
    width = int(before.const_value.shape.numpy()[1]) // heads
    orders = [random.permutation(width) for _ in range(heads)]
    first = [head * width + order for head, order in enumerate(orders)]
    second = [
        (head * shared + copy) * width + order
        for head, order in enumerate(orders)
        for copy in range(shared)
    ]
    return {(before, 1): np.concatenate(first), (behind, 0): np.concatenate(second)}
