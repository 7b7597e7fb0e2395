"""Legal GE graphs give nothing; each illegal one breaks exactly its rule."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from omforge.air import graph
from omforge.air.files import write_air
from omforge.air.graph import Attr, Desc, Op, Tensor
from omforge.air.prototypes import prototype
from omforge.api.checking import check
from omforge.ir.errors import InputError
from omforge.lowering.air_legality import AIR_RULE_IDS, cache_rules, check_air, check_air_file
from omforge.lowering.target import target
from tests.lowering.air_legality.graphs import described, told
from tests.lowering.air_legality.illegal import ILLEGAL, Illegal, table
from tests.lowering.air_legality.legal import EVERYWHERE, GRAPHS, SOCS

SAMPLES = sorted((Path(__file__).parents[2] / "air" / "samples").glob("*.air"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the weights that the graphs name."""
    path = tmp_path_factory.mktemp("air")
    (path / "weights.bin").write_bytes(bytes(8192))
    return path


@pytest.mark.parametrize("case", ILLEGAL, ids=lambda case: f"{case.rule}: {case.how}")
def test_an_illegal_graph_breaks_exactly_its_rule(case: Illegal, folder):
    found = case.offences(folder)
    assert {offence.code for offence in found} == {case.rule}, "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("name", "soc"), [(name, soc) for name in GRAPHS for soc in SOCS.get(name, EVERYWHERE)]
)
def test_a_legal_graph_breaks_none(name, soc, folder):
    case = Illegal("", "", name, lambda air: air, soc)
    assert [str(offence) for offence in case.offences(folder)] == []


def test_every_rule_has_an_illegal_graph():
    by_size = {"air-file-size"}
    assert set(AIR_RULE_IDS) - {case.rule for case in ILLEGAL} == by_size


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B4"])
def test_samples_that_ge_loaded_are_legal(sample, soc):
    assert check_air_file(sample, target(soc)).offences == ()


def test_check_takes_an_air_file_by_name_or_by_content(folder):
    sample = SAMPLES[0]
    nameless = folder / "decode"
    nameless.write_bytes(sample.read_bytes())
    for path in (sample, nameless):
        checked = check(path, "Ascend310B4")
        assert not checked.legal
        assert {offence.code for offence in checked.errors} == {"air-kernel"}
        assert checked.to_json()["nodes"] == 10
    assert check(sample, "Ascend310P3").legal


def test_an_inferred_rule_may_be_allowed(folder):
    path = folder / "graph.air"
    write_air(GRAPHS["decode"](), path)
    assert not check(path, "Ascend910_95").legal
    assert check(path, "Ascend910_95", allow=["air-kernel-inferred"]).legal
    with pytest.raises(InputError, match="not inferred"):
        check(path, "Ascend910_95", allow=["air-kernel"])


def saved(op: Op) -> Op:
    """An operator as GE saves it: TorchAir's exports are saved so."""
    found = prototype(op.type)
    unknown = op.type in ("Add", "MatMulV2", "Reshape")  # of which TorchAir knows nothing
    attributes = dict(op.attributes)
    if found is not None:
        inputs = [slot.name for slot in found.inputs]
        attributes["_ir_inputs_key"] = graph.texts(inputs, typed=False)
        kinds = tuple(range(len(inputs)))
        attributes["_ir_inputs_value"] = Attr("i", items=kinds, typed=False)
        names = [item.name for item in found.attributes]
        attributes["_ir_attr_names"] = graph.texts(names, typed=False)
        optional = [slot.name for slot in found.inputs if slot.optional]
        attributes["_opt_input"] = graph.texts(optional, typed=False)
    return replace(
        op,
        attributes=attributes,
        input_desc=tuple(
            replace(desc, layout="FORMAT_RESERVED") if desc.dtype == "undefined" else desc
            for desc in op.input_desc
        ),
        output_desc=(Desc("y", "float32", ()),) if unknown else op.output_desc,
    )


@pytest.mark.parametrize("name", ["layer", "decode"])
def test_a_graph_as_ge_saves_it_is_legal(name, folder):
    air = GRAPHS[name]()
    body = replace(air.graph, ops=tuple(map(saved, air.graph.ops)))
    air = replace(air, version=0, graphs=(body,))
    found = check_air(air, target("Ascend310P3"), path=folder / "graph.air")
    assert {offence.code for offence in found} == {"air-ir-attributes"}
    assert {offence.level for offence in found} == {"advice"}


# Damaged and hostile files


def test_damaged_bytes_are_told_or_judged_and_nothing_is_written(tmp_path):
    rng = random.Random(3)
    whole = [sample.read_bytes() for sample in SAMPLES]
    path = tmp_path / "broken.air"
    judged = 0
    for _ in range(250):
        data = bytearray(rng.choice(whole))
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.choice((1, 3))):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            check(path, "Ascend310P3").to_json()
            judged += 1
        except InputError:
            pass
    assert 10 < judged < 240
    assert list(tmp_path.iterdir()) == [path]


ODD = (
    Attr("raw", b"?"),
    Attr("none"),
    Attr("s", "\udc80"),
    Attr("i", 2**63 - 1),
    Attr("f", float("nan")),
    Attr("t", Tensor(Desc("", "int64", (2**62, 2**62)), b"")),
    Attr("i", items=(2**62, -5)),
    Attr("s", items=("\udc80",)),
)
ODD_SHAPES = (None, (), (0,), (-1,), (-2,), (2**62,) * 3, (1,) * 12)


@pytest.mark.parametrize("name", GRAPHS)
def test_odd_values_anywhere_are_judged(name, folder):
    air = GRAPHS[name]()
    for op in air.graph.ops:
        own = op.attributes if name in ("layer", "decode") else ()  # the others take as long again
        changed = [told(air, op.name, **{key: odd}) for key in own for odd in ODD]
        if op.output_desc:
            changed += [described(air, op.name, shape=shape) for shape in ODD_SHAPES]
        for odd in changed:
            for offence in check_air(odd, target("Ascend910B4"), path=folder / "graph.air"):
                str(offence).encode()  # bytes that are no text are spelled out


def test_a_file_of_2_gib_is_not_read(tmp_path):
    path = tmp_path / "large.air"
    with path.open("wb") as file:
        file.truncate(1 << 31)
    (offence,) = check(path, "Ascend310P3").errors
    assert offence.code == "air-file-size"
    assert offence.atc == "E10041"


def test_what_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe.air")
    for path, why in ((tmp_path, "no file"), (tmp_path / "pipe.air", "no file")):
        with pytest.raises(InputError, match=why):
            check_air_file(path, target("Ascend310P3"))
    with pytest.raises(InputError, match="cannot read"):
        check_air_file(tmp_path / "none.air", target("Ascend310P3"))


def test_a_circle_is_named_and_what_hangs_on_it_is_not(folder):
    (case,) = (case for case in ILLEGAL if case.how == "two wait for each other")
    (offence,) = case.offences(folder)
    assert offence.what == "4 operators need each other in a circle"  # not x, cast or NetOutput


def test_many_users_of_a_cache_do_not_take_forever(folder, monkeypatch):
    monkeypatch.setattr(cache_rules, "_MOST_STEPS", 10)
    found = check_air(GRAPHS["decode"](), target("Ascend310P3"), path=folder / "graph.air")
    assert [offence.what for offence in found] == [
        "the caches have too many users to be put in order"
    ]


def test_the_table_of_illegal_graphs_has_each_of_them():
    assert len(table().splitlines()) == len(ILLEGAL) + 2 > 100
