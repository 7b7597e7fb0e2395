"""Passes, pipelines, targets and sessions of other packages, found by their entry points."""

import contextlib
import io
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omforge import ir, plugins
from omforge.cli.app import app
from omforge.compilation.insertion import Insertion, inserted, parse_insertion
from omforge.lowering.target import TARGETS, target
from omforge.passes import ALL_PASSES, make_pipeline
from omforge.runtime.backends import open_encoder
from omforge.runtime.bundle import Bundle

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "plugin"
MODEL = EXAMPLE.parent / "models" / "docs-llama-onnx"

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """What installs a package as pip does: code on the path, entry points in its dist-info."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    modules = set(sys.modules)

    def made(package: str, entries: str, code: str = "") -> None:
        info = site / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entries)
        (site / f"{package.replace('-', '_')}.py").write_text(code)
        plugins.installed.cache_clear()

    yield made
    plugins.installed.cache_clear()
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(site)):
            del sys.modules[name]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of a user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


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
    ours = [entry for entry in told["plugins"] if entry["package"] == "omforge-divide-once"]
    assert [(entry["name"], entry["unusable"]) for entry in ours] == [
        ("divide-once", ""),
        ("tidy", ""),
    ]
    lines = omforge("passes").splitlines()
    rows = {line.split()[0]: line.split()[-1] for line in lines if line.strip()}
    assert rows["divide-once"] == rows["tidy"] == "omforge-divide-once"
    assert rows["pass"] == "from"


@pytest.mark.usefixtures("example")
def test_all_of_the_documentation_is_true(here: Path) -> None:
    (here / "examples").symlink_to(ROOT / "examples")
    entries = (EXAMPLE / "pyproject.toml").read_text()
    (toml,) = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)
    assert toml in entries
    my_passes, script, my_soc, my_backend = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    modules = {"my_passes": my_passes, "my_soc": my_soc, "my_backend": my_backend}
    for name, code in modules.items():
        assert f"`{name}.py`" in DOCS
        (here / f"{name}.py").write_text(code)
    commands = [shlex.split(line) for line in re.findall(r"^\$ omforge (.*)$", DOCS, re.MULTILINE)]
    said = [omforge(*words) for words in commands]
    assert [words[0] for words in commands] == [
        *("opt", "explain", "passes", "opt", "compile", "explain", "check", "run")
    ]
    unrolled, _, _, divided, _, explained, checked, generated = said
    assert "Ascend910BX" in checked
    assert re.search(r"unroll-pow\{most=3\} +11 ", unrolled)
    assert divided.count("divide-once") == 2
    assert "norm: 11 of 11 raised" in explained
    assert generated == omforge(*commands[-1][:-1], "cpu")
    report = json.loads((here / "out" / "tidy" / "report.json").read_text())
    passes = [run["pass"] for run in report["passes"]]
    at = passes.index("fuse-rms-norm")
    assert passes[at - 2 : at] == ["divide-once", "remove-no-ops"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(script, {})
    rewrites = [line.split()[:2] for line in printed.getvalue().splitlines()]
    assert rewrites == [["divide-once", "11"], ["divide-once", "0"], ["remove-no-ops", "153"]]


@pytest.mark.usefixtures("example")
def test_explain_says_what_a_pass_left_alone(here: Path) -> None:
    my_passes, *_ = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    (here / "left_alone.py").write_text(my_passes.replace("op.Pow(x, k)", "op.Mul(x, k)"))
    insertion = ("--insert-pass", "before=fuse-rms-norm:left_alone:UnrollPow")
    told = omforge("explain", MODEL, *insertion, "--pass", "left_alone:UnrollPow")
    assert "  unroll-pow: " in told.partition("besides:")[2]
    assert told == omforge("explain", MODEL, *insertion, "--pass", "unroll-pow")
    said = omforge("explain", MODEL, "--pass", "divide-once", status=2)
    assert "--insert-pass after=fuse-swish:divide-once" in said


# What is in a group, and what is said of it.
BROKEN = {
    "passes": {
        "gone = broken_one:Gone": "AttributeError: module 'broken_one' has no attribute 'Gone'",
        "absent = no_such_module:Pass": "ModuleNotFoundError: No module named 'no_such_module'",
        "no-pass = broken_one:number": "3 is no subclass of omforge.passes.Pass",
        "other-name = broken_one:Named": "the name of Named is 'named', not 'other-name'",
        "nameless = broken_one:Nameless": "Nameless has no name",
        "fuse-swish = broken_one:Named": "the package omforge has the name 'fuse-swish' itself",
        "raise = broken_one:Named": "the package omforge has the name 'raise' itself",
        "two words = broken_one:Named": "a name is of letters",
        "unreadable = broken_one:Unreadable": "NameError: name 'Missing' is not defined",
        "by-python = broken_one:ByPython": "its field 'what' has no default, and no type that",
        "undecorated = broken_one:Undecorated": "its field 'k' is no option: add @dataclass",
    },
    "pipelines": {
        "no-text = broken_one:number": "it is 3, and a pipeline is text",
        "no-passes = broken_one:no_passes": "there is no pass 'fuse-nothing'",
        "merge-slices = broken_one:no_passes": "omforge has the name 'merge-slices' itself",
    },
    "targets": {
        "Ascend310Y = broken_one:raises": "no such card",
        "Ascend310W = broken_one:own_family": "no table lists the kernels of its family '310w'",
        "Ascend310Z = broken_one:number": "it is 3, and neither a Target nor what returns one",
    },
    "sessions": {
        "nothing = broken_one:number": "it is 3, and no function of a bundle and a batch",
        "cpu = broken_one:raises": "the package omforge has the name 'cpu' itself",
    },
}
CODE = """
print("what somebody says while he is imported")
from dataclasses import dataclass
from omforge.passes import Pass
number, no_passes = 3, "fuse-swish,fuse-nothing"
class Named(Pass):
    name = "named"
class Nameless(Pass):
    pass
@dataclass(frozen=True)
class Unreadable(Pass):
    name = "unreadable"
    what: "Missing" = None
@dataclass(frozen=True)
class ByPython(Pass):
    name = "by-python"
    what: object
class Undecorated(Pass):
    name = "undecorated"
    k: int = 2
def own_family():
    from omforge.lowering.target import Family, Target
    return Target("Ascend310W", Family("310w", frozenset(), ()))
def raises():
    raise LookupError("no such card")
"""


def test_what_is_broken_names_its_package_and_stops_nothing(install: Install) -> None:
    entries = "\n".join(f"[omforge.{group}]\n" + "\n".join(said) for group, said in BROKEN.items())
    install("broken-one", entries, CODE)
    install("no-module", "[omforge.passes]\nleaves = no_module:Pass\n", "raise SystemExit('no')")
    install("damaged", "[omforge.passes]\nwhat is this\n")
    result = CliRunner().invoke(app, ["passes"])
    assert result.exit_code == 0
    assert "fuse-swish" in result.stdout
    for line, why in (item for group in BROKEN.values() for item in group.items()):
        name, _, place = line.partition(" = ")
        (warning,) = (w for w in result.stderr.splitlines() if f"{name!r} of the package" in w)
        assert warning.startswith("warning: the ")
        assert "of the package broken-one cannot be used" in warning
        assert why in warning
        assert f"(entry point {name} = {place})" in warning
    assert "'leaves' of the package no-module cannot be used: SystemExit: no " in result.stderr
    assert "warning: damaged in " in result.stderr
    told = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(told) == sum(map(len, BROKEN.values())) + 2
    assert "what somebody says" not in result.stdout
    assert "what somebody says" in result.stderr
    said = omforge("opt", "-p", "leaves", MODEL / "model.onnx", status=2)
    assert "Mend no-module, or uninstall it" in said
    told = json.loads(omforge("passes", "--json"))
    unusable = {p["name"] for p in told["plugins"] if "broken-one cannot be used" in p["unusable"]}
    assert len(unusable) == sum(map(len, BROKEN.values()))
    assert make_pipeline("fuse-swish").passes[0].__class__.__module__.startswith("omforge.")
    assert "no-passes" not in told["pipelines"]


@pytest.mark.parametrize("group", ["passes", "pipelines"])
def test_two_packages_with_one_name_are_both_named(install: Install, group: str) -> None:
    """Passes and pipelines stand in the same texts, and have their names in common."""
    code = "from omforge.passes import Pass\nclass P(Pass):\n    name = 'twice'\ntext = 'fuse'\n"
    install("first-one", "[omforge.passes]\ntwice = first_one:P\n", code)
    value = "second_one:P" if group == "passes" else "second_one:text"
    install("second-one", f"[omforge.{group}]\ntwice = {value}\n", code)
    both = rf"taken twice: .*package first-one \(first_one:P\) and .*second-one \({value}\)"
    with pytest.raises(ir.InputError, match=both):
        make_pipeline("twice")
    assert CliRunner().invoke(app, ["passes"]).stderr.count("warning: ") == 1
    assert str(make_pipeline("first_one:P")) == "twice"


def test_names_are_suggested_without_importing_what_has_them(install: Install) -> None:
    install("slow-one", "[omforge.passes]\nslow-pass = slow_one:P\n", "raise RuntimeError('slow')")
    with pytest.raises(ir.InputError, match="Did you mean 'slow-pass'"):
        make_pipeline("slow-pas")
    assert "slow_one" not in sys.modules


def test_a_pass_that_is_not_installed_is_named_by_its_place(here: Path) -> None:
    (here / "mine_here.py").write_text(
        "from dataclasses import dataclass\n"
        "from omforge.passes import Pass\n"
        "@dataclass(frozen=True)\n"
        "class Fails(Pass):\n"
        "    name = 'fails'\n"
        "    k: int = 1\n"
        "    def run(self, model):\n"
        "        raise IndexError(self.k)\n"
    )
    (step,) = make_pipeline("mine_here:Fails{k=2}").passes
    assert str(step) == "fails{k=2}"
    words = ("opt", "-p", "remove-no-ops,mine_here:Fails{k=2}", MODEL / "model.onnx")
    said = omforge(*words, "--reproducer", here / "r", status=1)
    command = next(line for line in said.splitlines() if "reproduce: " in line)
    assert "mine_here:Fails{k=2}" in command
    again = omforge(*shlex.split(command.partition("omforge ")[2]), status=1)
    assert "IndexError" in again
    assert "that is a fault of mine_here:Fails, at mine_here.py:8 in run" in said
    for place, why in (
        ("mine_here:Nothing", "has no attribute 'Nothing'"),
        ("not_there:Pass", "No module named 'not_there'"),
        ("mine_here:", "it is not package.module:Name"),
        ("mine_here:dataclass", "is no subclass of omforge.passes.Pass"),
    ):
        with pytest.raises(ir.InputError, match=rf"'{place}' cannot be used: .*{why}"):
            make_pipeline(place)


def test_a_pattern_that_cannot_be_read_is_the_fault_of_its_pass(here: Path) -> None:
    (here / "unwritten.py").write_text(
        "from omforge.passes import RewritePass\n"
        "class Bare(RewritePass):\n"
        "    name = 'bare'\n"
        "class Fails(RewritePass):\n"
        "    name = 'fails'\n"
        "    def pattern(self, op, x):\n"
        "        return {}['gone']\n"
    )
    for name, why in (("Bare", "NotImplementedError: Bare.pattern"), ("Fails", "KeyError: 'gone'")):
        said = omforge("opt", "-p", f"unwritten:{name}", MODEL / "model.onnx", status=2)
        assert f"unwritten:{name} cannot be made: " in said
        assert why in said
        assert "next: Mend it, or tell who made it" in said
        assert "fault of omforge" not in said


def test_what_options_have_to_be_is_also_for_the_pass_to_say(here: Path) -> None:
    my_passes, *_ = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    (here / "choosy.py").write_text(my_passes)
    with pytest.raises(ir.InputError, match="unroll-pow: most is 1, and the least product is of 2"):
        make_pipeline("choosy:UnrollPow{most=1}")


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
        "def open_backend(bundle, batch): return Backend(bundle, batch)\n"
        "def nothing(bundle, batch): return 'b'\n",
    )
    with pytest.raises(RuntimeError, match=f"no device for {bert.manifest.target}") as caught:
        open_encoder(bert, backend="other")
    assert caught.value.__notes__ == ["in the session other of the package other-npu"]
    with pytest.raises(ir.InputError, match="it returned 'b', which has no open and no close"):
        open_encoder(bert, backend="other_npu:nothing")
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


def test_an_anchor_that_does_not_run_is_refused_from_python_too() -> None:
    asked = Insertion("after", "fuse-swich", make_pipeline("remove-no-ops").passes)
    with pytest.raises(ir.InputError, match=r"they are fuse-gelu, fuse-swish.*mean fuse-swish"):
        inserted((asked,), make_pipeline("fuse-gelu,fuse-swish").passes)


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

    def never(path: tuple[str, ...]) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(plugins, "installed", never)
    assert make_pipeline("raise").passes
    assert target("Ascend910B4")
    assert "fuse-swish" in ALL_PASSES
