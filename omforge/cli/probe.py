"""`omforge probe`: what only CANN and a device can tell, asked or exported, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from omforge.cli import console
from omforge.cli.options import Atc, Facts, Json, Verbose

if TYPE_CHECKING:
    from omforge.probe.results import Outcome

_EVIDENCE = 72
"""Characters of the evidence that the table shows; the file has all of it."""


def probe(
    target: Annotated[
        str, typer.Option("--target", help="The SoC, as atc's --soc_version: Ascend310P3, ...")
    ] = "",
    atc: Atc = "auto",
    backend: Annotated[
        Literal["acl", "sim", "none"],
        typer.Option(help="acl: a device; sim: a simulated one; none: ask atc alone."),
    ] = "acl",
    device: Annotated[int, typer.Option(min=0, help="The device's number.")] = 0,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="This probe, and those it stands on; repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The facts file; facts-CANN-SOC.json if absent."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Probes at a time; 0: up to four.")] = 0,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds for each; 0: its own.")] = 0,
    again: Annotated[
        bool, typer.Option("--again", help="Ask also what an interrupted run has answered.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Only write the kit, for a machine without omforge: see its probe.sh.",
        ),
    ] = None,
    read: Annotated[
        Path | None,
        typer.Option(metavar="RESULT", help="Only turn a kit's result.json into a facts file."),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Only measure a bundle: first token, tokens a second."),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=0, help="Of --bench; 0: 128, or half of the context.")
    ] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Decode steps of --bench; 0: 64.")] = 0,
    facts: Facts = None,
    unprofiled: Annotated[bool, typer.Option("--unprofiled", hidden=True)] = False,
    show: Annotated[bool, typer.Option("--list", help="Only list the probes.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Ask CANN and a device what the tables can only infer, and write facts for --facts."""
    from omforge.compilation.cpu import require_device
    from omforge.ir.errors import InputError
    from omforge.lowering.target import target as find_target
    from omforge.probe.kit import write_kit
    from omforge.probe.results import read_result
    from omforge.probe.run import ProbeOptions, run_probes

    if read is not None:
        found = read_result(read)
        _tell(found, found.write(output), as_json=as_json)
        return
    if bench is not None:
        _bench(bench, backend, prompt_tokens, steps, facts, profile=not unprofiled, as_json=as_json)
        return
    if show:
        _list(target, as_json=as_json)
        return
    if not target:
        raise InputError(
            "--target is missing",
            "the probes are those of one SoC",
            "Give --target SOC, or one of --read, --bench and --list",
        )
    soc = find_target(target)
    require_device(soc, "probe", "its questions are those of CANN and a device")
    if export is not None:
        with console.progress() as bar:
            write_kit(export.absolute(), soc, bar)
        if as_json:
            console.show_json({"kit": str(export)})
        else:
            console.show(f"{export}: take it to the machine that has CANN, and run probe.sh there")
        return
    options = ProbeOptions(atc, backend, device, tuple(only or ()), jobs, timeout, again)
    with console.progress() as bar:
        found, file = run_probes(soc, options, output, bar)
    _tell(found, file, as_json=as_json)


def _tell(found: Outcome, file: Path, *, as_json: bool) -> None:
    if as_json:
        console.show_json({"facts": str(file), **found.document()})
        return
    console.show_table(
        ("fact", "expected", "seen", "evidence"),
        [
            (
                answer.probe,
                answer.expected or "-",
                answer.value or "-",
                answer.evidence.splitlines()[0][:_EVIDENCE] if answer.evidence else "",
            )
            for answer in found.answers
        ],
    )
    console.show()
    for answer in found.surprises:
        if answer.expected:
            console.show(f"not as expected: {answer.probe} is {answer.value}: {answer.meaning}")
    of = "the simulator: no facts of a device" if found.simulated else found.soc
    console.show(f"{file}: {found.seen} of {len(found.answers)} questions answered by {of}")


def _bench(
    folder: Path,
    backend: str,
    prompt: int,
    steps: int,
    facts: Path | None,
    *,
    profile: bool,
    as_json: bool,
) -> None:
    from omforge.bundle.manifest import Manifest
    from omforge.cli.facts import options_of_device
    from omforge.ir.errors import InputError
    from omforge.probe.bench import BenchOptions, measure

    if backend == "none":
        raise InputError(
            "--bench --backend none", "a bundle is measured where it runs", "Take acl, or sim"
        )
    ways = options_of_device(facts, Manifest.load(folder), backend)
    with console.progress() as bar:
        found = measure(folder, BenchOptions(backend, prompt, steps, ways, profile), bar)
    if as_json:
        console.show_json(found.to_json())
    else:
        console.show("\n".join(found.lines()))


def _list(target: str, *, as_json: bool) -> None:
    from omforge.lowering.target import target as find_target
    from omforge.probe.questions import PROBES, probes_for
    from omforge.probe.settled import settled

    found = probes_for(find_target(target).family.name) if target else tuple(PROBES.values())
    if as_json:
        console.show_json(
            {
                "probes": [
                    {
                        "id": each.id,
                        "question": each.question,
                        "families": sorted(each.families),
                        "needs": each.needs(min(each.families)),
                        "means": dict(each.means),
                        "expected": each.expected,
                        "settles": list(settled(each)),
                    }
                    for each in found
                ]
            }
        )
        return
    rows = [
        (each.id, each.needs(min(each.families)), each.question, "; ".join(settled(each)))
        for each in found
    ]
    console.show_table(("probe", "needs", "question", "settles"), rows)
