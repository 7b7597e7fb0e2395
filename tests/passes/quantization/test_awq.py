"""AWQ finds scales with which the layers' outputs change less."""

import numpy as np

from omforge.passes.quantization.awq import round_weighted, search_scales
from omforge.passes.quantization.blockwise import Scheme

RNG = np.random.default_rng(0)
# A few inputs are much larger than the rest, as behind the norms of language models.
STRENGTH = np.where(np.arange(128) % 16 == 3, 20.0, 1.0).astype(np.float32)
X = RNG.normal(size=(400, 128)).astype(np.float32) * STRENGTH
W = [RNG.normal(size=(128, n)).astype(np.float32) for n in (24, 8)]


def error(scales: np.ndarray, scheme: Scheme) -> float:
    total = 0.0
    for weight in W:
        made = round_weighted(weight * scales[:, None], None, scheme).decoded(scheme.group)
        total += float(np.square(X @ (made / scales[:, None] - weight)).sum())
    return total


def test_scales_lessen_the_error_of_the_outputs() -> None:
    scheme = Scheme(4, 64)
    scales = search_scales(X, W, scheme)
    assert error(scales, scheme) < 0.7 * error(np.ones(128, np.float32), scheme)
    assert scales[3] > scales[4]


def test_scales_are_ones_where_the_inputs_say_nothing() -> None:
    np.testing.assert_array_equal(search_scales(X * 0, W, Scheme(4, 64)), np.ones(128))


def test_clipping_weighs_strong_inputs_more() -> None:
    weight, scheme = W[0], Scheme(4, 64)

    def weighted_error(strength: np.ndarray | None) -> float:
        made = round_weighted(weight, strength, scheme).decoded(64)
        return float(np.square(X @ (made - weight)).sum())

    assert weighted_error(np.square(X).mean(0)) < weighted_error(None)
