"""--framework=1: what the simulated atc makes of a GE graph, and with which code it refuses one.

The graphs are those of `tests.lowering.air_legality`, which our own check is tested with.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from omforge.air import graph as g
from omforge.air.files import write_air
from omforge.air.graph import Air, Attr, Op, Tensor
from omforge.atc.sim.main import AtcSimResult, run
from omforge.om import GEAR_INPUT, read_om
from omforge.om.payload import read_payload
from tests.lowering.air_legality.graphs import Builder, added, described, edit, fed, told, without
from tests.lowering.air_legality.illegal_parts import constant, data_index, reader, twice
from tests.lowering.air_legality.legal import GRAPHS

HALF = "float16"


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(8192))


def atc(air: Air, *flags: str, soc: str = "Ascend310P3") -> AtcSimResult:
    write_air(air, "graph.air")
    usual = {
        "--framework": "1",
        "--model": "graph.air",
        "--output": "out/graph",
        "--soc_version": soc,
        "--input_format": "ND",
        "--precision_mode_v2": "origin",
    }
    for flag in flags:
        usual.pop(flag.partition("=")[0], None)
    return run([*(f"{name}={value}" for name, value in usual.items()), *flags])


def test_a_step_that_writes_its_cache() -> None:
    """Inputs by their indices, outputs by node and number; what is written is no output."""
    result = atc(GRAPHS["decode"]())
    assert (result.exit_status, result.codes) == (0, ())
    om = read_om("out/graph.om")
    assert om.simulated
    names = [tensor.name for tensor in om.models[0].inputs]
    assert names == ["q", "k", "v", "at", "mask", "k_cache", "v_cache"]
    (output,) = om.models[0].outputs
    assert (output.name, output.shape, output.size) == (
        "output_0_attention_0",
        (1, 4, 1, 64),
        512,
    )
    payload = read_payload(om)
    assert payload.written == {"k_cache": "k_cache.written", "v_cache": "v_cache.written"}


@pytest.mark.parametrize("name", ["layer", "decode_int8", "prefill", "gated", "rotary", "moved"])
@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B4"])
def test_legal_graphs_compile(name: str, soc: str) -> None:
    result = atc(GRAPHS[name](), soc=soc)
    assert (result.exit_status, result.codes) == (0, ()), result.text


def test_weights_are_meant_from_where_atc_works(tmp_path: Path) -> None:
    """Not from the folder of the file (file_constant_utils.cc:ConvertFileConstToConst)."""
    (tmp_path / "deep").mkdir()
    write_air(GRAPHS["layer"](), "deep/graph.air")
    assert atc(GRAPHS["layer"](), "--model=deep/graph.air").exit_status == 0
    (tmp_path / "weights.bin").rename(tmp_path / "deep" / "weights.bin")
    result = atc(GRAPHS["layer"](), "--model=deep/graph.air")
    assert result.codes == ("E19999",)
    assert "Failed to get real path of weights.bin" in result.text


def test_separated_weights_are_beside_the_file(tmp_path: Path) -> None:
    """A Const whose bytes are in a file: from the .air's folder (SetWeightForModel)."""

    def separate(op: Op) -> Op:
        tensor = op.attributes["value"].value
        assert isinstance(tensor, Tensor)
        (tmp_path / "deep" / "gamma_file").write_bytes(tensor.data)
        empty = g.tensor(dataclasses.replace(tensor, data=b""))
        place = {"location": g.text("gamma_file"), "length": g.integer(len(tensor.data))}
        return dataclasses.replace(op, attributes={**op.attributes, "value": empty, **place})

    (tmp_path / "deep").mkdir()
    air = edit(GRAPHS["layer"](), "gamma", separate)
    write_air(air, "deep/graph.air")
    assert atc(air, "--model=deep/graph.air").exit_status == 0
    (tmp_path / "deep" / "gamma_file").unlink()
    assert atc(air, "--model=deep/graph.air").codes[0] == "E10041"


def _with_gears() -> Air:
    b = Builder()
    x, past = b.data("x", HALF, 2, -1, 32), b.data("mask", HALF, 2, 1, -1)
    both = b.op("BatchMatMulV2", "both", {"x1": past, "x2": x}, {"y": (HALF, (2, 1, 32))})
    return b.air(b.op("Relu", "relu", {"x": x}, {"y": (HALF, (2, -1, 32))}), both)


GEARS = ("--input_shape=x:2,-1,32;mask:2,1,-1", "--dynamic_dims=1,1;8,8")


def test_gears() -> None:
    result = atc(_with_gears(), *GEARS)
    assert (result.exit_status, result.codes) == (0, ()), result.text
    om = read_om("out/graph.om")
    model = om.models[0]
    assert [tensor.name for tensor in model.inputs] == ["x", "mask", GEAR_INPUT]
    assert (model.inputs[0].shape, model.inputs[0].size) == ((2, -1, 32), 2 * 8 * 32 * 2)
    assert model.gears == ((1, 1), (8, 8))
    assert model.output_shapes == ((0, 0, 2, 1, 32), (1, 0, 2, 8, 32), (-1, 1, 2, 1, 32))
    assert len(read_payload(om).graphs) == 2


def test_a_gear_that_the_graph_does_not_take() -> None:
    result = atc(_with_gears(), GEARS[0], "--dynamic_dims=1,1;8,7")
    assert result.codes == ("EZ9999", "E19999")
    assert "Call InferShapeAndType for node:both(BatchMatMulV2) failed" in result.text


def test_what_the_file_says_of_results_is_not_read() -> None:
    """GE infers all of it anew."""
    air = described(GRAPHS["layer"](), "sum", shape=(1, 4, 7))
    assert atc(air).exit_status == 0
    assert read_om("out/graph.om").models[0].outputs[0].shape == (1, 4, 64)


def _spare(name: str, *inputs: str) -> Op:
    return Op(name, "Relu", inputs)


REFUSED: tuple[tuple[str, str, Callable[[Air], Air], tuple[str, ...]], ...] = (
    (
        "an edge from nowhere",
        "layer",
        lambda a: added(a, _spare("spare", "nowhere:-1")),
        ("E10041", "E19999"),
    ),
    (
        "an anchor that is not there",
        "layer",
        lambda a: added(a, _spare("spare", "x:0")),
        ("E10041", "E19999"),
    ),
    ("one name twice", "layer", lambda a: twice(a, "norm"), ("SIM071",)),
    ("an index twice", "decode", lambda a: data_index(a, "k", 0), ("SIM072",)),
    (
        "a list that does not say its type",
        "moved",
        lambda a: told(a, "deep", axes=Attr("i", items=(1,), typed=False)),
        ("SIM073", "SIM062"),
    ),
    (
        "a name that GE does not know",
        "layer",
        lambda a: told(a, "norm", _input_name_key=g.texts(("x", "weight"), typed=False)),
        ("SIM074", "EZ9999"),
    ),
    ("an attribute of another kind", "layer", lambda a: told(a, "norm", epsilon=g.integer(1)), ("SIM075",)),
    ("a required attribute", "decode", lambda a: told(a, "attention", num_heads=None), ("SIM075", "SIM062")),
    (
        "what GE recovers, in another order",
        "layer",
        lambda a: told(a, "norm", _ir_inputs_key=g.texts(("gamma", "x"))),
        ("E19999",),
    ),
    ("a constant is written", "decode", lambda a: constant(a, "v_cache"), ("E19999",)),
    (
        "a written cache is an output",
        "decode",
        lambda a: fed(a, "NetOutput", 0, "write_k:0"),
        ("SIM077",),
    ),
    (
        "a Data is written",
        "decode",
        lambda a: edit(a, "v_cache", lambda op: dataclasses.replace(op, type="Data")),
        ("SIM079", "SIM078"),
    ),
    (
        "a reader beside the writer",
        "decode",
        lambda a: added(a, reader("beside", "k_cache:0", HALF, 1, 4, 256, 64)),
        ("SIM082",),
    ),
    ("sizes that do not fit", "layer", lambda a: described(a, "x", shape=(1, 4, 63)), ("EZ9999", "E19999")),
    ("float32 queries", "decode", lambda a: described(a, "q", dtype="float32"), ("EZ3003",)),
    ("no outputs", "layer", lambda a: without(a, "NetOutput"), ("SIM084",)),
    (
        "an operator that nobody has",
        "layer",
        lambda a: edit(a, "cast", lambda op: dataclasses.replace(op, type="Castle")),
        ("EZ3003",),
    ),
    (
        "a dtype without a size",
        "layer",
        lambda a: described(a, "x", dtype="string"),
        ("E13025",),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("legal", "change", "codes"),
    [pytest.param(*case[1:], id=case[0]) for case in REFUSED],
)
def test_what_is_refused(legal: str, change: Callable[[Air], Air], codes: tuple[str, ...]) -> None:
    result = atc(change(GRAPHS[legal]()))
    assert result.codes == codes, result.text
    assert result.exit_status == 255
    assert not Path("out/graph.om").exists()


def _attention(size: int, kv_heads: int = 4, queries: int = 1) -> Air:
    """A step over keys and values of 64 slots."""
    b = Builder()
    query = b.data("q", HALF, 1, 4, queries, size)
    key, value = (b.data(name, HALF, 1, kv_heads, 64, size) for name in ("k", "v"))
    attended = b.op(
        "IncreFlashAttention",
        "attention",
        {"query": query, "key": [key], "value": [value]},
        {"attention_out": (HALF, (1, 4, queries, size))},
        num_heads=4,
        input_layout="BNSD",
        num_key_value_heads=kv_heads,
    )
    return b.air(attended)


@pytest.mark.parametrize(
    ("air", "codes"),
    [
        (_attention(64), ()),
        (_attention(128, kv_heads=2), ()),
        (_attention(256), ()),
        (_attention(40), ("E20001",)),
        (_attention(528), ("E20001",)),
        (_attention(256, kv_heads=2), ("E20001",)),
        (_attention(64, kv_heads=2, queries=17), ("E20001",)),
    ],
)
def test_what_tiling_takes_on_310p(air: Air, codes: tuple[str, ...]) -> None:
    """incre_flash_attention_tiling_check.cpp; A2 takes more."""
    result = atc(air)
    assert result.codes == codes, result.text
    assert result.exit_status == (255 if codes else 0)


def test_prefill_with_a_mask_is_square_and_aligned_on_310p() -> None:
    """prompt_flash_attention_tiling.cpp: as many keys as queries, a multiple of 16."""
    b = Builder()
    q, k, v = (
        b.data(name, HALF, 1, 4, rows, 64) for name, rows in (("q", 16), ("k", 32), ("v", 32))
    )
    mask = b.data("mask", "bool", 1, 1, 16, 32)
    attended = b.op(
        "PromptFlashAttention",
        "attention",
        {"query": q, "key": k, "value": v, "atten_mask": mask},
        {"attention_out": (HALF, (1, 4, 16, 64))},
        num_heads=4,
        input_layout="BNSD",
    )
    assert atc(b.air(attended)).codes == ("E20001",)
    assert atc(b.air(attended), soc="Ascend910B4").codes == ()


def test_a_fused_operator_that_the_soc_has_not() -> None:
    assert atc(GRAPHS["decode"](), soc="Ascend310B4").codes == ("EZ3003",)


@pytest.mark.parametrize(
    ("flags", "codes"),
    [
        (("--input_shape=nobody:1,4,64",), ("E10016",)),
        (("--input_shape=norm:1,4,64",), ("E10017",)),
        (("--input_shape=x:2,4,64",), ("SIM030", "EZ9999", "E19999")),
        (("--mode=1", "--om=graph.air", "--json=out.json"), ("E10001",)),
        (("--mode=3",), ("SIM000",)),
        (("--model=absent.air",), ("E10001",)),
        (("--soc_version=Ascend42",), ("E20101",)),
    ],
)
def test_flags_that_are_refused(flags: tuple[str, ...], codes: tuple[str, ...]) -> None:
    result = atc(GRAPHS["layer"](), *flags)
    assert (result.exit_status, result.codes) == (255, codes), result.text


def test_input_shape_is_taken_where_the_file_has_the_same() -> None:
    assert atc(GRAPHS["layer"](), "--input_shape=x:1,4,64").exit_status == 0


def test_what_is_no_graph() -> None:
    Path("raw.air").write_bytes(b"\xff\xff no message")
    assert atc(GRAPHS["layer"](), "--model=raw.air").codes == ("E10041",)


def test_flags_that_are_ignored_are_told() -> None:
    """No parser runs, so its flags do nothing (main_impl.cc:GenerateModelBySingleGraph)."""
    result = atc(GRAPHS["layer"](), "--out_nodes=nobody:7", "--output_type=FP32")
    assert (result.exit_status, result.codes) == (0, ("SIM070",))
    assert "atc ignores --out_nodes, --output_type" in result.text


def test_ge_cannot_own_the_memory_of_what_is_written() -> None:
    options = {"compile options": {"ge.exec.graphIOMemAllocMode": "ByGE"}}
    Path("raw.json").write_text(json.dumps(options))
    assert atc(GRAPHS["layer"](), "--raw_ge_options=raw.json").exit_status == 0
    assert atc(GRAPHS["decode"](), "--raw_ge_options=raw.json").codes == ("E13025",)


def test_it_is_lenient_when_it_is_not_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """As atc itself: an index given twice is nobody's error, and the inputs change places."""
    monkeypatch.setenv("OMFORGE_ATC_SIM_STRICT", "0")
    result = atc(data_index(GRAPHS["decode"](), "at", 0))
    assert (result.exit_status, result.codes) == (0, ("SIM072",))
    assert [t.name for t in read_om("out/graph.om").models[0].inputs][:4] == ["q", "k", "v", "at"]


def test_what_it_says_of_a_file_that_it_made() -> None:
    atc(GRAPHS["decode"]())
    result = run(["--mode=6", "--om=out/graph.om"])
    assert result.exit_status == 0
    assert "framework_type[1]" in result.text
