"""Let the graph write the cache, where its target can: the step's own keys and values go in first.

Before (the interface of fuse-kv-io, per layer)::

    attention_mask [B, 1, S, C+S], past_key_values.{l}.key [B, K, C, D]
    y = Attention(q, k, v, mask, past_k, past_v)
      ->  present.{l}.key [B, K, S, D]                    the new keys alone

After::

    attention_mask [B, 1, S, C], write_indices [B], past_key_values.{l}.key [B, K, C, D]
    whole_k = TensorScatter<axis=-2>(past_k, k, write_indices)
    y       = Attention(q, whole_k, whole_v, mask)
      ->  present.{l}.key [B, K, C, D]                    the cache as it is then

which is how ONNX 24 says that a cache is written in place. Token i of row b lies in slot
write_indices[b] + i; write_indices + S is at most C, the runtime's care. An int8 cache holds the
step's own tokens rounded, too, and they are read so; fuse-kv-io's step reads them as they were.

Where layers are stacked, or attention was not raised, the cache stays what the runtime writes, and
an event says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from omforge import ir
from omforge.ir.dims import symbol
from omforge.ir.edit import fresh_name, remove_dead
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, dims, to_shape
from omforge.recognition.attention import sinks
from omforge.recognition.attention.alibi import KEY_POSITIONS
from omforge.recognition.step_names import MASK, PAST, WRITE_INDICES
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.splice import insert, splice

_READERS = ("Cast", "DequantizeLinear")
"""What may stand between a cache and the attention that reads it."""


@dataclass(frozen=True)
class CacheInPlace(Pass):
    """Write the step's keys and values into the cache, and attend to the cache alone."""

    name: ClassVar[str] = "cache-in-place"
    changes_interface: ClassVar[bool] = True

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of cache tensors that are written in place."""
        infer_model(model)
        caches = _caches(model)
        reason = _obstacle(model, caches)
        if reason:
            record(model, self.name, "the cache", f"it is not written in place: {reason}")
            return 0
        indices = ir.Value(
            name=WRITE_INDICES,
            shape=to_shape((symbol("batch"),)),
            type=ir.TensorType(ir.DataType.INT64),
        )
        model.graph.inputs.insert(0, indices)
        readers = [node for node in model.graph if _reads_past(node)]
        for past, present in caches:
            _write(model, past, present, indices, self.name)
        for node in readers:
            _attend_to_the_cache(model, node, self.name)
        _shorten_masks(model)
        pasts = [past for past, _ in caches]
        rest = [value for value in model.graph.inputs if value not in pasts]
        model.graph.inputs.clear()
        model.graph.inputs.extend([*rest[1:], indices, *pasts])  # what is written comes last
        model.graph.sort()
        remove_dead(model)
        infer_model(model)
        return len(caches)


def _caches(model: ir.Model) -> list[tuple[ir.Value, ir.Value]]:
    """Each layer's cache, and the output of its new slots."""
    outputs = {value.name: value for value in model.graph.outputs}
    found: list[tuple[ir.Value, ir.Value]] = []
    for value in model.graph.inputs:
        name = value.name or ""
        present = outputs.get(name.replace(PAST, "present", 1))
        if name.startswith(f"{PAST}.") and present is not None:
            found.append((value, present))
    return found


def _obstacle(model: ir.Model, caches: Sequence[tuple[ir.Value, ir.Value]]) -> str:
    """Why the cache cannot be written in place; "" where it can."""
    if any(value.name == PAST for value in model.graph.inputs):
        return (
            "the layers are stacked in one tensor, of which each layer would be cut off as a copy"
        )
    if not caches:
        return "there is none"
    for past, present in caches:
        for node, slot in _ends(past):
            if node.op_type != "Attention" or slot not in (4, 5):
                return (
                    f"{node.op_type} {node.name} reads {past.name}, whose attention was not raised"
                )
        if shape_of(present)[3:] != shape_of(past)[3:] or present.dtype != past.dtype:
            return f"{present.name} is not of the cache's dtype and size"
    for node in model.graph:
        if _reads_past(node) and any(value.uses() for value in node.outputs[1:3]):
            return f"Attention {node.name} hands out its whole cache"
    return ""


def _ends(past: ir.Value) -> list[tuple[ir.Node, int]]:
    """What reads a cache, behind casts."""
    found: list[tuple[ir.Node, int]] = []
    for node, slot in past.uses():
        if node.op_type in _READERS and slot == 0 and node.domain == "":
            found += _ends(node.outputs[0])
        else:
            found.append((node, slot))
    return found


def _reads_past(node: ir.Node) -> bool:
    return (
        node.op_type == "Attention"
        and node.domain == ""
        and len(node.inputs) > 5
        and node.inputs[4] is not None
    )


def _write(model: ir.Model, past: ir.Value, present: ir.Value, indices: ir.Value, by: str) -> None:
    """Let whoever reads the cache read it with the new slots in it."""
    name = present.name or ""
    owner = _ends(past)[0][0]
    present.name = fresh_name(model.graph, f"{name}_new")
    readers = list(past.uses())
    with Builder(model) as op:
        whole = op.TensorScatter(past, present, indices, axis=-2, mode="linear")
        insert(op, owner, by=by)  # ahead of what makes the new keys: the graph is sorted later
    for node, slot in readers:
        node.replace_input_with(slot, whole)
    whole.name = name
    whole.shape, whole.type = past.shape, past.type
    at = list(model.graph.outputs).index(present)
    model.graph.outputs[at] = whole


def _attend_to_the_cache(model: ir.Model, node: ir.Node, by: str) -> None:
    """Attention over the whole cache: keys and values by head, and so is the query."""
    query, key, value = node.inputs[0], node.inputs[4], node.inputs[5]
    assert query is not None
    assert key is not None
    assert value is not None
    options = {name: a.value for name, a in node.attributes.items()}
    sink = sinks.find(node)
    mask = node.inputs[3]
    with Builder(model) as op:
        if sink is not None:
            key, value = (op.Pad(x, sinks.ONE_ROW_BY_HEAD) for x in (key, value))
        flat = len(shape_of(query)) == 3
        if flat:
            heads = attribute(node, "q_num_heads", 0)
            width = shape_of(query)[2] // heads
            for name in ("q_num_heads", "kv_num_heads"):
                options.pop(name, None)
            query = op.Transpose(op.Reshape(query, [0, 0, heads, width]), perm=[0, 2, 1, 3])
        y = cast("ir.Value", op.Attention(query, key, value, mask, **options))
        if flat:
            y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1])
        splice(op, [node.outputs[0]], [y], by=by, matched=[node])


def _shorten_masks(model: ir.Model) -> None:
    """Keys are the C slots, the step's own among them."""
    capacity = symbol("capacity")
    for value in model.graph.inputs:
        name, shape = value.name or "", dims(value) or ()
        if len(shape) == 4 and (name.startswith(MASK) or name == KEY_POSITIONS):
            value.shape = to_shape((*shape[:3], capacity))
