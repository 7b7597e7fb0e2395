"""Which input and output of a causal LM is for what, whatever they are called."""

from collections.abc import Callable
from pathlib import Path

import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.passes import make_pipeline
from omforge.recognition.interface import (
    activations,
    attention_mask_of,
    cache_layers,
    find_interface,
    is_weight,
    states,
    table_rows,
)
from omforge.recognition.views import shape_of
from omforge.testing import parse
from tests.exports import EXPORTS
from tests.passes.blocks import HIDDEN, VOCABULARY, Block

OPEN = '<ir_version: 11, opset_import: ["" : 24]>\n'


def test_finds_all_roles() -> None:
    found = find_interface(parse(Block(rotary="half").text()))
    assert found.input_ids.name == "input_ids"
    assert found.attention_mask is not None
    assert found.attention_mask.name == "attention_mask"
    assert found.position_ids is not None
    assert found.position_ids.name == "position_ids"
    pairs = [(past.name, present.name) for past, present in found.caches]
    assert pairs == [("past_key", "present_key"), ("past_value", "present_value")]
    assert found.logits.name == "logits"
    assert found.extra == ()


def test_names_do_not_matter() -> None:
    text = Block(rotary="half").text()
    for index, name in enumerate(("input_ids", "position_ids", "past_key", "past_value")):
        text = text.replace(name, f"thing_{index}")
    text = text.replace("attention_mask", "thing_4").replace("logits", "thing_5")
    found = find_interface(parse(text))
    assert found.input_ids.name == "thing_0"
    assert found.position_ids is not None
    assert found.position_ids.name == "thing_1"
    assert [past.name for past, _ in found.caches] == ["thing_2", "thing_3"]
    assert found.attention_mask is not None
    assert found.attention_mask.name == "thing_4"
    assert found.logits.name == "thing_5"


def test_a_boolean_mask_is_one() -> None:
    text = Block().text().replace("int64[batch, total] attention", "bool[batch, total] attention")
    found = find_interface(parse(text))
    assert found.attention_mask is not None
    assert attention_mask_of(parse(text)) is not None


def test_a_mask_that_the_caller_makes_is_one() -> None:
    text = (
        Block()
        .text()
        .replace("int64[batch, total] attention_mask", "float[batch, 1, seq, total] attention_mask")
    )
    found = find_interface(parse(text))
    assert found.attention_mask is not None
    assert found.attention_mask.name == "attention_mask"
    assert [past.name for past, _ in found.caches] == ["past_key", "past_value"]
    # It is the same for every prompt of the same length and padding.
    live = {value.name for value in activations(parse(text))}
    assert {"attention_mask", "past_key"} & live == {"past_key"}


def test_counted_slots_are_no_position_ids() -> None:
    positions = "int64[batch, seq] position_ids"
    text = Block().text().replace(positions, f"int64[seq] cache_position, {positions}")
    found = find_interface(parse(text))
    assert found.position_ids is not None
    assert found.position_ids.name == "position_ids"
    assert [value.name for value in found.extra] == ["cache_position"]


def test_learned_positions_are_not_taken_for_tokens() -> None:
    text = Block().text()
    order = text.replace("int64[batch, seq] input_ids, ", "").replace(
        "position_ids, ", "position_ids, int64[batch, seq] input_ids, "
    )
    looked = order.replace(
        "x = Gather (table, input_ids)",
        "p = Gather (table, position_ids) t = Gather (table, input_ids) x = Add (p, t)",
    )
    assert find_interface(parse(looked)).input_ids.name == "input_ids"


def test_another_output_is_not_taken_for_logits() -> None:
    text = Block(outputs=("float[batch, seq, 8] hidden",)).text()
    text = text.replace("float[batch, seq, 16] logits, ", "").replace(
        "hidden)\n", "hidden, float[batch, seq, 16] logits)\n", 1
    )
    assert find_interface(parse(text)).logits.name == "logits"


def test_a_model_without_cache_and_mask() -> None:
    found = find_interface(parse(Block(cache=False, padding=False, positions=False).text()))
    assert found.caches == ()
    assert found.attention_mask is None
    assert found.position_ids is None


NOT_LMS = {
    "no tokens": (
        "g (float[B, S, 8] x) => (float[B, S, 8] y) { y = Neg (x) }",
        "no integer input .* looks up rows of an embedding",
    ),
    "no logits": (
        "g (int64[B, S] ids) => (int64 y) <float[2, 2] t = {1, 2, 3, 4}>"
        " { a = Gather (t, ids) y = ArgMax (a) }",
        "no output is logits",
    ),
    "tokens without a batch": (
        "g (int64[S] ids) => (float[S, 2] y) <float[2, 2] t = {1, 2, 3, 4}>"
        " { y = Gather (t, ids) }",
        "no integer input",
    ),
}


@pytest.mark.parametrize("case", NOT_LMS)
def test_refuses_what_is_no_language_model(case: str) -> None:
    text, why = NOT_LMS[case]
    with pytest.raises(ir.InputError, match=why):
        find_interface(parse(OPEN + text))


@pytest.mark.parametrize(("route", "family"), EXPORTS)
def test_finds_the_roles_of_real_exports(
    route: str, family: str, exported: Callable[[str, str], Path]
) -> None:
    model = ir.load(exported(route, family))
    if any(node.domain == "com.microsoft" for node in model.graph):
        pytest.skip("its caches end in operators that are raised first")
    infer_model(model)
    found = find_interface(model)
    assert len(found.caches) == 4
    assert found.input_ids.name == "input_ids"
    assert found.logits.name == "logits"
    assert found.attention_mask is not None


# --- weights and activations ------------------------------------------------------------------


def test_what_is_made_of_weights_alone_is_one() -> None:
    text = """g (int64[B, S] ids) => (float y)
    <float[2, 3] t = {1, 2, 3, 4, 5, 6}, int8[3] q = {1, 2, 3}, float s = {0.5}> {
        moved = Transpose (t) again = Identity (moved) full = DequantizeLinear (q, s)
        x = Gather (t, ids) hot = Transpose (x) y = Mul (x, full)
    }"""
    model = parse(OPEN + text)
    values = {v.name: v for node in model.graph for v in node.outputs}
    weights = [name for name, value in values.items() if is_weight(value)]
    assert weights == ["moved", "again", "full"]
    assert is_weight(model.graph.initializers["t"])
    assert not is_weight(model.graph.inputs[0])


def test_activations_depend_on_tokens_and_caches_but_not_by_their_shapes() -> None:
    model = parse(Block(rotary="half").text())
    live = {value.name for value in activations(model)}
    assert {"input_ids", "x", "q4", "present_key", "probs", "logits"} <= live
    assert not {"bias", "cos", "sin", "attention_mask", "position_ids", "total1"} & live


def test_layers_have_a_cache_each_raised_or_not() -> None:
    model = parse(Block(rotary="half").text())
    interface = find_interface(model)
    (layer,) = cache_layers(model, interface)
    assert layer.block is None
    assert [value.name for value in layer.past] == ["past_key", "past_value"]
    assert [value.name for value in layer.present] == ["present_key", "present_value"]
    make_pipeline("raise").run(model)
    (raised,) = cache_layers(model, find_interface(model))
    assert raised.block is not None
    assert raised.block.op_type == "Attention"
    assert [value.name for value in raised.past] == ["past_key", "past_value"]
    assert [value.name for value in raised.present] == ["present_key", "present_value"]


RECURRENT = (
    OPEN
    + """g (int64[batch, seq] input_ids, float[batch, 2, 4] conv, float[batch, 2, 4] ssm,
         float[batch, 2, 4] unused, float[batch, 2, past, 2] pk)
       => (float[batch, seq, 4] logits, float[batch, 2, 4] new_conv, float[batch, 2, 4] new_ssm,
           float[batch, 2, total, 2] key)
    <float[4, 4] words = {0,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6}, int64[4] heads = {0, 0, 2, 2},
     int64[1] one = {1}> {
        x = Gather (words, input_ids)
        logits = Neg (x)
        split = Reshape (x, heads)
        k = Transpose <perm = [0, 2, 1, 3]> (split)
        key = Concat <axis = 2> (pk, k)
        sum = ReduceSum <keepdims = 1> (x, one)
        new_conv = Add (conv, sum)
        both = Add (ssm, new_conv)
        new_ssm = Tanh (both)
    }"""
)


def test_states_are_inputs_that_an_output_of_like_shape_renews() -> None:
    model = parse(RECURRENT)
    infer_model(model)
    found = states(model, find_interface(model))
    pairs = [(given.name, renewed.name) for given, renewed in found]
    assert pairs == [("conv", "new_conv"), ("ssm", "new_ssm")]


def test_a_cache_without_a_partner_is_refused() -> None:
    model = parse(RECURRENT)
    infer_model(model)
    with pytest.raises(ir.CheckError, match="no pairs of keys and values: pk"):
        cache_layers(model, find_interface(model))


def test_tokens_are_what_the_model_scores_whatever_else_is_looked_up() -> None:
    """Segments and learned positions are looked up, too, and their tables may be longer."""
    text = """g (int64[B, S] segments, int64[B, S] places, int64[B, S] words)
       => (float[B, S, 9] hidden, float[B, S, 3] scores)
    <float[2, 9] a, float[5, 9] b, float[3, 9] c, float[9, 3] head> {
        x = Gather (a, segments) y = Gather (b, places) z = Gather (c, words)
        sum = Sum (x, y, z) hidden = Neg (sum) scores = MatMul (hidden, head)
    }"""
    for name, rows in (("a", 2), ("b", 5), ("c", 3)):
        numbers = ", ".join("1" for _ in range(rows * 9))
        text = text.replace(f"float[{rows}, 9] {name}", f"float[{rows}, 9] {name} = {{{numbers}}}")
    text = text.replace("[9, 3] head", f"[9, 3] head = {{{', '.join('1' for _ in range(27))}}}")
    model = parse(OPEN + text)
    infer_model(model)
    found = find_interface(model)
    assert (found.input_ids.name, found.logits.name) == ("words", "scores")


@pytest.mark.parametrize("name", ["inputs_embeds", "x"])
def test_embeddings_in_place_of_tokens(name: str) -> None:
    """Beside a cache they are what is as long as the logits, whatever they are called."""
    edits = (
        ("x = Gather (table, input_ids)", "x = Identity (input_ids)"),
        ("int64[batch, seq] input_ids", f"float[batch, seq, {HIDDEN}] input_ids"),
    )
    text = Block(edits=edits).text().replace("input_ids", name if name != "x" else "hidden_in")
    found = find_interface(parse(text))
    assert found.embedded
    assert (found.tokens, len(found.caches)) == (shape_of(found.input_ids)[:2], 2)


SEGMENTS = (
    (
        "x = Gather (table, input_ids)",
        "x_a = Gather (table, input_ids) x_b = Gather (few, KIND) x = Add (x_a, x_b)",
    ),
    ("int64[batch, seq] input_ids", "int64[batch, seq] input_ids, int64[batch, seq] KIND"),
    (
        "float[16, 8] table",
        "float[3, 8] few = {" + ", ".join(["0.5"] * 24) + "}, float[16, 8] table",
    ),
)


@pytest.mark.parametrize("name", ["token_type_ids", "kinds"])
def test_what_picks_one_of_few_rows_is_no_position(name: str) -> None:
    """It has the tokens' shape, as position_ids do: BERT's token_type_ids."""
    edits = tuple((old, new.replace("KIND", name)) for old, new in SEGMENTS)
    block = Block(cache=False, positions=False, edits=edits)
    model = parse(block.text())
    make_pipeline("name-dims,fold-constants").run(model)
    found = find_interface(model)
    assert found.position_ids is None
    assert [value.name for value in found.by_token] == [name]
    assert table_rows(found.by_token[0]) == 3
    assert table_rows(found.input_ids) == VOCABULARY


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ("batch, 80, 3000", "its input x [batch, 80, 3000] is neither token ids nor embeddings"),
        ("batch, 3, 224, 224", "its input x [batch, 3, 224, 224] is neither token ids"),
        ("batch, 7", "no integer input [batch, sequence] looks up rows"),
    ],
)
def test_a_model_of_sound_or_images_is_named(shape: str, told: str) -> None:
    model = parse(f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[{shape}] x) => (float[{shape}] y) {{ y = Relu (x) }}""")
    with pytest.raises(ir.InputError) as caught:
        find_interface(model)
    assert told in str(caught.value)
