"""`check --why`: what an export, a bundle or a canonical graph is lowered to, and the bytes moved."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from omforge import ir
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.compilation.why import GraphWhy, amount, explain_choices
from omforge.lowering.facts import Facts, Seen
from omforge.lowering.target import target

Exported = Callable[[str, str], Path]
SOC = target("Ascend310P3")


def groups(graph: GraphWhy, op: str) -> list[str]:
    return [group.form for group in graph.groups if group.op == op]


def test_an_export_is_explained_for_a_prefill_and_a_decode_step(exported: Exported) -> None:
    prefill, decode = explain_choices(exported("optimum", "llama_gqa"), SOC)
    assert prefill.name.startswith("prefill_s128")
    assert groups(decode, "Attention") == ["MatMul-Softmax"]
    assert set(groups(decode, "RMSNormalization")) == {"NPURmsNorm"}
    assert decode.total[0].total < prefill.total[0].total
    # What is decided and what stays as it is add up to all that the graph moves.
    found = sum(group.traffic[0].total for group in decode.groups)
    assert found == pytest.approx(decode.total[0].total, rel=0.02)


def test_the_layouts_are_weighed_by_what_they_copy(exported: Exported, tmp_path: Path) -> None:
    source = exported("optimum", "llama_gqa")
    for layout in ("stacked", "per-layer"):
        options = CompileOptions("Ascend310P3", context=32, prefill=(8,), layout=layout)
        compile_bundle(source, tmp_path / layout, options)
    cache = 2 * 2 * 2 * 32 * 16 * 2  # layers, key and value, heads, capacity, size, bytes
    (*_, stacked), (*_, apart) = (
        explain_choices(tmp_path / layout, SOC) for layout in ("stacked", "per-layer")
    )
    assert (stacked.layout, apart.layout) == ("stacked", "per-layer")
    assert stacked.cache_copied == pytest.approx(2 * cache, rel=0.01)  # read and written
    assert apart.cache_copied == 0
    assert apart.stacked_copies == 2 * cache
    # The cache is read once, by the products; the copy is what the stacked layout moves on top.
    assert apart.total[0].cache == cache
    text = "\n".join(apart.lines())
    assert "cache -> per-layer: copies 0 B" in text
    assert "not stacked (16.0 KiB): the Split into layers copies the whole cache" in text


def test_gears_are_counted_one_by_one(exported: Exported, tmp_path: Path) -> None:
    options = CompileOptions("Ascend310P3", context=32, prefill=(8,), gears=True)
    compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    (graph,) = explain_choices(tmp_path / "b", SOC)
    assert graph.gears == (1, 8)
    assert graph.total[0].total < graph.total[1].total
    assert " at 1, " in next(iter(graph.lines()))


def test_refusals_say_why_and_what_they_would_move(exported: Exported) -> None:
    _, decode = explain_choices(exported("optimum", "llama_gqa"), SOC)
    lines = "\n".join(decode.lines())
    assert "RotaryEmbedding x4 -> decomposed" in lines
    assert "not NPURotaryMul: heads of 16, must be 128" in lines
    assert "not NPUPromptFlashAttention: 310p does not have it" in lines
    assert "[parser: hicann/" in lines
    data = decode.to_json()
    (attention,) = (item for item in data["operators"] if item["op"] == "Attention")
    assert attention["bytes"][0]["total"] > 0
    assert {item["form"] for item in attention["refused"]} >= {"NPUIncreFlashAttention"}


def test_a_form_can_be_tried(exported: Exported) -> None:
    prefill, _ = explain_choices(
        exported("optimum", "llama_gqa"), SOC, forms={"Attention": "NPUScaledMaskedSoftmax"}
    )
    assert groups(prefill, "Attention") == ["NPUScaledMaskedSoftmax"]


def test_a_static_graph_is_taken_as_it_is(text_to_file: Callable[[str], Path]) -> None:
    path = text_to_file("g (float16[2,8] x) => (float16[2,8] y) { y = Swish (x) }")
    (graph,) = explain_choices(path, SOC)
    assert (graph.layout, groups(graph, "Swish")) == ("", ["decomposed"])


@pytest.fixture
def text_to_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 24]> {text}')
        ir.save(model, tmp_path / "g.onnx")
        return tmp_path / "g.onnx"

    return write


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")]
)
def test_amounts_are_readable(count: int, text: str) -> None:
    assert amount(count) == text


def test_a_step_takes_at_least_what_its_bytes_take_at_the_bandwidths_seen(
    text_to_file: Callable[[str], Path],
) -> None:
    """Weights at 1 GB/s, the rest at half of that, and a launch of 5 microseconds."""
    weight = "<float16[64, 64] w = {" + ", ".join(["1"] * 4096) + "}>"
    file = text_to_file(
        f"g (float16[1, 64] x) => (float16[1, 64] y) {weight} {{ y = MatMul (x, w) }}"
    )
    figures = {"bandwidth-of-weights": 1.0, "bandwidth-of-cache": 0.5, "launch": 5.0}
    seen = {name: Seen("measured", "", figure) for name, figure in figures.items()}
    facts = Facts(SOC.soc_version, "", seen)
    (graph,) = explain_choices(file, dataclasses.replace(SOC, facts=facts))
    assert graph.total[0].weights == 8192
    (moved,) = graph.total
    other = moved.cache + moved.read + moved.written
    assert graph.seconds == pytest.approx(moved.weights / 1e9 + other / 0.5e9 + 5e-6)
    assert any(line.startswith("  at least ") for line in graph.lines())
    (unseen,) = explain_choices(file, SOC)
    assert unseen.seconds is None
    assert not any("at least" in line for line in unseen.lines())
