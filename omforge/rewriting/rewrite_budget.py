"""How many rewrites may still be made: what a bisection by rewrites hands to the driver."""

from __future__ import annotations

import logging
from contextvars import ContextVar

log = logging.getLogger(__name__)


class RewriteBudget:
    """Counts rewrites down.

    Attributes:
        left: Rewrites that may still be made.
        refused: Those that were asked for when none was left.
    """

    def __init__(self, left: int) -> None:
        self.left = left
        self.refused = 0

    def take(self, what: str) -> bool:
        """Whether a rewrite may be made; `what` says which, for the log."""
        if self.left <= 0:
            self.refused += 1
            return False
        self.left -= 1
        log.info("bisect: %d left behind the rewrite %s", self.left, what)
        return True


CURRENT: ContextVar[RewriteBudget | None] = ContextVar("omforge_rewrite_budget", default=None)
"""Of the pass that runs; None: as many as there are."""
