"""Single operators: the plugins named in omforge/lowering/data/onnx_ops.tsv; most of it seen."""

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from omforge.atc.sim.plugins import Registry
from tests.atc.sim.models import atc, model, refused, save


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def graph(call: str, inputs: str = "float[2,4] x") -> str:
    return f"({inputs}) => (float[2,4] y) {{ y = {call} }}"


QKV = "float16[1,8,64] q, float16[1,8,64] k, float16[1,8,64] v, float16[1,1,8,8] m"
IFA = '<num_heads = 2, input_layout = "BSH">'
FA = '<head_num = 2, input_layout = "BSH">'
PFA = '<num_heads = 2, input_layout = "BSH", scale_value = 0.5, pre_tokens = 8>'


def test_the_registry_is_exact() -> None:
    registry = Registry()
    assert registry.ge_type("ai.onnx::16::NPURmsNorm") == "RmsNorm"
    assert registry.ge_type("npu::1::NPURmsNorm") == "RmsNorm"
    assert registry.ge_type("NPU::1::NPURmsNorm") is None
    assert registry.ge_type("ai.onnx::19::NPURmsNorm") is None
    assert registry.ge_type("ai.onnx::17::NPUPromptFlashAttention") is None
    assert registry.ge_type("ai.onnx::16::LayerNormalization") is None


@pytest.mark.parametrize(
    ("call", "inputs", "codes"),
    [
        ("Clip (x)", "float[2,4] x", ("EZ9999", "E19999")),
        ("GatherND <batch_dims = 1> (x, i)", "float[2,4] x, int64[2,1] i", ("EZ9999", "E19999")),
        (f"NPUPromptFlashAttention {PFA} (q, k, v, m)", QKV, ("E19999",)),
        (f"NPUPromptFlashAttention {PFA} (q, k, v, , m)", QKV, ("E19999",)),
        ("NPUPromptFlashAttention (q, k, v)", QKV, ("EZ9999", "E19999")),
        (
            'NPUPromptFlashAttention <num_heads = 2, input_layout = "BSH"> (q, k, v)',
            QKV,
            ("SIM020",),
        ),
        (
            f"NPUPromptFlashAttention {PFA.replace('0.5', '1')} (q, k, v)",
            QKV,
            ("SIM027",),
        ),
        (
            f"NPUPromptFlashAttention {PFA.replace('8>', '1099511627776>')} (q, k, v)",
            QKV,
            ("SIM021",),
        ),
        (f"NPUIncreFlashAttention {IFA} (q, k, v, , m)", QKV, ("EZ9999", "E19999")),
        (f"NPUIncreFlashAttention {IFA} (q, k, v, m, m, m)", QKV, ("SIM022",)),
        ("NPUIncreFlashAttention (q, k, v, m, m, m)", QKV, ("EZ9999", "E19999")),
        (f"NPUFlashAttention {FA} (q, k, v, m, m, m)", QKV, ("E19999",)),
        (
            "NPURotaryPositionEmbedding (x, x, x)",
            "float[2,4] x",
            ("EZ9999", "E19999"),
        ),
        ("NPUMoeGatingTopKSoftmax (x)", "float[2,4] x", ("E19999",)),
        ("Shape <start = 1> (x)", "float[2,4] x", ("SIM024",)),
        ("Mod (x, x)", "int32[2,4] x", ("SIM024",)),
        ("AscendQuant <dst_type = 2, scale = 1.0> (x)", "float[2,4] x", ("SIM027",)),
        ('AscendQuant <dst_type = "INT8"> (x)', "float[2,4] x", ("SIM020",)),
        ("NPURmsNorm <epsilon = 0.01> (x, g)", "float[2,4] x, float[4] g", ("SIM025",)),
        ("NPURmsNorm <axis = 1> (x, g)", "float[2,4] x, float[4] g", ("SIM028",)),
        ("NPURmsNorm (x)", "float[2,4] x", ("SIM038",)),
        ("NPUFormatCast (x)", "float[2,4] x", ("SIM026",)),
        ("NPUScatter <dim = 1> (x, x, x)", "float[2,4] x", ("SIM026",)),
        ("NPUDtypeCast (x)", "float[2,4] x", ("SIM026",)),
    ],
)
def test_refusals(call: str, inputs: str, codes: tuple[str, ...], tmp_path: Path) -> None:
    assert refused(graph(call, inputs), tmp_path) == codes


@pytest.mark.parametrize("count", [3, 5, 7, 9, 12])
def test_prompt_flash_attention_parses_with_whole_blocks_of_inputs(
    count: int, tmp_path: Path
) -> None:
    names = ", ".join([*"qkv", *["m"] * (count - 3)])
    result = atc(save(graph(f"NPUPromptFlashAttention {PFA} ({names})", QKV), tmp_path))
    assert "SIM062" in result.codes or result.exit_status == 0  # it parses; it has no CPU twin


@pytest.mark.parametrize("bound", ["x, low", "x, low, high", "x, , high"])
def test_clip_takes_an_absent_bound(bound: str, tmp_path: Path) -> None:
    proto = model(graph(f"Clip ({bound})"))
    for name in ("low", "high"):
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(1), name))
    assert atc(save(proto, tmp_path)).exit_status == 0


def test_expanded_operators_take_no_absent_input(tmp_path: Path) -> None:
    """Seen with Gemm and LayerNormalization: Assert ((src_out_anchor) != nullptr)."""
    body = "(float[2,4] x, float[4,4] w) => (float[2,4] y) { y = Gemm (x, w%s) }"
    assert atc(save(body % "", tmp_path)).exit_status == 0
    proto = model(body % "")
    proto.graph.node[0].input.append("")
    assert refused(proto, tmp_path) == ("E19999",)
    body = "(float[2,4] x, float[4] g) => (float[2,4] y) { y = LayerNormalization (x, g%s) }"
    assert atc(save(body % "", tmp_path, 17)).exit_status == 0
    proto = model(body % "", 17)
    proto.graph.node[0].input.append("")
    assert refused(proto, tmp_path) == ("E19999",)


def test_split_by_num_outputs_at_opset_18(tmp_path: Path) -> None:
    body = """(float[2,4] x) => (float[2,2] y, float[2,2] z) {
        %s
        y, z = Split <num_outputs = 2, axis = %d> (%s)
    }"""
    assert atc(save(body % ("", 1, "x"), tmp_path, 18)).exit_status == 0
    assert refused(body % ("", -1, "x"), tmp_path, opset=18)[0] == "EZ9999"
    crash = body % ("a = Relu (x)", 1, "a")
    assert refused(crash, tmp_path, opset=18) == ("E19999",)


def test_scatter_nd_may_lose_its_reduction(tmp_path: Path) -> None:
    body = graph(
        'ScatterND <reduction = "add"> (x, i, u)', "float[2,4] x, int64[1,1] i, float[1,4] u"
    )
    assert refused(body, tmp_path) == ("SIM024",)
    assert atc(save(body.replace("add", "none"), tmp_path)).exit_status == 0
