"""Give a raised decoder that reads whole texts a past, so that it can go on from earlier tokens.

Before::

    y = Attention<q_num_heads=N, kv_num_heads=K>(q, k, v, causal mask of S tokens)

After::

    y, present.{l}.key, present.{l}.value = Attention<...>(
        q, k, v, causal mask of P + S tokens, past_key_values.{l}.key, past_key_values.{l}.value)

with positions as an input where the graph counted them from 0. An export in two files (Optimum's
decoder_model.onnx and decoder_with_past_model.onnx) says what any number of tokens gives in the
first of them alone: the second may take one token only, and need no causal mask for it.

Attention must be all that mixes tokens, and every table must be read by position. Both are checked:
the first by shapes, the second by running what makes the table at two places of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from omforge import ir
from omforge.ir.dims import Dim, symbol, symbols
from omforge.ir.edit import remove_dead, take_name
from omforge.ir.evaluate import Cutout, EvaluationError
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, known_ints, to_shape
from omforge.recognition.attention import masks
from omforge.recognition.derived_positions import feed_positions
from omforge.recognition.interface import Interface, activations, find_interface
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, insert, splice

SEQ, PAST = symbol("seq"), symbol("past")

_ALWAYS_MIX = {
    *("Conv", "ConvTranspose", "CumSum", "Scan", "Loop", "If", "RNN", "GRU", "LSTM", "Trilu"),
    *("Pad", "AveragePool", "MaxPool", "CausalConvWithState", "LinearAttention"),
}


@dataclass(frozen=True)
class AddPast(Pass):
    """Give the attention of a decoder without a cache a past, and its positions an input."""

    name: ClassVar[str] = "add-past"
    changes_interface: ClassVar[bool] = True

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of attention blocks that got a past, 0 where there is one.

        Raises:
            InputError: The graph is no causal LM.
            CheckError: Something else than causal attention mixes tokens, or counts them from 0.
        """
        infer_model(model)
        interface = find_interface(model)
        if interface.caches:
            return 0
        blocks = [node for node in model.graph if _is_attention(node)]
        kinds = _kinds(model, interface, blocks)
        live = activations(model)
        for node in model.graph:
            if _mixes_tokens(node, live):
                raise ir.CheckError(
                    f"{ir.describe(node)} mixes tokens, and is no attention that was raised",
                    "what it gave for earlier tokens would have to be kept, too",
                    "Export the model with its past (Optimum: --task text-generation-with-past)",
                )
        positions = feed_positions(model, interface, live, (), flags=False, by=self.name)
        ids = interface.input_ids
        if positions is not None and positions is not interface.position_ids:
            model.graph.inputs.insert(list(model.graph.inputs).index(ids) + 1, positions)
            take_name(model.graph, positions, str(positions.name))
        interface = replace(interface, position_ids=positions)
        for output in list(model.graph.outputs):
            if output is not interface.logits:
                model.graph.outputs.remove(output)
        _attach(model, interface, blocks, kinds)
        remove_dead(model)
        infer_model(model)
        _check_mask(interface)
        _check_tables(model, interface)
        return len(blocks)


def _is_attention(node: ir.Node) -> bool:
    return node.op_type == "Attention" and node.domain == ""


def _kinds(model: ir.Model, interface: Interface, blocks: Sequence[ir.Node]) -> list[masks.Mask]:
    """What each block's mask lets through; it is causal."""
    if not blocks:
        raise ir.CheckError(
            "the model cannot be given a past",
            "no attention was raised",
            "`omforge explain` says what stopped each",
        )
    prober = masks.Prober(model, interface)
    seen: dict[ir.Value, masks.Mask] = {}
    found: list[masks.Mask] = []
    for block in blocks:
        mask = block.inputs[3] if len(block.inputs) > 3 else None
        if mask is None:
            causal = bool(attribute(block, "is_causal", 0))
            found.append(masks.Mask(None, padding=False, zero_rows=False))
        else:
            if mask not in seen:
                seen[mask] = _recognised(prober, block, mask)
            causal = seen[mask].causal
            found.append(seen[mask])
        if not causal:
            raise ir.CheckError(
                f"{ir.describe(block)} sees later tokens",
                "a model that does cannot go on from earlier ones",
                "Only decoders can be given a past",
            )
    return found


def _recognised(prober: masks.Prober, block: ir.Node, mask: ir.Value) -> masks.Mask:
    hidden = -float("inf") if mask.dtype == ir.DataType.BOOL else None
    try:
        return masks.recognise(prober, mask, [], hidden)
    except NoMatch as miss:
        raise ir.CheckError(
            f"the mask of {ir.describe(block)} is none that can be made for a past",
            str(miss),
            "Causal masks, with or without a sliding window or ALiBi, are supported",
        ) from miss


# --- what else would need a past --------------------------------------------------------------


def _mixes_tokens(node: ir.Node, live: set[ir.Value]) -> bool:
    """Whether what a node gives for one token depends on others of the text."""
    inputs = [value for value in node.inputs if value is not None and value in live]
    if not inputs or _is_attention(node) or _reads_shapes(node):
        return False
    if node.op_type in _ALWAYS_MIX:
        return True
    shapes = [shape_of(value) for value in inputs]
    if node.op_type == "MatMul" and len(inputs) == 2:
        return _of_seq(shapes[0][-1:])
    axes = list(_axes(node))
    if not any(_of_seq(shape[axis : axis + 1]) for shape, axis in zip(shapes, axes, strict=False)):
        return False
    # Taking some tokens is no mixing where nothing attends to what is left: the last one's logits.
    return node.op_type not in ("Slice", "Gather", "Split") or _reaches_attention(node)


def _reads_shapes(node: ir.Node) -> bool:
    """Whether a node reads shapes alone."""
    return node.op_type in ("Shape", "Size")


def _of_seq(shape: Sequence[Dim]) -> bool:
    return any("seq" in symbols(dim) for dim in shape)


def _axes(node: ir.Node) -> Iterator[int]:
    """For each axis that a node works along: counted from the front of its first input."""
    rank = len(shape_of(node.inputs[0]))
    found: list[int] = []
    if node.op_type.startswith("Reduce"):
        given = known_ints(node.inputs[1]) if len(node.inputs) > 1 else None
        found = list(range(rank)) if given is None else [int(axis) for axis in given]
    elif node.op_type == "Slice":
        given = known_ints(node.inputs[3]) if len(node.inputs) > 3 else None
        found = list(range(rank)) if given is None else [int(axis) for axis in given]
    elif node.op_type in ("Concat", "Split", "Gather", "Softmax", "LogSoftmax", "TopK", "ArgMax"):
        default = -1 if node.op_type in ("Softmax", "LogSoftmax", "TopK") else 0
        found = [attribute(node, "axis", default)]
    elif node.op_type == "LayerNormalization" or node.op_type == "RMSNormalization":
        start: int = attribute(node, "axis", -1)
        found = list(range(start % rank, rank))
    for axis in found:
        yield axis % rank if rank else 0


def _reaches_attention(node: ir.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        for value in pending.pop().outputs:
            for user in value.consumers():
                if _is_attention(user):
                    return True
                if user not in seen:
                    seen.add(user)
                    pending.append(user)
    return False


# --- the rewrite ------------------------------------------------------------------------------


def _attach(
    model: ir.Model,
    interface: Interface,
    blocks: Sequence[ir.Node],
    kinds: Sequence[masks.Mask],
) -> None:
    """Let each block read a past, under a mask that is as long."""
    names = Names(model)
    batch = shape_of(interface.input_ids)[0]
    given = interface.attention_mask
    if given is not None:
        total = PAST + shape_of(interface.input_ids)[1]
        given.shape = to_shape((*shape_of(given)[:-1], total))
    caches: list[tuple[ir.Value, ir.Value]] = []
    made: dict[tuple[masks.Mask, ir.DataType], ir.Value] = {}
    presents: list[ir.Value] = []
    for layer, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
        query, key, value = block.inputs[:3]
        assert query is not None
        assert key is not None
        assert value is not None
        assert query.dtype is not None
        heads = _heads(block, key)
        pasts = [
            ir.Value(
                name=names.unique(f"past_key_values.{layer}.{role}"),
                shape=to_shape((batch, heads, PAST, _size(block, new, heads))),
                type=ir.TensorType(query.dtype),
            )
            for role, new in (("key", key), ("value", value))
        ]
        model.graph.inputs.extend(pasts)
        caches.append((pasts[0], pasts[0]))
        if (kind, query.dtype) not in made:
            with Builder(model) as op:
                of_past = replace(interface, caches=tuple(caches))
                made[kind, query.dtype] = masks.build(op, of_past, kind, query.dtype)
                insert(op, block, by=AddPast.name, names=names)
        with Builder(model) as op:
            options: dict[str, Any] = {
                name: a.value for name, a in block.attributes.items() if name != "is_causal"
            }
            inputs = [query, key, value, made[kind, query.dtype], *pasts]
            new = op.node("Attention", inputs, options, outputs=3)
            splice(
                op, [block.outputs[0]], [new.outputs[0]], by=AddPast.name, matched=[block],
                names=names,
            )  # fmt: skip
        for role, present in zip(("key", "value"), new.outputs[1:], strict=True):
            take_name(model.graph, present, f"present.{layer}.{role}")
            presents.append(present)
    model.graph.outputs.extend(presents)


def _heads(block: ir.Node, key: ir.Value) -> int:
    shape = shape_of(key)
    heads = attribute(block, "kv_num_heads", 0) if len(shape) == 3 else shape[1]
    return heads if isinstance(heads, int) else 0


def _size(block: ir.Node, new: ir.Value, heads: int) -> Dim:
    shape = shape_of(new)
    last = shape[-1] if shape else 0
    if len(shape) == 3 and isinstance(last, int) and heads:
        return last // heads
    if len(shape) == 4:
        return last
    raise ir.CheckError(
        f"{ir.describe(block)} has keys or values of unknown size", "", "Export it with its sizes"
    )


# --- what may still count from 0 --------------------------------------------------------------


def _check_mask(interface: Interface) -> None:
    """The padding mask is as long as past and new now: only what was built may read it."""
    if interface.attention_mask is None:
        return
    for node in interface.attention_mask.consumers():
        if AddPast.name not in node.metadata_props.get("rewritten_by", "").split(","):
            raise ir.CheckError(
                "the model cannot be given a past",
                f"{ir.describe(node)} reads the attention mask of the new tokens alone",
                "Export the model with its past (Optimum: --task text-generation-with-past)",
            )


def _check_tables(model: ir.Model, interface: Interface) -> None:
    """What varies from token to token without being made of tokens follows their positions."""
    live = activations(model)
    opset = model.opset_imports[""]
    for node in model.graph:
        if not any(output in live for output in node.outputs):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value in live or not _varying(shape_of(value)):
                continue
            if (_is_attention(node) and index == 3) or value is interface.position_ids:
                continue
            if not _follows_positions(value, interface, opset):
                raise ir.CheckError(
                    f"{value.name}, which {ir.describe(node)} reads, counts tokens from the first",
                    "behind a past it would be what it is for the first tokens of a text",
                    "Export the model with its past (Optimum: --task text-generation-with-past)",
                )


def _varying(shape: Sequence[Dim]) -> list[int]:
    """The axes that are not of one size for all texts: of tokens, or of unknown size."""
    return [axis for axis, dim in enumerate(shape) if symbols(dim) - {"batch"}]


def _follows_positions(value: ir.Value, interface: Interface, opset: int) -> bool:
    """Whether a value is for the last tokens of a text what it is for them alone."""
    axes = _varying(shape_of(value))
    given = interface.position_ids
    if len(axes) != 1:
        return False
    try:
        part = Cutout([value], [] if given is None else [given], opset)
        found: list[Any] = []
        for start, seq in ((0, 8), (5, 3)):
            feeds: dict[str, Any] = {}
            if given is not None and given.name is not None and given.dtype is not None:
                positions = np.arange(start, start + seq)[None]
                feeds[given.name] = positions.astype(given.dtype.numpy())
            bindings = {"batch": 1, "seq": seq, "past": start}
            found.append(part.run(feeds, bindings)[0])
    except EvaluationError:
        return False
    return np.array_equal(np.take(found[0], range(5, 8), axis=axes[0]), found[1])
