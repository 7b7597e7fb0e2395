"""What is alive at once, in the order in which nodes run."""

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.planning.activations import peak_bytes

HEAD = '<ir_version: 11, opset_import: ["" : 16]>'
ROW = 4 * 8


def peak(text: str, **gear: int) -> int:
    model = ir.from_onnx_text(HEAD + text)
    infer_model(model)
    return peak_bytes(model.graph, gear)


def test_a_chain_holds_what_is_read_and_what_is_written() -> None:
    text = "g (float[8] x) => (float[8] y) { a = Neg (x) b = Neg (a) c = Neg (b) y = Neg (c) }"
    assert peak(text) == 2 * ROW


def test_what_is_read_later_stays() -> None:
    text = "g (float[8] x) => (float[8] y) { a = Neg (x) b = Neg (a) c = Neg (b) y = Add (a, c) }"
    assert peak(text) == 3 * ROW


def test_inputs_outputs_and_constants_have_buffers_of_their_own() -> None:
    text = "g (float[8] x) => (float[8] y) <float[1] w = {1}> { y = Add (x, w) }"
    assert peak(text) == 0


def test_a_view_is_the_memory_that_it_shows() -> None:
    text = """g (float[8] x) => (float[8] y) <int64[2] s = {2, 4}, int64[1] f = {-1}>
        { a = Neg (x) b = Reshape (a, s) c = Reshape (b, f) y = Neg (c) }"""
    assert peak(text) == ROW


def test_what_nobody_reads_is_alive_while_its_node_runs() -> None:
    text = "g (float[8] x) => (float[4] y) { y, rest = Split (x) }"
    model = ir.from_onnx_text(HEAD + text)
    for value in model.graph.node(0).outputs:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([4])
    assert peak_bytes(model.graph) == 4 * 4


def test_gears_are_counted_by_their_length() -> None:
    text = "g (float[seq,8] x) => (float[seq,8] y) { a = Neg (x) b = Neg (a) y = Neg (b) }"
    assert peak(text, seq=5) == 5 * peak(text, seq=1) == 5 * 2 * ROW
