"""What depends on positions, masks and lengths alone, run on texts of growing length.

That is the same for every text of a length, so it can be cut out and run without any weights. What
it meets is what depends on tokens.

Letters: B batch, S new tokens, P tokens in the past, R rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.evaluate import Cutout, EvaluationError, read_by, sizes
from omforge.ir.values import attribute, constant_tensor, known
from omforge.recognition.attention.masks import Probe, Prober
from omforge.recognition.interface import Interface, activations

Array = npt.NDArray[Any]

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)

_MOST_ELEMENTS = 1 << 24
"""Of any tensor in a run: what grows as a square is not run at the longest lengths."""

_MOST_TABLE = 1 << 22
"""Bytes of a table that is copied into a cut-out; of larger ones the row numbers tell enough."""


@dataclass(frozen=True)
class Check:
    """Something that holds for texts up to some length.

    Attributes:
        holds: Whether it holds for a length.
        why: What to say of the longest for which it does; "" if that is no bound after all.
        least: A shorter length is no bound: it then never held, or this is no text's length.
    """

    holds: Callable[[int], bool]
    why: Callable[[int], str]
    least: int = 1


def longest_text(holds: Callable[[int], bool], longest: int) -> int:
    """The longest text, up to `longest`, for which something holds that ends at some length."""
    if holds(longest):
        return longest
    good, bad = 0, longest
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


class Ruler:
    """Runs parts of a graph on texts of a given length, as a caller would.

    Args:
        prober: Runs parts of the graph.
        interface: Its inputs' roles.
    """

    def __init__(self, prober: Prober, interface: Interface) -> None:
        self._prober = prober
        self._cached = bool(interface.caches)

    def cut(self, values: Sequence[ir.Value]) -> Cutout:
        """See `Prober.cut`."""
        return self._prober.cut(values)

    def bindings(self, length: int, new: int, batch: int = 1) -> dict[str, int]:
        """Numbers for the dimensions of a run.

        Raises:
            EvaluationError: The export fixes a size.
        """
        fixed = self._prober.sizes(batch, new, length - new)[1]
        if self._cached and fixed <= length:
            new = fixed  # of an export that takes one token a step, say
        past = length - new
        asked = (batch, new, past) if self._cached else (batch, length, 0)
        if self._prober.sizes(batch, new, past) != asked:
            raise EvaluationError("the export fixes the sizes of a step")
        return self._prober.bindings(*asked)

    def run(self, part: Cutout, length: int, new: int, padding: int = 0) -> list[Array]:
        """Run the last `new` tokens of a text behind the others.

        Args:
            part: What to run.
            length: Tokens of the text.
            new: Those of the step.
            padding: Of a second row, that is padded on the left; 0 for one row.

        Raises:
            EvaluationError: As `bindings`; or it cannot be run so, or is too large.
        """
        bindings = self.bindings(length, new, 2 if padding else 1)
        for node in part.nodes:
            for output in node.outputs:
                if _elements(output, bindings) > _MOST_ELEMENTS:
                    raise EvaluationError(f"{output.name} is too large to be run")
        mask = np.ones((bindings["batch"], length), dtype=np.int64)
        mask[1:, :padding] = 0
        seq = bindings["seq"]
        return self._prober.run(part, Probe(length - seq, seq, mask))


def _elements(value: ir.Value, bindings: Mapping[str, int]) -> int:
    """How many a value has in a run; 0 where that is not known."""
    try:
        return math.prod(sizes(value, bindings))
    except EvaluationError:
        return 0


def moving(model: ir.Model) -> set[ir.Value]:
    """What depends on tokens or on the cache (see `activations`), branches of control flow too."""
    live = activations(model)
    for node in model.graph:
        if live.intersection(read_by(node)):
            live |= {output for output in node.outputs if known(output) is None}
    return live


def lookup(node: ir.Node) -> tuple[ir.Value, ir.Value, int] | None:
    """Table, numbers of its rows and the axis of these rows, where a node looks rows up."""
    if node.op_type == "Gather" and node.domain == "":
        table, rows = node.inputs[:2]
        axis = attribute(node, "axis", 0)
    elif node.op_type == "RotaryEmbedding" and node.domain == "" and len(node.inputs) > 3:
        (table, rows), axis = (node.inputs[1], node.inputs[3]), 0
    else:
        return None
    if table is None or rows is None or rows.dtype not in _INTEGERS:
        return None
    return table, rows, axis


def frontier(model: ir.Model, live: set[ir.Value]) -> Iterator[ir.Value]:
    """What positions, masks and lengths alone make, and tokens meet."""
    seen: set[ir.Value] = set()
    for node in model.graph:
        if not any(output in live for output in node.outputs):
            continue
        for value in node.inputs:
            if value is None or value in live or value in seen or known(value) is not None:
                continue
            seen.add(value)
            # What a caller gives, and weights, are as they are.
            if value.producer() is not None and constant_tensor(value) is None:
                yield value


def small(part: Cutout) -> Cutout:
    """The part, if it copies no large table.

    Raises:
        EvaluationError: It does.
    """
    for node in part.nodes:
        for value in node.inputs:
            tensor = constant_tensor(value)
            if tensor is not None and tensor.nbytes > _MOST_TABLE:
                raise EvaluationError(f"{tensor.name} is a table of {tensor.nbytes} bytes")
    return part
