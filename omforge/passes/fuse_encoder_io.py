"""Give a model without a cache the masks of a batch whose rows are padded at the end.

Before (an encoder's, or an embedder's)::

    input_ids [B, S], attention_mask [B, S]  ->  last_hidden_state [B, S, H]
    y = Attention(q, k, v, Where(Expand(attention_mask), 0, low))

After::

    input_ids [B, S], attention_mask_full [B, 1, S, S] (additive)  ->  last_hidden_state [B, S, H]
    y = Attention(q, k, v, attention_mask_full)

A row begins at slot 0, so that positions are slots, whether the model counts them or is given them;
what is behind its end is hidden from it. What else reads the exported attention_mask (a mean over
tokens, a mask that was not recognised) still does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from omforge import ir
from omforge.ir.dims import symbol
from omforge.ir.edit import remove_dead, take_name
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, to_shape
from omforge.passes.last_token_logits import keeps_last
from omforge.recognition.attention import masks
from omforge.recognition.derived_positions import POSITION_IDS
from omforge.recognition.fixed_inputs import find_fixed
from omforge.recognition.interface import Interface, find_interface, states
from omforge.recognition.step_names import INPUT_IDS, LOGITS_INDEX, MASK, MASK_CAUSAL, MASK_FULL
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, splice

BATCH, SEQ = symbol("batch"), symbol("seq")


@dataclass(frozen=True)
class FuseEncoderIo(Pass):
    """Take a cacheless model's masks from the caller, and each row's own last token."""

    name: ClassVar[str] = "fuse-encoder-io"
    changes_interface: ClassVar[bool] = True

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of attention blocks that read a new mask, and of last tokens picked.

        A mask that is none of those that the runtime makes stays, and is an event.

        Raises:
            InputError: The model has a cache or a recurrent state, or takes whole masks.
            CheckError: An input is used that the runtime cannot feed.
        """
        infer_model(model)
        interface = find_interface(model)
        carried = [past for past, _ in (*interface.caches, *states(model, interface))]
        if carried:
            raise ir.InputError(
                f"the input {carried[0].name} carries earlier tokens from step to step",
                "a model that is run once for a text has none",
                "Serve it as what generates: fuse-kv-io",
            )
        whole = [interface.attention_mask, *interface.extra]
        for given in whole:
            if given is None or len(shape_of(given)) != 4 or "mask" not in (given.name or ""):
                continue
            raise ir.InputError(
                f"the input {given.name} is a whole mask, [B, 1, S, S]",
                "only the caller knows what it lets through, and no padding can be hidden by it",
                "Export the model with an attention_mask [batch, sequence]",
            )
        if interface.embedded:
            raise ir.InputError(
                f"the input {interface.input_ids.name} is embeddings in place of tokens",
                "without a cache there is nothing yet that feeds them",
                "Export the model with token ids",
            )
        made = _new_masks(model, interface, self.name)
        count = sum(len(blocks) for _, blocks in made.values())
        for value, blocks in made.values():
            for block in blocks:
                block.resize_inputs(max(4, len(block.inputs)))
                block.replace_input_with(3, value)
                block.attributes.pop("is_causal", None)
        picked = _pick_last(model, interface, self.name)
        remove_dead(model)
        fixed = find_fixed(model, interface)
        served = {*interface.by_token, *fixed}
        for value in interface.extra:
            if value.uses() and value not in served:
                raise ir.CheckError(
                    f"the input {value.name} is used, and the runtime has nothing for it",
                    "it is no number for each token, nor a float of fixed size given once for a "
                    f"text; its shape is [{', '.join(map(str, shape_of(value)))}]",
                    "Export the model without it",
                )
        for value, name in (
            (interface.input_ids, INPUT_IDS),
            (interface.position_ids, POSITION_IDS),
            (interface.attention_mask, MASK),
        ):
            if value is not None:
                take_name(model.graph, value, name)
        masks_made = [value for value, _ in made.values()]
        kept = [interface.position_ids, *interface.by_token, *picked, interface.attention_mask]
        kept += [*masks_made, *fixed]
        model.graph.inputs.clear()
        model.graph.inputs.append(interface.input_ids)
        model.graph.inputs.extend(value for value in kept if value is not None and value.uses())
        infer_model(model)
        return count + (len(picked) > 0)


def mask_name(causal: bool, window: int | None) -> str:
    """The name of the input that carries a mask of this kind."""
    name = MASK_CAUSAL if causal else MASK_FULL
    return name if window is None else f"{name}_w{window}"


_New = dict[str, tuple[ir.Value, list[ir.Node]]]


def _new_masks(model: ir.Model, interface: Interface, by: str) -> _New:
    """The mask inputs by name, in order, with the blocks that read each."""
    prober = masks.Prober(model, interface)
    kinds: dict[ir.Value | None, masks.Mask | None] = {}
    found: _New = {}
    for block in _blocks(model):
        given = block.inputs[3] if len(block.inputs) > 3 else None
        if given not in kinds:
            kinds[given] = _kind(model, prober, block, given, by)
        kind = kinds[given]
        query = block.inputs[0]
        if kind is None or query is None or query.dtype is None:
            continue
        name = mask_name(kind.causal, kind.window)
        if name not in found:
            shape = to_shape((BATCH, 1, SEQ, SEQ))
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(query.dtype))
            found[name] = (value, [])
        found[name][1].append(block)
    return dict(sorted(found.items()))


def _blocks(model: ir.Model) -> Iterator[ir.Node]:
    """Attention of a text to itself."""
    for node in model.graph:
        if node.op_type != "Attention" or node.domain != "":
            continue
        query, key = (shape_of(value) for value in node.inputs[:2])
        axis = -2
        if len(query) == len(key) >= 3 and query[axis] == key[axis]:
            yield node


def _kind(
    model: ir.Model, prober: masks.Prober, block: ir.Node, mask: ir.Value | None, by: str
) -> masks.Mask | None:
    """What its mask lets through; None where it stays."""
    if mask is None:
        return masks.Mask(None, False, False, causal=bool(attribute(block, "is_causal", 0)))
    hidden = -float("inf") if mask.dtype == ir.DataType.BOOL else None
    try:
        found = masks.recognise(prober, mask, [], hidden)
    except NoMatch as miss:
        record(model, by, mask, f"it is made in the graph, of attention_mask: {miss}")
        return None
    if found.bias is not None:
        record(model, by, mask, "it is made in the graph, for it has a bias by position")
        return None
    return found


def _pick_last(model: ir.Model, interface: Interface, by: str) -> list[ir.Value]:
    """Take each row's own last token where the graph takes that of the last slot.

    Returns:
        The input `logits_index` [B], flat row numbers b * S + i; none where nothing is taken so.
    """
    seq = shape_of(interface.input_ids)[1]
    places = [
        node
        for node in model.graph
        if keeps_last(node) and shape_of(node.inputs[0])[1] == seq and not isinstance(seq, int)
    ]
    if not places:
        return []
    index = ir.Value(
        name=LOGITS_INDEX, shape=to_shape((BATCH,)), type=ir.TensorType(ir.DataType.INT64)
    )
    names = Names(model)
    for node in places:
        hidden = node.inputs[0]
        assert hidden is not None
        width = shape_of(hidden)[-1]
        if not isinstance(width, int):
            record(model, by, node, f"it takes the last slot, of {width} numbers: padding, maybe")
            continue
        with Builder(model) as op:
            rows = op.Gather(op.Reshape(hidden, [-1, width]), index, axis=0)
            if len(shape_of(node.outputs[0])) == 3:
                rows = op.Unsqueeze(rows, np.array([1]))
            splice(op, [node.outputs[0]], [rows], by=by, names=names)
        record(model, by, node, "the last slot may be padding: it takes each row's last token")
    return [index]
