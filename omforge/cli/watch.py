"""What watches the passes of a command: the flags that `opt` and `compile` share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omforge.cli import console
from omforge.cli.options import pass_names

if TYPE_CHECKING:
    from omforge import ir
    from omforge.rewriting.instruments import Instrument, Timing


@dataclass(frozen=True)
class WatchFlags:
    """The flags, as they were given.

    Attributes:
        print_after: Names of passes.
        print_after_changed: After passes that changed something.
        verify_each: Verify the graph after each pass.
        time: Add what each pass took.
        bisect_limit: Run only so many passes.
        bisect_rewrites: Make only so many rewrites.
        reproducer: Where to keep the graph ahead of a pass that fails.
        compare_each: Run the model on the CPU before and after each pass.
        feeds: Compare on these inputs.
    """

    print_after: str = ""
    print_after_changed: bool = False
    verify_each: bool = True
    time: bool = False
    bisect_limit: int | None = None
    bisect_rewrites: int | None = None
    reproducer: Path | None = None
    compare_each: bool = False
    feeds: Path | None = None

    @property
    def compares(self) -> bool:
        """Whether numbers are compared."""
        return self.compare_each or self.feeds is not None


@dataclass(frozen=True)
class Watch:
    """What watches.

    Attributes:
        instruments: In the order in which they are told.
        remark: Why nothing is compared although it was asked for; "" if it is.
        clock: What each pass took.
    """

    instruments: Sequence[Instrument]
    remark: str
    clock: Timing = field(repr=False)

    def show_time(self) -> None:
        """Show what each pass took, the slowest first."""
        console.show(f"\n{self.clock.table()}")


def watch(
    flags: WatchFlags,
    names: Sequence[str],
    comparison: Callable[[], tuple[list[Instrument], str]],
    bar: console.Progress | None,
) -> Watch:
    """Make the instruments that some flags ask for.

    Args:
        flags: What was given.
        names: The passes that there are, for --print-after.
        comparison: What compares on inputs of its own making, or why it does not.
        bar: Where each pass is shown.

    Raises:
        InputError: --print-after names a pass that is not there, or the feeds cannot be read.
    """
    from omforge.passes import ALL_PASSES
    from omforge.rewriting.instruments import (
        Bisect,
        BisectRewrites,
        CompareEach,
        PrintAfter,
        Timing,
        VerifyEach,
    )
    from omforge.rewriting.reproducer import Reproducer, saved_feeds

    printed = pass_names(flags.print_after, names)
    clock, remark = Timing(), ""
    made: list[Instrument] = [clock]
    if flags.bisect_limit is not None:
        made.append(Bisect(flags.bisect_limit))
    if flags.bisect_rewrites is not None:
        made.append(BisectRewrites(flags.bisect_rewrites))
    if flags.verify_each:
        made.append(VerifyEach())
    if flags.feeds is not None:
        made.append(CompareEach(saved_feeds(flags.feeds)))
    elif flags.compare_each:
        more, remark = comparison()
        made += more
    if printed or flags.print_after_changed:
        changed = flags.print_after_changed
        made.append(PrintAfter(console.VisibleErrors(), printed, changed=changed))
    keeps = Reproducer(flags.reproducer, made, ALL_PASSES)
    return Watch([*announcer(bar), keeps, *made], remark, clock)


def export_comparison(
    source: Path, context: int | None
) -> Callable[[], tuple[list[Instrument], str]]:
    """What compares an export's passes, on positions that the export and the caller allow."""

    def made() -> tuple[list[Instrument], str]:
        from omforge import ir
        from omforge.bundle.source import find_source
        from omforge.recognition.config import read_config

        found = find_source(source)
        config = read_config(found.folder)
        limits = (context, config.max_positions if config is not None else None)
        longest = min((limit for limit in limits if limit is not None), default=2048)
        return comparer(ir.load(found.graph), longest)

    return made


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
