"""Merge the slices that cut one value into adjoining parts to one `Split`.

Before::

    q = x[..., :64]
    k = x[..., 64:96]
    v = x[..., 96:]

After::

    q, k, v = Split<axis=-1>(x, [64, 32, 32])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.values import dims, known_ints
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import Names, splice


@dataclass(frozen=True)
class Part:
    """One slice: what it gives, and the elements `start` to `end` of axis `axis` that it takes."""

    output: ir.Value
    axis: int
    start: int
    end: int


@dataclass(frozen=True)
class MergeSlices(Pass):
    """Merge slices of one value that cover an axis without gap or overlap."""

    name: ClassVar[str] = "merge-slices"

    def run(self, model: ir.Model) -> int:
        """Merge; the number of slices gone."""
        infer_model(model)
        sources: dict[ir.Value, dict[int, list[Part]]] = {}
        for node in model.graph:
            part = _part(node) if node.op_type == "Slice" and node.domain == "" else None
            if part is not None and node.inputs[0] is not None:
                sources.setdefault(node.inputs[0], {}).setdefault(part.axis, []).append(part)
        names = Names(model)
        count = 0
        for source, axes in sources.items():
            for axis, parts in axes.items():
                parts.sort(key=lambda part: part.start)
                if _cover(source, axis, parts):
                    _merge(model, axis, parts, names)
                    count += len(parts)
        return count


def _part(node: ir.Node) -> Part | None:
    """The part that a Slice along one axis takes, in steps of 1 and in numbers."""
    source = node.inputs[0]
    shape = dims(source) if source is not None else None
    given = [known_ints(value) for value in node.inputs[1:]]
    # Without axes the slice is along the first, without steps it takes every element.
    starts, ends, axes, steps = (*given, *([0], [1])[len(given) - 2 :])
    bounds = (starts, ends, axes, steps)
    if shape is None or any(numbers is None or len(numbers) != 1 for numbers in bounds):
        return None
    assert starts
    assert ends
    assert axes
    assert steps
    axis = axes[0] % len(shape)
    size = shape[axis]
    if not isinstance(size, int) or steps[0] != 1:
        return None
    start, end, _ = slice(starts[0], ends[0]).indices(size)
    return Part(node.outputs[0], axis, start, end) if start < end else None


def _cover(source: ir.Value, axis: int, parts: list[Part]) -> bool:
    size = (dims(source) or ())[axis]
    bounds = [0, *(part.end for part in parts)]
    adjoin = all(part.start == bound for part, bound in zip(parts, bounds, strict=False))
    return len(parts) > 1 and adjoin and bounds[-1] == size


def _merge(model: ir.Model, axis: int, parts: list[Part], names: Names) -> None:
    node = parts[0].output.producer()
    assert node is not None
    source = node.inputs[0]  # an earlier merge may have replaced it: slices of slices
    assert source is not None
    rank = len(dims(source) or ())
    with Builder(model) as op:
        sizes = [part.end - part.start for part in parts]
        # Counted from the end, as exporters write the last axis.
        split = op.Split(source, sizes, axis=axis - rank, _outputs=len(parts))
        old = [part.output for part in parts]
        splice(op, old, list(split), by=MergeSlices.name, names=names)
