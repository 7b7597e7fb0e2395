"""A step: its bytes and products against what the model's sizes say, and its two times."""

from collections.abc import Callable
from pathlib import Path

import pytest

from omforge.compilation.options import CompileOptions
from omforge.lowering.devices import Device, device
from omforge.lowering.target import target
from omforge.planning.steps import Step, count_step
from omforge.planning.subject import open_subject

Exported = Callable[[str, str], Path]

# llama_gqa of the fixtures: H hidden, I of the MLP, N and K heads of D, V, L; C and S as chosen.
H, I, N, K, D, V, L = 64, 160, 4, 2, 16, 320, 2  # noqa: E741
C, S = 32, 8
LINEAR = L * (H * N * D + 2 * H * K * D + N * D * H + 3 * H * I)


def steps(path: Path, known: Device, front: str = "onnx") -> tuple[Step, Step]:
    soc = "Ascend910B4" if front == "air" else "Ascend310P3"
    subject = open_subject(path, CompileOptions(soc, context=C, prefill=(S,), front=front))
    prefill, decode = (count_step(graph, known) for graph in subject.lower(subject.options))
    return prefill, decode


def attention(new: int, keys: int) -> int:
    """Scores and sums of values: of each head, each query with each key."""
    return L * 2 * 2 * N * D * new * keys


@pytest.mark.parametrize("front", ["onnx", "air"])
def test_products_are_those_of_the_models_sizes(exported: Exported, front: str) -> None:
    prefill, decode = steps(exported("optimum", "llama_gqa"), Device("any"), front)
    # In GE graphs the new keys are in the cache when attention reads it.
    keys = (C, C) if front == "air" else (C + S, C + 1)
    # Of a prompt only the last token has logits.
    assert prefill.products.total == 2 * (S * LINEAR + H * V) + attention(S, keys[0])
    assert decode.products.total == 2 * (LINEAR + H * V) + attention(1, keys[1])


def test_a_decode_step_reads_all_weights_and_the_cache_once(exported: Exported) -> None:
    _, decode = steps(exported("optimum", "llama_gqa"), Device("any"))
    norms = (2 * L + 1) * H
    tables = 2 * D  # a row of each rotary table
    assert decode.moved.weights == pytest.approx(
        2 * (LINEAR + H * V + H + norms + tables), rel=0.01
    )
    assert decode.moved.cache == L * 2 * K * C * D * 2
    assert (decode.bound, decode.modelled) == (None, None)


def test_the_bound_is_the_longer_of_memory_and_cubes(exported: Exported) -> None:
    source = exported("optimum", "llama_gqa")
    slow_memory = Device("any", weights=1e6, others=1e6, half=1e15)
    _, decode = steps(source, slow_memory)
    assert decode.bound == pytest.approx((decode.moved.weights + decode.moved.cache) / 1e6)
    slow_cubes = Device("any", weights=1e15, others=1e15, half=1e6)
    _, decode = steps(source, slow_cubes)
    assert decode.bound == pytest.approx(decode.products.total / 1e6)


def test_the_model_goes_kernel_by_kernel_and_is_above_the_bound(exported: Exported) -> None:
    known = Device("any", weights=1e9, others=1e9, half=1e9, launch=1.0)
    prefill, decode = steps(exported("optimum", "llama_gqa"), known)
    for step in (prefill, decode):
        assert step.bound is not None
        assert step.modelled is not None
        assert step.modelled > step.bound + known.launch


def test_a_stacked_cache_is_in_the_bound_once(exported: Exported) -> None:
    options = CompileOptions("Ascend310P3", context=C, prefill=(S,), layout="stacked")
    subject = open_subject(exported("optimum", "llama_gqa"), options)
    known = device(target("Ascend310P3"))
    decode = count_step(subject.lower(subject.options)[-1], known)
    cache = L * 2 * K * C * D * 2
    assert decode.moved.cache > cache
    assert decode.bound == pytest.approx((decode.moved.weights + cache) / 204e9)
