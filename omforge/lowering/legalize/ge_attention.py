"""Attention over a cache as a whole, by GE's fused operators: forms of the front air.

Letters as in `attention`. The cache, keys [B, K, C, D] and values [B, K, C, D], is one operand as
it lies: nothing is joined, repeated or copied. The mask is boolean, true where a key is hidden,
made of the additive one that the runtime feeds once for all layers. An int8 cache, whose scales
quantize-kv has put into queries and results, is read as it is with scales of 1: the kernel makes
floats of it where it needs them.
"""

from __future__ import annotations

from omforge import ir
from omforge.lowering.legalize.attention import Sizes, as_output, check, heads_first, scale
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    Results,
    dims,
    float_attribute,
    int_attribute,
    optional_input,
    required_input,
    used_output,
)
from omforge.lowering.legalize.fused_attention import hidden_keys

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

WHOLE = 2147483647
"""Of pre_tokens and next_tokens: no band."""


def incre_flash_attention(op: Builder, node: ir.Node) -> Results:
    """One query a row, as IncreFlashAttention; on 310P as many heads of keys as of queries."""
    if op.target.family.name == "310p" and _sizes(node).group > 1:
        raise NotLegal(
            "grouped heads on 310P: its tiling takes them, and its document says that it does not"
        )
    return incre_flash_attention_grouped(op, node)


def incre_flash_attention_grouped(op: Builder, node: ir.Node) -> Results:
    """The same with grouped heads.

    Limits: mirror-cann/ops-transformer:attention/incre_flash_attention/op_host/
    incre_flash_attention_tiling_check.cpp.
    """
    size = _sizes(node)
    if any(new != 1 for (new,) in op.at_gears((size.new,))):
        raise NotLegal("it takes one query a row")
    keys = _common(op, node, size)
    if size.batch > 256 or keys > 65536:
        raise NotLegal(f"{size.batch} rows and {keys} keys, must be up to 256 and 65,536")
    if op.target.family.name == "310p" and size.group > 1 and (size.group > 32 or size.head > 128):
        raise NotLegal("310P takes groups of up to 32 with heads of up to 128")
    query, key, value = (required_input(node, index) for index in range(3))
    query = heads_first(op, query, size.query_heads)
    operands = _operands(op, node, query, key, value)
    (y,) = op.ge(
        "IncreFlashAttention",
        operands,
        [(query.dtype, dims(query))],
        num_heads=size.query_heads,
        scale_value=float(scale(node, size)),
        input_layout="BNSD",
        num_key_value_heads=size.kv_heads,
        inner_precise=0 if "antiquant_scale" in operands else 1,
    )
    return (as_output(op, y, size, len(dims(required_input(node, 0)))),)


def fused_infer_attention_score(op: Builder, node: ir.Node) -> Results:
    """As FusedInferAttentionScore, prefill and decode.

    Limits: mirror-cann/ops-transformer:attention/fused_infer_attention_score/docs/
    aclnnFusedInferAttentionScoreV3.md.
    """
    size = _sizes(node)
    _common(op, node, size)
    if size.query_heads > 256 or size.group > 64:
        raise NotLegal(f"{size.query_heads} heads in groups of {size.group}: up to 256 and 64")
    query, key, value = (required_input(node, index) for index in range(3))
    query = heads_first(op, query, size.query_heads)
    operands = _operands(op, node, query, key, value)
    y, _ = op.ge(
        "FusedInferAttentionScore",
        operands,
        [(query.dtype, dims(query)), (ir.DataType.FLOAT, (1,))],
        num_heads=size.query_heads,
        scale=float(scale(node, size)),
        pre_tokens=WHOLE,
        next_tokens=WHOLE,
        input_layout="BNSD",
        num_key_value_heads=size.kv_heads,
        sparse_mode=0,
        inner_precise=0,
    )
    return (as_output(op, y, size, len(dims(required_input(node, 0)))),)


def _sizes(node: ir.Node) -> Sizes:
    if optional_input(node, 4) is not None:
        raise NotLegal("the cache is not written in place: past and new keys are two tensors")
    return check(node)


def _operands(
    op: Builder, node: ir.Node, query: ir.Value, key: ir.Value, value: ir.Value
) -> dict[str, ir.Value]:
    found = {
        "query": query,
        "key": _stored(key),
        "value": _stored(value),
        "atten_mask": hidden_keys(op, node),
    }
    if found["key"] is not key:
        # One for keys and one for values, of the whole tensor.
        found["antiquant_scale"] = op.constant([1.0, 1.0], query.dtype or ir.DataType.FLOAT16)
    return found


def _stored(value: ir.Value) -> ir.Value:
    """What an int8 cache holds, where a value is those integers as floats; else itself."""
    producer = value.producer()
    if producer is None or producer.op_type != "Cast" or producer.domain != "":
        return value
    source = producer.inputs[0]
    return source if source is not None and source.dtype == ir.DataType.INT8 else value


def _common(op: Builder, node: ir.Node, size: Sizes) -> int:
    """What both refuse; the number of keys."""
    if any(used_output(node, index) for index in (1, 2)):
        raise NotLegal("it hands out its keys and values")
    query, key = required_input(node, 0), required_input(node, 1)
    if query.dtype not in _HALVES or key.dtype != query.dtype:
        raise NotLegal(f"queries are {query.dtype} and keys {key.dtype}, must be float16 alike")
    if len(dims(key)) != 4:
        raise NotLegal("keys are not by head")
    integers = [_stored(value) is not value for value in (key, required_input(node, 2))]
    if integers[0] != integers[1]:
        raise NotLegal("keys or values alone are int8")
    step = 32 if integers[0] else 16
    if size.head % step:
        raise NotLegal(f"heads of {size.head}, must be multiples of {step}")
    if float_attribute(node, "softcap", 0.0) > 0:
        raise NotLegal("it has no softcap")
    if size.head != size.value_head or size.head > 512:
        raise NotLegal(f"heads of {size.head} and {size.value_head}: must be equal and up to 512")
    if int_attribute(node, "softmax_precision", 0) not in (0, ir.DataType.FLOAT):
        raise NotLegal("the softmax is asked for in another dtype than float32")
    (longest,) = max(op.at_gears((size.keys,)))
    return longest
