"""Why a model is lowered as it is: the form of each operator, what was refused, the bytes moved.

What `omforge check --why` shows. A bundle's canonical graph is lowered anew, bucket by bucket; an
export is raised first, and lowered for a prefill and a decode step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omforge import ir
from omforge.air.lowered import written_slot
from omforge.bundle import manifest as m
from omforge.bundle.source import find_source
from omforge.compilation.graph_plan import cheapest_layout
from omforge.ir.floats import FloatName, float_name
from omforge.ir.fronts import Front
from omforge.lowering.devices import device
from omforge.lowering.legalize import LEGALIZED_FROM, Decision, Refusal, legalize
from omforge.lowering.legalize.choices import choices
from omforge.lowering.legalize.traffic import CACHE, Traffic, bytes_moved, size
from omforge.lowering.target import Target
from omforge.passes import make_pipeline
from omforge.passes.bind_shapes import BindShapes
from omforge.passes.cache_in_place import CacheInPlace
from omforge.passes.convert_precision import ConvertPrecision
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.passes.tabulate_rotary import TabulateRotary
from omforge.recognition.config import read_config
from omforge.recognition.step_names import LOGITS_INDEX

# Of an export, which has no buckets yet.
_CONTEXT, _PREFILL = 2048, 128


@dataclass(frozen=True)
class Group:
    """The nodes of one operator for which the same was decided.

    Attributes:
        op: The operator.
        count: Of nodes.
        form: What they become; "" where they stay as they are.
        reason: Why this form.
        source: Where that was read.
        certainty: How it is known.
        traffic: Bytes moved by all of them together, gear by gear.
        refused: The other forms, with the bytes that they would move together.
    """

    op: str
    count: int
    form: str
    reason: str
    source: str
    certainty: str
    traffic: tuple[Traffic, ...]
    refused: tuple[Refusal, ...]


@dataclass(frozen=True)
class GraphWhy:
    """One lowered graph.

    Attributes:
        name: Of the bucket.
        gears: The lengths that the traffic is counted for; one for a static graph.
        total: All bytes of a step, gear by gear.
        groups: Operators with several forms, then the others.
        layout: Of the cache: "stacked", "per-layer", "in place" or "".
        cache_copied: Bytes that a step moves to take the cache apart.
        stacked_copies: Bytes that it would move for that if the cache were stacked.
        seconds: What a step takes at least, by bandwidths that were seen; None where none were.
    """

    name: str
    gears: tuple[int, ...]
    total: tuple[Traffic, ...]
    groups: tuple[Group, ...]
    layout: str
    cache_copied: int
    stacked_copies: int
    seconds: float | None = None

    def lines(self) -> Iterator[str]:
        """The report's lines."""
        yield f"{self.name}: {self._bytes(self.total)} a step"
        for traffic in self.total[:1]:
            yield (
                f"  weights {amount(traffic.weights)}, cache {amount(traffic.cache)}, other reads "
                f"{amount(traffic.read)}, writes {amount(traffic.written)}, "
                f"{traffic.kernels} kernels"
            )
        if self.seconds is not None:
            yield f"  at least {1000 * self.seconds:.3g} ms, by the bandwidths that were seen"
        if self.layout:
            yield f"  cache -> {self.layout}: copies {amount(self.cache_copied)} a step"
            for row in choices("cache") if self.layout != "in place" else ():
                copies = amount(self.stacked_copies if row.form == "stacked" else 0)
                told = f"{row.reason} [{row.certainty}: {row.source}]"
                chosen = row.form == self.layout
                yield f"      {told}" if chosen else f"    not {row.form} ({copies}): {told}"
        for group in self.groups:
            moved = self._bytes(group.traffic)
            if not group.source:
                yield f"  {group.op} x{group.count}: {moved}"
                continue
            yield f"  {group.op} x{group.count} -> {group.form or 'nothing legal'}: {moved}"
            yield f"      {group.reason} [{group.certainty}: {group.source}]"
            for refusal in group.refused:
                bytes_ = f" ({self._bytes(refusal.traffic)})" if refusal.traffic else ""
                yield f"    not {refusal.form}{bytes_}: {refusal.reason}"

    def _bytes(self, traffic: Sequence[Traffic]) -> str:
        if len(traffic) < 2:
            return amount(sum(moved.total for moved in traffic))
        return ", ".join(
            f"{amount(moved.total)} at {seq}"
            for seq, moved in zip(self.gears, traffic, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "gears": list(self.gears),
            "bytes": [_json(traffic) for traffic in self.total],
            "layout": self.layout,
            "cache_copied": self.cache_copied,
            "stacked_copies": self.stacked_copies,
            "least_seconds": self.seconds,
            "operators": [
                {
                    "op": group.op,
                    "count": group.count,
                    "form": group.form,
                    "reason": group.reason,
                    "source": group.source,
                    "certainty": group.certainty,
                    "bytes": [_json(traffic) for traffic in group.traffic],
                    "refused": [
                        {
                            "form": refusal.form,
                            "reason": refusal.reason,
                            "bytes": [_json(traffic) for traffic in refusal.traffic],
                        }
                        for refusal in group.refused
                    ],
                }
                for group in self.groups
            ],
        }


def _json(traffic: Traffic) -> dict[str, int]:
    return {
        "weights": traffic.weights,
        "cache": traffic.cache,
        "read": traffic.read,
        "written": traffic.written,
        "total": traffic.total,
        "kernels": traffic.kernels,
    }


def amount(count: int) -> str:
    """A number of bytes as people read it."""
    for unit, least in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= least:
            return f"{count / least:.1f} {unit}"
    return f"{count} B"


def explain_choices(
    path: str | Path,
    soc: Target,
    *,
    forms: Mapping[str, str] | None = None,
    front: Front | None = None,
) -> tuple[GraphWhy, ...]:
    """Say of a bundle, an export or a canonical graph how it is lowered and why.

    Args:
        path: A bundle's folder, an export's folder or .onnx file, or a canonical graph.
        soc: The target.
        forms: Operator to form, as `legalize` takes them.
        front: What atc is given; None for the bundle's own, and ONNX graphs of what is none.

    Raises:
        InputError: The path is none of these, or `forms` is wrong.
        CheckError: An export's cache cannot be given a fixed capacity.
    """
    path = Path(path)
    if (path / m.FILE_NAME).is_file():
        bundle = m.Manifest.load(path)
        model = ir.load(path / bundle.canonical)
        plans = [
            (b.name, BindShapes(b.batch, 0 if b.gears else b.seq, b.capacity), b.gears)
            for b in bundle.buckets
        ]
        if (front or bundle.front) != bundle.front:
            raise ir.InputError(
                f"the bundle {path} was made for the front {bundle.front}",
                "its canonical graph has the cache as that front wants it",
                "Leave --front away, or give the export",
            )
        return _explain(model, float_name(bundle.dtype), plans, soc, forms, bundle.front)
    source = find_source(path)
    model = ir.load(source.graph)
    if all(isinstance(dim, int) for value in model.graph.inputs for dim in value.shape or ("",)):
        return (_of_graph(source.graph.name, model, (), soc, forms, front or "onnx"),)
    context = _CONTEXT
    if all(value.name != LOGITS_INDEX for value in model.graph.inputs):
        config = read_config(source.folder)
        context = min(_CONTEXT, (config.max_positions if config else None) or _CONTEXT)
        make_pipeline("raise").run(model)
        fuse = FuseKvIo(cheapest_layout())
        for step in (LastTokenLogits(), fuse, TabulateRotary(context)):
            step.run(model)
        if front == "air":
            CacheInPlace().run(model)
    plans = [
        (f"prefill_s{_PREFILL}_c{context}", BindShapes(1, _PREFILL, context), ()),
        (f"decode_c{context}", BindShapes(1, 1, context), ()),
    ]
    return _explain(model, "fp16", plans, soc, forms, front or "onnx")


def _explain(
    model: ir.Model,
    dtype: FloatName,
    plans: Sequence[tuple[str, BindShapes, tuple[int, ...]]],
    soc: Target,
    forms: Mapping[str, str] | None,
    front: Front,
) -> tuple[GraphWhy, ...]:
    ConvertPrecision(dtype).run(model)
    found: list[GraphWhy] = []
    for name, bind, gears in plans:
        bucket = model.clone()
        bind.run(bucket)
        found.append(_of_graph(name, bucket, gears or (bind.seq,), soc, forms, front))
    return tuple(found)


def _of_graph(
    name: str,
    model: ir.Model,
    gears: tuple[int, ...],
    soc: Target,
    forms: Mapping[str, str] | None,
    front: Front,
) -> GraphWhy:
    told: list[Decision] = []
    symbols = {"seq": gears} if len(gears) > 1 else None
    legalize(model, soc, front, gears=symbols, forms=forms, told=told)
    bindings = [{"seq": seq} for seq in gears] or [dict[str, int]()]
    nodes = list(model.graph)
    splits = [n for n in nodes if n.op_type == "Split" and _is_whole_cache(n.inputs[0])]
    caches = [v for v in model.graph.inputs if (v.name or "").startswith(CACHE)]
    layout = "" if not caches else "stacked" if splits else "per-layer"
    if any(written_slot(node) is not None for node in nodes):
        layout = "in place"
    return GraphWhy(
        name=name,
        gears=gears,
        total=tuple(bytes_moved(nodes, binding) for binding in bindings),
        groups=(*_chosen(told), *_others(nodes, bindings)),
        layout=layout,
        cache_copied=bytes_moved(splits, bindings[0]).total,
        stacked_copies=2 * sum(size(value, bindings[0]) for value in caches),
        seconds=_seen_seconds(bytes_moved(nodes, bindings[0]), soc),
    )


def _seen_seconds(moved: Traffic, soc: Target) -> float | None:
    """Seconds that the bytes take at what `omforge probe` measured, and a launch."""
    known = device(soc)
    seconds = known.seconds(moved)
    return None if seconds is None or not known.measured else seconds + known.launch


def _is_whole_cache(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input() and (value.name or "").startswith(CACHE)


def _chosen(told: Sequence[Decision]) -> Iterator[Group]:
    groups: dict[tuple[object, ...], list[Decision]] = {}
    for decision in told:
        reasons = tuple((refusal.form, refusal.reason) for refusal in decision.refused)
        groups.setdefault((decision.op, decision.form, reasons), []).append(decision)
    for same in sorted(groups.values(), key=lambda same: (same[0].op, -len(same))):
        first = same[0]
        row = next((r for r in choices(first.op) if r.form == first.form), None)
        yield Group(
            op=first.op,
            count=len(same),
            form=first.form,
            reason=first.reason,
            source=row.source if row else choices(first.op)[0].source,
            certainty=row.certainty if row else choices(first.op)[0].certainty,
            traffic=_sum([decision.traffic for decision in same]),
            refused=tuple(
                Refusal(
                    refusal.form,
                    refusal.reason,
                    _sum([decision.refused[index].traffic for decision in same]),
                )
                for index, refusal in enumerate(first.refused)
            ),
        )


def _others(nodes: Sequence[ir.Node], bindings: Sequence[dict[str, int]]) -> Iterator[Group]:
    """The operators that stay as they are, by type."""
    kinds: dict[str, list[ir.Node]] = {}
    for node in nodes:
        if LEGALIZED_FROM not in node.metadata_props:
            kinds.setdefault(node.op_type, []).append(node)
    for op, same in sorted(kinds.items()):
        traffic = tuple(bytes_moved(same, binding) for binding in bindings)
        if any(moved.total for moved in traffic):
            yield Group(op, len(same), op, "", "", "", traffic, ())


def _sum(rows: Sequence[Sequence[Traffic]]) -> tuple[Traffic, ...]:
    return tuple(
        sum(cast("tuple[Traffic, ...]", column), Traffic()) for column in zip(*rows, strict=True)
    )
