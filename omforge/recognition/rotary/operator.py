"""A `RotaryEmbedding` that the exporter wrote, in the canonical layout.

Before (heads split; or tables of all positions, and the positions)::

    y4 = RotaryEmbedding(x4 [B, N, S, D], cos [B, S, R / 2], sin)
    y4 = RotaryEmbedding(x4 [B, N, S, D], cos_cache [P, R / 2], sin_cache, position_ids [B, S])
    y4 = Concat<axis=-1>(RotaryEmbedding(x4[..., :R], cos, sin), x4[..., R:])

After::

    y  = RotaryEmbedding<num_heads=N>(x [B, S, N*D], cos [B, S, R / 2], sin)
    y4 = Transpose<perm=[0,2,1,3]>(Reshape(y, [B, S, N, D]))
"""

from __future__ import annotations

from typing import Any

from omforge import ir
from omforge.ir.values import attribute, dims
from omforge.recognition.rotary.source import (
    find_source,
    find_whole,
    flat_heads,
    last_size,
    with_heads,
)
from omforge.recognition.views import shape_of
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, splice


def is_own(node: ir.Node) -> bool:
    """Whether a node is a standard `RotaryEmbedding` in another layout than the canonical one."""
    if node.op_type != "RotaryEmbedding" or node.domain != "":
        return False
    return _positions(node) is not None or len(shape_of(node.inputs[0])) != 3


def flatten(model: ir.Model, node: ir.Node, names: Names, by: str) -> None:
    """Replace it by one of [B, S, N*D] with tables [B, S, R / 2].

    Raises:
        NoMatch: Its heads or its tables are not known well enough.
    """
    x, cos, sin = node.inputs[:3]
    if x is None or cos is None or sin is None:
        raise NoMatch("it lacks an input", node)
    positions = _positions(node)
    if positions is None and (len(shape_of(cos)) != 3 or len(shape_of(sin)) != 3):
        raise NoMatch(f"its table is {_text(cos)}, not [B, S, R / 2]", cos)
    if positions is not None and (len(shape_of(cos)) != 2 or len(shape_of(sin)) != 2):
        raise NoMatch(f"its table is {_text(cos)}, not [positions, R / 2]", cos)
    output = node.outputs[0]
    with Builder(model) as op:
        if positions is not None:
            cos, sin = (op.Gather(table, positions, axis=0) for table in (cos, sin))
        options: dict[str, Any] = {
            "interleaved": attribute(node, "interleaved", 0) or None,
            "rotary_embedding_dim": attribute(node, "rotary_embedding_dim", 0) or None,
        }
        if len(shape_of(x)) == 3:
            options["num_heads"] = attribute(node, "num_heads", 0)
            (new,) = op.node("RotaryEmbedding", [x, cos, sin], options).outputs
        else:
            turned = options["rotary_embedding_dim"] or last_size(x)
            output, x = find_whole(output, x)
            source, size = find_source(x, by_head=True), last_size(x)
            options["rotary_embedding_dim"] = turned if turned != size else None
            options["num_heads"] = source.heads
            inputs = [flat_heads(op, x, source), cos, sin]
            (y,) = op.node("RotaryEmbedding", inputs, options).outputs
            new = with_heads(op, y, source, size)
        splice(op, [output], [new], by=by, matched=[node], names=names)


def _positions(node: ir.Node) -> ir.Value | None:
    return node.inputs[3] if len(node.inputs) > 3 else None


def _text(table: ir.Value) -> str:
    return f"[{', '.join(map(str, dims(table) or ()))}]"
