"""What meaning-preserving transformations are made of: places chosen at random, and edits there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.edit import value_names
from omforge.ir.infer import infer_model
from omforge.ir.values import constant, constant_tensor
from omforge.recognition.interface import activations
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, insert, splice

T = TypeVar("T")
Array: TypeAlias = npt.NDArray[Any]
Rule: TypeAlias = Callable[[Builder, ir.Node, Random], ir.Value | None]
"""Records another spelling of a node's first output; None where the node is not of that kind."""
Noise: TypeAlias = Callable[[Builder, ir.Value, Random], ir.Value | None]
"""Records nodes that hand a value on as it is; None where the value is not of that kind."""

BY = "metamorphic"
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
MOST = 30
"""Places that one transformation touches: more make graphs slower without another spelling."""

_SHARES = (1.0, 0.5, 0.1)


def chosen(random: Random, places: Sequence[T]) -> list[T]:
    """All, half or a few of the places in their order; one at least where there is one."""
    share = random.choice(_SHARES)
    picked = [index for index in range(len(places)) if random.random() < share]
    if not picked and places:
        picked = [random.randrange(len(places))]
    if len(picked) > MOST:
        picked = sorted(random.sample(picked, MOST))
    return [places[index] for index in picked]


def respell(model: ir.Model, random: Random, op_types: Sequence[str], rule: Rule) -> int:
    """Apply a rule at some nodes of the given operators; the number of nodes respelled."""
    infer_model(model)
    names = Names(model)
    nodes = of_type(model, *op_types)
    first = chosen(random, nodes)
    count = sum(_respell_one(model, node, rule, random, names) for node in first)
    rest = [node for node in nodes if node not in set(first)]
    random.shuffle(rest)
    for node in rest:
        if count:
            break
        count = _respell_one(model, node, rule, random, names)
    return count


def _respell_one(model: ir.Model, node: ir.Node, rule: Rule, random: Random, names: Names) -> bool:
    if node.graph is None:
        return False
    with Builder(model) as op:
        new = rule(op, node, random)
        if new is None:
            return False
        return replace_outputs(op, [node.outputs[0]], [new], names)


def replace_outputs(
    op: Builder, old: Sequence[ir.Value], new: Sequence[ir.Value], names: Names
) -> bool:
    """Put what was recorded in place of `old`; False if it does not fit."""
    try:
        splice(op, old, new, by=BY, names=names)
    except NoMatch:
        return False
    return True


def insert_noise(model: ir.Model, random: Random, noise: Noise) -> int:
    """Put something that changes nothing on some edges; the number of edges."""
    infer_model(model)
    graph = model.graph
    names = Names(model)
    edges = [
        (node, index)
        for node in graph
        if node.domain == ""  # ONNX Runtime's own operators want some inputs constant
        for index, value in enumerate(node.inputs)
        if value is not None and value.dtype is not None
    ]
    count = 0
    for node, index in chosen(random, edges):
        value = node.inputs[index]
        assert value is not None
        with Builder(model) as op:
            new = noise(op, value, random)
            if new is None:
                continue
            insert(op, node, by=BY, names=names)
        node.replace_input_with(index, new)
        count += 1
    for index, value in enumerate(graph.outputs):
        if random.random() < 0.1 and value.producer() is not None:
            count += _insert_before_output(model, index, noise, random, names)
    return count


def _insert_before_output(
    model: ir.Model, index: int, noise: Noise, random: Random, names: Names
) -> bool:
    graph = model.graph
    value = graph.outputs[index]
    with Builder(model) as op:
        new = noise(op, value, random)
        if new is None:
            return False
        last = graph[-1]
        insert(op, last, by=BY, names=names)
        graph.remove(op.nodes)
        graph.extend(op.nodes)  # behind everything
    name = value.name
    value.name = names.unique(f"{name}_inner")
    new.name, new.type, new.shape = name, value.type, value.shape
    graph.outputs[index] = new
    return True


def of_type(model: ir.Model, *op_types: str) -> list[ir.Node]:
    """The nodes of standard operators."""
    return [node for node in model.graph if node.domain == "" and node.op_type in op_types]


def maker(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes a value, if it is one of these standard operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def sole(value: ir.Value) -> bool:
    """Whether a value is used once, and no output."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def two(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The operands of a binary operator."""
    left, right = node.inputs
    assert left is not None
    assert right is not None
    return left, right


def number(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds."""
    array = constant(value)
    if array is None or array.size != 1 or array.dtype.kind not in "fiu":
        return None
    return float(array.ravel()[0])


def weight(value: ir.Value | None) -> Array | None:
    """The numbers of a constant float matrix."""
    tensor = constant_tensor(value)
    if tensor is None or len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
        return None
    return tensor.numpy()


def is_float(value: ir.Value | None) -> bool:
    """Whether it is of a floating-point dtype."""
    return value is not None and value.dtype in FLOATS


def live_values(model: ir.Model) -> set[ir.Value]:
    """The values that depend on tokens; none where the embedding is inside a function."""
    infer_model(model)
    try:
        return activations(model)
    except ir.InputError:
        return set()


def fresh_names(model: ir.Model) -> set[str]:
    """All names of values, to be added to."""
    return value_names(model.graph)


def scalar_like(op: Builder, value: ir.Value, content: float) -> ir.Value:
    """A constant of one number with a value's dtype."""
    assert value.dtype is not None
    return op.constant(np.array(content, dtype=value.dtype.numpy()))
