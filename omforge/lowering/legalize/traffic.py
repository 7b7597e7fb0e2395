"""What a step moves: the bytes that kernels read and write, counted on a lowered graph.

Decode is bound by memory, so that of the forms of one operator the one that moves the fewest bytes
wins. The count is simple: each kernel reads every input once and writes every output once.

* Reshape, Squeeze, Unsqueeze, Flatten and an inner Identity are views and free.
* Gather and Slice read as much as they write, not the whole of what they read from.
* What an operator writes in place is the part that is new.
* A Split is a kernel, on the outermost axis too (see `choices`, op "cache").
* What depends on constants alone is computed once, by atc.

Not counted is what GE adds by itself or saves by fusing: TransData (310P's cube reads FRACTAL_NZ),
casts, element-wise ops that end up in one kernel, and what stays in L1 or L2 between two kernels.
The numbers compare forms; they are no forecast of time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from omforge import ir
from omforge.air.lowered import slots, written_slot
from omforge.ir.dims import evaluate
from omforge.lowering.legalize.builder import dims

# GE gives them no task (hicann/ge:docs/zh/design/features/ge_local_operator.md).
VIEWS = frozenset(("Flatten", "Reshape", "Squeeze", "Unsqueeze"))

# Read no more than they write (their other inputs are indices or bounds).
_PARTIAL = frozenset(("Gather", "GatherElements", "GatherND", "Slice"))

# How far back constants are looked for: a weight that is cast and turned.
_DEPTH = 4

# The prefix of the graph inputs that hold the cache.
CACHE = "past_key_values"


@dataclass(frozen=True)
class Traffic:
    """Bytes moved by some kernels.

    Attributes:
        weights: Read from constants, turned or cast ones too.
        cache: Read from the KV cache, or from a copy of it.
        read: Read from other tensors: activations, masks, ids.
        written: Written, whatever it is.
        kernels: How many kernels these are.
    """

    weights: int = 0
    cache: int = 0
    read: int = 0
    written: int = 0
    kernels: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.cache + self.read + self.written

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.weights + other.weights,
            self.cache + other.cache,
            self.read + other.read,
            self.written + other.written,
            self.kernels + other.kernels,
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.weights - other.weights,
            self.cache - other.cache,
            self.read - other.read,
            self.written - other.written,
            self.kernels - other.kernels,
        )


def bytes_moved(nodes: Iterable[ir.Node], gear: Mapping[str, int] | None = None) -> Traffic:
    """Count the bytes that these nodes move in one step.

    Args:
        nodes: Lowered nodes, recorded ones that are not in a graph yet included.
        gear: The numbers of the symbols in their shapes; None for static shapes.

    Raises:
        NotLegal: A shape is not known.
        InputError: A shape has a symbol without a number.
    """
    total = Traffic()
    for node in nodes:
        total += _of_node(node, gear or {})
    return total


def _of_node(node: ir.Node, gear: Mapping[str, int]) -> Traffic:
    if is_view(node) or is_constant(node):
        return Traffic()
    place = written_slot(node)
    if place is not None:
        # In place: what is new is read and written, and the rest stays where it is.
        new = [v for at, v in enumerate(node.inputs) if v is not None and at != place]
        read = sum(size(value, gear) for value in new)
        updates = node.inputs[slots(node).index("updates")] if "updates" in slots(node) else None
        return Traffic(0, 0, read, size(updates, gear) if updates is not None else 0, 1)
    written = sum(size(value, gear) for value in node.outputs)
    weights = cache = read = 0
    distinct = list(dict.fromkeys(value for value in node.inputs if value is not None))
    for index, value in enumerate(distinct):
        partial = index == 0 and node.op_type in _PARTIAL
        amount = written if partial else size(value, gear)
        if node.op_type == "Shape":
            amount = 0
        if _is_weight(value):
            weights += amount
        elif is_cache(value):
            cache += amount
        else:
            read += amount
    return Traffic(weights, cache, read, written, 1)


def _is_weight(value: ir.Value) -> bool:
    """Say whether a value is a constant, or what atc makes of constants ahead of the run."""
    if value.is_initializer() or value.const_value is not None:
        return True
    producer = value.producer()
    return producer is not None and is_constant(producer)


def is_view(node: ir.Node) -> bool:
    """Say whether a node moves nothing."""
    if node.op_type == "Identity":
        return not any(value.is_graph_output() for value in node.outputs)
    return node.op_type in VIEWS


def is_constant(node: ir.Node, depth: int = _DEPTH) -> bool:
    """Say whether all that a node reads are constants, a few nodes deep: atc computes it."""
    if not node.inputs or depth == 0:
        return False
    for value in node.inputs:
        if value is None or value.const_value is not None:
            continue
        producer = value.producer()
        if producer is None or not is_constant(producer, depth - 1):
            return False
    return True


def is_cache(value: ir.Value) -> bool:
    """Say whether a value is the cache: an input of it, a view of one, or what a Split cut off."""
    producer = value.producer()
    while producer is not None:
        place = written_slot(producer)
        if place is None and not (is_view(producer) or producer.op_type in ("Split", "Identity")):
            return False
        source = producer.inputs[place or 0] if producer.inputs else None
        if source is None:
            return False
        value, producer = source, source.producer()
    return value.is_graph_input() and (value.name or "").startswith(CACHE)


def size(value: ir.Value, gear: Mapping[str, int]) -> int:
    """Return the bytes of a value at a gear."""
    count = 1
    for dim in dims(value):
        count *= evaluate(dim, gear)
    bits = 0 if value.dtype is None else value.dtype.bitwidth
    return -(-count * bits // 8)
