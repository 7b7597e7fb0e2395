"""Embeddings in place of token ids: looked up, given, and refused where they do not fit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from omforge.cli.app import app
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir.errors import InputError
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.runtime.embeddings import RandomEmbeddings, embedded
from omforge.runtime.generate import LanguageModel

TABLE = RandomEmbeddings(320, 64, 0.15, seed=3)


@pytest.fixture(scope="module")
def bundle(encoder: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("embeds") / "bundle"
    options = CompileOptions("Ascend910B4", context=24, prefill=(4,), batch=2)
    compile_bundle(encoder("optimum", "llama_embeds"), folder, options)
    return Bundle.open(folder)


def test_the_interface_takes_them_in_place_of_ids(bundle: Bundle) -> None:
    assert bundle.manifest.embeddings is not None
    assert bundle.manifest.embeddings.hidden_size == 64
    assert 0.1 < bundle.manifest.embeddings.scale < 0.2, "the deviation of its head"
    first = bundle.manifest.buckets[0].inputs[0]
    assert (first.name, first.dtype, first.shape) == ("inputs_embeds", "float16", (2, 4, 64))


def test_it_is_verified_on_random_rows(bundle: Bundle) -> None:
    report = verify_bundle(bundle, steps=3)
    assert report.ok, report.failures
    assert report.worst("canonical").max_abs < 1e-4
    assert "random rows of deviation 0.15 stand for tokens" in report.notes[0]


def test_ids_are_looked_up_and_rows_are_taken(bundle: Bundle) -> None:
    prompts = [[5, 6, 7, 8, 9, 10], [1, 2]]
    with LanguageModel(bundle.with_embeddings(TABLE), "canonical") as model:
        expected = [model.prefill(prompts), model.decode([3, 4])]
    with LanguageModel(bundle, "canonical") as model:
        rows = [TABLE[prompt] for prompt in prompts]
        actual = [model.prefill(rows), model.decode(TABLE[[3, 4]])]
        alone = model.prefill([rows[1]])
    for mine, theirs in zip(actual, expected, strict=True):
        assert np.array_equal(mine, theirs)
    np.testing.assert_allclose(alone[0], expected[0][1], rtol=1e-4, atol=1e-5)


def test_text_comes_out_where_a_table_is_given(bundle: Bundle) -> None:
    with LanguageModel(bundle.with_embeddings(TABLE)) as model:
        tokens = list(model.generate([7, 8, 9], max_new_tokens=5))
    assert len(tokens) == 5
    with LanguageModel(bundle) as model:
        generation = model.generate(TABLE[[7, 8, 9]], max_new_tokens=5)
        assert next(generation) == tokens[0]
        with pytest.raises(InputError, match="there is no table to look tokens up in"):
            next(generation)


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ([320], "token 320 is outside the table of embeddings: it has rows 0 to 319"),
        (np.zeros((2, 63)), r"a prompt of embeddings is \[2, 63\]: the model takes rows of 64"),
        (np.zeros(64), r"a prompt of embeddings is \[64\]"),
    ],
)
def test_what_does_not_fit_is_refused(prompt: list[int] | np.ndarray, why: str) -> None:
    with pytest.raises(InputError, match=why):
        embedded(prompt, TABLE, 64)


def test_a_table_of_another_width_is_refused(bundle: Bundle, bert: Bundle) -> None:
    with pytest.raises(InputError, match="the model takes rows of 64 numbers"):
        bundle.with_embeddings(np.zeros((320, 32)))
    with pytest.raises(InputError, match="the model takes token ids"):
        bert.with_embeddings(np.zeros((320, 64)))


def test_rows_are_drawn_by_their_number() -> None:
    assert np.array_equal(TABLE[[3, 1]][1], TABLE[[1]][0])
    assert TABLE[np.array([[1, 2], [3, 4]])].shape == (2, 2, 64)
    assert np.std(TABLE[np.arange(50)]) == pytest.approx(0.15, rel=0.05)


def test_no_text_can_be_run(bundle: Bundle) -> None:
    result = CliRunner().invoke(app, ["run", str(bundle.folder), "--prompt", "a"])
    assert result.exit_code == 2
    assert "no text can go into the bundle" in result.stderr
    assert "fed by embeddings in place of token ids" in result.stderr
