"""sorted-rows: what an index says of sorted rows is shown by running it."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.recognition.experts.sorted_rows import (
    Sort,
    find_ends,
    find_groups,
    may_sort,
    permutation,
)
from omforge.rewriting.match import NoMatch
from omforge.testing import parse
from tests.passes.test_ungroup_experts import TEXT


def _sort(text: str = TEXT) -> tuple[Sort, dict[str, ir.Value]]:
    model = parse(text)
    infer_model(model)
    nodes = [node for node in model.graph if may_sort(node)]
    assert len(nodes) == 1  # the router's own TopK takes the highest
    return Sort.of(model, nodes[0]), {v.name or "": v for n in model.graph for v in n.outputs}


def test_finds_both_products_and_the_way_back() -> None:
    sort, values = _sort()
    assert (sort.each, sort.flat) == (2, values["chosen"])
    groups = find_groups(sort)
    assert set(groups) == {values["up"], values["down"]}
    assert [len(group.which) for group in groups.values()] == [3, 3]
    assert [end.node.outputs[0].name for end in find_ends(sort, groups)] == ["restored"]


@pytest.mark.parametrize(
    ("name", "token", "way_back"), [("token_c", True, False), ("back_c", False, True)]
)
def test_tells_indices_by_what_they_compute(name: str, *, token: bool, way_back: bool) -> None:
    sort, values = _sort()
    index = [values[name]]
    assert sort.runs_as(index, sort.order, permutation, lambda order, _: order // 2) is token
    assert sort.runs_as(index, sort.order, permutation, lambda o, _: np.argsort(o)) is way_back


def test_what_depends_on_more_than_the_sort_is_nothing_of_it() -> None:
    sort, values = _sort()
    assert not sort.runs_as([values["share"]], sort.order, permutation, lambda order, _: order)


def test_choices_that_are_not_flat_are_no_sort() -> None:
    with pytest.raises(NoMatch, match="not each token's k choices"):
        _sort(TEXT.replace("chosen = Reshape (choices, flat)", "chosen = Range (zero, two, one)"))
