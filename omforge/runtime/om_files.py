"""What can be said of a bundle's .om files without a device: that they are its buckets'.

A hash says only that a file is the one that was entered; what an .om computes is known where it
runs. So `verify` reads each, compares what it takes and gives with its bucket, and says which were
not there to be looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

from omforge.ir.errors import InputError
from omforge.om import read_om
from omforge.om.fit import require_fit
from omforge.runtime.bundle import Bundle


@dataclass(frozen=True)
class OmChecked:
    """What was found.

    Attributes:
        fit: Buckets whose .om takes and gives what the manifest says.
        missing: Buckets without an .om in the manifest.
        stray: .om files in the folder that the manifest does not name.
        faults: Of the others, what is wrong.
    """

    fit: tuple[str, ...]
    missing: tuple[str, ...]
    stray: tuple[str, ...]
    faults: tuple[InputError, ...]

    def notes(self) -> list[str]:
        """What a report says of it; nothing where there are no .om files at all."""
        told: list[str] = []
        if self.fit:
            told.append(
                f"{len(self.fit)} .om files are those of their buckets by hash, inputs and outputs;"
                " what they compute was not run here"
            )
        if self.missing and (self.fit or self.faults):
            told.append(f"no .om yet: {', '.join(self.missing)}; `omforge build` makes it")
        if self.stray:
            told.append(
                f"not looked at, for the manifest does not name them: {', '.join(self.stray)}; "
                "`omforge build` makes and enters its own"
            )
        return told


def check_om(bundle: Bundle) -> OmChecked:
    """Read every .om of a bundle."""
    fit: list[str] = []
    missing: list[str] = []
    faults: list[InputError] = []
    for bucket in bundle.manifest.buckets:
        if bucket.om is None:
            missing.append(bucket.name)
            continue
        try:
            require_fit(read_om(bundle.folder / bucket.om), bucket, bundle.manifest.front)
        except InputError as error:
            faults.append(error)
        else:
            fit.append(bucket.name)
    named = bundle.manifest.files.keys()
    found = (file.relative_to(bundle.folder).as_posix() for file in bundle.folder.glob("om/*.om"))
    stray = sorted(name for name in found if name not in named)
    return OmChecked(tuple(fit), tuple(missing), tuple(stray), tuple(faults))
