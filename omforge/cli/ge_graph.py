"""`omforge air`: what is in a GE graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from omforge.cli import console
from omforge.cli.options import Json, Verbose


def air(
    file: Annotated[Path, typer.Argument(metavar="FILE.air", help="A GE graph, of any tool.")],
    types: Annotated[
        bool, typer.Option("--types", help="Only how often each operator is there.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show a GE graph (.air): its operators, what each reads by name, is told, and gives."""
    from omforge.air.files import read_air
    from omforge.air.show import lines, to_json

    found = read_air(file)
    if as_json:
        console.show_json(to_json(found))
    elif types:
        counts = Counter(op.type for graph in found.graphs for op in graph.ops)
        width = max(map(len, counts), default=0)
        told = [f"{name:<{width}}  {count}" for name, count in counts.most_common()]
        console.show("\n".join(told))
    else:
        console.show("\n".join(lines(found)))
