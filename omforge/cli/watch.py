"""What watches the passes of a command: the verifier, the progress bar, the comparison."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from omforge.cli import console

if TYPE_CHECKING:
    from omforge import ir
    from omforge.rewriting.instruments import Instrument


def compile_watch(
    source: Path, context: int | None, compare: bool, bar: console.Progress | None
) -> tuple[list[Instrument], str]:
    """What watches the passes, and why nothing is compared although it was asked for."""
    from omforge import ir
    from omforge.bundle.source import find_source
    from omforge.passes import ALL_PASSES
    from omforge.recognition.config import read_config
    from omforge.rewriting.instruments import VerifyEach
    from omforge.rewriting.reproducer import Reproducer

    watch: list[Instrument] = [*announcer(bar), VerifyEach()]
    if not compare:
        return [Reproducer(registry=ALL_PASSES), *watch], ""
    found = find_source(source)
    config = read_config(found.folder)
    limits = (context, config.max_positions if config is not None else None)
    longest = min((limit for limit in limits if limit is not None), default=2048)
    more, remark = comparer(ir.load(found.graph), longest)
    return [Reproducer(None, more, ALL_PASSES), *watch, *more], remark


def comparer(model: ir.Model, longest: int) -> tuple[list[Instrument], str]:
    """What compares the model before and after each pass; or why it does not."""
    from omforge.compilation.compare_feeds import make_feeds
    from omforge.recognition.feeds import COMPARE_LIMIT, weight_bytes
    from omforge.rewriting.instruments import CompareEach

    size = weight_bytes(model)
    if size > COMPARE_LIMIT:
        limit = COMPARE_LIMIT >> 20
        return [], f"not compared: {size >> 20} MiB of weights are above the limit of {limit} MiB"
    return [CompareEach(functools.partial(make_feeds, longest=longest))], ""


def announcer(bar: console.Progress | None) -> list[Instrument]:
    """Show each pass in the progress bar, if there is one."""
    from omforge.rewriting.instruments import Instrument
    from omforge.rewriting.pass_run import PassRun

    if bar is None:
        return []

    class Announcer(Instrument):
        def before(self, run: PassRun, model: ir.Model) -> None:
            bar.detail(run.name)

    return [Announcer()]
