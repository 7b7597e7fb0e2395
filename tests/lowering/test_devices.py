"""What a SoC can do in a second: the public table, and what was measured."""

from dataclasses import replace

import pytest

from omforge.lowering.devices import Device, device
from omforge.lowering.facts import Facts, Seen
from omforge.lowering.legalize.products import Products
from omforge.lowering.legalize.traffic import Traffic
from omforge.lowering.tables import table_rows
from omforge.lowering.target import TARGETS, target


def test_every_row_is_a_known_soc_and_names_its_source() -> None:
    rows = list(table_rows("devices.tsv"))
    assert len({row["soc"] for row in rows}) == len(rows)
    for row in rows:
        assert row["soc"] in TARGETS
        assert row["source"]
        assert row["note"]
        assert float(row["bandwidth"]) > 0
        assert bool(row["float16"]) == bool(row["int8"])


def test_what_no_source_gives_is_open() -> None:
    unknown = device(target("Ascend910_95"))
    assert unknown.open == ("memory bandwidth", "peak of products")
    assert unknown.seconds(Traffic(weights=1)) is None
    assert str(unknown) == "Ascend910_95: no figure is public"
    assert device(target("Ascend910B1")).open == ("peak of products",)


def test_bytes_and_products_go_on_at_once() -> None:
    known = Device("any", weights=100.0, others=50.0, half=10.0, int8=20.0)
    assert known.seconds(Traffic(weights=200, cache=50, read=30, written=20)) == 4.0
    assert known.seconds(Traffic(weights=200), Products(floats=90)) == 9.0
    assert known.seconds(Traffic(), Products(floats=90, int8=60)) == 12.0


def test_what_was_measured_goes_before_the_table() -> None:
    seen = {
        "bandwidth-of-weights": Seen("measured", "a run", 150.0),
        "bandwidth-of-cache": Seen("measured", "a run", 90.0),
        "launch": Seen("measured", "a run", 12.0),
    }
    known = device(replace(target("Ascend310P3"), facts=Facts("Ascend310P3", "8.1", seen)))
    assert (known.weights, known.others) == (150e9, 90e9)
    assert known.launch == pytest.approx(12e-6)
    assert known.half == 70e12
    assert known.measured
    assert "150 GB/s, 90 GB/s of all but weights" in str(known)


def test_half_of_what_is_needed_measures_nothing() -> None:
    seen = {"bandwidth-of-weights": Seen("measured", "a run", 150.0)}
    known = device(replace(target("Ascend310P3"), facts=Facts("Ascend310P3", "8.1", seen)))
    assert not known.measured
    assert known.weights == 204e9
