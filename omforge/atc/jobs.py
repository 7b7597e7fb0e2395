"""How many compilations run at a time: as many as memory and processors allow."""

from __future__ import annotations

import os
from pathlib import Path

# Our estimate, no fact of CANN's: its sources name 2 GiB as the least to have free
# (hicann/ge:api/atc/main_impl.cc, kMinAvailableMem), and read all constants into memory, external
# ones too (compiler/graph/preprocess/graph_prepare.cc, ConvertFileConstToConst). They are held as
# read, as optimised, and as the file to be written.
_BASE_BYTES = 2 << 30
_COPIES_OF_WEIGHTS = 3
_SIMULATED_BASE_BYTES = 256 << 20
_SIMULATED_COPIES = 1


def jobs_that_fit(
    todo: int,
    weight_bytes: int,
    *,
    simulated: bool = False,
    available: int | None = None,
    processors: int | None = None,
) -> int:
    """Return how many compilations fit in memory at a time, at least one.

    One is reckoned with 2 GiB and three times its weights; the simulation with 256 MiB and its
    weights once. (An estimate: nobody states what atc needs.)

    Args:
        todo: How many there are.
        weight_bytes: Of one bucket.
        simulated: For the simulation.
        available: Bytes of memory; what the system says if None.
        processors: Their number; what the system says if None.
    """
    base = _SIMULATED_BASE_BYTES if simulated else _BASE_BYTES
    copies = _SIMULATED_COPIES if simulated else _COPIES_OF_WEIGHTS
    available = _available_bytes() if available is None else available
    processors = os.cpu_count() or 1 if processors is None else processors
    fit = available // (base + copies * weight_bytes) if available else 1
    return max(1, min(todo, processors, fit))


def _available_bytes() -> int:
    """Free memory; 0 where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 0
    line = next((item for item in text.splitlines() if item.startswith("MemAvailable:")), "")
    return int(line.split()[1]) << 10 if line else 0
