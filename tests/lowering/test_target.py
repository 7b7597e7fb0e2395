"""Targets by name, and the operator tables behind them."""

import pytest

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.ops import TARGET_OPS
from omforge.lowering.llm_ops import llm_op
from omforge.lowering.target import (
    EXPANDED,
    TARGETS,
    dtype_name,
    ge_op,
    registered,
    registrations,
    target,
)


def test_a_target_by_its_soc_version() -> None:
    soc = target("Ascend310P3")
    assert (soc.soc_version, soc.family.name, soc.cores, soc.memory_gib) == (
        "Ascend310P3",
        "310p",
        8,
        24,
    )
    assert target("Ascend910B4").cores == 20


def test_bfloat16_and_int4_are_of_910b_only() -> None:
    assert {"bfloat16", "int4"} & target("Ascend310P3").dtypes == set()
    assert {"bfloat16", "int4"} <= target("Ascend910B4").dtypes


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("310P3", "Ascend310P3"),
        ("ascend310p3", "Ascend310P3"),
        ("Ascend310p3 ", "Ascend310P3"),
        ("Ascend910B-4", "Ascend910B4"),
    ],
)
def test_an_unknown_soc_lists_the_known_and_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(InputError) as caught:
        target(name)
    message = str(caught.value)
    assert f"Did you mean {meant}?" in message
    assert all(known in message for known in TARGETS)


def test_a_soc_that_is_like_nothing_has_no_suggestion() -> None:
    with pytest.raises(InputError, match="Choose one of these"):
        target("H100")


@pytest.mark.parametrize("soc", TARGETS.values(), ids=TARGETS)
def test_target_ops_are_registered_and_their_dtypes_are_the_targets(soc: object) -> None:
    row = TARGETS[getattr(soc, "soc_version")]  # noqa: B009 (parametrize erases the type)
    for name, op in TARGET_OPS.items():
        known = llm_op("", name)
        if registered("", name, 16) is not None:
            assert registered("", name, 16) in (op.ge_type, EXPANDED)
        if known is None or row.family.name not in known.families:
            continue
        for item in op.inputs:
            assert item.dtypes.get(row.family.name, frozenset()) <= row.dtypes
    assert all(fact.source for fact in row.family.facts)


@pytest.mark.parametrize(
    ("domain", "op", "opset", "ge_type"),
    [
        ("", "MatMul", 16, "BatchMatMulV2"),
        ("ai.onnx", "MatMul", 16, "BatchMatMulV2"),
        ("", "MatMul", 19, None),  # no fallback to an older version
        ("", "Gather", 16, EXPANDED),
        ("", "LayerNormalization", 16, None),
        ("", "LayerNormalization", 17, EXPANDED),
        ("", "NPUPromptFlashAttention", 17, None),
        ("", "NPUPromptFlashAttention", 19, EXPANDED),
        ("npu", "NPURmsNorm", 1, "RmsNorm"),
        ("npu", "NPURmsNorm", 2, None),
        ("", "NPUFusedAddRmsNorm", 16, None),  # custom builds only
        ("", "ReduceMean", 12, EXPANDED),
        ("", "ReduceMean", 13, "ReduceMean"),
        ("", "Attention", 24, None),
        ("com.microsoft", "GroupQueryAttention", 1, None),
        ("aten", "adaptive_max_pool2d", 1, None),
    ],
)
def test_registration_is_by_the_exact_opset(
    domain: str, op: str, opset: int, ge_type: str | None
) -> None:
    assert registered(domain, op, opset) == ge_type


def test_every_row_of_the_table_says_where_it_was_read() -> None:
    rows = registrations("", "ScatterND")
    assert len(rows) == 2
    assert all(row.source.startswith("hicann/") for row in rows)


def test_a_prototype_has_ordered_inputs_and_dtypes() -> None:
    softmax = ge_op("SoftmaxV2")
    assert softmax is not None
    assert softmax.inputs[0].dtypes == {"float64", "float16", "bfloat16", "float32"}
    quant = ge_op("WeightQuantBatchMatmulV2")
    assert quant is not None
    assert quant.required_inputs == 3
    assert [item.name for item in quant.inputs][:4] == [
        "x",
        "weight",
        "antiquant_scale",
        "antiquant_offset",
    ]
    assert {item.name: item.default for item in quant.attributes}["dtype"] == "-1"
    ascend_quant = ge_op("AscendQuant")
    assert ascend_quant is not None
    assert {item.name for item in ascend_quant.attributes if item.required} == {"scale", "offset"}


def test_a_macro_of_dtypes_forbids_nothing() -> None:
    """What ::BasicType() and "T1" stand for is not in the tables; index types are."""
    for name in ("Mul", "Reshape", "ReduceMean"):
        prototype = ge_op(name)
        assert prototype is not None
        assert prototype.inputs[0].dtypes is None
    split = ge_op("SplitV")
    assert split is not None
    assert split.inputs[1].dtypes == {"int32", "int64"}
    assert ge_op("NoSuchOp") is None


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (ir.DataType.FLOAT, "float32"),
        (ir.DataType.FLOAT16, "float16"),
        (ir.DataType.BFLOAT16, "bfloat16"),
        (ir.DataType.DOUBLE, "float64"),
        (ir.DataType.INT64, "int64"),
        (ir.DataType.BOOL, "bool"),
        (ir.DataType.INT4, "int4"),
        (None, ""),
    ],
)
def test_dtype_names(dtype: ir.DataType | None, name: str) -> None:
    assert dtype_name(dtype) == name
