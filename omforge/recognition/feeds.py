"""Inputs to compare a causal LM with itself: several sizes, empty and filled pasts, padded rows.

A rewrite can be right for one length only (a mask that was recognised at S = 1, a table that ends
too soon), so one set of numbers proves little. What an input is for is found as the passes find it,
so every exporter's interface is fed, and so are canonical graphs and bound buckets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.dims import Dim, Expr, evaluate, symbols
from omforge.ir.values import dims
from omforge.recognition.attention.alibi import KEY_POSITIONS
from omforge.recognition.attention.masks import given_mask
from omforge.recognition.interface import (
    Interface,
    find_interface,
    memory_of,
    stacked_positions,
    table_rows,
)
from omforge.recognition.step_names import LOGITS_INDEX, MASK, MASK_FULL, PAST
from omforge.rewriting.padding import StepFeeds

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

COMPARE_LIMIT = 1 << 30
"""Bytes of weights above which comparing after each pass takes minutes a pass."""

HIDDEN = -30000.0  # of an additive mask: finite in float16 even when a score is added
_MEMORY = 7  # states of an encoder where their number is open
SLACK = 3  # cache slots behind the valid ones: what they hold must not matter


@dataclass(frozen=True)
class Step:
    """Sizes of one step: rows B, new tokens S, tokens in the past, padding of the last row."""

    batch: int
    seq: int
    past: int = 0
    padding: int = 0

    @property
    def first(self) -> Array:
        """The absolute index of each row's first real token [B]."""
        found = np.zeros(self.batch, np.int64)
        found[-1] = self.padding
        return found

    @property
    def positions(self) -> Array:
        """Each token's number in its row, counted from the first real one [B, S]; 0 for padding."""
        index = np.arange(self.past, self.past + self.seq)
        return np.maximum(index - self.first[:, None], 0)


STEPS = (
    Step(batch=1, seq=1),
    Step(batch=1, seq=9),
    Step(batch=2, seq=17, padding=5),
    Step(batch=1, seq=1, past=11),
    Step(batch=2, seq=4, past=13, padding=6),
)


def weight_bytes(model: ir.Model) -> int:
    """Return the size of all tensors; nothing is read."""
    return sum(tensor.nbytes for _, tensor in ir.all_tensors(model))


def step_feeds(
    model: ir.Model, longest: int = 2048, seed: int = 0, *, equal_rows: bool = False
) -> list[Feeds]:
    """Return several sets of inputs for a model; the same arguments give the same numbers.

    A graph that is no causal LM gets numbers of its inputs' shapes, two sizes for each symbol.

    Args:
        model: Exported, canonical or bound; its caches are where `find_interface` sees them.
        longest: No step has a token behind this position: rotary tables end at the context.
        seed: Of tokens and of the numbers in the cache.
        equal_rows: Rows are of one length, and several of them go behind a past with one token
            each: what ONNX Runtime's GroupQueryAttention takes.

    Raises:
        InputError: An input has no shape, or a cache has heads of unknown size.
    """
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    try:
        interface = find_interface(model)
    except ir.InputError:  # no causal LM, or its embedding is inside a function still
        return [_plain(inputs, sizes, seed) for sizes in ((2, 3, 5, 4, 7, 6), (3, 4, 2, 6, 5, 7))]
    made: list[Feeds] = []
    steps = list(_steps(inputs, interface, longest))
    if equal_rows:
        steps = list(dict.fromkeys(map(_with_equal_rows, steps)))
    for number, step in enumerate(steps):
        random = np.random.default_rng([seed, number])
        arrays = {_name(v): _feed(v, step, interface, random) for v in inputs}
        # Without a mask nothing says which tokens are padding.
        masked = interface.attention_mask is not None or _is_ours(inputs)
        first = step.first if masked else np.zeros_like(step.first)
        made.append(StepFeeds(arrays, first, step.past, step.seq))
    return made


def token_feeds(model: ir.Model, tokens: Array) -> Feeds:
    """Return the inputs of a prefill of tokens [B, S]: nothing in the past, no padding.

    Raises:
        InputError: The model is no causal LM, an input has no shape, or a token is no number of
            its vocabulary.
    """
    interface = find_interface(model)
    if interface.embedded:
        raise ir.InputError(
            "the model takes no tokens",
            f"its input {interface.input_ids.name} is embeddings, and the export has no table",
            "Choose what needs no calibration text",
        )
    least, most, count = int(tokens.min()), int(tokens.max()), _vocabulary(interface)
    if least < 0 or (isinstance(_shape(interface.logits)[-1], int) and most >= count):
        raise ir.InputError(
            f"token {least if least < 0 else most} is not in the vocabulary",
            f"the model's tokens are 0 to {count - 1}",
            "Make the token numbers with this model's own tokenizer",
        )
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    random = np.random.default_rng(0)  # draws what a cache of no slots holds
    made = {_name(v): _feed(v, Step(*tokens.shape), interface, random) for v in inputs}
    made[_name(interface.input_ids)] = tokens.astype(_dtype(interface.input_ids).numpy())
    return made


def _steps(inputs: list[ir.Value], interface: Interface, longest: int) -> Iterator[Step]:
    """The steps that the model's own numbers and `longest` allow, each once."""
    tokens = _shape(interface.input_ids)
    slots = _slots(inputs, interface)
    if not interface.caches and not any(_is_cache(value) for value in inputs):
        slots = 0  # without a cache there is no past
    seen: set[Step] = set()
    for step in STEPS:
        batch = tokens[0] if isinstance(tokens[0], int) else step.batch
        seq = tokens[1] if isinstance(tokens[1], int) else min(step.seq, longest)
        room = max(0, longest - seq)
        past = min(step.past, room)
        if slots is not None:
            # An exporter's fixed past is full by definition; a cache of ours may be half empty.
            past = min(past, slots) if _is_ours(inputs) else slots
        padding = min(step.padding, past + seq - 1) if batch > 1 else 0
        found = Step(batch, seq, past, padding)
        if found not in seen:
            seen.add(found)
            yield found


def _with_equal_rows(step: Step) -> Step:
    rows = 1 if step.past and step.seq > 1 else step.batch
    return dataclasses.replace(step, batch=rows, padding=0)


def _slots(inputs: list[ir.Value], interface: Interface) -> int | None:
    """The length of the cache where it is a number."""
    caches = [past for past, _ in interface.caches] or [v for v in inputs if _is_cache(v)]
    lengths = {_shape(value)[-2] for value in caches}
    return next((dim for dim in lengths if isinstance(dim, int)), None)


def _feed(value: ir.Value, step: Step, interface: Interface, random: np.random.Generator) -> Array:
    total = step.past + step.seq
    if value is interface.input_ids and interface.embedded:
        width = _shape(value)[2]
        shape = (step.batch, step.seq, width if isinstance(width, int) else 1)
        array: Array = random.standard_normal(shape)
    elif value is interface.input_ids:
        array = random.integers(0, _vocabulary(interface), (step.batch, step.seq))
    elif value is interface.position_ids:
        array = step.positions
    elif value is stacked_positions(interface):
        rows = _shape(value)[0]
        array = np.stack([step.positions] * (rows if isinstance(rows, int) else 3))
    elif value is interface.attention_mask:
        array = np.arange(total) >= step.first[:, None]
        if len(_shape(value)) == 4:  # the caller makes the whole mask
            causal = np.arange(total) <= np.arange(step.past, total)[:, None]
            array = given_mask(_dtype(value), array[:, None] & causal)
    elif value.name == LOGITS_INDEX:
        array = np.arange(step.batch) * step.seq + step.seq - 1
    elif value in interface.by_token:
        # A number for each token picks a row of a table: none lies behind its end.
        array = random.integers(0, table_rows(value) or 1, (step.batch, step.seq))
    elif _is_mask(value):
        array = _additive_mask(value, step)
    elif value.name == KEY_POSITIONS:
        array = _key_positions(value, step)
    elif value in memory_of(interface):
        array = _memory(value, step, random)
    elif _is_cache(value) or any(value is past for past, _ in interface.caches):
        array = random.standard_normal(_cache_shape(value, step, interface))
    else:
        array = _unknown(value, step, interface, random)
    return array.astype(_dtype(value).numpy())


def _unknown(
    value: ir.Value, step: Step, interface: Interface, random: np.random.Generator
) -> Array:
    """Zeros; numbers for a recurrent state, which has rows, once something is in the past."""
    batch = {"batch", *symbols(_shape(interface.input_ids)[0])}
    found: list[int] = []
    rows = False
    for dim in _shape(value):
        of_batch = not isinstance(dim, int) and symbols(dim) <= batch
        rows |= of_batch
        found.append(dim if isinstance(dim, int) else step.batch if of_batch else 1)
    if rows and step.past and _dtype(value).is_floating_point():
        return random.standard_normal(found)
    return np.zeros(found)


def _memory(value: ir.Value, step: Step, random: np.random.Generator) -> Array:
    """An encoder's states, all of one length; the last row's mask hides the last of them."""
    rows, *rest = _shape(value)
    sizes = [dim if isinstance(dim, int) else _MEMORY for dim in rest]
    shape = (rows if isinstance(rows, int) else step.batch, *sizes)
    if _dtype(value).is_floating_point():
        return random.standard_normal(shape)
    array = np.ones(shape)
    array[-1, -1:] = shape[-1] == 1
    return array


def _additive_mask(value: ir.Value, step: Step) -> Array:
    """[B, 1, S, C+S]: C cache slots of which `past` are valid, then the step's own tokens."""
    *_, queries_axis, keys_axis = _shape(value)
    capacity = 0 if queries_axis == keys_axis else _capacity(keys_axis, step)
    slots, new = np.arange(capacity), np.arange(step.past, step.past + step.seq)
    # A slot that is not valid yet lies behind every query.
    keys = np.concatenate([np.where(slots < step.past, slots, np.iinfo(np.int64).max), new])
    queries = new[:, None]
    visible = keys <= queries
    _, _, window = (value.name or "").partition("_w")
    if window:
        visible &= queries - np.minimum(keys, step.past + step.seq) < int(window)
    if _name(value).startswith(MASK_FULL):
        distance = np.abs(queries - new)
        visible = distance < int(window) if window else np.ones_like(distance, np.bool_)
    rows = visible[None] & (keys >= step.first[:, None, None])
    return np.where(rows, 0.0, HIDDEN)[:, None]


def _key_positions(value: ir.Value, step: Step) -> Array:
    """[1, 1, 1, C+S]: the new tokens follow the valid slots; the last one is 0."""
    slots = np.arange(_capacity(_shape(value)[-1], step))
    keys = np.concatenate([slots, np.arange(step.past, step.past + step.seq)])
    return (keys - (step.past + step.seq - 1))[None, None, None]


def _cache_shape(value: ir.Value, step: Step, interface: Interface) -> list[int]:
    shape = _shape(value)
    ours = not interface.caches
    found: list[int] = []
    for axis, dim in enumerate(shape):
        if isinstance(dim, int):
            found.append(dim)
        elif axis == 0:
            # Ours may be 2*L*batch; the exporter's first axis is the batch, whatever its name.
            found.append(evaluate(dim, {"batch": step.batch}) if ours else step.batch)
        elif axis == len(shape) - 2:
            found.append(step.past + SLACK if ours else step.past)
        else:
            raise ir.InputError(
                f"the cache {value.name} cannot be fed",
                f"its shape is [{', '.join(map(str, shape))}], and axis {axis} is no number",
                "Compare from name-dims on, or export the model with its head sizes",
            )
    return found


def _capacity(total: Dim, step: Step) -> int:
    return total - step.seq if isinstance(total, int) else step.past + SLACK


def _is_ours(inputs: list[ir.Value]) -> bool:
    """Whether the interface is that of fuse-kv-io: masks are additive."""
    return any(_is_mask(value) for value in inputs)


def _is_mask(value: ir.Value) -> bool:
    return _name(value).startswith(MASK) and not _dtype(value).is_integer()


def _is_cache(value: ir.Value) -> bool:
    return _name(value).startswith(PAST) and len(_shape(value)) == 4


def _vocabulary(interface: Interface) -> int:
    """How many tokens there are: the embedding has a row for each, the head a column for most."""
    rows = table_rows(interface.input_ids) or _shape(interface.logits)[-1]
    return rows if isinstance(rows, int) else 16  # every vocabulary has that many


def _plain(inputs: list[ir.Value], sizes: tuple[int, ...], seed: int) -> Feeds:
    """Numbers for a graph of which nothing is known but its inputs' shapes."""
    random = np.random.default_rng([seed, *sizes])
    bound: dict[str, int] = {}
    feeds: Feeds = {}
    for value in inputs:
        shape: list[int] = []
        for dim in _shape(value):
            for name in sorted(symbols(dim)):
                bound.setdefault(name, sizes[len(bound) % len(sizes)])
            shape.append(evaluate(dim, bound) if isinstance(dim, Expr) else dim)
        dtype = _dtype(value)
        if dtype is ir.DataType.BOOL or dtype.is_integer():
            array: Array = random.integers(0, 2, shape)
        else:
            array = random.standard_normal(shape)
        feeds[_name(value)] = array.astype(dtype.numpy())
    return feeds


def _shape(value: ir.Value) -> tuple[Dim, ...]:
    shape = dims(value)
    if shape is None:
        raise ir.InputError(f"{value.name} cannot be fed", "it has no shape", "Give it one")
    return shape


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise ir.InputError(f"{value.name} cannot be fed", "it has no dtype", "Give it one")
    return value.dtype


def _name(value: ir.Value) -> str:
    return value.name or ""
