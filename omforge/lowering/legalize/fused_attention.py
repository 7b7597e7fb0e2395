"""Attention by ATC's fused operators: forms that are taken only when they are asked for.

Letters as in `attention`. Both take a boolean mask, true where a key is hidden. It is made of the
additive mask that the runtime feeds (0 or far below any score), once for all layers.
"""

from __future__ import annotations

from omforge import ir
from omforge.lowering.legalize.attention import (
    Sizes,
    as_output,
    attend,
    check,
    heads_first,
    scale,
)
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
from omforge.recognition.attention import sinks as attention_sinks

# What lies below it in an additive mask is hidden: scores are added to 0 or to -30000.
_HIDDEN_BELOW = -1000.0

_WHOLE = 2147483647
"""Of pre_tokens and next_tokens: no band. Larger numbers are cut to int32, and absent is 0."""


def attention_scaled_masked_softmax(op: Builder, node: ir.Node) -> Results:
    """As MatMul and Softmax, with mask and softmax in one kernel."""
    return attend(op, node, _fused_softmax)


def _fused_softmax(op: Builder, node: ir.Node, scores: ir.Value, size: Sizes) -> ir.Value:
    if float_attribute(node, "softcap", 0.0) > 0:
        raise NotLegal("softcap comes between the scores and the mask")
    if int_attribute(node, "softmax_precision", 0) == ir.DataType.FLOAT:
        raise NotLegal("the graph asks for a softmax in float32")
    hidden = hidden_keys(op, node)
    for new, keys in op.at_gears((size.new, size.keys)):
        if any(length % 32 or not 32 <= length <= 4096 for length in (new, keys)):
            raise NotLegal(f"S = {new} and C + S = {keys} must be multiples of 32 from 32 to 4096")
    by_head = op.reshape(scores, (size.batch, size.query_heads, size.new, size.keys))
    return op.target_op("NPUScaledMaskedSoftmax", by_head, hidden, scale=1.0, fixed_triu_mask=0)[0]


def attention_prompt_flash(op: Builder, node: ir.Node) -> Results:
    """As one NPUPromptFlashAttention in layout BNSD, over past and new keys in one tensor.

    The pse input has no elements: a mask needs a tensor there, and on A2 and A3 one of no elements
    counts as none (mirror-cann/ops-transformer:attention/prompt_flash_attention, tiling.cpp:1900).
    """
    size = check(node)
    q, k, v = (required_input(node, index) for index in range(3))
    past_key, past_value = optional_input(node, 4), optional_input(node, 5)
    _check_limits(op, node, q, size)
    hidden = hidden_keys(op, node)
    keys, values = heads_first(op, k, size.kv_heads), heads_first(op, v, size.kv_heads)
    new_key, new_value = keys, values
    if past_key is not None and past_value is not None:
        keys, values = (
            op.concat([past_key, keys], axis=-2),
            op.concat([past_value, values], axis=-2),
        )
    dtype = q.dtype
    assert dtype is not None
    (y,) = op.target_op(
        "NPUPromptFlashAttention",
        heads_first(op, q, size.query_heads),
        keys,
        values,
        op.constant([], dtype),
        hidden,
        num_heads=size.query_heads,
        input_layout="BNSD",
        scale_value=float(scale(node, size)),
        pre_tokens=_WHOLE,
        next_tokens=_WHOLE,
        num_key_value_heads=size.kv_heads if size.group > 1 else 0,
        sparse_mode=0,
        inner_precise=0,
    )
    whole: list[ir.Value | None] = [
        made if used_output(node, index) else None
        for index, made in (
            (1, keys if past_key else new_key),
            (2, values if past_value else new_value),
        )
    ]
    return (as_output(op, y, size, rank=len(dims(q))), *whole)


def _check_limits(op: Builder, node: ir.Node, q: ir.Value, size: Sizes) -> None:
    """The limits of aclnnPromptFlashAttentionV3 on A2 and A3."""
    if q.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise NotLegal("it takes float16 and bfloat16 only")
    if float_attribute(node, "softcap", 0.0) > 0:
        raise NotLegal("it has no softcap")
    if size.head != size.value_head or size.head > 512:
        raise NotLegal(f"heads of {size.head} and {size.value_head}, must be equal and up to 512")
    if size.query_heads > 256:
        raise NotLegal(f"{size.query_heads} heads, must be up to 256")
    if size.head % 16 and size.batch > 128:
        raise NotLegal(f"a batch of {size.batch} with heads of {size.head}, must be up to 128")
    if any(new == 1 for (new,) in op.at_gears((size.new,))):
        raise NotLegal("one token: the copy of the cache that it needs is most of the step")


def hidden_keys(op: Builder, node: ir.Node) -> ir.Value:
    """Make the boolean mask [B, 1, S, T], true where hidden."""
    if attention_sinks.find(node) is not None:
        raise NotLegal("it has an attention sink, a score that no boolean mask holds")
    if int_attribute(node, "is_causal", 0):
        raise NotLegal("is_causal without a mask to make a boolean one of")
    mask = optional_input(node, 3)
    if mask is None:
        raise NotLegal("there is no mask")
    if mask.dtype == ir.DataType.BOOL:
        return op.shared(("hidden", mask), lambda: op.unary("Not", mask))
    if not mask.is_graph_input():
        raise NotLegal("the mask is computed: it may hold biases, which no boolean mask holds")
    if len(dims(mask)) != 4:
        raise NotLegal(f"the mask has {len(dims(mask))} dimensions, must have 4")
    return op.shared(("hidden", mask), lambda: op.below(mask, _HIDDEN_BELOW))
