"""Encoding: a bundle without a cache gives of each text what the export gives of it alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from omforge.ir.errors import InputError
from omforge.runtime.backends import open_encoder
from omforge.runtime.bundle import Bundle
from omforge.runtime.encode import Encoder
from omforge.runtime.export_encode import ExportEncoder
from omforge.runtime.generate import LanguageModel
from tests.runtime.tiny import Tiny, build, change_manifest

TEXTS = [[5, 6, 7], [1], list(range(2, 11)), [9, 8, 7, 6, 5], [4, 4]]
SEGMENTS = [[0, 1, 1], [1], [0] * 4 + [1] * 5, [0, 0, 0, 1, 1], [1, 0]]


@pytest.mark.parametrize("level", ["canonical", "lowered"])
def test_every_text_gets_what_it_gets_alone(bert: Bundle, level: str) -> None:
    given = {"token_type_ids": SEGMENTS}
    with ExportEncoder(bert.export, bert.manifest) as export:
        expected = export.encode(TEXTS, token_inputs=given)
    with Encoder(bert, level) as encoder:  # type: ignore[arg-type]
        actual = encoder.encode(TEXTS, token_inputs=given)
    assert [row["last_hidden_state"].shape for row in actual] == [(len(t), 64) for t in TEXTS]
    for mine, theirs in zip(actual, expected, strict=True):
        assert list(mine) == list(theirs) == ["last_hidden_state"]
        np.testing.assert_allclose(
            mine["last_hidden_state"], theirs["last_hidden_state"], rtol=1e-3, atol=1e-3
        )


def test_a_simulated_device_gives_what_the_cpu_does(bert: Bundle) -> None:
    """The .om files take ids, segments and masks, and give hidden states back by their name."""
    given = {"token_type_ids": SEGMENTS}
    with open_encoder(bert) as cpu, open_encoder(bert, backend="sim") as sim:
        expected = cpu.encode(TEXTS, token_inputs=given)
        actual = sim.encode(TEXTS, token_inputs=given)
    for mine, theirs in zip(actual, expected, strict=True):
        assert np.array_equal(mine["last_hidden_state"], theirs["last_hidden_state"])


def test_segments_are_zeros_where_none_are_given(bert: Bundle) -> None:
    zeros = {"token_type_ids": [[0] * len(text) for text in TEXTS]}
    with Encoder(bert) as encoder:
        plain, other, given = (
            encoder.encode(TEXTS, token_inputs=extra)
            for extra in (None, {"token_type_ids": SEGMENTS}, zeros)
        )
    name = "last_hidden_state"
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(plain, given, strict=True))
    assert not np.allclose(plain[0][name], other[0][name], atol=1e-2)


def test_the_smallest_bucket_that_holds_a_text_is_run(bert: Bundle) -> None:
    opened: list[str] = []

    def spy(bucket: object) -> object:
        opened.append(bucket.name)  # type: ignore[attr-defined]
        return encoder._open_twin(bucket)  # type: ignore[arg-type]

    encoder = Encoder(bert)
    encoder._open_session = spy  # type: ignore[assignment]
    with encoder:
        encoder.encode([[1, 2]])
        encoder.encode([[1] * 5])
    assert opened == ["encode_s4_b2", "encode_s12_b2"]


@pytest.mark.parametrize(
    ("texts", "given", "why"),
    [
        ([], None, "there are no texts"),
        ([[1], []], None, "text 1 is empty"),
        ([[]], None, "the text is empty: there is no token to encode. Give it a word"),
        ([[1] * 13], None, "text 0 has 13 tokens: the bundle's longest bucket takes 12"),
        ([[320]], None, "token 320 is outside its table: that has rows 0 to 319"),
        ([[1]], {"token_type_ids": [[2]]}, "token_type_ids 2 is outside its table"),
        ([[1]], {"token_type_ids": [[0, 0]]}, "token_type_ids does not fit the texts"),
        ([[1]], {"languages": [[0]]}, "the further inputs of a token are token_type_ids"),
    ],
)
def test_wrong_texts_are_refused(
    bert: Bundle, texts: list[list[int]], given: dict[str, list[list[int]]] | None, why: str
) -> None:
    with Encoder(bert) as encoder, pytest.raises(InputError, match=why):
        encoder.encode(texts, token_inputs=given)


def test_a_bundle_does_what_it_is_for(bert: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not generate: it takes a whole text in one run"):
        LanguageModel(bert)
    with pytest.raises(InputError, match=r"does not encode: it continues a text with a KV cache"):
        Encoder(build(tmp_path / "tiny", Tiny()))


def test_a_bucket_that_is_not_the_manifests_is_refused(bert: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert.folder, tmp_path / "bundle"))
    change_manifest(folder, lambda data: data["outputs"][0].update(shape=["batch", "seq", 65]))
    with pytest.raises(InputError, match=r"output last_hidden_state does not fit the manifest"):
        Bundle.open(folder)
