"""What was decided for a node or a block: its form, the bytes it moves, and what was refused."""

from __future__ import annotations

from dataclasses import dataclass

from omforge.lowering.legalize.traffic import Traffic


@dataclass(frozen=True)
class Refusal:
    """A form that was not chosen: why, and what it would have moved where it could be made."""

    form: str
    reason: str
    traffic: tuple[Traffic, ...] = ()


@dataclass(frozen=True)
class Decision:
    """What was decided for one node.

    Attributes:
        op: The canonical operator.
        name: Of the node.
        form: The chosen form; "" where none is legal and the node stays.
        reason: The table's.
        traffic: The bytes that the form moves, at each gear (one entry for a static graph).
        refused: The other forms of the table.
    """

    op: str
    name: str
    form: str
    reason: str
    traffic: tuple[Traffic, ...]
    refused: tuple[Refusal, ...]
