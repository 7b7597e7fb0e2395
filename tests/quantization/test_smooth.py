"""SmoothQuant: channels of unequal loudness, loud tokens, and what a search takes."""

import numpy as np
import pytest

from omforge.quantization.smooth import (
    LIMITS,
    factors,
    rounded,
    sample,
    search_smoothing,
    storable_step,
)

RNG = np.random.default_rng(0)
TOKENS, INPUTS, OUTPUTS = 300, 48, 20


def loud_channels() -> np.ndarray:
    """Inputs [T, K] of which two channels are fifty times as loud as the others."""
    x = RNG.normal(size=(TOKENS, INPUTS)).astype(np.float32)
    x[:, [3, 30]] *= 50
    return x


def weight() -> np.ndarray:
    return RNG.normal(size=(INPUTS, OUTPUTS)).astype(np.float32) / 8


def outputs_error(found: object, x: np.ndarray, w: np.ndarray) -> float:
    """The relative error of the outputs, from the integers themselves."""
    by = np.float32(1) if found.scales is None else found.scales
    codes = found.weights[0]
    y = rounded(x / by, found.step) @ codes.decoded(INPUTS)
    relative = np.square(y - x @ w).sum(1) / np.square(x @ w).sum(1)
    return float(np.mean(np.square(relative)) ** 0.25)


def test_factors_move_a_share_of_the_range() -> None:
    x, w = loud_channels(), weight()
    peaks = np.abs(x).max(0)
    for power in (0.25, 0.5, 0.75):
        scales = factors(peaks, [w], power)
        expected = peaks**power / np.abs(w).max(1) ** (1 - power)
        np.testing.assert_allclose(scales / scales[0], expected / expected[0], rtol=1e-5)
    assert np.isfinite(factors(np.zeros(INPUTS, np.float32), [w], 0.5)).all()
    assert np.isfinite(factors(peaks, [np.zeros_like(w)], 0.5)).all()


def test_smoothing_helps_where_channels_differ() -> None:
    x, w = loud_channels(), weight()
    plain = search_smoothing(sample([x]), [w], ())
    smooth = search_smoothing(sample([x]), [w])
    assert plain.scales is None
    assert smooth.scales is not None
    assert smooth.scales[[3, 30]].min() > np.delete(smooth.scales, [3, 30]).max()
    assert smooth.errors[0] < plain.errors[0] / 3
    assert smooth.errors[0] == pytest.approx(outputs_error(smooth, x, w), rel=0.05)


def test_a_loud_token_drowns_no_others_and_its_loss_shows() -> None:
    x, w = RNG.normal(size=(TOKENS, INPUTS)).astype(np.float32), weight()
    x[0] *= 3000
    found = search_smoothing(sample([x]), [w], ())
    assert found.step < np.abs(x).max() / LIMITS[1] / 20
    # One token of 300 is lost: a mean of squares would say 6%.
    assert found.errors[0] == pytest.approx((1 / TOKENS) ** 0.25, rel=0.05)


def test_a_token_that_is_a_little_louder_is_not_clipped() -> None:
    x, w = RNG.normal(size=(TOKENS, INPUTS)).astype(np.float32), weight()
    x[0] *= 4
    found = search_smoothing(sample([x]), [w], ())
    assert found.step > np.abs(x).max() / LIMITS[1] / 2
    assert found.errors[0] < 0.05


def test_inputs_that_fill_the_range_are_not_clipped() -> None:
    x = RNG.choice([-1.0, 1.0], (TOKENS, INPUTS)).astype(np.float32)
    found = search_smoothing(sample([x]), [weight()], ())
    assert found.step == pytest.approx(1 / 127, rel=2**-10)


def test_layers_share_inputs_and_have_errors_of_their_own() -> None:
    x, w = loud_channels(), weight()
    found = search_smoothing(sample([x]), [w, np.zeros_like(w)])
    assert len(found.weights) == len(found.errors) == 2
    assert found.errors[1] == 0, "a layer without an output cannot be off"


def test_a_sample_knows_all_of_the_text() -> None:
    pieces = [RNG.normal(size=(1, 700, INPUTS)).astype(np.float32) for _ in range(3)]
    pieces[1][0, 333, 5] = 1000
    found = sample(pieces)
    assert found.peaks[5] == 1000
    assert np.abs(found.rows).max() == 1000
    assert len(found.rows) == len(found.shares) < 1500
    assert found.shares.sum() == pytest.approx(1, rel=1e-5)


def test_few_tokens_are_all_taken() -> None:
    x = RNG.normal(size=(2, 9, INPUTS)).astype(np.float32)
    found = sample([x])
    np.testing.assert_array_equal(found.rows, x.reshape(-1, INPUTS))
    assert found.shares.sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("step", [1e-9, 2.0**-15, 0.1, 100.0])
def test_a_step_and_its_reciprocal_are_of_float16(step: float) -> None:
    found = storable_step(step)
    assert float(np.float16(found)) == found
    assert np.isfinite(np.float16(1 / found))
