"""How many rewrites may still be made: what a bisection by rewrites hands to the driver."""

from __future__ import annotations

import logging
from contextvars import ContextVar

log = logging.getLogger(__name__)


class RewriteBudget:
    """Counts rewrites down.

    Attributes:
        left: Rewrites that may still be made.
        made: Those that were.
        refused: Those that were asked for when none was left.
    """

    def __init__(self, left: int) -> None:
        self.left = left
        self.made = 0
        self.refused = 0

    def allows(self) -> bool:
        """Whether one more may be made."""
        self.refused += self.left <= 0
        return self.left > 0

    def spend(self, what: str) -> None:
        """Count one that was made; `what` says which, for the log."""
        self.left -= 1
        self.made += 1
        log.info("bisect: %d left behind the rewrite %s", self.left, what)


CURRENT: ContextVar[RewriteBudget | None] = ContextVar("omforge_rewrite_budget", default=None)
"""Of the pass that runs; None: as many as there are."""
