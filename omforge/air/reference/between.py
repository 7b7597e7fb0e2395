"""Numbers between two integers: what a graph computes where nothing is rounded to int8.

`reference(air, rounding=False)` lets quantisers clip only. What the file calls int8, or an int32
sum of it, is then float32 in the twin, as far as it is carried; an int8 cache holds float32, and
what was an integer for another reason stays one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from omforge.air.graph import NET_OUTPUT, Desc, Edge, Graph, Op
from omforge.air.names import by_slot, input_names
from omforge.air.prototypes import prototype

FLOAT = "float32"
"""What such numbers are in the twin."""

INTEGERS = ("int8", "int32")
"""What the file calls them: int8, and sums of products of int8."""

WRITERS = ("QuantUpdateScatter", "Scatter", "ScatterNdUpdate", "ScatterUpdate")

CARRIERS = frozenset(
    (
        *("BroadcastTo", "ConcatD", "Expand", "Flatten", "GatherV2", "Identity", "Pack"),
        *("Reshape", "SliceD", "SplitD", "SplitV", "SplitVD", "Squeeze", "StridedSlice"),
        *("StridedSliceV2", "TensorMove", "Tile", "Transpose", "TransposeD", "Unsqueeze"),
        *("BatchMatMul", "BatchMatMulV2", "MatMulV2", *WRITERS),
    )
)
"""Operators whose result is float32 where what they read is."""

_QUANTISERS = ("AscendQuant", "AscendQuantV2", "DynamicQuant")


class Between:
    """What of a graph keeps the numbers between two integers.

    Attributes:
        casts: By each Cast<int8>(Round(Clip(x))) that leaves the graph, or goes into a cache, the
            Clip: what is cast is x, cut off and not rounded.
        inputs: The inputs of int8: the caches, if the graph writes any without rounding.
    """

    def __init__(self, graph: Graph) -> None:
        self._ops = graph.by_name()
        self.casts: Mapping[str, Edge] = {}
        made = list(self._leaving(graph))
        self.casts = {op.name: ahead for op, ahead in made if ahead is not None}
        inputs = [op for op in graph.ops if op.type in ("Data", "RefData") and op.output_desc]
        wide = [op.name for op in inputs if op.output_desc[0].dtype == "int8"]
        self.inputs = frozenset(wide if made else ())

    def _leaving(self, graph: Graph) -> Iterator[tuple[Op, Edge | None]]:
        """What rounds on the way out, and of a Cast what is ahead of its rounding."""
        ends: list[Edge] = []
        for op in graph.ops:
            if op.type == NET_OUTPUT:
                ends += [edge for edge in op.edges if edge is not None]
            elif op.type == "QuantUpdateScatter":
                yield op, None
            elif op.type in WRITERS:
                ends += _read(op, "updates")
        seen: set[str] = set()
        while ends:
            edge = ends.pop()
            op = self._ops.get(edge.producer)
            if op is None or op.name in seen or self._desc(edge).dtype != "int8":
                continue
            seen.add(op.name)
            if op.type in _QUANTISERS:
                yield op, None
            elif op.type == "Cast":
                ahead = self._ahead_of_rounding(op)
                if ahead is not None:
                    yield op, ahead
            elif op.type in CARRIERS:
                ends += [each for each in op.edges if each is not None]

    def _ahead_of_rounding(self, cast: Op) -> Edge | None:
        """What Cast(Round(Clip(x))) reads ahead of its Round; None where it is something else."""
        rounding = self._producer(cast)
        if rounding is None or rounding.type != "Round":
            return None
        clip = self._producer(rounding)
        return None if clip is None or clip.type != "ClipByValue" else rounding.edges[0]

    def _producer(self, op: Op) -> Op | None:
        edge = op.edges[0] if op.edges else None
        return None if edge is None else self._ops.get(edge.producer)

    def _desc(self, edge: Edge) -> Desc:
        described = self._ops[edge.producer].output_desc
        return described[edge.output] if edge.output < len(described) else Desc()


def _read(op: Op, name: str) -> list[Edge]:
    """What an input of an operator reads."""
    of, edges = prototype(op.type), op.edges
    places = [] if of is None else by_slot(of.inputs, input_names(op)).get(name, [])
    found = [edges[at] for at in places if at < len(edges)]
    return [edge for edge in found if edge is not None]
