"""Replace ONNX Runtime's own operators (domain com.microsoft) by standard ones.

onnxruntime-genai's builder and ONNX Runtime's optimizer write `GroupQueryAttention`,
`SkipSimplifiedLayerNormalization` and others. ATC registers none of that domain, and the standard
has had a form of each since opset 24. What each computes is in
microsoft/onnxruntime:docs/ContribOperators.md; those of quantised weights are in `block_quantized`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from omforge import ir
from omforge.ir.infer import infer_model, infer_nodes
from omforge.ir.values import attribute, dims, to_shape
from omforge.quantization.block_quantized import gather_block_quantized, matmul_nbits
from omforge.recognition.attention import masks
from omforge.recognition.interface import Interface, attention_mask_of, tokens_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.schema import CONTRIB_DOMAIN
from omforge.rewriting.splice import Names, splice

Values = list[ir.Value | None]
"""What replaces the outputs of a node, in order; None for one that nobody uses."""


@dataclass(frozen=True)
class RaiseContribOps(Pass):
    """Raise the com.microsoft operators of language models to standard ONNX.

    `GroupQueryAttention` gets the causal mask and the positions that it implies. It takes rows of
    different lengths as padded on the right; the mask raised here hides padding wherever it is.
    """

    name: ClassVar[str] = "raise-contrib-ops"

    def run(self, model: ir.Model) -> int:
        """Raise; the number of nodes replaced. A node that cannot be is an event."""
        for node in foreign_nodes(model):
            record(model, self.name, node, f"operators of domain {node.domain} are not known")
        if not any(_rule(node) or node.domain == CONTRIB_DOMAIN for node in model.graph):
            return 0
        infer_model(model)
        names = Names(model)
        count = 0
        for node in list(model.graph):
            rule = _rule(node)
            if rule is None:
                infer_nodes([node])  # what stands behind a contrib op is known once that is raised
                if node.domain == CONTRIB_DOMAIN:
                    record(model, self.name, node, f"no standard form of {node.op_type} is known")
                continue
            try:
                with Builder(model) as op:
                    new = rule(op, node)
                    pairs = [
                        (old, value)
                        for old, value in zip(node.outputs, new, strict=False)
                        if value is not None and (old.uses() or old.is_graph_output())
                    ]
                    if not pairs:
                        continue  # nobody uses it, and it goes with what nobody uses
                    old, values = [a for a, _ in pairs], [b for _, b in pairs]
                    splice(op, old, values, by=self.name, matched=[node], names=names)
            except NoMatch as miss:
                record(model, self.name, node, str(miss))
                continue
            count += 1
        infer_model(model)
        return count


def foreign_nodes(model: ir.Model) -> list[ir.Node]:
    """Every node, at any depth, of a domain that is neither ONNX's nor ONNX Runtime's."""
    return [
        node
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.domain not in ("", CONTRIB_DOMAIN) and node.op_identifier() not in model.functions
    ]


def _rule(node: ir.Node) -> Callable[[Builder, ir.Node], Values] | None:
    # SimplifiedLayerNormalization is of ONNX Runtime's default domain, and not in the standard.
    if node.domain == CONTRIB_DOMAIN or node.op_type == "SimplifiedLayerNormalization":
        return _RULES.get(node.op_type)
    return None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _need(node: ir.Node, index: int) -> ir.Value:
    value = _input(node, index)
    if value is None:
        raise NoMatch(f"its input {index} is absent", node)
    return value


def _count(node: ir.Node, name: str) -> int:
    """A number of heads: no schema of ours says that it is there, and at least 1."""
    found = attribute(node, name, 0)
    if found < 1:
        raise NoMatch(f"its {name} is {found}, or missing", node)
    return found


def _refuse(node: ir.Node, *inputs: int) -> None:
    for index in inputs:
        if _input(node, index) is not None:
            raise NoMatch(f"its input {index} has no counterpart in the standard operator", node)


def _rms_norm(op: Builder, node: ir.Node) -> Values:
    x, gamma = _need(node, 0), _need(node, 1)
    return [_norm(op, node, x, gamma)]


def _norm(op: Builder, node: ir.Node, x: ir.Value, gamma: ir.Value) -> ir.Value:
    return op.RMSNormalization(
        x, gamma, axis=-1, epsilon=attribute(node, "epsilon", 1e-5), stash_type=1
    )


def _skip_rms_norm(op: Builder, node: ir.Node) -> Values:
    total = _skip_sum(op, node, bias=3)
    return [_norm(op, node, total, _need(node, 2)), None, None, total]


def _skip_layer_norm(op: Builder, node: ir.Node) -> Values:
    total = _skip_sum(op, node, bias=4)
    beta = _input(node, 3)
    operands = [total, _need(node, 2), *([beta] if beta is not None else [])]
    epsilon = attribute(node, "epsilon", 1e-12)
    return [op.LayerNormalization(*operands, axis=-1, epsilon=epsilon), None, None, total]


def _skip_sum(op: Builder, node: ir.Node, bias: int) -> ir.Value:
    total = op.Add(_need(node, 0), _need(node, 1))
    extra = _input(node, bias)
    return total if extra is None else op.Add(total, extra)


def _quick_gelu(op: Builder, node: ir.Node) -> Values:
    return [op.Swish(_need(node, 0), alpha=attribute(node, "alpha", 1.702))]


def _gelu(op: Builder, node: ir.Node) -> Values:
    return [op.Gelu(_need(node, 0))]


def _fast_gelu(op: Builder, node: ir.Node) -> Values:
    x, bias = _need(node, 0), _input(node, 1)
    return [op.Gelu(x if bias is None else op.Add(x, bias), approximate="tanh")]


def _bias_gelu(op: Builder, node: ir.Node) -> Values:
    return [op.Gelu(op.Add(_need(node, 0), _need(node, 1)))]


def _rotary(op: Builder, node: ir.Node) -> Values:
    x, positions, cos, sin = (_need(node, i) for i in range(4))
    if attribute(node, "scale", 1.0) != 1.0 or attribute(node, "is_packed_batching", 0):
        raise NoMatch("scaled or packed rotary embeddings have no standard counterpart", node)
    if len(dims(positions) or ()) != 2:
        raise NoMatch("its positions are an offset, not [B, S]", positions)
    heads = attribute(node, "num_heads", 0)
    shape = dims(x)
    if shape is not None and len(shape) == 3 and not heads:
        width = (dims(cos) or (0,))[-1]
        if not isinstance(width, int) or not isinstance(shape[2], int) or not width:
            raise NoMatch("its number of heads is not known", node)
        heads = shape[2] // (2 * width)
    return [_rotate(op, node, x, heads, cos, sin, positions)]


def _rotate(
    op: Builder,
    node: ir.Node,
    x: ir.Value,
    heads: int,
    cos: ir.Value,
    sin: ir.Value,
    positions: ir.Value,
) -> ir.Value:
    """Look the tables up, and rotate [B, S, N*D]."""
    shape, table = dims(x), dims(cos)
    if shape is None or table is None or len(shape) != 3:
        raise NoMatch("what is rotated is not [B, S, N*D]", x)
    width, half = shape[2], table[-1]
    if not isinstance(width, int) or not isinstance(half, int):
        raise NoMatch("the head size or the rotated width is not a number", x)
    if not 0 < heads <= width:
        raise NoMatch(f"{heads} heads do not fit in a width of {width}", x)
    options: dict[str, Any] = {"num_heads": heads}
    if attribute(node, "interleaved", attribute(node, "rotary_interleaved", 0)):
        options["interleaved"] = 1
    if 2 * half != width // heads:
        options["rotary_embedding_dim"] = 2 * half
    tables = [op.Gather(table, positions, axis=0) for table in (cos, sin)]
    return op.node("RotaryEmbedding", [x, *tables], options).outputs[0]


def _group_query_attention(op: Builder, node: ir.Node) -> Values:
    heads, groups = _count(node, "num_heads"), _count(node, "kv_num_heads")
    _refuse(node, 10, 11)
    if attribute(node, "smooth_softmax", 0):
        raise NoMatch("smooth softmax has no standard counterpart", node)
    q, k, v = _unpacked(op, node, heads, groups)
    width = (dims(k) or (None,))[-1]
    if not isinstance(width, int):
        raise NoMatch("the width of the keys is not known", k)
    past_key, past_value = _need(node, 3), _need(node, 4)
    interface = _interface(op.model, node, past_key, past_value, groups, width // groups)
    if attribute(node, "do_rotary", 0):
        positions = _input(node, 9) or _slots(op, interface)
        cos, sin = _need(node, 7), _need(node, 8)
        q = _rotate(op, node, q, heads, cos, sin, positions)
        k = _rotate(op, node, k, groups, cos, sin, positions)
    window = attribute(node, "local_window_size", -1)
    mask = masks.Mask(window if window > 0 else None, interface.attention_mask is not None, True)
    size = width // groups
    options: dict[str, Any] = {
        "q_num_heads": heads,
        "kv_num_heads": groups,
        "scale": attribute(node, "scale", 0.0) or size**-0.5,
    }
    if attribute(node, "softcap", 0.0):
        options["softcap"] = attribute(node, "softcap")
    dtype = q.dtype or k.dtype or ir.DataType.FLOAT
    seen = masks.build(op, interface, mask, dtype)
    return list(op.Attention(q, k, v, seen, past_key, past_value, _outputs=3, **options))


def _unpacked(
    op: Builder, node: ir.Node, heads: int, groups: int
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, keys and values, out of one tensor where they are packed."""
    q, k, v = _need(node, 0), _input(node, 1), _input(node, 2)
    if k is not None and v is not None:
        return q, k, v
    width = (dims(q) or (None,))[-1]
    if not isinstance(width, int) or width % (heads + 2 * groups):
        raise NoMatch("queries, keys and values are packed in an unknown way", q)
    size = width // (heads + 2 * groups)
    parts = [heads * size, groups * size, groups * size]
    split = op.Split(q, parts, axis=-1, _outputs=3)
    for part, wide in zip(split, parts, strict=True):  # read before the node is in the graph
        part.type = ir.TensorType(q.dtype) if q.dtype is not None else None
        part.shape = to_shape((*(dims(q) or ())[:-1], wide))
    return split[0], split[1], split[2]


def _interface(
    model: ir.Model,
    node: ir.Node,
    past_key: ir.Value,
    past_value: ir.Value,
    groups: int,
    size: int,
) -> Interface:
    """What masks and positions are made from; the cache's head size is made a number."""
    for past in (past_key, past_value):
        shape = dims(past)
        if shape is None or len(shape) != 4:
            raise NoMatch("its cache is not [B, K, P, D]", past)
        past.shape = to_shape((shape[0], groups, shape[2], size))
    named = (v for v in model.graph.inputs if "input_ids" in (v.name or ""))
    tokens = tokens_of(model.graph) or next(named, None)
    if tokens is None:
        raise NoMatch("the graph has no input_ids", node)
    logits = model.graph.outputs[0]
    # Every layer's cache is as long; reading one length lets the layers' masks merge.
    first = next((v for v in model.graph.inputs if len(dims(v) or ()) == 4), past_key)
    return Interface(
        input_ids=tokens,
        attention_mask=attention_mask_of(model),
        position_ids=None,
        caches=((first, node.outputs[1]),),
        logits=logits,
        extra=(),
    )


def _slots(op: Builder, interface: Interface) -> ir.Value:
    """The new tokens' places [B, S]: counted from the length of the cache."""
    past = op.Squeeze(op.Shape(interface.caches[0][0], start=2, end=3))
    seq = op.Squeeze(op.Shape(interface.input_ids, start=1, end=2))
    places = op.Range(past, op.Add(past, seq), op.constant(np.array(1, dtype=np.int64)))
    return op.Expand(places, op.Shape(interface.input_ids))


_RULES: Mapping[str, Callable[[Builder, ir.Node], Values]] = {
    "BiasGelu": _bias_gelu,
    "FastGelu": _fast_gelu,
    "GatherBlockQuantized": gather_block_quantized,
    "Gelu": _gelu,
    "GroupQueryAttention": _group_query_attention,
    "MatMulNBits": matmul_nbits,
    "QuickGelu": _quick_gelu,
    "RotaryEmbedding": _rotary,
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
}
