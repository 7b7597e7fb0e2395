"""--input_shape and gears: hicann/ge:compiler/api/aclgrph/option_utils.cc, multi_batch_options.cc."""

import pytest

from omforge.atc.sim.command_line import parse
from omforge.atc.sim.reports import Refused, Report
from omforge.atc.sim.shapes import Shapes, check_gears, read_shapes


def read(*words: str) -> Shapes:
    return read_shapes(parse(words, Report(), []), Report())


def test_static_shapes_and_scalars() -> None:
    assert read("--input_shape=a:1,128;b:;c:d:2").dims == {"a": (1, 128), "b": (), "c:d": (2,)}


def test_ranges_are_dynamic_shapes() -> None:
    shapes = read("--input_shape=a:1~8,-1,4;s:")
    assert shapes.dims == {"a": (-1, -1, 4)}
    assert shapes.ranges == {"a": ((1, 8), (1, -1), (4, 4))}


def test_gears() -> None:
    shapes = read("--input_shape=a:1,-1;b:-1,4", "--dynamic_dims=1,2;3,4;")
    assert shapes.dims == {"a": (1, -1), "b": (-1, 4)}
    assert shapes.gears is not None
    assert shapes.gears.profiles == ((1, 2), (3, 4))
    batch = read("--input_shape=a:-1,3", "--dynamic_batch_size=1,2,").gears
    assert batch is not None
    assert batch.profiles == ((1,), (2,))


GEARED = "--input_shape=a:1,-1"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--input_shape=a"], "E10002"),  # no value
        (["--input_shape=a:1.5"], "E10002"),
        (["--input_shape=a:1x"], "E10002"),
        (["--input_shape=a:0"], "E10011"),
        (["--input_shape=a:-2,1"], "E10011"),
        (["--input_shape=a:x"], "E10014"),
        (["--input_shape=a:99999999999999999999"], "E10013"),
        (["--input_shape=a:1~x"], "E10002"),
        (["--input_shape=:1~2"], "E10002"),
        (["--input_shape_range=a:1~2"], "E10048"),  # the brackets are missing
        (["--input_shape_range=a:[1~2~3]"], "E10048"),
        ([GEARED, "--dynamic_dims=1;2", "--dynamic_batch_size=1,2"], "E10009"),
        (["--input_shape_range=a:[1~2]", "--dynamic_dims=1;2"], "E10009"),
        (["--input_shape=a:1~2", "--dynamic_dims=1;2"], "E10040"),
        (["--dynamic_dims=1;2"], "E10004"),  # no --input_shape
        ([GEARED, "--dynamic_dims=1;2", "--input_hint_shape=0:[1]"], "E10001"),
        (["--input_shape=a:1,2", "--dynamic_dims=1;2"], "E10001"),  # no -1
        ([GEARED, "--dynamic_dims=;"], "E10058"),
        ([GEARED, "--dynamic_dims=1,2;3,4"], "E10003"),
        ([GEARED, "--dynamic_dims=1;x"], "E10001"),
        (["--input_shape=a:", "--dynamic_batch_size=1,2"], "E10012"),
        (["--input_shape=a:1,3", "--dynamic_batch_size=1,2"], "E10031"),
        (["--input_shape=a:-1,-1", "--dynamic_batch_size=1,2"], "E10018"),
        (["--input_shape=a:-1,3", "--dynamic_batch_size=1;2"], "E10003"),
        (["--input_shape=a:1,-1", "--dynamic_image_size=1,2;3,4"], "E10019"),
        (["--input_shape=a:1,3,-1,-1", "--dynamic_image_size=1;2"], "E10020"),
        (["--input_shape=a:1,3,-1,-1", "--dynamic_image_size=1,x;2,2"], "E10003"),
    ],
)
def test_refusals(words: list[str], code: str) -> None:
    report = Report()
    with pytest.raises(Refused):
        read_shapes(parse(words, Report(), []), report)
    assert report.codes[0] == code


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([GEARED, "--dynamic_dims=1"], "E10035"),
        ([GEARED, "--dynamic_dims=1;1"], "E10039"),
        (["--input_shape=a:-1,3", "--dynamic_batch_size=2,2"], "E10039"),
        (["--input_shape=a:-1,-1", "--dynamic_dims=1,;2,2"], "E10037"),  # an empty number counts
        (["--input_shape=a:-1,-1", "--dynamic_dims=,1;,2"], "E10046"),
        (["--input_shape=a:-1;b:-1;c:-1", "--dynamic_dims=1,,2;3,,4"], "E10045"),
    ],
)
def test_gears_are_checked_once_the_model_is_parsed(words: list[str], code: str) -> None:
    report = Report()
    shapes = read_shapes(parse(words, Report(), []), report)
    with pytest.raises(Refused):
        check_gears(shapes, report)
    assert report.codes == (code,)


def test_the_text_of_a_refusal() -> None:
    report = Report()
    with pytest.raises(Refused):
        read_shapes(parse(["--input_shape=a:1,0"], report, []), report)
    assert report.errors[0].text == (
        "Value a:1,0 for parameter --input_shape is invalid. Shape values must be positive "
        "integers. The error value in the shape is 0."
    )
