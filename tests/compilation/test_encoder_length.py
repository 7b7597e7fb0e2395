"""encoder_length: the length of an encoder's states, from the user, config.json or the encoder itself."""

import dataclasses
from pathlib import Path

import onnx
import pytest

from omforge import ir
from omforge.bundle.source import Source
from omforge.compilation.encoder_length import memory_passes
from omforge.passes.bind_memory import BindMemory
from omforge.recognition.config import ModelConfig
from omforge.testing import parse

DECODER = """<ir_version: 11, opset_import: ["" : 24]>
g (int64[batch, seq] input_ids, float[batch, 2, enc, 4] keys%s) => (float[batch, seq, 2] logits)
<float[4, 2] words = {0, 1, 2, 3, 4, 5, 6, 7}> { logits = Gather (words, input_ids) }"""
ENCODER = """<ir_version: 8, opset_import: ["" : 17]>
g (float[batch, 3000, 8] features) => (float[batch, %s, 8] last_hidden_state) {
    last_hidden_state = Identity (features) }"""


def passes(
    folder: Path,
    asked: int | None = None,
    config: ModelConfig | None = None,
    *,
    masked: bool = False,
):
    model = parse(DECODER % (", int64[batch, enc] encoder_attention_mask" if masked else ""))
    source = Source(folder / "decoder_with_past_model.onnx", folder)
    return memory_passes(model, asked, config, source)


def test_the_user_says_it(tmp_path: Path) -> None:
    assert passes(tmp_path, 7) == (BindMemory(7),)


def test_the_configuration_says_it(tmp_path: Path) -> None:
    assert passes(tmp_path, config=ModelConfig(memory_length=1500)) == (BindMemory(1500),)


def test_the_encoder_beside_says_it(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(ENCODER % 1500), tmp_path / "encoder_model.onnx")
    assert passes(tmp_path) == (BindMemory(1500),)
    assert passes(tmp_path, 1500) == (BindMemory(1500),)
    with pytest.raises(ir.InputError, match="its encoder makes 1500 states, and the decoder has"):
        passes(tmp_path, 700)
    assert passes(tmp_path, 700, masked=True) == (BindMemory(700),)


@pytest.mark.parametrize("length", ["enc", None])
def test_where_nobody_says_it_the_user_is_asked(tmp_path: Path, length: str | None) -> None:
    if length is not None:
        onnx.save(onnx.parser.parse_model(ENCODER % length), tmp_path / "encoder_model.onnx")
    with pytest.raises(ir.InputError) as caught:
        passes(tmp_path)
    assert str(caught.value) == (
        "the length of the encoder's states is not known: the decoder reads keys, of any length, "
        "and a bucket has one. Give it with --encoder-length N; shorter ones are padded under their mask, "
        "if it has one"
    )


def test_a_model_without_memory_has_no_length(tmp_path: Path) -> None:
    model = parse((DECODER % "").replace(", float[batch, 2, enc, 4] keys", ""))
    source = Source(tmp_path / "model.onnx", tmp_path)
    config = dataclasses.replace(ModelConfig(), memory_length=1500)
    assert memory_passes(model, None, config, source) == ()
    with pytest.raises(ir.InputError, match="no input of it is the states of an encoder"):
        memory_passes(model, 7, config, source)
