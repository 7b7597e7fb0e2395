"""A plan in lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from omforge.planning.chosen import LengthPlan
from omforge.planning.memory import MemoryMap
from omforge.planning.plan import Plan, advice
from omforge.planning.steps import Step


def lines(plan: Plan) -> Iterator[str]:
    """Yield the report's lines: memory, what would change it, time, lengths."""
    yield from _head(plan)
    yield ""
    yield from _memory(plan.memory)
    yield from _fit(plan)
    yield from _knobs(plan)
    yield ""
    yield from _steps(plan)
    if plan.lengths is not None:
        yield ""
        yield from _lengths(plan.lengths)


def _head(plan: Plan) -> Iterator[str]:
    options = plan.options
    weights = options.quantize or options.dtype
    yield (
        f"{options.soc}, front {options.front}: weights {weights}, cache {options.kv_dtype}, "
        f"context {options.context}, batch {options.batch}, "
        f"prefill {','.join(map(str, options.prefill))}{', gears' if options.gears else ''}"
    )


def _memory(held: MemoryMap) -> Iterator[str]:
    rows = [("memory", "bytes", "of which")]
    told = {
        "weights": ", ".join(f"{count:,} {kind}" for kind, count in held.weights.items()),
        "cache": _cache(held),
        "activations": _largest(held),
        "inputs and outputs": f"{held.graphs} graphs" if held.graphs > 1 else "1 graph",
    }
    rows += [(part, f"{count:,}", told.get(part, "")) for part, count in held.parts.items()]
    rows.append(("all", f"{held.total:,}", f"{held.total / 2**30:.2f} GiB"))
    yield from _columns(rows)
    if held.unshared:
        yield (
            f"weights are counted once for {held.graphs} graphs, as pyACL can share them; where it "
            f"cannot, {held.unshared:,} bytes more (--gears makes one graph)"
        )


def _cache(held: MemoryMap) -> str:
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    for layer in held.cache:
        kinds[layer.dtype, layer.shape] = kinds.get((layer.dtype, layer.shape), 0) + 1
    return ", ".join(
        f"{count} x {dtype}[{','.join(map(str, shape))}]" for (dtype, shape), count in kinds.items()
    )


def _largest(held: MemoryMap) -> str:
    name = max(held.activations, key=lambda each: held.activations[each])
    return f"of {name}, the most that are alive at once"


def _fit(plan: Plan) -> Iterator[str]:
    if plan.limit is None:
        yield "nobody says how much memory the target has: give --memory"
        return
    left = plan.limit - plan.memory.total
    room = f"{left:,} bytes are left" if left >= 0 else f"{-left:,} bytes too many"
    fits = "fits" if left >= 0 else "does not fit"
    yield f"{fits} in {plan.limit:,} bytes ({plan.limited_by}): {room}"
    if left < 0:
        yield next(advice(plan), "no choice below makes it fit, nor several together")


def _knobs(plan: Plan) -> Iterator[str]:
    if not plan.knobs:
        return
    yield ""
    rows = [("choice", "saves", "makes", "")]
    for knob in plan.knobs:
        if knob.total is None:
            rows.append((knob.flags, "-", "-", f"not possible: {knob.why}"))
            continue
        fits = "fits" if plan.limit is not None and knob.total <= plan.limit else ""
        rows.append((knob.flags, f"{knob.saved:,}", f"{knob.total:,}", fits))
    yield from _columns(rows)


def _steps(plan: Plan) -> Iterator[str]:
    rows = [("step", "bytes moved", "weights", "cache", "operations", "at least", "by kernels")]
    rows += [
        (
            f"{step.name}@{step.seq}" if plan.options.gears else step.name,
            f"{step.moved.total:,}",
            f"{step.moved.weights:,}",
            f"{step.moved.cache:,}",
            f"{step.products.total:,}",
            _milliseconds(step.bound),
            _milliseconds(step.modelled),
        )
        for step in plan.steps
    ]
    yield from _columns(rows)
    first, speed = plan.first_token, plan.tokens_a_second
    longest = max(plan.steps, key=lambda each: each.seq)
    if first is not None:
        yield f"first token of a prompt of {longest.seq} tokens: at least {_milliseconds(first)}"
    if speed is not None:
        rows_ = f" of {plan.options.batch} rows" if plan.options.batch > 1 else ""
        yield f"tokens a second{rows_}: at most {speed:.4g}"
    if _is_small(plan.steps):
        yield "the weights may stay in the chip's L2, so that it may be faster than its memory"
    yield str(plan.device)
    for source in plan.device.sources:
        yield f"  {source}"
    if plan.device.open:
        yield f"not known of {plan.options.soc}: {', '.join(plan.device.open)} (`omforge probe`)"


_L2 = 192 << 20
"""Of 910B, which has the most. Source: hicann/runtime:src/runtime/feature/inc/config_define.hpp."""


def _is_small(steps: Sequence[Step]) -> bool:
    return steps[-1].bound is not None and steps[-1].moved.weights < _L2


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.4g} ms"


def _lengths(found: LengthPlan) -> Iterator[str]:
    yield (
        f"{found.prompts:,} prompts of {found.tokens:,} tokens; prefill lengths are multiples of "
        f"{found.unit}: --prefill {','.join(map(str, found.chosen.lengths))}"
    )
    rows = [("lengths", "graphs", "padding", "a prompt, by kernels")]
    for usage in (found.chosen, *found.others):
        name = f"{usage.name}: {','.join(map(str, usage.lengths))}"
        count = str(len(usage.lengths))
        rows.append((name, count, f"{usage.padding:.1%}", _milliseconds(usage.seconds)))
    yield from _columns(rows)
    known = ", ".join(map(str, found.curve.seconds))
    yield (
        f"times are of graphs of {known} tokens and straight lines between; at "
        f"{found.curve.checked} tokens that is {found.curve.error:.1%} off"
    )
    if found.capacities:
        rows = [("capacities (a bundle has one)", "unused", "a step, by kernels")]
        for usage in found.capacities:
            name = ",".join(map(str, usage.lengths))
            rows.append((name, f"{usage.padding:.1%}", _milliseconds(usage.seconds)))
        yield from _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align columns; numbers, which are all but the first and long texts, to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    last = len(widths) - 1
    words = any(" " in row[last] for row in rows[1:])
    for row in rows:
        cells = [
            cell.ljust(width) if at == 0 or (at == last and words) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
