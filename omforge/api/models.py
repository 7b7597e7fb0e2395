"""A model, however it is given: a path, a message, an onnx-ir model, what torch exported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

import onnx

from omforge import ir
from omforge.bundle.source import find_source
from omforge.ir.read_check import check_loaded, check_message

ModelLike: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model | object"
"""A path to an .onnx file or an export's folder, an `onnx.ModelProto`, an `onnx_ir.Model`, or what
has one as its `model`, such as a `torch.onnx.ONNXProgram`."""

_IN_MEMORY = Path("the model")


def load(source: ModelLike) -> ir.Model:
    """Return the model of any source, checked; its weights stay where they are.

    A path's external weights are mapped when they are read. An `onnx_ir.Model`, and that of an
    `ONNXProgram`, is returned as it is and not copied; a `ModelProto` is read anew.

    Args:
        source: A path to an .onnx file or an export's folder, an `onnx.ModelProto`, an
            `onnx_ir.Model`, or a `torch.onnx.ONNXProgram`.

    Raises:
        InputError: It is none of these, cannot be read, or is no valid graph.
    """
    if isinstance(source, str | os.PathLike):
        return ir.load(find_source(Path(os.fspath(source))).graph)
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, onnx.ModelProto):
        check_message(_IN_MEMORY, source)
        model = ir.from_proto(source)
        check_loaded(_IN_MEMORY, model)
        return model
    inner = getattr(source, "model", None)
    if isinstance(inner, ir.Model):
        return inner
    raise ir.InputError(
        f"a {type(source).__name__} is no model",
        "taken are a path, an onnx.ModelProto, an onnx_ir.Model and a torch.onnx.ONNXProgram",
        "Export the model first, or pass the file",
    )


def folder_of(source: ModelLike) -> Path | None:
    """Return where config.json and the tokenizer of a path are; None for what is in memory."""
    if isinstance(source, str | os.PathLike):
        return find_source(Path(os.fspath(source))).folder
    return None
