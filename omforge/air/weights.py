"""Whether the weights of a GE graph are where it says: in one file of the bundle, whole."""

from __future__ import annotations

from pathlib import Path

from omforge.air.files import read_air
from omforge.ir.errors import InputError
from omforge.ir.paths import path_fault


def check_weights(folder: Path, file: str) -> frozenset[str]:
    """Check a bundle's GE graph; return the files that it takes weights from.

    Raises:
        InputError: It cannot be read, or a weight is outside the bundle, or not whole.
    """
    names: set[str] = set()
    for op in read_air(folder / file).graph.ops:
        if op.type != "FileConstant":
            continue
        location, offset, length = (
            None if found is None else found.value
            for found in map(op.attributes.get, ("location", "offset", "length"))
        )
        if not (isinstance(location, str) and isinstance(offset, int) and isinstance(length, int)):
            raise _wrong(folder / file, op.name, "it does not say where it is")
        fault = path_fault(location)
        if fault:
            raise _wrong(folder / file, op.name, f"{location!r} {fault}")
        weights = folder / location
        size = weights.stat().st_size if weights.is_file() else -1
        if offset < 0 or length < 0 or offset + length > size:
            at = f"it is in bytes {offset} to {offset + length} of {location}"
            raise _wrong(folder / file, op.name, f"{at}, which has {max(size, 0)}")
        names.add(location)
    return frozenset(names)


def _wrong(file: Path, name: str, why: str) -> InputError:
    return InputError(f"the weight {name} of {file} is missing", why, "Build the bundle again")
