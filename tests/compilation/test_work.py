"""What a progress bar is told."""

from omforge.compilation.work import Work

Told = list[tuple[str, int, int]]


def test_steps_are_counted() -> None:
    told: Told = []
    steps = Work(None, lambda *given: told.append(given))
    steps.begin("load")
    steps.expect(graphs=2)
    steps.begin("raise")
    assert told == [("load", 0, 4), ("raise", 1, 8)]


def test_bytes_and_the_time_that_is_left() -> None:
    told: Told = []
    seconds = iter([10.0, 10.5, 20.0])
    steps = Work(None, lambda *given: told.append(given), clock=lambda: next(seconds))
    meter = steps.meter("quantise")
    assert meter is not None
    for done in (10, 20, 30):
        meter(done << 20, 2000 << 20)
    # 20 MiB in 10 seconds: 1970 take 985. After half a second nobody knows.
    assert [text for text, _, _ in told] == [
        "quantise: 10 of 2,000 MiB",
        "quantise: 20 of 2,000 MiB",
        "quantise: 30 of 2,000 MiB, 16:25 left",
    ]
    assert told[-1][1:] == (30 << 20, 2000 << 20)


def test_what_is_not_bytes_is_shown_as_it_is() -> None:
    told: Told = []
    work = Work(None, lambda *given: told.append(given), clock=lambda: 0.0)
    meter = work.meter("cache", "tensors")
    assert meter is not None
    meter(3, 60)
    assert told == [("cache: 3 of 60 tensors", 3, 60)]


def test_nothing_is_measured_where_nobody_looks() -> None:
    assert Work().meter("quantise") is None
