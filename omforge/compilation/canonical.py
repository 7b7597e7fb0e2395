"""The canonical graph of an export in floats, as `compile` makes it ahead of quantisation."""

from __future__ import annotations

from pathlib import Path

from omforge import ir
from omforge.bundle import manifest as m
from omforge.ir.values import dims
from omforge.passes import make_pipeline
from omforge.passes.bind_choices import BindChoices
from omforge.passes.bind_memory import BindMemory
from omforge.passes.cache_in_place import CacheInPlace
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.passes.tabulate_rotary import TabulateRotary
from omforge.passes.text_positions import TextPositions
from omforge.recognition.attention.cross import memory_lengths
from omforge.recognition.interface import find_interface, memory_of
from omforge.rewriting.base import Pass
from omforge.rewriting.pipeline import Pipeline


def float_canonical(export: str | Path, made: m.Manifest) -> ir.Model:
    """Make the canonical graph of a bundle again, without quantisation.

    Args:
        export: The exported .onnx file that the bundle was made from.
        made: The bundle's manifest.

    Raises:
        InputError: The export cannot be read.
    """
    model = ir.load(export)
    serve: tuple[Pass, ...] = (
        LastTokenLogits(),
        FuseKvIo(made.kv.layout),
        TabulateRotary(made.context),
    )
    if made.kv.in_place:
        serve = (*serve, CacheInPlace())
    fuse = make_pipeline("fuse").passes
    Pipeline((TextPositions(), *make_pipeline("canonicalize").passes)).run(model)
    Pipeline((BindChoices(made.context), *fuse)).run(model)
    Pipeline((*_memory_passes(model, made), *serve)).run(model)
    return model


def _memory_passes(model: ir.Model, made: m.Manifest) -> tuple[Pass, ...]:
    """What gives an encoder's states the length that the bundle has."""
    interface = find_interface(model)
    lengths = memory_lengths(interface)
    shapes = {spec.name: spec.shape for spec in made.fixed}
    for value in memory_of(interface):
        for dim, size in zip(dims(value) or (), shapes.get(str(value.name), ()), strict=False):
            if str(dim) in lengths and isinstance(size, int):
                return (BindMemory(size),)
    return ()
