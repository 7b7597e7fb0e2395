"""Stage `serve`: weights as they are stored, a cache of fixed capacity, facts for a manifest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omforge import ir
from omforge.bundle import manifest as m
from omforge.compilation.export_interface import encode_export
from omforge.compilation.first_step import described
from omforge.compilation.footprint import Footprint, spare_bytes
from omforge.compilation.model_facts import (
    cache_sizes,
    embeddings_of,
    encode_facts,
    fixed_inputs,
    generate_facts,
    kv_cache,
    no_cache,
    output_specs,
    query_heads,
    token_inputs,
)
from omforge.compilation.quantize_options import (
    check_stored,
    kv_passes,
    turn_weights,
    weight_passes,
)
from omforge.compilation.raising import Raised
from omforge.compilation.task import encode_passes
from omforge.compilation.trail import Trail
from omforge.compilation.work import Work
from omforge.lowering.legalize.ge_cache import in_place_obstacle
from omforge.passes.cache_in_place import CacheInPlace
from omforge.passes.convert_precision import DTYPES, ConvertPrecision
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.passes.tabulate_rotary import TabulateRotary
from omforge.quantization.linear import find_linears, stored_as_integers
from omforge.recognition.interface import cache_layers, find_interface
from omforge.rewriting.events import Event, events, record
from omforge.rewriting.pipeline import Pipeline

if TYPE_CHECKING:
    from omforge.rewriting.base import Pass


@dataclass(frozen=True)
class Facts:
    """What a manifest says of a canonical graph ahead of its lowering; the fields are its own."""

    model: m.ModelFacts
    kv: m.KvCache
    export: m.Export
    token_inputs: tuple[m.TokenInput, ...]
    fixed: tuple[m.FixedInput, ...]
    outputs: tuple[m.TensorSpec, ...]
    embeddings: m.Embeddings | None


@dataclass(frozen=True)
class Canonical:
    """The graph that is lowered, and the CPU's reference.

    Attributes:
        raised: Where it is from.
        model: The graph, its float weights in the export's own dtype, its lengths open.
        facts: What a manifest says of it.
        matrices: Weights of linear layers that could be quantised.
        events: What passes have to tell.
        trail: What has been done.
    """

    raised: Raised
    model: ir.Model
    facts: Facts
    matrices: int
    events: tuple[Event, ...]
    trail: Trail


def serve(raised: Raised, work: Work) -> Canonical:
    """Quantise the weights, and give the cache its capacity.

    Raises:
        InputError: What is asked does not fit the model.
        CheckError: The cache is none that the runtime can own, or a budget is too small.
    """
    checked, options, model = raised.checked, raised.options, raised.model
    encode = raised.task == "encode"
    stored = stored_as_integers(model)
    check_stored(stored, checked.soc, options.dtype)
    export = _export(raised)
    layers = () if encode else cache_layers(model, find_interface(model))
    sizes = cache_sizes(layers)
    heads = query_heads(layers, checked.config, sizes)
    matrices = len(find_linears(model)) if checked.scheme is not None else 0
    # Attention that shares a layer's cache has scales of its own for it.
    reading = [n * (1 + len(layer.sharers)) for n, layer in zip(heads, layers, strict=True)]
    weights = weight_passes(
        checked.scheme,
        checked.soc,
        raised.calibration,
        work.meter("quantise weights"),
        budget=options.budget,
        footprint=_footprint(raised, spare_bytes(options.kv_dtype, reading, sizes)),
        stored=bool(stored),
    )
    fixed = encode_passes(options.context or 0) if encode else _cache_passes(raised, work)
    obstacle = _obstacle(raised)
    if obstacle:
        record(model, CacheInPlace.name, "the cache", f"it is not written in place: {obstacle}")
    trail = raised.trail.and_then(work.run(model, Pipeline((*weights, *fixed))))
    trail = trail.and_then(canonical=model.graph.num_nodes())

    name = options.float_name
    if encode:
        of_model, kv = encode_facts(model, checked.config, raised.bounds), no_cache(name)
    else:
        of_model = generate_facts(model, checked.config, raised.bounds, sizes, heads[0])
        dtype = name if options.kv_dtype == "fp16" else "int8"
        kv = kv_cache(model, sizes, capacity=options.context or 0, dtype=dtype)
    facts = Facts(
        model=of_model,
        kv=kv,
        export=export,
        token_inputs=token_inputs(model),
        fixed=fixed_inputs(model, name),
        outputs=output_specs(model, name) if encode else (),
        embeddings=embeddings_of(model),
    )
    return Canonical(raised, model, facts, matrices, events(model), trail)


def _export(raised: Raised) -> m.Export:
    """The export's own interface, which whoever compares must feed."""
    model, source = raised.model, raised.checked.source
    if raised.task == "encode":
        export = encode_export(model, source)
    else:
        export = described(model, raised.chosen, source)
    call = raised.call
    return dataclasses.replace(export, longest_call=None if call is None else call.tokens)


def _cache_passes(raised: Raised, work: Work) -> tuple[Pass, ...]:
    """What gives the cache its capacity."""
    options = raised.options
    capacity = options.context or 0
    tokens = "blank" if raised.checked.counting else raised.calibration
    meter = work.meter("measure the cache", "tensors")
    return (
        LastTokenLogits(),
        FuseKvIo(options.layout),
        *kv_passes(options.kv_dtype, tokens, capacity, meter),
        TabulateRotary(capacity),
        *_in_place(raised),
    )


def _in_place(raised: Raised) -> tuple[Pass, ...]:
    # ATC's ONNX parser has no operator that writes an input.
    if raised.options.front == "onnx" or _obstacle(raised):
        return ()
    return (CacheInPlace(),)


def _obstacle(raised: Raised) -> str:
    """Why the target cannot write the cache in place, where the front could say it."""
    options = raised.options
    if options.front != "air" or raised.task == "encode":
        return ""
    dtype = DTYPES[options.dtype]
    cached = ir.DataType.INT8 if options.kv_dtype == "int8" else dtype
    return in_place_obstacle(raised.checked.soc, cached)


def _footprint(raised: Raised, spare: int) -> Footprint:
    """What counts the constants of the last graph that is planned."""
    options, plan = raised.options, raised.plans[-1]
    soc = raised.checked.soc
    steps = (
        turn_weights(soc),
        LastTokenLogits(),
        FuseKvIo(options.layout),
        TabulateRotary(options.context or 0),
        *_in_place(raised),
        ConvertPrecision(options.dtype),
        plan.bind(options),
    )
    return Footprint(steps, soc, plan.symbols, dict(options.forms), spare, options.front)
