"""What GE registers of operators, and which kernels there are."""

from omforge.air import kernels, names, prototypes
from omforge.air.files import read_air

from .test_files import SAMPLES


def test_a_prototype():
    scatter = prototypes.prototype("Scatter")
    assert [slot.name for slot in scatter.inputs] == ["var", "indices", "updates"]
    assert scatter.inputs[1].dtypes == {"int32", "int64"}
    assert scatter.refs == {"var"}
    assert scatter.attribute("reduce").required
    assert (scatter.attribute("axis").type, scatter.attribute("axis").default) == ("Int", "0")


def test_kinds_of_slots():
    attention = prototypes.prototype("IncreFlashAttention")
    query, key, _, pse = attention.inputs[:4]
    assert (query.dynamic, query.optional) == (False, False)
    assert (key.dynamic, key.optional) == (True, False)
    assert (pse.dynamic, pse.optional) == (False, True)
    assert query.dtypes == {"float16", "bfloat16", "int8"}


def test_dtypes_that_a_macro_stands_for_are_not_guessed():
    assert prototypes.prototype("Transpose").inputs[0].dtypes is None
    assert prototypes.prototype("RefData").inputs[0].dtypes is None
    assert prototypes.prototype("GeluV2").inputs[0].dtypes == {"bfloat16", "float16", "float32"}


def test_every_row_is_read():
    table = prototypes.prototypes()
    assert len(table) > 1800
    assert sum(not (op.inputs or op.outputs) for op in table.values()) < 10
    assert all(item.type.strip() == item.type for op in table.values() for item in op.attributes)


def test_a_kernel():
    attention = kernels.kernel("IncreFlashAttention", "310p")
    key, mask = attention.inputs[1], attention.inputs[4]
    assert list(zip(key.dtypes, mask.dtypes, strict=True)) == [
        ("float16", "float16"),
        ("float16", "bool"),
        ("int8", "bool"),
    ]
    assert kernels.kernel("IncreFlashAttention", "310b") is None
    assert kernels.listed("IncreFlashAttention")
    assert not kernels.listed("Data")


def test_slots_by_name():
    attention = read_air(SAMPLES[0]).graph.by_name()["attn"]
    of = prototypes.prototype("IncreFlashAttention")
    slots = names.by_slot(of.inputs, names.input_names(attention))
    assert slots["query"] == [0]
    assert slots["key"] == [1]
    assert slots["antiquant_scale"] == [11]
    assert names.operand(attention, of, "key") == "write_k:0"
    assert names.operand(attention, of, "pse_shift") == ""
    counts = {"key": 1, "value": 1}
    assert list(names.expected(of.inputs, counts)) == list(names.input_names(attention).values())
