"""The exporter's own interface, as the manifest says it."""

from pathlib import Path

from omforge import ir
from omforge.bundle.manifest import Export, ExportCache
from omforge.bundle.source import find_source
from omforge.compilation.export_interface import export_interface
from omforge.passes import make_pipeline
from omforge.testing import parse
from tests.passes.blocks import Block
from tests.passes.cache_layouts import laid_out


def described(text: str, folder: Path) -> Export:
    ir.save(parse(text), folder / "model.onnx")
    source = find_source(folder)
    model = ir.load(source.graph)
    make_pipeline("raise").run(model)
    return export_interface(model, source)


def test_a_canonical_cache_is_named_layer_by_layer(tmp_path: Path) -> None:
    found = described(Block(rotary="half").text(), tmp_path)
    assert (found.input_ids, found.position_ids) == ("input_ids", "position_ids")
    assert (found.attention_mask, found.logits) == ("attention_mask", "logits")
    assert found.past == (("past_key", "past_value"),)
    assert found.present == (("present_key", "present_value"),)
    assert (found.caches, found.dtype) == ((), "float32")
    assert found.path == str(tmp_path / "model.onnx")


def test_a_cache_of_another_layout_is_described_as_it_was(tmp_path: Path) -> None:
    """Its values were canonical: the list is whole all the same."""
    found = described(laid_out("BK D P", "B K P D"), tmp_path)
    assert (found.past, found.present) == ((), ())
    assert sorted(found.caches, key=lambda cache: cache.input) == [
        ExportCache("past_key", ("2*batch", 4, "past"), "present_key", "whole", 2),
        ExportCache("past_value", ("batch", 2, "past", 4), "present_value", "whole", 2),
    ]
