"""cross-attention: attention to an encoder's states, told by what its keys are made of."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.compilation.compare_feeds import make_feeds
from omforge.ir import numerics
from omforge.ir.values import attribute
from omforge.passes import make_pipeline
from omforge.passes.bind_memory import BindMemory
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.recognition.attention.cross import cross_attention, memory_lengths
from omforge.recognition.config import ModelConfig, read_config
from omforge.recognition.coverage import measure
from omforge.recognition.fixed_inputs import find_fixed
from omforge.recognition.interface import find_interface, memory_of
from omforge.rewriting.instruments import CompareEach, VerifyEach
from omforge.rewriting.pipeline import Pipeline
from omforge.testing import parse
from tests.passes.blocks import Block

Decoders = Callable[[str, str], Path]
BOTH = pytest.mark.parametrize(("route", "family"), [("optimum", "whisper"), ("dynamo", "bart")])


@pytest.fixture(scope="module")
def raised(decoder: Decoders) -> Callable[[str, str], ir.Model]:
    made: dict[tuple[str, str], ir.Model] = {}

    def model(route: str, family: str) -> ir.Model:
        if (route, family) not in made:
            found = ir.load(decoder(route, family))
            watch = (VerifyEach(), CompareEach(lambda m: make_feeds(m, longest=40)[-2:]))
            make_pipeline("raise").run(found, watch)
            made[route, family] = found
        return made[route, family].clone()

    return model


@BOTH
def test_each_layer_attends_twice_and_coverage_counts_both(
    raised: Callable[[str, str], ir.Model], decoder: Decoders, route: str, family: str
) -> None:
    """Raised under --compare-each, whose feeds give memory a length of its own."""
    model = raised(route, family)
    cross = cross_attention(model)
    assert len(cross) == 2
    assert all(len(node.inputs) < 5 for node in cross)
    found = measure(model, read_config(decoder(route, family).parent))
    assert found.complete
    assert (found.kinds["attention"].found, found.kinds["attention"].expected) == (4, 4)


def test_a_cross_attention_that_is_not_raised_is_missed(decoder: Decoders) -> None:
    model = ir.load(decoder("optimum", "whisper"))
    make_pipeline("canonicalize").run(model)
    found = measure(model, read_config(decoder("optimum", "whisper").parent))
    assert (found.kinds["attention"].found, found.kinds["attention"].expected) == (0, 4)


def test_a_decoder_without_a_cache_attends_twice_a_layer_too() -> None:
    """What reads a whole text of such a model: its keys of memory are made inside."""
    words = ", ".join(str(n / 10) for n in range(32))
    model = parse(f"""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids, float[batch, enc, 8] states) => (float[batch, seq, 4] logits)
    <float[4, 8] table = {{{words}}}, float[8, 4] head = {{{words}}}> {{
        x = Gather (table, input_ids)
        a = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (x, x, x)
        b = Attention <q_num_heads = 2, kv_num_heads = 2> (a, states, states)
        logits = MatMul (b, head) }}""")
    (cross,) = cross_attention(model)
    assert cross.inputs[1] is model.graph.inputs[1]
    found = measure(model, ModelConfig(layers=2, encoder_decoder=True)).kinds["attention"]
    assert (found.found, found.expected) == (2, 2)


def test_a_text_model_has_none() -> None:
    model = parse(Block().text())
    make_pipeline("raise").run(model)
    assert cross_attention(model) == []
    assert memory_of(find_interface(model)) == ()


def test_the_mask_of_memory_is_not_that_of_the_text(
    raised: Callable[[str, str], ir.Model],
) -> None:
    model = raised("dynamo", "bart")
    interface = find_interface(model)
    assert interface.attention_mask is None
    assert [value.name for value in memory_of(interface)] == [
        "encoder_attention_mask",
        *(f"past_key_values.{n}.encoder.{kind}" for n in (0, 1) for kind in ("key", "value")),
    ]


@BOTH
def test_bound_memory_is_a_fixed_input_of_the_cached_graph(
    raised: Callable[[str, str], ir.Model], route: str, family: str
) -> None:
    model = raised(route, family)
    assert memory_lengths(find_interface(model))
    (run,) = Pipeline((BindMemory(5),)).run(model, (VerifyEach(),)).passes
    assert run.rewrites == len(memory_of(find_interface(model)))
    assert not memory_lengths(find_interface(model))
    assert BindMemory(5).run(model) == 0
    reference = model.clone()
    Pipeline((FuseKvIo("per-layer"),)).run(model, (VerifyEach(),))
    fixed = [value.name for value in find_fixed(model, find_interface(model))]
    assert len([name for name in fixed if "encoder" in str(name)]) == len(fixed) >= 4
    # What the cached graph computes is what the export does, on a past of three and memory.
    random = np.random.default_rng(0)
    batch, past, new = 2, 3, 4
    heads = attribute(cross_attention(reference)[0], "kv_num_heads", 0)
    size = _size(reference)

    def drawn(length: int) -> np.ndarray:
        return random.standard_normal((batch, heads, length, size)).astype(np.float32)

    memory = {
        str(v.name): drawn(5)
        if v.dtype == ir.DataType.FLOAT
        else np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        for v in memory_of(find_interface(reference))
    }
    kinds = ("key", "value")
    caches = {f"past_key_values.{n}.{kind}": drawn(past) for n in (0, 1) for kind in kinds}
    tokens = random.integers(0, 320, (batch, new))
    exported = {
        name.replace(".key", ".decoder.key").replace(".value", ".decoder.value"): array
        for name, array in caches.items()
    }
    mask = np.where(np.tri(new, past + new, past, dtype=bool), 0, -30000).astype(np.float32)
    step = {
        "input_ids": tokens,
        "position_ids": np.tile(np.arange(past, past + new), (batch, 1)),
        "attention_mask": np.broadcast_to(mask, (batch, 1, new, past + new)),
    }
    expected = numerics.run(reference, {"input_ids": tokens, **exported, **memory})["logits"]
    actual = numerics.run(model, {**step, **caches, **memory})["logits"]
    assert numerics.within(actual, expected, numerics.tolerance("float32"))


def _size(model: ir.Model) -> int:
    memory = memory_of(find_interface(model))
    shapes = [v.shape for v in memory if v.shape is not None and len(v.shape) == 4]
    size = shapes[0][3]
    assert isinstance(size, int)
    return size


def test_a_memory_of_no_length_makes_no_sense(raised: Callable[[str, str], ir.Model]) -> None:
    with pytest.raises(ir.InputError, match="a memory of 0 positions"):
        BindMemory(0).run(raised("optimum", "whisper"))


def test_memory_that_is_handed_on_is_no_cache() -> None:
    """A merged export gives the encoder's keys back as they came."""
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids, float[batch, 2, past, 4] past, float[batch, 2, enc, 4] keys)
      => (float[batch, seq, 2] logits, float[batch, 2, t, 4] present, float[batch, 2, enc, 4] again)
    <float[4, 2] words = {0, 1, 2, 3, 4, 5, 6, 7}, float[1, 2, 1, 4] new = {1, 2, 3, 4, 5, 6, 7, 8}> {
        logits = Gather (words, input_ids)
        present = Concat <axis = 2> (past, new)
        again = Identity (keys) }""")
    interface = find_interface(model)
    assert [(past.name, present.name) for past, present in interface.caches] == [
        ("past", "present")
    ]
    assert [value.name for value in memory_of(interface)] == ["keys"]
