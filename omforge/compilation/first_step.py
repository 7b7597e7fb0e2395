"""Exports that write the first step of a text apart: in a file of its own, or in a branch.

Optimum's decoder_model.onnx reads a whole text and decoder_with_past_model.onnx goes on from it;
decoder_model_merged.onnx holds both under an If. What goes on is raised alone where it takes any
number of new tokens. Where it takes one only, or was traced with one and so masks nothing, what
reads whole texts is raised and given a past (`add-past`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from omforge import ir
from omforge.bundle import manifest as m
from omforge.bundle.source import Source
from omforge.compilation.export_interface import export_interface, tensor_spec
from omforge.ir.digests import sha256
from omforge.ir.infer import infer_model
from omforge.passes import make_pipeline
from omforge.passes.bind_memory import BindMemory
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.passes.take_branches import TakeBranches, cache_flag
from omforge.recognition.config import ModelConfig
from omforge.recognition.coverage import measure
from omforge.recognition.interface import find_interface, memory_of, tokens_of
from omforge.recognition.views import shape_of
from omforge.rewriting.pipeline import Pipeline


@dataclass
class Chosen:
    """The graph of an export that is raised.

    Attributes:
        model: As it was exported, but for the branch that was taken.
        past_is_missing: Whether it reads whole texts, and is given a past once it is raised.
        decoder: What goes on from a past, canonical, where `model` does not: its interface is the
            export's.
    """

    model: ir.Model
    past_is_missing: bool = False
    decoder: ir.Model | None = None


def choose_graph(source: Source, config: ModelConfig | None) -> Chosen:
    """Load the graph of an export that says what any number of tokens gives.

    Where the first step is written apart it takes raising what goes on from it to tell whether that
    will do; an export of one graph is loaded, and no more.

    Raises:
        InputError: A file cannot be read.
    """
    model = ir.load(source.graph)
    if source.first is None and not any(node.op_type == "If" for node in model.graph):
        return Chosen(model)
    if source.first is not None and _takes_one_token(model):
        return _first_of(source)
    trial = ir.load(source.graph)
    try:
        make_pipeline("raise").run(trial, ())
    except ir.OmforgeError:  # which is told again where it is no trial
        return Chosen(model)
    apart = source.first is not None or cache_flag(trial) is not None
    if not apart or _goes_on(trial, config):
        return Chosen(model)
    first = _first_of(source)
    try:
        made = first.model.clone()
        make_pipeline("raise,add-past").run(made, ())
    except ir.OmforgeError:
        return Chosen(model)  # whose own faults are told next
    return first


def _takes_one_token(model: ir.Model) -> bool:
    tokens = tokens_of(model.graph)
    shape = shape_of(tokens) if tokens is not None else ()
    return len(shape) == 2 and isinstance(shape[1], int)


def _goes_on(model: ir.Model, config: ModelConfig | None) -> bool:
    """Whether several new tokens can follow a past: tried, since one-token graphs look alike."""
    if not find_interface(model).caches or not measure(model, config).complete:
        return False
    try:
        Pipeline((BindMemory(8), FuseKvIo())).run(model.clone(), ())
    except ir.OmforgeError:
        return False
    return True


def _first_of(source: Source) -> Chosen:
    """What reads whole texts, and beside it what goes on."""
    decoder = ir.load(source.graph)
    make_pipeline("canonicalize").run(decoder, ())
    if source.first is not None:
        return Chosen(ir.load(source.first), past_is_missing=True, decoder=decoder)
    whole = ir.load(source.graph)
    TakeBranches(cached=False).run(whole)
    return Chosen(whole, past_is_missing=True, decoder=decoder)


def described(model: ir.Model, chosen: Chosen, source: Source) -> m.Export:
    """The interface of an export of one file or two, with a branch for the first step or not.

    Args:
        model: The chosen graph, raised.
        chosen: What was chosen.
        source: The export.

    Raises:
        CheckError: The first step gives back other caches than the others read.
    """
    model = chosen.decoder or model
    # What was chosen for taking any number of tokens shows that the other does not.
    one_token = chosen.decoder is not None
    export = replace(export_interface(model, source), one_token=one_token)
    # What makes a text's first step makes memory's keys, too, which are given here.
    memory = bool(memory_of(find_interface(model)))
    flag = cache_flag(model)
    if flag is not None:
        extra = tuple(spec for spec in export.extra if spec.name != flag.input)
        told = m.CacheFlag(flag.input, flag.cached, always=memory)
        export = replace(export, extra=extra, cache_flag=told)
    if source.first is None or memory:
        return export
    return replace(export, first=_first_step(source, export))


def _first_step(source: Source, export: m.Export) -> m.FirstStep:
    assert source.first is not None
    model = ir.load(source.first)
    infer_model(model)
    found = find_interface(model)
    wanted = [name for pair in export.present for name in pair]
    wanted += [cache.output for cache in export.caches]
    outputs = [str(value.name) for value in model.graph.outputs]
    missing = [name for name in wanted if name not in outputs]
    if missing:
        raise ir.CheckError(
            f"{source.first.name} and {source.graph.name} are no two parts of one export",
            f"the first does not give back {', '.join(missing)}; it has {', '.join(outputs)}",
            "Export both again into one folder, or give the file to compile",
        )
    return m.FirstStep(
        file=source.first.name,
        sha256=sha256(source.first),
        input_ids=found.input_ids.name or "",
        attention_mask=found.attention_mask.name if found.attention_mask else None,
        position_ids=found.position_ids.name if found.position_ids else None,
        logits=found.logits.name or "",
        extra=tuple(tensor_spec(value) for value in found.extra),
    )
