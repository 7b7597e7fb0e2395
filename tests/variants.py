"""Exports written otherwise: transformed, raised, and compared with what they were."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime

from omforge import ir
from omforge.compilation.compare_feeds import make_feeds
from omforge.ir.numerics import TOLERANCES, max_abs_diff, within
from omforge.passes import make_pipeline
from omforge.recognition.config import ModelConfig, read_config
from omforge.recognition.coverage import Coverage, measure
from omforge.recognition.feeds import Feeds
from omforge.testing.metamorphic import transform
from tests.exports import export

Steps = Sequence[tuple[str, int]]
FP32 = TOLERANCES["float32"]


@dataclass(frozen=True)
class Original:
    """An export, what raising it covers, and its numbers on some inputs."""

    model: ir.Model
    config: ModelConfig | None
    coverage: Coverage
    feeds: tuple[Feeds, ...]
    outputs: tuple[list[np.ndarray], ...]


@cache
def original(route: str, family: str) -> Original:
    """The export as it is; treat it as read-only."""
    with TemporaryDirectory() as folder:
        path = export(route, family, Path(folder))
        model, config = ir.from_proto(ir.to_proto(ir.load(path))), read_config(path.parent)
    raised = model.clone()
    make_pipeline("raise").run(raised)
    feeds = admitted(model, make_feeds(raised))
    return Original(model, config, measure(raised, config), feeds, outputs(model, feeds))


def admitted(model: ir.Model, feeds: Sequence[Feeds]) -> tuple[Feeds, ...]:
    """Of what a model takes: padded rows of a prefill, and a decoding step with a past.

    GroupQueryAttention takes several rows with a past one token at a time, and pads on the right.
    """
    if any(node.op_type == "GroupQueryAttention" for node in model.graph):
        return tuple(f for f in feeds if len(f["input_ids"]) == 1)[1:]
    return tuple(feeds[2:])


def outputs(model: ir.Model, feeds: Sequence[Feeds]) -> tuple[list[np.ndarray], ...]:
    """What ONNX Runtime returns, the inputs taken in their order, as names may differ."""
    return run(ir.to_proto(model), feeds)


def run(proto: onnx.ModelProto, feeds: Sequence[Feeds]) -> tuple[list[np.ndarray], ...]:
    """The same of what would be written to a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [given.name for given in session.get_inputs()]
    order = [given.name for given in proto.graph.input]
    results: list[list[np.ndarray]] = []
    for given in feeds:
        by_name = dict(zip(order, given.values(), strict=True))
        results.append(session.run(None, {name: by_name[name] for name in names}))
    return tuple(results)


def difference(got: Sequence[list[Any]], expected: Sequence[list[Any]]) -> str:
    """The first output that differs, empty if none does."""
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        for position, (actual, reference) in enumerate(zip(mine, theirs, strict=True)):
            if not within(actual, reference, FP32):
                by = max_abs_diff(actual, reference)
                return f"output {position} on inputs {index} differs by {by:g}"
    return ""


def problem(route: str, family: str, steps: Steps) -> str:
    """What is wrong with raising a transformed export, empty if nothing is."""
    before = original(route, family)
    model = before.model.clone()
    changed = transform(model, steps)
    proto = ir.to_proto(model)
    told = difference(run(proto, before.feeds), before.outputs)
    if told:
        return f"the transformation itself changes numbers {changed}: {told}"
    model = ir.from_proto(proto)  # as a file would hand it over
    make_pipeline("raise").run(model)
    coverage = measure(model, before.config)
    if _counts(coverage) != _counts(before.coverage):
        return f"{changed}: {_counts(coverage)}, not {_counts(before.coverage)}: {coverage}"
    told = difference(outputs(model, before.feeds), before.outputs)
    return f"{changed}: the raised graph: {told}" if told else ""


def _counts(coverage: Coverage) -> dict[str, object]:
    found = {name: (kind.found, kind.expected) for name, kind in coverage.kinds.items()}
    return {**found, "lost": coverage.lost}
