"""The CPU twin of a GE graph: what is written in place, and in which order it is read."""

import dataclasses

import numpy as np
import onnxruntime
import pytest

from omforge.air.files import read_air
from omforge.air.graph import Air, Desc, Op
from omforge.air.names import naming
from omforge.air.reference import reference
from omforge.ir.errors import InputError
from tests.air.test_files import SAMPLES


def run(air: Air) -> dict[str, np.ndarray]:
    """Seeded inputs, slot 5 written."""
    session = onnxruntime.InferenceSession(
        reference(air).model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    feeds = {
        value.name: np.array([5])
        if value.name == "pos"
        else rng.standard_normal(value.shape).astype(np.float16)
        for value in session.get_inputs()
    }
    names = [value.name for value in session.get_outputs()]
    return feeds | dict(zip(names, session.run(names, feeds), strict=True))


def changed(name: str, *inputs: str, controls: tuple[str, ...] = ()) -> Air:
    """The decode sample, an operator reading something else."""
    air = read_air(SAMPLES[0])
    ops = [
        dataclasses.replace(
            op, inputs=(*inputs, *op.inputs[len(inputs) :], *(f"{c}:-1" for c in controls))
        )
        if op.name == name
        else op
        for op in air.graph.ops
    ]
    return dataclasses.replace(air, graphs=(dataclasses.replace(air.graph, ops=tuple(ops)),))


def test_a_step_attends_to_what_it_writes() -> None:
    found = run(read_air(SAMPLES[0]))
    for name, new in (("k_cache", "k_new"), ("v_cache", "v_new")):
        assert np.array_equal(found[f"{name}.written"][:, :, 5:6], found[new])
        assert np.array_equal(found[f"{name}.written"][:, :, 6:], found[name][:, :, 6:])
    q, k, v = found["q"], found["k_cache.written"], found["v_cache.written"]
    scores = q.astype(np.float64) @ k.astype(np.float64).transpose(0, 1, 3, 2) * 0.125
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert found["output_0_attn_0"] == pytest.approx(shares @ v, abs=2e-3)


def test_who_reads_beside_the_writer_reads_rubbish() -> None:
    """GE orders nothing between a writer and other readers of a RefData."""
    assert np.isnan(run(changed("attn", "q:0", "k_cache:0"))["output_0_attn_0"]).all()


def test_a_control_edge_orders_it() -> None:
    right = run(read_air(SAMPLES[0]))["output_0_attn_0"]
    behind = run(changed("attn", "q:0", "k_cache:0", controls=("write_k",)))
    assert np.array_equal(behind["output_0_attn_0"], right)
    ahead = changed("attn", "q:0", "k_cache:0")
    ops = [
        dataclasses.replace(op, inputs=(*op.inputs, "attn:-1")) if op.name == "write_k" else op
        for op in ahead.graph.ops
    ]
    graph = dataclasses.replace(ahead.graph, ops=tuple(ops))
    found = run(dataclasses.replace(ahead, graphs=(graph,)))["output_0_attn_0"]
    assert not np.isnan(found).any()
    assert not np.array_equal(found, right)


def test_two_writers_of_one_cache() -> None:
    air = read_air(SAMPLES[0])
    writer = air.graph.by_name()["write_k"]
    second = dataclasses.replace(writer, name="again", inputs=("write_k:0", "pos:0", "q:0"))
    ops = [*air.graph.ops[:-1], second, air.graph.ops[-1]]
    graph = dataclasses.replace(air.graph, ops=tuple(ops))
    found = run(dataclasses.replace(air, graphs=(graph,)))
    assert np.array_equal(found["k_cache.written"][:, :, 5:6], found["q"])


def add(air: Air, op: Op) -> Air:
    ops = (*air.graph.ops[:-1], op, air.graph.ops[-1])
    return dataclasses.replace(air, graphs=(dataclasses.replace(air.graph, ops=ops),))


@pytest.mark.parametrize(
    ("op", "why"),
    [
        (Op("x", "Conv2D", ("q:0",)), "has no body"),
        (Op("x", "NoSuchOp", ("q:0",)), "has no body"),
        (Op("x", "Neg", ("nobody:0",)), "reads nobody, which is not there"),
        (Op("x", "Neg", ("x:0",)), "in a circle"),
        (Op("q", "Neg", ("pos:0",)), "two operators have one name"),
        (Op("x", "FileConstant", (), (), (Desc("y"),), naming([], ["y"])), "no shape"),
    ],
)
def test_what_cannot_be_run_is_named(op: Op, why: str) -> None:
    with pytest.raises(InputError, match=r"has no reference|is damaged") as error:
        reference(add(read_air(SAMPLES[0]), op))
    assert why in str(error.value)
