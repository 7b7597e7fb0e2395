"""Where an exported model lies: the graph, its config and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omforge import ir

_PREFERRED = ("model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx")

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
    """An export: its .onnx file and the folder that holds config.json and the tokenizer."""

    graph: Path
    folder: Path

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
            return Source(path, above)
        return Source(path, beside)
    if not path.is_dir():
        raise ir.InputError(
            f"{path} does not exist", "", "Pass an export's folder or its .onnx file"
        )
    for folder in (path, path / "onnx"):
        graphs = sorted(folder.glob("*.onnx"))
        named = {graph.name: graph for graph in graphs}
        for name in _PREFERRED:
            if name in named:
                return Source(named[name], path)
        if len(graphs) == 1:
            return Source(graphs[0], path)
        if graphs:
            raise ir.InputError(
                f"{folder} holds several graphs",
                ", ".join(graph.name for graph in graphs),
                "Pass one of these files",
            )
    raise ir.InputError(
        f"{path} holds no .onnx file", "", "Export the model to ONNX there, or pass the file"
    )
