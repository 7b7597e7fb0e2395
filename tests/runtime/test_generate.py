"""A bundle as a language model: every way through its graphs gives the logits of the whole text."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omforge.bundle.chunks import plan_chunks
from omforge.ir.errors import CheckError, InputError
from omforge.runtime import generate
from omforge.runtime.bundle import Bundle
from omforge.runtime.export import ExportModel
from omforge.runtime.generate import LanguageModel, fit_chunks
from omforge.runtime.sampling import Sampling
from omforge.runtime.session import OrtSession
from tests.runtime.tiny import EOS, Tiny, change_manifest, reference_logits

TEXT = [3, 5, 7, 9, 11, 2, 4, 6, 8, 10, 12, 14, 1, 30, 22, 17]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
VARIANTS = [
    Tiny(),
    Tiny(layout="per-layer"),
    Tiny(windows=(None, 5)),
    Tiny(windows=(3, 3)),
    Tiny(prefill=()),
]
Bundles = Callable[[Tiny], Bundle]


@pytest.mark.parametrize("tiny", VARIANTS, ids=str)
@pytest.mark.parametrize("level", ["lowered", "canonical"])
@pytest.mark.parametrize("split", [1, 3, 4, 8, 11, 15])
def test_prefill_and_decode_give_the_logits_of_the_whole_text(
    tiny_bundle: Bundles, tiny: Tiny, level: Any, split: int
):
    """One token, padded, exact and chunked prefills, then the rest one by one."""
    expected = reference_logits(TEXT, tiny.windows)
    with LanguageModel(tiny_bundle(tiny), level) as model:
        found = [model.prefill([TEXT[:split]])[0]]
        found += [model.decode([token])[0] for token in TEXT[split:]]
    np.testing.assert_allclose(found, expected[split - 1 :], **CLOSE)


@pytest.mark.parametrize("windows", [(None, None), (None, 4)])
@pytest.mark.parametrize("level", ["lowered", "canonical"])
def test_rows_padded_on_the_left_are_as_if_alone(
    tiny_bundle: Bundles, windows: tuple[int | None, int | None], level: Any
):
    """Row 1 is padding throughout the first chunk; its prompt starts inside the second."""
    prompts = [TEXT[:11], TEXT[5:7], TEXT[3:9]]
    rest = TEXT[11:]
    with LanguageModel(tiny_bundle(Tiny(windows=windows, batches=(3,))), level) as model:
        found = [model.prefill(prompts)]
        found += [model.decode([token] * 3) for token in rest]
    for row, prompt in enumerate(prompts):
        expected = reference_logits(prompt + rest, windows)[len(prompt) - 1 :]
        np.testing.assert_allclose([step[row] for step in found], expected, **CLOSE)


def test_a_long_prompt_goes_through_the_canonical_graph_in_chunks(
    tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(generate, "CANONICAL_CHUNK", 5)
    seen: list[int] = []
    for length in (10, 12):
        with LanguageModel(tiny_bundle(Tiny(windows=(None, 4))), "canonical") as model:
            found = model.prefill([TEXT[:length]], progress=lambda _, done, __: seen.append(done))
        np.testing.assert_allclose(
            found[0], reference_logits(TEXT[:length], (None, 4))[-1], **CLOSE
        )
    assert seen == [5, 10, 5, 10, 12]


def test_fewer_prompts_than_the_batch(tiny_bundle: Bundles):
    with LanguageModel(tiny_bundle(Tiny(batches=(3,)))) as model:
        found = [model.prefill([TEXT[:4]]), model.decode(TEXT[4:5])]
    expected = reference_logits(TEXT[:5], (None, None))[3:]
    np.testing.assert_allclose(np.concatenate(found), expected, **CLOSE)


def test_float16_stays_near(tiny_bundle: Bundles):
    with LanguageModel(tiny_bundle(Tiny(dtype="float16"))) as model:
        found = model.prefill([TEXT])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], reference_logits(TEXT, (None, None))[-1], atol=5e-2)


def test_a_new_prompt_forgets_the_old_one(tiny_bundle: Bundles):
    with LanguageModel(tiny_bundle(Tiny())) as model:
        first = model.prefill([TEXT[:5]])
        model.prefill([TEXT[5:12]])
        assert (model.prefill([TEXT[:5]]) == first).all()


@pytest.mark.parametrize(
    ("length", "sizes", "chunks"),
    [
        (3, [4, 8], [(4, 3)]),
        (4, [4, 8], [(4, 4)]),
        (5, [4, 8], [(8, 5)]),  # one run of 8 computes no more than two of 4
        (13, [4, 8], [(8, 8), (8, 5)]),
        (9, [4, 8], [(8, 8), (4, 1)]),
        (33, [32, 128], [(32, 32), (32, 1)]),
        (100, [32, 128], [(128, 100)]),
        (3, [1], [(1, 1)] * 3),
    ],
)
def test_chunks(length: int, sizes: list[int], chunks: list[tuple[int, int]]):
    assert plan_chunks(length, sizes) == chunks


def test_progress_counts_the_prompts_tokens(tiny_bundle: Bundles):
    seen: list[tuple[str, int, int]] = []
    with LanguageModel(tiny_bundle(Tiny())) as model:
        model.prefill([TEXT[:13]], progress=lambda *step: seen.append(step))
    assert seen == [("prefill", 8, 13), ("prefill", 13, 13)]


def test_a_last_single_token_goes_through_the_decode_bucket(tiny_bundle: Bundles):
    opened: list[str] = []
    bundle = tiny_bundle(Tiny())

    def open_session(bucket: Any) -> OrtSession:
        opened.append(bucket.name)
        return OrtSession(bundle.graph(bucket), lowered=True)

    with LanguageModel(bundle, open_session=open_session) as model:
        model.prefill([TEXT[:9]])
        model.decode([1])
    assert opened == ["prefill_b1_s8_c24", "decode_b1_s1_c24"]


class TestRefusals:
    @pytest.fixture
    def model(self, tiny_bundle: Bundles):
        with LanguageModel(tiny_bundle(Tiny())) as model:
            yield model

    def test_an_empty_prompt(self, model: LanguageModel):
        with pytest.raises(
            InputError, match=r"the prompt is empty: .* Start it with the model's BOS"
        ):
            model.prefill([[]])

    def test_a_prompt_longer_than_the_context(self, model: LanguageModel):
        with pytest.raises(InputError) as error:
            model.prefill([[1] * 30])
        assert str(error.value) == (
            "the prompt has 30 tokens: the bundle's context is 24. "
            "Shorten it by 6, or build the bundle with a larger context"
        )

    def test_a_model_that_knows_fewer_positions_than_the_cache(
        self, tiny_bundle: Bundles, tmp_path: Path
    ):
        folder = Path(shutil.copytree(tiny_bundle(Tiny()).folder, tmp_path / "bundle"))
        change_manifest(folder, lambda data: data["model"].update(max_positions=6))
        with LanguageModel(Bundle.open(folder)) as model:
            with pytest.raises(InputError, match="has 7 tokens: the bundle's context is 6"):
                model.prefill([[1] * 7])
            model.prefill([[1] * 6])
            with pytest.raises(CheckError, match="exceed its capacity 6"):
                model.decode([1])

    def test_more_prompts_than_the_batch(self, model: LanguageModel):
        with pytest.raises(InputError, match="2 prompts: the model was opened for 1 to 1"):
            model.prefill([[1], [2]])

    @pytest.mark.parametrize("token", [-1, 32])
    def test_a_token_outside_the_vocabulary(self, model: LanguageModel, token: int):
        with pytest.raises(InputError, match=rf"token {token} is outside .*: it has ids 0 to 31"):
            model.prefill([[token]])
        model.prefill([[1]])
        with pytest.raises(InputError, match=f"token {token} is outside"):
            model.decode([token])

    def test_decode_needs_a_prompt_and_one_token_a_row(self, model: LanguageModel):
        with pytest.raises(InputError, match=r"decode without a prompt\. Call prefill first"):
            model.decode([1])
        model.prefill([[1]])
        with pytest.raises(InputError, match=r"shape \[2\]: it takes one for each of the 1 rows"):
            model.decode([1, 2])

    def test_a_full_context(self, model: LanguageModel):
        model.prefill([[1] * 24])
        with pytest.raises(CheckError, match=r"the context is full: 24 tokens .* capacity 24"):
            model.decode([1])

    def test_a_batch_without_buckets(self, tiny_bundle: Bundles):
        with pytest.raises(InputError, match="no buckets of batch 2: it has batch 1"):
            LanguageModel(tiny_bundle(Tiny()), batch=2)

    def test_a_graph_of_another_bucket(self, tiny_bundle: Bundles, tmp_path: Path):
        bundle = tiny_bundle(Tiny())
        folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
        shutil.copyfile(folder / "prefill_b1_s8_c24.onnx", folder / "prefill_b1_s4_c24.onnx")
        with (
            LanguageModel(Bundle.open(folder, verify_hashes=False)) as model,
            pytest.raises(InputError, match=r"int32\[1, 8\] in the graph and int32\[1, 4\] in the"),
        ):
            model.prefill([[1, 2, 3]])


class TestGenerate:
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        text = list(prompt)
        for _ in range(count):
            text.append(int(reference_logits(text, (None, None))[-1].argmax()))
        return text[len(prompt) :]

    @pytest.mark.parametrize("level", ["lowered", "canonical"])
    def test_greedy_tokens_are_those_of_the_whole_text(self, tiny_bundle: Bundles, level: Any):
        with LanguageModel(tiny_bundle(Tiny()), level) as model:
            stream = model.generate(TEXT[:5], max_new_tokens=10)
            assert list(stream) == self.greedy(TEXT[:5], 10)
        assert stream.reason == "length"

    def test_the_context_ends_it(self, tiny_bundle: Bundles):
        with LanguageModel(tiny_bundle(Tiny())) as model:
            stream = model.generate(TEXT, max_new_tokens=100)
            found = list(stream)
            assert stream.reason == "context"
            assert model.length == 24
        # The cache takes 8 more tokens; a ninth is known but cannot be continued.
        assert found == self.greedy(TEXT, 9)

    def test_eos_ends_it_and_is_not_returned(self, tiny_bundle: Bundles, tmp_path: Path):
        tokens = self.greedy(TEXT[:5], 10)
        end = next(token for token in tokens[1:] if token != tokens[0])
        folder = Path(shutil.copytree(tiny_bundle(Tiny()).folder, tmp_path / "bundle"))
        change_manifest(folder, lambda data: data["model"].update(eos_token_ids=[EOS, end]))
        with LanguageModel(Bundle.open(folder)) as model:
            stream = model.generate(TEXT[:5], max_new_tokens=10)
            assert list(stream) == tokens[: tokens.index(end)]
            assert stream.reason == "eos"
            [(batch, reason)] = model.generate_batch([TEXT[:5]], max_new_tokens=10)
            assert (batch, reason) == (stream.tokens, "eos")

    def test_a_batch_is_what_each_prompt_gives_alone(self, tiny_bundle: Bundles):
        prompts = [TEXT[:9], TEXT[2:5], TEXT[4:11]]
        seen: list[tuple[str, int, int]] = []
        with LanguageModel(tiny_bundle(Tiny(batches=(3,)))) as model:
            found = model.generate_batch(
                prompts, max_new_tokens=6, progress=lambda *step: seen.append(step)
            )
        assert found == [(self.greedy(prompt, 6), "length") for prompt in prompts]
        assert seen[-1] == ("generate", 6, 6)

    def test_a_row_that_ends_does_not_end_the_others(self, tiny_bundle: Bundles, tmp_path: Path):
        prompts = [TEXT[:9], TEXT[4:11]]
        alone = [self.greedy(prompt, 6) for prompt in prompts]
        end = next(token for token in alone[1] if token not in alone[0])
        bundle = tiny_bundle(Tiny(batches=(3,)))
        folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
        change_manifest(folder, lambda data: data["model"].update(eos_token_ids=[end]))
        with LanguageModel(Bundle.open(folder)) as model:
            assert model.generate_batch(prompts, max_new_tokens=6) == [
                (alone[0], "length"),
                (alone[1][: alone[1].index(end)], "eos"),
            ]

    def test_a_batch_stops_at_a_full_context(self, tiny_bundle: Bundles):
        with LanguageModel(tiny_bundle(Tiny())) as model:
            assert model.generate_batch([TEXT], max_new_tokens=100) == [
                (self.greedy(TEXT, 9), "context")
            ]

    def test_sampling_repeats_by_seed(self, tiny_bundle: Bundles):
        with LanguageModel(tiny_bundle(Tiny())) as model:

            def text(seed: int) -> list[int]:
                sampling = Sampling(temperature=2.0, top_k=10, seed=seed)
                return list(model.generate(TEXT[:5], max_new_tokens=12, sampling=sampling))

            assert text(1) == text(1)
            assert text(1) != text(2)

    def test_tokens_come_one_by_one(self, tiny_bundle: Bundles):
        with LanguageModel(tiny_bundle(Tiny())) as model:
            stream = model.generate(TEXT[:5], max_new_tokens=10)
            next(stream)
            assert (model.length, stream.reason) == (5, None)
            next(stream)
            assert model.length == 6

    def test_no_new_tokens_are_refused(self, tiny_bundle: Bundles):
        with (
            LanguageModel(tiny_bundle(Tiny())) as model,
            pytest.raises(InputError, match="max_new_tokens is 0: it must be 1 or more"),
        ):
            model.generate([1], max_new_tokens=0)


@pytest.mark.parametrize("level", ["lowered", "canonical"])
def test_a_text_goes_on_by_several_tokens_at_once(tiny_bundle: Bundles, level: Any):
    expected = reference_logits(TEXT, (None, 5))
    with LanguageModel(tiny_bundle(Tiny(windows=(None, 5))), level) as model:
        model.prefill([TEXT[:3]])
        np.testing.assert_allclose(model.extend([TEXT[3:14]])[0], expected[13], **CLOSE)
        np.testing.assert_allclose(model.decode(TEXT[14:15])[0], expected[14], **CLOSE)
        with pytest.raises(CheckError, match="the context is full"):
            model.extend([[1] * 10])
        with pytest.raises(InputError, match="2 rows of 1, 2 tokens"):
            model.extend([[1], [1, 2]])


def test_a_repeated_past_is_the_same_for_every_model(tiny_bundle: Bundles):
    """Its keys are those of other places, so that no text has these logits: they only agree."""
    bundle = tiny_bundle(Tiny(windows=(None, 5)))
    export = ExportModel(bundle.export, bundle.manifest.export, bundle.manifest.kv)
    found = []
    for model in (LanguageModel(bundle), LanguageModel(bundle, "canonical"), export):
        with model:
            with pytest.raises(InputError) if model is not export else nullcontext():
                model.repeat_past(15)
            model.prefill([TEXT[:4]])
            model.repeat_past(15)
            found.append([model.extend([TEXT[4:9]])[0], model.decode(TEXT[9:10])[0]])
    np.testing.assert_allclose(found[0], found[2], **CLOSE)
    np.testing.assert_allclose(found[1], found[2], **CLOSE)


@pytest.mark.parametrize(
    ("chunks", "past", "fitted"),
    [
        ([(8, 8), (8, 3)], 0, [(8, 8), (8, 3)]),  # 16 slots: the padding still fits
        ([(8, 3)], 10, [(1, 1)] * 3),  # its padding would be written behind the end
        ([(8, 6)], 9, [(4, 4), (1, 1), (1, 1)]),
        ([(4, 4), (1, 1)], 11, [(4, 4), (1, 1)]),
        ([(1, 1)], 15, [(1, 1)]),
    ],
)
def test_chunks_whose_padding_would_leave_the_cache_are_cut(
    chunks: list[tuple[int, int]], past: int, fitted: list[tuple[int, int]]
) -> None:
    assert fit_chunks(chunks, {1, 4, 8}, past, 16) == fitted
    assert sum(count for _, count in fitted) == sum(count for _, count in chunks)


def test_chunks_that_no_bucket_holds_are_refused() -> None:
    with pytest.raises(CheckError, match="the context is full"):
        fit_chunks([(8, 3)], {4, 8}, 14, 16)
