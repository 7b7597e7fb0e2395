"""What one pass of a pipeline did."""

from dataclasses import dataclass

from omforge.rewriting.base import Pass


@dataclass
class PassRun:
    """What one pass of a pipeline did. Instruments read it, and may add to it.

    Attributes:
        index: Position in the pipeline, from 1.
        step: The pass.
        count: Passes of the pipeline.
        rewrites: What it returned.
        nodes_before: Nodes of the model, subgraphs included, when it started.
        nodes_after: The same when it ended.
        seconds: Time in the pass itself, without instruments.
        skipped: An instrument kept it from running.
        max_abs_diff: Largest difference of any output, where an instrument compared.
        note: A remark of an instrument ("not compared: ...").
    """

    index: int
    step: Pass
    count: int = 1
    rewrites: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    skipped: bool = False
    max_abs_diff: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The name of the pass."""
        return self.step.name

    @property
    def changed(self) -> bool:
        """Whether the pass reported a rewrite."""
        return self.rewrites > 0
