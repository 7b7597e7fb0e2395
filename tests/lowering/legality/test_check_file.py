"""Preflight of any ONNX file."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from omforge.ir.errors import InputError
from omforge.lowering.legality import ALL_RULES, check_file
from omforge.lowering.legality.check_file import UNREADABLE
from omforge.lowering.target import target
from tests.exports import export

SOC = target("Ascend310P3")

CHAIN = """<ir_version: 8, opset_import: ["" : 16]>
    g (float[2] x) => (float[2] y) { h = Relu (x) y = Neg (h) }"""


def write(folder: Path, text: str = CHAIN, **changed: object) -> Path:
    proto = onnx.parser.parse_model(text)
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    for name, value in changed.items():
        setattr(proto, name, value)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def codes(path: Path) -> set[str]:
    return {offence.code for offence in check_file(path, SOC).errors}


@pytest.mark.parametrize("route", ["optimum", "torchscript-op17"])
def test_raw_exports_at_opsets_that_atc_knows_are_legal(route: str, tmp_path: Path) -> None:
    """As seen: Optimum and TorchScript exports of 32 LLMs parse."""
    found = check_file(export(route, "llama_gqa", tmp_path), SOC)
    assert found.errors == ()
    assert {offence.code for offence in found.advice} == {
        "static-inputs",
        "int32-inputs",
    }


def test_a_contrib_export_names_every_node_with_its_layer(tmp_path: Path) -> None:
    found = check_file(export("genai", "llama_gqa", tmp_path), SOC)
    refused = [offence for offence in found.errors if offence.code == "registered"]
    attention = [offence for offence in refused if "GroupQueryAttention" in offence.what]
    assert len(attention) == 2
    assert all(offence.atc == "E13010" for offence in refused)
    assert all("raise-contrib-ops" in offence.remedy for offence in attention)
    assert "layers.1" in attention[1].where


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x08\x08\x12\x7f", "truncated or corrupt"),
        (b"PK\x03\x04 a zip file", "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_what_is_no_model(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=told):
        check_file(path, SOC)


def test_every_truncation_is_refused_or_reported(tmp_path: Path) -> None:
    whole = write(tmp_path).read_bytes()
    for length in range(1, len(whole), 3):
        path = tmp_path / "cut.onnx"
        path.write_bytes(whole[:length])
        try:
            found = check_file(path, SOC)
        except InputError:
            continue
        assert found.errors, length


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        check_file(tmp_path / "no.onnx", SOC)
    with pytest.raises(InputError, match="is a folder"):
        check_file(tmp_path, SOC)


def test_the_ir_version_does_not_matter(tmp_path: Path) -> None:
    assert codes(write(tmp_path, ir_version=99)) == set()


def test_an_opset_that_the_installed_onnx_does_not_know(tmp_path: Path) -> None:
    assert codes(write(tmp_path, CHAIN.replace("16", "99"))) == {"opset-version"}


def test_many_faults_are_told_at_once(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 16]>
        g (float[2] x, float[2] z) => (float[2] y)
        { a = FooBar (x) b = Gelu (a) c = Clip (b) d = Mul (c, w) e = Mul (d, v) y = npu.Abs (e) }"""
    )
    for node in proto.graph.node:
        node.name = "same"
    unknown = TensorProto(name="w", data_type=99, dims=[2], raw_data=b"12345678")
    external = TensorProto(name="v", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "v.bin"), ("length", "8"), ("checksum", "x")):
        external.external_data.add(key=key, value=value)
    proto.graph.initializer.extend([unknown, external])
    proto.graph.input[1].type.tensor_type.ClearField("shape")
    path = tmp_path / "my model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert codes(path) >= {
        "path-characters",
        "parser-dtype",
        "external-keys",
        "external-files",
        "static-inputs",
        "node-names-unique",
        "imported-domain",
        "registered",
        "plugin-refuses",
    }


def test_two_producers_do_not_hide_the_rest(tmp_path: Path) -> None:
    text = CHAIN.replace("h = Relu", "y = Relu").replace("Neg (h)", "FooBar (x)")
    assert codes(write(tmp_path, text)) == {"tensor-made-once", "registered"}


def test_a_graph_that_cannot_be_loaded_is_reported_as_that(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(CHAIN)
    proto.graph.input[0].type.tensor_type.elem_type = 99
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert codes(path) == {"parser-dtype", UNREADABLE}
    (found,) = [o for o in check_file(path, SOC).errors if o.code == UNREADABLE]
    assert "the rules for nodes were not applied" in found.why


def test_an_attribute_of_an_unknown_dtype(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(CHAIN)
    proto.graph.node[0].attribute.add(
        name="a", type=onnx.AttributeProto.TENSOR, t=TensorProto(data_type=99, dims=[1])
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert codes(path) == {"parser-dtype", "onnx-schema"}


def test_missing_weights_keep_no_rule_from_looking(tmp_path: Path) -> None:
    text = CHAIN.replace("Relu (x)", "Add (x, w)").replace("Neg", "FooBar")
    proto = onnx.parser.parse_model(text)
    weight = TensorProto(name="w", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="gone.bin")
    proto.graph.initializer.append(weight)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert codes(path) == {"external-files", "registered"}


@pytest.mark.parametrize(("opset", "legal"), [(11, True), (17, True), (18, True), (19, False)])
def test_operators_are_looked_up_at_the_models_own_opset(
    opset: int, legal: bool, tmp_path: Path
) -> None:
    assert (codes(write(tmp_path, CHAIN.replace("16", str(opset)))) == set()) is legal


def test_what_is_inferred_may_be_allowed(tmp_path: Path) -> None:
    text = CHAIN.replace("(float[2] y)", "(float[2] y, float[2] x)")
    path = write(tmp_path, text)
    assert codes(path) == {"outputs-made"}
    found = check_file(path, SOC, allow=["outputs-made"])
    assert found.errors == ()
    (allowed,) = [offence for offence in found.advice if offence.code == "outputs-made"]
    assert "allowed by --allow" in allowed.why


def test_what_was_seen_or_read_may_not_be_allowed(tmp_path: Path) -> None:
    path = write(tmp_path)
    for name, rule in ALL_RULES.items():
        if rule.certainty == "inferred":
            assert check_file(path, SOC, allow=[name]).errors == ()
        else:
            with pytest.raises(InputError, match="not inferred"):
                check_file(path, SOC, allow=[name])


def test_gears_are_what_dynamic_dims_are_for(tmp_path: Path) -> None:
    path = write(tmp_path, CHAIN.replace("[2]", "[s, 2]"))
    assert [o.code for o in check_file(path, SOC).advice] == ["static-inputs"]
    assert check_file(path, SOC, gears=True).offences == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("g (float[s, 2] x, float z) => (float[s, 2] y) { y = Add (x, z) }", "a scalar input"),
    ],
)
def test_what_gears_demand(text: str, told: str, tmp_path: Path) -> None:
    path = write(tmp_path, '<ir_version: 8, opset_import: ["" : 16]>' + text)
    found = [o for o in check_file(path, SOC, gears=True).offences if o.code == "gears"]
    assert [told in offence.what for offence in found] == [True]
    assert "gears" not in {offence.code for offence in check_file(path, SOC).offences}


def test_a_size_that_data_decide_and_what_the_soc_does_with_it(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 16]> g (float[s] x) => (int64[1, n] y)'
    text += " { y = NonZero (x) }"
    path = write(tmp_path, text)

    def told(soc: str, *, gears: bool = False) -> list[tuple[str, str]]:
        offences = check_file(path, target(soc), gears=gears).offences
        return [(o.level, o.why) for o in offences if o.code == "static-sizes"]

    # A graph with symbols does not claim to be static.
    ((level, why),) = told("Ascend310P3")
    assert level == "advice"
    assert "Ascend310P3 the graph becomes one of dynamic shape" in why
    ((level, why),) = told("Ascend310P3", gears=True)
    assert level == "error"
    assert "gears take no such operator" in why
    path = write(tmp_path, text.replace("[s]", "[4]"))
    ((level, why),) = told("Ascend310B4")
    assert level == "error"
    assert "Ascend310B4 dynamic shapes are not supported" in why


def test_a_long_name_is_advised_against(tmp_path: Path) -> None:
    path = write(tmp_path, CHAIN.replace("x", "x" * 128))
    assert [offence.code for offence in check_file(path, SOC).advice] == ["name-length"]
    assert check_file(write(tmp_path, CHAIN.replace("x", "x" * 127)), SOC).offences == ()


def test_large_weights_inside_the_file(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.zeros(1 << 19, np.float32), "w")
    cut = TensorProto(name="w", data_type=1, dims=[1 << 19], raw_data=bytes(1 << 20))
    for tensor, expected in ((weight, set[str]()), (cut, {"constant-data"})):
        proto = onnx.parser.parse_model(CHAIN.replace("Relu (x)", "ReduceMax (w)"))
        proto.graph.initializer.append(tensor)
        path = tmp_path / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        assert codes(path) == expected


def test_the_file_stays_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = path.read_bytes()
    check_file(path, SOC)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dims", [[0], [3], [2, 2]])
@pytest.mark.parametrize("raw", [False, True])
def test_numbers_that_do_not_fit_their_dims_are_judged_and_read_by_nobody(
    tmp_path: Path, dims: list[int], raw: bool
) -> None:
    """The value of a ConstantOfShape is read where shapes are inferred."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 16]>
        g (float[2] x) => (int64[2] y) {
            s = Shape (x) y = ConstantOfShape <value = int64[1] {4}> (s) }""")
    value = model.graph.node[1].attribute[0].t
    if raw:
        value.raw_data = bytes(8)
        value.ClearField("int64_data")
    del value.dims[:]
    value.dims.extend(dims)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    found = check_file(tmp_path / "m.onnx", target("Ascend310P3"))
    assert UNREADABLE not in {offence.code for offence in found.offences}
