"""The cheapest chunks that hold a prompt."""

import pytest

from omforge.bundle.chunks import cheapest_chunks


def cheapest(length: int, costs: dict[int, float]) -> float:
    """Every sequence of chunks, one by one."""
    if length <= 0:
        return 0.0
    return min(cost + cheapest(length - size, costs) for size, cost in costs.items())


@pytest.mark.parametrize(
    ("length", "chunks"),
    [
        (1, [(8, 1)]),
        (8, [(8, 8)]),
        (9, [(8, 8), (8, 1)]),
        (24, [(32, 24)]),
        (33, [(32, 32), (8, 1)]),
        (64, [(32, 32), (32, 32)]),
    ],
)
def test_a_prompt_is_in_the_cheapest_chunks(length: int, chunks: list[tuple[int, int]]) -> None:
    assert cheapest_chunks(length, {8: 10.0, 32: 25.0}) == chunks


@pytest.mark.parametrize("length", range(1, 40))
@pytest.mark.parametrize("costs", [{3: 4.0, 7: 6.5, 11: 12.0}, {4: 1.0, 8: 1.9, 12: 3.5}, {5: 2.0}])
def test_no_chunks_are_cheaper_and_all_tokens_are_in_one(
    length: int, costs: dict[int, float]
) -> None:
    chunks = cheapest_chunks(length, costs)
    assert sum(costs[size] for size, _ in chunks) == pytest.approx(cheapest(length, costs))
    assert sum(count for _, count in chunks) == length
    assert all(0 < count <= size for size, count in chunks)
    assert all(count == size for size, count in chunks[:-1])
