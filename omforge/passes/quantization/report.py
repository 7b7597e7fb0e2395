"""What was quantised, kept with the model for the reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from omforge import ir

_KEY = "omforge.quantization"


@dataclass(frozen=True)
class QuantizedLayer:
    """One weight that became integers.

    Attributes:
        name: The weight's.
        shape: The weight's.
        bits: Of an integer.
        group: Weights that share a scale.
        symmetric: Without zero points.
        method: How the integers were chosen.
        bytes_before: Of the float weight.
        bytes_after: Of the integers, scales and zero points.
        shared: Whether several nodes read it, an embedding lookup among them.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    group: int
    symmetric: bool
    method: str
    bytes_before: int
    bytes_after: int
    shared: bool


def add_layers(model: ir.Model, layers: Sequence[QuantizedLayer]) -> None:
    """Add to what is known of the model."""
    model.meta[_KEY] = (*quantized_layers(model), *layers)


def quantized_layers(model: ir.Model) -> tuple[QuantizedLayer, ...]:
    """What was quantised so far."""
    known = model.meta.get(_KEY, ())  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast("tuple[QuantizedLayer, ...]", known)
