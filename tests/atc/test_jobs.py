"""How many compilations run at a time."""

import pytest

from omforge.atc.jobs import jobs_that_fit


@pytest.mark.parametrize(
    ("todo", "weights", "available", "processors", "jobs"),
    [
        (4, 0, 64 << 30, 2, 2),  # processors
        (1, 0, 64 << 30, 8, 1),  # buckets
        (4, 2 << 30, 32 << 30, 8, 4),  # 8 GiB each
        (4, 2 << 30, 20 << 30, 8, 2),
        (4, 14 << 30, 32 << 30, 8, 1),  # less than one: it is tried
        (4, 0, 0, 8, 1),  # the system does not say
    ],
)
def test_memory_bounds_the_jobs(
    todo: int, weights: int, available: int, processors: int, jobs: int
) -> None:
    assert jobs_that_fit(todo, weights, available=available, processors=processors) == jobs
