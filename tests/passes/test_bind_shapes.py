"""bind-shapes: numbers for symbols, and what follows from them."""

import pytest

from omforge import ir
from omforge.ir import dims as d
from omforge.ir.values import dims
from omforge.passes.bind_shapes import BindShapes
from omforge.testing import outline, parse

TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[batch, seq, 8] x, float[past_rows, 2, capacity, 4] cache, int64[rows] index)
  => (float y, float z) <int64[1] last = {-1}, int64[1] width = {8}> {
    size = Shape <end = 2> (x)
    target = Concat <axis = 0> (size, width)
    a = Abs (x)
    b = Reshape (a, target)
    flat = Concat <axis = 0> (last, width)
    c = Reshape (b, flat)
    y = Gather (c, index)
    z = Neg (cache)
}"""


def model() -> ir.Model:
    made = parse(TEXT)
    made.graph.inputs[1].shape = ir.Shape([ir.SymbolicDim("4*batch"), 2, "capacity", 4])
    return made


def shapes(bound: ir.Model) -> list[str]:
    return [str(value.shape) for value in (*bound.graph.inputs, *bound.graph.outputs)]


def test_binds_every_symbol() -> None:
    bound = model()
    assert BindShapes(batch=2, seq=3, capacity=16).run(bound) == 3
    assert shapes(bound) == ["[2,3,8]", "[8,2,16,4]", "[2]", "[2,8]", "[8,2,16,4]"]
    ir.check(bound)


def test_folds_what_has_become_a_number() -> None:
    bound = model()
    BindShapes(batch=2, seq=3, capacity=16).run(bound)
    assert outline(bound)[3:7] == [
        "%5 = Abs(x)",
        "%6 = Reshape(%5, int64[2]{-1, 8})",
        "y = Gather(%6, index)",
        "z = Neg(cache)",
    ]


def test_rows_are_the_batch_unless_given() -> None:
    bound = model()
    BindShapes(batch=2, seq=3, capacity=16, rows=5).run(bound)
    assert shapes(bound)[2] == "[5]"


def test_finds_nothing_in_a_second_run() -> None:
    bound = model()
    step = BindShapes(batch=2, seq=3, capacity=16)
    step.run(bound)
    assert step.run(bound) == 0


def test_refuses_a_symbol_that_it_does_not_bind() -> None:
    """Before fuse-kv-io the cache is as long as the past."""
    unbound = parse(TEXT)
    with pytest.raises(ir.InputError, match="input cache keeps the dimension 'past_rows'"):
        BindShapes().run(unbound)
    assert shapes(unbound)[0] == "[batch,seq,8]"  # nothing is half bound


@pytest.mark.parametrize(("option", "size"), [("batch", 0), ("seq", -1), ("capacity", 0)])
def test_refuses_sizes_of_nothing(option: str, size: int) -> None:
    with pytest.raises(ir.InputError, match=f"{option} is {size}"):
        BindShapes(**{option: size}).run(model())


def test_a_seq_of_0_stays_a_symbol() -> None:
    bound = model()
    BindShapes(batch=2, seq=0, capacity=8).run(bound)
    symbols = {
        name
        for value in (*bound.graph.inputs, *bound.graph.outputs)
        for dim in dims(value) or ()
        for name in d.symbols(dim)
    }
    assert symbols == {"seq"}


def test_refuses_an_input_without_a_shape() -> None:
    text = '<ir_version: 11, opset_import: ["" : 24]> g (float x) => (float y) { y = Neg (x) }'
    unknown = parse(text)
    unknown.graph.inputs[0].shape = None
    with pytest.raises(ir.InputError, match="input x has no shape"):
        BindShapes().run(unknown)


@pytest.mark.parametrize(
    ("shape", "what"),
    [("1, seq", "a batch of 2 does not fit the export"), ("batch, 1", "a seq of 3 does not fit")],
)
def test_refuses_what_the_export_has_fixed_otherwise(shape: str, what: str) -> None:
    fixed = parse(f"""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[{shape}] input_ids) => (int64[{shape}] y) {{ y = Neg (input_ids) }}""")
    with pytest.raises(ir.InputError, match=what):
        BindShapes(batch=2, seq=3).run(fixed)
    assert BindShapes(batch=1, seq=1).run(fixed) == 1
