"""Transformations that change how a model is written and not what it computes.

Exporters, their versions and optimizers between them spell one model in many ways. A pass that
finds its blocks in one spelling must find them in the others: apply a few transformations to a
model, run the pass, and compare what it found and the numbers with those of the model as it was::

    steps = [("swap-operands", 1), ("insert-casts", 7)]
    transform(model, steps)
    FuseMyBlock().run(model)

Each transformation takes the model and a source of random choices, and returns the number of places
that it changed: 0 where it has nothing to work on. Names of inputs and outputs stay, except by
`rename-cache`; their order always does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import TypeAlias

from omforge import ir
from omforge.testing import noise, respellings

Transformation: TypeAlias = Callable[[ir.Model, Random], int]

TRANSFORMATIONS: Mapping[str, Transformation] = {
    "add-dead-nodes": noise.add_dead_nodes,
    "drop-metadata": noise.drop_metadata,
    "duplicate-nodes": noise.duplicate_nodes,
    "gemm-to-matmul": respellings.gemm_to_matmul,
    "insert-casts": noise.insert_casts,
    "insert-identity": noise.insert_identity,
    "insert-reshapes": noise.insert_reshapes,
    "insert-transposes": noise.insert_transposes,
    "insert-unsqueezes": noise.insert_unsqueezes,
    "invert-where": respellings.invert_where,
    "lift-constants": noise.lift_constants,
    "lower-initializers": noise.lower_initializers,
    "lower-opset": noise.lower_opset,
    "matmul-to-gemm": respellings.matmul_to_gemm,
    "merge-projections": respellings.merge_projections,
    "move-scales": respellings.move_scales,
    "outline-functions": noise.outline_functions,
    "permute-nodes": noise.permute_nodes,
    "raise-opset": noise.raise_opset,
    "reassociate": respellings.reassociate,
    "rename-cache": noise.rename_cache,
    "rename-values": noise.rename_values,
    "respell-comparisons": respellings.respell_comparisons,
    "respell-division": respellings.respell_division,
    "respell-masking": respellings.respell_masking,
    "respell-negation": respellings.respell_negation,
    "respell-powers": respellings.respell_powers,
    "respell-roots": respellings.respell_roots,
    "respell-sigmoid": respellings.respell_sigmoid,
    "respell-sizes": respellings.respell_sizes,
    "respell-subtraction": respellings.respell_subtraction,
    "slices-to-split": respellings.slices_to_split,
    "split-projections": respellings.split_projections,
    "split-to-slices": respellings.split_to_slices,
    "swap-operands": respellings.swap_operands,
    "transpose-weights": respellings.transpose_weights,
    "turn-axes": noise.turn_axes,
}
"""Every transformation by name."""


def transform(model: ir.Model, steps: Iterable[tuple[str, int]]) -> list[int]:
    """Apply transformations, each by name and seed; the number of places that each changed."""
    return [TRANSFORMATIONS[name](model, Random(seed)) for name, seed in steps]
