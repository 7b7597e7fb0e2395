"""The canonical graph in floats is the one that `compile` writes."""

from collections.abc import Callable
from pathlib import Path

from omforge import ir
from omforge.compilation.canonical import float_canonical
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions

MODEL = Path(__file__).parent.parent.parent / "examples" / "models" / "docs-llama-onnx"


def test_memory_has_the_length_of_the_bundles(
    decoder: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Which an export leaves open."""
    source = decoder("dynamo", "bart")
    options = CompileOptions("Ascend910B4", context=32, prefill=(4,), encoder_length=6)
    made = compile_bundle(source, tmp_path / "bundle", options).manifest
    again = float_canonical(tmp_path / "bundle" / made.export.path, made)
    assert ir.to_text(again) == ir.to_text(ir.load(tmp_path / "bundle" / made.canonical))


def test_it_is_what_compile_writes(tmp_path: Path) -> None:
    options = CompileOptions("Ascend310P3", context=64, prefill=(16,))
    made = compile_bundle(MODEL, tmp_path / "bundle", options).manifest
    again = float_canonical(tmp_path / "bundle" / made.export.path, made)
    assert ir.to_text(again) == ir.to_text(ir.load(tmp_path / "bundle" / made.canonical))
