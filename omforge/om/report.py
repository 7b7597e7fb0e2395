"""An .om file in words."""

from __future__ import annotations

from collections.abc import Sequence

from omforge.ir.errors import InputError
from omforge.om import layout, model_def
from omforge.om.inout import OmTensor
from omforge.om.read import OmFile, OmModel

NAMED = 5
"""Gears that are listed; of more, only the count is said."""


def lines(om: OmFile) -> list[str]:
    """Return what `omforge om` prints, line by line."""
    made = "a simulation, which no device loads" if om.simulated else om.platform_version
    text = [
        f"{om.path}: {om.size} bytes",
        f"name {om.name or '-'}, {om.model_type} model, {om.table} tables, "
        f"platform version {made or '-'}{', of dynamic shape' if om.is_dynamic else ''}",
    ]
    for index, model in enumerate(om.models):
        what = f"sub model {index} of {len(om.models)}" if len(om.models) > 1 else "model"
        text += ["", what, *_model(model, _written(om, index))]
    return text


def _written(om: OmFile, index: int) -> frozenset[str]:
    """The inputs that a model writes where they lie: RefData, which only its graph tells."""
    if all(part.type != layout.MODEL_DEF for part in om.models[index].partitions):
        return frozenset()
    try:
        graphs = model_def.decode(om.partition(index, layout.MODEL_DEF), str(om.path)).graphs
    except InputError:  # the interface is in a partition of its own
        return frozenset()
    return frozenset(op.name for graph in graphs[:1] for op in graph.ops if op.type == "RefData")


def _model(model: OmModel, written: frozenset[str]) -> list[str]:
    rows = [("partition", "offset", "bytes")]
    rows += [(part.name, str(part.offset), str(part.size)) for part in model.partitions]
    text = _table(rows)
    if not model.interface:
        return [*text, "  its interface is in no partition that omforge reads"]
    text.append(f"  interface (from {model.interface})")
    rows = [("", "name", "dtype", "shape", "format", "bytes")]
    rows += [
        _row("in place" if tensor.name in written else "input", tensor) for tensor in model.inputs
    ]
    rows += [_row("output", tensor) for tensor in model.outputs]
    text += _table(rows)
    if model.gears:
        shown = "; ".join(",".join(map(str, gear)) for gear in model.gears[:NAMED])
        more = f"; and {len(model.gears) - NAMED} more" if len(model.gears) > NAMED else ""
        kind = "dims" if model.dynamic_dims else "batch" if model.dynamic_batch else "image"
        text.append(f"  {len(model.gears)} {kind} gears: {shown}{more}")
    if model.input_order:
        text.append(f"  the gears count the dims of {', '.join(model.input_order)}")
    return text


def _row(kind: str, tensor: OmTensor) -> tuple[str, ...]:
    ranges = [f"{low}..{high}" for low, high in tensor.ranges]
    shape = ", ".join(ranges or map(str, tensor.shape))
    return (kind, tensor.name, tensor.dtype, f"[{shape}]", tensor.format, str(tensor.size))


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if cell.isdecimal() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
