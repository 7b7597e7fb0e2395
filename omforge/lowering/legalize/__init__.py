"""From a canonical bucket graph to the ATC dialect, in place.

An operator may have several forms; `choices` is the table of them, with reasons, and `FORMS` holds
the function that makes each. Of the forms that a node can take on the target, the one that moves
the fewest bytes is chosen (`traffic`). What concerns the whole graph is in `dialect`. An operator
without a legalisation stays: `omforge.lowering.legality` reports what the target cannot take, and
quotes why a legalisation refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from omforge import ir
from omforge.ir.fronts import Front
from omforge.lowering.legalize import dialect
from omforge.lowering.legalize.activations import legalize_gelu, legalize_swish, swish_fast_gelu
from omforge.lowering.legalize.attention import legalize_attention
from omforge.lowering.legalize.builder import (
    LEGALIZED_FROM,
    NOT_LEGALIZED,
    Builder,
    NotLegal,
    Results,
)
from omforge.lowering.legalize.choice import DECOMPOSED, Choice
from omforge.lowering.legalize.choices import CHOICES, forms_by_op
from omforge.lowering.legalize.decision import Decision, Refusal
from omforge.lowering.legalize.experts import EXPERTS, GATHERED, legalize_experts
from omforge.lowering.legalize.fused_attention import (
    attention_prompt_flash,
    attention_scaled_masked_softmax,
)
from omforge.lowering.legalize.ge_activations import gelu_v2, swish
from omforge.lowering.legalize.ge_attention import (
    fused_infer_attention_score,
    incre_flash_attention,
    incre_flash_attention_grouped,
)
from omforge.lowering.legalize.ge_cache import scatter, scatter_nd_update
from omforge.lowering.legalize.ge_convolution import sum_of_taps
from omforge.lowering.legalize.ge_norms import add_rms_norm, rms_norm
from omforge.lowering.legalize.int8_products import (
    ASCEND_QUANT,
    INT8_MATMUL,
    ascend_quant,
    is_int8_matmul,
    serves_int8_products,
)
from omforge.lowering.legalize.int8_products import FORMS as INT8_FORMS
from omforge.lowering.legalize.integers import dequantize, quantize
from omforge.lowering.legalize.norms import (
    legalize_layer_normalization,
    rms_decomposed,
    rms_npu,
    rms_npu_add,
)
from omforge.lowering.legalize.quantized import (
    FORMS as QUANTIZED_FORMS,
)
from omforge.lowering.legalize.quantized import (
    QUANTIZED_MATMUL,
    dequantizer,
    serves_products,
)
from omforge.lowering.legalize.rotary import (
    rotary_decomposed,
    rotary_mul,
    rotary_position_embedding,
)
from omforge.lowering.legalize.standard import STANDARD
from omforge.lowering.legalize.traffic import Traffic, bytes_moved
from omforge.lowering.target import Target

__all__ = [
    "LEGALIZATIONS",
    "LEGALIZED_FROM",
    "NOT_LEGALIZED",
    "Decision",
    "Legalization",
    "Refusal",
    "check_forms",
    "legalize",
]

log = logging.getLogger(__name__)

Legalization = Callable[[Builder, ir.Node], Results]

LEGALIZATIONS: Mapping[str, Mapping[str, Legalization]] = {
    "Attention": {
        "FusedInferAttentionScore": fused_infer_attention_score,
        "IncreFlashAttention": incre_flash_attention,
        "IncreFlashAttention-grouped": incre_flash_attention_grouped,
        "MatMul-Softmax": legalize_attention,
        "NPUScaledMaskedSoftmax": attention_scaled_masked_softmax,
        "NPUPromptFlashAttention": attention_prompt_flash,
    },
    "Conv": {"sum of taps": sum_of_taps},
    "DequantizeLinear": {DECOMPOSED: dequantize},
    "Gelu": {"GeluV2": gelu_v2, DECOMPOSED: legalize_gelu},
    INT8_MATMUL: INT8_FORMS,
    "LayerNormalization": {DECOMPOSED: legalize_layer_normalization},
    QUANTIZED_MATMUL: QUANTIZED_FORMS,
    "QuantizeLinear": {ASCEND_QUANT: ascend_quant, DECOMPOSED: quantize},
    "RMSNormalization": {
        "NPURmsNorm": rms_npu,
        "NPUAddRmsNorm": rms_npu_add,
        "AddRmsNorm": add_rms_norm,
        "RmsNorm": rms_norm,
        DECOMPOSED: rms_decomposed,
    },
    "RotaryEmbedding": {
        "NPURotaryMul": rotary_mul,
        "NPURotaryPositionEmbedding": rotary_position_embedding,
        DECOMPOSED: rotary_decomposed,
    },
    "Swish": {"Swish": swish, "NPUFastGelu": swish_fast_gelu, DECOMPOSED: legalize_swish},
    "TensorScatter": {"Scatter": scatter, "ScatterNdUpdate": scatter_nd_update},
}
"""By operator and form: the functions behind `choices.CHOICES`, which says where each is legal."""


def legalize(
    model: ir.Model,
    target: Target,
    front: Front = "onnx",
    *,
    gears: Mapping[str, Sequence[int]] | None = None,
    forms: Mapping[str, str] | None = None,
    told: list[Decision] | None = None,
) -> int:
    """Rewrite a bucket graph into the ATC dialect (opset 16), in place.

    Graph inputs and outputs keep names, order and shapes; int64 inputs become int32. A node that a
    legalisation makes carries the metadata of the node it replaces and `legalized_from`; a node
    that a legalisation refuses stays and carries the reason as `not_legalized`.

    Args:
        model: Canonical (opset 24), every value with a dtype and a shape.
        target: The SoC; decides which forms may be chosen.
        front: What atc is given; decides it, too. GE's own operators are nodes of domain `ge`,
            which `lowering.emit` writes.
        gears: The numbers that each symbol left in the shapes may be; none for a static graph.
        forms: Operator to form, for what shall not be chosen by bytes. A form that a node cannot
            take gives way to the others.
        told: Receives what was decided, node by node.

    Returns:
        The number of nodes that were replaced.

    Raises:
        InputError: `forms` names an operator or a form that is not in the table.
    """
    forms = forms or {}
    check_forms(forms)
    graph = model.graph
    dialect.constants_to_initializers(graph)
    builder = Builder(graph, target, gears, front)
    replaced = 0
    of_experts = [row for row in CHOICES if row.op == EXPERTS and front in row.fronts]
    for decision in legalize_experts(builder, model, forms.get(EXPERTS), of_experts):
        replaced += decision.form == GATHERED
        if told is not None:
            told.append(decision)
    with_forms = {row.op for row in CHOICES if front in row.fronts} & set(LEGALIZATIONS)
    for node in list(graph.all_nodes()):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in STANDARD:
            replaced += _respell(builder, node)
        op = _subject(node)
        if op not in with_forms or (op == "DequantizeLinear" and _goes_with_products(node)):
            continue
        decision = _legalize_node(builder, node, op, forms.get(op))
        replaced += bool(decision.form)
        if told is not None:
            told.append(decision)
    dialect.narrow_inputs(graph)
    dialect.to_opset_16(model)
    dialect.unit_transposes_to_reshapes(graph)
    dialect.merge_moves(graph)
    dialect.remove_dead(graph)
    dialect.store_int4_raw(graph)
    dialect.name_everything(graph)
    return replaced


def _subject(node: ir.Node) -> str:
    """What the table calls a node."""
    if is_int8_matmul(node):
        return INT8_MATMUL
    return QUANTIZED_MATMUL if dequantizer(node) is not None else node.op_type


def _goes_with_products(node: ir.Node) -> bool:
    """Whether a DequantizeLinear serves products alone, which take it with them."""
    return serves_products(node) or serves_int8_products(node)


def check_forms(forms: Mapping[str, str]) -> None:
    """Refuse operators and forms that are not in the table.

    Raises:
        InputError: One is not; the message lists those that are.
    """
    known = forms_by_op()
    for op, form in forms.items():
        if op not in known:
            raise ir.InputError(
                f"there are no forms of {op!r}",
                f"there are forms of {', '.join(known)}",
                "`omforge check --why` shows each operator's forms",
            )
        if form not in known[op]:
            raise ir.InputError(
                f"{op} has no form {form!r}",
                f"its forms are {', '.join(known[op])}",
                "`omforge check --why` says what each needs",
            )


def _respell(builder: Builder, node: ir.Node) -> bool:
    """Replace a standard operator that its plugin gets wrong."""
    builder.begin(node)
    try:
        results = STANDARD[node.op_type](builder, node)
    except NotLegal as reason:
        builder.abandon()
        node.metadata_props[NOT_LEGALIZED] = str(reason)
        return False
    if results is None:
        return False
    builder.commit(*results)
    return True


def _legalize_node(builder: Builder, node: ir.Node, op: str, wanted: str | None) -> Decision:
    name = node.name or node.outputs[0].name or ""
    family = builder.target.family.name
    legal: list[tuple[Choice, tuple[Traffic, ...]]] = []
    proof: dict[str, str] = {}
    refused: list[Refusal] = []
    for row in CHOICES:
        if row.op != op or builder.front not in row.fronts:
            continue
        if family not in row.families:
            reason = row.reason if not row.families else f"{family} does not have it"
            refused.append(Refusal(row.form, reason))
            continue
        seen = builder.target.facts.of("form", f"{op}={row.form}")
        if seen is not None and not seen.holds:
            refused.append(Refusal(row.form, seen.words))
            continue
        proof[row.form] = "" if seen is None else f"; {seen.words}"
        found = _try(builder, node, row)
        if isinstance(found, str):
            refused.append(Refusal(row.form, found))
        elif row.opt_in and row.form != wanted and seen is None:
            refused.append(Refusal(row.form, f"not asked for: {row.reason}", found))
        else:
            legal.append((row, found))
    if not legal:
        reasons = "; ".join(dict.fromkeys(refusal.reason for refusal in refused))
        # The node itself is fine where what ATC does not know is its weight's DequantizeLinear.
        (dequantizer(node) or node).metadata_props[NOT_LEGALIZED] = reasons
        log.info("%s %s is not legalised: %s", op, name, reasons)
        return Decision(op, name, "", reasons, (), tuple(refused))
    # `min` takes the first of equals, and the rows are in order of preference.
    chosen = min(legal, key=lambda found: (found[0].form != wanted, _total(found[1])))
    for row, traffic in legal:
        if row is not chosen[0]:
            refused.append(Refusal(row.form, _why_not(traffic, chosen, wanted), traffic))
    _record(builder, node, op, chosen[0].form)
    row = chosen[0]
    reason = f"{row.reason}{proof[row.form]}"
    return Decision(op, name, row.form, reason, chosen[1], tuple(refused))


def _try(builder: Builder, node: ir.Node, row: Choice) -> tuple[Traffic, ...] | str:
    """What a form would move, at each gear; or why the node cannot take it."""
    try:
        builder.begin(node)
        LEGALIZATIONS[row.op][row.form](builder, node)
        return _moved(builder)
    except NotLegal as reason:
        return str(reason)
    finally:
        builder.abandon()


def _moved(builder: Builder) -> tuple[Traffic, ...]:
    try:
        return tuple(
            bytes_moved(builder.pending, gear) - bytes_moved(builder.spared, gear)
            for gear in builder.bindings()
        )
    except ir.InputError:
        return ()  # a symbol without gears: the preference of the table decides alone


def _record(builder: Builder, node: ir.Node, op: str, form: str) -> None:
    builder.begin(node)
    builder.commit(*LEGALIZATIONS[op][form](builder, node))


def _total(traffic: Sequence[Traffic]) -> int:
    return sum(moved.total for moved in traffic)


def _why_not(
    traffic: Sequence[Traffic], chosen: tuple[Choice, tuple[Traffic, ...]], wanted: str | None
) -> str:
    if chosen[0].form == wanted:
        return "another form was asked for"
    if _total(traffic) > _total(chosen[1]):
        return "it moves more bytes"
    return "it moves as much, and comes later in the table"
