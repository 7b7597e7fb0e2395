"""Where `opt` writes its model: a file, a link's target, a device or pipe, stdout, or nowhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.weights import write_error
from omforge.recognition.feeds import weight_bytes

STDOUT = "-"

EXTERNAL_ABOVE = 1 << 30
"""Bytes of weights from which `opt` writes them beside the graph: protobuf ends at twice that."""


def wants_external(model: ir.Model) -> bool:
    """Whether weights are written beside the graph: they were, or they are large."""
    loaded = (tensor for _, tensor in ir.all_tensors(model))
    external = any(isinstance(tensor, ir.ExternalTensor) for tensor in loaded)
    return external or weight_bytes(model) > EXTERNAL_ABOVE


class ModelOutput:
    """The place that -o names. A file is replaced whole or not at all; what is no file is written.

    Args:
        path: What -o says; None writes nothing.

    Raises:
        InputError: It is a folder, or in none.
    """

    def __init__(self, path: Path | None) -> None:
        self._given = path
        self._to_stdout = path is not None and (str(path) == STDOUT or _is_stdout(path))
        # A link stays, and what it leads to is replaced.
        self._file = None if path is None or self._to_stdout else Path(os.path.realpath(path))
        if self._file is not None:
            if self._file.is_dir():
                raise InputError(f"cannot write {path}", "it is a folder", "Name a .onnx file")
            if not self._file.parent.is_dir():
                raise InputError(
                    f"cannot write {path}", "its folder does not exist", "Create the folder"
                )

    @contextlib.contextmanager
    def alone(self, *, as_json: bool) -> Generator[None]:
        """Send text to stderr for the length of a block where the model goes to stdout.

        Raises:
            InputError: JSON is to go to stdout as well.
        """
        if not self._to_stdout:
            yield
            return
        if as_json:
            raise InputError(
                "--json and the model would both go to stdout",
                f"-o is {self._given}",
                "Write the model to a file",
            )
        self._stdout: Any = sys.stdout.buffer
        with contextlib.redirect_stdout(sys.stderr):
            yield

    def write(self, model: ir.Model, *, external: bool) -> None:
        """Write the model.

        Args:
            model: The model.
            external: Put the weights into a file beside it; a stream gets all in one.

        Raises:
            OmforgeError: It cannot be written.
        """
        if self._to_stdout:
            self._copy(model, self._stdout)
        elif self._file is None:
            return
        elif self._file.exists() and not self._file.is_file():
            try:
                with self._file.open("wb") as stream:
                    self._copy(model, stream)
            except BrokenPipeError:
                raise
            except OSError as error:
                raise write_error(self._file, error) from error
        else:
            name = f"{self._file.name}.data"
            ir.save(model, self._file, external=name if external else None)

    def _copy(self, model: ir.Model, stream: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="omforge-") as folder:
            whole = Path(folder) / "model.onnx"
            ir.save(model, whole)
            with whole.open("rb") as content:
                shutil.copyfileobj(content, stream)
            stream.flush()


def _is_stdout(path: Path) -> bool:
    """Whether a path is this process's stdout: /dev/stdout, whatever that leads to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # no such file, or stdout is none
        return False
