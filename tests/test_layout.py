"""The house: which room may import which, and where everything is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "omforge"
LINKS = ("ir", "passes", "lowering", "runtime")  # the rooms that the root links to
SUITES = ("test_conformance.py",)  # tests of several sources of a room
SOURCES = sorted(PACKAGE.rglob("*.py"))

# The rooms, the lowest first. A room may import itself and what stands behind its name.
ALLOWED = {
    "ir": (),
    "rewriting": ("ir",),
    "recognition": ("ir", "rewriting"),
    "quantization": ("ir", "rewriting", "recognition"),
    "passes": ("ir", "rewriting", "recognition", "quantization"),
    "bundle": ("ir",),
    "air": ("ir",),
    "om": ("ir", "bundle", "air"),
    "lowering": ("ir", "recognition", "air"),
    "atc": ("ir", "bundle", "air", "om", "lowering"),
    "compilation": (
        *("ir", "rewriting", "recognition", "quantization", "passes"),
        *("bundle", "air", "lowering", "atc"),
    ),
    "planning": (
        *("ir", "rewriting", "recognition", "quantization", "passes"),
        *("bundle", "air", "lowering", "compilation"),
    ),
    "runtime": ("ir", "bundle", "air", "om"),
    "probe": ("ir", "bundle", "air", "om", "lowering", "atc", "runtime"),
    "api": (
        *("ir", "rewriting", "recognition", "quantization", "passes"),
        *("bundle", "air", "om", "lowering", "atc", "compilation", "planning", "runtime"),
    ),
}
ROOMS = tuple(ALLOWED)


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
    allowed = ["omforge.__version__", "omforge.plugins", f"omforge.{parts[0]}"]
    allowed += [f"omforge.{room}" for room in ALLOWED[parts[0]]]
    wrong = [
        name
        for name in imported(file)
        if is_below(name, "omforge") and not any(is_below(name, module) for module in allowed)
    ]
    assert not wrong, f"{module_name(file)} must not import {wrong}; allowed are {allowed}"


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions count, and those for types: a circle is one whenever it is closed."""
    modules = {module_name(file): file for file in SOURCES}

    def module_of(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    left = {
        name: {module_of(each) for each in imported(file)} - {"", "omforge", name}
        for name, file in modules.items()
        if name != "omforge"  # the public names, which are imported when they are asked for
    }
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    circle = {name: sorted(needs & set(left)) for name, needs in left.items()}
    assert not circle


@pytest.mark.parametrize("file", SOURCES, ids=module_name)
def test_foreign_graph_libraries_have_one_door_each(file):
    names = list(imported(file))
    if "ir" not in file.relative_to(PACKAGE).parts[:1]:
        assert not [n for n in names if is_below(n, "onnx_ir")], "use `from omforge import ir`"
    if file != PACKAGE / "ir" / "interop.py":
        for guest in ("onnx_graphsurgeon", "onnxsim"):
            assert not [n for n in names if is_below(n, guest)], f"{guest}: only in ir/interop.py"


@pytest.mark.parametrize("room", LINKS)
def test_the_rooms_are_linked_from_the_root(room):
    link = ROOT / room
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == PACKAGE / room
    assert (link / "__init__.py").is_file()


def test_no_rooms_for_leftovers():
    leftovers = {"utils", "util", "core", "common", "helpers", "helper", "misc"}
    assert not [file for file in SOURCES if leftovers & {*file.parts, file.stem}]


LONG = {
    "atc/sim/parser.py": "one parser, in the order of ATC's own",
    "bundle/manifest.py": "one schema, and what each field must be",
    "cli/app.py": "one function for each command, most of it its options",
    "compilation/quantize_options.py": "one little language, and what each SoC takes of it",
    "ir/dims.py": "one algebra of sizes",
    "ir/infer_rules.py": "one rule for each operator",
    "ir/infer_shape_ops.py": "one rule for each operator",
    "ir/ops.py": "one definition for each target operator",
    "ir/verify.py": "one walk, one check for each fault",
    "ir/weights.py": "one file of weights, written and read",
    "lowering/emit/standard.py": "one function for each operator",
    "lowering/ge_shape_rules.py": "one rule for each operator",
    "lowering/legalize/builder.py": "one class, which every legalisation records with",
    "lowering/legalize/quantized.py": "one operator: of matrices, of stacks, and of what is chosen",
    "passes/canonicalize_cache.py": "one pass",
    "passes/fuse_kv_io.py": "one pass",
    "passes/grow_static_cache.py": "one pass",
    "passes/quantize_kv.py": "one pass",
    "probe/portable.py": "one file, which a kit takes to a machine without omforge",
    "quantization/compiled.py": "the loops that numba compiles, which call each other",
    "recognition/attention/masks.py": "a mask: what is asked of it, and what answers",
    "recognition/attention/unraised.py": "one proof, from finding to running",
    "recognition/interface.py": "one answer, what each input is for, and its parts",
    "rewriting/matcher.py": "one backtracking search",
    "runtime/acl_session.py": "one session and its buffers",
    "runtime/acl_sim/mdl.py": "one module of pyACL, call by call",
    "runtime/export.py": "one runner of whatever an exporter wrote",
    "runtime/generate.py": "one class: a prompt's way through the buckets",
    "runtime/quality.py": "one measurement, its figures and limits",
    "runtime/quality_layers.py": "one measurement, layer by layer",
    "testing/respellings.py": "one function for each way to spell a thing",
}
"""Files of over 400 lines, and how each earns them; what has a second subject gets a second file."""


def test_a_file_of_over_400_lines_earns_them():
    counts = {f.relative_to(PACKAGE).as_posix(): len(f.read_text().splitlines()) for f in SOURCES}
    assert {name for name, count in counts.items() if count > 400} == set(LONG)
    assert max(counts.values()) <= 600


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda f: f.name)
def test_tests_mirror_sources(file):
    parts = file.relative_to(ROOT / "tests").parts
    if parts[0] not in (*ROOMS, "cli") or file.name in SUITES:
        pytest.skip("tests of the whole are at the top, suites name what they run on")
    source = PACKAGE.joinpath(*parts[:-1], parts[-1].removeprefix("test_"))
    # A package on one subject is tested as that subject; `test_init.py` tests a room's door.
    sources = (source, source.with_suffix("") / "__init__.py", source.with_name("__init__.py"))
    exists = any(path.is_file() for path in sources[: 3 if source.name == "init.py" else 2])
    assert exists, f"{file} tests {source}, which does not exist"


def test_the_map_in_the_readme_is_true():
    """Each room with its own first line and what it may import; each path of the map exists."""
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("<!-- rooms -->")[2].partition("<!-- /rooms -->")[0]
    rows = dict(re.findall(r"^\| \[omforge/(\w+)\]\(.*?\) \| (.*) \|$", table, re.M))
    rooms = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert set(rows) == rooms
    for room, row in rows.items():
        doc = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
        imports = ", ".join(ALLOWED[room]) or "-" if room in ALLOWED else "all"
        assert row == f"{doc.splitlines()[0]} | {imports}"
    paths = re.findall(r"\| \[((?:omforge|tests|examples)/[\w/.]+)\]", readme)
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_each_file_of_passes_is_a_pass():
    from omforge.passes import PASSES

    files = {file.stem for file in (PACKAGE / "passes").glob("*.py")} - {"__init__"}
    assert files - {"graphsurgeon_pass"} == {name.replace("-", "_") for name in PASSES}
