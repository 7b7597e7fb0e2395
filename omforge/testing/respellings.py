"""Transformations that write the same maths with other operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import numpy as np

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, constant_tensor, dims, known_ints
from omforge.passes.merge_slices import MergeSlices
from omforge.rewriting.builder import Builder
from omforge.rewriting.pattern import COMMUTATIVE
from omforge.rewriting.splice import Names
from omforge.testing.edits import (
    chosen,
    is_float,
    live_values,
    maker,
    number,
    of_type,
    replace_outputs,
    respell,
    scalar_like,
    sole,
    two,
    weight,
)

# A reciprocal is exact enough for factors of a model, not for the numbers that masks are made of.
_SMALLEST, _LARGEST = 1e-4, 1e4
_HIDING = -1e30


# --- algebra ----------------------------------------------------------------------------------


def swap_operands(model: ir.Model, random: Random) -> int:
    """Swap the operands of commutative operators."""
    nodes = [node for node in of_type(model, *COMMUTATIVE) if len(node.inputs) == 2]
    picked = chosen(random, nodes)
    for node in picked:
        first, second = node.inputs
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)
    return len(picked)


def reassociate(model: ir.Model, random: Random) -> int:
    """(a + b) + c as a + (b + c), and products alike; masks are left alone, whose sums overflow."""
    live = live_values(model)

    def harmless(value: ir.Value) -> bool:
        if not is_float(value) or value in live:
            return True
        tensor = constant_tensor(value)
        return tensor is not None and bool(np.all(np.abs(tensor.numpy()) < _LARGEST))

    def rule(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
        for inner, other in (two(node), two(node)[::-1]):
            below = maker(inner, node.op_type)
            if below is None or not sole(inner):
                continue
            first, second = random.sample(two(below), 2)
            if all(harmless(value) for value in (first, second, other)):
                join = getattr(op, node.op_type)
                return join(first, join(second, other))
        return None

    return respell(model, random, ("Add", "Mul"), rule)


def _divide(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    left, right = two(node)
    if not is_float(left):
        return None
    divisor = number(right)
    if node.op_type == "Div":
        if divisor is None:
            return None if number(left) is not None else op.Mul(left, op.Reciprocal(right))
        if _SMALLEST < abs(divisor) < _LARGEST:
            return op.Mul(left, op.constant(np.reciprocal(_array(right))))
        return None
    for x, factor in ((left, right), (right, left)):
        inverse = maker(factor, "Reciprocal")
        if inverse is not None and inverse.inputs[0] is not None:
            return op.Div(x, inverse.inputs[0])
        size = number(factor)
        if size is not None and _SMALLEST < abs(size) < _LARGEST:
            return op.Div(x, op.constant(np.reciprocal(_array(factor))))
    return None


def _array(value: ir.Value) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    tensor = constant_tensor(value)
    assert tensor is not None
    return tensor.numpy()


def respell_division(model: ir.Model, random: Random) -> int:
    """Write x / y and x * (1 / y), the inverse a constant or a Reciprocal."""
    return respell(model, random, ("Div", "Mul"), _divide)


def _subtract(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    if node.op_type == "Sub":
        left, right = two(node)
        return op.Add(left, op.Neg(right))
    for left, right in (two(node), two(node)[::-1]):
        negated = maker(right, "Neg")
        if negated is not None and negated.inputs[0] is not None:
            return op.Sub(left, negated.inputs[0])
    return None


def respell_subtraction(model: ir.Model, random: Random) -> int:
    """A - b and a + (-b)."""
    return respell(model, random, ("Sub", "Add"), _subtract)


def _negate(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    if node.op_type == "Neg":
        (x,) = node.inputs
        if x is None or x.dtype is None:
            return None
        return random.choice(
            (
                lambda: op.Mul(x, scalar_like(op, x, -1)),
                lambda: op.Sub(scalar_like(op, x, 0), x),
            )
        )()
    for x, factor in (two(node), two(node)[::-1]):
        if number(factor) == -1 and dims(x) == dims(node.outputs[0]):
            return op.Neg(x)
    return None


def respell_negation(model: ir.Model, random: Random) -> int:
    """-x, x * -1 and 0 - x."""
    return respell(model, random, ("Neg", "Mul"), _negate)


# --- norms and activations --------------------------------------------------------------------


def _power(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    left, right = two(node)
    if not is_float(left):
        return None
    if node.op_type == "Mul":
        return op.Pow(left, scalar_like(op, left, 2)) if left is right else None
    exponent = number(right)
    if exponent == 2:
        return op.Mul(left, left)
    return op.Mul(op.Mul(left, left), left) if exponent == 3 else None


def respell_powers(model: ir.Model, random: Random) -> int:
    """Pow(x, 2) and x * x; Pow(x, 3) as x * x * x."""
    return respell(model, random, ("Pow", "Mul"), _power)


def _root(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    x = node.inputs[0]
    if x is None or not is_float(x):
        return None
    match node.op_type:
        case "Sqrt":
            return op.Pow(x, scalar_like(op, x, 0.5))
        case "Pow":
            exponent = number(node.inputs[1])
            if exponent == 0.5:
                return op.Sqrt(x)
            return op.Reciprocal(op.Sqrt(x)) if exponent == -0.5 else None
        case "Reciprocal":
            root = maker(x, "Sqrt")
            if root is not None and root.inputs[0] is not None and random.random() < 0.5:
                return op.Pow(root.inputs[0], scalar_like(op, x, -0.5))
            return op.Div(scalar_like(op, x, 1), x)
        case _:
            divisor = node.inputs[1]
            if divisor is None:
                return None
            root = maker(divisor, "Sqrt")
            if number(x) == 1:
                return op.Reciprocal(divisor)
            if root is None or root.inputs[0] is None:
                return None
            return op.Mul(x, op.Pow(root.inputs[0], scalar_like(op, x, -0.5)))


def respell_roots(model: ir.Model, random: Random) -> int:
    """Roots and their inverses by Sqrt, Pow, Reciprocal and Div."""
    return respell(model, random, ("Sqrt", "Pow", "Reciprocal", "Div"), _root)


def _sigmoid(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    if node.op_type == "Sigmoid":
        (x,) = node.inputs
        if x is None or not is_float(x):
            return None
        below = op.Add(op.Exp(op.Neg(x)), scalar_like(op, x, 1))
        if random.random() < 0.5:
            return op.Reciprocal(below)
        return op.Div(scalar_like(op, x, 1), below)
    for x, gate in (two(node), two(node)[::-1]):
        sigmoid = maker(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is not None and is_float(x):
            inner = sigmoid.inputs[0]
            return op.Div(x, op.Add(scalar_like(op, x, 1), op.Exp(op.Neg(inner))))
    return None


def respell_sigmoid(model: ir.Model, random: Random) -> int:
    """Sigmoid(x) as 1 / (1 + exp(-x)), and x * Sigmoid(x) as x / (1 + exp(-x))."""
    return respell(model, random, ("Sigmoid", "Mul"), _sigmoid)


# --- masks and shapes -------------------------------------------------------------------------


def _invert_where(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    condition, shown, other = node.inputs
    return op.Where(op.Not(condition), other, shown)


def invert_where(model: ir.Model, random: Random) -> int:
    """Where(c, a, b) as Where(Not(c), b, a)."""
    return respell(model, random, ("Where",), _invert_where)


def respell_masking(model: ir.Model, random: Random) -> int:
    """Scores + Where(m, 0, low) and Where(m, scores, low), low being lower than any score."""
    live = live_values(model)

    def rule(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
        if node.op_type == "Add":
            for scores, mask in (two(node), two(node)[::-1]):
                where = maker(mask, "Where")
                if where is None or scores not in live or mask in live:
                    continue
                condition, shown, low = where.inputs
                if number(shown) == 0 and _is_low(low):
                    return op.Where(condition, scores, low)
                if number(low) == 0 and _is_low(shown):
                    return op.Where(condition, shown, scores)
            return None
        condition, scores, low = node.inputs
        if scores is None or scores not in live or condition in live or not _is_low(low):
            return None
        return op.Add(scores, op.Where(condition, scalar_like(op, scores, 0), low))

    return respell(model, random, ("Add", "Where"), rule)


def _is_low(value: ir.Value | None) -> bool:
    """Whether every score added to it is lost in rounding."""
    size = number(value)
    return size is not None and size < _HIDING and is_float(value)


def _compare(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    left, right = two(node)
    if is_float(left):
        return None  # with NaN, not less is more than greater or equal
    mirrored = {
        "Less": "Greater",
        "Greater": "Less",
        "LessOrEqual": "GreaterOrEqual",
        "GreaterOrEqual": "LessOrEqual",
    }
    opposite = {
        "Less": "GreaterOrEqual",
        "Greater": "LessOrEqual",
        "LessOrEqual": "Greater",
        "GreaterOrEqual": "Less",
    }
    if random.random() < 0.5:
        return getattr(op, mirrored[node.op_type])(right, left)
    return op.Not(getattr(op, opposite[node.op_type])(left, right))


def respell_comparisons(model: ir.Model, random: Random) -> int:
    """A <= b as b >= a or not a > b, and so on."""
    return respell(model, random, ("Less", "Greater", "LessOrEqual", "GreaterOrEqual"), _compare)


def _size(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    """Gather(Shape(x), i) as a slice of it, or as a part of Shape."""
    shape = maker(node.inputs[0], "Shape")
    picks, index = known_ints(node.inputs[1]), dims(node.inputs[1] or node.outputs[0])
    if shape is None or shape.attributes or picks is None or index not in ((), (1,)):
        return None
    source = shape.inputs[0]
    if source is None or dims(source) is None:
        return None
    at = picks[0] % len(dims(source) or ())
    if random.random() < 0.5:
        part = op.Shape(source, start=at, end=at + 1)
    else:
        part = op.Slice(op.Shape(source), [at], [at + 1], [0])
    return op.Squeeze(part, [0]) if index == () else part


def respell_sizes(model: ir.Model, random: Random) -> int:
    """One size of a shape by Gather, Slice, or Shape's own start and end."""
    return respell(model, random, ("Gather",), _size)


def split_to_slices(model: ir.Model, random: Random) -> int:
    """Write a Split as slices."""
    infer_model(model)
    names = Names(model)
    count = 0
    for node in chosen(random, of_type(model, "Split")):
        axis: int = attribute(node, "axis", 0)
        sizes = [(dims(value) or (None,) * 8)[axis] for value in node.outputs]
        if not all(isinstance(size, int) for size in sizes):
            continue
        bounds = np.cumsum([0, *(size for size in sizes if isinstance(size, int))]).tolist()
        with Builder(model) as op:
            parts = [
                op.Slice(node.inputs[0], [start], [end], [axis]) for start, end in pairwise(bounds)
            ]
            pairs = [pair for pair in zip(node.outputs, parts, strict=True) if pair[0].uses()]
            count += replace_outputs(op, [a for a, _ in pairs], [b for _, b in pairs], names)
    return count


def slices_to_split(model: ir.Model, random: Random) -> int:
    """Write slices that cover a value as a Split."""
    return MergeSlices().run(model)


# --- products ---------------------------------------------------------------------------------


def merge_projections(model: ir.Model, random: Random) -> int:
    """Several products of one input (queries, keys and values; gate and up) as one, cut apart."""
    infer_model(model)
    names = Names(model)
    groups: dict[ir.Value, list[ir.Node]] = {}
    for node in of_type(model, "MatMul"):
        x, w = two(node)
        if weight(w) is not None and not node.outputs[0].is_graph_output():
            groups.setdefault(x, []).append(node)
    count = 0
    for nodes in chosen(random, [nodes for nodes in groups.values() if len(nodes) > 1]):
        random.shuffle(nodes)
        with Builder(model) as op:
            matrices = [weight(node.inputs[1]) for node in nodes]
            joined = np.concatenate([m for m in matrices if m is not None], axis=1)
            product = op.MatMul(nodes[0].inputs[0], op.constant(joined))
            sizes = [m.shape[1] for m in matrices if m is not None]
            parts = _cut(op, product, sizes, random)
            old = [node.outputs[0] for node in nodes]
            count += replace_outputs(op, old, parts, names)
    return count


def _cut(op: Builder, value: ir.Value, sizes: list[int], random: Random) -> Sequence[ir.Value]:
    if random.random() < 0.5:
        return op.Split(value, sizes, axis=-1, _outputs=len(sizes))
    bounds = np.cumsum([0, *sizes]).tolist()
    return [op.Slice(value, [start], [end], [-1]) for start, end in pairwise(bounds)]


def split_projections(model: ir.Model, random: Random) -> int:
    """A product that is cut apart as one product for each part."""
    split_to_slices(model, random)
    return respell(model, random, ("Slice",), _split_product)


def _split_product(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    product = maker(node.inputs[0], "MatMul")
    bounds = [known_ints(value) for value in node.inputs[1:]]
    rank = len(dims(node.outputs[0]) or ())
    if product is None or len(bounds) < 3 or any(not b or len(b) != 1 for b in bounds):
        return None
    (start,), (end,), (axis,), *steps = (b for b in bounds if b)
    matrix = weight(product.inputs[1])
    if axis not in (-1, rank - 1) or (steps and steps[0] != [1]) or matrix is None:
        return None
    return op.MatMul(product.inputs[0], op.constant(np.ascontiguousarray(matrix[:, start:end])))


def transpose_weights(model: ir.Model, random: Random) -> int:
    """Store weights transposed, with a Transpose before the product."""

    def rule(op: Builder, node: ir.Node, _: Random) -> ir.Value | None:
        x, w = two(node)
        matrix = weight(w)
        if matrix is None:
            return None
        stored = op.constant(np.ascontiguousarray(matrix.T))
        return op.MatMul(x, op.Transpose(stored, perm=[1, 0]))

    return respell(model, random, ("MatMul",), rule)


def _from_gemm(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
        return None
    a, b, *c = node.inputs
    if attribute(node, "transA", 0):
        a = op.Transpose(a, perm=[1, 0])
    if attribute(node, "transB", 0):
        b = op.Transpose(b, perm=[1, 0])
    product = op.MatMul(a, b)
    return op.Add(product, c[0]) if c and c[0] is not None else product


def gemm_to_matmul(model: ir.Model, random: Random) -> int:
    """Write a Gemm as MatMul and Add."""
    return respell(model, random, ("Gemm",), _from_gemm)


def _to_gemm(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    for product, bias in (two(node), two(node)[::-1]):
        matmul = maker(product, "MatMul")
        if matmul is None or not sole(product) or len(dims(bias) or ()) != 1:
            continue
        x, w = two(matmul)
        matrix = weight(w)
        if matrix is None or constant_tensor(bias) is None or len(dims(x) or ()) != 3:
            continue
        if dims(bias) != matrix.shape[1:]:
            continue
        flat = op.Reshape(x, [-1, matrix.shape[0]])
        rows = op.Slice(op.Shape(x), [0], [2], [0])
        target = op.Concat(rows, op.constant(np.array(matrix.shape[1:])), axis=0)
        return op.Reshape(op.Gemm(flat, w, bias), target)
    return None


def matmul_to_gemm(model: ir.Model, random: Random) -> int:
    """Write MatMul and Add as a Gemm between reshapes, as PyTorch's addmm."""
    return respell(model, random, ("Add",), _to_gemm)


def _move_scale(op: Builder, node: ir.Node, random: Random) -> ir.Value | None:
    if node.op_type == "MatMul":
        for index, operand in enumerate(two(node)):
            scaled = maker(operand, "Mul")
            if scaled is None or len(dims(operand) or ()) != 4:
                continue
            for x, factor in (two(scaled), two(scaled)[::-1]):
                if number(factor) is not None and dims(x) == dims(operand):
                    operands = list(two(node))
                    operands[index] = x
                    return op.Mul(op.MatMul(*operands), factor)
        return None
    product, factor = two(node)
    matmul = maker(product, "MatMul")
    size = number(factor)
    if matmul is None or not sole(product) or size is None or not math.isfinite(size):
        return None
    left, right = two(matmul)
    scale = getattr(op, node.op_type)
    if random.random() < 0.5:
        return op.MatMul(scale(left, factor), right)
    return op.MatMul(left, scale(right, factor))


def move_scales(model: ir.Model, random: Random) -> int:
    """Scale a product or one of its operands."""
    return respell(model, random, ("Mul", "Div", "MatMul"), _move_scale)
