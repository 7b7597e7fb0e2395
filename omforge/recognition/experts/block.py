"""Mixtures of experts in the canonical form: all compute all tokens, and what was chosen is taken.

The canonical form states the choice, and no size in it depends on the data::

    up   = MatMul(x [T, D], W [E, D, I])                 [E, T, I]
    down = MatMul(rows(up), V [E, I, D])                 [E, T, D]
    y    = Gather(Reshape(down, [E*T, D]), choices * T + token)       [T*k, D]

`rows` is any arithmetic that works row by row; behind it each row is weighed and a token's summed.
It is the dense form that is canonical, and not that which gathers the chosen experts' weights: ONNX
Runtime runs it for any number of tokens in the memory of its activations, where gathered weights
of 512 tokens would be 512 * k matrices. Its weights are stacked, so that a lowering that reads
those of the chosen experts alone follows by a Gather in front of each product; and what is taken
in the end says which they are. Whatever another expert makes of a token, infinite or not, does
not matter.

That an index is of this kind is shown by running it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from omforge import ir
from omforge.ir import dims as d
from omforge.ir.dims import Dim
from omforge.ir.evaluate import Cutout, EvaluationError, sizes
from omforge.ir.values import attribute, constant_tensor
from omforge.recognition.interface import is_weight
from omforge.recognition.views import shape_of

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_MANY = 12
"""Values behind an index that are tried as its choices: they are a handful of nodes away."""


@dataclass(frozen=True)
class Block:
    """One mixture of experts.

    Attributes:
        taken: The Gather that takes each token's own rows.
        choices: Integer [T*k] or [T, k]: the expert of each row of what is taken.
        experts: E.
        tokens: T.
        each: k.
        products: The products with stacked weights behind what is taken.
    """

    taken: ir.Node
    choices: ir.Value
    experts: int
    tokens: Dim
    each: int
    products: tuple[ir.Node, ...]


def find_blocks(model: ir.Model) -> list[Block]:
    """All mixtures of experts of a model in the canonical form, its values inferred."""
    opset = model.opset_imports[""]
    found = (block_of(node, opset) for node in model.graph)
    return [block for block in found if block is not None]


def block_of(node: ir.Node, opset: int) -> Block | None:
    """The mixture of experts whose rows a node takes; None if it takes none."""
    if node.op_type != "Gather" or node.domain != "" or attribute(node, "axis", 0) != 0:
        return None
    data, index = node.inputs
    if data is None or index is None or index.dtype not in _INTEGERS or is_weight(data):
        return None
    rows, count = shape_of(data), shape_of(index)
    if len(rows) != 2 or len(count) != 1:
        return None
    products = stacked_products(data)
    if not products:
        return None
    experts, tokens = shape_of(products[0].outputs[0])[:2]
    if not isinstance(experts, int) or rows[0] != experts * tokens:
        return None
    each = _times(count[0], tokens)
    choices = None if each is None else _choices(index, experts, tokens, each, opset)
    if each is None or choices is None:
        return None
    return Block(node, choices, experts, tokens, each, products)


def is_stacked(node: ir.Node) -> bool:
    """Whether a node is the product of rows [E, T, D] or [T, D] with weights [E, D, I]."""
    if node.op_type != "MatMul" or node.domain != "":
        return False
    weight, made = shape_of(node.inputs[1]), shape_of(node.outputs[0])
    if len(weight) != 3 or len(made) != 3 or node.inputs[1] is None:
        return False
    return made[0] == weight[0] and isinstance(weight[0], int) and is_weight(node.inputs[1])


def stacked_products(value: ir.Value) -> tuple[ir.Node, ...]:
    """The products with stacked weights behind a value, up to what other tokens' choices made."""
    found: dict[ir.Node, None] = {}
    seen: set[ir.Value] = {value}
    pending = [value]
    while pending:
        node = pending.pop().producer()
        if node is None or (node.op_type == "Gather" and not is_weight_row(node)):
            continue
        given: list[ir.Value | None] = list(node.inputs)
        if is_stacked(node):
            found[node] = None
            if len(shape_of(given[0])) != 3:
                continue  # tokens, as all experts see them
            given = given[:1]
        elif node.op_type in ("MatMul", "Gemm", "Attention"):
            continue
        for each in given:
            if each is not None and each not in seen and constant_tensor(each) is None:
                seen.add(each)
                pending.append(each)
    return tuple(found)


def is_weight_row(node: ir.Node) -> bool:
    """Whether a Gather takes rows of a constant, as biases of experts are."""
    return node.inputs[0] is not None and is_weight(node.inputs[0])


def _times(count: Dim, tokens: Dim) -> int | None:
    """k, where `count` is T*k."""
    for each in range(1, 65):
        if count == tokens * each:
            return each
    return None


def _choices(index: ir.Value, experts: int, tokens: Dim, each: int, opset: int) -> ir.Value | None:
    """What an index is choices * T + token of."""
    for value in _behind(index):
        if value.dtype not in _INTEGERS or _count(value) != _count(index):
            continue
        if _is_index_of(index, value, experts, tokens, each, opset):
            return value
    return None


def _behind(value: ir.Value) -> Iterator[ir.Value]:
    """A value and those that it is made of, the nearest first."""
    pending, seen = [value], {value}
    for _ in range(_MANY):
        if not pending:
            return
        now = pending.pop(0)
        yield now
        node = now.producer()
        for given in () if node is None else node.inputs:
            if given is not None and given not in seen and constant_tensor(given) is None:
                seen.add(given)
                pending.append(given)


def _count(value: ir.Value) -> Dim:
    total: Dim = 1
    for dim in shape_of(value):
        total = total * dim
    return total


def _is_index_of(
    index: ir.Value, choices: ir.Value, experts: int, tokens: Dim, each: int, opset: int
) -> bool:
    random = np.random.default_rng(0)
    names = sorted(d.symbols(tokens))
    assert choices.name is not None
    assert choices.dtype is not None
    try:
        part = Cutout([index], [choices], opset)
        for base in (2, 3) if names else (0,):
            bindings = {name: base + at for at, name in enumerate(names)}
            count = d.evaluate(tokens, bindings)
            # Of each expert and each token some: an index of another kind differs from it.
            drawn = random.integers(0, experts, count * each)
            drawn[0], drawn[-1] = experts - 1, 1 % experts
            fed = drawn.reshape(sizes(choices, bindings)).astype(choices.dtype.numpy())
            (got,) = part.run({choices.name: fed}, bindings)
            if not np.array_equal(got.ravel(), drawn * count + np.arange(count * each) // each):
                return False
    except (EvaluationError, ir.InputError):
        return False
    return True
