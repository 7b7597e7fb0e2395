"""What was raised, of what the model has: the contract that a fusion never fails in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from omforge import ir
from omforge.ir.values import dims, known_ints
from omforge.recognition.attention import masks
from omforge.recognition.attention.block import is_canonical
from omforge.recognition.attention.cross import cross_attention
from omforge.recognition.attention.scores import DYNAMIC
from omforge.recognition.attention.sinks import mask_of
from omforge.recognition.attention.softmaxes import weighs_values
from omforge.recognition.config import ModelConfig
from omforge.recognition.experts.block import find_blocks
from omforge.recognition.experts.routers import find_routers
from omforge.recognition.interface import activations, find_interface, memory_of, states
from omforge.recognition.rotary.operator import is_own
from omforge.recognition.views import scalar
from omforge.rewriting.events import Event, events, grouped
from omforge.rewriting.match import NoMatch

_OPTIONAL = ("experts",)
"""Kinds that are right as they are exported, and only cost more: a mixture of experts."""

_NORMS = ("RMSNormalization", "LayerNormalization")
_NORM_LEFTOVERS = ("ReduceMean", "ReduceSumSquare", "ReduceL2")


@dataclass(frozen=True)
class Covered:
    """One kind of block: how many were raised, of how many, and why the others were not.

    Attributes:
        found: How many were raised.
        expected: How many there are.
        missed: Why the others were not, one line each.
        reasons: The same, one line for all that say the same.
    """

    found: int
    expected: int
    missed: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether all were raised."""
        return self.found == self.expected


@dataclass(frozen=True)
class Coverage:
    """Blocks raised against blocks that the model has.

    Attributes:
        kinds: By kind: attention, rotary, norm, mlp, and experts where there are any.
        lost: Features that config.json promises and the graph does not have.
        unrecognised: Blocks of kinds that omforge does not know; they stay as they are, and are no
            failure.
    """

    kinds: dict[str, Covered] = field(default_factory=dict[str, Covered])
    lost: tuple[str, ...] = ()
    unrecognised: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every block of a kind that must be raised was, and no feature is lost."""
        required = (kind for name, kind in self.kinds.items() if name not in _OPTIONAL)
        return all(kind.complete for kind in required) and not self.lost

    def problems(self) -> list[str]:
        """Everything that is missing, one line each."""
        lines = [
            f"{name}: {kind.found} of {kind.expected}" + "".join(f"; {why}" for why in kind.reasons)
            for name, kind in self.kinds.items()
            if not kind.complete
        ]
        return [*lines, *self.lost]

    def to_json(self) -> dict[str, Any]:
        """Plain data for reports and the manifest."""
        kinds = {
            name: {"found": k.found, "expected": k.expected, "missed": list(k.missed)}
            for name, k in self.kinds.items()
        }
        return {**kinds, "lost": list(self.lost), "unrecognised": list(self.unrecognised)}


def measure(model: ir.Model, config: ModelConfig | None) -> Coverage:
    """Measure the coverage of a raised model, before `fuse-kv-io`.

    What the graph shows decides; config.json adds what it promises, so that a block which was not
    even recognised as one is missed too.
    """
    config = config or ModelConfig()
    ops = Counter(node.op_type for node in model.graph)
    told = events(model)
    attention, given = _attentions(model), ops["Attention"]
    left = given - attention + sum(n.op_type == "Softmax" and weighs_values(n) for n in model.graph)
    # A spelling without a softmax is known by its cache.
    layers = config.layers or max(attention + left, _cached(model))
    known = (config.attention_layers, _attending(model), layers)
    attending = next(number for number in known if number is not None)  # a state space has none
    cross = len(cross_attention(model))
    if config.encoder_decoder:
        # Of which of the two config.json's layers are, it does not say: the graph does.
        layers = _cached(model) or attention + left - cross
        attending = layers
    if cross or _has_memory(model):
        # Each layer attends twice, to its text and to memory.
        attending += max(cross, min(attending, attention + left - attending))
    dynamic = sum(event.reason == DYNAMIC for event in told)
    # No more than the layers that are left without attention: other softmaxes have biases too.
    other = min(dynamic, max(0, attending - attention))
    expected = attending - other
    if attention > expected:  # layers with two of them, as where a decoder reads an encoder
        expected = attention + left
    rotary = sum(n.op_type == "RotaryEmbedding" and not is_own(n) for n in model.graph)
    norms = sum(ops[name] for name in _NORMS)
    gates = sum(1 for node in model.graph if _is_gate(node))
    # Experts have an MLP each, as many as the exporter wrote out; a router is a curve too.
    curves = 0 if config.experts else sum(1 for node in model.graph if _is_curve(node))
    gated = layers if config.gated and not config.experts else gates + curves
    recurrent = _recurrent(model)
    if recurrent:
        # Their layers have gates and curves of their own, which nobody promised to raise.
        gated = max(gates, layers if config.gated and not config.experts else 0)
    kinds = {
        "attention": _covered(attention, expected, told, "fuse-attention"),
        "rotary": _covered(
            rotary,
            _rotations(model, ops["RotaryEmbedding"], attending, config),
            told,
            "fuse-rotary",
        ),
        "norm": _covered(
            norms, norms + sum(map(_is_norm_left, model.graph)), told, "fuse-rms-norm"
        ),
        "mlp": _covered(gates, gated, told, "fuse-swish", "fuse-gelu"),
    }
    routers = find_routers(model)
    if routers:
        blocks = len(find_blocks(model))
        passes = ("ungroup-experts", "take-choices", "dense-experts")
        kinds["experts"] = _covered(blocks, max(blocks, len(routers)), told, *passes)
    unrecognised = _unrecognised(model, kinds, told, recurrent)
    return Coverage(kinds, tuple(_lost(model, config)), tuple(unrecognised))


def _attentions(model: ir.Model) -> int:
    """`Attention` operators in the canonical form, which an exporter's own need not have."""
    try:
        caches = {past for past, _ in find_interface(model).caches}
    except ir.InputError:  # any graph can be explained, a causal LM or not
        caches = set[ir.Value]()
    blocks = (node for node in model.graph if node.op_type == "Attention" and node.domain == "")
    return sum(is_canonical(node, caches) for node in blocks)


def _recurrent(model: ir.Model) -> list[str]:
    """The names of the inputs that are recurrent states."""
    try:
        return [str(value.name) for value, _ in states(model, find_interface(model))]
    except ir.InputError:  # any graph can be explained, a causal LM or not
        return []


def _attending(model: ir.Model) -> int | None:
    """Layers with keys and values, where others carry a recurrent state; None without such."""
    try:
        interface = find_interface(model)
    except ir.InputError:  # any graph can be explained, a causal LM or not
        return None
    return len(interface.caches) // 2 if states(model, interface) else None


def _has_memory(model: ir.Model) -> bool:
    try:
        return bool(memory_of(find_interface(model)))
    except ir.InputError:
        return False


def _cached(model: ir.Model) -> int:
    """Layers with keys and values in a cache."""
    try:
        return len(find_interface(model).caches) // 2
    except ir.InputError:  # any graph can be explained, a causal LM or not
        return 0


def _is_norm_left(node: ir.Node) -> bool:
    """Whether it reduces as a norm does: along the last axis, towards a root of it and an epsilon.

    A mean of several hidden states, or the root alone that rescales one to another's magnitude, is
    no norm.
    """
    x = node.inputs[0] if node.inputs else None
    if x is None or node.op_type not in _NORM_LEFTOVERS or node.domain != "":
        return False
    given, shape = node.inputs[1] if len(node.inputs) > 1 else None, dims(x)
    axes = known_ints(given) if given is not None else None
    if shape is not None and axes is not None and axes not in ([-1], [len(shape) - 1]):
        return False
    # A vector that is divided by its length, as an embedding is in the end, keeps that from 0.
    return node.op_type not in ("ReduceMean", "ReduceL2") or not _is_magnitude(node)


def _is_magnitude(node: ir.Node) -> bool:
    """Whether a mean goes into a root, or is first kept from 0, with no epsilon added to it."""
    users = node.outputs[0].consumers()
    return bool(users) and all(user.op_type in ("Pow", "Sqrt", "Max", "Clip") for user in users)


def _rotations(model: ir.Model, found: int, attending: int, config: ModelConfig) -> int:
    """Rotary embeddings that the model has: those raised, and products with cosines that are left.

    Not every layer need rotate (some leave positions out of every fourth), so config.json alone
    says only that there are some.
    """
    tables = {node.outputs[0] for node in model.graph if node.op_type in ("Cos", "Sin")}
    left: list[ir.Node] = []
    if tables:
        live = activations(model)
        for node in model.graph:
            from_table = [value for value in node.inputs if value in tables]
            if not from_table:
                continue
            if node.op_type == "Mul" and any(value in live for value in node.inputs if value):
                left.append(node)
            elif node.op_type != "RotaryEmbedding":
                tables.update(value for value in node.outputs if value not in live)
    expected = found + _together(left, tables)
    return 2 * attending if config.rotary and not expected else expected


def _together(products: Iterable[ir.Node], tables: set[ir.Value]) -> int:
    """Rotations that products with cosines and sines belong to.

    A rotation is two products and their sum, or, pair by pair, four products of two values and two
    sums: those that share a factor or a sum are one.
    """
    leader: dict[ir.Value, ir.Value] = {}

    def find(value: ir.Value) -> ir.Value:
        while leader.setdefault(value, value) is not value:
            value = leader[value]
        return value

    for node in products:
        product = node.outputs[0]
        factors = [v for v in node.inputs if v is not None and v not in tables]
        sums = [user.outputs[0] for user, _ in product.uses() if user.op_type in ("Add", "Sub")]
        for other in (*factors, *sums):
            leader[find(other)] = find(product)
    return len({find(value) for value in leader})


def _unrecognised(
    model: ir.Model, kinds: dict[str, Covered], told: Iterable[Event], recurrent: list[str]
) -> Iterable[str]:
    """What is neither a block of a known kind nor around one: routers, loops, other softmaxes."""
    ops = Counter(node.op_type for node in model.graph)
    for op, what in (
        ("TopK", "an expert router"),
        ("Loop", "a recurrence"),
        ("Scan", "a recurrence"),
    ):
        if ops[op]:
            yield f"{ops[op]} x {op} ({what}): left as it is"
    if recurrent:
        shown = ", ".join(recurrent)
        yield f"{len(recurrent)} x recurrent state (linear attention or alike): {shown}"
    magnitudes = sum(n.op_type == "ReduceMean" and _is_magnitude(n) for n in model.graph)
    if magnitudes:
        yield f"{magnitudes} x root of a mean without an epsilon (a magnitude): left as it is"
    routed = sum(node.op_type == "NonZero" for node in model.graph)
    if routed:
        yield f"{routed} x NonZero (tokens chosen for an expert): their number is no fixed size"
    told = list(told)
    dynamic = [event for event in told if event.reason == DYNAMIC]
    if dynamic:
        yield f"{len(dynamic)} x attention with a bias of its own: {DYNAMIC}"
    if kinds["attention"].complete:
        softmaxes = [
            e
            for e in told
            if e.pass_name == "fuse-attention" and "Softmax" in e.where and e not in dynamic
        ]
        if softmaxes:
            yield f"{len(softmaxes)} x Softmax that is no attention: {softmaxes[0].reason}"


def _covered(found: int, expected: int, told: Iterable[Event], *by: str) -> Covered:
    if found == expected:
        return Covered(found, expected)
    missed = [event for event in told if event.pass_name in by]
    if not missed:
        met = f"{' and '.join(by)} met nothing like it: it is spelled in a way that is not known"
        return Covered(found, expected, (met,), (met,))
    return Covered(found, expected, tuple(map(str, missed)), tuple(grouped(missed)))


def _is_gate(node: ir.Node) -> bool:
    """Mul of an activation and what it gates."""
    if node.op_type != "Mul":
        return False
    producers = [v.producer() for v in node.inputs if v is not None]
    scalars = any(v is None or len(dims(v) or (0, 0)) < 2 for v in node.inputs)
    return not scalars and any(p is not None and p.op_type in ("Swish", "Gelu") for p in producers)


def _is_curve(node: ir.Node) -> bool:
    """Whether it is the curve of an activation that was not raised, gating something or not.

    A sigmoid may be written out, as 1 / (1 + exp(-x)); the 1 tells the tanh of a GELU from that of
    a softcap.
    """
    if node.domain != "" or node.op_type in ("Erf", "Sigmoid"):
        return node.domain == ""
    if node.op_type not in ("Tanh", "Exp"):
        return False
    users = node.outputs[0].consumers()
    sums = [user for user in users if user.op_type == "Add" and 1.0 in map(scalar, user.inputs)]
    if node.op_type == "Tanh":
        return bool(sums)
    below = (user for total in sums for user in total.outputs[0].consumers())
    return any(user.op_type in ("Div", "Reciprocal") for user in below)


def _lost(model: ir.Model, config: ModelConfig) -> Iterable[str]:
    if any(value.dtype == ir.DataType.BFLOAT16 for value in model.graph.inputs):
        yield (
            "the export computes in bfloat16, for which ONNX Runtime has no kernels, and what must "
            "be run to be recognised is not: export it in float16 or float32, or convert it first "
            "(`omforge opt EXPORT -p 'canonicalize,convert-precision{dtype=fp32}'`)"
        )
    blocks = [node for node in model.graph if node.op_type == "Attention"]
    if config.window is not None and blocks:
        found = _windows(model, blocks)
        if found is not None and config.window not in found:
            shown = sorted(w for w in found if w is not None)
            yield (
                f"config.json promises a sliding window of {config.window}, and the export has "
                + (f"windows of {shown}" if shown else "none")
                + ": export it again, with an exporter that keeps it"
            )


def _windows(model: ir.Model, blocks: Iterable[ir.Node]) -> set[int | None] | None:
    """The windows of the attention masks; None if one cannot be told."""
    prober = masks.Prober(model, find_interface(model))
    found: set[int | None] = set()
    for mask in {mask_of(node) for node in blocks if len(node.inputs) > 3}:
        if mask is None:
            found.add(None)
            continue
        hidden = -float("inf") if mask.dtype == ir.DataType.BOOL else None
        try:
            kind = masks.recognise(prober, mask, [], hidden)
        except NoMatch:
            return None
        found.add(kind.window)
        if kind.window is not None and not kind.causal:
            # A window on both sides may be told by its whole width: W // 2 tokens back and ahead.
            found.update((2 * kind.window - 2, 2 * kind.window - 1))
    return found
