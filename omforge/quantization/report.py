"""What was quantised, kept with the model for the reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from omforge import ir

_KEY = "omforge.quantization"
_PLAN = "omforge.quantization_budget"


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


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer.

    Attributes:
        kind: `int4:g64`, `int8`, `fp16`.
        nbytes: Of the layer's constants.
        cost: What was minimised: nats a token, or without a text the weights' error.
        weight_error: ||w' - w||^2 / ||w||^2.
        output_error: The same of what the layer computes on the text; None without a text.
    """

    kind: str
    nbytes: int
    cost: float
    weight_error: float
    output_error: float | None


@dataclass(frozen=True)
class PlannedLayer:
    """One layer, how it is stored, and how it might have been.

    Attributes:
        name: The weight's.
        place: In the exported model.
        chosen: The candidate's kind.
        candidates: The coarsest first.
    """

    name: str
    place: str
    chosen: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class BudgetPlan:
    """How the layers share a number of bytes.

    Attributes:
        budget: Bytes that all constants of the graph may have.
        nbytes: What they have.
        least: The fewest that they could have.
        most: With all these layers in floats.
        measure: `divergence` of the model's distributions on a text, or the `weights`' error.
        cost: Of all layers; costs are taken to add up.
        bound: No choice within the budget costs less.
        layers: In the order of the graph.
    """

    budget: int
    nbytes: int
    least: int
    most: int
    measure: str
    cost: float
    bound: float
    layers: tuple[PlannedLayer, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Layers by the kind that was chosen, the coarsest first."""
        kinds = [candidate.kind for layer in self.layers for candidate in layer.candidates]
        chosen = [layer.chosen for layer in self.layers]
        return {kind: chosen.count(kind) for kind in dict.fromkeys(kinds)}

    @property
    def most_sensitive(self) -> tuple[PlannedLayer, ...]:
        """The layers in falling order of what their coarsest candidate costs."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.candidates[0].cost))


def keep_plan(model: ir.Model, plan: BudgetPlan) -> None:
    """Keep it with the model."""
    model.meta[_PLAN] = plan


def budget_plan(model: ir.Model) -> BudgetPlan | None:
    """How the layers of a model share a budget; None if there was none."""
    known = model.meta.get(_PLAN)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast("BudgetPlan | None", known)


def add_layers(model: ir.Model, layers: Sequence[QuantizedLayer]) -> None:
    """Add to what is known of the model."""
    model.meta[_KEY] = (*quantized_layers(model), *layers)


def quantized_layers(model: ir.Model) -> tuple[QuantizedLayer, ...]:
    """What was quantised so far."""
    known = model.meta.get(_KEY, ())  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast("tuple[QuantizedLayer, ...]", known)
