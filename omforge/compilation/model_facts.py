"""What a manifest says of a model: its interface as exported, its cache, its masks, its sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from omforge import ir
from omforge.bundle import manifest as m
from omforge.compilation.export_interface import tensor_spec
from omforge.ir.values import attribute, constant_tensor, dims
from omforge.lowering.target import dtype_name
from omforge.recognition.cache.states import is_state, renewed
from omforge.recognition.config import ModelConfig
from omforge.recognition.fixed_inputs import find_fixed
from omforge.recognition.interface import CacheLayer, find_interface, table_rows
from omforge.recognition.lengths.bounds import Bound
from omforge.recognition.step_names import MASK_FULL, PAST, WRITE_INDICES
from omforge.recognition.views import shape_of

_STEPS_TO_HEAD = 6
"""Casts, caps and reshapes behind a head."""

_SAMPLE = 1 << 20
"""Numbers of a head that tell how large they are."""


def cache_sizes(layers: Sequence[CacheLayer]) -> tuple[m.LayerSizes, ...]:
    """K and the sizes of a key and a value by layer; zeros where fuse-kv-io will refuse it."""
    pasts = (layer.past for layer in layers)
    return tuple(m.LayerSizes(_size(k, 1), _size(k, 3), _size(v, 3)) for k, v in pasts)


def query_heads(
    layers: Sequence[CacheLayer], config: ModelConfig | None, sizes: Sequence[m.LayerSizes]
) -> tuple[int, ...]:
    """N by layer: of its raised attention; else of another with its K, config.json's, or K."""
    told = config.heads if config is not None else None
    raised: dict[int, int] = {}
    for layer, size in zip(layers, sizes, strict=True):
        if layer.block is not None:
            raised.setdefault(size.kv_heads, attribute(layer.block, "q_num_heads", size.kv_heads))

    def of(layer: CacheLayer, kv_heads: int) -> int:
        if layer.block is not None:
            return attribute(layer.block, "q_num_heads", kv_heads)
        if kv_heads in raised:
            return raised[kv_heads]
        return told if told and kv_heads and told % kv_heads == 0 else kv_heads

    return tuple(of(layer, size.kv_heads) for layer, size in zip(layers, sizes, strict=True))


def _layout(model: ir.Model) -> Literal["stacked", "per-layer"]:
    """The layout that fuse-kv-io gave the cache."""
    return "stacked" if any(v.name == PAST for v in model.graph.inputs) else "per-layer"


def _size(value: ir.Value, axis: int) -> int:
    shape = dims(value)
    dim = shape[axis] if shape is not None and len(shape) == 4 else 0
    return dim if isinstance(dim, int) else 0


def generate_facts(
    model: ir.Model,
    config: ModelConfig | None,
    bounds: Sequence[Bound],
    sizes: Sequence[m.LayerSizes],
    heads: int,
) -> m.ModelFacts:
    """What is known of a model that generates; `sizes` are by layer, `heads` the first one's N."""
    config = config or ModelConfig()
    kv_heads, size = sizes[0].kv_heads, sizes[0].head_size
    logits = dims(model.graph.outputs[0]) or (0,)
    vocab = logits[-1] if isinstance(logits[-1], int) else config.vocab_size or 0
    return m.ModelFacts(
        model_type=config.model_type,
        layers=len(sizes),
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        hidden_size=config.hidden_size or heads * size,
        vocab_size=vocab,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        max_positions=min((bound.tokens for bound in bounds), default=None),
    )


def kv_cache(
    model: ir.Model, sizes: Sequence[m.LayerSizes], *, capacity: int, dtype: str
) -> m.KvCache:
    """The cache that fuse-kv-io made; `sizes` are by layer, `capacity` is C."""
    in_place = any(value.name == WRITE_INDICES for value in model.graph.inputs)
    return m.KvCache(
        layout=_layout(model),
        layers=len(sizes),
        kv_heads=sizes[0].kv_heads,
        head_size=sizes[0].head_size,
        value_head_size=sizes[0].value_head_size,
        capacity=capacity,
        dtype=dtype,
        layer_sizes=tuple(sizes) if len(set(sizes)) > 1 else (),
        in_place=in_place,
    )


def mask_specs(model: ir.Model) -> tuple[m.MaskSpec, ...]:
    """The additive masks in a graph's interface."""
    found: list[m.MaskSpec] = []
    for value in model.graph.inputs:
        name = value.name or ""
        if name.startswith("attention_mask") and len(dims(value) or ()) == 4:
            _, _, window = name.partition("_w")
            causal = not name.startswith(MASK_FULL)
            found.append(m.MaskSpec(name, int(window) if window else None, causal))
    return tuple(found)


def state_specs(model: ir.Model) -> tuple[m.StateSpec, ...]:
    """The recurrent states in a graph's interface."""
    specs = [tensor_spec(value) for value in model.graph.inputs if is_state(value)]
    return tuple(m.StateSpec(s.name, renewed(s.name), s.dtype, s.shape) for s in specs)


def encode_facts(
    model: ir.Model, config: ModelConfig | None, bounds: Sequence[Bound]
) -> m.ModelFacts:
    """What is known of a model without a cache; 0 where neither graph nor config.json tells."""
    interface = find_interface(model)
    config = config or ModelConfig()
    blocks = [node for node in model.graph if node.op_type == "Attention"]
    heads = config.heads or next((attribute(b, "q_num_heads", 0) for b in blocks), 0)
    return m.ModelFacts(
        model_type=config.model_type,
        layers=config.layers or len(blocks),
        heads=heads,
        kv_heads=next((attribute(b, "kv_num_heads", heads) for b in blocks), heads),
        head_size=0,
        hidden_size=config.hidden_size or 0,
        vocab_size=table_rows(interface.input_ids) or config.vocab_size or 0,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        max_positions=min((bound.tokens for bound in bounds), default=None),
        labels=config.labels,
    )


def embeddings_of(model: ir.Model) -> m.Embeddings | None:
    """What is fed in place of token ids; None where ids are."""
    interface = find_interface(model)
    width = shape_of(interface.input_ids)[-1] if interface.embedded else 0
    if not isinstance(width, int) or not width:
        return None
    return m.Embeddings(width, _head_scale(interface.logits, width))


def _head_scale(logits: ir.Value, width: int) -> float:
    """The deviation of the head's weights: embeddings are about as large, where not the same."""
    pending = [logits]
    for _ in range(_STEPS_TO_HEAD):
        node = pending.pop().producer() if pending else None
        if node is None:
            break
        for value in node.inputs:
            tensor = None if value is None else constant_tensor(value)
            if tensor is not None and len(tensor.shape) == 2 and width in tuple(tensor.shape):
                some = tensor.numpy().ravel()[:_SAMPLE].astype(np.float64)
                return float(some.std()) or 1.0
        pending = [v for v in node.inputs[:1] if v is not None]
    return 1.0


def no_cache(dtype: str) -> m.KvCache:
    """The cache of a model that has none."""
    return m.KvCache("per-layer", 0, 0, 0, 0, 0, dtype)


def token_inputs(model: ir.Model) -> tuple[m.TokenInput, ...]:
    """Further integers of each token, in a graph's interface; before shapes are bound."""
    return tuple(
        m.TokenInput(value.name or "", dtype_name(value.dtype), table_rows(value) or None)
        for value in find_interface(model).by_token
    )


def fixed_inputs(model: ir.Model, dtype: str) -> tuple[m.FixedInput, ...]:
    """What is given once for a sequence, in a graph's interface; before shapes are bound.

    Args:
        model: Before its floats are converted.
        dtype: What they become.
    """
    found: list[m.FixedInput] = []
    for value in find_fixed(model, find_interface(model)):
        spec = tensor_spec(value)
        of_rows = "batch" in spec.shape
        floats = value.dtype is not None and value.dtype.is_floating_point()
        kind = "memory" if of_rows else "adapter"
        # Lowering makes every int64 input int32.
        made = dtype if floats else spec.dtype.replace("int64", "int32")
        found.append(m.FixedInput(spec.name, made, spec.shape, kind))
    return tuple(found)


def output_specs(model: ir.Model, dtype: str) -> tuple[m.TensorSpec, ...]:
    """The outputs of a graph without a cache, floats converted; before shapes are bound.

    Raises:
        InputError: One has a size that neither the batch nor the length says.
    """
    found: list[m.TensorSpec] = []
    for value in model.graph.outputs:
        spec = tensor_spec(value)
        odd = [dim for dim in spec.shape if isinstance(dim, str) and dim not in ("batch", "seq")]
        if value.shape is None or odd:
            raise ir.InputError(
                f"the output {value.name} is {spec.dtype}[{', '.join(map(str, spec.shape))}]",
                "its sizes must be numbers, the batch or the length of the text",
                "Export the model without it",
            )
        floats = value.dtype is not None and value.dtype.is_floating_point()
        found.append(dataclasses.replace(spec, dtype=dtype) if floats else spec)
    return tuple(found)
