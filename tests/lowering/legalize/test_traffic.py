"""Bytes moved: each kernel reads its inputs and writes its outputs, views move nothing."""

from typing import Any

import pytest

from omforge import ir
from omforge.lowering.legalize.traffic import Traffic, bytes_moved, is_cache

HALF, INDEX = 2, 8


def moved(model: ir.Model, **gear: int) -> Traffic:
    return bytes_moved(model.graph, gear)


def test_a_kernel_reads_and_writes(text_to_model: Any) -> None:
    model = text_to_model("g (float16[4,8] x, float16[8] b) => (float16[4,8] y) { y = Add (x, b) }")
    assert moved(model) == Traffic(read=(32 + 8) * HALF, written=32 * HALF, kernels=1)


def test_what_is_read_twice_by_one_kernel_counts_once(text_to_model: Any) -> None:
    model = text_to_model("g (float16[8] x) => (float16[8] y) { y = Mul (x, x) }")
    assert moved(model).read == 8 * HALF


def test_views_are_free(text_to_model: Any) -> None:
    model = text_to_model("""
        g (float16[4,8] x) => (float16[32] y) <int64[1] flat = {-1}, int64[1] at = {0}>
        { a = Reshape (x, flat)  b = Unsqueeze (a, at)  c = Identity (b)  y = Squeeze (c, at) }
    """)
    assert moved(model) == Traffic()


def test_weights_and_cache_are_counted_apart(text_to_model: Any) -> None:
    model = text_to_model("""
        g (float16[2,8] x, float16[2,2,4,8] past_key_values) => (float16[2,8] y, float16[2,2,4,8] z)
        <float16[1,8] w = {1,1,1,1,1,1,1,1}>
        { y = Mul (x, w)  z = Neg (past_key_values) }
    """)
    found = moved(model)
    assert (found.weights, found.cache, found.read) == (8 * HALF, 128 * HALF, 16 * HALF)


def test_the_parts_of_a_stacked_cache_are_copied_and_are_still_the_cache(
    text_to_model: Any,
) -> None:
    model = text_to_model("""
        g (float16[2,1,4,8] past_key_values, float16[1,1,8,3] q) => (float16[1,1,4,3] y)
        <int64[2] ones = {1, 1}>
        { k, v = Split <axis = 0> (past_key_values, ones)  y = MatMul (k, q) }
    """)
    split, product = model.graph
    assert bytes_moved([split]) == Traffic(
        weights=2 * INDEX, cache=64 * HALF, written=64 * HALF, kernels=1
    )
    assert bytes_moved([product]).cache == 32 * HALF
    assert is_cache(split.outputs[0])
    assert not is_cache(product.outputs[0])


def test_a_gather_reads_rows_and_not_the_table(text_to_model: Any) -> None:
    model = text_to_model("""
        g (float16[1000,8] table, int64[3] at) => (float16[3,8] y) { y = Gather (table, at) }
    """)
    assert moved(model) == Traffic(read=24 * HALF + 3 * INDEX, written=24 * HALF, kernels=1)


def test_what_depends_on_constants_alone_is_computed_once(text_to_model: Any) -> None:
    model = text_to_model("""
        g (float16[1,2] x) => (float16[1,3] y)
        <float16[3,2] w = {1,2,3,4,5,6}>
        { turned = Transpose <perm = [1, 0]> (w)  y = MatMul (x, turned) }
    """)
    assert moved(model).kernels == 1


def test_symbols_take_the_numbers_of_a_gear(text_to_model: Any) -> None:
    model = text_to_model('g (float16["seq",8] x) => (float16["seq",8] y) { y = Neg (x) }')
    assert moved(model, seq=3).total == 2 * 24 * HALF
    with pytest.raises(ir.InputError, match="'seq' is not among"):
        moved(model)
