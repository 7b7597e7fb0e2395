"""The exported model with its exporter's own interface."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from omforge import ir
from omforge.bundle.manifest import Counter, Export, ExportCache, KvCache, TensorSpec
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir.errors import InputError
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.runtime.export import ExportModel
from omforge.testing import parse
from tests.passes.blocks import Block
from tests.passes.cache_layouts import ROWS, in_one_tensor, laid_out, slices, transposed
from tests.passes.test_grow_static_cache import SLOTS, attending
from tests.runtime.tiny import Tiny, reference_logits

TEXT = [3, 5, 7, 9, 11, 2, 4, 6, 8]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
Bundles = Callable[[Tiny], Bundle]


def model(bundle: Bundle, **changes: object) -> ExportModel:
    manifest = bundle.manifest
    return ExportModel(bundle.export, dataclasses.replace(manifest.export, **changes), manifest.kv)


@pytest.mark.parametrize("windows", [(None, None), (None, 4)])
def test_prefill_and_decode(tiny_bundle: Bundles, windows: tuple[int | None, int | None]):
    expected = reference_logits(TEXT, windows)
    with model(tiny_bundle(Tiny(windows=windows))) as exported:
        every = exported.prefill([TEXT[:5]], all_logits=True)
        assert every.shape == (1, 5, 32)
        np.testing.assert_allclose(every[0], expected[:5], **CLOSE)
        np.testing.assert_allclose(exported.prefill([TEXT[:5]])[0], expected[4], **CLOSE)
        found = [exported.decode([token])[0] for token in TEXT[5:]]
    np.testing.assert_allclose(found, expected[5:], **CLOSE)


@pytest.mark.parametrize("prompts", [[TEXT[:6], TEXT[2:4]], [TEXT[:4], TEXT[3:7]]])
def test_several_prompts(tiny_bundle: Bundles, prompts: list[list[int]]):
    with model(tiny_bundle(Tiny())) as exported:
        found = [exported.prefill(prompts), exported.decode([1, 2])]
    for row, prompt in enumerate(prompts):
        expected = reference_logits([*prompt, row + 1], (None, None))[-2:]
        np.testing.assert_allclose([step[row] for step in found], expected, **CLOSE)


@pytest.mark.parametrize("given", [{"pieces": True}, {"apart": True}])
@pytest.mark.parametrize("longest", [None, 1, 4])
def test_a_prompt_in_several_calls(tiny_bundle: Bundles, given: dict[str, bool], longest: int):
    expected = reference_logits(TEXT, (None, 4))
    with model(tiny_bundle(Tiny(windows=(None, 4))), longest_call=longest) as exported:
        found = exported.prefill([TEXT, TEXT[:6]], **given)
        np.testing.assert_allclose(found, [expected[-1], expected[5]], **CLOSE)
        every = exported.prefill([TEXT], all_logits=True, **given)
        np.testing.assert_allclose(every[0], expected, **CLOSE)


def test_another_model_is_refused(tiny_bundle: Bundles):
    bundle = tiny_bundle(Tiny())
    with pytest.raises(InputError, match=r"inputs lack tokens; they are ids, mask, pos, past.0"):
        model(bundle, input_ids="tokens")
    with pytest.raises(InputError, match="outputs lack scores; they are logits"):
        model(bundle, logits="scores")
    with pytest.raises(InputError, match="cannot be the reference: the manifest names no token"):
        model(bundle, input_ids=None)
    with pytest.raises(InputError, match="it has no KV cache"):
        model(bundle, past=())


def test_prompts_and_tokens_are_checked(tiny_bundle: Bundles):
    with model(tiny_bundle(Tiny())) as exported:
        with pytest.raises(InputError, match="a prompt is empty"):
            exported.prefill([[1], []])
        with pytest.raises(InputError, match=r"all logits: the prompts have lengths \[1, 2\]"):
            exported.prefill([[1], [1, 2]], all_logits=True)
        exported.prefill([[1], [2]])
        with pytest.raises(InputError, match=r"shape \[1\]: it takes one for each of the 2 rows"):
            exported.decode([1])


def test_an_export_with_a_whole_mask_and_logits_of_the_last_token(tmp_path: Path):
    edits = (
        ("int64[batch, total] attention_mask", "float[batch, 1, seq, total] attention_mask"),
        ("bias = Where (seen, zero, low)", "bias = Identity (attention_mask)"),
        ("float[batch, seq, 16] logits", "float[batch, 16] logits"),
        (
            "logits = MatMul (hidden, head)",
            "l = MatMul (hidden, head) m1 = Constant <value_int = -1>"
            " () logits = Gather <axis = 1> (l, m1)",
        ),
    )
    path = tmp_path / "model.onnx"
    ir.save(parse(Block(edits=edits).text()), path)
    export = Export(
        path=str(path), sha256="", input_ids="input_ids", attention_mask="attention_mask",
        position_ids="position_ids", past=(("past_key", "past_value"),),
        present=(("present_key", "present_value"),), logits="logits", extra=(), dtype="float32",
    )  # fmt: skip
    kv = KvCache("per-layer", 1, 2, 4, 4, 32, "float32")
    with ExportModel(path, export, kv) as exported:
        assert exported.prefill([TEXT[:5]]).shape == (1, 16)
        step_by_step = exported.decode([TEXT[5]])
        np.testing.assert_allclose(exported.prefill([TEXT[:6]]), step_by_step, **CLOSE)
        with pytest.raises(InputError, match="the export makes those of 1 of 5 tokens"):
            exported.prefill([TEXT[:5]], all_logits=True)


@pytest.mark.parametrize(
    ("text", "caches"),
    [
        (
            laid_out("P B K D", "BK P D"),
            (
                ExportCache("past_key", ("past", "batch", 2, 4), "present_key", "whole", 0),
                ExportCache("past_value", ("2*batch", "past", 4), "present_value", "whole", 1),
            ),
        ),
        (
            in_one_tensor(
                "batch, past, 4, 4",
                transposed(slices(2)),
                ROWS.format("k4", "v4"),
                1,
            ),
            (ExportCache("cache", ("batch", "past", 4, 4), "renewed", "rows", 1),),
        ),
    ],
)
def test_a_cache_of_another_layout(text: str, caches: tuple[ExportCache, ...], tmp_path: Path):
    """Token by token it gives what the whole text at once does, for rows of one length and not."""
    path = tmp_path / "model.onnx"
    ir.save(parse(text), path)
    export = Export(
        path=str(path), sha256="", input_ids="input_ids", attention_mask="attention_mask",
        position_ids="position_ids", past=(), present=(), logits="logits", extra=(),
        dtype="float32", caches=caches,
    )  # fmt: skip
    kv = KvCache("per-layer", 1, 2, 4, 4, 32, "float32")
    with ExportModel(path, export, kv) as exported:
        whole = exported.prefill([TEXT, TEXT[::-1]], all_logits=True)
        found = [exported.prefill([TEXT[:5], TEXT[::-1][:5]])]
        found += [exported.decode([TEXT[at], TEXT[::-1][at]]) for at in range(5, 9)]
        np.testing.assert_allclose(found, whole.swapaxes(0, 1)[4:], **CLOSE)


def test_a_cache_of_fixed_size_is_told_where_to_write(tmp_path: Path):
    path = tmp_path / "model.onnx"
    ir.save(parse(attending(1)), path)
    sizes = ("batch", SLOTS, 8)
    export = Export(
        path=str(path), sha256="", input_ids="input_ids", attention_mask=None, position_ids=None,
        past=(), present=(), logits="logits", extra=(), dtype="float32",
        caches=(
            ExportCache("past_key", sizes, "present_key", "whole", 1),
            ExportCache("past_value", sizes, "present_value", "whole", 1),
        ),
        counters=(
            Counter("cache_position", "slots"),
            Counter("write_indices", "start"),
            Counter("nonpad_kv_seqlen", "end"),
        ),
    )  # fmt: skip
    kv = KvCache("per-layer", 1, 2, 4, 4, SLOTS, "float32")
    with ExportModel(path, export, kv) as exported:
        whole = exported.prefill([TEXT[:6]], all_logits=True)[0]
        found = [exported.prefill([TEXT[:3]])[0]]
        found += [exported.decode([token])[0] for token in TEXT[3:6]]
        np.testing.assert_allclose(found, whole[2:], **CLOSE)
        # This one counts no positions: slots that are repeated are tokens that are repeated.
        exported.prefill([TEXT[:3]])
        exported.repeat_past(5)
        repeated = exported.decode([TEXT[3]])
        exported.prefill([[*TEXT[:3], *TEXT[:2]]])
        np.testing.assert_allclose(repeated, exported.decode([TEXT[3]]), **CLOSE)


@pytest.mark.parametrize("route", ["optimum", "dynamo", "hfexporter", "torchscript-op17"])
@pytest.mark.parametrize("family", ["llama_gqa", "mistral"])
def test_real_exports(exported: Callable[[str, str], Path], route: str, family: str):
    """Every exporter's interface: a cache that grows gives the logits of the whole text."""
    path = exported(route, family)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    keys = [i.name for i in session.get_inputs() if i.name.endswith((".key", ".keys"))]
    values = [i.name for i in session.get_inputs() if i.name.endswith((".value", ".values"))]
    past = tuple(zip(keys, values, strict=True))
    extra = tuple(
        TensorSpec(i.name, "int64", ())
        for i in session.get_inputs()
        if i.name.endswith("_sliding_window_tensor")
    )
    renamed = {"past_key_values": "present", "input.": "output."}

    def present(name: str) -> str:
        for old, new in renamed.items():
            if name.startswith(old):
                return name.replace(old, new, 1)
        raise AssertionError(name)

    export = Export(
        path=str(path),
        sha256="0" * 64,
        input_ids="input_ids",
        attention_mask="attention_mask",
        position_ids="position_ids",
        past=past,
        present=tuple((present(key), present(value)) for key, value in past),
        logits="logits",
        extra=extra,
        dtype="float32",
    )
    kv = KvCache("stacked", len(past), 2, 16, 16, capacity=32, dtype="float32")
    text = list(range(10, 24))
    with ExportModel(path, export, kv) as model:
        whole = model.prefill([text], all_logits=True)[0]
        found = [model.prefill([text[:9]])[0]]
        found += [model.decode([token])[0] for token in text[9:]]
        np.testing.assert_allclose(found, whole[8:], **CLOSE)
        several = model.prefill([text[:9], text[:4]])
        np.testing.assert_allclose(several, whole[[8, 3]], **CLOSE)


def test_segments_of_a_decoder_are_zeros_on_both_sides(tmp_path: Path) -> None:
    """token_type_ids beside a cache: the bundle's graphs keep them, and its export is fed them."""
    few = ", ".join(str(number / 10) for number in range(16))
    edits = (
        (
            "x = Gather (table, input_ids)",
            "x_a = Gather (table, input_ids) x_b = Gather (few, token_type_ids) x = Add (x_a, x_b)",
        ),
        (
            "int64[batch, seq] input_ids",
            "int64[batch, seq] input_ids, int64[batch, seq] token_type_ids",
        ),
        ("float[16, 8] table", f"float[2, 8] few = {{{few}}}, float[16, 8] table"),
    )
    ir.save(parse(Block(edits=edits).text()), tmp_path / "model.onnx")
    options = CompileOptions("Ascend310P3", context=12, prefill=(4,))
    made = compile_bundle(tmp_path / "model.onnx", tmp_path / "bundle", options).manifest
    assert [(spec.name, spec.rows) for spec in made.token_inputs] == [("token_type_ids", 2)]
    report = verify_bundle(Bundle.open(tmp_path / "bundle"), steps=2)
    assert report.ok, report.failures
