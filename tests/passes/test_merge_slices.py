"""merge-slices: adjoining slices of one value become one Split."""

import pytest

from omforge.passes.merge_slices import MergeSlices
from omforge.testing import assert_leaves_alone, assert_rewrites

HEADER = """<ir_version: 11, opset_import: ["" : 24]>
g (float[B, S, 8] x) => (float[B, S, A] a, float[B, S, C] b)
<int64[1] zero = {0}, int64[1] three = {3}, int64[1] five = {5}, int64[1] end = {9223372036854775807},
 int64[1] last = {-1}, int64[1] axis2 = {2}, int64[1] one = {1}, int64[1] two = {2},
 int64[1] minus5 = {-5}>
"""
AFTER = """<ir_version: 11, opset_import: ["" : 24]>
g (float[B, S, 8] x) => (float[B, S, A] a, float[B, S, C] b) <int64[2] sizes = {3, 5}> {
    a, b = Split <axis = -1> (x, sizes) }"""

SPELLINGS = {
    "ends that are numbers": "{ a = Slice (x, zero, three, last) b = Slice (x, three, end, last) }",
    "steps of one": "{ a = Slice (x, zero, three, axis2, one) b = Slice (x, three, end, last, one) }",
    "counted from the end": "{ a = Slice (x, zero, minus5, last) b = Slice (x, minus5, end, last) }",
    "in another order": "{ b = Slice (x, three, end, axis2) a = Slice (x, zero, three, axis2) }",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_adjoining_slices_merge(spelling: str) -> None:
    assert_rewrites(MergeSlices(), HEADER + SPELLINGS[spelling], AFTER)


APART = {
    "a gap": "{ a = Slice (x, zero, three, last) b = Slice (x, five, end, last) }",
    "an overlap": "{ a = Slice (x, zero, five, last) b = Slice (x, three, end, last) }",
    "an end that is missing": "{ a = Slice (x, zero, three, last) b = Slice (x, three, five, last) }",
    "every second element": "{ a = Slice (x, zero, three, last) b = Slice (x, three, end, last, two) }",
    "another axis": "{ a = Slice (x, zero, three, last) b = Slice (x, three, end, one) }",
}


@pytest.mark.parametrize("body", APART)
def test_slices_that_do_not_cover_the_axis_are_left_alone(
    body: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert_leaves_alone(MergeSlices(), HEADER + APART[body], "", caplog)
