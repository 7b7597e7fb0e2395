"""ATC's own operators by way of the ONNX parser, where sources contradict each other."""

from __future__ import annotations

import numpy as np

from omforge.probe.onnx_models import (
    exact,
    int4_in_int32,
    int4_tensor,
    model,
    node,
    numbers,
)
from omforge.probe.questions.controls import ATC, DEVICE
from omforge.probe.record import (
    FAILS,
    REFUSED,
    RIGHT,
    TAKEN,
    WRONG,
    Array,
    Build,
    Experiment,
    Probe,
    fill,
    load,
    once,
    run,
)
from omforge.probe.reference import attention, rotated, softmax

NO_PLUGIN = "no-plugin"
_NO_PLUGIN = {"E13010": NO_PLUGIN}

_WHOLE = 2147483647


def _rotary(op: str, *shapes: tuple[int, ...], **attributes: int) -> Experiment:
    """One model for each shape [B, N, S, D]; all have to be right."""
    builds: list[Build] = []
    wanted: dict[str, Array] = {}
    arrays: dict[str, Array] = {}
    runs: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    for at, shape in enumerate(shapes):
        table = (1, 1, shape[2], shape[3])
        made = model(
            [node(op, ["x", "cos", "sin"], ["y"], **attributes)],
            {"x": ("float16", shape), "cos": ("float16", table), "sin": ("float16", table)},
            {"y": ("float16", shape)},
        )
        x, cos, sin = numbers(*shape), numbers(*table, seed=1), numbers(*table, seed=2)
        builds.append(Build(f"model{at}", made))
        arrays |= {f"x{at}": x, f"cos{at}": cos, f"sin{at}": sin}
        runs.append((f"model{at}", (f"x{at}", f"cos{at}", f"sin{at}"), (f"y{at}",)))
        wanted[f"y{at}"] = rotated(x, cos, sin)
    steps = (
        *load(*(build.name for build in builds)),
        *fill(**arrays),
        *(run(*each) for each in runs),
    )
    return Experiment(tuple(builds), steps, {RIGHT: wanted})


def _rotary_mul(_: str) -> Experiment:
    # Heads of 64, two rows, and a decode step of 32 heads: each outside the documented range.
    return _rotary("NPURotaryMul", (1, 8, 16, 64), (2, 4, 16, 128), (1, 32, 1, 128))


def _rotary_position(_: str) -> Experiment:
    return _rotary("NPURotaryPositionEmbedding", (1, 8, 16, 128), (2, 4, 16, 64), mode=0)


def _scaled_masked_softmax(_: str) -> Experiment:
    shape = (1, 2, 32, 64)
    made = model(
        [node("NPUScaledMaskedSoftmax", ["x", "mask"], ["y"], scale=1.0, fixed_triu_mask=0)],
        {"x": ("float16", shape), "mask": ("bool", (1, 1, 32, 64))},
        {"y": ("float16", shape)},
    )
    x = numbers(*shape)
    mask = np.arange(64)[None, None, None, :] > np.arange(32)[None, None, :, None]
    mask = np.broadcast_to(mask, (1, 1, 32, 64)).copy()
    mask[0, 0, 5] = True  # a row that is masked throughout, as padding has them
    partly = np.where(mask, -np.inf, exact(x))
    seen = np.where(mask, np.float32(-1e4), exact(x))
    with np.errstate(invalid="ignore"):
        infinite = softmax(partly).astype(np.float16)
    lowered = softmax(seen).astype(np.float16)  # equal shares in that row
    zeros = np.where(np.isnan(infinite), np.float16(0), infinite)
    values = {RIGHT: lowered, "zeros": zeros, "nan": infinite}
    return once(made, {"x": x, "mask": mask}, x, values=values, atol=2e-3)


def _empty_pse(_: str) -> Experiment:
    shape = (1, 4, 16, 64)
    made = model(
        [
            node(
                "NPUPromptFlashAttention",
                ["q", "k", "v", "pse", "mask"],
                ["y"],
                num_heads=4,
                input_layout="BNSD",
                scale_value=0.125,
                pre_tokens=_WHOLE,
                next_tokens=_WHOLE,
                num_key_value_heads=0,
                sparse_mode=0,
                inner_precise=0,
            )
        ],
        {
            **{name: ("float16", shape) for name in "qkv"},
            "mask": ("bool", (1, 1, 16, 16)),
        },
        {"y": ("float16", shape)},
        {"pse": np.zeros(0, np.float16)},
    )
    q, k, v = (numbers(*shape, seed=seed) for seed in range(3))
    mask = np.triu(np.ones((16, 16), bool), 1)[None, None]
    feeds = {"q": q, "k": k, "v": v, "mask": mask}
    return once(made, feeds, attention(q, k, v, mask))


def _weight_quant(weight: Array, scale: Array, **attributes: int) -> Experiment:
    """int8 [K, N] with scales [G, N], stored [N, K] and turned, as omforge writes it."""
    inner, columns = weight.shape
    groups = scale.shape[0]
    of_scale = np.ascontiguousarray(scale.T) if groups > 1 else scale.reshape(columns)
    nodes = [
        node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        node("NPUWeightQuantBatchMatmulV2", ["x", "wt", "scales"], ["y"], **attributes),
    ]
    name = "scale"
    if groups > 1:
        nodes.insert(1, node("Transpose", ["scale"], ["scale_t"], perm=[1, 0]))
        name = "scale_t"
    nodes[-1].input[2] = name
    made = model(
        nodes,
        {"x": ("float16", (4, inner))},
        {"y": ("float16", (4, columns))},
        {"w": np.ascontiguousarray(weight.T), "scale": of_scale},
    )
    x = numbers(4, inner, seed=3)
    whole = exact(weight) * np.repeat(exact(scale), inner // groups, axis=0)
    return once(made, {"x": x}, (exact(x) @ whole).astype(np.float16), atol=5e-2)


def _int8(inner: int, columns: int) -> Array:
    steps = np.arange(inner * columns, dtype=np.int64) * 37 % 255 - 127
    return steps.astype(np.int8).reshape(inner, columns)


def _weight_quant_groups(family: str) -> Experiment:
    # On 310P a group at all; elsewhere one that is no multiple of 32.
    size = 32 if family == "310p" else 16
    weight = _int8(128, 64)
    scale = (np.abs(numbers(128 // size, 64)) + np.float16(0.1)) / np.float16(64)
    return _weight_quant(weight, scale, antiquant_group_size=size)


def _int4(packed: bool) -> Experiment:
    weight = (np.arange(128 * 64, dtype=np.int64) * 37 % 16 - 8).astype(np.int8).reshape(128, 64)
    scale = (np.abs(numbers(64)) + np.float16(0.1)) / np.float16(4)
    made = model(
        [node("NPUWeightQuantBatchMatmulV2", ["x", "w", "scale"], ["y"])],
        {"x": ("float16", (4, 128))},
        {"y": ("float16", (4, 64))},
        {"w": int4_in_int32(weight) if packed else int4_tensor(weight), "scale": scale},
    )
    x = numbers(4, 128, seed=3)
    return once(made, {"x": x}, (exact(x) @ (exact(weight) * exact(scale))).astype(np.float16))


def _dequant(scales: int, behind_matmul: bool = True) -> Experiment:
    steps = (np.arange(scales, dtype=np.float32) + 1) / 4096
    bits = steps.view(np.uint32) & np.uint32(0xFFFFE000)
    deq = bits.astype(np.uint64)
    rounded = bits.view(np.float32)
    if not behind_matmul:
        sums = np.arange(16 * 32, dtype=np.int32).reshape(16, 32)
        made = model(
            [node("AscendDequant", ["x", "deq"], ["y"], dtype=1)],
            {"x": ("int32", (16, 32))},
            {"y": ("float16", (16, 32))},
            {"deq": deq},
        )
        return once(made, {"x": sums}, (sums * rounded).astype(np.float16))
    weight = _int8(64, 32)
    made = model(
        [node("MatMul", ["x", "w"], ["s"]), node("AscendDequant", ["s", "deq"], ["y"], dtype=1)],
        {"x": ("int8", (16, 64))},
        {"y": ("float16", (16, 32))},
        {"w": weight, "deq": deq},
    )
    x = _int8(16, 64)
    product = x.astype(np.int32) @ weight.astype(np.int32)
    return once(made, {"x": x}, (product * rounded).astype(np.float16), atol=5e-2)


def _dynamic_quant(op: str, outputs: tuple[str, ...]) -> Experiment:
    shapes = {"y": ("int8", (16, 64))} | {name: ("float32", (16,)) for name in outputs[1:]}
    made = model([node(op, ["x"], outputs)], {"x": ("float16", (16, 64))}, shapes)
    x = numbers(16, 64)
    wide = exact(x)
    if op == "NPUDynamicQuant":
        scale = np.abs(wide).max(-1, keepdims=True) / 127
        y = np.rint(wide / scale)
    else:
        low, high = wide.min(-1, keepdims=True), wide.max(-1, keepdims=True)
        scale = (high - low) / 255
        y = np.rint(wide / scale + np.rint(-128 - low / scale))
    y = np.clip(y, -128, 127).astype(np.int8)
    return once(made, {"x": x}, y, atol=1.01, rtol=0.0, more_outputs=outputs[1:])


def _gelu_v2(_: str) -> Experiment:
    made = model(
        [node("NPUGeluV2", ["x"], ["y"], domain="npu", approximate="tanh")],
        {"x": ("float16", (4, 64))},
        {"y": ("float16", (4, 64))},
        opsets=(("", 16), ("npu", 1)),
    )
    x = numbers(4, 64)
    wide = exact(x)
    inner = np.sqrt(2 / np.pi, dtype=np.float32) * (wide + 0.044715 * wide**3)
    return once(made, {"x": x}, (0.5 * wide * (1 + np.tanh(inner))).astype(np.float16))


_FORM = {
    RIGHT: "the form may be chosen by the bytes that it moves",
    WRONG: "it gives other numbers: the form is refused",
    FAILS: "it does not run: the form is refused",
    REFUSED: "atc has no kernel for it: the form is refused",
    NO_PLUGIN: "this release has no ONNX plugin for it: the form is refused",
}
_FUSED = frozenset(("310p", "910b", "910_93"))
_QUANT = frozenset(("310p", "910b", "910_93", "950"))
_ON_DEVICE = (ATC, DEVICE)

PROBES = (
    Probe(
        "rotary-mul-beyond-its-document",
        "Is NPURotaryMul right for heads of 64, two rows, and 32 heads of one token?",
        _rotary_mul,
        _FORM | {RIGHT: "the documented range is too narrow: the rule is advice here"},
        expected=REFUSED,
        families=_FUSED,
        codes=_NO_PLUGIN,
        after=_ON_DEVICE,
    ),
    Probe(
        "rotary-position-embedding",
        "Is NPURotaryPositionEmbedding there, and right?",
        _rotary_position,
        _FORM,
        families=_QUANT,
        codes=_NO_PLUGIN,
        after=_ON_DEVICE,
    ),
    Probe(
        "scaled-masked-softmax",
        "What does NPUScaledMaskedSoftmax make of a row that is masked throughout?",
        _scaled_masked_softmax,
        _FORM
        | {
            RIGHT: "equal shares, as -10000 at masked places gives: the form may be chosen",
            "zeros": "zeros: the form may be chosen",
            "nan": "NaN, which padded rows would carry on: the form is refused",
        },
        families=_FUSED,
        codes=_NO_PLUGIN,
        after=_ON_DEVICE,
    ),
    Probe(
        "zero-element-pse",
        "Does NPUPromptFlashAttention take a pse of no elements for none?",
        _empty_pse,
        _FORM,
        families=_FUSED,
        codes=_NO_PLUGIN,
        after=_ON_DEVICE,
    ),
    Probe(
        "weight-quant-groups",
        "Does NPUWeightQuantBatchMatmulV2 take groups that its prototype or document excludes?",
        _weight_quant_groups,
        _FORM | {RIGHT: "it does, and is right: the rule is advice here"},
        expected=REFUSED,
        families=_QUANT,
        codes=_NO_PLUGIN,
        after=_ON_DEVICE,
    ),
    Probe(
        "int4-packing",
        "Is the first of eight int4 in the low bits of an int32?",
        lambda _: _int4(packed=True),
        _FORM | {RIGHT: "it is, as omforge packs them", WRONG: "it is not: int4 gives noise"},
        expected=RIGHT,
        families=_QUANT - {"310p"},
        codes=_NO_PLUGIN,
        after=_ON_DEVICE,
    ),
    Probe(
        "int4-initializer",
        "Does this release's parser take INT4 initializers?",
        lambda _: _int4(packed=False),
        _FORM,
        families=_QUANT - {"310p"},
        codes=_NO_PLUGIN,
        after=_ON_DEVICE,
    ),
    Probe(
        "dequant-per-output",
        "Does AscendDequant behind a MatMul take a scale for each output?",
        lambda _: _dequant(32),
        _FORM,
        expected=RIGHT,
        after=_ON_DEVICE,
    ),
    Probe(
        "dequant-alone",
        "Does AscendDequant work behind no MatMul?",
        lambda _: _dequant(32, behind_matmul=False),
        _FORM | {RIGHT: "it does: it need not follow a MatMul"},
        expected=REFUSED,
        after=_ON_DEVICE,
    ),
    Probe(
        "dynamic-quant",
        "Is NPUDynamicQuant there, and right?",
        lambda _: _dynamic_quant("NPUDynamicQuant", ("y", "scale")),
        _FORM,
        families=_QUANT,
        codes=_NO_PLUGIN,
        after=_ON_DEVICE,
    ),
    Probe(
        "dynamic-quant-v2",
        "Is NPUDynamicQuantV2 there, and right?",
        lambda _: _dynamic_quant("NPUDynamicQuantV2", ("y", "scale", "offset")),
        _FORM,
        families=_QUANT,
        codes=_NO_PLUGIN,
        after=_ON_DEVICE,
    ),
    Probe(
        "gelu-v2",
        "Is NPUGeluV2 there, and right?",
        _gelu_v2,
        _FORM,
        expected=RIGHT,
        codes=_NO_PLUGIN,
        after=_ON_DEVICE,
    ),
    Probe(
        "attention-plugins",
        "Has this release ONNX plugins for attention, rotary embedding and routing?",
        lambda _: Experiment(
            (
                Build(
                    "routing",
                    model(
                        [node("NPUMoeGatingTopKSoftmax", ["x"], ["y", "expert", "row"], k=2)],
                        {"x": ("float16", (16, 8))},
                        {
                            "y": ("float16", (16, 2)),
                            "expert": ("int32", (16, 2)),
                            "row": ("int32", (16, 2)),
                        },
                    ),
                ),
            )
        ),
        {
            TAKEN: "the plugins are there",
            NO_PLUGIN: "they are not: their operators give E13010",
            REFUSED: "the plugin is there, a kernel is not",
        },
        families=_FUSED,
        codes=_NO_PLUGIN,
        after=(ATC,),
    ),
)
