"""How much of memory a step's activations take: what is alive at once, in the order of the nodes.

A value is alive from the node that makes it to the last one that reads it. Views share the memory
of what they show, and what an operator writes in place is where it was. Graph inputs, outputs and
constants have buffers of their own, and are not among them. GE assigns memory in the same way,
each node's in the order of execution, and may do better (operators that write over their input) or
worse (blocks that are cut up, room for tiling).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from omforge import ir
from omforge.air.lowered import written_slot
from omforge.lowering.legalize.traffic import is_constant, is_view, size


def peak_bytes(
    nodes: Iterable[ir.Node], gear: Mapping[str, int] | None = None, *, outputs: bool = False
) -> int:
    """Return the most bytes of activations that are alive at once.

    Args:
        nodes: Lowered nodes in the order in which they run.
        gear: The numbers of the symbols in their shapes; None for static shapes.
        outputs: Whether graph outputs are made in the step, too, as ONNX Runtime makes them.

    Raises:
        NotLegal: A shape is not known.
        InputError: A shape has a symbol without a number.
    """
    order = [node for node in nodes if not is_constant(node)]
    root = _roots(order)
    last = {
        root[value]: at
        for at, node in enumerate(order)
        for value in node.inputs
        if value is not None and value in root
    }
    # A buffer of the graph's own is not counted, whatever view of it the graph gives.
    given = {root[v] for v in root if v.is_graph_output()}
    ending: dict[int, list[int]] = {}
    alive = most = 0
    for at, node in enumerate(order):
        for made in node.outputs:
            if root.get(made) is made and (outputs or made not in given):
                bytes_ = size(made, gear or {})
                alive += bytes_
                if made not in given:
                    ending.setdefault(last.get(made, at), []).append(bytes_)
        most = max(most, alive)
        alive -= sum(ending.pop(at, ()))
    return most


def _roots(order: Sequence[ir.Node]) -> dict[ir.Value, ir.Value]:
    """By value that nodes make: what holds its bytes; values that are inputs' own are not there."""
    root: dict[ir.Value, ir.Value] = {}
    for node in order:
        place = written_slot(node)
        if place is None and is_view(node):
            place = 0
        if place is None:
            root.update((made, made) for made in node.outputs)
            continue
        source = node.inputs[place]
        if source is not None and source in root:
            root.update((made, root[source]) for made in node.outputs)
    return root
