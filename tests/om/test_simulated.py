"""Simulated .om files: the interface is GE's, the payload runs on ONNX Runtime."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from omforge import ir
from omforge.ir.errors import InputError
from omforge.om import GEAR_INPUT, OmTensor, model_def, read_om, write_om
from omforge.om.layout import MODEL_DEF
from omforge.om.payload import read_payload
from omforge.om.simulated import simulate_om
from tests.om.samples import sample

GRAPH = """
    <ir_version: 9, opset_import: ["" : 16]>
    g (float16[B, S, 32] x, float16[B, "S + 4"] mask) => (float16[B, S, 32] y, float16[B, "S + 4"] z)
    {
        n, rstd = NPURmsNorm (x, gamma)
        y = MatMul (n, w)
        z = Identity (mask)
    }
"""


def graph() -> ir.Model:
    model = parser.parse_model(GRAPH)
    random = np.random.default_rng(1)
    for name, shape in (("gamma", (32,)), ("w", (32, 32))):
        array = random.standard_normal(shape).astype(np.float16)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.from_proto(model)


STATIC = {"x": (1, 2, 32), "mask": (1, 6)}
GEARED = {"x": (1, -1, 32), "mask": (1, -1)}


def test_a_static_model(tmp_path):
    simulate_om(graph(), tmp_path / "a.om", shapes=STATIC)
    om = read_om(tmp_path / "a.om")
    assert om.simulated
    (model,) = om.models
    assert model.inputs == (
        OmTensor("x", "float16", (1, 2, 32), 128),
        OmTensor("mask", "float16", (1, 6), 12),
    )
    assert model.outputs == (
        OmTensor("MatMul_y:0:y", "float16", (1, 2, 32), 128),
        OmTensor("Identity_z:0:z", "float16", (1, 6), 12),
    )
    assert model.gears == ()


def test_a_model_with_gears_has_their_input_and_the_largest_sizes(tmp_path):
    simulate_om(graph(), tmp_path / "a.om", shapes=GEARED, gears=[(1, 5), (8, 12)])
    (model,) = read_om(tmp_path / "a.om").models
    assert model.inputs == (
        OmTensor("x", "float16", (1, -1, 32), 512),
        OmTensor("mask", "float16", (1, -1), 24),
        OmTensor(GEAR_INPUT, "int32", (2,), 8),
    )
    assert [tensor.shape for tensor in model.outputs] == [(1, 8, 32), (1, 12)]
    assert model.gears == ((1, 5), (8, 12))
    assert model.input_order == ("x", "mask")
    assert model.output_shapes == ((0, 0, 1, 1, 32), (1, 0, 1, 8, 32), (0, 1, 1, 5), (1, 1, 1, 12))


def test_the_payload_runs_and_its_weights_are_beside_it(tmp_path):
    import onnxruntime

    simulate_om(graph(), tmp_path / "a.om", shapes=STATIC)
    simulate_om(graph(), tmp_path / "b.om", shapes=STATIC | {"x": (1, 2, 32)})
    payload = read_payload(read_om(tmp_path / "a.om"))
    (weight,) = (tmp_path / "weight").iterdir()  # `w`, shared by both; `gamma` is small
    assert payload.weights == (f"weight/{weight.name}",)
    assert weight.read_bytes() == graph().graph.initializers["w"].const_value.tobytes()
    assert (payload.weight_size, payload.work_size) == (2 * 32 + 2 * 1024, 140)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tmp_path)
    )
    session = onnxruntime.InferenceSession(bytes(payload.graphs[0]), options)
    x = np.full((1, 2, 32), 3, np.float16)
    y, _ = session.run(None, {"x": x, "mask": np.zeros((1, 6), np.float16)})
    tensors = {n: v.const_value.numpy() for n, v in graph().graph.initializers.items()}
    expected = tensors["gamma"].astype(np.float32) @ tensors["w"].astype(np.float32)
    np.testing.assert_allclose(y[0, 0], expected, atol=0.02)


def test_weights_inside(tmp_path):
    simulate_om(graph(), tmp_path / "a.om", shapes=STATIC, external_weight=0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.om"]
    payload = read_payload(read_om(tmp_path / "a.om"))
    assert payload.weights == ()
    onnx.checker.check_model(onnx.load_from_string(bytes(payload.graphs[0])))


@pytest.mark.parametrize("external_weight", [0, 1])
def test_a_graph_whose_weights_are_in_another_file(tmp_path, external_weight):
    ir.save(graph(), tmp_path / "graph.onnx", external="graph.bin", threshold=16)
    (tmp_path / "om").mkdir()
    file = tmp_path / "om" / "a.om"
    simulate_om(tmp_path / "graph.onnx", file, shapes=STATIC, external_weight=external_weight)
    payload = onnx.load_from_string(bytes(read_payload(read_om(file)).graphs[0]))
    outside = {
        tensor.name: tensor.external_data[0].value
        for tensor in payload.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    assert set(outside) == ({"w"} if external_weight else set())
    assert all((tmp_path / "om" / name).is_file() for name in outside.values())


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    simulate_om(graph(), tmp_path / "a.om", shapes=STATIC)
    first = (tmp_path / "a.om").read_bytes()
    simulate_om(graph(), tmp_path / "a.om", shapes=STATIC)
    assert (tmp_path / "a.om").read_bytes() == first


def test_the_model_def_holds_the_graph(tmp_path):
    simulate_om(graph(), tmp_path / "a.om", shapes=STATIC, ge_types={"NPURmsNorm": "RmsNorm"})
    om = read_om(tmp_path / "a.om")
    model = model_def.decode(om.partition(0, MODEL_DEF), "a.om")
    types = [op.type for op in model.graphs[0].ops]
    assert types == ["Data"] * 2 + ["Const"] * 2 + ["RmsNorm", "MatMul", "Identity", "NetOutput"]
    matmul = model.graphs[0].ops[5]
    assert matmul.inputs == ("NPURmsNorm_n:0", "w:0")
    found = model_def.in_out(model)
    assert (found.inputs, found.outputs) == (om.models[0].inputs, om.models[0].outputs)


@pytest.mark.parametrize(
    ("shapes", "gears", "why"),
    [
        ({"x": (1, 2, 32)}, (), "missing: mask"),
        ({**STATIC, "q": (1,)}, (), "wrong: q"),
        (GEARED, (), "2 dims of -1, the gears have none"),
        (GEARED, [(1,)], "2 dims of -1, the gears have 1"),
        ({"x": (1, 2, 32), "mask": (1, 7)}, (), r"dim S \+ 4 is 6 when .* not 7"),
        (GEARED, [(1, 5), (8, 13)], "is 12 when the others are bound, not 13"),
    ],
)
def test_shapes_that_do_not_fit(tmp_path, shapes, gears, why):
    with pytest.raises(InputError, match=why):
        simulate_om(graph(), tmp_path / "a.om", shapes=shapes, gears=gears)
    assert not list(tmp_path.iterdir())


def test_a_real_file_needs_a_device(tmp_path):
    (tmp_path / "real.om").write_bytes(sample())
    with pytest.raises(InputError, match="needs a device"):
        read_payload(read_om(tmp_path / "real.om"))


def test_a_damaged_payload(tmp_path):
    for content in (b"no json\n", b"no end", json.dumps({"weights": 3}).encode() + b"\n"):
        write_om(
            tmp_path / "a.om",
            name="a",
            inputs=[],
            outputs=[],
            partitions={0x4F4D4653: content},
            platform_version="omforge-atc-sim",
        )
        with pytest.raises(InputError, match="payload is damaged"):
            read_payload(read_om(tmp_path / "a.om"))
