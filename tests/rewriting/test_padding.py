"""What is computed for padding is compared with nothing."""

from typing import ClassVar

import numpy as np
import pytest

from omforge import ir
from omforge.ir.errors import CheckError
from omforge.rewriting.base import Pass
from omforge.rewriting.instruments import CompareEach
from omforge.rewriting.padding import StepFeeds
from omforge.rewriting.pipeline import Pipeline
from omforge.testing import parse

FEEDS = StepFeeds({}, np.array([0, 2]), past=0, seq=5)
ROW = [False, False, True, True, True]


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ((2, 5), (1,)),
        ((2, 5, 7), (1, slice(None), 0)),
        ((2, 3, 5, 4), (1, 0, slice(None), 0)),
        ((12, 3, 5, 4), (7, 2, slice(None), 3)),  # [2*L*B, K, S, D]
        ((5, 2, 3, 4), (slice(None), 1, 0, 0)),
        ((2, 5, 3, 4), (1, slice(None), 0, 0)),
    ],
)
def test_padded_tokens_are_found_on_their_axis(
    shape: tuple[int, ...], row: tuple[int | slice, ...]
) -> None:
    mask = FEEDS.read(np.empty(shape))
    assert mask is not None
    mask = np.broadcast_to(mask, shape)
    assert mask[row].tolist() == ROW
    assert mask.sum() == mask.size * 8 // 10


def test_the_past_is_read_whatever_it_holds() -> None:
    feeds = StepFeeds({}, np.array([0, 4]), past=3, seq=3)
    mask = feeds.read(np.empty((2, 1, 6, 1)))
    assert mask is not None
    assert mask[1, 0, :, 0].tolist() == [True, True, True, False, True, True]


def test_all_is_read_where_there_is_no_padding() -> None:
    assert StepFeeds({}, np.array([0, 4]), past=4, seq=5).read(np.empty((2, 5, 7))) is None
    assert FEEDS.read(np.empty((2, 7))) is None
    assert FEEDS.read(np.empty(())) is None


class AddOne(Pass):
    """Move the numbers of some tokens of the second row."""

    name = "add-one"
    at: ClassVar[int] = 0

    def run(self, model: ir.Model) -> int:
        offset = np.zeros((2, 5, 1), np.float32)
        offset[1, self.at] = 1
        model.graph.initializers["offset"].const_value = ir.tensor(offset, name="offset")
        return 1


class AddOneToReal(AddOne):
    """Move what is read."""

    at = 2


def test_a_pass_may_move_what_it_makes_of_padding_and_nothing_else() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
        g (float[2, 5, 3] x) => (float[2, 5, 3] y) <float[2, 5, 1] offset = {0, 0, 0, 0, 0, 0, 0, 0,
        0, 0}> { y = Add (x, offset) }"""
    feeds = StepFeeds({"x": np.ones((2, 5, 3), np.float32)}, np.array([0, 2]), past=0, seq=5)
    (run,) = Pipeline((AddOne(),)).run(parse(text), [CompareEach(lambda _: [feeds])]).passes
    assert run.max_abs_diff == 0
    with pytest.raises(CheckError, match="add-one moves the numbers of y: by 1 on feed 1 of 1"):
        Pipeline((AddOneToReal(),)).run(parse(text), [CompareEach(lambda _: [feeds])])
