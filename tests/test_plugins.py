"""Passes, pipelines, targets and sessions of other packages, found by their entry points."""

import json
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omforge import ir, plugins
from omforge.cli.app import app
from omforge.compilation.insertion import inserted, parse_insertion
from omforge.lowering.target import TARGETS, target
from omforge.passes import ALL_PASSES, make_pipeline
from omforge.runtime.backends import open_encoder
from omforge.runtime.bundle import Bundle

EXAMPLE = Path(__file__).parent.parent / "examples" / "plugin"
MODEL = EXAMPLE.parent / "models" / "docs-llama-onnx"

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """What installs a package as pip does: code on the path, entry points in its dist-info."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def made(package: str, entries: str, code: str = "") -> None:
        info = site / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entries)
        (site / f"{package.replace('-', '_')}.py").write_text(code)
        plugins.plugins.cache_clear()

    yield made
    plugins.plugins.cache_clear()


@pytest.fixture
def example(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package in examples/plugin, by what its pyproject.toml says."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    groups = project["entry-points"].items()
    entries = "\n".join(
        f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in listed.items())
        for group, listed in groups
    )
    install(project["name"], entries)
    monkeypatch.syspath_prepend(EXAMPLE / "src")


def omforge(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result.stdout + (result.stderr if status else "")


def test_the_example_is_short() -> None:
    """At most 30 lines of pass, and 20 of test."""
    code = (EXAMPLE / "src" / "omforge_divide_once" / "__init__.py").read_text().splitlines()
    text = (EXAMPLE / "tests" / "test_divide_once.py").read_text().splitlines()
    assert len(code) <= 30
    assert len(text) <= 20


@pytest.mark.usefixtures("example")
def test_the_example_passes_its_own_tests() -> None:
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-n", "0", str(EXAMPLE / "tests")]) == 0


@pytest.mark.usefixtures("example")
def test_a_plugin_is_listed_with_its_package() -> None:
    told = json.loads(omforge("passes", "--json"))
    packages = {entry["name"]: entry["package"] for entry in told["passes"]}
    assert packages["divide-once"] == "omforge-divide-once"
    assert packages["fuse-swish"] == ""
    assert told["pipelines"]["tidy"] == "divide-once,remove-no-ops"
    assert told["unusable"] == []


@pytest.mark.usefixtures("example")
def test_a_plugin_runs_where_ours_do(tmp_path: Path) -> None:
    ran = omforge("opt", "-p", "divide-once,tidy", MODEL / "model.onnx")
    assert ran.count("divide-once") == 2
    sizes = ("--target", "Ascend310P3", "--context", 32, "--prefill", 8, "--atc", "none")
    insertion = ("--insert-pass", "before=fuse-rms-norm:tidy")
    report = tmp_path / "bundle" / "report.json"
    omforge("compile", MODEL, "-o", report.parent, *sizes, *insertion, "--compare-each")
    passes = [run["pass"] for run in json.loads(report.read_text())["passes"]]
    at = passes.index("fuse-rms-norm")
    assert passes[at - 2 : at] == ["divide-once", "remove-no-ops"]
    told = omforge("explain", MODEL, *insertion, "--pass", "divide-once")
    assert "norm: 11 of 11 raised" in told


BROKEN = """[omforge.passes]
gone = broken_one:Gone
no-pass = broken_one:number
other-name = broken_one:Named
fuse-swish = broken_one:Named
[omforge.pipelines]
no-text = broken_one:number
"""
CODE = """from omforge.passes import Pass
number = 3
class Named(Pass):
    name = "named"
"""


def test_what_is_broken_names_its_package_and_stops_nothing(install: Install) -> None:
    install("broken-one", BROKEN, CODE)
    install("no-module", "[omforge.passes]\nraises = no_module:Pass\n", "raise RuntimeError('no')")
    result = CliRunner().invoke(app, ["passes"])
    assert result.exit_code == 0
    assert "fuse-swish" in result.stdout
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 6
    for warning, text in zip(
        sorted(warnings),
        (
            "fuse-swish of the package broken-one cannot be used: omforge has a pass of that name",
            "gone of the package broken-one cannot be used: AttributeError",
            "no-pass of the package broken-one cannot be used: 3 is no subclass",
            "no-text of the package broken-one cannot be used: no-text is 3",
            "other-name of the package broken-one cannot be used: the name of Named is 'named'",
            "raises of the package no-module cannot be used: RuntimeError: no",
        ),
        strict=True,
    ):
        assert text in warning
    said = omforge("opt", "-p", "raises", MODEL / "model.onnx", status=2)
    assert "Mend no-module, or uninstall it" in said
    assert make_pipeline("fuse-swish").passes[0].__class__.__module__.startswith("omforge.")


def test_two_packages_with_one_name_are_both_named(install: Install) -> None:
    code = "from omforge.passes import Pass\nclass P(Pass):\n    name = 'twice'\n"
    install("first-one", "[omforge.passes]\ntwice = first_one:P\n", code)
    install("second-one", "[omforge.passes]\ntwice = second_one:P\n", code)
    with pytest.raises(ir.InputError, match=r"package first-one .* package second-one"):
        make_pipeline("twice")


def test_a_pass_that_is_not_installed_is_named_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_here.py").write_text(
        "from dataclasses import dataclass\n"
        "from omforge.passes import Pass\n"
        "@dataclass(frozen=True)\n"
        "class Fails(Pass):\n"
        "    name = 'fails'\n"
        "    k: int = 1\n"
        "    def run(self, model):\n"
        "        raise IndexError(self.k)\n"
    )
    monkeypatch.chdir(tmp_path)
    (step,) = make_pipeline("mine_here:Fails{k=2}").passes
    assert str(step) == "fails{k=2}"
    words = ("opt", "-p", "remove-no-ops,mine_here:Fails{k=2}", MODEL / "model.onnx")
    said = omforge(*words, "--reproducer", tmp_path / "r", status=1)
    command = next(line for line in said.splitlines() if "reproduce: " in line)
    assert "mine_here:Fails{k=2}" in command
    again = omforge(*shlex.split(command.partition("omforge ")[2]), status=1)
    assert "IndexError" in again
    with pytest.raises(ir.InputError, match="there is no pass mine_here:Nothing"):
        make_pipeline("mine_here:Nothing")


def test_a_target_of_another_package(install: Install) -> None:
    install(
        "more-socs",
        "[omforge.targets]\nAscend310X = more_socs:soc\nAscend310Y = more_socs:wrong\n",
        "import dataclasses\nfrom omforge.lowering.target import TARGETS\n"
        "def soc(): return dataclasses.replace(TARGETS['Ascend310P3'], soc_version='Ascend310X')\n"
        "wrong = TARGETS['Ascend310P3']\n",
    )
    assert target("Ascend310X").family is TARGETS["Ascend310P3"].family
    with pytest.raises(ir.InputError, match="more-socs cannot be used: its soc_version is"):
        target("Ascend310Y")
    with pytest.raises(ir.InputError, match="Ascend310X"):
        target("Ascend310Z")


def test_a_session_of_another_package(install: Install, bert: Bundle) -> None:
    install(
        "other-npu",
        "[omforge.sessions]\nother = other_npu:open_backend\n",
        "class Backend:\n"
        "    closed = False\n"
        "    def __init__(self, bundle, batch):\n"
        "        raise RuntimeError(f'no device for {bundle.manifest.target}')\n"
        "def open_backend(bundle, batch): return Backend(bundle, batch)\n",
    )
    with pytest.raises(RuntimeError, match=f"no device for {bert.manifest.target}"):
        open_encoder(bert, backend="other")
    with pytest.raises(ir.InputError, match=r"there is no backend 'another'.*cpu, sim, acl, other"):
        open_encoder(bert, backend="another")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fuse-swish:remove-no-ops", "it says no side, pass and pipeline"),
        ("after=fuse-swish", "it says no side, pass and pipeline"),
        ("after=fuse-swich:remove-no-ops", "Did you mean fuse-swish?"),
        ("after=fuse-swish:remove-no-opps", "there is no pass 'remove-no-opps'"),
    ],
)
def test_what_cannot_be_inserted(text: str, why: str) -> None:
    with pytest.raises(ir.InputError) as caught:
        parse_insertion(text)
    assert why in str(caught.value)


def test_passes_stand_where_they_were_asked_for() -> None:
    """A pass that runs several times is met at its first or last place; equals keep their order."""
    first, second = make_pipeline("fold-shapes,remove-no-ops"), make_pipeline("remove-no-ops")
    asked = [
        parse_insertion("before=remove-no-ops:fuse-gelu"),
        parse_insertion("after=remove-no-ops:fuse-swish"),
        parse_insertion("after=remove-no-ops:fold-constants,merge-slices"),
    ]
    one, two = inserted(asked, first.passes, second.passes)
    assert [str(step) for step in one] == ["fold-shapes", "fuse-gelu", "remove-no-ops"]
    names = ["remove-no-ops", "fuse-swish", "fold-constants", "merge-slices"]
    assert [str(step) for step in two] == names


def test_ours_are_found_without_looking_for_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes longer than many a command."""

    def never(group: str) -> None:
        raise AssertionError(group)

    monkeypatch.setattr(plugins, "plugins", never)
    assert make_pipeline("raise").passes
    assert target("Ascend910B4")
    assert "fuse-swish" in ALL_PASSES
