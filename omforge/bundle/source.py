"""Where an exported model lies: the graph, its config and its tokenizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from omforge import ir

_GOES_ON, _FIRST = "decoder_with_past_model.onnx", "decoder_model.onnx"
"""Of an export in two files, that which goes on from a past and that which reads whole texts."""

_PREFERRED = ("model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx")

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
"""What a bundle takes along from the export's folder, where it is there."""


@dataclass(frozen=True)
class Source:
    """An export: its .onnx file and the folder that holds config.json and the tokenizer.

    Attributes:
        graph: What goes on from earlier tokens, or does all.
        folder: Of config.json and the tokenizer.
        first: What reads a whole text and gives its cache, where that is a file of its own.
        carried: Names of files beside the graph, itself among them, that move into the bundle: of
            an export that was in memory.
    """

    graph: Path
    folder: Path
    first: Path | None = None
    carried: tuple[str, ...] = ()

    @property
    def recorded(self) -> str:
        """The graph's path as a manifest has it: absolute, or inside the bundle."""
        if self.carried:
            return self.graph.name
        return os.path.abspath(self.graph)  # a link stays one: its weights lie beside it

    def companions(self) -> list[Path]:
        """Tokenizer and config files that are there."""
        return [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()]


def find_source(given: str | Path) -> Source:
    """Find the graph of an export.

    Args:
        given: A .onnx file, or a folder that holds one.

    Raises:
        InputError: It does not exist, holds no graph, or several of which none is the obvious one.
    """
    path = Path(given)
    if path.is_file():
        # Optimum keeps graphs in `onnx/` below the config in some layouts.
        beside = path.parent
        above = beside.parent
        if not (beside / "config.json").is_file() and (above / "config.json").is_file():
            beside = above
        return Source(path, beside, _first(path))
    if not path.is_dir():
        raise ir.InputError(
            f"{path} does not exist", "", "Pass an export's folder or its .onnx file"
        )
    for folder in (path, path / "onnx"):
        graphs = sorted(folder.glob("*.onnx"))
        named = {graph.name: graph for graph in graphs}
        for name in _PREFERRED:
            if name in named:
                return Source(named[name], path, _first(named[name]))
        if len(graphs) == 1:
            return Source(graphs[0], path)
        if (pair := _two_parts(graphs, path)) is not None:
            return pair
        if graphs:
            raise ir.InputError(
                f"{folder} holds several graphs",
                ", ".join(graph.name for graph in graphs),
                "Pass one of these files",
            )
    raise ir.InputError(
        f"{path} holds no .onnx file", "", "Export the model to ONNX there, or pass the file"
    )


def _first(graph: Path) -> Path | None:
    """The file beside it that reads whole texts, of an export in two."""
    first = graph.parent / _FIRST
    return first if graph.name == _GOES_ON and first.is_file() else None


def _two_parts(graphs: list[Path], folder: Path) -> Source | None:
    """Two graphs under other names, if one reads caches of floats and both give the same."""
    if len(graphs) != 2:
        return None
    sides: list[tuple[bool, set[str]]] = []
    for file in graphs:
        graph = ir.read_message(file).graph
        held = {tensor.name for tensor in graph.initializer}
        reads = any(
            value.type.tensor_type.elem_type in _FLOATS
            and len(value.type.tensor_type.shape.dim) > 2
            for value in graph.input
            if value.name not in held
        )
        sides.append((reads, {value.name for value in graph.output}))
    if sides[0][0] == sides[1][0] or sides[0][1] != sides[1][1] or len(sides[0][1]) < 3:
        return None
    goes_on, first = graphs if sides[0][0] else reversed(graphs)
    return Source(goes_on, folder, first)
