"""The data tables are read as they are written."""

from omforge.lowering.tables import table_rows


def test_rows_are_named_by_their_columns() -> None:
    rows = list(table_rows("onnx_ops.tsv"))
    assert {"domain", "onnx_op_type", "opset_versions", "ge_op_type"} <= set(rows[0])
    assert any(row["onnx_op_type"] == "MatMul" for row in rows)


def test_quotes_are_part_of_a_cell() -> None:
    assert any('"' in cell for row in table_rows("ge_ops.tsv") for cell in row.values() if cell)
