"""A compilation as stages, each a value in and a value out.

    read    Request   -> Checked    what can be told without the graph is checked
    load    Checked   -> Loaded     the graph, its weights mapped
    raise   Loaded    -> Raised     standard operators, dynamic; buckets chosen
    serve   Raised    -> Canonical  weights quantised, the cache at its capacity
    lower   Canonical -> Lowered    ATC's dialect, a graph for each bucket, legal
    write   Lowered   -> Written    the bundle's folder
    build   Written   -> Built      .om files, where there is an atc

A caller runs all of them, stops behind one and looks at its value, goes on from a value that it has
or has changed, or puts a stage of its own in the place of one of ours::

    raised = run_stages(Request(source, output, options), until="raise")
    assert raised.coverage.complete
    built = run_stages(raised)

A stage may change the graph of the value that it takes, but for `lower` and those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from omforge import ir
from omforge.atc.build import build_om
from omforge.atc.cache import AtcCache
from omforge.bundle import manifest as m
from omforge.compilation.buckets import Lowered, lower
from omforge.compilation.raising import Loaded, Raised, load, raise_graph
from omforge.compilation.request import Checked, Request, read_request
from omforge.compilation.serving import Canonical, serve
from omforge.compilation.work import Progress, Work
from omforge.compilation.writing import Written, write
from omforge.rewriting.instruments import Instrument


@dataclass(frozen=True)
class Built:
    """A bundle with what atc made of it, where there is an atc.

    Attributes:
        written: The bundle.
        manifest: What it says of itself now.
    """

    written: Written
    manifest: m.Manifest


Value: TypeAlias = Request | Checked | Loaded | Raised | Canonical | Lowered | Written | Built
"""What goes from stage to stage."""


@dataclass(frozen=True)
class Stage:
    """One step of a compilation.

    Attributes:
        name: What it is called.
        takes: Type of the value that it takes.
        run: Makes the next value.
    """

    name: str
    takes: type[Value]
    run: Callable[[Any, Work], Value]


def build(written: Written, work: Work) -> Built:
    """Run atc on each graph of a bundle, if there is one.

    Raises:
        InputError: atc cannot be started.
        CheckError: atc refuses a graph; the bundle is there, and holds its log.
    """
    checked = written.lowered.canonical.raised.checked
    if checked.atc is None:
        return Built(written, written.manifest)
    options = checked.options.build
    cache = None if options.cache is None else AtcCache(options.cache)
    made = build_om(
        written.folder, checked.atc, work.progress, jobs=options.jobs, cache=cache, trusted=True
    )
    return Built(written, made)


STAGES = (
    Stage("read", Request, read_request),
    Stage("load", Checked, load),
    Stage("raise", Loaded, raise_graph),
    Stage("serve", Raised, serve),
    Stage("lower", Canonical, lower),
    Stage("write", Lowered, write),
    Stage("build", Written, build),
)


def run_stages(
    value: Value,
    *,
    until: str = "build",
    stages: Sequence[Stage] = STAGES,
    instruments: Sequence[Instrument] | None = None,
    progress: Progress | None = None,
) -> Value:
    """Take a value from the stage that takes its type through all behind it.

    Args:
        value: A `Request`, or what a stage returned.
        until: The last stage that is run.
        stages: What is run, in order: `STAGES`, or these with one replaced.
        instruments: What watches the passes; the verifier alone if None.
        progress: Told the step's name, steps done and steps in all.

    Returns:
        What the last stage returned.

    Raises:
        InputError: There is no stage `until`, or it lies ahead of the value; or a stage's.
        CheckError: A stage's.
    """
    names = [stage.name for stage in stages]
    if until not in names:
        raise ir.InputError(f"there is no stage {until!r}", f"they are {', '.join(names)}")
    takes = [stage.takes for stage in stages]
    start = takes.index(type(value)) if type(value) in takes else len(stages)
    end = names.index(until)
    if start > end:
        raise ir.InputError(
            f"stage {until!r} cannot be run on {type(value).__name__}",
            "that is what it returns, or a stage behind it",
            "Give it a value from ahead of it: " + ", ".join(t.__name__ for t in takes[: end + 1]),
        )
    work = Work(instruments, progress)
    for stage in stages[start : end + 1]:
        value = stage.run(value, work)
    return value
