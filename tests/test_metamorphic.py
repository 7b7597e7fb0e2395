"""However an export is spelled, all of it is raised, and its numbers stay.

A failure names the export and the steps; `problem(route, family, steps)` in tests/variants.py is
the same check again.
"""

from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from omforge.testing.metamorphic import TRANSFORMATIONS, transform
from tests.exports import EXPORTS
from tests.variants import Steps, original, problem

# Drawn more often: they are smaller and no less varied.
SMALL = tuple(pair for pair in EXPORTS if pair[0] in ("dynamo", "hfexporter"))
STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(TRANSFORMATIONS)), st.integers(0, 999)), min_size=1, max_size=6
)
COMMON = settings(
    deadline=None,
    database=None,
    derandomize=True,  # by the test's name and parameters, so that a failure comes again
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # `check` shortens a failure itself, which takes a few examples
)


def in_order(steps: Steps) -> list[tuple[str, int]]:
    """Copies are made last: spelled in two ways, they would be two computations."""
    return sorted(steps, key=lambda step: step[0] == "duplicate-nodes")


def check(pair: tuple[str, str], steps: Steps) -> None:
    steps = in_order(steps)
    told = problem(*pair, steps)
    for step in list(steps) if told else ():
        fewer = [other for other in steps if other is not step]
        if again := problem(*pair, fewer):
            steps, told = fewer, again
    assert not told, f"{'/'.join(pair)} after {steps}: {told}"


@settings(COMMON, max_examples=5)
@given(pair=st.sampled_from(EXPORTS + SMALL), steps=STEPS)
@pytest.mark.parametrize("part", range(8))
def test_respelled_exports_raise_completely(part: int, pair: tuple[str, str], steps: Steps) -> None:
    check(pair, steps)


@pytest.mark.deep
@settings(COMMON, max_examples=100)
@given(pair=st.sampled_from(EXPORTS + SMALL), steps=STEPS)
@pytest.mark.parametrize("part", range(24))
def test_many_respelled_exports_raise_completely(
    part: int, pair: tuple[str, str], steps: Steps
) -> None:
    check(pair, steps)


@cache
def first_changed(name: str) -> tuple[str, str]:
    """The first export that a transformation has something to change in."""
    for pair in (*SMALL, *EXPORTS):
        if transform(original(*pair).model.clone(), [(name, 0)])[0]:
            return pair
    raise AssertionError(f"{name} changes nothing anywhere")


@pytest.mark.parametrize("name", sorted(TRANSFORMATIONS))
def test_each_transformation_changes_something_and_keeps_the_coverage(name: str) -> None:
    check(first_changed(name), [(name, 0)])


def test_the_same_seed_gives_the_same_model() -> None:
    steps = [("permute-nodes", 3), ("insert-casts", 4), ("rename-values", 5)]
    models = [original("dynamo", "qwen3").model.clone() for _ in range(2)]
    assert transform(models[0], steps) == transform(models[1], steps)
    first, second = ([(n.op_type, n.name) for n in model.graph] for model in models)
    assert first == second
