"""A simulated device that is ready, and small models for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import parser

from omforge import ir
from omforge.om.simulated import simulate_om
from omforge.runtime.acl_sim import simulated_acl

ADD = """<ir_version: 9, opset_import: ["" : 16]>
g (float[B, S] x, float[B, "S + 2"] m) => (float[B, S] y, float[B, 1] z) {
    t = ReduceSum <keepdims = 1> (m, axes)
    y = Add (x, t)
    z = Identity (t)
}"""
STATIC = {"x": (2, 4), "m": (2, 6)}
GEARED = {"x": (2, -1), "m": (2, -1)}
GEARS = ((1, 3), (4, 6))


@pytest.fixture
def acl() -> Any:
    """A module that was initialised, with device 0 set."""
    module = simulated_acl()
    assert module.init() == 0
    assert module.rt.set_device(0) == 0
    return module


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    """`model()` is the path of a static .om, `model(gears=True)` of one with gears."""

    def build(*, gears: bool = False) -> str:
        path = tmp_path / ("geared.om" if gears else "static.om")
        text = ADD.replace("{\n", "<int64[1] axes = {1}> {\n", 1)
        graph = ir.from_proto(parser.parse_model(text))
        if gears:
            simulate_om(graph, path, shapes=GEARED, gears=GEARS)
        else:
            simulate_om(graph, path, shapes=STATIC)
        return str(path)

    return build
