"""What a SoC can do in a second at most: bytes from its memory, products of its cubes.

`data/devices.tsv` has what is public, each row with its source; a figure that no source gives is
open. What `omforge probe` measured goes before it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from omforge.lowering.facts import Facts
from omforge.lowering.legalize.products import Products
from omforge.lowering.legalize.traffic import Traffic
from omforge.lowering.tables import table_rows
from omforge.lowering.target import Target

_NONE = Products()


@dataclass(frozen=True)
class Device:
    """What a SoC can do, as far as it is known; None for what is not.

    Attributes:
        soc: Its name.
        weights: Bytes of weights a second.
        others: Bytes a second of all else.
        half: Operations a second in float16 and bfloat16; a product and its sum are two.
        int8: The same of int8.
        launch: Seconds that a run takes which moves next to nothing; 0 where that is not known.
        sources: Where these are from.
        measured: Whether the bandwidths were seen on a device.
    """

    soc: str
    weights: float | None = None
    others: float | None = None
    half: float | None = None
    int8: float | None = None
    launch: float = 0.0
    sources: tuple[str, ...] = ()
    measured: bool = False

    def __str__(self) -> str:
        figures = [
            f"{self.weights / 1e9:g} GB/s" if self.weights else "",
            f"{self.others / 1e9:g} GB/s of all but weights"
            if self.others and self.others != self.weights
            else "",
            f"{self.half / 1e12:g} TFLOPS float16" if self.half else "",
            f"{self.int8 / 1e12:g} TOPS int8" if self.int8 else "",
            f"{self.launch * 1e6:g} us a launch" if self.launch else "",
        ]
        return f"{self.soc}: {', '.join(filter(None, figures)) or 'no figure is public'}"

    @property
    def open(self) -> tuple[str, ...]:
        """What is not known of it, and hence in no figure."""
        missing = ("memory bandwidth",) * (self.weights is None or self.others is None)
        return (*missing, *("peak of products",) * (self.half is None))

    def seconds(self, moved: Traffic, products: Products = _NONE) -> float | None:
        """What bytes and products take at least; None where the bandwidth is not known.

        They may be taken at the same time, so that it is the longer of both.
        """
        if self.weights is None or self.others is None:
            return None
        memory = moved.weights / self.weights
        memory += (moved.cache + moved.read + moved.written) / self.others
        return max(memory, self._computing(products))

    def _computing(self, products: Products) -> float:
        # Products of float32 take longer, by what no source says: it is a bound all the same.
        taken = 0.0 if self.half is None else products.floats / self.half
        return taken + (0.0 if self.int8 is None else products.int8 / self.int8)


def device(target: Target) -> Device:
    """Return what is known of a target, by what was seen on it and by the table."""
    public = _table().get(target.soc_version, Device(target.soc_version))
    return _seen(public, target.facts)


def _seen(public: Device, facts: Facts) -> Device:
    weights = facts.figure("bandwidth-of-weights")
    others = facts.figure("bandwidth-of-cache")
    launch = facts.figure("launch") or 0.0
    if not weights or not others:
        return public
    where = f"bandwidths as measured: {facts}"
    return Device(
        public.soc,
        weights * 1e9,
        others * 1e9,
        public.half,
        public.int8,
        launch / 1e6,
        (where, *public.sources),
        measured=True,
    )


@functools.lru_cache(maxsize=1)
def _table() -> Mapping[str, Device]:
    return {row["soc"]: _row(row) for row in table_rows("devices.tsv")}


def _row(row: Mapping[str, str]) -> Device:
    def figure(column: str, unit: float) -> float | None:
        return float(row[column]) * unit if row[column] else None

    bandwidth = figure("bandwidth", 1e9)
    return Device(
        row["soc"],
        bandwidth,
        bandwidth,
        figure("float16", 1e12),
        figure("int8", 1e12),
        sources=(f"{row['note']} [{row['source']}]",),
    )
