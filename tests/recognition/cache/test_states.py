"""Recurrent states stay inputs and outputs, of the same nodes."""

import re

import numpy as np
import pytest

from omforge import ir
from omforge.compilation.compare_feeds import make_feeds
from omforge.ir.infer import infer_model
from omforge.ir.values import dims
from omforge.passes import make_pipeline
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.recognition.cache.states import find_states
from omforge.recognition.feeds import STEPS, token_feeds
from omforge.recognition.interface import find_interface, states
from omforge.rewriting.events import events
from omforge.runtime.session import OrtSession
from omforge.testing import parse
from tests.passes.recurrent import model as written


def raised(**options: bool | str) -> ir.Model:
    model = parse(written(**options))  # type: ignore[arg-type]
    make_pipeline("raise").run(model)
    return model


def canonical(**options: bool | str) -> ir.Model:
    model = raised(**options)
    LastTokenLogits().run(model)
    FuseKvIo().run(model)
    return model


@pytest.mark.parametrize("swapped", [False, True])
def test_states_are_found_whatever_the_order_of_the_outputs(swapped: bool) -> None:
    model = parse(written(swapped=swapped))
    infer_model(model)
    found = find_states(model, find_interface(model))
    assert [(str(s.past.name), str(s.present.name)) for s in found] == [
        ("conv_state", "new_conv"),
        ("ssm_state", "new_ssm"),
    ]


ALIKE = """<ir_version: 11, opset_import: ["" : 24]>
model (int64[batch, seq] input_ids, float[batch, 4] one, float[batch, 4] two)
   => (float[batch, seq, 4] logits, float[batch, 4] {}, float[batch, 4] {})
<float[2, 4] words = {{0,1,2,3,4,5,6,7}}, int64[1] axis = {{1}}> {{
    x = Gather (words, input_ids)
    sum = ReduceSum <keepdims = 0> (x, axis)
    new_one = Add (one, sum)
    new_two = Add (two, new_one)
    logits = Neg (x)
}}"""


@pytest.mark.parametrize("order", [("new_one", "new_two"), ("new_two", "new_one")])
def test_states_of_one_shape_are_told_apart_by_what_they_reach(order: tuple[str, str]) -> None:
    model = parse(ALIKE.format(*order))
    infer_model(model)
    found = states(model, find_interface(model))
    assert [(a.name, b.name) for a, b in found] == [("one", "new_one"), ("two", "new_two")]


def test_sizes_that_are_written_in_another_way_are_the_same_sizes() -> None:
    text = written().replace("4611686018427387904", "9999")
    model = parse(text)
    infer_model(model)
    interface = find_interface(model)
    (conv, new_conv), _ = states(model, interface)
    assert dims(conv) != dims(new_conv)
    assert (conv.name, new_conv.name) == ("conv_state", "new_conv")


def test_the_interface_carries_the_states_behind_the_cache() -> None:
    model = canonical()
    shapes = {value.name: ", ".join(map(str, dims(value) or ())) for value in model.graph.inputs}
    assert shapes == {
        "input_ids": "batch, seq",
        "position_ids": "batch, seq",
        "logits_index": "rows",
        "attention_mask": "batch, 1, seq, capacity + seq",
        "past_key_values": "2*batch, 2, capacity, 4",
        "past_state.0": "batch, 8, 3",
        "past_state.1": "batch, 4, 4",
    }
    assert [value.name for value in model.graph.outputs] == [
        "logits",
        "present_key_values",
        "present_state.0",
        "present_state.1",
    ]
    assert [dims(v) for v in model.graph.outputs[-2:]] == [dims(v) for v in model.graph.inputs[-2:]]
    ops = [node.op_type for node in model.graph]
    assert ops.count("Attention") == 1
    assert ops.count("RotaryEmbedding") == 2


def test_the_batch_of_a_state_gets_the_name_that_all_others_have() -> None:
    model = raised(conv="float[rows, 8, 3]", linear="float[n, 4, 4]")
    assert [str((dims(v) or ())[0]) for v in model.graph.inputs[-2:]] == ["batch", "batch"]


def test_names_that_the_export_used_already_make_way() -> None:
    text = written().replace("x1", "past_state.1").replace("l_v", "present_state.0")
    model = parse(re.sub(r"(past|present)_state\.", r"\1_state_", text))
    for node in model.graph:
        for value in node.outputs:
            value.name = re.sub(r"^(past|present)_state_", r"\1_state.", value.name or "")
    make_pipeline("raise").run(model)
    FuseKvIo().run(model)
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)
    assert not set(names) & {value.name for value in model.graph.inputs}


def test_a_mask_that_keeps_padding_out_of_a_state_becomes_ones() -> None:
    model, plain = canonical(reads_mask=True), canonical()
    assert [v.name for v in model.graph.inputs] == [v.name for v in plain.graph.inputs]
    told = [event for event in events(model) if "never padded" in event.reason]
    assert len(told) == 1
    feeds = make_feeds(plain, longest=32)[-2]
    one, other = (OrtSession(m).run(feeds) for m in (model, plain))
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize("shape", ["float[batch, seq, 4]", "float[1, 4, 4]"])
def test_a_state_whose_size_is_not_known_is_refused(shape: str) -> None:
    text = written(linear=shape)
    model = parse(text)
    infer_model(model)
    interface = find_interface(model)
    pair = next(v for v in interface.extra if v.name == "ssm_state")
    # An output that grows, or one row for all, fits no shape of the state: it is none.
    assert pair not in [given for given, _ in states(model, interface)]
    make_pipeline("raise").run(model)
    with pytest.raises(ir.CheckError, match="ssm_state is still used"):
        FuseKvIo().run(model)


def test_a_state_without_a_batch_is_refused() -> None:
    model = parse(ALIKE.format("new_one", "new_two").replace("batch", "2", 3))
    infer_model(model)
    model.graph.inputs[0].shape = ir.Shape(["batch", "seq"])
    with pytest.raises(ir.CheckError, match=r"expected one axis of the batch.*\[2, 4\]"):
        find_states(model, find_interface(model))


def test_a_model_of_states_alone_is_refused() -> None:
    model = parse(ALIKE.format("new_one", "new_two"))
    with pytest.raises(ir.InputError, match=r"no KV cache, only recurrent states.*one, two"):
        FuseKvIo().run(model)


@pytest.mark.parametrize("made", [raised, canonical])
def test_states_are_fed_numbers_once_something_is_in_the_past(made) -> None:
    model = made()
    name = next(v.name for v in model.graph.inputs if "state" in str(v.name) and dims(v)[1] == 4)
    for step, feeds in zip(STEPS, make_feeds(model, longest=32), strict=True):
        assert feeds[name].shape == (step.batch, 4, 4)
        assert feeds[name].any() == (step.past > 0)
    if made is raised:
        assert not token_feeds(model, np.ones((2, 3)))[name].any()
