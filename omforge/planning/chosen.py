"""Prefill lengths for the prompts that a server sees, weighed by what lowered graphs take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from omforge import ir
from omforge.bundle.chunks import cheapest_chunks
from omforge.compilation.context import DEFAULT_PREFILL
from omforge.compilation.graph_plan import GraphPlan
from omforge.compilation.options import CompileOptions
from omforge.lowering.devices import Device
from omforge.planning.buckets import choose_capacities, choose_lengths, padding
from omforge.planning.lengths import Lengths
from omforge.planning.steps import count_step
from omforge.planning.subject import Subject
from omforge.recognition.cache.states import PAST_STATE

UNIT = 16
"""Lengths are multiples of it: the cubes multiply blocks of 16 by 16 by 16, so that others take as
long as the next one. Source: hicann/runtime:src/runtime/feature/inc/config_define.hpp."""

_CANDIDATES = {1: 128, 2: 128, 3: 64, 4: 32, 5: 32}
"""From how many lengths so many are chosen: the search ends within seconds."""

_FEWEST = 16

MOST_GRAPHS = 9


@dataclass(frozen=True)
class Curve:
    """What a chunk of any length takes, by those that were lowered.

    Attributes:
        seconds: By length, of those that were lowered.
        error: How far a length between them was off, as a share; none of them is `checked`.
        checked: That length.
    """

    seconds: Mapping[int, float]
    error: float
    checked: int

    def __call__(self, length: int) -> float:
        """Return the seconds of a length, on a straight line between those about it."""
        known = sorted(self.seconds)
        return float(np.interp(length, known, [self.seconds[size] for size in known]))


@dataclass(frozen=True)
class Usage:
    """What one choice of lengths gives for all prompts.

    Attributes:
        name: Of the choice.
        lengths: That it has.
        seconds: Of a prompt, on average.
        padding: Share of the computed tokens that are padding.
    """

    name: str
    lengths: tuple[int, ...]
    seconds: float
    padding: float


@dataclass(frozen=True)
class LengthPlan:
    """What was chosen, and what else there is.

    Attributes:
        prompts: How many prompts were read.
        tokens: Of all of them.
        unit: Lengths were chosen from its multiples.
        chosen: What was chosen.
        others: Other choices, for comparison.
        curve: What they were weighed by.
        capacities: What cache capacities would be best, by how many; empty where no answer's
            length is known.
    """

    prompts: int
    tokens: int
    unit: int
    chosen: Usage
    others: tuple[Usage, ...]
    curve: Curve
    capacities: tuple[Usage, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "unit": self.unit,
            "prefill": list(self.chosen.lengths),
            "choices": [dataclasses.asdict(x) for x in (self.chosen, *self.others)],
            "modelled_seconds": {str(k): v for k, v in self.curve.seconds.items()},
            "model_error": {"at": self.curve.checked, "share": self.curve.error},
            "capacities": [dataclasses.asdict(x) for x in self.capacities],
        }


def measure_curve(subject: Subject, options: CompileOptions, device: Device, longest: int) -> Curve:
    """Lower a few lengths, and one between them to see how far a straight line is off.

    Raises:
        InputError: The model has recurrent states, which take no padding.
        CheckError: Of the target no bandwidth is known, so that lengths cannot be weighed.
    """
    known = [UNIT]
    while known[-1] * 4 < longest:
        known.append(known[-1] * 4)
    known.append(longest)
    between = (known[-2] + longest) // 2 // UNIT * UNIT
    sizes = tuple(dict.fromkeys((*known, between)))
    kind = "encode" if subject.task == "encode" else "prefill"
    graphs = subject.lower(options, tuple(GraphPlan(kind, f"{kind}_s{n}", n) for n in sizes))
    states = [s.name for s in graphs[0].bucket.inputs if s.name.startswith(f"{PAST_STATE}.")]
    if states:
        raise ir.InputError(
            "lengths cannot be chosen for a model with recurrent states",
            f"padding would go into {states[0]}, so that what no chunk fills is decoded",
            "Choose --prefill yourself: a few powers of two leave little to decode",
        )
    seconds: dict[int, float] = {}
    for size, graph in zip(sizes, graphs, strict=True):
        modelled = count_step(graph, device).modelled
        if modelled is None:
            raise ir.CheckError(
                f"lengths cannot be weighed for {device.soc}",
                "no source gives its memory bandwidth, and no facts of one were found",
                "Measure it with `omforge probe`, and give its --facts; or choose --prefill "
                "yourself",
            )
        seconds[size] = modelled
    curve = Curve({size: seconds[size] for size in dict.fromkeys(known)}, 0.0, between)
    error = abs(curve(between) / seconds[between] - 1)
    return dataclasses.replace(curve, error=error)


def plan_lengths(
    subject: Subject, options: CompileOptions, device: Device, lengths: Lengths, graphs: int
) -> LengthPlan:
    """Choose prefill lengths for prompts, for the least expected time.

    Args:
        subject: What is compiled.
        options: With every other size chosen.
        device: What runs it.
        lengths: The prompts.
        graphs: How many graphs there may be, decode among them.

    Raises:
        InputError: A prompt does not fit the context, or `graphs` makes no sense.
        CheckError: Of the target no bandwidth is known.
    """
    _check(lengths, options.context or 0, graphs, subject.task)
    most = graphs if subject.task == "encode" else graphs - 1
    reach = min(max(lengths.prompts), subject.longest)
    count = _CANDIDATES.get(most, _FEWEST)
    unit = UNIT * -(-reach // (UNIT * count))
    last = min(-(-reach // unit) * unit, subject.longest)
    curve = measure_curve(subject, options, device, last)
    sizes = [*range(unit, last, unit), last]
    # A length that is no multiple, as a context of 1,000 is, ends the list; it is no unit for all.
    if last % unit:
        sizes = [size for size in sizes if size % UNIT == 0] or sizes
    costs = {size: curve(size) for size in sizes}
    best = choose_lengths(lengths.prompts, costs, most)
    chosen = {size: costs[size] for size in best.sizes}
    covers = {length: _sizes(length, chosen) for length in lengths.prompts}
    usage = Usage("chosen", best.sizes, best.cost, padding(lengths.prompts, covers))
    return LengthPlan(
        lengths.count,
        lengths.tokens,
        unit,
        usage,
        tuple(_others(lengths, curve, subject.longest, most)),
        curve,
        tuple(_capacities(subject, options, device, lengths)),
    )


def _check(lengths: Lengths, context: int, graphs: int, task: str) -> None:
    least = 1 if task == "encode" else 2
    if not least <= graphs <= MOST_GRAPHS:
        raise ir.InputError(
            f"--graphs {graphs} makes no sense",
            f"the least is {least}, decode among them, and more than {MOST_GRAPHS} are not tried",
            f"Choose {least} to {MOST_GRAPHS}",
        )
    long = sum(count for length, count in lengths.prompts.items() if length > context)
    if long:
        raise ir.InputError(
            f"{long} of {lengths.count} prompts do not fit the context of {context} tokens",
            f"the longest has {max(lengths.prompts)}",
            "Give a larger --context, or leave these lines out",
        )


def _sizes(length: int, costs: Mapping[int, float]) -> tuple[int, ...]:
    return tuple(size for size, _ in cheapest_chunks(length, costs))


def _others(
    lengths: Lengths, curve: Callable[[int], float], longest: int, most: int
) -> list[Usage]:
    """Powers of two, as many as there are and as many as were chosen, and what is the default."""
    powers = [UNIT]
    while powers[-1] < max(lengths.prompts):
        powers.append(min(2 * powers[-1], longest) if powers[-1] < longest else longest)
        if powers[-1] == longest:
            break
    single = {n: (min((p for p in powers if p >= n), default=powers[-1]),) for n in lengths.prompts}
    best = choose_lengths(lengths.prompts, {size: curve(size) for size in powers}, most)
    some = {size: curve(size) for size in best.sizes}
    covers = {length: _sizes(length, some) for length in lengths.prompts}
    default = min(DEFAULT_PREFILL, longest)
    repeated = {n: (default,) * -(-n // default) for n in lengths.prompts}
    return [
        _usage("the next power of two", tuple(powers), single, lengths, curve),
        _usage("the best powers of two", best.sizes, covers, lengths, curve),
        _usage("the default", (default,), repeated, lengths, curve),
    ]


def _usage(
    name: str,
    sizes: tuple[int, ...],
    covers: Mapping[int, tuple[int, ...]],
    lengths: Lengths,
    curve: Callable[[int], float],
) -> Usage:
    seconds = sum(
        sum(map(curve, covers[length])) * count for length, count in lengths.prompts.items()
    )
    return Usage(name, sizes, seconds / lengths.count, padding(lengths.prompts, covers))


def _capacities(
    subject: Subject, options: CompileOptions, device: Device, lengths: Lengths
) -> list[Usage]:
    """What one, two and three capacities would give decode steps; a bundle has one."""
    if not lengths.steps or subject.task == "encode":
        return []
    context = options.context or 0

    def step(capacity: int) -> float:
        sized = dataclasses.replace(options, context=capacity)
        (graph,) = subject.lower(sized, (GraphPlan("decode", "decode", 1),))
        return count_step(graph, device).modelled or 0.0

    # A step's bytes are affine in the capacity: two of them tell all.
    half, whole = step(max(UNIT, context // 2)), step(context)
    low, slope = max(UNIT, context // 2), 0.0
    if context > low:
        slope = (whole - half) / (context - low)
    unit = UNIT * -(-context // (UNIT * 128))
    sizes = [*range(unit, context, unit), context]
    costs = {size: half + slope * (size - low) for size in sizes}
    steps = {min(length, context): count for length, count in lengths.steps.items()}
    found: list[Usage] = []
    for most in (1, 2, 3):
        best = choose_capacities(steps, costs, most)
        total = sum(steps.values())
        held = sum(min(c for c in best.sizes if c >= n) * k for n, k in steps.items())
        used = sum(n * k for n, k in steps.items())
        found.append(Usage(f"{most} capacities", best.sizes, best.cost, 1 - used / held))
        if total == 0:
            break
    return found
