"""bind-choices: the branch that every text of a context takes."""

import pytest

from omforge import ir
from omforge.compilation.compare_feeds import make_feeds
from omforge.passes.bind_choices import BindChoices
from omforge.rewriting.events import events
from omforge.testing import assert_same_numbers
from tests.passes import lengths


@pytest.mark.parametrize(
    ("frequency", "context", "taken"),
    [
        (lengths.LONGEST, 7, "fast"),
        (lengths.LONGEST.replace("six", "zero").replace("Greater", "GreaterOrEqual"), 99, "slow"),
        (lengths.BRANCHES, 6, "else_branch"),
        (lengths.BRANCHES.replace("six", "zero"), 99, "then_branch"),
    ],
)
def test_one_branch_is_left(frequency: str, context: int, taken: str) -> None:
    model = lengths.model(frequency + lengths.TURNED)
    before = model.clone()
    assert BindChoices(context).run(model) == 1
    assert not {"If", "Where", "Greater", "GreaterOrEqual"} & {n.op_type for n in model.graph}
    (event,) = events(model)
    assert str(event).endswith(
        f"a text of up to {context} tokens always takes {taken}, which stands in its place"
    )
    assert_same_numbers(before, model, make_feeds(before, longest=context))


@pytest.mark.parametrize(
    ("frequency", "context"), [(lengths.LONGEST, 8), (lengths.BRANCHES, 7)], ids=["where", "if"]
)
def test_a_choice_that_the_context_crosses_is_left(frequency: str, context: int) -> None:
    model = lengths.model(frequency + lengths.TURNED)
    assert BindChoices(context).run(model) == 0


def test_a_condition_on_padding_is_left() -> None:
    flags = "least = ReduceMin <keepdims = 0> (attention_mask) long = Equal (least, one) "
    model = lengths.model(f"{flags} frequency = Where (long, slow, fast) {lengths.TURNED}")
    assert BindChoices(16).run(model) == 0


def test_a_context_is_given() -> None:
    with pytest.raises(ir.InputError, match="a context of 0 tokens"):
        BindChoices(0).run(lengths.model(lengths.LOOKED_UP))
