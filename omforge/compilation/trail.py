"""What a compilation has done so far: the passes that ran, and how large its graphs are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from omforge.rewriting.pass_run import PassRun


@dataclass(frozen=True)
class Trail:
    """What has been done.

    Attributes:
        passes: In order.
        nodes: Nodes by graph: exported, raised, canonical, and each bucket.
    """

    passes: tuple[PassRun, ...] = ()
    nodes: Mapping[str, int] = field(default_factory=dict[str, int])

    def and_then(self, passes: Iterable[PassRun] = (), **nodes: int) -> Trail:
        """Return the trail with more at its end."""
        return Trail((*self.passes, *passes), {**self.nodes, **nodes})
