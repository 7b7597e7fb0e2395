"""What passes have to tell about a model besides the model itself: above all, fusions they missed.

Events are kept on the model (in memory, never in the file), so that a report at the end of a
pipeline can say which norm of which layer stayed unfused, and why.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from omforge import ir

log = logging.getLogger(__name__)

_KEY = "omforge.events"


@dataclass(frozen=True)
class Event:
    """One thing a pass wants told.

    Attributes:
        pass_name: The pass, by its registered name.
        where: The place, as `ir.describe` writes it for a node.
        reason: What was left alone and why, with both sides of the constraint that failed.
        done: Something was done there rather than left alone; `reason` says what.
    """

    pass_name: str
    where: str
    reason: str
    done: bool = False

    def __str__(self) -> str:
        if self.done:
            return f"{self.pass_name}: {self.where}: {self.reason}"
        return f"{self.pass_name}: left {self.where} alone: {self.reason}"


def record(
    model: ir.Model,
    pass_name: str,
    where: ir.Node | ir.Value | str,
    reason: str,
    *,
    done: bool = False,
) -> None:
    """Keep an event on the model and log it at INFO; the same event is kept once.

    Args:
        model: The model that the pass runs on.
        pass_name: The pass, by its registered name.
        where: The node, the value (named by its producer) or the words for the place.
        reason: What was left alone and why.
        done: See `Event`.
    """
    event = Event(pass_name, place(where), reason, done)
    if event not in events(model):
        model.meta[_KEY] = (*events(model), event)
        log.info("%s", event)


def events(model: ir.Model) -> tuple[Event, ...]:
    """Return the events recorded on a model, oldest first."""
    kept: Any = model.meta
    return kept.get(_KEY, ())


def event_kind(event: Event) -> tuple[str, bool, str]:
    """What equal events share: names differ from layer to layer by their numbers alone."""
    return event.pass_name, event.done, re.sub(r"\d+", "#", event.reason)


def grouped(told: Iterable[Event]) -> list[str]:
    """Return a line for each kind of event: the first of them, and how many more there are."""
    kinds: dict[tuple[str, bool, str], list[Event]] = {}
    for event in told:
        kinds.setdefault(event_kind(event), []).append(event)
    return [
        f"{same[0]} (and {len(same) - 1} more)" if len(same) > 1 else str(same[0])
        for same in kinds.values()
    ]


def place(where: ir.Node | ir.Value | str) -> str:
    """Return the words for a place in a graph."""
    if isinstance(where, str):
        return where
    if isinstance(where, ir.Node):
        return ir.describe(where)
    node = where.producer()
    return f"{where.name}, which {ir.describe(node)} makes" if node else str(where.name)
