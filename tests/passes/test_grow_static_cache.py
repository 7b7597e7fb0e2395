"""grow-static-cache: a cache of fixed size that the graph writes into becomes one that grows."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.passes import make_pipeline
from omforge.passes.grow_static_cache import GrowStaticCache, require_growing_cache
from omforge.recognition.cache.exported import exported_caches, exported_counters
from omforge.rewriting.events import events
from omforge.testing import parse
from tests.passes.blocks import HIDDEN, VOCABULARY, Writer, ops

SLOTS = 7

ND = """{0}_t = Transpose <perm = [2, 0, 1, 3]> (past_{0}) {0}_n = Transpose <perm = [2, 0, 1, 3]> ({1})
    {0}_at = Unsqueeze (cache_position, axis1) {0}_w = ScatterND ({0}_t, {0}_at, {0}_n)
    present_{0} = Transpose <perm = [1, 2, 0, 3]> ({0}_w) all_{0} = Identity (present_{0})"""
TENSOR = """present_{0} = TensorScatter <axis = 2> (past_{0}, {1}, write_indices)
    all_{0} = Identity (present_{0})"""
ELEMENTS = """{0}_s = Shape ({1}) {0}_c = Unsqueeze (cache_position, axes) {0}_i = Expand ({0}_c, {0}_s)
    present_{0} = ScatterElements <axis = 2> (past_{0}, {0}_i, {1}) all_{0} = Identity (present_{0})"""
ONE_HOT = """{0}_u = Unsqueeze (cache_position, axis1) {0}_e = Equal (slots, {0}_u)
    {0}_h = Reshape ({0}_e, column) present_{0} = Where ({0}_h, {1}, past_{0})
    all_{0} = Identity (present_{0})"""


def text(write: str, counters: str = "") -> str:
    """One layer whose mask is made of cache_position, for all slots."""
    w = Writer()
    w.weights("table", VOCABULARY, HIDDEN, scale=1.0)
    w.add("x = Gather (table, input_ids)")
    for name in ("q", "k", "v"):
        w.add(f"""
            {name} = MatMul (x, {w.weights(f"w{name}", HIDDEN, 8)})
            {name}s = Reshape ({name}, {w.ints(0, 0, 2, 4)})
            {name}4 = Transpose <perm = [0, 2, 1, 3]> ({name}s)""")
    w.constants["axis1"] = "int64[1] axis1 = {1}"
    w.constants["axes"] = "int64[3] axes = {0, 1, 3}"
    w.constants["column"] = f"int64[4] column = {{1, 1, {SLOTS}, 1}}"
    w.constants["slots"] = f"int64[1, {SLOTS}] slots = {{{', '.join(map(str, range(SLOTS)))}}}"
    for role, name in (("key", "k4"), ("value", "v4")):
        w.add(write.format(role, name))
    w.add(f"""
        kt = Transpose <perm = [0, 1, 3, 2]> (all_key)
        raw = MatMul (q4, kt)
        scores = Mul (raw, {w.number("half", 0.5)})
        rows = Unsqueeze (cache_position, axis1)
        seen = LessOrEqual (slots, rows)
        bias = Where (seen, {w.number("zero", 0.0)}, {w.number("low", -1e9)})
        masked = Add (scores, bias)
        probs = Softmax <axis = -1> (masked)
        mixed = MatMul (probs, all_value)
        joined = Transpose <perm = [0, 2, 1, 3]> (mixed)
        flat = Reshape (joined, {w.ints(0, 0, 8)})
        hidden = MatMul (flat, {w.weights("wo", 8, HIDDEN)})
        logits = MatMul (hidden, {w.weights("head", HIDDEN, VOCABULARY)})""")
    cache = f"float[batch, 2, {SLOTS}, 4]"
    return (
        '<ir_version: 11, opset_import: ["" : 24]>\n'
        f"g (int64[batch, seq] input_ids, int64[seq] cache_position{counters},\n"
        f"   {cache} past_key, {cache} past_value)\n"
        f"=> (float[batch, seq, {VOCABULARY}] logits, {cache} present_key, {cache} present_value)\n"
        f"<{', '.join(w.constants.values())}>\n{{\n" + "\n".join(w.lines) + "\n}"
    )


def grown(source: str) -> ir.Model:
    model = parse(source)
    make_pipeline("name-dims,fold-constants,remove-no-ops,grow-static-cache").run(model)
    return model


def counted(past: int, seq: int, batch: int) -> dict[str, np.ndarray]:
    return {
        "cache_position": np.arange(past, past + seq),
        "write_indices": np.full(batch, past),
        "nonpad_kv_seqlen": np.full(batch, past + seq),
    }


def assert_same(before: ir.Model, after: ir.Model, slots_axis: int = 2) -> None:
    """What the valid slots give, whatever lies behind them."""
    names = {value.name for value in after.graph.inputs}
    for number, (batch, seq, past) in enumerate([(1, 4, 0), (2, 1, 3), (2, 3, 4)]):
        random = np.random.default_rng(number)
        shapes = {v.name: v.shape for v in before.graph.inputs}
        feeds = {"input_ids": random.integers(0, VOCABULARY, (batch, seq))}
        feeds |= {n: a for n, a in counted(past, seq, batch).items() if n in shapes}
        new = {n: a for n, a in feeds.items() if n in names}
        for name in ("past_key", "past_value"):
            size = [batch, *(int(dim) for dim in list(shapes[name])[1:])]
            feeds[name] = random.standard_normal(size).astype(np.float32)
            valid = feeds[name].take(range(past), axis=slots_axis)
            # [B, K, P, D] of [B, P, K*D]
            new[name] = (
                valid if valid.ndim == 4 else valid.reshape(batch, past, 2, 4).swapaxes(1, 2)
            )
        expected, got = numerics.run(before, feeds), numerics.run(after, new)
        np.testing.assert_allclose(got["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
        for name in ("present_key", "present_value"):
            wanted = expected[name].take(range(past + seq), axis=slots_axis)
            if wanted.ndim == 3:
                wanted = wanted.reshape(batch, past + seq, 2, 4).swapaxes(1, 2)
            np.testing.assert_allclose(got[name], wanted, rtol=1e-5, atol=1e-6)


WRITES = {
    "ScatterND": text(ND),
    "ScatterElements": text(ELEMENTS),
    "TensorScatter": text(TENSOR, ", int64[batch] write_indices"),
}


@pytest.mark.parametrize("name", WRITES)
def test_it_gives_what_the_valid_slots_give(name: str) -> None:
    model = grown(WRITES[name])
    assert [e for e in events(model) if e.pass_name == GrowStaticCache.name] == []
    ir.check(model)
    assert not {"ScatterND", "ScatterElements", "TensorScatter"} & set(ops(model))
    assert [(v.name, str(v.shape)) for v in model.graph.inputs] == [
        ("input_ids", "[batch,seq]"),
        ("past_key", "[batch,2,past,4]"),
        ("past_value", "[batch,2,past,4]"),
    ]
    assert_same(parse(WRITES[name]), model)
    assert {cache.shape for cache in exported_caches(model)} == {("batch", 2, SLOTS, 4)}
    counts = {counter.input: counter.counts for counter in exported_counters(model)}
    assert counts["cache_position"] == "slots"
    assert counts.get("write_indices", "start") == "start"
    # And its attention is raised like any other.
    make_pipeline("raise").run(model)
    assert ops(model).count("Attention") == 1
    assert_same(parse(WRITES[name]), model)


def attending(causal: int) -> str:
    """The exporter's own `Attention` over all slots."""
    lines = text(TENSOR, ", int64[batch] write_indices, int64[batch] nonpad_kv_seqlen")
    lines = lines.replace("(past_key, k4,", "(past_key, k,").replace(
        "(past_value, v4,", "(past_value, v,"
    )
    lines = lines.replace("TensorScatter <axis = 2>", "TensorScatter <axis = 1>")
    lines = lines.replace(f"float[batch, 2, {SLOTS}, 4]", f"float[batch, {SLOTS}, 8]")
    start, end = lines.index("kt = Transpose"), lines.index("hidden = MatMul")
    node = (
        f"flat = Attention <is_causal = {causal}, q_num_heads = 2, kv_num_heads = 2>"
        " (q, all_key, all_value, , , , nonpad_kv_seqlen)\n"
    )
    return lines[:start] + node + lines[end:]


def test_attention_that_is_told_how_many_slots_are_valid_gets_a_past() -> None:
    model = grown(attending(1))
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert [v.name for v in attention.inputs[4:6] if v] == ["past_key", "past_value"]
    assert_same(parse(attending(1)), model, slots_axis=1)


LEFT = {
    # One slot only can be told from the others by a comparison.
    "does not write": text(ONE_HOT),
    "not causal behind nonpad_kv_seqlen": attending(0),
    "traced with a fixed number of tokens": text(
        "{0}_f = Reshape ({1}, traced) {0}_g = Reshape ({0}_f, given)"
        + ND.replace("({1})", "({0}_g)")
    ),
    "reads it otherwise": text(ND).replace(
        "logits = MatMul (hidden, head)",
        "plain = MatMul (hidden, head) most = ReduceMax <keepdims = 0> (past_key)"
        " logits = Add (plain, most)",
    ),
}
LEFT["traced with a fixed number of tokens"] = (
    LEFT["traced with a fixed number of tokens"]
    .replace(
        "{\nx = Gather",
        ", int64[3] traced = {2, 4, 4}, int64[4] given = {1, 2, -1, 4}>\n{\nx = Gather",
    )
    .replace(">\n, int64[3]", ", int64[3]")
)


@pytest.mark.parametrize("why", LEFT)
def test_what_is_written_otherwise_is_named(why: str) -> None:
    model = grown(LEFT[why])
    assert {"past_key", "cache_position"} <= {v.name for v in model.graph.inputs}
    (event,) = (e for e in events(model) if e.pass_name == GrowStaticCache.name)
    assert f"past_key, of {SLOTS} slots" in event.where
    assert why in event.reason
    with pytest.raises(ir.CheckError, match="cannot be made one that grows"):
        require_growing_cache(model)
