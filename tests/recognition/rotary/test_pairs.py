"""Rotations whose pairs are written out, part by part."""

import dataclasses
import itertools

import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.passes.fuse_rotary import FuseRotary
from omforge.recognition.interface import activations
from omforge.recognition.rotary import pairs as rotary_pairs
from omforge.rewriting.events import events
from omforge.testing.mutations import edits
from tests.passes.blocks import Block, fused, named, ops, steps

ROTARY = Block(rotary="half", size=8, visible="", padding=False)

TABLES = {
    "cos = Unsqueeze (cos_b": "cos = Unsqueeze (cos_a",
    "sin = Unsqueeze (sin_b": "sin = Unsqueeze (sin_a",
    "cos_b = Concat <axis = -1> (cos_a, cos_a)": "",
    "sin_b = Concat <axis = -1> (sin_a, sin_a)": "",
    "float[8, 16] head": (
        "int64[4] i_flat = {0, 0, 0, -1}, int64[5] i_pairs = {0, 0, 0, 4, 2}, int64[1] i_m1 = {-1},"
        " float[8, 16] head"
    ),
}

TAKEN = {
    "halves": "{x}_1 = Slice ({x}, i_0, i_4, i_3) {x}_2 = Slice ({x}, i_4, i_9999, i_3)",
    "split": "{x}_1, {x}_2 = Split <axis = -1, num_outputs = 2> ({x})",
    "neighbours": (
        "{x}_1 = Slice ({x}, i_0, i_9999, i_3, i_2) {x}_2 = Slice ({x}, i_1, i_9999, i_3, i_2)"
    ),
    "a view as pairs": (
        "{x}_v = Reshape ({x}, i_pairs) {x}_1g = Slice ({x}_v, i_0, i_1, i_m1)"
        " {x}_2g = Slice ({x}_v, i_1, i_2, i_m1) {x}_1 = Squeeze ({x}_1g, i_m1)"
        " {x}_2 = Squeeze ({x}_2g, i_m1)"
    ),
}
TURNED = (
    "{x}_ac = Mul ({x}_1, cos) {x}_bs = Mul ({x}_2, sin)"
    " {x}_bc = Mul ({x}_2, cos) {x}_as = Mul ({x}_1, sin)"
)
USUAL = "{x}_re = Sub ({x}_ac, {x}_bs) {x}_im = Add ({x}_bc, {x}_as)"
OTHER_WAY = "{x}_re = Add ({x}_ac, {x}_bs) {x}_im = Sub ({x}_bc, {x}_as)"
GIVEN = {
    "halves": "{x}_r = Concat <axis = -1> ({x}_re, {x}_im)",
    "neighbours": (
        "{x}_ru = Unsqueeze ({x}_re, i_4) {x}_iu = Unsqueeze ({x}_im, i_4)"
        " {x}_st = Concat <axis = 4> ({x}_ru, {x}_iu) {x}_r = Reshape ({x}_st, i_flat)"
    ),
}


def block(
    taken: str = "halves", given: str = "halves", signs: str = USUAL, base: Block = ROTARY
) -> Block:
    """The block with its rotations written out in pairs."""
    changes = dict(TABLES)
    for x in ("q4", "k4"):
        written = " ".join((TAKEN[taken], TURNED, signs, GIVEN[given]))
        changes |= {
            f"{x}_1 = Slice ({x}, i_0, i_4, i_3)": "",
            f"{x}_2 = Slice ({x}, i_4, i_9999, i_3)": "",
            f"{x}_n = Neg ({x}_2)": "",
            f"{x}_t = Concat <axis = -1> ({x}_n, {x}_1)": "",
            f"{x}_cos = Mul ({x}, cos)": "",
            f"{x}_sin = Mul ({x}_t, sin)": "",
            f"{x}_r = Add ({x}_cos, {x}_sin)": written.format(x=x),
        }
    changes["float[8, 16] head"] = (
        "int64[1] i_1 = {1}, int64[1] i_2 = {2}, int64[1] i_4 = {4}, "
        + changes["float[8, 16] head"]
    )
    text = dataclasses.replace(base, edits=()).text()
    for name in ("1", "2", "4"):  # not twice
        if f"int64[1] i_{name} = " in text:
            changes["float[8, 16] head"] = changes["float[8, 16] head"].replace(
                f"int64[1] i_{name} = {{{name}}}, ", "", 1
            )
    return dataclasses.replace(base, edits=tuple(changes.items()))


def rotations(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "RotaryEmbedding"]


def interleaved(model: ir.Model) -> list[bool]:
    return ["interleaved" in node.attributes for node in rotations(model)]


# --- spellings --------------------------------------------------------------------------------


@pytest.mark.parametrize("signs", [USUAL, OTHER_WAY], ids=["usual", "other way"])
@pytest.mark.parametrize("taken", ["halves", "split"])
def test_raises_halves(taken: str, signs: str) -> None:
    model = fused(FuseRotary(), block(taken, signs=signs))
    assert interleaved(model) == [False, False]
    assert not events(model)
    assert [node.inputs[0].name for node in rotations(model) if node.inputs[0]] == ["q", "k"]
    assert not {"Sub", "Slice", "Neg"} & set(ops(model))


@pytest.mark.parametrize("signs", [USUAL, OTHER_WAY], ids=["usual", "other way"])
@pytest.mark.parametrize("taken", ["neighbours", "a view as pairs"])
def test_raises_neighbours(taken: str, signs: str) -> None:
    model = fused(FuseRotary(), block(taken, "neighbours", signs))
    assert interleaved(model) == [True, True]
    assert not events(model)
    assert [node.inputs[0].name for node in rotations(model) if node.inputs[0]] == ["q", "k"]
    assert not {"Sub", "Slice"} & set(ops(model))


@pytest.mark.parametrize("signs", [USUAL, OTHER_WAY], ids=["usual", "other way"])
@pytest.mark.parametrize("taken", ["neighbours", "a view as pairs"])
def test_keeps_the_permutation_of_neighbours_that_become_halves(taken: str, signs: str) -> None:
    """Exact for queries alone: it cancels in the scores only if the keys have it too."""
    model = fused(FuseRotary(), block(taken, "halves", signs))
    assert interleaved(model) == [False, False]
    assert not events(model)
    for node in rotations(model):
        assert node.inputs[0] is not None
        names: list[str] = []
        value = node.inputs[0]
        while (maker := value.producer()) is not None and maker.op_type != "MatMul":
            names.append(maker.op_type)
            assert maker.inputs[0] is not None
            value = maker.inputs[0]
        assert names[:3] == ["Reshape", "Transpose", "Concat"]


def test_halves_that_become_neighbours_keep_both_parts_apart() -> None:
    model = fused(FuseRotary(), block("halves", "neighbours"))
    assert interleaved(model) == [False, False]
    assert ops(model).count("Split") == 2
    assert not events(model)


SPELLINGS: dict[str, tuple[str, str]] = {
    "added to what is negative": (
        USUAL, "{x}_m = Neg ({x}_bs) {x}_re = Add ({x}_ac, {x}_m) {x}_im = Add ({x}_as, {x}_bc)"),
    "the negative first": (
        USUAL, "{x}_m = Neg ({x}_bs) {x}_re = Add ({x}_m, {x}_ac) {x}_im = Add ({x}_bc, {x}_as)"),
    "the sum before the difference": (
        USUAL, "{x}_im = Add ({x}_bc, {x}_as) {x}_re = Sub ({x}_ac, {x}_bs)"),
    "a negative factor": (
        "{x}_bs = Mul ({x}_2, sin)", "{x}_n2 = Neg ({x}_2) {x}_bs = Mul (sin, {x}_n2)"),
}  # fmt: skip


def respelled(case: str, base: Block) -> Block:
    old, new = SPELLINGS[case]
    edits: list[tuple[str, str]] = []
    for key, text in base.edits:
        for x in ("q4", "k4"):
            text = text.replace(old.format(x=x), new.format(x=x))
        if case == "a negative factor":
            text = text.replace("re = Sub", "re = Add")
        edits.append((key, text))
    return dataclasses.replace(base, edits=tuple(edits))


@pytest.mark.parametrize("case", SPELLINGS)
def test_raises_every_spelling(case: str) -> None:
    model = fused(FuseRotary(), respelled(case, block()))
    assert len(rotations(model)) == 2
    assert not events(model)


def edited(changes: dict[str, str], base: Block | None = None) -> Block:
    """The block in pairs, changed once more."""
    base = base or block()
    return dataclasses.replace(base, edits=(*base.edits, *changes.items()))


def test_rotates_part_of_a_head_among_others() -> None:
    """[untouched, re, im] in one Concat: the rotated part need not come first."""
    changes = {
        "q4_1 = Slice (q4, i_0, i_4, i_3)": "q4_1 = Slice (q4, i_2, i_4, i_3)",
        "q4_2 = Slice (q4, i_4, i_9999, i_3)": (
            "q4_2 = Slice (q4, i_4, i_6, i_3) q4_a = Slice (q4, i_0, i_2, i_3)"
            " q4_z = Slice (q4, i_6, i_9999, i_3) cos_q = Slice (cos, i_0, i_2, i_3)"
            " sin_q = Slice (sin, i_0, i_2, i_3)"
        ),
        "Mul (q4_1, cos)": "Mul (q4_1, cos_q)", "Mul (q4_2, cos)": "Mul (q4_2, cos_q)",
        "Mul (q4_1, sin)": "Mul (q4_1, sin_q)", "Mul (q4_2, sin)": "Mul (q4_2, sin_q)",
        "q4_r = Concat <axis = -1> (q4_re, q4_im)": (
            "q4_r = Concat <axis = -1> (q4_a, q4_re, q4_im, q4_z)"),
        "int64[4] i_flat": "int64[1] i_6 = {6}, int64[4] i_flat",
    }  # fmt: skip
    model = fused(FuseRotary(), edited(changes))
    assert len(rotations(model)) == 2
    joins = [n for n in model.graph if n.op_type == "Concat" and n.outputs[0].name == "q4_r"]
    assert [len(node.inputs) for node in joins] == [3]  # what was rotated is one of them


def test_parts_that_are_used_apart_stay_apart() -> None:
    numbers = ", ".join(str(n % 7 / 10) for n in range(128))
    changes = {
        "hidden = MatMul (joined, wo)": (
            "seen = Transpose <perm = [0, 2, 1, 3]> (q4_re) seen_f = Reshape (seen, i_flat2)"
            " more = MatMul (seen_f, wmore) hidden_a = MatMul (joined, wo)"
            " hidden = Add (hidden_a, more)"
        ),
        "int64[4] i_flat": (
            f"int64[3] i_flat2 = {{0, 0, -1}}, float[16, 8] wmore = {{{numbers}}}, int64[4] i_flat"
        ),
    }
    model = fused(FuseRotary(), edited(changes))
    assert len(rotations(model)) == 2
    assert ops(model).count("Split") == 1


@pytest.mark.parametrize("sizes", [{"batch": "1"}, {"seq": "1"}, {"seq": "3", "past": "4"}])
def test_raises_exports_with_fixed_sizes(sizes: dict[str, str]) -> None:
    base = dataclasses.replace(ROTARY, **sizes)  # type: ignore[arg-type]
    model = fused(FuseRotary(), block(base=base))
    assert len(rotations(model)) == 2


def test_each_number_may_stand_in_an_axis_of_its_own() -> None:
    """As exporters write products of complex numbers: [..., 1] parts of [..., 2]."""
    changes: dict[str, str] = {}
    for x in ("q4", "k4"):
        changes |= {
            f"{x}_1 = Squeeze ({x}_1g, i_m1)": f"{x}_1 = Identity ({x}_1g)",
            f"{x}_2 = Squeeze ({x}_2g, i_m1)": f"{x}_2 = Identity ({x}_2g)",
            f"{x}_ru = Unsqueeze ({x}_re, i_4)": f"{x}_ru = Identity ({x}_re)",
            f"{x}_iu = Unsqueeze ({x}_im, i_4)": f"{x}_iu = Identity ({x}_im)",
        }
        for part in ("1", "2"):
            changes[f"Mul ({x}_{part}, cos)"] = f"Mul ({x}_{part}, cos_u)"
            changes[f"Mul ({x}_{part}, sin)"] = f"Mul ({x}_{part}, sin_u)"
    changes["q4_v = Reshape"] = (
        "cos_u = Unsqueeze (cos, i_m1) sin_u = Unsqueeze (sin, i_m1) q4_v = Reshape"
    )
    model = fused(FuseRotary(), edited(changes, block("a view as pairs", "neighbours")))
    assert interleaved(model) == [True, True]
    assert not events(model)


def test_tables_that_are_looked_up_need_no_halving() -> None:
    model = fused(
        FuseRotary(), block(base=dataclasses.replace(ROTARY, tables="gathered"), signs=OTHER_WAY)
    )
    assert len(rotations(model)) == 2
    (event,) = events(model)
    assert "its table is kept as it stands: 0 Cos and 0 Sin" in event.reason


# --- left alone -------------------------------------------------------------------------------

LEFT_ALONE: dict[str, dict[str, str]] = {
    "both are differences": {"q4_im = Add (": "q4_im = Sub ("},
    "both are sums": {"q4_re = Sub (": "q4_re = Add ("},
    "one has the other's tables": {"q4_bc = Mul (q4_2, cos)": "q4_bc = Mul (q4_2, sin)"},
    "one part twice": {"q4_as = Mul (q4_1, sin)": "q4_as = Mul (q4_2, sin)"},
    "another sine": {
        "q4_as = Mul (q4_1, sin)": "sin_2 = Mul (sin, sin) q4_as = Mul (q4_1, sin_2)"},
    "a shifted sum": {
        "q4_im = Add (q4_bc, q4_as)": "q4_ah = Abs (q4_as) q4_im = Add (q4_bc, q4_ah)"},
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_leaves_alone(case: str) -> None:
    """The keys' embedding is as it should be: alone the queries' is spoilt."""
    model = fused(FuseRotary(), edited(LEFT_ALONE[case]))
    assert len(rotations(model)) == 1
    assert "q4_ac" in [value.name for node in model.graph for value in node.outputs]
    assert any("are no rotation" in event.reason for event in events(model))


def test_other_parts_are_rotated_as_they_are() -> None:
    """Parts that are no halves of one value, and tables that are swapped, are a rotation too."""
    changes = {"q4_2 = Slice (q4, i_4, i_9999, i_3)": (
        "q4_2 = Slice (q4_w, i_4, i_9999, i_3)"), "q4_1 = ": "q4_w = Neg (q4) q4_1 = "}  # fmt: skip
    model = fused(FuseRotary(), edited(changes))
    assert len(rotations(model)) == 2
    swapped = {f"Mul ({x}_{part}, {table})": f"Mul ({x}_{part}, {table}!)"
               for x in ("q4", "k4") for part in (1, 2) for table in ("cos", "sin")}  # fmt: skip
    swapped |= {"cos!": "sin", "sin!": "cos"}
    model = fused(FuseRotary(), edited(swapped))
    assert len(rotations(model)) == 2


def test_no_pairs_among_products_of_activations() -> None:
    model = named(block())
    live = activations(model)
    found = [rotary_pairs.find(node, live) for node in model.graph]
    assert [pairs.re.name for pairs in found if pairs] == ["q4_re", "k4_re"]
    everything = {value for node in model.graph for value in node.outputs}
    assert not any(rotary_pairs.find(node, everything) for node in model.graph)


@pytest.mark.parametrize(("taken", "given"), [("halves", "halves"), ("neighbours", "halves")])
def test_what_is_rotated_after_one_change_is_what_was_written(taken: str, given: str) -> None:
    """Near misses, one in twenty: each keeps the numbers of the changed text, raised or not."""
    written = block(taken, given)
    model = named(written)
    feeds = list(steps(written))[3]
    tried = 0
    for change, edit in itertools.islice(edits(model), 7, None, 20):
        mutant = model.clone()
        edit(mutant)
        before = mutant.clone()
        try:
            expected = numerics.run(before, feeds)
        except Exception as error:  # onnxruntime's own errors share no base class
            if type(error).__module__.startswith(("onnx", "onnxruntime")):
                continue
            raise
        FuseRotary().run(mutant)
        got = numerics.run(mutant, feeds)
        for name, reference in expected.items():
            allowed = numerics.Tolerance(rtol=1e-3, atol=1e-3)
            assert numerics.within(got[name], reference, allowed), change
        tried += 1
    assert tried > 3
