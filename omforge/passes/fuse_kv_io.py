"""Turn a cache that grows into one of fixed capacity that the runtime owns.

Before (an export's interface)::

    attention_mask [B, P+S], past_key_values.{l}.key/value [B, K, P, D]
      ->  present.{l}.key/value [B, K, P+S, D]

After::

    attention_mask [B, 1, S, C+S] (additive), past_key_values [2*L*B, K, C, D]
      ->  present_key_values [2*L*B, K, S, D]

and, with ALiBi, key_positions [1, 1, 1, C+S], which the slopes of the heads multiply. Tokens,
positions and logits are called input_ids, position_ids and logits, whatever the export calls them.
Recurrent states of fixed size stay what they are (`recurrent_states.py`), and so do inputs that are
given once for a sequence (`fixed_inputs.py`).

A present that grows makes every shape dynamic, and no in-place update is reachable from ONNX
through ATC (hicann/ge:docs/zh/design/features/tensormove_delete.md), so the cache lives outside:
the graph reads C slots under a mask and hands out the step's new keys and values alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from omforge import ir
from omforge.ir.dims import Dim, symbol, symbols
from omforge.ir.edit import all_values, fresh_name, remove_dead, take_name
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, to_shape
from omforge.recognition.attention import alibi, masks
from omforge.recognition.attention import sinks as attention_sinks
from omforge.recognition.attention import unraised as unraised_attention
from omforge.recognition.attention.alibi import KEY_POSITIONS, Bias
from omforge.recognition.attention.cross import cross_attention
from omforge.recognition.attention.unraised import Unraised
from omforge.recognition.cache.states import State, find_states, name_states, see_no_padding
from omforge.recognition.derived_positions import POSITION_IDS, feed_positions
from omforge.recognition.fixed_inputs import find_fixed
from omforge.recognition.interface import (
    CacheLayer,
    Interface,
    activations,
    cache_layers,
    find_interface,
)
from omforge.recognition.step_names import (
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_INDEX,
    MASK,
    PAST,
    PRESENT,
)
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import insert, splice

BATCH, SEQ, CAPACITY = symbol("batch"), symbol("seq"), symbol("capacity")
_Kind: TypeAlias = tuple[int | None, Bias | None]
"""A mask's window, and what it adds to the scores of visible keys."""


@dataclass(frozen=True)
class FuseKvIo(Pass):
    """Give the cache a fixed capacity and the step an output of new keys and values only.

    Attributes:
        layout: `stacked`: one tensor, layers outermost, each layer's keys before its values, batch
            inside (4*L cache tensors become 2). `per-layer`: two inputs and two outputs a layer.
            `auto`: stacked, unless the layers' caches differ in heads or sizes.
    """

    name: ClassVar[str] = "fuse-kv-io"
    changes_interface: ClassVar[bool] = True
    layout: Literal["auto", "stacked", "per-layer"] = "auto"

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of attention blocks whose cache changed.

        A layer whose attention was not raised keeps its nodes, and an event says so.

        Raises:
            InputError: The model has no cache.
            CheckError: The cache is read, or masked, in a way that the runtime cannot serve.
        """
        infer_model(model)
        interface = find_interface(model)
        recurrent = find_states(model, interface)
        fixed = find_fixed(model, interface)
        layers = _layers(model, interface, recurrent)
        shapes = [_cache_shape(layer) for layer in layers]
        stacked = _is_stacked(model, self.layout, shapes)
        unraised = unraised_attention.find(model, interface, layers, activations(model))
        _check_blocks(model, unraised.values(), cross_attention(model))
        kinds = _mask_kinds(model, interface, layers, unraised)
        logits = interface.logits
        # Attention that was not raised may number its keys: whether that goes well is tried later.
        keys = shape_of(interface.caches[0][0])[2:3] if unraised else ()
        positions = feed_positions(
            model, interface, activations(model), keys, flags=bool(recurrent), by=self.name
        )
        _drop_outputs(model, logits, layers, recurrent)
        mask_inputs = _mask_inputs(layers[0], [window for of in kinds for window, _ in of])
        every = [kind for of in kinds for kind in of]
        biased, key_positions = _biased(model, mask_inputs, every, self.name)
        given = (
            _past_stacked(model, layers, shapes)
            if stacked
            else _past_per_layer(model, layers, shapes)
        )
        new: list[ir.Value] = []
        for layer, of, pasts in zip(layers, kinds, given.parts, strict=True):
            if layer.block is None:
                new += _keep(model, unraised[layer], biased[of[0]], pasts, self.name)
                continue
            made = [
                _rewire(model, block, biased[kind], pasts, self.name)
                for block, kind in zip(layer.blocks, of, strict=True)
            ]
            new += made[0]  # those of layers that share them are the same
        if unraised:
            _resize(model, interface, layers, next(iter(mask_inputs.values())), given.parts)
        _emit(model, new, shapes, stacked, self.name)
        carried = name_states(model, recurrent)
        old_inputs = list(model.graph.inputs)
        index = [v for v in old_inputs if v.name == LOGITS_INDEX]
        model.graph.inputs.clear()
        named = [(positions, POSITION_IDS)] if positions is not None else []
        kept = [interface.input_ids, *(value for value, _ in named), *index]
        kept += [value for value in interface.by_token if value.uses()]
        model.graph.inputs.extend([*kept, *mask_inputs.values(), *key_positions, *given.inputs])
        model.graph.inputs.extend([*carried, *fixed])
        remove_dead(model)
        fed = INPUTS_EMBEDS if interface.embedded else INPUT_IDS
        for value, name in ((interface.input_ids, fed), (logits, LOGITS), *named):
            take_name(model.graph, value, name)
        if recurrent and interface.attention_mask is not None:
            runtimes = next(iter(mask_inputs.values()))
            see_no_padding(model, interface.attention_mask, runtimes, self.name)
        _check_disconnected(model, old_inputs)
        if positions is not None and not positions.uses():
            model.graph.inputs.remove(positions)
            positions = None
        infer_model(model)
        if unraised:
            opset = model.opset_imports[""]
            for layer, of, pasts in zip(layers, kinds, given.parts, strict=True):
                if layer in unraised:
                    kind = of[0]
                    block, mask = unraised[layer], mask_inputs[kind[0]]
                    keys = key_positions[0] if kind[1] is not None else None
                    unraised_attention.compare(block, pasts, mask, keys, positions, opset)
            unraised_attention.check_sizes(model, unraised.values(), str(CAPACITY))
        return sum(len(of) for of in kinds)


def _layers(
    model: ir.Model, interface: Interface, recurrent: Sequence[State]
) -> tuple[CacheLayer, ...]:
    if recurrent and not interface.caches:
        listed = ", ".join(str(state.past.name) for state in recurrent)
        raise ir.InputError(
            "the model has no KV cache, only recurrent states",
            f"no layer attends to earlier tokens; the states are {listed}",
            "Models that have attention layers besides are supported",
        )
    if not interface.caches:
        raise ir.InputError(
            "the model has no KV cache",
            "no input is joined with new keys or values into an output",
            "Export it with its past (Optimum: --task text-generation-with-past)",
        )
    layers = cache_layers(model, interface)
    _check_owners(layers)
    left = [layer for layer in layers if layer.block is None]
    sizes = {name for layer in left for dim in shape_of(layer.past[0]) for name in symbols(dim)}
    if odd := sizes - {"batch", "seq", "past"}:
        # Their attention is compared by running it, which takes a meaning for each symbol.
        raise ir.CheckError(
            f"the cache cannot be given a fixed capacity: attention was not raised in {len(left)} "
            "layers",
            f"and its sizes are called {', '.join(sorted(odd))}, not batch, seq and past",
            "Run the pipeline `raise` first: -p raise,fuse-kv-io",
        )
    return layers


def _check_owners(layers: Sequence[CacheLayer]) -> None:
    """No cache is read behind new keys or values that it does not take up itself."""
    owners: dict[ir.Value, CacheLayer] = {}
    for layer in layers:
        for past in layer.past:
            owner = owners.setdefault(past, layer)
            if owner is not layer and layer.block is not None and owner.block is not None:
                raise ir.CheckError(
                    f"attention {layer.block.name} reads the cache {past.name} of "
                    f"{owner.block.name} behind other new keys or values",
                    "the next step finds those of one of the two in it, and the other's are lost",
                    "Export the model with a cache for each, or with the same keys and values",
                )


def _check_blocks(model: ir.Model, unraised: Iterable[Unraised], cross: Sequence[ir.Node]) -> None:
    inside = {node for block in unraised for node in block.nodes} | set(cross)
    for node in model.graph:
        if node.op_type != "Attention" or node.domain != "" or node in inside:
            continue
        if len(node.inputs) < 6 or node.inputs[4] is None or node.inputs[5] is None:
            raise ir.CheckError(
                f"attention {node.name} has no cache while others have",
                next_step="Such models are not supported yet",
            )


def _is_stacked(model: ir.Model, layout: str, shapes: Sequence[_Shape]) -> bool:
    if layout == "per-layer":
        return False
    if len(set(shapes)) == 1 and shapes[0].key == shapes[0].value:
        return True
    differ = f"their heads or sizes differ: {', '.join(sorted(set(map(str, shapes))))}"
    if layout == "stacked":
        raise ir.CheckError(
            "the layers' caches cannot be stacked",
            differ,
            "Use --layout per-layer (fuse-kv-io{layout=per-layer})",
        )
    record(model, FuseKvIo.name, "the stacked cache", f"{differ}; the layout is per-layer")
    return False


def _mask_kinds(
    model: ir.Model,
    interface: Interface,
    layers: Sequence[CacheLayer],
    unraised: Mapping[CacheLayer, Unraised],
) -> list[tuple[_Kind, ...]]:
    """The window and the bias of each layer's mask, of all that read its cache."""
    prober = masks.Prober(model, interface)
    seen: dict[ir.Value | None, _Kind] = {}
    kinds: list[tuple[_Kind, ...]] = []
    for layer in layers:
        if layer.block is None:
            kinds.append(((unraised[layer].window, unraised[layer].bias),))
            continue
        by_mask = [(attention_sinks.mask_of(block), block) for block in layer.blocks]
        for mask, block in by_mask:
            if mask not in seen:
                seen[mask] = _kind(prober, block)
        kinds.append(tuple(seen[mask] for mask, _ in by_mask))
    return kinds


def _kind(prober: masks.Prober, block: ir.Node) -> _Kind:
    mask = attention_sinks.mask_of(block)
    if mask is None:
        if not attribute(block, "is_causal", 0):
            raise ir.CheckError(
                f"attention {block.name} sees later tokens",
                "it has no mask and is not causal",
                "Only causal language models can be cached",
            )
        return None, None
    hidden = -float("inf") if mask.dtype == ir.DataType.BOOL else None
    try:
        found = masks.recognise(prober, mask, [], hidden)
    except NoMatch as miss:
        raise ir.CheckError(
            f"the mask of attention {block.name} is not one that the runtime can make",
            str(miss),
            "Causal masks, with or without a sliding window or ALiBi, are supported",
        ) from miss
    return found.window, found.bias


@dataclass(frozen=True)
class _Shape:
    """Heads K of a block's cache, and the sizes of a key and a value."""

    heads: int
    key: int
    value: int

    def __str__(self) -> str:
        return f"{self.heads} heads with keys of {self.key} and values of {self.value}"


def _cache_shape(layer: CacheLayer) -> _Shape:
    for past, present in zip(layer.past, layer.present, strict=True):
        if past.dtype != present.dtype:
            raise ir.CheckError(
                f"the export takes the cache {past.name} in {past.dtype} and gives it back in "
                f"{present.dtype}",
                "what one step returns is no input of the next",
                "Export the model in float32; compiling rounds it to --dtype",
            )
    key, value = (shape_of(past) for past in layer.past)
    if len(key) == 4 and len(value) == 4 and key[1] == value[1]:
        heads, size, width = key[1], key[3], value[3]
        if isinstance(heads, int) and isinstance(size, int) and isinstance(width, int):
            return _Shape(heads, size, width)
    raise ir.CheckError(
        f"the cache {layer.past[0].name} is no [B, K, P, D] with K and D numbers",
        f"its keys are [{', '.join(map(str, key))}] and its values [{', '.join(map(str, value))}]",
        "Export the model with its heads and sizes as numbers",
    )


def _drop_outputs(
    model: ir.Model, logits: ir.Value, layers: Sequence[CacheLayer], recurrent: Sequence[State]
) -> None:
    """Everything but the logits leaves the interface; the states come back under their names."""
    served = {present for layer in layers for present in layer.present}
    served |= {state.present for state in recurrent}
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


def _mask_inputs(layer: CacheLayer, kinds: Sequence[int | None]) -> dict[int | None, ir.Value]:
    dtype = layer.past[0].dtype
    shape: tuple[Dim, ...] = (BATCH, 1, SEQ, CAPACITY + SEQ)
    ordered = sorted(set(kinds), key=lambda window: (window is not None, window or 0))
    return {w: _input(mask_name(w), dtype, shape) for w in ordered}


def _biased(
    model: ir.Model,
    mask_inputs: Mapping[int | None, ir.Value],
    kinds: Sequence[_Kind],
    by: str,
) -> tuple[dict[_Kind, ir.Value], list[ir.Value]]:
    """The mask of each kind [B, 1 or N, S, C+S], and the input that biases are made of, if any.

    The runtime gives the position of each key; only it knows how many cache slots are valid.
    """
    masks_of = {kind: mask_inputs[kind[0]] for kind in kinds}
    if all(bias is None for _, bias in masks_of):
        return masks_of, []
    dtype = next(iter(mask_inputs.values())).dtype
    positions = _input(KEY_POSITIONS, dtype, (1, 1, 1, CAPACITY + SEQ))
    with Builder(model) as op:
        for kind, mask in list(masks_of.items()):
            bias = kind[1]
            if bias is not None and dtype is not None:
                masks_of[kind] = op.Add(mask, alibi.times_slopes(op, bias, positions, dtype))
        insert(op, next(iter(model.graph)), by=by)
    return masks_of, [positions]


def _input(name: str, dtype: ir.DataType | None, shape: Sequence[Dim]) -> ir.Value:
    assert dtype is not None
    return ir.Value(name=name, shape=to_shape(shape), type=ir.TensorType(dtype))


@dataclass(frozen=True)
class _Past:
    """The new cache inputs, and each block's key and value of them."""

    inputs: list[ir.Value]
    parts: list[tuple[ir.Value, ir.Value]]


def _past_stacked(model: ir.Model, layers: Sequence[CacheLayer], shapes: Sequence[_Shape]) -> _Past:
    count = 2 * len(layers)
    heads, size = shapes[0].heads, shapes[0].key
    dtype = layers[0].past[0].dtype
    past = _input(PAST, dtype, (BATCH * count, heads, CAPACITY, size))
    op = Builder(model)
    parts = op.Split(past, axis=0, num_outputs=count, _outputs=count)
    insert(op, next(iter(model.graph)), by=FuseKvIo.name)
    return _Past([past], list(zip(parts[0::2], parts[1::2], strict=True)))


def _past_per_layer(
    model: ir.Model, layers: Sequence[CacheLayer], shapes: Sequence[_Shape]
) -> _Past:
    inputs: list[ir.Value] = []
    for number, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        dtype = layer.past[0].dtype
        for role, size in (("key", shape.key), ("value", shape.value)):
            axes = (BATCH, shape.heads, CAPACITY, size)
            inputs.append(_input(f"{PAST}.{number}.{role}", dtype, axes))
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
        sink = attention_sinks.find(block)
        keys, values = k, v
        if sink is not None:
            k, v = sink.key, sink.value
            keys, values, mask = attention_sinks.append(op, k, v, mask, sink.column)
        # The standard wants presents wherever there are pasts, and ONNX Runtime insists.
        y, *_ = op.Attention(q, keys, values, mask, *pasts, _outputs=3, **options)
        splice(op, [block.outputs[0]], [y], by=by, matched=[block])
    return [k, v]


def _keep(
    model: ir.Model, block: Unraised, mask: ir.Value, pasts: tuple[ir.Value, ir.Value], by: str
) -> list[ir.Value]:
    """Let attention that was not raised read the new cache and mask; its new keys and values.

    They are [B, K, S, D] each.
    """
    record(
        model,
        by,
        block.where,
        "its attention was not raised: it copies its cache, to join it with the new keys and "
        "values, at every step",
    )
    unraised_attention.attach(model, block, mask, by)
    for old, new in zip(block.layer.past, pasts, strict=True):
        old.replace_all_uses_with(new)
    return list(block.new)


def _resize(
    model: ir.Model,
    interface: Interface,
    layers: Sequence[CacheLayer],
    mask: ir.Value,
    parts: Sequence[tuple[ir.Value, ir.Value]],
) -> None:
    """Read lengths off the new inputs where unraised attention reads them off the old ones."""
    for layer, new in zip(layers, parts, strict=True):
        for old, part in zip(layer.past, new, strict=True):
            for node in old.consumers():
                if node.op_type == "Shape":
                    node.replace_input_with(0, part)
    if interface.attention_mask is None:
        return
    for node in interface.attention_mask.consumers():
        if node.op_type == "Shape":
            start, end = attribute(node, "start", 0), attribute(node, "end", None)
            axes = [0, 3][slice(start, end)]  # of [B, 1, S, C+S]
            with Builder(model) as op:
                sizes = op.Gather(op.Shape(mask), axes, axis=0)
                splice(op, [node.outputs[0]], [sizes], by=FuseKvIo.name)


def _emit(
    model: ir.Model,
    new: Sequence[ir.Value],
    shapes: Sequence[_Shape],
    stacked: bool,
    by: str,
) -> None:
    """The new keys and values as outputs.

    Those of raised attention are [B, S, K*D], and are joined so, and split by head after; where
    all are [B, K, S, D] that is what is joined.
    """
    whole = all(len(shape_of(value)) == 4 for value in new)
    sizes = [size for shape in shapes for size in (shape.key, shape.value)]
    heads = [shape.heads for shape in shapes for _ in range(2)]
    with Builder(model) as op:
        if stacked and whole:
            outputs, names = [op.Concat(*new, axis=0)], [PRESENT]
        elif stacked:
            flat = [_flat(op, *of) for of in zip(new, heads, sizes, strict=True)]
            outputs = [_by_head(op, op.Concat(*flat, axis=0), heads[0], sizes[0])]
            names = [PRESENT]
        else:
            # An Identity, since one value may be both, and already bear another output's name.
            outputs = [
                op.Identity(value)
                if len(shape_of(value)) == 4
                else _by_head(op, value, count, size)
                for value, count, size in zip(new, heads, sizes, strict=True)
            ]
            names = [f"present.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(new))]
        insert(op, list(model.graph)[-1], by=by)
    taken = {value.name: value for value in all_values(model.graph)}
    for output, name in zip(outputs, names, strict=True):
        if name in taken:  # what unraised attention joins bore it, as the exported output
            taken[name].name = fresh_name(model.graph, f"{name}_joined")
        output.name = name
        model.graph.outputs.append(output)


def _flat(op: Builder, value: ir.Value, heads: int, size: int) -> ir.Value:
    """[B, S, K*D], of the same or of [B, K, S, D]."""
    if len(shape_of(value)) == 3:
        return value
    return op.Reshape(op.Transpose(value, perm=[0, 2, 1, 3]), [0, 0, heads * size])


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
                "`omforge explain` lists what was left alone, and why",
            )
