"""What a model writes lands in the caller's buffer, or is lost, or the call fails: as on a device.

Source: hicann/ge:runtime/v1/graph/load/model_manager/davinci_model.cc, where it handles RefData.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omforge.air.files import write_air
from omforge.air.graph import Air
from omforge.atc.sim.main import run
from omforge.runtime.acl_sim.codes import GE_INTERNAL_ERROR, RT_PARAM_INVALID
from omforge.runtime.acl_sim.rt import D2H
from tests.lowering.air_legality.graphs import Builder, edit
from tests.runtime.acl_sim.test_mdl import Loaded

SHAPE = (1, 1, 6, 8)
CACHE = np.arange(48, dtype=np.float32).reshape(SHAPE)
NEW = np.full((1, 1, 1, 8), -1, np.float32)
Compile = Callable[[Air], str]


def step() -> Air:
    """One slot of a cache is written, and its slots are summed up."""
    b = Builder()
    new, at = b.data("new", "float32", 1, 1, 1, 8), b.data("at", "int32", 1)
    cache = b.data("cache", "float32", *SHAPE, reference=True)
    operands = {"var": cache, "indices": at, "updates": new}
    written = b.op(
        "Scatter", "write", operands, {"var": ("float32", SHAPE)}, reduce="update", axis=-2
    )
    axes = b.const("axes", "int64", 1, values=(3,))
    total = {"y": ("float32", SHAPE[:3])}
    return b.air(b.op("ReduceSum", "sum", {"x": written, "axes": axes}, total, keep_dims=False))


def beside() -> Air:
    """Attention's mistake: it reads the cache, and not what the writer gives."""
    air = step()
    return edit(air, "sum", lambda op: dataclasses.replace(op, inputs=("cache:0", *op.inputs[1:])))


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compile:
    """`compiled(air)` is the path of its .om, whatever a strict atc says."""

    def compile_air(air: Air) -> str:
        monkeypatch.setenv("OMFORGE_ATC_SIM_STRICT", "0")
        monkeypatch.chdir(tmp_path)
        write_air(air, "step.air")
        flags = ["--framework=1", "--model=step.air", "--output=step", "--input_format=ND"]
        result = run([*flags, "--soc_version=Ascend310P3", "--precision_mode_v2=origin"])
        assert result.exit_status == 0, result.text
        return str(tmp_path / "step.om")

    return compile_air


def loaded(acl: Any, path: str, at: int = 2) -> Loaded:
    model = Loaded(acl, path)
    for index, array in enumerate((NEW, np.array([at], np.int32), CACHE)):
        model.write(index, array)
    return model


def cache_of(acl: Any, model: Loaded) -> np.ndarray:
    host, _ = acl.rt.malloc_host(CACHE.nbytes)
    address = acl.get_data_buffer_addr(model.inputs[2])
    assert acl.rt.memcpy(host, CACHE.nbytes, address, CACHE.nbytes, D2H) == 0
    data = acl.util.ptr_to_bytes(host, CACHE.nbytes)
    acl.rt.free_host(host)
    return np.frombuffer(data, np.float32).reshape(SHAPE)


def test_what_is_written_lands_in_the_callers_buffer(acl: Any, compiled: Compile) -> None:
    model = loaded(acl, compiled(step()))
    assert model.execute() == 0, acl.sim.last_error
    expected = CACHE.copy()
    expected[:, :, 2] = -1
    np.testing.assert_array_equal(cache_of(acl, model), expected)
    np.testing.assert_array_equal(model.read(0, (6,)), expected.sum(-1).reshape(6))


def test_two_models_share_a_cache(acl: Any, compiled: Compile) -> None:
    """The caller owns it, and gives both the same pointer."""
    path = compiled(step())
    first, second = loaded(acl, path, at=1), loaded(acl, path, at=4)
    acl.mdl.destroy_dataset(second.source)
    second.source = second.dataset([*second.inputs[:2], first.inputs[2]])
    assert (first.execute(), second.execute()) == (0, 0)
    changed = np.flatnonzero((cache_of(acl, first) != CACHE).any(-1))
    assert changed.tolist() == [1, 4]


def test_a_plain_data_keeps_what_the_caller_put_there(acl: Any, compiled: Compile) -> None:
    """The runtime copies it, and the copy is what is written: the update is lost."""
    air = edit(step(), "cache", lambda op: dataclasses.replace(op, type="Data"))
    model = loaded(acl, compiled(air))
    assert model.execute() == 0
    np.testing.assert_array_equal(cache_of(acl, model), CACHE)
    assert model.read(0, (6,))[2] == -8


def test_who_reads_beside_the_writer_reads_rubbish(acl: Any, compiled: Compile) -> None:
    model = loaded(acl, compiled(beside()))
    assert model.execute() == 0
    assert np.isnan(model.read(0, (6,))).all()
    assert (cache_of(acl, model)[:, :, 2] == -1).all()


@pytest.mark.parametrize(
    ("place", "size", "why"),
    [
        ("host", CACHE.nbytes, "is on the host"),
        ("smaller", CACHE.nbytes - 32, "has 192 bytes, its buffer 160"),
        ("odd", CACHE.nbytes, "is not aligned"),
    ],
)
def test_no_zero_copy_is_an_assertion(
    acl: Any, compiled: Compile, place: str, size: int, why: str
) -> None:
    model = loaded(acl, compiled(step()))
    address, _ = acl.rt.malloc_host(size) if place == "host" else acl.rt.malloc(size + 4, 0)
    buffer = acl.create_data_buffer(address + 4 * (place == "odd"), size)
    model.source = model.dataset([*model.inputs[:2], buffer])
    assert model.execute() == GE_INTERNAL_ERROR
    assert "input_index 2, op_name cache op_type RefData not support zero copy" in (
        acl.sim.last_error
    )
    assert why in acl.sim.last_error


def test_nothing_else_may_lie_where_a_model_writes(acl: Any, compiled: Compile) -> None:
    model = loaded(acl, compiled(step()))
    inside = acl.get_data_buffer_addr(model.inputs[2]) + 32
    model.source = model.dataset([acl.create_data_buffer(inside, 32), *model.inputs[1:]])
    assert model.execute() == RT_PARAM_INVALID
    assert "RefData cache" in acl.sim.last_error
