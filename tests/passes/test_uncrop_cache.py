"""uncrop-cache: caches that the graph itself cuts to a window."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.passes import make_pipeline
from omforge.passes.fuse_attention import FuseAttention
from omforge.passes.uncrop_cache import UncropCache
from omforge.testing import parse
from tests.passes.blocks import WINDOW, Block, named

KEPT = WINDOW - 1


def cropped(before: int = KEPT, behind: int = KEPT) -> ir.Model:
    """A block whose cache keeps its last tokens, and whose mask counts from the first of them."""
    edits = (
        ("key = Range (n_0, total0, n_1)",
         "key_a = Range (n_0, total0, n_1) gone_a = Sub (past0, kept) gone = Max (n_0, gone_a)"
         " key = Add (key_a, gone)"),
        ("float scale =",
         f"int64 kept = {{{KEPT}}}, int64[1] c_b = {{-{before}}}, int64[1] c_a = {{-{behind}}},"
         " int64[1] c_end = {9223372036854775807}, int64[1] c_axis = {2}, float scale ="),
        ("float[batch, 2, total, 4] present_key", "float[batch, 2, kept_k, 4] present_key"),
        ("float[batch, 2, total, 4] present_value", "float[batch, 2, kept_v, 4] present_value"),
    )  # fmt: skip
    text = Block(visible="window", edits=edits).text()
    head, _, body = text.partition("{\n    x = ")
    for role, new in (("key", "k4"), ("value", "v4")):
        body = body.replace(f"present_{role}", f"whole_{role}")
        body = body.replace(
            f"whole_{role} = Concat <axis = 2> (past_{role}, {new})",
            f"cut_{role} = Slice (past_{role}, c_b, c_end, c_axis)"
            f" whole_{role} = Concat <axis = 2> (cut_{role}, {new})"
            f" present_{role} = Slice (whole_{role}, c_a, c_end, c_axis)",
        )
    return parse(f"{head}{{\n    x = {body}")


def feeds(past: int, seq: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(past)
    cache = {f"past_{r}": random.standard_normal((2, 2, past, 4)) for r in ("key", "value")}
    return {
        "input_ids": random.integers(0, 16, (2, seq)),
        "attention_mask": np.ones((2, past + seq), dtype=np.int64),
        "position_ids": np.tile(np.arange(past, past + seq), (2, 1)),
        **{name: array.astype(np.float32) for name, array in cache.items()},
    }


def test_the_cache_grows_and_the_window_is_the_masks() -> None:
    before, after = cropped(), cropped()
    make_pipeline("name-dims,fold-constants").run(after)
    assert UncropCache().run(after) == 2
    ir.check(after)
    shapes = {v.name: str(v.shape) for v in (*after.graph.inputs, *after.graph.outputs)}
    assert shapes["past_key"] == "[batch,2,past,4]"
    assert shapes["present_value"] == "[batch,2,past + seq,4]"
    assert shapes["attention_mask"] == "[batch,past + seq]"
    for past, seq in ((0, 5), (KEPT, 1), (1, 4)):
        given = feeds(past, seq)
        expected, actual = numerics.run(before, given), numerics.run(after, given)
        np.testing.assert_allclose(actual["logits"], expected["logits"], atol=1e-5)
        for name in ("present_key", "present_value"):
            np.testing.assert_array_equal(actual[name][:, :, -KEPT:], expected[name])
    # A longer past, that the export never sees: what it cuts away is behind the window.
    given = feeds(6, 3)
    short = {n: a[:, :, -KEPT:] if n.startswith("past") else a for n, a in given.items()}
    short["attention_mask"] = given["attention_mask"][:, -KEPT - 3 :]
    expected, actual = numerics.run(before, short), numerics.run(after, given)
    np.testing.assert_allclose(actual["logits"], expected["logits"], atol=1e-5)
    assert FuseAttention().run(after) == 1
    assert UncropCache().run(after) == 0


def test_what_the_mask_would_show_is_refused() -> None:
    """One row less than the window has: another query would see what is gone."""
    model = cropped(before=1, behind=1)
    make_pipeline("name-dims,fold-constants").run(model)
    with pytest.raises(ir.CheckError, match="to its last 1 tokens"):
        UncropCache().run(model)


def test_what_is_cut_in_two_ways_is_no_such_cache() -> None:
    model = cropped(before=KEPT, behind=KEPT + 1)
    make_pipeline("name-dims,fold-constants").run(model)
    assert UncropCache().run(model) == 0


def test_finds_nothing_in_a_cache_that_grows() -> None:
    assert UncropCache().run(named(Block(visible="window"))) == 0
