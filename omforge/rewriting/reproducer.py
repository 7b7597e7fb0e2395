"""Keep what makes a pass fail: the graph ahead of it, what watched it, and the command to run."""

from __future__ import annotations

import logging
import shlex
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.rewriting.base import Pass
from omforge.rewriting.instruments import CompareEach, Feeds, Instrument
from omforge.rewriting.padding import StepFeeds
from omforge.rewriting.pass_error import PassError
from omforge.rewriting.pass_run import PassRun
from omforge.rewriting.pipeline_text import parse_pipeline

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

KEPT_UNASKED = 1 << 30
"""Bytes of weights up to which a graph is kept though nobody asked for it."""


class Reproducer(Instrument):
    """Keep the model as it was before the pass that fails, and say how to run that pass alone.

    Args:
        folder: Where `before-<pass>.onnx` goes, with its weights and feeds beside it. Without it, a
            failure on purpose keeps nothing, and an unexpected one a new temporary folder.
        beside: The other instruments: those that the command needs to fail alike are kept too.
        registry: The passes that the command line knows.

    It stands ahead of them: it must have the graph when one of them fails.
    """

    def __init__(
        self,
        folder: Path | None = None,
        beside: Sequence[Instrument] = (),
        registry: Mapping[str, type[Pass]] = MappingProxyType({}),
    ) -> None:
        self._folder = folder
        self._beside = beside
        self._registry = registry
        self._before: ir.Model | None = None
        self._of: ir.Model | None = None

    def before(self, run: PassRun, model: ir.Model) -> None:
        """Keep the graph; tensors are shared with the model's."""
        if self._of is not model:
            self._of = model
            try:
                self._before = model.clone()
            except Exception as fault:  # onnx-ir copies no graph whose edges lead out of it
                log.info("the graph ahead of %s is not kept: %s", run.step, fault)
                self._before = None

    def after(self, run: PassRun, model: ir.Model) -> None:
        """A graph that nothing changed need not be copied again."""
        if run.changed:
            self._of = None

    def failed(self, run: PassRun, model: ir.Model, error: Exception) -> None:
        """Save it, and add the command to the error."""
        on_purpose = isinstance(error, ir.OmforgeError) and not isinstance(error, PassError)
        if self._before is None or (self._folder is None and on_purpose):
            return
        size = sum(tensor.nbytes for _, tensor in ir.all_tensors(self._before))
        if self._folder is None and size > KEPT_UNASKED:
            error.add_note(
                f"the graph ahead of it was not kept: it has {size >> 20} MiB of weights"
            )
            return
        folder = self._folder or Path(tempfile.mkdtemp(prefix="omforge-"))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"before-{run.name}.onnx"
        ir.save(self._before, path, external=f"before-{run.name}.data")
        text = _spelled(run.step, self._registry)
        if text is None:
            error.add_note(f"the graph ahead of it: {path}; this pass has options only of Python's")
            return
        words = ["omforge", "opt", str(path), "-p", text]
        for watch in self._beside:
            if isinstance(watch, CompareEach):
                words += ["--compare-each", "--feeds", str(folder / f"before-{run.name}.npz")]
                save_feeds(watch.feeds, Path(words[-1]))
        error.add_note(f"reproduce: {shlex.join(words)}")


def _spelled(step: Pass, registry: Mapping[str, type[Pass]]) -> str | None:
    """The text of which the command line makes the same pass; None if there is none.

    A pass that is not installed is spelled as where it stands, package.module:Class.
    """
    place = f"{type(step).__module__}:{type(step).__qualname__}"
    for text in (str(step), f"{place}{str(step).removeprefix(step.name)}"):
        try:
            if parse_pipeline(text, registry).passes == (step,):
                return text
        except ir.InputError:
            continue
    return None


# --- feeds ----------------------------------------------------------------------------------------


_PADDING = ":tokens"
"""Ends the name of what `StepFeeds` knows of its tokens."""


def save_feeds(feeds: Sequence[Feeds], file: Path) -> None:
    """Write several sets of inputs into one file."""
    arrays = {f"{n}/{name}": array for n, each in enumerate(feeds) for name, array in each.items()}
    for number, each in enumerate(feeds):
        if isinstance(each, StepFeeds):
            arrays[f"{number}{_PADDING}"] = each.tokens
    np.savez(file, allow_pickle=False, **arrays)


def saved_feeds(file: Path) -> Callable[[ir.Model], Sequence[Feeds]]:
    """Return what gives a model the inputs in a file that `save_feeds` wrote.

    Raises:
        InputError: It cannot be read; or, once there is a model, it is for another one.
    """
    sets: dict[str, dict[str, Array]] = {}
    tokens: dict[str, Array] = {}
    try:
        with np.load(file, allow_pickle=False) as stored:
            for key in stored.files:
                number, slash, name = str(key).partition("/")
                if slash:
                    sets.setdefault(number, {})[name] = stored[key]
                else:
                    tokens[key.removesuffix(_PADDING)] = stored[key]
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ir.InputError(
            f"cannot read feeds from {file}", str(error), "Give what --reproducer wrote"
        ) from error

    def given(model: ir.Model) -> Sequence[Feeds]:
        values = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
        names = {str(value.name) for value in values}
        for each in sets.values():
            if set(each) != names:
                raise ir.InputError(
                    f"{file} does not fit the model",
                    f"it feeds {', '.join(each)}, and the inputs are {', '.join(sorted(names))}",
                    "Give the feeds that were kept with this graph",
                )
        typed = {number: _typed(each, values) for number, each in sets.items()}
        return [
            StepFeeds(each, tokens[number][2:], *map(int, tokens[number][:2]))
            if number in tokens
            else each
            for number, each in typed.items()
        ]

    return given


def _typed(feeds: Mapping[str, Array], values: Sequence[ir.Value]) -> dict[str, Array]:
    """The inputs with their dtypes: files of numpy's forget bfloat16, which comes back as bytes."""
    found: dict[str, Array] = {}
    for value in values:
        array = feeds[str(value.name)]
        if value.dtype is not None and array.dtype.kind == "V":
            array = array.view(value.dtype.numpy())
        found[str(value.name)] = array
    return found
