"""A lowered graph, and what the GE graph made of it computes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from omforge import ir
from omforge.air import files
from omforge.air.graph import Air
from omforge.air.reference import reference
from omforge.lowering.emit import emit

Array = npt.NDArray[Any]


def emitted(model: ir.Model) -> tuple[Air, tuple[str, ...]]:
    """The GE graph, written and read again, and the names of its outputs."""
    made = emit(model, "graph", lambda _: None)
    names = tuple(value.name or "" for value in made.outputs)
    return files.decode(files.encode(made.air), "graph"), names


def computed(air: Air, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
    """What it gives, and what lies in the inputs that it writes."""
    twin = reference(air, outputs)
    session = onnxruntime.InferenceSession(
        twin.model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


def random(seed: int, shape: tuple[int, ...], dtype: str = "float16") -> Array:
    """Numbers of about 1; of integers small ones, of bools both."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if dtype.startswith("int"):
        return rng.integers(0, 3, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)
