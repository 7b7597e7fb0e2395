"""The two numberings of dtypes."""

import pytest

from omforge.air import ge_types


def test_the_numberings_differ():
    assert [ge_types.ge_number(name) for name in ("float32", "float16", "int32")] == [0, 1, 3]
    assert [ge_types.proto_number(name) for name in ("float32", "float16", "int32")] == [1, 2, 7]


@pytest.mark.parametrize("number", range(45))
def test_numbers_become_names_and_numbers_again(number):
    assert ge_types.ge_number(ge_types.ge_dtype(number)) == number
    assert ge_types.proto_number(ge_types.proto_dtype(number)) == number
    assert ge_types.format_number(ge_types.format_name(number)) == number


def test_byte_sizes():
    assert ge_types.byte_size("float16", (2, 3)) == 12
    assert ge_types.byte_size("int4", (3,)) == 2
    assert ge_types.byte_size("float16", (2, -1)) == 0
    assert ge_types.byte_size("float32", ()) == 4


def test_float8_has_numbers_and_sizes():
    # hicann/ge:graph_metadef/proto/ge_ir.proto; 950 computes in it.
    numbers = {"hifloat8": (34, 33), "float8e5m2": (35, 34), "float8e4m3fn": (36, 35)}
    for name, (ge, proto) in numbers.items():
        assert (ge_types.ge_number(name), ge_types.proto_number(name)) == (ge, proto)
        assert ge_types.byte_size(name, (3, 2)) == 6
