"""bind-memory: an encoder's states get one length, and the tokens' rows."""

from omforge.ir.values import dims
from omforge.passes.bind_memory import BindMemory
from omforge.testing import parse


def test_lengths_become_a_number_and_rows_the_tokens() -> None:
    """An exporter may give each axis of each input a symbol of its own; a width is no length."""
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids, float[s1, 2, s2, 4] keys, float[batch, s3, 8] states,
       int64[s4, s2] mask, float[8, 2] adapter) => (float[batch, seq, 2] logits)
    <float[4, 2] words = {0, 1, 2, 3, 4, 5, 6, 7}> {
        logits = Gather (words, input_ids) }""")
    assert BindMemory(12).run(model) == 3
    shapes = {value.name: [str(dim) for dim in dims(value) or ()] for value in model.graph.inputs}
    assert shapes == {
        "input_ids": ["batch", "seq"],
        "keys": ["batch", "2", "12", "4"],
        "states": ["batch", "12", "8"],
        "mask": ["batch", "12"],
        "adapter": ["8", "2"],
    }
