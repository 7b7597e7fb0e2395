"""The house: which room may import which, and where everything is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "omforge"
ROOMS = ("ir", "passes", "lowering", "runtime")
SUITES = ("test_conformance.py",)  # tests of several sources of a room
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A room may import itself and these modules (with everything below them).
ALLOWED = {
    "ir": (),
    "passes": ("omforge.ir",),
    "lowering": ("omforge.ir", "omforge.passes"),
    "runtime": ("omforge.ir", "omforge.bundle.manifest", "omforge.om"),
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> Iterator[str]:
    """Every module, or name in a module, that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            argument = node.args[0]
            yield argument.value if isinstance(argument, ast.Constant) else "?"


def is_below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("file", SOURCES, ids=module_name)
def test_imports_run_one_way(file):
    parts = file.relative_to(PACKAGE).parts
    if parts[0] not in ROOMS:
        pytest.skip("only the rooms are ordered")
    allowed = (f"omforge.{parts[0]}", "omforge.__version__", *ALLOWED[parts[0]])
    wrong = [
        name
        for name in imported(file)
        if is_below(name, "omforge") and not any(is_below(name, module) for module in allowed)
    ]
    assert not wrong, f"{module_name(file)} must not import {wrong}; allowed are {allowed}"


@pytest.mark.parametrize("file", SOURCES, ids=module_name)
def test_foreign_graph_libraries_have_one_door_each(file):
    names = list(imported(file))
    if "ir" not in file.relative_to(PACKAGE).parts[:1]:
        assert not [n for n in names if is_below(n, "onnx_ir")], "use `from omforge import ir`"
    if file != PACKAGE / "ir" / "interop.py":
        for guest in ("onnx_graphsurgeon", "onnxsim"):
            assert not [n for n in names if is_below(n, guest)], f"{guest}: only in ir/interop.py"


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_are_linked_from_the_root(room):
    link = ROOT / room
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == PACKAGE / room
    assert (link / "__init__.py").is_file()


def test_no_rooms_for_leftovers():
    leftovers = {"utils", "util", "core", "common", "helpers", "helper", "misc"}
    assert not [file for file in SOURCES if leftovers & {*file.parts, file.stem}]


def test_no_file_is_longer_than_600_lines():
    long = {str(f): n for f in SOURCES if (n := len(f.read_text().splitlines())) > 600}
    assert not long


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda f: f.name)
def test_tests_mirror_sources(file):
    parts = file.relative_to(ROOT / "tests").parts
    if parts[0] not in ROOMS or file.name in SUITES:
        pytest.skip("tests of the whole are at the top, suites name what they run on")
    source = PACKAGE.joinpath(*parts[:-1], parts[-1].removeprefix("test_"))
    # A package on one subject is tested as that subject; `test_init.py` tests a room's door.
    sources = (source, source.with_suffix("") / "__init__.py", source.with_name("__init__.py"))
    exists = any(path.is_file() for path in sources[: 3 if source.name == "init.py" else 2])
    assert exists, f"{file} tests {source}, which does not exist"
