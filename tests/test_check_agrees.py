"""Our check and the simulated atc judge damaged models alike.

Each case damages a real export in a few random ways. What the simulator refuses, our check refuses
with the same code; what our check says atc refuses, the simulator refuses.
"""

import random
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from omforge.atc.sim.main import run
from omforge.lowering.legality import check_file
from omforge.lowering.target import target
from tests.exports import export

SOC = "Ascend310P3"
EXPORTS = [
    pytest.param(("optimum", "gpt2"), id="gpt2"),
    pytest.param(("torchscript-op17", "llama_gqa"), id="llama", marks=pytest.mark.deep),
]
PARSED_LATER = {"external-files"}

Damage = Callable[[onnx.ModelProto, random.Random], None]


def node(proto: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    return rng.choice(proto.graph.node)


def repeat_a_name(proto: onnx.ModelProto, rng: random.Random) -> None:
    node(proto, rng).name = node(proto, rng).name


def take_an_inputs_name(proto: onnx.ModelProto, rng: random.Random) -> None:
    node(proto, rng).name = rng.choice(proto.graph.input).name


def drop_a_name(proto: onnx.ModelProto, rng: random.Random) -> None:
    node(proto, rng).name = ""


def blank_an_input(proto: onnx.ModelProto, rng: random.Random) -> None:
    chosen = rng.choice([n for n in proto.graph.node if n.input])
    chosen.input[rng.randrange(len(chosen.input))] = ""


def append_a_blank_input(proto: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(
        [n for n in proto.graph.node if n.op_type in ("Gemm", "Gather", "Slice")]
    ).input.append("")


def blank_an_output(proto: onnx.ModelProto, rng: random.Random) -> None:
    kept = {value.name for value in proto.graph.output}
    chosen = rng.choice([n for n in proto.graph.node if n.output[0] not in kept])
    chosen.output.append("")


def read_from_nowhere(proto: onnx.ModelProto, rng: random.Random) -> None:
    chosen = rng.choice([n for n in proto.graph.node if n.input])
    chosen.input[0] = "nowhere"


def make_twice(proto: onnx.ModelProto, rng: random.Random) -> None:
    node(proto, rng).output[0] = node(proto, rng).output[0]


def unknown_operator(proto: onnx.ModelProto, rng: random.Random) -> None:
    node(proto, rng).op_type = rng.choice(["Gelu", "FooBar", "Loop", "LayerNormalisation"])


def other_domain(proto: onnx.ModelProto, rng: random.Random) -> None:
    node(proto, rng).domain = rng.choice(["npu", "com.microsoft", "ai.onnx", "NPU"])


def another_import(proto: onnx.ModelProto, rng: random.Random) -> None:
    proto.opset_import.add(domain=rng.choice(["npu", "com.microsoft", "ai.onnx"]), version=1)


def other_opset(proto: onnx.ModelProto, rng: random.Random) -> None:
    proto.opset_import[0].version = rng.choice([7, 8, 11, 16, 18, 19, 22])


def other_dtype(proto: onnx.ModelProto, rng: random.Random) -> None:
    kinds = [TensorProto.UINT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2FNUZ, 0, 99]
    rng.choice(proto.graph.initializer).data_type = rng.choice(kinds)


def no_data(proto: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(proto.graph.initializer).ClearField("raw_data")


def negative_dim(proto: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice([t for t in proto.graph.initializer if t.dims]).dims[0] *= -1


def outside(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(proto.graph.initializer)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": "w.bin", "offset": "0", "length": "4", "checksum": "abc", "note": "7"}
    for key in rng.sample(list(entries), rng.randint(1, 4)):
        tensor.external_data.add(key=key, value=entries[key])


def input_without_shape(proto: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(proto.graph.input).type.tensor_type.ClearField("shape")


def zero_dim(proto: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(proto.graph.input).type.tensor_type.shape.dim[0].dim_value = 0


def input_dtype(proto: onnx.ModelProto, rng: random.Random) -> None:
    chosen = rng.choice(proto.graph.input).type.tensor_type
    chosen.elem_type = rng.choice([0, TensorProto.UINT4, TensorProto.FLOAT4E2M1])


def drop_inputs(proto: onnx.ModelProto, rng: random.Random) -> None:
    del proto.graph.input[:]


def drop_outputs(proto: onnx.ModelProto, rng: random.Random) -> None:
    del proto.graph.output[:]


def repeat_an_output(proto: onnx.ModelProto, rng: random.Random) -> None:
    proto.graph.output.append(rng.choice(proto.graph.output))


def return_an_input(proto: onnx.ModelProto, rng: random.Random) -> None:
    proto.graph.output.append(rng.choice(proto.graph.input))


def return_nothing(proto: onnx.ModelProto, rng: random.Random) -> None:
    proto.graph.output.add(name="nowhere")


def respell_a_constant(proto: onnx.ModelProto, rng: random.Random) -> None:
    made = proto.graph.node.add(op_type="Constant", output=["respelled"], name="respelled_node")
    made.attribute.append(onnx.helper.make_attribute("value_ints", [1, 2]))


def attribute(proto: onnx.ModelProto, rng: random.Random) -> tuple[onnx.NodeProto, int]:
    chosen = rng.choice([n for n in proto.graph.node if n.attribute and n.op_type != "Constant"])
    return chosen, rng.randrange(len(chosen.attribute))


def drop_an_attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    chosen, index = attribute(proto, rng)
    del chosen.attribute[index]


def repeat_an_attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    chosen, index = attribute(proto, rng)
    chosen.attribute.append(chosen.attribute[index])


def untype_an_attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    chosen, index = attribute(proto, rng)
    chosen.attribute[index].ClearField("type")


def retype_an_attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    chosen, index = attribute(proto, rng)
    name = chosen.attribute[index].name
    del chosen.attribute[index]
    other = rng.choice([1.5, "text", [1.5], ["text"]])
    chosen.attribute.append(onnx.helper.make_attribute(name, other))


def other_number(proto: onnx.ModelProto, rng: random.Random) -> None:
    chosen, index = attribute(proto, rng)
    chosen.attribute[index].i += rng.choice([-3, 1, 7])


def weights(proto: onnx.ModelProto) -> list[TensorProto]:
    return [t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims)]


def shorten_a_weight(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice([t for t in weights(proto) if t.dims[0] % 2 == 0])
    tensor.dims[0] //= 2
    tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]


def halve_a_weights_dtype(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(weights(proto))
    tensor.data_type = TensorProto.FLOAT16
    tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]


def feed_a_shape(proto: onnx.ModelProto, rng: random.Random) -> None:
    chosen = rng.choice([n for n in proto.graph.node if n.op_type in ("Reshape", "Slice")])
    shape = onnx.helper.make_tensor_value_info("fed_shape", TensorProto.INT64, [2])
    proto.graph.input.append(shape)
    chosen.input[1] = "fed_shape"


def trap(op: str, **attributes: object) -> Damage:
    def damage(proto: onnx.ModelProto, rng: random.Random) -> None:
        source = proto.graph.input[-1].name
        made = onnx.helper.make_node(op, [source], [f"trap_{op}"], f"node_{op}", **attributes)
        proto.graph.node.append(made)

    damage.__name__ = f"trap_{op}"
    return damage


DAMAGES: list[Damage] = [
    *(repeat_a_name, take_an_inputs_name, drop_a_name, blank_an_input, append_a_blank_input),
    *(blank_an_output, read_from_nowhere, make_twice, unknown_operator, other_domain),
    *(another_import, other_opset, other_dtype, no_data, negative_dim, outside),
    *(input_without_shape, zero_dim, input_dtype, drop_inputs, drop_outputs, repeat_an_output),
    *(return_an_input, return_nothing, respell_a_constant, drop_an_attribute, repeat_an_attribute),
    *(untype_an_attribute, retype_an_attribute, other_number, shorten_a_weight, feed_a_shape),
    *(halve_a_weights_dtype, trap("Transpose"), trap("NonZero"), trap("Unique"), trap("LRN")),
    *(trap("Clip"), trap("Split", axis=-1), trap("Mod", fmod=1), trap("NPUQuantize", axis=1)),
    *(trap("AscendQuant", offset=0.0), trap("NPUMoeGatingTopKSoftmax"), trap("NPUDtypeCast")),
    *(trap("GatherND", batch_dims=1), trap("NPURmsNorm", epsilon=1e-5), trap("NPUSwish")),
]


def judge(proto: onnx.ModelProto, folder: Path) -> tuple[set[str], set[str], bool, str]:
    """The codes of our check and of the simulator, whether ours said anything, and theirs in words.

    Ours are atc's codes, or the rule's name where atc has none.
    """
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    found = check_file(path, target(SOC))
    ours = {error.atc or error.code for error in found.errors if error.code not in PARSED_LATER}
    flags = [f"--output={folder / 'out'}", f"--soc_version={SOC}", "--framework=5"]
    flags.append(f"--check_report={folder / 'check_result.json'}")
    result = run([f"--model={path}", *flags])
    theirs = set(result.codes) if result.exit_status else set[str]()
    if len(theirs) > 1:
        theirs.discard("E19999")  # with any other error: "Model parse to graph failed"
    return ours, theirs, bool(found.offences), result.text


def assert_agreed(proto: onnx.ModelProto, folder: Path, applied: list[str]) -> None:
    ours, theirs, said, text = judge(proto, folder)
    coded = {code for code in theirs if code.startswith("E") and code != "E13001"}
    assert coded <= ours, (applied, ours, text)
    assert not theirs or said, (applied, text)
    if any(code.startswith("E") for code in ours):
        assert theirs, (applied, ours)


@pytest.fixture(scope="module", params=EXPORTS)
def healthy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    proto = onnx.load(export(*request.param, tmp_path_factory.mktemp("export")))
    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.WhichOneof("value") != "dim_value":
                # A length and its sum with the past: numbers that fit each other.
                dim.dim_value = 8 if "+" in dim.dim_param or "total" in dim.dim_param else 4
    return proto.SerializeToString(deterministic=True)


def test_a_healthy_export_is_taken_by_both(healthy: bytes, tmp_path: Path) -> None:
    ours, theirs, _, _ = judge(onnx.ModelProto.FromString(healthy), tmp_path)
    assert ours == theirs == set()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_one_damage_is_judged_alike(healthy: bytes, damage: Damage, tmp_path: Path) -> None:
    proto = onnx.ModelProto.FromString(healthy)
    damage(proto, random.Random(damage.__name__))
    assert_agreed(proto, tmp_path, [damage.__name__])


@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(s, marks=pytest.mark.deep) for s in range(8, 160))]
)
def test_several_damages_are_judged_alike(healthy: bytes, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    proto = onnx.ModelProto.FromString(healthy)
    chosen = rng.sample(DAMAGES, rng.randint(1, 3))
    for damage in chosen:
        try:
            damage(proto, rng)
        except (IndexError, ValueError):
            continue  # an earlier damage took away what this one would break
    assert_agreed(proto, tmp_path, [damage.__name__ for damage in chosen])
