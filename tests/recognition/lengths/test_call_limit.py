"""call-limit: how many new tokens a layer with states takes at once and is still right."""

import pytest

from omforge import ir
from omforge.passes.name_dims import NameDims
from omforge.recognition.lengths.call_limit import find_call_limit
from omforge.testing import parse
from tests.passes import recurrent
from tests.passes.blocks import Block


def limited(tokens: int) -> str:
    """A model whose linear attention puts no more than the first tokens of a call into its state.

    That is what a loop over chunks comes to when it was exported with a single one.
    """
    kept = """given = Shape <start = 2, end = 3> (l_kt)
        some = Min (given, most)
        l_kt_some = Slice (l_kt, i_0, some, i_2)
        l_v_some = Slice (l_v, i_0, some, i_1)
        l_kv = MatMul (l_kt_some, l_v_some)"""
    text = recurrent.model().replace("l_kv = MatMul (l_kt, l_v)", kept)
    return text.replace(
        "float[16, 8] table", f"int64[1] most = {{{tokens}}}, float[16, 8] table", 1
    )


def named(text: str) -> ir.Model:
    model = parse(text)
    NameDims().run(model)
    return model


@pytest.mark.parametrize("tokens", [3, 8])
def test_what_loses_tokens_has_a_limit(tokens: int) -> None:
    bound = find_call_limit(named(limited(tokens)), 40)
    assert bound is not None
    assert bound.tokens == tokens
    assert bound.why == (
        f"what renews ssm_state in the export is something else for more than {tokens} new tokens "
        "at once than for the same tokens in pieces"
    )
    assert find_call_limit(named(limited(tokens)), tokens) is None


def test_what_takes_any_number_has_none() -> None:
    assert find_call_limit(named(recurrent.model()), 40) is None
    assert find_call_limit(named(Block(rotary="half").text()), 40) is None
