"""The canonical graph of an export in floats, as `compile` makes it ahead of quantisation."""

from __future__ import annotations

from pathlib import Path

from omforge import ir
from omforge.bundle import manifest as m
from omforge.passes import make_pipeline
from omforge.passes.bind_choices import BindChoices
from omforge.passes.cache_in_place import CacheInPlace
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.passes.tabulate_rotary import TabulateRotary
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
    make_pipeline("canonicalize").run(model)
    Pipeline((BindChoices(made.context), *fuse, *serve)).run(model)
    return model
