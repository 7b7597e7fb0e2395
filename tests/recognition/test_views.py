"""Chains of data movement: what they come to, whatever they are spelled as."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from omforge import ir
from omforge.recognition.views import Chain, is_identity, is_same_movement, scalar, shape_of, trace
from omforge.testing import parse

Array = npt.NDArray[Any]


def chain(body: str, shape: str = "B, S, 12", *, scalars: bool = False) -> Chain:
    """The chain that ends in y, of a graph that starts in x."""
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[{shape}] x, float[1, 1] one_row) => (float y)
    <int64[4] heads = {{0, 0, 3, 4}}, int64[4] by_head = {{0, 3, -1, 4}},
     int64[3] flat = {{0, 0, 12}}, int64[3] copies = {{1, 1, 2}}, int64[2] order = {{1, 0}},
     int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}},
     int64[1] five = {{5}}, int64[1] many = {{9999}},
     int64[1] last = {{-1}}, int64[1] first = {{-9223372036854775807}},
     float half = {{0.5}}, float none = {{0.0}}, float[2] halves = {{0.5, 0.5}},
     float[2] other = {{0.5, 0.25}}> {{ {body} }}"""
    return trace(parse(text).graph.outputs[0], scalars=scalars)


def split(array: Array, _: Mapping[str, int]) -> Array:
    """[B, S, 12] as [B, 3, S, 4]."""
    return array.reshape(*array.shape[:2], 3, 4).transpose(0, 2, 1, 3)


SPLITS = {
    "reshape and transpose": "a = Reshape (x, heads) y = Transpose <perm = [0, 2, 1, 3]> (a)",
    "in two transposes": """a = Reshape (x, heads) b = Transpose <perm = [0, 2, 3, 1]> (a)
        y = Transpose <perm = [0, 1, 3, 2]> (b)""",
    "with a detour": """u = Unsqueeze (x, one) v = Squeeze (u, one) a = Reshape (v, heads)
        i = Identity (a) y = Transpose <perm = [0, 2, 1, 3]> (i)""",
    "by three slices": """t = Transpose <perm = [2, 0, 1]> (x) s = Transpose <perm = [1, 2, 0]> (t)
        a = Reshape (s, heads) y = Transpose <perm = [0, 2, 1, 3]> (a)""",
}


@pytest.mark.parametrize("case", SPLITS)
def test_finds_the_split_of_heads(case: str) -> None:
    assert is_same_movement(chain(SPLITS[case]), split)


NO_SPLITS = {
    "heads taken for tokens": "y = Reshape (x, by_head)",
    "nothing moved": "y = Reshape (x, heads)",
    "other axes": "a = Reshape (x, heads) y = Transpose <perm = [0, 2, 3, 1]> (a)",
    "batch and heads": "a = Reshape (x, heads) y = Transpose <perm = [2, 0, 1, 3]> (a)",
}


@pytest.mark.parametrize("case", NO_SPLITS)
def test_takes_nothing_else_for_it(case: str) -> None:
    assert not is_same_movement(chain(NO_SPLITS[case]), split)


IDENTITIES = {
    "there and back": "a = Reshape (x, heads) y = Reshape (a, flat)",
    "two transposes": """a = Transpose <perm = [1, 0, 2]> (x)
        y = Transpose <perm = [1, 0, 2]> (a)""",
    "a whole slice": "y = Slice (x, zero, five, zero)",
    "reversed twice": """a = Slice (x, last, first, two, last)
        y = Slice (a, last, first, two, last)""",
    "one part": "y = Split <axis = 2, num_outputs = 1> (x)",
    "the same dtype": "y = Cast <to = 1> (x)",
}


@pytest.mark.parametrize("case", IDENTITIES)
def test_finds_what_leaves_all_as_it_was(case: str) -> None:
    shape = "3, S, 12" if case == "a whole slice" else "B, S, 12"
    assert is_identity(chain(IDENTITIES[case], shape))


NO_IDENTITIES = {
    "reversed": "y = Slice (x, last, first, two, last)",
    "the first five tokens": "y = Slice (x, zero, five, one)",  # all of them at small sizes
    "the last token": "a = Slice (x, last, five, one) y = Identity (a)",
    "the second part": "a, y = Split <axis = 2, num_outputs = 2> (x)",
    "twice as wide": "y = Tile (x, copies)",
    "doubled": "y = Concat <axis = 2> (x, x)",
    "another dtype": "a = Cast <to = 10> (x) y = Cast <to = 1> (a)",
    "moved": "a = Transpose <perm = [1, 0, 2]> (x) y = Identity (a)",
}


@pytest.mark.parametrize("case", NO_IDENTITIES)
def test_takes_nothing_else_for_identity(case: str) -> None:
    found = chain(NO_IDENTITIES[case])
    assert not found.links or not is_identity(found)


def test_a_slice_beyond_the_small_sizes_is_not_taken_for_all() -> None:
    """Of 9,999 tokens and more it takes the first; of the few in the index tensor it takes all."""
    found = chain("a = Slice (x, zero, many, one) y = Transpose <perm = [0, 2, 1]> (a)")
    assert len(found.links) == 2
    assert not is_same_movement(found, lambda a, _: a.transpose(0, 2, 1))
    assert is_same_movement(
        chain("a = Identity (x) y = Transpose <perm = [0, 2, 1]> (a)"),
        lambda a, _: a.transpose(0, 2, 1),
    )


def test_an_expansion_to_another_symbol_may_repeat() -> None:
    """Inference keeps one of two names that meet; the size behind it may be 1."""
    text = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[R, 4] x, float[B, 4] like) => (float[B, 4] y) {
        target = Shape (like)
        y = Expand (x, target)
    }"""
    assert not is_identity(trace(parse(text).graph.outputs[0]))


REPEATS = {
    "tiled": ("y = Tile (x, copies)", lambda a: np.tile(a, (1, 1, 2))),
    "joined": ("y = Concat <axis = 2> (x, x)", lambda a: np.concatenate([a, a], 2)),
    "gathered": ("y = Gather <axis = 2> (x, order)", lambda a: a[:, :, [1, 0]]),
    "the second part": ("a, y = Split <axis = 2, num_outputs = 2> (x)", lambda a: a[:, :, 6:]),
}


@pytest.mark.parametrize("case", REPEATS)
def test_follows_other_movement(case: str) -> None:
    body, expected = REPEATS[case]
    assert is_same_movement(chain(body), lambda a, _: expected(a))


def test_a_join_of_two_values_is_where_it_ends() -> None:
    found = chain("a = Neg (x) y = Concat <axis = 2> (x, a)")
    assert not found.links


def test_a_lookup_by_computed_numbers_is_where_it_ends() -> None:
    found = chain("n = NonZero (x) m = Gather (n, one) y = Gather <axis = 2> (x, m)")
    assert not found.links


# --- scalars ----------------------------------------------------------------------------------

FACTORS = {
    "none": ("y = Identity (x)", 1.0),
    "a product": ("a = Mul (x, half) y = Mul (half, a)", 0.25),
    "a quotient": ("y = Div (x, half)", 2.0),
}


@pytest.mark.parametrize("case", FACTORS)
def test_collects_factors(case: str) -> None:
    body, factor = FACTORS[case]
    found = chain(body, scalars=True)
    assert found.source.name == "x"
    assert found.factor == factor


@pytest.mark.parametrize(
    "body",
    ["y = Div (x, none)", "y = Div (half, x)", "y = Mul (x, x)", "y = Add (x, half)"],
)
def test_takes_nothing_else_for_a_factor(body: str) -> None:
    assert not chain(body, scalars=True).links


def test_factors_are_followed_only_if_asked() -> None:
    assert not chain("y = Mul (x, half)").links


def test_a_factor_must_not_widen() -> None:
    assert not chain("y = Mul (one_row, halves)", scalars=True).links


def test_scalar_reads_one_number_however_often_it_stands() -> None:
    found = chain(
        "a = Mul (x, half) b = Mul (one_row, halves) c = Mul (one_row, other) y = Neg (a)"
    )
    node = found.end.producer()
    assert node is not None
    assert isinstance(node.graph, ir.Graph)
    constants = node.graph.initializers
    assert [scalar(constants[name]) for name in ("half", "halves", "other", "three")] == [
        0.5,
        0.5,
        None,
        3.0,
    ]
    assert scalar(None) is None
    assert scalar(node.graph.inputs[0]) is None


def test_shape_of_a_value_without_rank_is_empty() -> None:
    assert shape_of(None) == ()
    assert shape_of(ir.Value(name="x")) == ()
    assert shape_of(ir.Value(name="x", shape=ir.Shape([2, 3]))) == (2, 3)
