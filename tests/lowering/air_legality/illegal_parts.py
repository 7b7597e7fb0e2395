"""What deliberately illegal GE graphs are made of: a legal one, and what is done to it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from omforge.air import graph
from omforge.air.ge_types import byte_size
from omforge.air.graph import Air, Attr, Desc, Op, Tensor
from omforge.air.names import naming
from omforge.lowering.air_legality import check_air
from omforge.lowering.legality.subject import Offence
from omforge.lowering.target import target
from tests.lowering.air_legality.graphs import added, edit, told
from tests.lowering.air_legality.legal import GRAPHS


@dataclass(frozen=True)
class Illegal:
    """One graph: the rule it breaks, how, the legal graph and the change, and the SoC."""

    rule: str
    how: str
    legal: str
    change: Callable[[Air], Air]
    soc: str = "Ascend310P3"
    gears: bool = False

    def offences(self, folder: Path) -> list[Offence]:
        air = self.change(GRAPHS[self.legal]())
        path = folder / "graph.air"
        return check_air(air, target(self.soc), path=path, size=1, gears=self.gears)


def twice(air: Air, name: str) -> Air:
    return added(air, air.graph.by_name()[name])


def controlled(air: Air, name: str, by: str) -> Air:
    return edit(air, name, lambda op: replace(op, inputs=(*op.inputs, f"{by}:-1")))


def data_index(air: Air, name: str, index: int) -> Air:
    return told(air, name, index=index)


def stored_value(desc: Desc, data: bytes) -> Attr:
    return graph.tensor(Tensor(desc, data))


def reader(name: str, item: str, dtype: str, *shape: int) -> Op:
    """Something that reads a tensor beside what reads it already."""
    desc = Desc("x", dtype, shape)
    return Op(name, "Relu", (item,), (desc,), (replace(desc, name="y"),), naming(("x",), ("y",)))


CACHE = Desc("y", "float16", (1, 4, 256, 64))


def constant(air: Air, name: str) -> Air:
    """Make a constant of an input."""

    def change(op: Op) -> Op:
        (desc,) = op.output_desc
        value = stored_value(desc, bytes(byte_size(desc.dtype, desc.shape or ())))
        return Op(name, "Const", (), (), (desc,), {"value": value, **naming((), ("y",))})

    return edit(air, name, change)


def view(of: str) -> Op:
    return Op(
        "view",
        "Identity",
        (f"{of}:0",),
        (replace(CACHE, name="x"),),
        (CACHE,),
        naming(("x",), ("y",)),
    )


def writer_behind(name: str) -> Op:
    first = GRAPHS["decode"]().graph.by_name()[name]
    return replace(first, name="second", inputs=(f"{name}:0", *first.inputs[1:]))


def spare_input(dtype: str, *shape: int) -> Op:
    """One more input, which nothing reads."""
    desc = Desc("y", dtype, shape)
    told_of = {"index": graph.integer(1), **naming(("x",), ("y",))}
    return Op("spare", "Data", (), (replace(desc, name="x"),), (desc,), told_of)
