"""What a model is for, found by what its graph has, and what a model without a cache is lowered to.

A model that carries earlier tokens in a cache continues a text; one that carries nothing takes a
whole text in one run: an encoder, an embedder, a reranker. A causal language model without a cache
could be either, and whoever exported it is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from omforge import ir
from omforge.bundle import manifest as m
from omforge.compilation.context import choose_context
from omforge.compilation.options import CompileOptions, TaskOption
from omforge.ir.values import attribute
from omforge.passes.fuse_encoder_io import FuseEncoderIo
from omforge.passes.tabulate_rotary import TabulateRotary
from omforge.recognition.attention import masks
from omforge.recognition.interface import Interface, find_interface, states, table_rows
from omforge.recognition.lengths.bounds import Bound
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.match import NoMatch

DEFAULT_LENGTHS = (128, 512)

_KINDS = {
    "generate": "a decoder with a KV cache: it continues a text",
    "encode": "no cache: it takes a whole text in one run",
}


def find_task(model: ir.Model, asked: TaskOption = "auto") -> m.Task:
    """What a raised model is for.

    Args:
        model: Raised.
        asked: What the user says; `auto` finds it.

    Raises:
        InputError: The model cannot do what is asked, or is a language model without its cache.
    """
    interface = find_interface(model)
    carried = [past for past, _ in (*interface.caches, *states(model, interface))]
    if carried and asked == "encode":
        raise ir.InputError(
            "--task encode does not fit the model",
            f"its input {carried[0].name} carries earlier tokens from step to step",
            "Leave --task away, or export the model without its past",
        )
    if carried:
        return "generate"
    if asked == "encode":
        return "encode"
    if asked == "generate" or _is_language_model(model, interface):
        raise ir.InputError(
            "the model has no KV cache",
            "no input is joined with new keys or values into an output, so that each new token "
            "would run the whole text again",
            "Export it with its past (Optimum: --task text-generation-with-past); --task encode "
            "lowers it as it is, one run a text",
        )
    return "encode"


def task_text(made: m.Manifest) -> str:
    """One line for a report: what was found."""
    fed = ", and is fed by embeddings" if made.embeddings is not None else ""
    given = "".join(f"; {spec.name} is given once" for spec in made.fixed)
    return f"{made.task}: {_KINDS[made.task]}{fed}{given}"


def _is_language_model(model: ir.Model, interface: Interface) -> bool:
    """Whether each token gets logits of a vocabulary, and no attention looks ahead.

    A masked language model has such logits, too, and looks ahead.
    """
    logits, rows = shape_of(interface.logits), table_rows(interface.input_ids)
    if len(logits) != 3 or not rows:
        return False
    width = logits[2]
    # A head may be padded to a multiple of something, and so may an embedding.
    if not isinstance(width, int) or 5 * min(width, rows) < 4 * max(width, rows):
        return False
    return not _looks_ahead(model, interface)


def _looks_ahead(model: ir.Model, interface: Interface) -> bool:
    prober = masks.Prober(model, interface)
    seen: set[ir.Value | None] = set()
    for node in model.graph:
        if node.op_type != "Attention" or node.domain != "" or attribute(node, "is_causal", 0):
            continue
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask in seen:
            continue
        seen.add(mask)
        try:
            hidden = -float("inf") if mask is not None and mask.dtype == ir.DataType.BOOL else None
            if mask is None or not masks.recognise(prober, mask, [], hidden).causal:
                return True
        except NoMatch:  # of another kind; the other layers may tell
            continue
    return False


def encode_options(options: CompileOptions, bounds: Sequence[Bound]) -> CompileOptions:
    """Options of a model without a cache: `prefill` are its lengths, the largest is the context.

    Raises:
        InputError: A length is above a bound, or an option is for caches alone.
    """
    for given, what in (
        (options.kv_dtype != "fp16", f"--kv-dtype {options.kv_dtype}"),
        (bool(options.budget), f"--budget {options.budget}"),
        (options.calibration is not None, "--calibration"),
    ):
        if given:
            raise ir.InputError(
                f"{what} does not fit the model",
                "it has no cache, and what is measured for this is measured on text it generates",
                "Leave it away",
            )
    lengths = {*options.prefill, *(() if options.context is None else (options.context,))}
    longest = choose_context(max(lengths, default=None), bounds)
    if not lengths:
        lengths = {min(length, longest) for length in DEFAULT_LENGTHS}
        longest = max(lengths)
    return dataclasses.replace(options, prefill=tuple(sorted(lengths)), context=longest)


def encode_passes(context: int) -> tuple[Pass, ...]:
    """What comes between raising and lowering, for a model without a cache."""
    return FuseEncoderIo(), TabulateRotary(context)
