"""Passes that are a pattern and its replacement, and the driver that applies them.

A rewrite is a transaction: `rewrite` receives a `Match` and a `Builder` that only records, and the
graph changes when it has returned, or not at all.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from omforge import ir
from omforge.ir.errors import CheckError, InputError
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import Match, NoMatch
from omforge.rewriting.matcher import Found, Matcher
from omforge.rewriting.pattern import ANY, Pat, Pattern, PatternOps
from omforge.rewriting.rewrite_budget import CURRENT
from omforge.rewriting.splice import Names, splice

__all__ = ["ANY", "Builder", "Match", "NoMatch", "Pat", "PatternOps", "RewritePass", "splice"]

log = logging.getLogger(__name__)

Replacement = ir.Value | tuple[ir.Value, ...]


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass that replaces every match of a pattern, until there is none.

    Functions are not searched: inline them first.
    """

    bound: ClassVar[int] = 64
    """How often a rewrite may apply to what it made itself before that is an error."""

    def __post_init__(self) -> None:
        """Look at the pattern once, so that one that can match nothing is told when it is made.

        Raises:
            InputError: It names what ONNX does not have, or is no pattern.
        """
        name = type(self).__name__
        try:
            Pattern(self.pattern)
            if type(self).near_miss is not RewritePass.near_miss:
                Pattern(self.near_miss)
        except TypeError as error:
            raise InputError(
                f"the pattern of {name} can match nothing",
                str(error),
                f"Mend {name}.pattern, or near_miss",
            ) from error

    def pattern(self, op: PatternOps, *variables: Any, **more: Any) -> Pat | tuple[Pat, ...]:
        """Return what to replace; see `omforge.rewriting.pattern` for the language.

        Parameters after `op` are the pattern's variables. A tuple is a replacement of several
        values.
        """
        raise NotImplementedError(f"{type(self).__name__}.pattern")

    def rewrite(self, op: Builder, m: Match) -> Replacement:
        """Return the replacement, one value per root of the pattern.

        Raises:
            NoMatch: This match must not be rewritten.
        """
        raise NotImplementedError(f"{type(self).__name__}.rewrite")

    def near_miss(self, op: PatternOps) -> Pat:
        """Return a smaller pattern, whose matches that were not replaced are told; optional."""
        raise NotImplementedError(f"{type(self).__name__}.near_miss")

    def run(self, model: ir.Model) -> int:
        """Replace every match; what was left alone is recorded as an event."""
        return _Driver(self, model).run()


@dataclass(frozen=True)
class _Refusal:
    """A root that was not replaced: how much of the pattern it had, and what was wrong."""

    root: ir.Node
    nodes: frozenset[ir.Node]
    reason: str
    complete: bool
    """The whole pattern matched, and the rewrite or the driver declined."""


class _Driver:
    """One run of one pass over one model."""

    def __init__(self, step: RewritePass, model: ir.Model) -> None:
        self.step = step
        self.model = model
        self.pattern = Pattern(step.pattern)
        self.matcher = Matcher(self.pattern, model.opset_imports)
        self.names = Names(model)
        self.refusals: dict[ir.Node, _Refusal] = {}
        self.generations: dict[ir.Node, int] = {}
        """How many rewrites, one on top of the other, made a node; 0 if it is not here."""

    def run(self) -> int:
        """Sweep the graphs until a sweep finds nothing."""
        total = 0
        while count := self._sweep():
            total += count
        self._tell()
        return total

    def _sweep(self) -> int:
        self.refusals.clear()
        graphs = list(self.model.graphs())
        # Last nodes first: of `op.Add(scaled, beta) | scaled` the larger one must win.
        return sum(self._visit(node) for graph in graphs for node in reversed(list(graph)))

    def _visit(self, node: ir.Node) -> bool:
        if node.graph is None:
            return False  # an earlier rewrite of this sweep removed it
        if self.pattern.root_ops is not None and node.op_type not in self.pattern.root_ops:
            return False
        declined: list[_Refusal] = []
        for found in self.matcher.match(node):
            try:
                if not self._apply(found):
                    return False
            except NoMatch as no:
                log.debug("%s: %s: %s", self.step.name, ir.describe(node), no.why)
                declined.append(_Refusal(node, frozenset(found.nodes), no.why, complete=True))
            except Exception as error:  # a bug of the pass: it goes up, and says where it happened
                error.add_note(f"at {ir.describe(node)}")
                raise
            else:
                return True
        self._note(node, declined)
        return False

    def _look(self, node: ir.Node) -> None:
        """Match, and apply nothing."""
        complete = [
            _Refusal(node, frozenset(found.nodes), "the pattern matches", complete=True)
            for found in self.matcher.match(node)
        ]
        self._note(node, complete)

    def _note(self, node: ir.Node, declined: list[_Refusal]) -> None:
        closest = self.matcher.closest
        if declined:
            self.refusals[node] = declined[0]
        elif closest is not None and closest.matched:
            reached = {closest.at.producer()} if closest.at is not None else set[ir.Node]()
            nodes = frozenset(node for node in (*closest.matched, *reached) if node is not None)
            self.refusals[node] = _Refusal(node, nodes, str(closest), complete=False)

    def _apply(self, found: Found) -> bool:
        """Replace one match; NoMatch leaves the graph as it was, and so does a spent budget."""
        m = Match(found)
        _check_interior(m)
        generation = 1 + max(self.generations.get(node, 0) for node in m.nodes)
        if generation > self.step.bound:
            raise CheckError(
                f"{self.step.name} rewrites its own output without end at {ir.describe(m.root)}",
                f"{generation} rewrites applied one on top of the other there",
                "Make its replacement differ from its pattern",
            )
        graph = m.root.graph
        assert graph is not None
        with Builder(self.model, graph) as op:
            new = self._values(self.step.rewrite(op, m), m)
            budget, where = CURRENT.get(), ir.describe(m.root)
            if budget is not None and not budget.allows():
                return False
            splice(op, m.outputs, new, by=self.step.name, matched=m.nodes, names=self.names)
        if budget is not None:
            budget.spend(f"{self.step} at {where}")  # only now: a splice may decline
        self.generations.update(dict.fromkeys(op.nodes, generation))
        return True

    def _values(self, made: object, m: Match) -> tuple[ir.Value, ...]:
        """What a rewrite returned, which may be anything, as one value for each root.

        Raises:
            CheckError: It is something else.
        """
        new = cast("tuple[object, ...]", made) if isinstance(made, tuple) else (made,)
        values = tuple(value for value in new if isinstance(value, ir.Value))
        wanted = len(m.outputs)
        if len(values) == len(new) == wanted:
            return values
        kinds = ", ".join(type(value).__name__ for value in new)
        what = "nothing (None)" if made is None else f"{len(new)} results ({kinds})"
        raise CheckError(
            f"{self.step.name} returned {what} at {ir.describe(m.root)}",
            f"rewrite() must return one value for each root of the pattern, which has {wanted}",
            'Return the replacement; raise NoMatch("why", value) to leave a match alone',
        )

    def attempts(self) -> list[str]:
        """How far each attempt came, the farthest first; nothing is replaced."""
        for graph in self.model.graphs():
            for node in reversed(list(graph)):
                if self.pattern.root_ops is None or node.op_type in self.pattern.root_ops:
                    self._look(node)
        found = sorted(self.refusals.values(), key=lambda refusal: -len(refusal.nodes))
        return [
            f"at {ir.describe(refusal.root)}, of which {len(refusal.nodes)} nodes fit: "
            f"{refusal.reason}"
            for refusal in found
        ]

    def _tell(self) -> None:
        """Record the matches that were declined, and the near misses."""
        told: set[ir.Node] = set()
        for refusal in self.refusals.values():
            if refusal.complete:
                record(self.model, self.step.name, refusal.root, refusal.reason)
                told |= refusal.nodes
        for found in self._near_misses():
            root = found.nodes[0]
            if root in told:
                continue
            around = [r for r in self.refusals.values() if root in r.nodes]
            closest = max(around, key=lambda refusal: len(refusal.nodes), default=None)
            reason = closest.reason if closest else "nothing that uses it completes the pattern"
            record(self.model, self.step.name, root, reason)

    def _near_misses(self) -> Iterator[Found]:
        if type(self.step).near_miss is RewritePass.near_miss:
            return
        matcher = Matcher(Pattern(self.step.near_miss), self.model.opset_imports)
        for graph in self.model.graphs():
            for node in graph:
                found = next(matcher.match(node), None)
                if found is not None:
                    yield found


def closest_attempts(step: RewritePass, model: ir.Model) -> list[str]:
    """Return where a pattern came close to a match, the closest first, and what stopped it.

    Args:
        step: The pass; what it declines itself, after a match, is an event of its run.
        model: The model, which stays as it is.
    """
    driver = _Driver(step, model)
    found = driver.attempts()
    if not found and driver.pattern.root_ops is not None:
        return [f"no node is a {' or a '.join(sorted(driver.pattern.root_ops))}, its last operator"]
    return found


def _check_interior(m: Match) -> None:
    """Values that the replacement does not give must not be needed outside the match."""
    inside = set(m.nodes)
    given = {*m.outputs, *m.may_escape}
    for value in (value for node in m.nodes for value in node.outputs if value not in given):
        if value.is_graph_output():
            raise NoMatch(f"{value.name} is also an output of the graph", value)
        for user, _ in value.uses():
            if user not in inside:
                raise NoMatch(f"{value.name} is also used by {ir.describe(user)}", value)
