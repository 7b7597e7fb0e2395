"""Stage `write`: the bundle's folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omforge import __version__, ir
from omforge.air.files import write_air
from omforge.atc.command import compile_script
from omforge.bundle import manifest as m
from omforge.compilation.buckets import Lowered, LoweredGraph
from omforge.compilation.model_facts import mask_specs, state_specs
from omforge.compilation.quantize_options import measure_quantization, quantization_json
from omforge.compilation.report import write_report
from omforge.compilation.work import Work
from omforge.ir.digests import known_sha256
from omforge.ir.folders import MadeFolder
from omforge.ir.weights import WeightWriter, writing
from omforge.lowering.emit import INLINE, emit
from omforge.rewriting.events import Event

MASK_VALUE = -30000.0
"""Finite in float16 even when a score is added, and so far below any score that its exp is 0."""

CANONICAL, WEIGHTS, REPORT, SCRIPT = "canonical.onnx", "weights.bin", "report.json", "compile.sh"


@dataclass(frozen=True)
class Written:
    """A bundle on disk that has no .om yet.

    Attributes:
        lowered: What it was made from.
        folder: Where it is.
        manifest: What it says of itself.
        events: What passes have to tell, and of weights that hold NaN or infinity.
        nonfinite: These weights, and what they hold.
    """

    lowered: Lowered
    folder: Path
    manifest: m.Manifest
    events: tuple[Event, ...]
    nonfinite: Mapping[str, str]


def write(lowered: Lowered, work: Work) -> Written:
    """Write graphs, weights, tokenizer, script, report and manifest into a folder.

    A bundle that was there is replaced when the new one is complete.

    Raises:
        InputError: The folder, or a file in it, cannot be written.
    """
    checked = lowered.canonical.raised.checked
    destination = checked.destination
    with writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
    with MadeFolder(destination) as folder:
        nonfinite = _write_graphs(lowered, folder, work)
        wrong = (Event("compile", f"tensor {k}", f"it holds {v}") for k, v in nonfinite.items())
        told = (*lowered.canonical.events, *wrong)
        for file in checked.source.companions():
            with writing(destination / file.name):
                shutil.copyfile(file, folder / file.name)
        for name in checked.source.carried:
            moved = checked.source.graph.with_name(name)
            if moved.is_file():  # a model of small weights has no file of them
                with writing(destination / name):
                    os.replace(moved, folder / name)
        commands = [graph.bucket.command for graph in lowered.graphs if graph.bucket.command]
        if commands:
            with writing(destination / SCRIPT):
                (folder / SCRIPT).write_text(compile_script(commands), encoding="utf-8")
                (folder / SCRIPT).chmod(0o755)
        _write_report(lowered, told, folder)
        manifest = _manifest(lowered, folder)
        manifest.save(folder / m.FILE_NAME)
    return Written(lowered, destination, manifest, told, nonfinite)


def _write_graphs(lowered: Lowered, folder: Path, work: Work) -> Mapping[str, str]:
    """Write all graphs over one file of weights; return the weights with NaN or infinity."""
    with WeightWriter(folder / WEIGHTS) as writer:
        work.begin(f"write {CANONICAL}")
        ir.save(lowered.canonical.model, folder / CANONICAL, writer=writer)
        for graph in lowered.graphs:
            work.begin(f"write {graph.bucket.file}")
            if lowered.canonical.raised.options.front == "air":
                write_ge_graph(graph, folder, writer)
            else:
                ir.save(graph.model, folder / graph.bucket.file, writer=writer)
        writer.close()
    return dict(writer.nonfinite)


def write_ge_graph(graph: LoweredGraph, folder: Path, writer: WeightWriter) -> None:
    """Write a bucket as a GE graph, whose large constants go to the writer's file."""
    location = writer.path.relative_to(folder).as_posix()

    def place(tensor: ir.TensorProtocol) -> tuple[str, int, int] | None:
        if tensor.nbytes < INLINE:
            if tensor.dtype.is_floating_point():
                writer.look(tensor, tensor.tobytes())
            return None
        return (location, *writer.add(tensor))

    writer.keep_alive(graph.model)
    write_air(emit(graph.model, graph.bucket.name, place).air, folder / graph.bucket.file)


def _write_report(lowered: Lowered, told: tuple[Event, ...], folder: Path) -> None:
    raised, trail = lowered.canonical.raised, lowered.trail
    quantized = quantization_json(lowered.canonical.model)
    write_report(
        folder / REPORT,
        trail.passes,
        dict(trail.nodes),
        raised.coverage,
        told,
        raised.bounds,
        quantized,
    )


def _manifest(lowered: Lowered, folder: Path) -> m.Manifest:
    """What the bundle says of itself; every other file is in the folder already."""
    canonical = lowered.canonical
    raised, facts = canonical.raised, canonical.facts
    checked, options = raised.checked, raised.options
    buckets = tuple(graph.bucket for graph in lowered.graphs)
    return m.Manifest(
        schema_version=m.SCHEMA_VERSION,
        omforge=__version__,
        target=checked.soc.soc_version,
        dtype=options.float_name,
        batch=options.batch,
        context=options.context or 0,
        model=facts.model,
        kv=facts.kv,
        masks=mask_specs(canonical.model),
        mask_value=MASK_VALUE,
        buckets=buckets,
        canonical=CANONICAL,
        weights=WEIGHTS,
        export=facts.export,
        files={
            file.name: known_sha256(file) for file in sorted(folder.iterdir()) if file.is_file()
        },
        coverage=raised.coverage.to_json(),
        states=state_specs(lowered.model),
        quantization=measure_quantization(
            canonical.model, checked.scheme, canonical.matrices, buckets[-1], lowered.graph_bytes
        ),
        task=raised.task,
        token_inputs=facts.token_inputs,
        fixed=facts.fixed,
        outputs=facts.outputs,
        embeddings=facts.embeddings,
        front=options.front,
        facts=options.facts.sha256,
        costs={str(size): float(f"{cost:.6g}") for size, cost in sorted(raised.costs.items())},
    )
