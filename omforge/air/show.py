"""A GE graph as text: a line for each operator, with what it reads, is told, and gives.

%norm: y=float16[1,1,64], rstd=float32[1,1,1] = RmsNorm(x=%x, gamma=%gamma) {epsilon=1e-05}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omforge.air.ge_types import byte_size
from omforge.air.graph import Air, Attr, Desc, Graph, Op, Tensor
from omforge.air.names import BOOKKEEPING, input_names, output_names


def lines(air: Air) -> Iterator[str]:
    """Yield the text of a file, graph by graph."""
    yield f"{air.name}: version {air.version}, {len(air.graphs)} graph(s)"
    for graph in air.graphs:
        yield f"graph {graph.name}: {len(graph.ops)} operators"
        yield from (f"  {line}" for line in _graph(graph))


def _graph(graph: Graph) -> Iterator[str]:
    for op in graph.ops:
        yield _op(op)


def _op(op: Op) -> str:
    outputs = output_names(op)
    given = ", ".join(
        f"{outputs.get(at, desc.name or at)}={typed(desc)}"
        for at, desc in enumerate(op.output_desc)
    )
    attributes = {k: v for k, v in op.attributes.items() if k not in BOOKKEEPING}
    told = ", ".join(f"{name}={value(item)}" for name, item in sorted(attributes.items()))
    behind = "".join(f" after %{name}" for name in op.controls)
    result = f"%{op.name}: {given} = " if given else f"%{op.name} = "
    return f"{result}{op.type}({_inputs(op)})" + (f" {{{told}}}" if told else "") + behind


def _inputs(op: Op) -> str:
    names, parts = input_names(op), list[str]()
    for at, edge in enumerate(op.edges):
        if edge is None:
            continue  # an optional input that is not given
        source = f"%{edge.producer}" + (f":{edge.output}" if edge.output else "")
        parts.append(f"{names[at]}={source}" if at in names else source)
    return ", ".join(parts)


def typed(desc: Desc) -> str:
    """Return dtype and shape: `float16[1,1,64]`; `?` for an unknown shape."""
    if desc.shape is None:
        return f"{desc.dtype}?" if desc.dtype != "undefined" else "?"
    layout = "" if desc.layout in ("ND", "") else f":{desc.layout}"
    return f"{desc.dtype}[{','.join(map(str, desc.shape))}]{layout}"


def value(attribute: Attr) -> str:
    """Return an attribute's value for a reader; a tensor by its type and size."""
    if attribute.items is not None:
        return "[" + ", ".join(map(_item, attribute.items)) + "]"
    if attribute.kind in ("raw", "none"):
        return f"<{attribute.kind}>"
    return _item(attribute.value)


def _item(item: object) -> str:
    if isinstance(item, Tensor):
        size = byte_size(item.desc.dtype, item.desc.shape or ())
        note = "" if len(item.data) == size else f", {len(item.data)} bytes here"
        return f"<{typed(item.desc)}{note}>"
    if isinstance(item, Desc):
        return f"<{typed(item)}>"
    if isinstance(item, bytes):
        return f"<{len(item)} bytes>"
    if isinstance(item, float):
        return f"{item:.7g}"
    return str(item)


def to_json(air: Air) -> dict[str, Any]:
    """A file as plain data; of a constant its type, and not its numbers."""
    return {
        "name": air.name,
        "version": air.version,
        "graphs": [
            {"name": graph.name, "operators": [_op_json(op) for op in graph.ops]}
            for graph in air.graphs
        ],
    }


def _op_json(op: Op) -> dict[str, Any]:
    inputs, outputs = input_names(op), output_names(op)
    fed = [(at, edge) for at, edge in enumerate(op.edges) if edge is not None]
    return {
        "name": op.name,
        "type": op.type,
        "inputs": {inputs.get(at, str(at)): f"{edge.producer}:{edge.output}" for at, edge in fed},
        "after": list(op.controls),
        "attributes": {
            name: value(item)
            for name, item in sorted(op.attributes.items())
            if name not in BOOKKEEPING
        },
        "outputs": {
            outputs.get(at, desc.name or str(at)): {
                "dtype": desc.dtype,
                "shape": None if desc.shape is None else list(desc.shape),
            }
            for at, desc in enumerate(op.output_desc)
        },
    }
