"""Turn a cache that grows into one of fixed capacity that the runtime owns.

Before (an export's interface)::

    attention_mask [B, P+S], past_key_values.{l}.key/value [B, K, P, D]
      ->  present.{l}.key/value [B, K, P+S, D]

After::

    attention_mask [B, 1, S, C+S] (additive), past_key_values [2*L*B, K, C, D]
      ->  present_key_values [2*L*B, K, S, D]

A present that grows makes every shape dynamic, and no in-place update is reachable from ONNX
through ATC (hicann/ge:docs/zh/design/features/tensormove_delete.md), so the cache lives outside:
the graph reads C slots under a mask and hands out the step's new keys and values alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from omforge import ir
from omforge.ir.dims import Dim, symbol
from omforge.ir.edit import remove_dead
from omforge.ir.infer import attribute, dims, infer_model, to_shape
from omforge.passes import masks
from omforge.passes.builder import Builder
from omforge.passes.derived_positions import (
    as_shape_of,
    follows_input,
    position_values,
    recognise,
)
from omforge.passes.events import record
from omforge.passes.interface import Interface, activations, find_interface
from omforge.passes.last_token_logits import LOGITS_INDEX
from omforge.passes.match import NoMatch
from omforge.passes.pipeline import Pass
from omforge.passes.splice import insert, splice

BATCH, SEQ, CAPACITY = symbol("batch"), symbol("seq"), symbol("capacity")
PAST, PRESENT, MASK = "past_key_values", "present_key_values", "attention_mask"


@dataclass(frozen=True)
class FuseKvIo(Pass):
    """Give the cache a fixed capacity and the step an output of new keys and values only.

    Attributes:
        layout: `stacked`: one tensor, layers outermost, each layer's keys before its values, batch
            inside (4*L cache tensors become 2). `per-layer`: two inputs and two outputs a layer.
    """

    name: ClassVar[str] = "fuse-kv-io"
    changes_interface: ClassVar[bool] = True
    layout: Literal["stacked", "per-layer"] = "stacked"

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of attention blocks whose cache changed.

        Raises:
            InputError: The model has no cache.
            CheckError: A block or a mask was not raised, so its cache cannot be replaced.
        """
        infer_model(model)
        interface = find_interface(model)
        blocks = [n for n in model.graph if n.op_type == "Attention" and n.domain == ""]
        _check(model, interface, blocks)
        kinds = _mask_kinds(model, interface, blocks)
        shapes = [_cache_shape(block) for block in blocks]
        stacked = self.layout == "stacked"
        if stacked and (len(set(shapes)) > 1 or shapes[0].key != shapes[0].value):
            raise ir.CheckError(
                "the layers' caches cannot be stacked",
                f"their heads or sizes differ: {', '.join(sorted(set(map(str, shapes))))}",
                "Use --layout per-layer (fuse-kv-io{layout=per-layer})",
            )
        logits = interface.logits
        positions = _positions(model, interface)
        _drop_outputs(model, logits)
        mask_inputs = _mask_inputs(blocks[0], kinds)
        given = (
            _past_stacked(model, blocks, shapes)
            if stacked
            else _past_per_layer(model, blocks, shapes)
        )
        new: list[ir.Value] = []
        for block, kind, pasts in zip(blocks, kinds, given.parts, strict=True):
            new += _rewire(model, block, mask_inputs[kind], pasts, self.name)
        _emit(model, new, shapes, stacked, self.name)
        old_inputs = list(model.graph.inputs)
        index = [v for v in old_inputs if v.name == LOGITS_INDEX]
        model.graph.inputs.clear()
        kept = [interface.input_ids, *([positions] if positions is not None else []), *index]
        model.graph.inputs.extend([*kept, *mask_inputs.values(), *given.inputs])
        remove_dead(model)
        _check_disconnected(model, old_inputs)
        if positions is not None and not positions.uses():
            model.graph.inputs.remove(positions)
        infer_model(model)
        return len(blocks)


def _dims(value: ir.Value | None) -> tuple[Dim, ...]:
    """The dimensions of a value whose rank fuse-attention has made sure of."""
    shape = None if value is None else dims(value)
    return () if shape is None else shape


def _check(model: ir.Model, interface: Interface, blocks: Sequence[ir.Node]) -> None:
    if not interface.caches:
        raise ir.InputError(
            "the model has no KV cache",
            "no input is joined with new keys or values into an output",
            "Export it with its past (Optimum: --task text-generation-with-past)",
        )
    served = {value for block in blocks for value in block.inputs[4:6]}
    left = [past.name for past, _ in interface.caches if past not in served]
    if left:
        raise ir.CheckError(
            f"the cache cannot be given a fixed capacity: {len(left)} of its "
            f"{len(interface.caches)} tensors belong to attention that was not raised",
            f"for one, {left[0]}",
            "`omforge opt -p raise` lists what fuse-attention left alone, and why",
        )
    loose = [b for b in blocks if len(b.inputs) < 6 or b.inputs[4] is None or b.inputs[5] is None]
    if loose:
        raise ir.CheckError(
            f"attention {loose[0].name} has no cache while others have",
            next_step="Such models are not supported yet",
        )


def _mask_kinds(
    model: ir.Model, interface: Interface, blocks: Sequence[ir.Node]
) -> list[int | None]:
    """The window of each block's mask."""
    prober = masks.Prober(model, interface)
    seen: dict[ir.Value | None, int | None] = {}
    for block in blocks:
        mask = block.inputs[3]
        if mask in seen:
            continue
        if mask is None:
            if not attribute(block, "is_causal", 0):
                raise ir.CheckError(
                    f"attention {block.name} sees later tokens",
                    "it has no mask and is not causal",
                    "Only causal language models can be cached",
                )
            seen[None] = None
            continue
        hidden = -float("inf") if mask.dtype == ir.DataType.BOOL else None
        try:
            seen[mask] = masks.recognise(prober, mask, [], hidden).window
        except NoMatch as miss:
            raise ir.CheckError(
                f"the mask of attention {block.name} is not one that the runtime can make",
                str(miss),
                "Causal masks, with or without a sliding window, are supported",
            ) from miss
    return [seen[block.inputs[3]] for block in blocks]


@dataclass(frozen=True)
class _Shape:
    """Heads K of a block's cache, and the sizes of a key and a value."""

    heads: int
    key: int
    value: int

    def __str__(self) -> str:
        return f"{self.heads} heads with keys of {self.key} and values of {self.value}"


def _cache_shape(block: ir.Node) -> _Shape:
    key, value = (_dims(block.inputs[i]) for i in (4, 5))
    if len(key) == 4 and len(value) == 4 and key[1] == value[1]:
        heads, size, width = key[1], key[3], value[3]
        if isinstance(heads, int) and isinstance(size, int) and isinstance(width, int):
            return _Shape(heads, size, width)
    raise ir.CheckError(
        f"the cache of {block.name} is no [B, K, P, D] with K and D numbers",
        f"its keys are [{', '.join(map(str, key))}] and its values [{', '.join(map(str, value))}]",
        "Export the model with its heads and sizes as numbers",
    )


def _positions(model: ir.Model, interface: Interface) -> ir.Value | None:
    """The input position_ids, made where the model derives positions from its mask or its cache.

    A model that counts all slots, padding included, is fed what it would count without padding:
    its rows then no longer depend on what they are batched with.
    """
    prober = masks.Prober(model, interface)
    live = activations(model)
    derived = [
        value
        for value in position_values(model)
        if value not in live and not follows_input(prober, value)
    ]
    try:
        counted = [recognise(prober, value) for value in derived]
    except NoMatch as miss:
        raise ir.CheckError(
            "the model derives positions in a way that the runtime cannot feed",
            str(miss),
            "Export it with position_ids as an input",
        ) from miss
    ids = interface.position_ids
    if derived and ids is None:
        tokens = interface.input_ids
        ids = _input("position_ids", tokens.dtype, dims(tokens) or ())
    for value, found in zip(derived, counted, strict=True):
        assert ids is not None
        op = Builder(model)
        new = ids if found.offset == 0 else op.Add(ids, np.array(found.offset, dtype=np.int64))
        target = as_shape_of(value)
        new = new if target is None else op.Reshape(new, target)
        splice(op, [value], [new], by=FuseKvIo.name)
    return ids


def _drop_outputs(model: ir.Model, logits: ir.Value) -> None:
    """Everything but the logits leaves the interface."""
    served = {value for n in model.graph if n.op_type == "Attention" for value in n.outputs[1:]}
    for output in list(model.graph.outputs):
        if output is not logits and output not in served:
            record(
                model, FuseKvIo.name, output, "this output is dropped: it is no part of the cache"
            )
    model.graph.outputs.clear()
    model.graph.outputs.append(logits)


def mask_name(window: int | None) -> str:
    """The name of the input that carries a mask of this kind."""
    return MASK if window is None else f"{MASK}_w{window}"


def _mask_inputs(block: ir.Node, kinds: Sequence[int | None]) -> dict[int | None, ir.Value]:
    dtype = block.inputs[0].dtype if block.inputs[0] is not None else None
    shape: tuple[Dim, ...] = (BATCH, 1, SEQ, CAPACITY + SEQ)
    ordered = sorted(set(kinds), key=lambda window: (window is not None, window or 0))
    return {w: _input(mask_name(w), dtype, shape) for w in ordered}


def _input(name: str, dtype: ir.DataType | None, shape: Sequence[Dim]) -> ir.Value:
    assert dtype is not None
    return ir.Value(name=name, shape=to_shape(shape), type=ir.TensorType(dtype))


@dataclass(frozen=True)
class _Past:
    """The new cache inputs, and each block's key and value of them."""

    inputs: list[ir.Value]
    parts: list[tuple[ir.Value, ir.Value]]


def _past_stacked(model: ir.Model, blocks: Sequence[ir.Node], shapes: Sequence[_Shape]) -> _Past:
    count = 2 * len(blocks)
    heads, size = shapes[0].heads, shapes[0].key
    dtype = blocks[0].inputs[4].dtype  # type: ignore[union-attr]
    past = _input(PAST, dtype, (BATCH * count, heads, CAPACITY, size))
    op = Builder(model)
    parts = op.Split(past, axis=0, num_outputs=count, _outputs=count)
    insert(op, next(iter(model.graph)), by=FuseKvIo.name)
    return _Past([past], list(zip(parts[0::2], parts[1::2], strict=True)))


def _past_per_layer(model: ir.Model, blocks: Sequence[ir.Node], shapes: Sequence[_Shape]) -> _Past:
    inputs: list[ir.Value] = []
    for layer, (block, shape) in enumerate(zip(blocks, shapes, strict=True)):
        dtype = block.inputs[4].dtype  # type: ignore[union-attr]
        for role, size in (("key", shape.key), ("value", shape.value)):
            axes = (BATCH, shape.heads, CAPACITY, size)
            inputs.append(_input(f"{PAST}.{layer}.{role}", dtype, axes))
    return _Past(inputs, list(zip(inputs[0::2], inputs[1::2], strict=True)))


def _rewire(
    model: ir.Model,
    block: ir.Node,
    mask: ir.Value,
    pasts: tuple[ir.Value, ir.Value],
    by: str,
) -> list[ir.Value]:
    """Let the block read the new cache and mask; its new keys and values, [B, S, K*D] each."""
    q, k, v = block.inputs[:3]
    assert k is not None
    assert v is not None
    with Builder(model) as op:
        options = {name: a.value for name, a in block.attributes.items() if name != "is_causal"}
        # The standard wants presents wherever there are pasts, and ONNX Runtime insists.
        y, *_ = op.Attention(q, k, v, mask, *pasts, _outputs=3, **options)
        splice(op, [block.outputs[0]], [y], by=by, matched=[block])
    return [k, v]


def _emit(
    model: ir.Model,
    new: Sequence[ir.Value],
    shapes: Sequence[_Shape],
    stacked: bool,
    by: str,
) -> None:
    """The new keys and values as outputs: joined while [B, S, K*D], split by head after."""
    with Builder(model) as op:
        if stacked:
            joined = op.Concat(*new, axis=0)
            outputs = [_by_head(op, joined, shapes[0].heads, shapes[0].key)]
            names = [PRESENT]
        else:
            sizes = [size for shape in shapes for size in (shape.key, shape.value)]
            heads = [shape.heads for shape in shapes for _ in range(2)]
            outputs = [_by_head(op, *of) for of in zip(new, heads, sizes, strict=True)]
            names = [f"present.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(new))]
        insert(op, list(model.graph)[-1], by=by)
    for output, name in zip(outputs, names, strict=True):
        output.name = name
        model.graph.outputs.append(output)


def _by_head(op: Builder, value: ir.Value, heads: int, size: int) -> ir.Value:
    """[B, S, K*D] as [B, K, S, D]."""
    return op.Transpose(op.Reshape(value, [0, 0, heads, size]), perm=[0, 2, 1, 3])


def _check_disconnected(model: ir.Model, old_inputs: Sequence[ir.Value]) -> None:
    """The exported masks and caches must be out of use by now."""
    inputs = set(model.graph.inputs)
    for value in old_inputs:
        if value not in inputs and value.uses():
            user = next(iter(value.uses())).node
            raise ir.CheckError(
                f"the input {value.name} is still used, by {user.op_type} {user.name}",
                "the graph reads it in a way that was not raised",
                "`omforge opt -p raise` lists what was left alone, and why",
            )
