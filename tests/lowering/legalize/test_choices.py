"""The table of forms: complete, sourced, and followed."""

from typing import Any

import pytest

from omforge import ir
from omforge.ir.ops import TARGET_OPS
from omforge.lowering.legalize import LEGALIZATIONS, Decision, legalize
from omforge.lowering.legalize.choices import CHOICES, choices, forms_by_op
from omforge.lowering.legalize.experts import DENSE, EXPERTS, GATHERED
from omforge.lowering.target import target

SOCS = ["Ascend310P3", "Ascend910B4", "Ascend910_9391", "Ascend310B1", "Ascend910_95"]
"""One of each family."""

NORM = """
    norm (float16[1,4,64] x, float16[64] gamma) => (float16[1,4,64] y)
    { y = RMSNormalization <epsilon = 1e-6> (x, gamma) }
"""


def test_every_row_that_may_be_chosen_has_its_function_and_the_other_way_round() -> None:
    functions = {(op, form) for op, forms in LEGALIZATIONS.items() for form in forms}
    # These two are of several nodes, and one function decides between them.
    functions |= {(EXPERTS, DENSE), (EXPERTS, GATHERED)}
    assert functions == {(op, form) for op, forms in forms_by_op().items() for form in forms}


def test_every_row_says_why_and_where_that_was_read() -> None:
    for row in CHOICES:
        assert row.reason
        assert ":" in row.source, row
        assert not row.opt_in or row.families
    assert len({(row.op, row.form) for row in CHOICES}) == len(CHOICES)


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("op", sorted(set(LEGALIZATIONS) - {"QuantizedMatMul"}))  # not on 310B
def test_every_operator_has_a_form_on_every_soc_without_asking(op: str, soc: str) -> None:
    assert any(not row.opt_in for row in choices(op, target(soc).family.name))


def test_a_fused_form_is_on_no_soc_whose_kernels_do_not_have_it() -> None:
    for row in CHOICES:
        if row.form in TARGET_OPS:
            dtypes = TARGET_OPS[row.form].inputs[0].dtypes
            assert row.families <= set(dtypes), row


def decide(model: ir.Model, soc: str = "Ascend310P3", **forms: str) -> Decision:
    told: list[Decision] = []
    legalize(model, target(soc), forms=forms, told=told)
    return told[0]


def test_the_form_that_moves_the_fewest_bytes_is_chosen(text_to_model: Any) -> None:
    decision = decide(text_to_model(NORM))
    assert decision.form == "NPURmsNorm"
    (other,) = [refusal for refusal in decision.refused if refusal.form == "decomposed"]
    assert other.reason == "it moves more bytes"
    assert other.traffic[0].total > decision.traffic[0].total


def test_a_form_that_is_asked_for_is_taken_whatever_it_moves(text_to_model: Any) -> None:
    model = text_to_model(NORM)
    decision = decide(model, RMSNormalization="decomposed")
    assert decision.form == "decomposed"
    assert all(node.op_type != "NPURmsNorm" for node in model.graph)


def test_a_form_that_cannot_be_taken_gives_way_and_says_why(text_to_model: Any) -> None:
    decision = decide(text_to_model(NORM), RMSNormalization="NPUAddRmsNorm")
    assert decision.form == "NPURmsNorm"
    assert ("NPUAddRmsNorm", "x is no sum") in {(r.form, r.reason) for r in decision.refused}


def test_what_another_soc_has_is_refused_here(text_to_model: Any) -> None:
    text = """
        turn (float16[2,3,64] x, float16[2,3,16] cos, float16[2,3,16] sin) => (float16[2,3,64] y)
        { y = RotaryEmbedding <num_heads = 2> (x, cos, sin) }
    """
    asked = {"RotaryEmbedding": "NPURotaryPositionEmbedding"}
    assert decide(text_to_model(text), "Ascend910B4", **asked).form == asked["RotaryEmbedding"]
    here = decide(text_to_model(text), "Ascend310P3", **asked)
    assert here.form == "decomposed"
    assert "310p does not have it" in {refusal.reason for refusal in here.refused}


def test_what_no_form_takes_stays_and_says_why(text_to_model: Any) -> None:
    model = text_to_model("""
        g (int8[2,32] x, float16[2,1] scale) => (float16[2,32] y)
        { y = DequantizeLinear <axis = 1, block_size = 32> (x, scale) }
    """)
    decision = decide(model)
    assert decision.form == ""
    assert "DequantizeLinear in blocks" in decision.reason
    assert [node.op_type for node in model.graph] == ["DequantizeLinear"]


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"Atention": "decomposed"}, "no forms of 'Atention'"),
        ({"Attention": "Flash"}, "Attention has no form 'Flash'"),
        ({"Attention": "NPUIncreFlashAttention"}, "has no form 'NPUIncreFlashAttention'"),
    ],
)
def test_forms_that_do_not_exist_are_refused(
    text_to_model: Any, forms: dict[str, str], message: str
) -> None:
    with pytest.raises(ir.InputError, match=message):
        decide(text_to_model(NORM), **forms)
