"""The matrix: every family by every exporter, what is raised of it, and whether its numbers stay.

`python -m tests.matrix` prints the table that README.md shows.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omforge import ir
from omforge.compilation.compare_feeds import make_feeds
from omforge.ir.numerics import max_abs_diff, run
from omforge.passes import make_pipeline
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.passes.tabulate_rotary import TabulateRotary
from omforge.recognition.config import read_config
from omforge.recognition.coverage import Coverage, measure
from omforge.recognition.feeds import Feeds
from tests.exports import EXPORTS, export

KINDS = ("attention", "rotary", "norm", "mlp")


@dataclass(frozen=True)
class Cell:
    """One export: what was raised, nodes at each level, the largest difference of any output."""

    route: str
    family: str
    coverage: Coverage
    exported: int
    raised: int
    canonical: int
    max_abs_diff: float

    def row(self) -> str:
        """One line of the table."""
        kinds = self.coverage.kinds
        found = " | ".join(
            f"{kinds[k].found}/{kinds[k].expected}" if kinds[k].expected else "-" for k in KINDS
        )
        lost = "sliding window" if self.coverage.lost else ""
        return (
            f"| {self.family} | {self.route} | {found} | {self.exported} | {self.raised} "
            f"| {self.canonical} | {self.max_abs_diff:.1e} | {lost} |"
        )


def measure_cell(route: str, family: str, path: Path) -> Cell:
    """Raise one export, compare it with itself before, and count."""
    before, model = ir.load(path), ir.load(path)
    exported = model.graph.num_nodes()
    make_pipeline("raise").run(model)
    raised = model.graph.num_nodes()
    coverage = measure(model, read_config(path.parent))
    difference = 0.0
    for feeds in _admitted(before, make_feeds(model)):
        expected, got = run(before, feeds), run(model, feeds)
        difference = max([difference, *(max_abs_diff(got[k], v) for k, v in expected.items())])
    for step in (LastTokenLogits(), FuseKvIo(), TabulateRotary(64)):
        step.run(model)
    canonical = model.graph.num_nodes()
    return Cell(route, family, coverage, exported, raised, canonical, difference)


def _admitted(model: ir.Model, feeds: Sequence[Feeds]) -> list[Feeds]:
    """GroupQueryAttention's kernel takes rows of one length, and one row behind a past."""
    if all(node.op_type != "GroupQueryAttention" for node in model.graph):
        return list(feeds)
    return [f for f in feeds if len(f["input_ids"]) == 1]


def table(cells: Sequence[Cell]) -> str:
    """Markdown, a row a cell."""
    head = (
        "| family | exporter | attention | rotary | norm | MLP | exported | raised | canonical "
        "| max abs diff | lost by the exporter |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(cell.row() for cell in cells)]) + "\n"


def measure_all() -> list[Cell]:
    """Measure every export there is, by family."""
    cells: list[Cell] = []
    for route, family in sorted(EXPORTS, key=lambda pair: pair[::-1]):
        with tempfile.TemporaryDirectory() as folder:
            cells.append(measure_cell(route, family, export(route, family, Path(folder))))
    return cells


if __name__ == "__main__":
    print(table(measure_all()), end="")  # noqa: T201
