"""What a manifest says of the exported model's own interface, which whoever compares must feed."""

from __future__ import annotations

from collections.abc import Sequence

from omforge import ir
from omforge.bundle import manifest as m
from omforge.bundle.source import Source
from omforge.ir.digests import sha256
from omforge.ir.values import dims
from omforge.lowering.target import dtype_name
from omforge.recognition.cache.exported import exported_caches, exported_counters
from omforge.recognition.cache.states import find_states
from omforge.recognition.fixed_inputs import find_fixed
from omforge.recognition.interface import CacheLayer, cache_layers, find_interface


def export_interface(model: ir.Model, source: Source) -> m.Export:
    """The exporter's interface, layer by layer; of a raised model.

    Raises:
        CheckError: A cache or a state is none that can be carried from step to step.
    """
    interface = find_interface(model)
    layers = cache_layers(model, interface)
    states = find_states(model, interface)
    fixed = find_fixed(model, interface)
    served = {*(state.past for state in states), *fixed, *interface.by_token}
    caches = _caches(model, layers)

    def names(values: Sequence[ir.Value]) -> tuple[str, str]:
        key, value = (v.name or "" for v in values)
        return key, value

    return m.Export(
        path=source.recorded,
        sha256=sha256(source.graph),
        input_ids=interface.input_ids.name,
        attention_mask=interface.attention_mask.name if interface.attention_mask else None,
        position_ids=interface.position_ids.name if interface.position_ids else None,
        past=() if caches else tuple(names(layer.past) for layer in layers),
        present=() if caches else tuple(names(layer.present) for layer in layers),
        logits=interface.logits.name or "",
        extra=tuple(tensor_spec(value) for value in interface.extra if value not in served),
        # The cache's: logits may be cast to float32 at the end of a model in half precision.
        dtype=dtype_name((layers[0].past[0] if layers else interface.logits).dtype),
        states=tuple(names((state.past, state.present)) for state in states),
        caches=caches,
        counters=tuple(m.Counter(c.input, c.counts) for c in exported_counters(model)),
        fixed=_names(fixed),
        token_inputs=_names(interface.by_token),
    )


def encode_export(model: ir.Model, source: Source) -> m.Export:
    """The exporter's interface of a model without a cache."""
    interface = find_interface(model)
    fixed = find_fixed(model, interface)
    served = {*interface.by_token, *fixed}
    outputs = model.graph.outputs
    return m.Export(
        path=source.recorded,
        sha256=sha256(source.graph),
        input_ids=interface.input_ids.name,
        attention_mask=interface.attention_mask.name if interface.attention_mask else None,
        position_ids=interface.position_ids.name if interface.position_ids else None,
        past=(),
        present=(),
        logits=interface.logits.name or "",
        extra=tuple(tensor_spec(value) for value in interface.extra if value not in served),
        dtype=dtype_name(interface.logits.dtype),
        token_inputs=_names(interface.by_token),
        fixed=_names(fixed),
        outputs=_names(outputs),
    )


def _names(values: Sequence[ir.Value]) -> tuple[str, ...]:
    return tuple(value.name or "" for value in values)


def _caches(model: ir.Model, layers: Sequence[CacheLayer]) -> tuple[m.ExportCache, ...]:
    """The export's own cache, where a pass gave the model another."""
    changed = exported_caches(model)
    if not changed:
        return ()
    found = [m.ExportCache(c.input, c.shape, c.output, c.returns, c.axis) for c in changed]
    served = {name for cache in changed for name in cache.serves}
    for layer in layers:
        for past, present in zip(layer.past, layer.present, strict=True):
            if past.name not in served:
                spec = tensor_spec(past)
                found.append(m.ExportCache(spec.name, spec.shape, present.name or "", "whole", 2))
    return tuple(found)


def tensor_spec(value: ir.Value) -> m.TensorSpec:
    """A value as a manifest writes it."""
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in dims(value) or ())
    return m.TensorSpec(value.name or "", dtype_name(value.dtype), shape)
