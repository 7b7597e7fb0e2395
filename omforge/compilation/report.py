"""report.json: what compile did to a model, kept in its bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omforge.ir.weights import writing
from omforge.passes import PassRun
from omforge.recognition.coverage import Coverage
from omforge.recognition.lengths.bounds import Bound
from omforge.rewriting.events import Event


def write_report(
    path: Path,
    passes: Sequence[PassRun],
    nodes: dict[str, int],
    coverage: Coverage,
    told: Sequence[Event],
    bounds: Sequence[Bound],
    quantization: dict[str, Any],
) -> None:
    """What happened, without times: the same input gives the same bytes."""
    report: dict[str, Any] = {
        "passes": [
            {
                "pass": str(run.step),
                "rewrites": run.rewrites,
                "nodes_before": run.nodes_before,
                "nodes_after": run.nodes_after,
            }
            for run in passes
        ],
        "nodes": nodes,
        "coverage": coverage.to_json(),
        "events": [dataclasses.asdict(event) for event in told],
        "bounds": [dataclasses.asdict(bound) for bound in bounds],
        "quantization": quantization,
    }
    with writing(path):
        path.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
