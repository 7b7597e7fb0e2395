"""MODEL_INOUT_INFO: every kind of block."""

import pytest

from omforge.ir.errors import InputError
from omforge.om import inout
from omforge.om.inout import InOut, OmTensor
from tests.om.samples import in_out

FULL = InOut(
    inputs=(
        OmTensor("a", "int4", (2, -1), 4, "NCHW", ((2, 2), (1, 9))),
        OmTensor("", "bool", (), 1),
    ),
    outputs=(OmTensor("ä", "ge:99", (3,), 0, "format:77"),),
    dynamic_batch=(1, 2),
    dynamic_hw=((1, 2), (3, 4)),
    dynamic_dims=((1,), (8,)),
    output_shapes=("0,0,3",),
    order=("a", ""),
)


def test_what_is_encoded_decodes():
    assert inout.decode(memoryview(inout.encode(FULL)), "f") == FULL
    assert inout.encode(InOut((), ())) == b""


def test_the_encoder_writes_what_cann_does():
    """The block of a file that CANN wrote: one int32[16] input `_arg_0` of unknown size."""
    record = bytes.fromhex(
        "00000000 3a000000 01000000 0000000000000000 02000000 03000000 06000000 08000000"
        "08000000 00000000 5f6172675f30 1000000000000000 1000000000000000"
    )
    assert inout.encode(InOut((OmTensor("_arg_0", "int32", (16,), 0),), ())) == record


def test_every_cut_is_refused_or_ends_between_blocks():
    data = in_out()
    refused = 0
    for length in range(len(data)):
        try:
            inout.decode(memoryview(data[:length]), "f.om")
        except InputError as error:
            refused += str(error).startswith("f.om: MODEL_INOUT_INFO is damaged")
    assert refused == len(data) - 5  # 0 to 4 of its five blocks are whole


def test_a_count_that_promises_too_much_is_refused_at_once():
    block = inout.encode(InOut((), (), dynamic_batch=(1,)))
    huge = block[:8] + b"\xff\xff\xff\xff" + block[12:]
    with pytest.raises(InputError, match="the gears takes 34359738360 bytes, 8 are left"):
        inout.decode(memoryview(huge), "f.om")
