"""What `omforge om` prints."""

from omforge.om import OmTensor, layout, model_def, read_om, write_om
from omforge.om.model_def import GraphDef, ModelDef, OpDef
from omforge.om.report import lines
from tests.om.samples import sample


def test_a_file_in_words(tmp_path):
    file = tmp_path / "tiny.om"
    file.write_bytes(sample())
    assert lines(read_om(file)) == [
        f"{file}: 706 bytes",
        "name tiny, ir model, 64-bit tables, platform version 1.0, of dynamic shape",
        "",
        "sub model 0 of 2",
        "  partition         offset  bytes",
        "  MODEL_INOUT_INFO     336    319",
        "  WEIGHTS_DATA         655      7",
        "  TASK_INFO            662      5",
        "  interface (from MODEL_INOUT_INFO)",
        "          name                      dtype    shape    format  bytes",
        "  input   x                         float16  [1, -1]  ND         16",
        "  input   ascend_mbatch_shape_data  int32    [1]      ND          4",
        "  output  add:0:y                   float32  [1, 8]   ND         32",
        "  2 dims gears: 1; 8",
        "  the gears count the dims of x",
        "",
        "sub model 1 of 2",
        "  partition    offset  bytes",
        "  TBE_KERNELS     699      7",
        "  its interface is in no partition that omforge reads",
    ]


def test_many_gears_ranges_and_simulations(tmp_path):
    write_om(
        tmp_path / "a.om",
        name="",
        inputs=[OmTensor("x", "int8", (-1,), 9, "ND", ((1, 9),))],
        outputs=[],
        partitions={2: b""},
        dynamic_batch=range(1, 8),
        platform_version="omforge-atc-sim",
    )
    text = "\n".join(lines(read_om(tmp_path / "a.om")))
    assert "a simulation, which no device loads" in text
    assert "[1..9]" in text
    assert "7 batch gears: 1; 2; 3; 4; 5; and 2 more" in text


def test_what_a_model_writes_in_place(tmp_path):
    tensors = [OmTensor(name, "float16", (4,), 8) for name in ("x", "cache")]
    ops = (OpDef("x", "Data"), OpDef("cache", "RefData"))
    for content in (model_def.encode(ModelDef("m", (GraphDef("m", ops),))), b"\xff"):
        write_om(
            tmp_path / "a.om",
            name="m",
            inputs=tensors,
            outputs=[],
            partitions={layout.MODEL_DEF: content},
        )
        found = [line.split()[:2] for line in lines(read_om(tmp_path / "a.om"))]
        whole = content != b"\xff"
        assert (["in", "place"] in found) == whole
        assert (["input", "cache"] in found) != whole
