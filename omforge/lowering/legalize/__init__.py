"""From a static canonical bucket graph to the ATC dialect, in place.

One function per canonical operator, in the table `LEGALIZATIONS`; what concerns the whole graph is
in `dialect`. An operator without a legalisation stays: `omforge.lowering.legality` reports what the
target cannot take, and quotes why a legalisation refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from omforge import ir
from omforge.lowering.legalize import dialect
from omforge.lowering.legalize.activations import legalize_gelu, legalize_swish
from omforge.lowering.legalize.attention import legalize_attention
from omforge.lowering.legalize.builder import LEGALIZED_FROM, NOT_LEGALIZED, Builder, NotLegal
from omforge.lowering.legalize.norms import (
    legalize_layer_normalization,
    legalize_rms_normalization,
)
from omforge.lowering.legalize.rotary import legalize_rotary_embedding
from omforge.lowering.target import Target

__all__ = ["LEGALIZATIONS", "LEGALIZED_FROM", "NOT_LEGALIZED", "Legalization", "legalize"]

log = logging.getLogger(__name__)

Legalization = Callable[[Builder, ir.Node], None]

LEGALIZATIONS: Mapping[str, Legalization] = {
    "Attention": legalize_attention,
    "Gelu": legalize_gelu,
    "LayerNormalization": legalize_layer_normalization,
    "RMSNormalization": legalize_rms_normalization,
    "RotaryEmbedding": legalize_rotary_embedding,
    "Swish": legalize_swish,
}


def legalize(model: ir.Model, target: Target) -> int:
    """Rewrite a bucket graph into the ATC dialect (opset 16), in place.

    Graph inputs and outputs keep names, order and shapes; int64 inputs become int32. A node that a
    legalisation makes carries the metadata of the node it replaces and `legalized_from`; a node
    that a legalisation refuses stays and carries the reason as `not_legalized`.

    Args:
        model: Canonical (opset 24), every value with a dtype and a static shape.
        target: The SoC; decides which fused ops are emitted.

    Returns:
        The number of nodes that were replaced.
    """
    graph = model.graph
    dialect.constants_to_initializers(graph)
    builder = Builder(graph, target)
    replaced = sum(_legalize_node(builder, node) for node in list(graph.all_nodes()))
    dialect.narrow_inputs(graph)
    dialect.store_int4_raw(graph)
    dialect.to_opset_16(model)
    dialect.unit_transposes_to_reshapes(graph)
    dialect.merge_moves(graph)
    dialect.remove_dead(graph)
    dialect.name_everything(graph)
    return replaced


def _legalize_node(builder: Builder, node: ir.Node) -> bool:
    function = LEGALIZATIONS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if function is None:
        return False
    builder.begin(node)
    try:
        function(builder, node)
    except NotLegal as reason:
        builder.abandon()
        node.metadata_props[NOT_LEGALIZED] = str(reason)
        log.info("%s %s is not legalised: %s", node.op_type, node.name, reason)
        return False
    return True
