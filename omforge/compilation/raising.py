"""Stages `load` and `raise`: the export's graph, and its canonical form with a cache that grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from omforge import ir
from omforge.bundle.manifest import Task
from omforge.compilation.context import Array, choose_context, cut_pieces
from omforge.compilation.encoder_length import memory_passes
from omforge.compilation.first_step import Chosen, choose_graph
from omforge.compilation.graph_plan import GraphPlan, plan_graphs, with_sizes
from omforge.compilation.insertion import inserted
from omforge.compilation.integer_exports import require_float_products
from omforge.compilation.options import CompileOptions
from omforge.compilation.request import Checked
from omforge.compilation.task import encode_options, find_task
from omforge.compilation.trail import Trail
from omforge.compilation.work import Work
from omforge.ir.read_check import require_known_operators
from omforge.lowering.target import registrations
from omforge.passes import make_pipeline
from omforge.passes.add_past import AddPast
from omforge.passes.bind_choices import BindChoices
from omforge.passes.grow_static_cache import require_growing_cache
from omforge.passes.raise_contrib_ops import RaiseContribOps, foreign_nodes
from omforge.passes.text_positions import TextPositions
from omforge.recognition.coverage import Coverage, measure
from omforge.recognition.interface import find_interface
from omforge.recognition.lengths.bounds import Bound, find_bounds
from omforge.recognition.lengths.call_limit import find_call_limit
from omforge.recognition.lengths.choices import tied_rows
from omforge.rewriting.events import events, record
from omforge.rewriting.pipeline import Pipeline
from omforge.rewriting.schema import CONTRIB_DOMAIN


@dataclass(frozen=True)
class Loaded:
    """An export's graph in memory, its weights mapped.

    Attributes:
        checked: What was asked for.
        chosen: The graph that is raised, where the export has several; the next stage changes it.
        trail: What has been done.
    """

    checked: Checked
    chosen: Chosen
    trail: Trail


@dataclass(frozen=True)
class Raised:
    """A graph in standard operators, dynamic, and what is decided by knowing it.

    Attributes:
        checked: What was asked for.
        chosen: Where the graph is from.
        model: The graph; the next stage changes it.
        task: What it is for.
        options: With context, prefill lengths and layout chosen.
        plans: The graphs to lower.
        bounds: What bounds a text: config.json and the graph.
        call: The most new tokens that the export takes at once, if there is such a limit.
        coverage: What was raised, of what there is.
        trail: What has been done.
        costs: Seconds of a chunk by its tokens, where a plan reckoned them.
    """

    checked: Checked
    chosen: Chosen
    model: ir.Model
    task: Task
    options: CompileOptions
    plans: tuple[GraphPlan, ...]
    bounds: tuple[Bound, ...]
    call: Bound | None
    coverage: Coverage
    trail: Trail
    costs: Mapping[int, float] = field(default_factory=dict[int, float])

    @property
    def calibration(self) -> tuple[Array, ...]:
        """The calibration text in pieces that the graph can run at once."""
        limits = [bound.tokens for bound in (*self.bounds, self.call) if bound is not None]
        return cut_pieces(self.checked.tokens, min(limits, default=None))


def load(checked: Checked, work: Work) -> Loaded:
    """Read the graph that says what any number of tokens gives.

    Raises:
        InputError: A file cannot be read, or has an operator that ONNX does not know.
        CheckError: The export computes in integers.
    """
    work.begin("load")
    chosen = choose_graph(checked.source, checked.config)
    require_known_operators(checked.source.graph, chosen.model)
    require_float_products(chosen.model, checked.source.graph)
    return Loaded(checked, chosen, Trail().and_then(exported=chosen.model.graph.num_nodes()))


def raise_graph(loaded: Loaded, work: Work) -> Raised:
    """Raise the graph to standard operators, and decide what only the graph can tell.

    Raises:
        InputError: An option does not fit the model.
        CheckError: Coverage is not complete, or the graph cannot serve what is asked.
    """
    work.begin("raise")
    checked, model, given = loaded.checked, loaded.chosen.model, loaded.checked.options
    text_only = work.run(model, Pipeline((TextPositions(),)))
    trail = loaded.trail.and_then(run for run in text_only if run.rewrites)
    canonicalize, fuse = inserted(
        given.insert, make_pipeline("canonicalize").passes, make_pipeline("fuse").passes
    )
    trail = trail.and_then(work.run(model, Pipeline(canonicalize)))
    require_growing_cache(model)

    asked = with_sizes(given, checked.bounds)
    bounds = (*checked.bounds, *find_bounds(model, asked.context or 0))
    call = find_call_limit(model, choose_context(given.context, bounds))
    options = with_sizes(given, bounds, call)
    if call is not None and not given.prefill:
        record(
            model, "compile", "the prefill bucket", f"at most {call.tokens}: {call.why}", done=True
        )
    _require_independent_rows(model, options)

    bind = BindChoices(options.context or 0)
    grown = [AddPast()] if loaded.chosen.past_is_missing else []
    trail = trail.and_then(work.run(model, Pipeline((bind, *fuse, *grown))))
    trail = trail.and_then(raised=model.graph.num_nodes())
    _require_standard(model, options)
    find_interface(model)  # what the graph is not is said before what was not raised of it
    coverage = measure(model, checked.config)
    _require_coverage(coverage, options)

    task = find_task(model, options.task)
    if task == "encode":
        options = encode_options(given, bounds)
    plans = plan_graphs(options, task)
    work.expect(len(plans))
    memory = memory_passes(model, options.encoder_length, checked.config, checked.source)
    trail = trail.and_then(work.run(model, Pipeline(memory)))
    return Raised(
        checked, loaded.chosen, model, task, options, plans, bounds, call, coverage, trail
    )


def _require_independent_rows(model: ir.Model, options: CompileOptions) -> None:
    if options.batch > 1 and (why := tied_rows(model, options.context or 0)):
        raise ir.CheckError(
            f"{options.batch} rows cannot be served together",
            why,
            "Compile with --batch 1, or export a model whose rows do not depend on each other",
        )


def _require_standard(model: ir.Model, options: CompileOptions) -> None:
    """Refuse operators that atc lacks, and behind whose unknown shapes little can be raised."""
    _require_no_foreign(foreign_nodes(model), options)
    left = [node for node in model.graph if node.domain == CONTRIB_DOMAIN]
    if left:
        told = [e.reason for e in events(model) if e.pass_name == RaiseContribOps.name]
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise ir.CheckError(
            f"{ir.describe(left[0])} is not standard ONNX{more}",
            told[0] if told else "",
            "Export without it; `omforge explain` names all of them",
        )


def _require_no_foreign(nodes: list[ir.Node], options: CompileOptions) -> None:
    """Refuse custom operators; --allow-partial keeps those that atc has."""
    if options.allow_partial:
        nodes = [node for node in nodes if not registrations(node.domain, node.op_type)]
    if not nodes:
        return
    names = sorted({f"{node.op_type} of domain {node.domain}" for node in nodes})
    more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    raise ir.CheckError(
        f"omforge does not know the operator {', '.join(names)}",
        f"what it gives at {ir.describe(nodes[0])}{more}, and of which shape, cannot be told, so "
        "that nothing behind it can be raised or compared",
        "Export it as operators of ONNX, or as a function of the model that has a body; or replace "
        f"it by a pass of your own (`--insert-pass before={RaiseContribOps.name}:PASS`, see "
        "docs/plugins.md)",
    )


def _require_coverage(coverage: Coverage, options: CompileOptions) -> None:
    if not coverage.complete and not options.allow_partial:
        raise ir.CheckError(
            "coverage is not complete",
            "; ".join(coverage.problems()),
            "`omforge explain` says what stopped each; --allow-partial goes on regardless",
        )
