"""`omforge plan`: what a bundle takes of a device, and which of its sizes to choose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omforge.cli import console
from omforge.cli.options import (
    Batch,
    Context,
    Dtype,
    EncoderLength,
    Facts,
    Front,
    Gears,
    Graphs,
    Json,
    KvDtype,
    Layout,
    Lengths,
    Memory,
    Prefill,
    Quantize,
    Soc,
    Task,
    Verbose,
    numbers,
)


def plan(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE|BUNDLE", help="An export, or what `compile` made of one."),
    ],
    target: Soc,
    memory: Memory = "",
    lengths: Lengths = None,
    graphs: Graphs = 4,
    batch: Batch = 1,
    context: Context = None,
    prefill: Prefill = "",
    quantize: Quantize = "",
    kv_dtype: KvDtype = "fp16",
    front: Front = "auto",
    gears: Gears = False,
    dtype: Dtype = "auto",
    layout: Layout = "auto",
    task: Task = "auto",
    encoder_length: EncoderLength = None,
    facts: Facts = None,
    knobs: Annotated[
        bool, typer.Option("--knobs/--no-knobs", help="Also weigh what else could be chosen.")
    ] = True,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Tell what a bundle takes of a device: memory, bytes and products of a step, bounds of time.

    With --memory it fails where that is not enough, and says what would make it fit.
    """
    from omforge.api.planning import plan as make
    from omforge.cli.facts import chosen_facts

    with console.progress() as bar:
        made = make(
            source,
            target=target,
            memory=memory,
            lengths=lengths,
            graphs=graphs,
            batch=batch,
            context=context,
            prefill=numbers(prefill, "--prefill"),
            quantize=quantize,
            kv_dtype=kv_dtype,
            front=front,
            gears=gears,
            dtype=dtype,
            layout=layout,
            task=task,
            encoder_length=encoder_length,
            facts=chosen_facts(facts, target),
            knobs=knobs,
            progress=bar,
        )
    if as_json:
        console.show_json(made.to_json())
    else:
        console.show(str(made))
    if memory and not made.plan.fits:
        raise typer.Exit(1)
