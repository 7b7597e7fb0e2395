"""What each input and output of an exported causal LM is for, found from how the graph uses it.

Exporters name the cache `past_key_values.0.key`, `input.past_key_values.layers.0.keys` and
otherwise; what they all do is look tokens up in an embedding, and concatenate a past with something
new into a present.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from omforge import ir
from omforge.ir.dims import Dim, evaluate, symbols
from omforge.ir.values import constant_tensor, known
from omforge.recognition.attention import sinks as attention_sinks
from omforge.recognition.views import shape_of

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_MASKS = (*_INTEGERS, ir.DataType.BOOL)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MOVERS = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"}
_TRANSPARENT = {"Concat", *_MOVERS}

_OUR_CACHE = re.compile(r"past_key_values(\.\d+\.(key|value))?")
"""What fuse-kv-io calls the cache, which then has no output that is longer than it."""


@dataclass(frozen=True)
class Interface:
    """The roles of a causal LM's inputs and outputs.

    Attributes:
        input_ids: Token numbers, integer [B, S]; or embeddings in their place, float [B, S, H].
        attention_mask: 1 for a token and 0 for padding, integer or boolean [B, P + S], or the whole
            mask [B, 1, S, P + S], boolean or floats that are added; None where there is none.
        position_ids: Integer [B, S]; None where the model derives positions from something else.
        caches: (past, present) pairs in the order of the inputs; empty for a model without a cache.
        logits: Float [B, S, V]; of a model that is no language model its first output.
        extra: Inputs that none of these is.
    """

    input_ids: ir.Value
    attention_mask: ir.Value | None
    position_ids: ir.Value | None
    caches: tuple[tuple[ir.Value, ir.Value], ...]
    logits: ir.Value
    extra: tuple[ir.Value, ...]

    @property
    def embedded(self) -> bool:
        """Whether the model is fed by embeddings in place of token numbers."""
        return self.input_ids.dtype in _FLOATS

    @property
    def tokens(self) -> tuple[Dim, ...]:
        """B and S."""
        return shape_of(self.input_ids)[:2]

    @property
    def by_token(self) -> tuple[ir.Value, ...]:
        """Further integers [B, S], one for each token: a segment, a language."""
        return tuple(v for v in self.extra if v.dtype in _INTEGERS and shape_of(v) == self.tokens)


@dataclass(frozen=True)
class CacheLayer:
    """One layer's cache in an export.

    Attributes:
        past: The inputs of its keys and its values, [B, K, P, D].
        present: The outputs, [B, K, P + S, D].
        block: The `Attention` that reads them; None where attention was not raised.
        sharers: Further ones that read the same keys and values, past and new: those of layers
            that have none of their own.
    """

    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    block: ir.Node | None = None
    sharers: tuple[ir.Node, ...] = ()

    @property
    def blocks(self) -> tuple[ir.Node, ...]:
        """All that read them; none where attention was not raised."""
        return () if self.block is None else (self.block, *self.sharers)


def cache_layers(model: ir.Model, interface: Interface) -> tuple[CacheLayer, ...]:
    """The layers that have a cache, first to last.

    Raises:
        CheckError: A cache is neither one of a raised attention nor one of a pair.
    """
    returned = dict(interface.caches)
    raised = _shared(
        layer for node in model.graph if (layer := _raised_layer(node, returned)) is not None
    )
    served = {past for layer in raised for past in layer.past}
    left = [pair for pair in interface.caches if pair[0] not in served]
    if len(left) % 2:
        raise ir.CheckError(
            f"the cache cannot be given a fixed capacity: {len(left)} of its "
            f"{len(interface.caches)} tensors belong to attention that was not raised",
            f"they are no pairs of keys and values: {', '.join(str(p.name) for p, _ in left)}",
            "`omforge explain` says of each attention why it was not raised",
        )
    if not left:
        return tuple(raised)
    pairs = zip(left[0::2], left[1::2], strict=True)
    unraised = [CacheLayer((key[0], value[0]), (key[1], value[1])) for key, value in pairs]
    places = {value: index for index, value in enumerate(model.graph.inputs)}
    return tuple(sorted([*raised, *unraised], key=lambda layer: places[layer.past[0]]))


def _shared(layers: Iterable[CacheLayer]) -> list[CacheLayer]:
    """One layer for those that read the same cache and the same new keys and values."""
    found: dict[tuple[ir.Value | None, ...], CacheLayer] = {}
    for layer in layers:
        assert layer.block is not None
        read = (*layer.past, *attention_sinks.new_of(layer.block))
        if read in found:
            owner = found[read]
            found[read] = replace(owner, sharers=(*owner.sharers, layer.block))
        else:
            found[read] = layer
    return list(found.values())


def _raised_layer(node: ir.Node, returned: Mapping[ir.Value, ir.Value]) -> CacheLayer | None:
    if node.op_type != "Attention" or node.domain != "" or len(node.inputs) < 6:
        return None
    key, value = node.inputs[4:6]
    if key is None or value is None or len(node.outputs) < 3:
        return None
    # Of layers that share keys and values, one gives them back for all.
    new_key, new_value = (
        own if own.is_graph_output() else returned.get(past, own)
        for past, own in zip((key, value), node.outputs[1:3], strict=True)
    )
    return CacheLayer((key, value), (new_key, new_value), node)


def states(model: ir.Model, interface: Interface) -> tuple[tuple[ir.Value, ir.Value], ...]:
    """Recurrent states, (input, output) pairs: float inputs that an output of like shape renews.

    A linear-attention, state-space or convolution layer carries such states of fixed size from step
    to step, where attention carries keys and values.
    """
    return _renewals(model.graph.outputs, interface)


def _renewals(
    outputs: Sequence[ir.Value], interface: Interface
) -> tuple[tuple[ir.Value, ir.Value], ...]:
    taken = {interface.logits, *(present for _, present in interface.caches)}
    candidates: dict[ir.Value, list[ir.Value]] = {}
    for value in interface.extra:
        if value.dtype not in _FLOATS or not shape_of(value):
            continue
        like = [
            output
            for output in outputs
            if output not in taken
            and output.dtype == value.dtype
            and _alike(shape_of(output), shape_of(value))
            and not _is_handed_on(value, output)
        ]
        made = _made_of(value) if like else set[ir.Value]()
        candidates[value] = [output for output in like if output in made]
    found: dict[ir.Value, ir.Value] = {}
    # A layer's state reaches those of the layers above: the last layer's has one output to renew.
    for value in sorted(candidates, key=lambda value: len(candidates[value])):
        renewed = next((output for output in candidates[value] if output not in taken), None)
        if renewed is not None:
            taken.add(renewed)
            found[value] = renewed
    return tuple((value, found[value]) for value in interface.extra if value in found)


def kept_by_an_output(value: ir.Value, interface: Interface) -> bool:
    """Whether an output of the same sizes behind the first, made of an input, may renew it.

    A state that has one row for all, or rows where its output has none, cannot be carried.
    """
    graph, rest = interface.logits.graph, shape_of(value)[1:]
    taken = {interface.logits, *(present for _, present in interface.caches)}
    like = [
        output
        for output in (() if graph is None else graph.outputs)
        if output not in taken
        and output.dtype == value.dtype
        and rest
        and len(shape_of(output)) == len(shape_of(value))
        and _alike(shape_of(output)[1:], rest)
        and not _is_handed_on(value, output)
    ]
    return bool(like) and not _made_of(value).isdisjoint(like)


def _is_handed_on(value: ir.Value, output: ir.Value) -> bool:
    """Whether an output is an input as it was given, which renews nothing."""
    while output is not value:
        node = output.producer()
        if node is None or node.op_type not in _MOVERS or node.inputs[0] is None:
            return False
        output = node.inputs[0]
    return True


def _alike(shape: tuple[Dim, ...], other: tuple[Dim, ...]) -> bool:
    """Whether two shapes have the same sizes, tried where they are written in different ways.

    The last 3 of S + 3 tokens are `max(0, min(9999, seq + 3) - seq)` of them.
    """
    if len(shape) != len(other) or shape == other:
        return shape == other
    names = sorted({name for dim in (*shape, *other) for name in symbols(dim)})
    for base in (1, 2, 17):
        sizes = {name: base + 3 * index for index, name in enumerate(names)}
        if [evaluate(dim, sizes) for dim in shape] != [evaluate(dim, sizes) for dim in other]:
            return False
    return True


def _made_of(value: ir.Value) -> set[ir.Value]:
    """Everything that depends on a value."""
    pending, found = [value], {value}
    while pending:
        for node in pending.pop().consumers():
            new = [output for output in node.outputs if output not in found]
            found.update(new)
            pending += new
    return found


def find_interface(model: ir.Model) -> Interface:
    """Find the roles.

    Raises:
        InputError: The graph is no causal LM: nothing looks up tokens, or there are no logits.
    """
    graph = model.graph
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    input_ids = tokens_of(graph) or _embeddings(inputs, graph)
    if input_ids is None:
        _refuse_features(inputs)
        raise ir.InputError(
            "the graph is no causal LM that omforge can serve",
            "no integer input [batch, sequence] looks up rows of an embedding, and none is "
            "embeddings [batch, sequence, hidden] (inputs: "
            + (", ".join(f"{v.name}" for v in inputs) or "none")
            + ")",
            "Export the model with token ids, or inputs_embeds, as its input",
        )
    caches = tuple(_caches(inputs))
    presents = {present for _, present in caches}
    logits = _logits(graph, presents, input_ids)
    if logits is None:
        raise ir.InputError(
            "the graph is no causal LM that omforge can serve",
            f"no output is logits, a float [batch, sequence, vocabulary] (outputs: "
            f"{', '.join(str(v.name) for v in graph.outputs)})",
            "Export the model with its language-model head",
        )
    tokens = shape_of(input_ids)[:2]
    apart = {input_ids, *(past for past, _ in caches)}
    lengths = {_memory_length(value, tokens) for value in inputs if value not in apart}
    rest = [v for v in inputs if v.dtype in _MASKS and v is not input_ids]
    # The mask of an encoder's states is as long as these are.
    rest = [v for v in rest if len(shape_of(v)) != 2 or shape_of(v)[1] not in lengths]
    mask = _by_role(rest, "mask", lambda shape: shape[-1] != tokens[-1])
    if (
        mask is None and caches
    ):  # a canonical model has additive masks too, and none of these caches
        mask = _additive_mask(inputs, {past for past, _ in caches})
    rest = [v for v in rest if v is not mask and v.dtype in _INTEGERS]
    rest = [v for v in rest if not _is_segment(v)]
    positions = _by_role(rest, "position", lambda shape: shape == tokens)
    taken = {input_ids, mask, positions, *(past for past, _ in caches)}
    extra = tuple(value for value in inputs if value not in taken)
    return Interface(input_ids, mask, positions, caches, logits, extra)


def stacked_positions(interface: Interface) -> ir.Value | None:
    """The positions [3, B, S] or [4, B, S] of models that tell time, height and width (M-RoPE)."""
    tokens = interface.tokens
    for value in interface.extra:
        shape = shape_of(value)
        if len(shape) != 3 or value.dtype not in _INTEGERS or shape[0] == 1:
            continue
        if shape[1:] == tokens or "position" in _words(value):
            return value
    return None


def _refuse_features(inputs: Sequence[ir.Value]) -> None:
    """Raise InputError for a model of sound or images, which no export of its text would mend."""
    if any(value.dtype in _INTEGERS for value in inputs):
        return
    for value in inputs:
        shape = shape_of(value)
        if value.dtype in _FLOATS and len(shape) > 2 and all(isinstance(n, int) for n in shape[1:]):
            raise ir.InputError(
                "the graph reads no text",
                f"its input {value.name} [{', '.join(map(str, shape))}] is neither token ids nor "
                "embeddings of such",
                "Models of sound and of images are not lowered; a decoder that attends to what "
                "they make is, with this as its fixed inputs",
            )


def tokens_of(graph: ir.Graph) -> ir.Value | None:
    """The token numbers: integers [B, S] that look up rows of an embedding.

    Learned positions, and the segments of an encoder, are looked up as well. The rows of the
    tokens' table are what the model scores in the end; where that does not tell, it is the longest.
    """
    inputs = [v for v in graph.inputs if v.name not in graph.initializers]
    integers = [v for v in inputs if v.dtype in _INTEGERS and len(shape_of(v)) == 2]
    tables = {v: rows for v in integers if (rows := table_rows(v)) is not None}
    candidates = [v for v in tables if "position" not in _words(v)]
    scored = {shape_of(output)[-1] for output in graph.outputs if shape_of(output)}
    return max(candidates, key=lambda v: (tables[v] in scored, tables[v]), default=None)


def _embeddings(inputs: Sequence[ir.Value], graph: ir.Graph) -> ir.Value | None:
    """Floats [B, S, H] in place of the tokens.

    Beside a cache they are what is as long as an output; without one, only their name tells.
    """
    caches = {past for past, _ in _caches(inputs)}
    lengths = {shape_of(output)[1] for output in graph.outputs if len(shape_of(output)) == 3}
    found = [
        value
        for value in inputs
        if value.dtype in _FLOATS
        and value not in caches
        and len(shape := shape_of(value)) == 3
        and not isinstance(shape[1], int)
        and isinstance(shape[2], int)
        and ("embed" in _words(value) or (caches and shape[1] in lengths))
    ]
    # Where there are several (an image's features beside the text's), the name tells.
    named = [value for value in found if "embed" in _words(value)]
    return next(iter(named or found), None)


def table_rows(value: ir.Value) -> int | None:
    """The rows of the smallest table that an integer input looks up.

    0 where no number says how many these are; None where it looks nothing up.
    """
    found: list[int] = []
    for node in _uses_through_movement(value):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is not None and is_weight(table) and len(shape := shape_of(table)) == 2:
            found.append(shape[0] if isinstance(shape[0], int) else 0)
    return min(found, default=None)


def is_weight(value: ir.Value) -> bool:
    """Whether it is constant, or a constant moved or converted at run time (a tied head's)."""
    if constant_tensor(value) is not None:
        return True
    node = value.producer()
    if node is None or node.op_type not in {*_MOVERS, "DequantizeLinear", "Shape"}:
        return False
    return all(v is None or is_weight(v) for v in node.inputs)


_FEWEST_POSITIONS = 16


def _is_segment(value: ir.Value) -> bool:
    """Whether it says of each token what it belongs to: a sentence, a language.

    It picks rows as learned positions do, of a table that has few; names say it of others.
    """
    if "position" in _words(value):
        return False
    rows = table_rows(value)
    named = any(word in _words(value) for word in ("type", "segment", "lang"))
    return named or (rows is not None and 0 < rows < _FEWEST_POSITIONS)


def _words(value: ir.Value) -> str:
    return (value.name or "").lower()


def _uses_through_movement(value: ir.Value) -> Iterator[ir.Node]:
    for node in value.consumers():
        if node.op_type in _MOVERS:
            yield from _uses_through_movement(node.outputs[0])
        else:
            yield node


def _logits(graph: ir.Graph, presents: set[ir.Value], tokens: ir.Value) -> ir.Value | None:
    """The output named so, else one with a score for each row of the embedding, else the first."""
    candidates = [
        value
        for value in graph.outputs
        if value not in presents and value.dtype in _FLOATS and len(shape_of(value)) in (2, 3)
    ]
    named = [value for value in candidates if "logits" in _words(value)]
    rows = table_rows(tokens)
    scores = [value for value in candidates if shape_of(value)[-1] == rows]
    return next(iter(named or scores or candidates), None)


def _by_role(
    values: Sequence[ir.Value], word: str, fits: Callable[[tuple[Dim, ...]], bool]
) -> ir.Value | None:
    """The input whose name holds the word, else the first whose shape fits.

    A `cache_position` [S] has the word and not the rank: it counts slots.
    """
    ranked = [value for value in values if len(shape_of(value)) in (2, 4)]
    named = (value for value in ranked if word in _words(value))
    return next(named, None) or next((v for v in ranked if fits(shape_of(v))), None)


def _additive_mask(inputs: Sequence[ir.Value], caches: set[ir.Value]) -> ir.Value | None:
    """A mask [B, 1, S, P + S] that the caller makes, named as one."""
    for value in inputs:
        shape = shape_of(value)
        fits = value.dtype in _FLOATS and len(shape) == 4 and shape[1] == 1
        if fits and value not in caches and "mask" in _words(value):
            return value
    return None


def _caches(inputs: Sequence[ir.Value]) -> Iterator[tuple[ir.Value, ir.Value]]:
    for value in inputs:
        if value.dtype in _FLOATS and len(shape_of(value)) >= 3:
            present = _present(value)
            if present is not None:
                yield value, present


def _present(past: ir.Value) -> ir.Value | None:
    """The output that is `past` with something appended, as a Concat or an Attention does.

    One that is `past` itself is no cache: an encoder's keys, which a decoder hands on.
    """
    pending, seen = [(past, False)], {(past, False)}
    while pending:
        value, joined = pending.pop()
        for node, index in value.uses():
            if node.op_type == "Attention" and node.domain == "" and index in (4, 5):
                outputs = [node.outputs[index - 3]] if len(node.outputs) > index - 3 else []
                longer = True
            elif node.op_type in _TRANSPARENT:
                outputs, longer = [node.outputs[0]], joined or node.op_type == "Concat"
            else:
                continue
            for output in outputs:
                if output.is_graph_output() and longer:
                    return output
                if (output, longer) not in seen:
                    seen.add((output, longer))
                    pending.append((output, longer))
    return None


def memory_of(interface: Interface) -> tuple[ir.Value, ...]:
    """Inputs with a length of their own, such as an encoder's states or the keys made of them.

    Floats [B, E, ...] or [B, K, E, D], whose E is neither the text's length nor a part of it, and
    the masks [B, E] of such.
    """
    tokens = interface.tokens
    floats = {value for value in interface.extra if _memory_length(value, tokens) is not None}
    graph = interface.logits.graph
    if floats and graph is not None:
        # A state is of fixed size, as what an encoder of fixed length made; an output renews it.
        floats -= {state for state, _ in _renewals(graph.outputs, interface)}
    lengths = {memory_length(value) for value in floats}
    return tuple(
        value
        for value in interface.extra
        if value in floats
        or (value.dtype in _MASKS and len(shape_of(value)) == 2 and shape_of(value)[1] in lengths)
    )


def memory_length(value: ir.Value) -> Dim:
    """E of an input that `memory_of` names."""
    shape = shape_of(value)
    return shape[2] if len(shape) == 4 else shape[1]


def _memory_length(value: ir.Value, tokens: tuple[Dim, ...]) -> Dim | None:
    """E of a float input that is memory; None for any other input."""
    shape = shape_of(value)
    if value.dtype not in _FLOATS or len(shape) not in (3, 4):
        return None
    # Some exporters give the rows of each input a symbol of its own.
    if shape[0] != tokens[0] and (isinstance(shape[0], int) or shape[0] in tokens):
        return None
    if _OUR_CACHE.fullmatch(value.name or ""):
        return None
    length = memory_length(value)
    # A width, or a number of heads, is no length.
    others = [dim for axis, dim in enumerate(shape) if axis and dim is not length]
    if any(not isinstance(dim, int) for dim in others) or length in tokens:
        return None
    return length


def activations(model: ir.Model) -> set[ir.Value]:
    """The values that depend on tokens or on the cache otherwise than through their shapes.

    What is left (masks, position tables, shapes) is the same for every prompt of the same length
    and padding, and can be run alone.
    """
    graph = model.graph
    interface = find_interface(model)
    found: set[ir.Value] = {value for value in graph.inputs if value.dtype in _FLOATS}
    found.discard(interface.attention_mask or interface.input_ids)
    found.add(interface.input_ids)
    for node in graph:
        if any(value in found for value in node.inputs if value is not None):
            found.update(output for output in node.outputs if known(output) is None)
    return found


def attention_mask_of(model: ir.Model) -> ir.Value | None:
    """The padding mask, by its name alone: before the cache is known, nothing else tells."""
    for value in model.graph.inputs:
        if value.dtype in _MASKS and "mask" in _words(value):
            return value
    return None
