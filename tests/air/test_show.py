"""A GE graph as text."""

from omforge.air.files import read_air
from omforge.air.show import lines

from .test_files import SAMPLES


def test_the_text_of_a_graph():
    text = "\n".join(lines(read_air(SAMPLES[0])))
    assert text.splitlines()[:3] == [
        "decode: version 1, 1 graph(s)",
        "graph decode: 10 operators",
        "  %q: y=float16[1,4,1,64] = Data() {index=0}",
    ]
    assert (
        "  %write_k: var=float16[1,4,256,64] = Scatter(var=%k_cache, indices=%pos, updates=%k_new) "
        "{axis=-2, reduce=update}" in text
    )
    assert text.splitlines()[-1] == "  %NetOutput = NetOutput(input0=%attn)"
