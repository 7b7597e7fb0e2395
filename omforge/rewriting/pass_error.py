"""What becomes of an exception that a pass did not mean: one error that names pass and place."""

from __future__ import annotations

import os
import traceback

from omforge.ir.errors import OmforgeError
from omforge.rewriting.base import Pass

SITE = "at "
"""Begins the note by which a pass says where in the graph it was."""


class PassError(OmforgeError):
    """A pass has a fault; its `__cause__` is what it raised, with the traceback."""


def meant(error: Exception) -> bool:
    """Whether an exception says by itself what is wrong: ours, and the system's."""
    return isinstance(error, OmforgeError | OSError | MemoryError)


def pass_error(step: Pass, error: Exception) -> PassError:
    """Return how to tell of an exception, with the notes that it has."""
    kind = type(step)
    ours = kind.__module__.partition(".")[0] == "omforge"
    notes = getattr(error, "__notes__", ())
    sites = [note for note in notes if note.startswith(SITE)]
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    owner = "omforge" if ours else f"{kind.__module__}:{kind.__qualname__}"
    where = "".join(f"{site}; " for site in sites[:1])
    found = PassError(
        f"the pass {step.name} failed with {said}",
        f"{where}that is a fault of {owner}, at {place(error, None if ours else kind.__module__)}",
        "Report the command, with what it says under --verbose"
        if ours
        else "Mend the pass, or tell who made it; --verbose shows how it came about",
    )
    for note in notes:
        if note not in sites[:1]:
            found.add_note(note)
    return found


def place(error: BaseException, module: str | None = None) -> str:
    """Return the innermost function of a module, and where it is; else the innermost of ours."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_globals.get("__name__") == module:
            return f"{os.path.basename(frame.f_code.co_filename)}:{line} in {frame.f_code.co_name}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}omforge{os.sep}" in frame.filename] or frames
    if not own:
        return "an unknown place"
    file = own[-1].filename.rpartition(f"{os.sep}omforge{os.sep}")[2]
    return f"{file}:{own[-1].lineno} in {own[-1].name}"
