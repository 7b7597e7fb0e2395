"""Chains of data movement, recognised by what they do to an index tensor.

Exporters write "split the heads", "repeat the key heads" or "swap the last two axes" as all sorts
of Reshape, Transpose, Unsqueeze, Expand and Slice chains. Instead of enumerating them, a chain is
run in numpy on a tensor of distinct numbers, with small sizes bound to the symbols, and compared
with what the candidate would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir import dims as d
from omforge.ir.dims import Dim, Opaque
from omforge.ir.evaluate import EvaluationError, numbers, sizes
from omforge.ir.values import attribute, constant, dims, known_ints

Array: TypeAlias = npt.NDArray[Any]
Movement: TypeAlias = Callable[[Array, Mapping[str, int]], Array | None]
"""From a source's index tensor and the bindings to the tensor at the end; None if it cannot be."""

# Distinct, so that no reshape or transpose passes for another; two assignments, because one can be
# a coincidence.
_SIZES = ((2, 3, 5, 7, 11, 13, 17), (3, 5, 2, 4, 6, 8, 10))

_LARGEST_INDEX = 1 << 20
"""Elements of an index tensor: with small sizes bound, activations stay far below."""


@dataclass(frozen=True)
class Link:
    """One step back: from `after` over `node` to `before`, and the factor of that step."""

    node: ir.Node
    after: ir.Value
    before: ir.Value
    factor: float = 1.0


@dataclass(frozen=True)
class Chain:
    """The steps from `end` back to `source`, nearest first."""

    end: ir.Value
    links: tuple[Link, ...]

    @property
    def source(self) -> ir.Value:
        """Where the chain starts."""
        return self.links[-1].before if self.links else self.end

    @property
    def factor(self) -> float:
        """What the scalars on the way multiply to."""
        return math.prod(link.factor for link in self.links)

    def prefixes(self) -> Iterable[Chain]:
        """This chain, then each shorter one that ends at the same value, down to the empty one."""
        for length in range(len(self.links), -1, -1):
            yield Chain(self.end, self.links[:length])

    def apply(self, array: Array, bindings: Mapping[str, int]) -> Array:
        """Move `array`, which stands for the source, to the end. Scalar factors are left out.

        Raises:
            EvaluationError: A step depends on what is not known, or gives another shape than the
                one inferred: a slice that these sizes do not reach, say.
        """
        for link in reversed(self.links):
            array = _move(link, array, bindings)
            if array.shape != sizes(link.after, bindings):
                raise EvaluationError(f"{link.after.name} has another shape at small sizes")
        return array


def trace(value: ir.Value, *, scalars: bool = False, casts: bool = False) -> Chain:
    """Follow data movement back as far as it goes.

    Args:
        value: The end.
        scalars: Follow multiplication by a number too.
        casts: Follow a Cast from one dtype of floats to another too.
    """
    links: list[Link] = []
    current = value
    while (link := _step(current, scalars, casts)) is not None:
        links.append(link)
        current = link.before
    return Chain(value, tuple(links))


def shape_of(value: ir.Value | None) -> tuple[Dim, ...]:
    """The dimensions of a value; none where its rank is not known."""
    shape = None if value is None else dims(value)
    return () if shape is None else shape


def bindings_for(values: Iterable[ir.Value]) -> tuple[dict[str, int], ...]:
    """Small distinct numbers for every symbol in the shapes of `values`, twice."""
    names: set[str] = set()
    for value in values:
        for dim in shape_of(value):
            names |= d.symbols(dim)
    return tuple(_numbered(frozenset(names), which) for which in range(len(_SIZES)))


@lru_cache(maxsize=256)
def _numbered(names: frozenset[str], which: int) -> dict[str, int]:
    choice = _SIZES[which]
    count = len(choice)
    return {name: choice[i % count] + i // count for i, name in enumerate(sorted(names))}


def is_same_movement(chain: Chain, expected: Movement) -> bool:
    """Whether the chain moves every element as `expected` does, for two sets of sizes.

    Args:
        chain: What to examine.
        expected: What the candidate would do.
    """
    values = [chain.end, chain.source, *(link.before for link in chain.links)]
    if any(dims(value) is None for value in values) or any(map(_is_cut, chain.links)):
        return False
    return all(_moves_alike(chain, expected, bindings) for bindings in bindings_for(values))


def _is_cut(link: Link) -> bool:
    """Whether a step takes at most so many of a symbolic size: at small sizes it takes all."""
    before = shape_of(link.before)
    return any(_has_limit(dim) and dim not in before for dim in shape_of(link.after))


def _has_limit(dim: Dim) -> bool:
    if isinstance(dim, int):
        return False
    atoms = (atom for monomial in dim.terms for atom in monomial)
    return any(isinstance(atom, Opaque) and atom.op in ("min", "max") for atom in atoms)


def _moves_alike(chain: Chain, expected: Movement, bindings: Mapping[str, int]) -> bool:
    try:
        shape = sizes(chain.source, bindings)
        if math.prod(shape) > _LARGEST_INDEX:
            return False
        index = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
        wanted = expected(index, bindings)
        return wanted is not None and np.array_equal(chain.apply(index, bindings), wanted)
    except (ValueError, IndexError, EvaluationError):
        return False  # these sizes do not go through: what cannot be shown is not assumed


def is_identity(chain: Chain) -> bool:
    """Whether the chain leaves its source as it was, shape included."""
    return dims(chain.source) == dims(chain.end) and is_same_movement(chain, lambda x, _: x)


def _step(value: ir.Value, scalars: bool, casts: bool = False) -> Link | None:
    node = value.producer()
    if node is None or node.domain != "" or not node.inputs or node.inputs[0] is None:
        return None
    first = node.inputs[0]
    if node.op_type in _MOVES:
        return Link(node, value, first) if _moves_one(node) else None
    if node.op_type == "Cast":
        same = first.dtype == value.dtype or (casts and _are_floats(first, value))
        return Link(node, value, first) if same else None
    return _scalar_step(node, value) if scalars and node.op_type in ("Mul", "Div") else None


def _are_floats(*values: ir.Value) -> bool:
    return all(v.dtype is not None and v.dtype.is_floating_point() for v in values)


def _moves_one(node: ir.Node) -> bool:
    """Whether a node of a moving op moves one value, by numbers that are known."""
    match node.op_type:
        case "Gather":
            return known_ints(node.inputs[1]) is not None
        case "Concat":
            return len(node.inputs) > 1 and len(set(node.inputs)) == 1
        case _:
            return True


def _scalar_step(node: ir.Node, value: ir.Value) -> Link | None:
    left, right = node.inputs
    if left is None or right is None:
        return None
    factor = scalar(right)
    if factor is not None and dims(left) == dims(value):
        if node.op_type == "Mul":
            return Link(node, value, left, factor)
        return Link(node, value, left, 1.0 / factor) if factor else None
    factor = scalar(left)
    if factor is not None and node.op_type == "Mul" and dims(right) == dims(value):
        return Link(node, value, right, factor)
    return None


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element (or of one element repeated) holds."""
    array = constant(value, limit=1 << 12)
    if array is None or not array.size or array.dtype.kind not in "fiu":
        return None
    first = array.ravel()[0]
    return float(first) if (array == first).all() else None


def _reshape(link: Link, array: Array, bindings: Mapping[str, int]) -> Array:
    return array.reshape(sizes(link.after, bindings))


def _transpose(link: Link, array: Array, bindings: Mapping[str, int]) -> Array:
    return array.transpose(attribute(link.node, "perm") or None)


def _expand(link: Link, array: Array, bindings: Mapping[str, int]) -> Array:
    # By the target itself: of two symbols that meet, inference keeps one, and that one may be 1.
    target = link.node.inputs[1]
    assert target is not None
    return np.broadcast_to(
        array, np.broadcast_shapes(array.shape, tuple(numbers(target, bindings)))
    )


def _identity(link: Link, array: Array, bindings: Mapping[str, int]) -> Array:
    return array


def _given(node: ir.Node, index: int, bindings: Mapping[str, int]) -> list[int] | None:
    """The integers of an input, None where it is absent."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else [int(x) for x in numbers(value, bindings).ravel()]


def _slice(link: Link, array: Array, bindings: Mapping[str, int]) -> Array:
    starts, ends, axes, steps = (_given(link.node, i, bindings) for i in (1, 2, 3, 4))
    if starts is None or ends is None:
        raise EvaluationError(f"{link.node.name} has no bounds")
    index = [slice(None)] * array.ndim
    for i, axis in enumerate(range(len(starts)) if axes is None else axes):
        step = 1 if steps is None else steps[i]
        index[axis] = slice(starts[i], ends[i], step)
        if step < 0 and ends[i] < -(2**31):  # how ONNX spells "down to the first"
            index[axis] = slice(starts[i], None, step)
    return array[tuple(index)]


def _gather(link: Link, array: Array, bindings: Mapping[str, int]) -> Array:
    picks = link.node.inputs[1]
    assert picks is not None
    return np.take(array, numbers(picks, bindings), axis=attribute(link.node, "axis", 0))


def _tile(link: Link, array: Array, bindings: Mapping[str, int]) -> Array:
    repeats = _given(link.node, 1, bindings)
    assert repeats is not None
    return np.tile(array, repeats)


def _concat(link: Link, array: Array, bindings: Mapping[str, int]) -> Array:
    """The same value several times: how some repeat heads."""
    return np.concatenate([array] * len(link.node.inputs), axis=attribute(link.node, "axis"))


def _split(link: Link, array: Array, bindings: Mapping[str, int]) -> Array:
    axis: int = attribute(link.node, "axis", 0)
    start = 0
    for output in link.node.outputs:
        size = sizes(output, bindings)[axis]
        if output is link.after:
            return array.take(range(start, start + size), axis=axis)
        start += size
    raise AssertionError("a link's value is one of its node's outputs")


_MOVES: Mapping[str, Callable[[Link, Array, Mapping[str, int]], Array]] = {
    "Identity": _identity,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Transpose": _transpose,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Tile": _tile,
    "Concat": _concat,
}


def _move(link: Link, array: Array, bindings: Mapping[str, int]) -> Array:
    move = _MOVES.get(link.node.op_type)
    return array if move is None else move(link, array, bindings)
