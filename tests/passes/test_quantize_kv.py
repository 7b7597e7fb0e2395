"""quantize-kv: the cache as int8, near the exact one whatever the chunks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from omforge import ir
from omforge.ir.numerics import run, tolerance, within
from omforge.ir.values import dims
from omforge.ir.verify import check
from omforge.passes import make_pipeline, quantize_kv
from omforge.passes.convert_precision import ConvertPrecision
from omforge.passes.fuse_kv_io import FuseKvIo, mask_name
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.passes.quantize_kv import QuantizeKv
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.recognition.attention import sinks
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import insert

Exported = Callable[[str, str], Path]
Array = npt.NDArray[Any]
Layout = Literal["stacked", "per-layer"]

CAPACITY, HEADS, SIZE, TOKENS = 16, 2, 16, 9
LAYOUTS = ["stacked", "per-layer"]
# Every token several times: scales of channels need more of a text than scales of heads.
TEXT = [*np.random.default_rng(3).integers(3, 300, (24, 40)), np.arange(3, 30)]
IDS = np.random.default_rng(0).integers(3, 300, (1, TOKENS))


def fused(path: Path, layout: Layout, *, raised: bool = True, bits: int = 0) -> ir.Model:
    """The graph of fuse-kv-io, its attention raised or not, its weights integers or not."""
    model = ir.load(path)
    if raised:
        make_pipeline("raise").run(model)
    else:
        make_pipeline("canonicalize").run(model)
        for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
            old = softmax.outputs[0]
            with Builder(model) as op:
                # Heads that are weighed behind their softmax: `Attention` has no place for it.
                new = op.Mul(old, np.linspace(0.5, 1.5, 4, dtype=np.float32).reshape(4, 1, 1))
                insert(op, old.consumers()[0], by="test")
            for node in old.consumers():
                if node is not new.producer():
                    node.replace_input_with(list(node.inputs).index(old), new)
    if bits:
        QuantizeWeights(8).run(model)
    LastTokenLogits().run(model)
    FuseKvIo(layout).run(model)
    return model


def steps(
    model: ir.Model, chunks: list[int], window: int | None = None, first: int = 0
) -> tuple[Array, dict]:
    """The logits of all tokens, fed in chunks, and the caches afterwards.

    Args:
        model: The graph.
        chunks: Tokens of each step.
        window: Of the mask.
        first: Position of the first token.
    """
    caches: dict[str, Array] = {
        value.name or "": np.zeros(
            [d if isinstance(d, int) else CAPACITY for d in _static(value)], value.dtype.numpy()
        )
        for value in model.graph.inputs
        if (value.name or "").startswith("past")
    }
    logits: list[Array] = []
    past = 0
    for count in chunks:
        key = np.concatenate([np.arange(CAPACITY), past + np.arange(count)])
        valid = np.concatenate([np.arange(CAPACITY) < past, np.ones(count, bool)])
        query = past + np.arange(count)[:, None]
        seen = (key <= query) & valid
        if window is not None:
            seen &= query - key < window
        feeds: dict[str, Array] = {
            "input_ids": IDS[:, past : past + count],
            "position_ids": first + past + np.arange(count)[None],
            "logits_index": np.arange(count),
            mask_name(window): np.where(seen, 0, -30000).astype(np.float32)[None, None],
            **caches,
        }
        wanted = {value.name: value.dtype.numpy() for value in model.graph.inputs}
        given = {name: feeds[name].astype(wanted[name]) for name in wanted if name in feeds}
        found = run(model, given)
        logits.append(found["logits"])
        for name, cache in caches.items():
            new = found[name.replace("past_key_values", "present", 1) if "." in name else PRESENT]
            cache[:, :, past : past + count] = new
        past += count
    return np.concatenate(logits), caches


PRESENT = "present_key_values"


def _static(value: ir.Value) -> list[int | str]:
    """The shape of a cache for a batch of one."""
    first, *rest = dims(value) or ()
    count = (
        first
        if isinstance(first, int)
        else int(str(first).partition("*batch")[0] or 1)
        if ("*" in str(first))
        else 1
    )
    return [count, *rest]  # type: ignore[list-item]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize(
    ("route", "family"), [("optimum", "llama_gqa"), ("dynamo", "mistral"), ("hfexporter", "qwen2")]
)
def test_logits_are_near_in_any_chunks(
    exported: Exported, route: str, family: str, layout: Layout, granularity: Literal["head"]
) -> None:
    window = 8 if family == "mistral" else None
    path = exported(route, family)
    model = fused(path, layout)
    exact, _ = steps(model, [TOKENS], window)
    assert QuantizeKv(granularity, tokens=TEXT).run(model) == 4
    check(model)
    whole, cache = steps(model, [TOKENS], window)
    parts, other = steps(model, [4, 1, 1, 3], window)
    # A step's own keys are exact in it, so a prompt in one chunk loses nothing.
    assert within(whole, exact, tolerance("float32"))
    assert 0 < np.abs(parts - exact).max() < 0.05 * np.abs(exact).max()
    for name, array in cache.items():
        assert array.dtype == np.int8
        assert np.abs(array[:, :, :TOKENS]).max() > 30, "the scales use the integers' range"
        off = np.abs(other[name].astype(int) - array)
        assert off.max() <= 6
        if ".0." in name:  # nothing lies ahead of the first layer's keys that was rounded
            assert off.max() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_nothing_touches_the_whole_cache_but_a_cast(
    exported: Exported, layout: Layout, granularity: Literal["head"]
) -> None:
    model = fused(exported("optimum", "llama_gqa"), layout)
    QuantizeKv(granularity, tokens=TEXT).run(model)
    pasts = [v for v in model.graph.inputs if (v.name or "").startswith("past")]
    if layout == "stacked":
        (split,) = (n for n in pasts[0].consumers() if n.op_type == "Split")
        pasts = list(split.outputs)
    assert len(pasts) == 4
    for past in pasts:
        (cast,) = (node for node in past.consumers() if node.op_type != "Shape")
        assert cast.op_type == "Cast"
        assert {node.op_type for node in cast.outputs[0].consumers()} == {"Attention"}


def shifted(model: ir.Model, softcap: float = 0.0) -> ir.Model:
    """Keys and values far from zero, as projections with biases make them; changes the graph."""
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        for index in (1, 2):
            old = node.inputs[index]
            assert old is not None
            uses = old.uses()
            offsets = np.random.default_rng(index).normal(0, 4, HEADS * SIZE).astype(np.float32)
            with Builder(model) as op:
                new = op.Add(old, offsets)
                insert(op, uses[0].node, by="test")
            for use in uses:
                use.node.replace_input_with(use.idx, new)
        if softcap:
            node.attributes["softcap"] = ir.AttrFloat32("softcap", softcap)
    return model


def relative_error(model: ir.Model, exact: Array, first: int = 0) -> float:
    """||y' - y|| / ||y|| of the logits; each token is a step, and reads integers."""
    found, _ = steps(model, [1] * TOKENS, first=first)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def sunk(path: Path, layout: Layout) -> ir.Model:
    """The graph of fuse-kv-io, where a number of each head takes a share of its softmax."""
    model = ir.load(path)
    make_pipeline("canonicalize").run(model)
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        scores, old = softmax.inputs[0], softmax.outputs[0]
        assert scores is not None
        uses = old.uses()
        with Builder(model) as op:
            numbers = op.constant(np.array([0.5, 2.0, 1.0, -0.5], np.float32).reshape(1, 4, 1, 1))
            rows = op.Concat(op.Shape(scores, start=0, end=3), [1], axis=0)
            joined = op.Concat(scores, op.Expand(numbers, rows), axis=-1)
            new = op.Slice(op.Softmax(joined, axis=-1), [0], [-1], [3])
            insert(op, softmax, by="test")
        for node, index in uses:
            node.replace_input_with(index, new)
    make_pipeline("remove-no-ops").run(model)
    make_pipeline("fuse").run(model)
    LastTokenLogits().run(model)
    FuseKvIo(layout).run(model)
    blocks = [node for node in model.graph if node.op_type == "Attention"]
    assert blocks
    assert all(sinks.find(block) is not None for block in blocks)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_the_row_of_a_sink_stays_zeros(
    exported: Exported, layout: Layout, granularity: Literal["head"]
) -> None:
    """A middle of the keys or values would give it a score and a value."""
    model = sunk(exported("optimum", "llama_gqa"), layout)
    exact, _ = steps(model, [TOKENS])
    assert QuantizeKv(granularity, tokens=TEXT).run(model) == 4
    check(model)
    whole, cache = steps(model, [TOKENS])
    parts, _ = steps(model, [4, 1, 1, 3])
    assert within(whole, exact, tolerance("float32"))
    assert 0 < np.abs(parts - exact).max() < 0.05 * np.abs(exact).max()
    assert all(array.dtype == np.int8 and array[:, :, :TOKENS].any() for array in cache.values())


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_what_is_far_from_zero_has_a_middle(exported: Exported, softcap: float) -> None:
    path = exported("optimum", "llama_gqa")
    exact, _ = steps(shifted(fused(path, "per-layer"), softcap), [TOKENS])
    errors: dict[str, float] = {}
    for granularity in ("head", "channel"):
        model = shifted(fused(path, "per-layer"), softcap)
        QuantizeKv(granularity, tokens=TEXT).run(model)
        errors[granularity] = relative_error(model, exact)
    # Under a softcap only the values have one: a score then matters beyond its distance to others.
    assert errors["channel"] < errors["head"] / (1 if softcap else 2)
    assert errors["channel"] < 0.04


def test_the_text_is_spread_over_all_positions(exported: Exported) -> None:
    path = exported("optimum", "llama_gqa")
    plain = fused(path, "per-layer")
    exact, _ = steps(plain, [TOKENS], first=3000)
    errors: list[float] = []
    for positions in (0, 4096):
        model = fused(path, "per-layer")
        QuantizeKv(positions=positions, tokens=TEXT).run(model)
        errors.append(relative_error(model, exact, first=3000))
    at_start, spread = errors
    assert spread < 0.03
    assert spread < at_start / 2


def test_a_short_text_is_spread_as_well(exported: Exported) -> None:
    model = fused(exported("optimum", "llama_gqa"), "per-layer")
    exact, _ = steps(model, [TOKENS], first=3000)
    QuantizeKv(positions=4096, tokens=[np.arange(3, 300)]).run(model)
    assert relative_error(model, exact, first=3000) < 0.03


def test_pieces_of_one_length_are_rows_of_one_batch(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fused(exported("optimum", "llama_gqa"), "per-layer")
    together = quantize_kv._feeds(model, TEXT, 4096)
    monkeypatch.setattr(quantize_kv, "_TOKENS", 0)
    apart = quantize_kv._feeds(model, TEXT, 4096)
    assert [feeds["input_ids"].shape for feeds in together] == [(24, 40), (1, 27)]
    assert len(apart) == len(TEXT)
    for name in ("input_ids", "position_ids"):
        rows = [row for feeds in together for row in feeds[name]]
        for row, feeds in zip(rows, apart, strict=True):
            np.testing.assert_array_equal(row, feeds[name][0])
    assert apart[-1]["position_ids"][0, -1] == 4095


def test_a_graph_of_one_row_takes_one_piece_at_a_time(exported: Exported) -> None:
    model = fused(exported("optimum", "llama_gqa"), "per-layer")
    next(v for v in model.graph.inputs if v.name == "input_ids").shape = ir.Shape([1, "seq"])
    feeds = quantize_kv._feeds(model, TEXT, 4096)
    assert [given["input_ids"].shape[0] for given in feeds] == [1] * len(TEXT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_of_half_precision_too(exported: Exported, layout: Layout) -> None:
    model = fused(exported("optimum", "llama_gqa"), layout)
    ConvertPrecision("fp16").run(model)
    exact, _ = steps(model, [TOKENS])
    QuantizeKv(tokens=TEXT).run(model)
    check(model)
    parts, _ = steps(model, [5, 1, 3])
    assert 0 < np.abs(parts - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_attention_that_was_not_raised_reads_int8_too(
    exported: Exported, layout: Layout, granularity: Literal["head"]
) -> None:
    model = fused(exported("optimum", "llama_gqa"), layout, raised=False)
    exact, _ = steps(model, [TOKENS])
    QuantizeKv(granularity, tokens=TEXT).run(model)
    check(model)
    whole, _ = steps(model, [TOKENS])
    parts, _ = steps(model, [5, 1, 3])
    assert within(whole, exact, tolerance("float32"))
    assert 0 < np.abs(parts - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_interface_keeps_names_and_shapes(exported: Exported, layout: Layout) -> None:
    model = fused(exported("optimum", "llama_gqa"), layout)

    def interface() -> dict[str, str]:
        values = [*model.graph.inputs, *model.graph.outputs]
        return {v.name or "": f"{v.dtype} {dims(v)}" for v in values}

    before = interface()
    QuantizeKv(tokens=TEXT).run(model)
    expected = {
        name: text.replace("FLOAT", "INT8") if name.startswith(("past", "present")) else text
        for name, text in before.items()
    }
    assert interface() == expected


def test_it_goes_with_quantised_weights(exported: Exported) -> None:
    model = fused(exported("optimum", "llama_gqa"), "per-layer", bits=8)
    exact, _ = steps(model, [TOKENS])
    QuantizeKv(tokens=TEXT).run(model)
    got, _ = steps(model, [4, 1, 1, 3])
    assert 0 < np.abs(got - exact).max() < 0.05 * np.abs(exact).max()


def test_a_calibration_file_does_as_well(exported: Exported, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", TEXT[0][None])
    one, two = (fused(exported("optimum", "llama_gqa"), "stacked") for _ in range(2))
    QuantizeKv(calibration=str(tmp_path / "t.npy")).run(one)
    QuantizeKv(tokens=TEXT[:1]).run(two)
    assert ir.to_text(one) == ir.to_text(two)


def test_without_a_text_it_says_what_it_needs(exported: Exported) -> None:
    model = fused(exported("optimum", "llama_gqa"), "stacked")
    with pytest.raises(ir.InputError, match="needs a calibration text") as caught:
        QuantizeKv().run(model)
    assert "--calibration FILE" in str(caught.value)


def test_twice_is_refused(exported: Exported) -> None:
    model = fused(exported("optimum", "llama_gqa"), "stacked")
    QuantizeKv(tokens=TEXT).run(model)
    with pytest.raises(ir.InputError, match="int8 already"):
        QuantizeKv(tokens=TEXT).run(model)


def test_a_graph_without_a_cache_is_refused(exported: Exported) -> None:
    model = ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
        g (float[2] x) => (float[2] y) { y = Relu (x) }""")
    with pytest.raises(ir.InputError, match="there is no cache to quantise"):
        QuantizeKv(tokens=TEXT).run(model)
