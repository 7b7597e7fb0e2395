"""Fused attention in GE graphs: what each SoC's kernels take, and whether it is right."""

from __future__ import annotations

import numpy as np

from omforge.air.graph import Air, integer, number, text
from omforge.probe.air_models import AirModel
from omforge.probe.onnx_models import exact, numbers
from omforge.probe.questions.controls import AIR, DEVICE
from omforge.probe.record import (
    FAILS,
    REFUSED,
    RIGHT,
    WRONG,
    Array,
    Experiment,
    Probe,
    once,
)
from omforge.probe.reference import attention

_WHOLE = 2147483647
_INCRE = frozenset(("310p", "910b", "910_93"))
_FUSED_INFER = frozenset(("910b", "910_93", "950"))
_HEAD, _KEYS = 64, 128


def _decode(
    op: str,
    heads: int,
    kv_heads: int,
    *,
    masked: bool = False,
    lengths: int = 0,
    scale: Array | None = None,
) -> tuple[Air, dict[str, Array], Array]:
    """One token over a cache of 128; `lengths` of it valid, told at run time; int8 by `scale`."""
    q_shape, kv_shape = (1, heads, 1, _HEAD), (1, kv_heads, _KEYS, _HEAD)
    air = AirModel()
    stored = "float16" if scale is None else "int8"
    q = air.data("q", "float16", *q_shape)
    k, v = air.data("k", stored, *kv_shape), air.data("v", stored, *kv_shape)
    feeds: dict[str, Array] = {"q": numbers(*q_shape)}
    for seed, name in ((1, "k"), (2, "v")):
        wide = numbers(*kv_shape, seed=seed)
        feeds[name] = wide if scale is None else np.rint(exact(wide) * 100).astype(np.int8)
    inputs: dict[str, str | list[str]] = {"query": q, "key": [k], "value": [v]}
    hidden = np.zeros((1, 1, 1, _KEYS), bool)
    if masked:
        hidden[..., 100:] = True
        inputs["atten_mask"] = air.data("mask", "bool", 1, 1, 1, _KEYS)
        feeds["mask"] = hidden
    if lengths:
        hidden[..., lengths:] = True
        name = "actual_seq_lengths" + ("_kv" if op == "FusedInferAttentionScore" else "")
        inputs[name] = air.data("lengths", "int64", 1)
        feeds["lengths"] = np.array([lengths], np.int64)
    keys, values = feeds["k"], feeds["v"]
    if scale is not None:
        inputs["antiquant_scale"] = air.const("antiquant", scale)
        per_head = exact(scale).reshape(2, 1, kv_heads, 1, _HEAD)
        keys = (exact(keys) * per_head[0]).astype(np.float16)
        values = (exact(values) * per_head[1]).astype(np.float16)
    common = {
        "num_heads": integer(heads),
        "input_layout": text("BNSD"),
        "num_key_value_heads": integer(0 if kv_heads == heads else kv_heads),
    }
    given: dict[str, tuple[str, tuple[int, ...]]] = {"attention_out": ("float16", q_shape)}
    if op == "IncreFlashAttention":
        (y,) = air.op(op, "att", inputs, given, scale_value=number(0.125), **common)
    else:
        given["softmax_lse"] = ("float32", (1,))
        common |= {"pre_tokens": integer(_WHOLE), "next_tokens": integer(_WHOLE)}
        y, _ = air.op(op, "att", inputs, given, scale=number(0.125), **common)
    return air.air([y]), feeds, attention(feeds["q"], keys, values, hidden)


def _asked(
    op: str,
    heads: int,
    kv_heads: int,
    *flags: str,
    masked: bool = False,
    lengths: int = 0,
    int8: bool = False,
) -> Experiment:
    scale = None
    if int8:
        scale = (np.abs(numbers(2, kv_heads, 1, _HEAD)) + np.float16(0.5)) / np.float16(128)
    air, feeds, wanted = _decode(op, heads, kv_heads, masked=masked, lengths=lengths, scale=scale)
    return once(air, feeds, wanted, flags=("--precision_mode_v2=origin", *flags))


def _prompt(length: int) -> Experiment:
    shape = (1, 4, length, _HEAD)
    air = AirModel()
    q, k, v = (air.data(name, "float16", *shape) for name in "qkv")
    mask = air.data("mask", "bool", 1, 1, length, length)
    (y,) = air.op(
        "PromptFlashAttention",
        "att",
        {"query": q, "key": k, "value": v, "atten_mask": mask},
        {"attention_out": ("float16", shape)},
        num_heads=integer(4),
        scale_value=number(0.125),
        pre_tokens=integer(_WHOLE),
        next_tokens=integer(_WHOLE),
        input_layout=text("BNSD"),
        num_key_value_heads=integer(0),
        sparse_mode=integer(0),
    )
    feeds = {name: numbers(*shape, seed=seed) for seed, name in enumerate("qkv")}
    feeds["mask"] = np.triu(np.ones((length, length), bool), 1)[None, None]
    return once(air.air([y]), feeds, attention(feeds["q"], feeds["k"], feeds["v"], feeds["mask"]))


_MEANS = {
    RIGHT: "the form may be emitted here",
    WRONG: "it gives other numbers: MatMul and softmax take its place",
    FAILS: "it does not run: MatMul and softmax take its place",
    REFUSED: "atc refuses it: MatMul and softmax take its place",
}
_AFTER = (AIR, DEVICE)
_INCRE_OP, _INFER_OP = "IncreFlashAttention", "FusedInferAttentionScore"

PROBES = (
    Probe(
        "incre-attention",
        "Is IncreFlashAttention right with as many key heads as query heads?",
        lambda _: _asked(_INCRE_OP, 4, 4, masked=True),
        _MEANS,
        expected=RIGHT,
        families=_INCRE,
        after=_AFTER,
        settles="decode attention in the front `air`",
    ),
    Probe(
        "incre-attention-grouped",
        "Is it with two key heads for four query heads (310P's documents say no)?",
        lambda _: _asked(_INCRE_OP, 4, 2, masked=True),
        _MEANS,
        families=_INCRE,
        after=_AFTER,
        settles="whether grouped heads need repeated keys",
    ),
    Probe(
        "incre-attention-int8",
        "Does it read an int8 cache by its antiquant inputs?",
        lambda _: _asked(_INCRE_OP, 4, 4, masked=True, int8=True),
        _MEANS,
        families=_INCRE,
        after=_AFTER,
        settles="the int8 cache of the front `air`",
    ),
    Probe(
        "incre-attention-lengths",
        "May actual_seq_lengths be an input of the model?",
        lambda _: _asked(_INCRE_OP, 4, 4, lengths=100),
        _MEANS | {RIGHT: "it may: a step reads the valid part of the cache alone"},
        families=_INCRE,
        after=_AFTER,
        settles="whether a cache that is not full is read whole",
    ),
    Probe(
        "incre-attention-lengths-sunk",
        "May it with --tiling_schedule_optimize=1?",
        lambda _: _asked(_INCRE_OP, 4, 4, "--tiling_schedule_optimize=1", lengths=100),
        _MEANS | {RIGHT: "it may, tiling done on the device"},
        families=_INCRE,
        after=_AFTER,
        settles="whether a cache that is not full is read whole",
    ),
    Probe(
        "prompt-attention-16",
        "Is a masked PromptFlashAttention right for 48 tokens (its code asks for multiples of 16)?",
        lambda _: _prompt(48),
        _MEANS | {RIGHT: "first chunks of a multiple of 16 may be one kernel"},
        families=_INCRE,
        after=_AFTER,
        settles="the alignment of a prefill chunk",
    ),
    Probe(
        "prompt-attention-128",
        "Is it for 128 tokens (its document asks for multiples of 128)?",
        lambda _: _prompt(128),
        _MEANS | {RIGHT: "first chunks of a multiple of 128 may be one kernel"},
        expected=RIGHT,
        families=_INCRE,
        after=_AFTER,
        settles="the alignment of a prefill chunk",
    ),
    Probe(
        "fused-infer-attention",
        "Is FusedInferAttentionScore right, with grouped heads and a mask?",
        lambda _: _asked(_INFER_OP, 4, 2, masked=True),
        _MEANS,
        expected=RIGHT,
        families=_FUSED_INFER,
        after=_AFTER,
        settles="attention in the front `air`",
    ),
    Probe(
        "fused-infer-attention-int8",
        "Does it read an int8 cache by its antiquant inputs?",
        lambda _: _asked(_INFER_OP, 4, 2, masked=True, int8=True),
        _MEANS,
        families=_FUSED_INFER,
        after=_AFTER,
        settles="the int8 cache of the front `air`",
    ),
    Probe(
        "fused-infer-attention-lengths",
        "May its actual_seq_lengths_kv be an input of the model?",
        lambda _: _asked(_INFER_OP, 4, 2, lengths=100),
        _MEANS,
        families=_FUSED_INFER,
        after=_AFTER,
        settles="whether a cache that is not full is read whole",
    ),
)
