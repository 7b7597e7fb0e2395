"""The table of operators that LLMs use, held against the tables of registrations and prototypes."""

import re

import pytest

from omforge.ir.ops import TARGET_OPS
from omforge.lowering.legality import ALL_RULES
from omforge.lowering.legalize.choices import CHOICES
from omforge.lowering.llm_ops import LlmOp, llm_op, llm_ops
from omforge.lowering.target import TARGETS, GeOp, all_registrations, ge_op, registrations

FAMILIES = {row.family.name for row in TARGETS.values()}
KINDS = {"summary", "soc", "input", "output", "attribute", "dtype", "limit", "trap", "version"}
OPS = list(llm_ops().values())


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_row_says_what_where_and_how_it_is_known(op: LlmOp) -> None:
    assert len(op.of("summary")) == len(op.of("soc")) == 1
    assert op.families <= FAMILIES
    for row in op.rows:
        assert row.kind in KINDS
        assert row.certainty in ("seen", "source", "inferred")
        assert ":" in row.source or row.source.startswith("hicann/")
        assert row.families <= FAMILIES
    slots = [row.name for row in op.of("input")]
    assert {row.name for row in op.of("dtype")} <= {*slots, "x"}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_operator_is_registered(op: LlmOp) -> None:
    assert op.name == "Constant" or registrations("", op.name) or registrations("npu", op.name)


def prototype_of(op: LlmOp) -> GeOp | None:
    """What it becomes one to one; None for a standard operator, or one that is expanded."""
    rows = registrations("", op.name) or registrations("npu", op.name)
    return ge_op(rows[-1].ge_type) if rows and op.of("input") else None


@pytest.mark.parametrize("op", [op for op in OPS if prototype_of(op)], ids=lambda op: op.name)
def test_inputs_are_those_of_the_prototype(op: LlmOp) -> None:
    prototype = prototype_of(op)
    assert prototype is not None
    own = [row.name for row in op.of("input")]
    assert own == [item.name for item in prototype.inputs][: len(own)]
    required = [row.name for row in op.of("input") if row.value == "required"]
    assert required == [item.name for item in prototype.inputs if item.kind == "input"][: len(own)]


def test_facts_by_soc() -> None:
    op = llm_op("", "NPUWeightQuantBatchMatmulV2")
    assert op is not None
    assert op.dtypes("weight", "310p") == {"int8"}
    assert "int4" in (op.dtypes("weight", "910b") or ())
    assert op.dtypes("bias", "310p") is None
    assert llm_op("npu", "WeightQuantBatchMatmulV2") is op
    assert llm_op("", "WeightQuantBatchMatmulV2") is None
    assert "310b" not in op.families


def test_plugins_that_are_named_as_sources_are_in_the_table_of_registrations() -> None:
    known = {row.source for row in all_registrations()}
    named = {row.source for op in OPS for row in op.rows}
    named |= {rule.source for rule in ALL_RULES.values()} | {choice.source for choice in CHOICES}
    plugins = {word for text in named for word in re.findall(r"\S+_plugin\.cpp", text)}
    assert len(plugins) > 20
    assert {plugin for plugin in plugins if "*" not in plugin} <= known


@pytest.mark.parametrize("name", TARGET_OPS)
def test_what_is_emitted_is_described_alike_in_both_tables(name: str) -> None:
    op, emitted = llm_op("", name), TARGET_OPS[name]
    assert op is not None
    slots = [row.name for row in op.of("input")]
    assert [item.name for item in emitted.inputs] == slots[: len(emitted.inputs)]
    assert tuple(row.name for row in op.of("output")) == emitted.outputs
    assert {item.name for item in emitted.attributes} <= {row.name for row in op.of("attribute")}
    for item in emitted.inputs:
        for family, dtypes in item.dtypes.items():
            known = op.dtypes(item.name, family) if family in op.families else None
            assert known is None or dtypes <= known, (item.name, family)


def test_choices_are_made_where_there_is_a_kernel() -> None:
    for choice in CHOICES:
        op = llm_op("", choice.form)
        if op is not None and choice.form.startswith("NPU"):
            assert choice.families <= op.families, choice.form
