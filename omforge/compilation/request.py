"""Stage `read`: what is wrong with a request is said before anything is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from omforge.atc.command import check_path
from omforge.atc.find import Atc, choose_atc
from omforge.bundle.destination import destination_of
from omforge.bundle.source import Source, find_source
from omforge.compilation.activation_options import atc_for_int8
from omforge.compilation.cpu import cpu_options
from omforge.compilation.float_options import check_dtype
from omforge.compilation.graph_plan import plan_graphs, with_sizes
from omforge.compilation.options import CompileOptions
from omforge.compilation.quantize_options import (
    QuantizeOptions,
    check_quantize,
    parse_quantize,
    read_calibration,
)
from omforge.compilation.work import Work
from omforge.lowering.legalize import check_forms
from omforge.lowering.target import Target, target
from omforge.recognition.config import ModelConfig, read_config
from omforge.recognition.lengths.bounds import Bound, config_bounds

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Request:
    """What is to be compiled, as the caller said it.

    Attributes:
        source: The export's folder or .onnx file, or what was found there.
        output: The bundle's folder.
        options: What to make.
    """

    source: str | Path | Source
    output: str | Path
    options: CompileOptions


@dataclass(frozen=True)
class Checked:
    """A request in which nothing is wrong that can be told without the graph.

    Attributes:
        source: The export: its files.
        config: What its config.json says; None where there is none.
        bounds: What bounds a text, of what config.json says.
        soc: The target.
        destination: The bundle's folder.
        options: As they were given, but for flags of atc that others ask for.
        scheme: How weights are stored; None for floats.
        tokens: Of the calibration text, in pieces [S].
        atc: What compiles; None for nothing.
        counting: Only bytes are wanted: what a calibration text decides is left blank.
    """

    source: Source
    config: ModelConfig | None
    bounds: tuple[Bound, ...]
    soc: Target
    destination: Path
    options: CompileOptions
    scheme: QuantizeOptions | None
    tokens: tuple[Array, ...]
    atc: Atc | None
    counting: bool = False


def read_request(request: Request, work: Work) -> Checked:
    """Find the export's files, and refuse what cannot be whatever its graph holds.

    Raises:
        InputError: The source, the target or an option is wrong.
    """
    options = request.options
    given = request.source
    source = given if isinstance(given, Source) else find_source(given)
    soc = dataclasses.replace(target(options.soc), facts=options.facts)
    options = cpu_options(options, soc)
    destination = destination_of(Path(request.output))
    config = read_config(source.folder)
    bounds = tuple(config_bounds(config))
    sized = with_sizes(options, bounds)
    check_forms(dict(options.forms))
    options.atc.words()  # refuses a wrong flag
    check_dtype(options.dtype, soc, options.atc)
    scheme = parse_quantize(options.quantize)
    check_quantize(
        scheme,
        options.kv_dtype,
        soc,
        dtype=options.dtype,
        calibration=options.calibration is not None,
        gears=options.gears,
        budget=options.budget,
    )
    if scheme is not None and scheme.activations is not None:
        options = dataclasses.replace(options, atc=atc_for_int8(options.atc))
    tokens = read_calibration(options.calibration, source.folder)
    atc = None if options.front == "ort" else choose_atc(options.build.atc)
    if atc is not None:
        check_path("bundle", str(destination.resolve()))
    work.expect(len(plan_graphs(sized)))
    return Checked(source, config, bounds, soc, destination, options, scheme, tokens, atc)
