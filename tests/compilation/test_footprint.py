"""What a budget counts, and what is said of it."""

from types import SimpleNamespace
from typing import Any

import pytest

from omforge import ir
from omforge.bundle.manifest import FixedInput, LayerSizes, Quantization, TensorSpec
from omforge.compilation.footprint import (
    Footprint,
    budget_text,
    check_budget,
    memory_text,
    spare_bytes,
)
from omforge.lowering.target import target
from omforge.passes.convert_precision import ConvertPrecision
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.quantization.blockwise import Scheme
from omforge.quantization.linear import find_linears
from omforge.quantization.mixed import blank_weight
from tests.quantization.weights import weighted

TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[4, 64] x, float[64, 96] w) => (float[4, 96] y) { y = MatMul (x, w) }"""


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        (Scheme(4, 32), 64 * 96 // 2 + 2 * 96 * 2),
        (Scheme(4, 32, symmetric=False), 64 * 96 // 2 + 2 * 2 * 96 * 2),
        (Scheme(8, 0), 64 * 96 + 96 * 2),
    ],
)
def test_it_counts_what_is_lowered(scheme: Scheme, size: int) -> None:
    model = weighted(ir.from_onnx_text(TEXT), 1)
    (linear,) = find_linears(model)
    QuantizeWeights(given={"w": blank_weight(linear, scheme)}).run(model)
    footprint = Footprint((ConvertPrecision("fp16"),), target("Ascend910B4"), spare=1000)
    found = footprint(model) - 1000
    assert [node.op_type for node in model.graph] == ["NPUWeightQuantBatchMatmulV2"]
    assert found == size


def test_an_int8_cache_has_room_for_its_grids() -> None:
    alike = [LayerSizes(2, 16, 8)] * 2
    assert spare_bytes("fp16", (4, 4), alike) == 0
    assert spare_bytes("int8", (4, 4), alike) == 2 * (4 + 2) * 16 * 4 * 2
    wider = LayerSizes(1, 16, 64)
    assert spare_bytes("int8", (4, 8), [alike[0], wider]) == ((4 + 2) * 16 + (8 + 1) * 64) * 4 * 2


def test_a_graph_above_its_budget_is_refused() -> None:
    check_budget("", 10**9, "decode")
    check_budget("1KiB", 1024, "decode")
    with pytest.raises(ir.CheckError, match=r"decode are 1\.00 KiB \(1,025 bytes\).*--budget 1023"):
        check_budget("1KiB", 1025, "decode")


def test_the_text_says_kinds_and_bytes() -> None:
    assert budget_text(Quantization()) == ""
    made = Quantization(budget=2048, graph_bytes=1536, kinds=(("int4:g64", 3), ("fp16", 1)))
    assert budget_text(made) == (
        "3 int4:g64, 1 fp16; 1.50 KiB (1,536 bytes) of 2.00 KiB (2,048 bytes), 75.0%"
    )


STATES = FixedInput("encoder_hidden_states", "float16", ("batch", 1024, 512), "memory")
READ = TensorSpec("encoder_hidden_states", "float16", (2, 1024, 512))


@pytest.mark.parametrize(
    ("task", "fixed", "text"),
    [
        ("generate", (), "weights 300.00 MiB + cache of 4096 tokens 12.00 MiB = 312.00 MiB"),
        ("encode", (), "weights 300.00 MiB"),
        (
            "generate",
            (STATES,),
            "weights 300.00 MiB + cache of 4096 tokens 12.00 MiB + given inputs 2.00 MiB = 314.00 MiB",
        ),
    ],
)
def test_what_a_device_holds_is_one_line(
    task: str, fixed: tuple[FixedInput, ...], text: str
) -> None:
    made: Any = SimpleNamespace(
        task=task,
        quantization=Quantization(graph_bytes=300 << 20, cache_bytes=12 << 20),
        context=4096,
        fixed=fixed,
        buckets=(SimpleNamespace(inputs=(TensorSpec("input_ids", "int32", (2, 1)), READ)),),
    )
    assert memory_text(made) == text


def test_a_device_of_gigabytes_is_told_in_gigabytes() -> None:
    counted = Quantization(graph_bytes=3_669_988_352, cache_bytes=1 << 30)
    made: Any = SimpleNamespace(task="generate", quantization=counted, context=4096, fixed=())
    assert memory_text(made) == "weights 3.42 GiB + cache of 4096 tokens 1.00 GiB = 4.42 GiB"
