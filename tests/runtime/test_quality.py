"""Perplexity, divergence and agreement, by numbers worked out by hand; and a bundle's."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from omforge import ir
from omforge.runtime.bundle import Bundle
from omforge.runtime.quality import (
    LevelQuality,
    QualityReport,
    cut,
    first_difference,
    kl_divergence,
    log_softmax,
    measure_quality,
    perplexity,
    with_every_row,
)
from tests.runtime.tiny import VOCABULARY, Tiny, reference_logits

TEXT = np.random.default_rng(3).integers(0, VOCABULARY, 40).tolist()


def test_log_softmax_of_logs_of_shares() -> None:
    # Whatever is added to all logits of a row changes nothing, however large it is.
    logits = np.add(np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), [[7.0], [1e5]])
    np.testing.assert_allclose(np.exp(log_softmax(logits)), [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])


def test_divergence_by_hand() -> None:
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75) = 0.5 ln(4 / 3)
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    np.testing.assert_allclose(kl_divergence(p, q), [0.5 * math.log(4 / 3)])
    assert kl_divergence(p, p).tolist() == [0]


def test_a_token_that_the_reference_excludes_counts_nothing() -> None:
    p, q = np.array([[0.0, -np.inf]]), np.log([[0.5, 0.5]])
    np.testing.assert_allclose(kl_divergence(p, q), [math.log(2)])


def test_perplexity_of_even_odds() -> None:
    assert perplexity(np.full(3, math.log(8))) == pytest.approx(8)
    # The geometric mean of 1/p: sqrt(2 * 8).
    assert perplexity(np.log([2, 8])) == pytest.approx(4)


def test_a_text_is_cut_into_whole_pieces() -> None:
    assert cut(range(10), 4, 9) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(range(10), 4, 1) == [[0, 1, 2, 3]]
    assert cut(range(3), 4, 9) == [[0, 1, 2]]
    with pytest.raises(ir.InputError, match="text of 1 tokens is too short"):
        cut([5], 4, 9)


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2]) is None


@pytest.mark.parametrize(
    "tiny", [Tiny(), Tiny(dtype="float16"), Tiny(gears=True), Tiny(batches=(2,))]
)
def test_a_bundle_that_lost_nothing(tiny: Tiny, tiny_bundle: Callable[[Tiny], Bundle]) -> None:
    report = measure_quality(tiny_bundle(tiny), TEXT, piece_tokens=20, new_tokens=4)
    assert (report.pieces, report.piece_tokens, report.reference) == (2, 20, "exported")
    assert [level.level for level in report.levels] == ["exported", "canonical", "lowered"]
    losses = [
        -log_softmax(reference_logits(piece, (None, None)))[np.arange(19), piece[1:]]
        for piece in (TEXT[:20], TEXT[20:])
    ]
    expected = perplexity(np.concatenate(losses))
    for level in report.levels:
        assert level.perplexity == pytest.approx(expected, rel=1e-3)
        assert level.kl_max < 1e-4
        assert level.top1 == 1
        assert level.diverges_at == (None, None)


def test_layers_that_lost_nothing(tiny_bundle: Callable[[Tiny], Bundle]) -> None:
    bundle = tiny_bundle(Tiny())
    plain = ir.load(bundle.canonical)
    report = measure_quality(bundle, TEXT, float_canonical=plain, new_tokens=0)
    assert report.layers is not None
    assert len(report.layers.layers) == 9  # q, k, v and o twice, and the head
    assert report.layers.blocks == (0, 0)
    assert report.level("lowered").diverges_at == ()


def test_without_a_text_the_model_writes_one(tiny_bundle: Callable[[Tiny], Bundle]) -> None:
    bundle = tiny_bundle(Tiny())
    report = measure_quality(bundle, new_tokens=0)
    assert report.text == "drawn from the exported model, seed 0"
    assert report == measure_quality(bundle, new_tokens=0)
    # What it drew is likelier to it than even odds.
    assert report.level("exported").perplexity < VOCABULARY


def test_without_the_export_the_canonical_graph_is_the_reference(
    tiny_bundle: Callable[[Tiny], Bundle],
) -> None:
    bundle = tiny_bundle(Tiny())
    report = measure_quality(bundle, TEXT, source="nowhere.onnx", new_tokens=0)
    assert report.reference == "canonical"
    assert "nowhere.onnx is not there" in report.notes[0]


def test_a_graph_without_rows_is_refused() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 24]> g (float[1] x) => (float[1] y) { y = Neg (x) }'
    )
    with pytest.raises(ir.InputError, match="no input logits_index"):
        with_every_row(model)


def made(**lowered: float) -> QualityReport:
    exact = LevelQuality("exported", 10.0, 0.0, 0.0, 1.0, ())
    level = dataclasses.replace(exact, level="lowered", **lowered)
    return QualityReport("t", 1, 2, 0, "exported", (exact, level), None, ())


def test_limits() -> None:
    report = made(perplexity=10.4, kl_mean=0.02)
    assert report.ok
    assert report.judged(0.02, 0.05).ok
    assert report.judged(max_perplexity_increase=0.03).failures == (
        "lowered: perplexity 10.4 is 4.0% above exported, the limit is 3.0%",
    )
    assert report.judged(max_kl=0.01).failures == ("lowered: mean KL 0.02 is above 0.01",)


def test_what_is_no_number_is_above_every_limit() -> None:
    report = made(perplexity=math.nan, kl_mean=math.nan).judged(1e9, 1e9)
    assert len(report.failures) == 2
