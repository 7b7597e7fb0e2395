"""The page "What omforge knows about ATC", made from the tables that the code reads.

`python -m omforge.lowering.docs FILE` writes it; a test fails when it is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from omforge.ir.weights import replacing
from omforge.lowering.air_legality import AIR_RULES, AirSubject
from omforge.lowering.facts import Table, claims, row_key
from omforge.lowering.ge_inference import sizes_by_value
from omforge.lowering.legality import FILE_RULES, RULES, Rule
from omforge.lowering.legality.file_subject import FileSubject
from omforge.lowering.legality.subject import Subject
from omforge.lowering.legalize.choices import CHOICES
from omforge.lowering.llm_ops import LlmOp, Row, llm_ops
from omforge.lowering.plugins import all_plugin_facts
from omforge.lowering.tables import table_rows
from omforge.lowering.target import TARGETS, Fact, Family, all_registrations

# The words of `choices` in those of this page.
_CERTAINTY = {"parser": "seen", "documented": "source", "uncertain": "inferred"}

AnyRule = Rule[FileSubject] | Rule[Subject] | Rule[AirSubject]

_INTRO = """# What omforge knows about ATC

This page is made from the tables that `omforge check` and `omforge compile` read. `make docs`
writes it again, and a test fails when it is stale. Change the tables, not the page.

Every fact names its source as `repository:path`, and how it is known:

| certainty | meaning |
|---|---|
| seen | CANN's own ONNX parser was run on such a model (August 2026); no kernel was run |
| source | read in CANN's sources, its documents, or the operator tables of CANN 8.1.RC1 |
| inferred | follows from those, or they contradict each other: only hardware can tell |

What is inferred is read the conservative way. The other way is reached by an option:
`omforge check --allow RULE` makes an inferred rule advice, and `omforge compile --form OP=FORM`
takes a form that is out of the running by default.
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [_INTRO, *_targets(), *_choices(), *_rules(), *_uncertain(), *_releases()]
    parts += [*_command_line(), *_ops(), *_plugins(), *_sizes(), *_registered()]
    return "\n".join(parts)


def write(path: Path) -> None:
    """Write the page, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(page(), encoding="utf-8")


def _families() -> tuple[Family, ...]:
    return tuple({row.family.name: row.family for row in TARGETS.values()}.values())


def _targets() -> Iterator[str]:
    yield "## Targets\n"
    rows: list[Sequence[str]] = []
    for family in _families():
        socs = [soc for soc, row in TARGETS.items() if row.family is family]
        sizes = [
            f"{soc}: {row.cores} cores, {row.memory_gib} GB"
            for soc, row in TARGETS.items()
            if row.family is family and row.cores and row.memory_gib
        ]
        rows.append(
            (family.name, ", ".join(socs), ", ".join(sorted(family.dtypes)), "; ".join(sizes))
        )
    yield _table(("family", "`--target` (`--soc_version`)", "dtypes", "sizes, where stated"), rows)
    yield _table(
        ("family", "fact", "probe", "source"),
        [
            (
                family.name,
                fact.text,
                _claim("target", row_key(family.name, fact.text)),
                _code(fact.source),
            )
            for family in _families()
            for fact in (*family.facts, _run_time_sizes(family))
        ],
    )


def _run_time_sizes(family: Family) -> Fact:
    found = family.run_time_sizes
    return Fact(f"a size that is not known before the run: {found.text}", found.source)


def _choices() -> Iterator[str]:
    names = [family.name for family in _families()]
    yield "## Legalisation, by SoC\n"
    yield (
        "The forms of each canonical operator, the preferred one first. Of those that a node can\n"
        "take, the one that moves the fewest bytes is chosen (`omforge check --why` counts them).\n"
        "`yes` is in the running, `option` is taken only when asked for, `-` is never emitted.\n"
    )
    rows: list[Sequence[str]] = []
    for choice in CHOICES:
        marks = ["-"] * len(names)
        for index, name in enumerate(names):
            if name in choice.families:
                marks[index] = "option" if choice.opt_in else "yes"
        certainty = _CERTAINTY.get(choice.certainty, choice.certainty)
        front = "both" if len(choice.fronts) > 1 else next(iter(choice.fronts))
        told = (front, choice.when, choice.reason, certainty, _code(choice.source))
        rows.append((choice.op, choice.form, *marks, *told))
    yield _table(("operator", "form", *names, "front", "when", "why", "certainty", "source"), rows)


_AIR = """
GE's loader and its verification take nearly anything: what is wrong dies late, or never. `--allow`
makes an inferred rule advice here, too. 950 has no operator table in CANN 8.1.RC1: 910_93's is read
for it.
"""


def _rules() -> Iterator[str]:
    yield "## Rules\n"
    yield (
        "What `omforge check` looks for. *Advice* fails no check of a foreign model; a graph that\n"
        "omforge lowers has to follow it too.\n"
    )
    sections: Sequence[tuple[str, str, Sequence[AnyRule]]] = (
        ("The file and its message", "", FILE_RULES),
        ("The graph", "", RULES),
        ("GE graphs (.air)", _AIR, AIR_RULES),
    )
    for heading, introduction, rules in sections:
        yield f"### {heading}\n{introduction}"
        yield _table(
            ("rule", "demands", "atc otherwise", "level", "certainty", "source"),
            [_rule_row(rule) for rule in rules],
        )


def _rule_row(rule: AnyRule) -> Sequence[str]:
    demand = (rule.check.__doc__ or "").strip().splitlines()[0]
    return (f"`{rule.id}`", demand, rule.atc, rule.level, rule.certainty, _code(rule.source))


def _uncertain() -> Iterator[str]:
    yield "## What is uncertain\n"
    yield (
        "Only hardware, or another release, can tell; omforge takes the conservative side.\n"
        "`omforge probe` asks them: `PROBE=VALUE` is the answer that a row stands on.\n"
    )
    rows: list[Sequence[str]] = []
    for rule in (*FILE_RULES, *RULES, *AIR_RULES):
        if rule.certainty == "inferred":
            name, demand, _, _, _, source = _rule_row(rule)
            rows.append(
                (
                    f"rule {name}",
                    f"{demand} atc: {rule.atc}",
                    f"`--allow {rule.id}`",
                    _claim("rule", rule.id),
                    source,
                )
            )
    for choice in CHOICES:
        if choice.certainty == "uncertain":
            option = f"`--form {choice.op}={choice.form}`" if choice.families else "none"
            claim = _claim("form", f"{choice.op}={choice.form}")
            rows.append((f"form {choice.form}", choice.reason, option, claim, _code(choice.source)))
    for op in llm_ops().values():
        rows += [
            (
                f"operator {op.name}",
                _row_text(row),
                "",
                _claim("operator", row_key(op.name, f"{row.kind} {row.name} {row.value}")),
                _code(row.source),
            )
            for row in op.rows
            if row.certainty == "inferred" and row.kind not in ("soc", "summary")
        ]
    rows += [
        (
            f"CANN {note['release']}",
            note["note"],
            "",
            _claim("release", row_key(note["release"], note["note"])),
            _code(note["source"]),
        )
        for note in table_rows("cann_releases.tsv")
        if note["certainty"] == "inferred"
    ]
    yield _table(("where", "what", "the other reading", "probe", "source"), rows)


def _claim(table: Table, key: str) -> str:
    claim = claims().get((table, key))
    return "" if claim is None else _code(claim)


def _releases() -> Iterator[str]:
    yield "## Releases of CANN\n"
    yield _table(
        ("release", "note", "certainty", "source"),
        [
            (note["release"], note["note"], note["certainty"], _code(note["source"]))
            for note in table_rows("cann_releases.tsv")
        ],
    )


def _command_line() -> Iterator[str]:
    yield "## Flags of atc\n"
    yield "A flag that is not here ends atc at once. Values are checked at the start, or *later*.\n"
    yield _table(
        ("flag", "type", "default", "values", "excludes", "source"),
        [
            (
                f"`--{flag['name']}`",
                flag["type"],
                flag["default"],
                flag["values"] or (flag["values_checked_later"] and _later(flag)),
                flag["excludes"],
                _code(flag["source"]),
            )
            for flag in table_rows("atc_flags.tsv")
        ],
    )
    yield "## Errors of atc\n"
    yield "From `hicann/ge:base/common/error_registry/error_registry.cc`.\n"
    yield _table(
        ("code", "title", "message"),
        [(row["code"], row["title"], row["message"]) for row in table_rows("atc_errors.tsv")],
    )


def _later(flag: Mapping[str, str]) -> str:
    return f"later: {flag['values_checked_later']}"


def _ops() -> Iterator[str]:
    yield "## Operators that LLMs use\n"
    yield (
        "As the plugins read them. Inputs are in order; an attribute of another name or type is\n"
        "ignored without a word, and its default taken.\n"
    )
    for op in llm_ops().values():
        yield f"### {op.name}\n"
        kernels = op.kernels.value.replace(",", ", ")
        yield f"{op.summary}. Kernels: {kernels} ({op.kernels.certainty}).\n"
        yield from _op_tables(op)


def _op_tables(op: LlmOp) -> Iterator[str]:
    names = [family.name for family in _families()]
    inputs: list[Sequence[str]] = []
    for row in op.of("input"):
        dtypes = [", ".join(sorted(op.dtypes(row.name, name) or ())) for name in names]
        kernels = [
            cell if name in op.families else "-" for name, cell in zip(names, dtypes, strict=True)
        ]
        inputs.append((row.name, row.value, *kernels))
    if inputs:
        yield _table(("input", "", *(f"dtypes {name}" for name in names)), inputs)
    outputs = ", ".join(row.name for row in op.of("output"))
    if outputs:
        yield f"Outputs: {outputs}.\n"
    attributes = [(row.name, row.value, row.certainty) for row in op.of("attribute")]
    if attributes:
        yield _table(("attribute", "type = default", "certainty"), attributes)
    notes = [
        (row.kind, _row_text(row), row.certainty, _code(row.source))
        for kind in ("trap", "limit", "version")
        for row in op.of(kind)
    ]
    if notes:
        yield _table(("", "note", "certainty", "source"), notes)


def _row_text(row: Row) -> str:
    place = f"{', '.join(sorted(row.families))}: " if row.families else ""
    name = f"{row.name} " if row.name else ""
    return f"{place}{name}{row.value}"


_KINDS = {
    "reads": "reads no attribute but",
    "needs": "fails without",
    "refuses": "fails at",
    "ignores": "drops",
    "changes": "gives another result",
    "output": "gives an output of another dtype",
}


def _plugins() -> Iterator[str]:
    yield "## What plugins do with attributes\n"
    yield (
        "Read from each plugin's source. `a:INT` is an attribute of that type; commas separate\n"
        "what must all be there, bars what must be there in one form. An operator of ONNX that\n"
        "is not here is taken as ONNX has it.\n"
    )
    rows: list[Sequence[str]] = []
    for fact in all_plugin_facts():
        opsets = "" if fact.opsets is None else f"{fact.opsets[0]}-{fact.opsets[-1]}"
        told = (fact.attribute, fact.when, fact.atc, fact.why)
        place = (fact.certainty, _code(fact.source))
        rows.append((fact.op, opsets, _KINDS[fact.kind], *told, *place))
    columns = ("op", "opsets", "the plugin", "attribute", "when", "atc", "why")
    yield _table((*columns, "certainty", "source"), rows)


def _sizes() -> Iterator[str]:
    yield "## Sizes that values decide\n"
    yield (
        "Of these inputs GE has to know the values when it compiles: constants, or what is\n"
        "computed of constants and static shapes. Otherwise the size of the result is not static.\n"
    )
    rows: list[Sequence[str]] = []
    for row in sizes_by_value().values():
        inputs = "data" if row.inputs is None else ", ".join(map(str, row.inputs))
        rows.append((row.op, inputs, row.decides, _code(row.source)))
    yield _table(("op", "inputs", "which are", "source"), rows)


def _registered() -> Iterator[str]:
    rows = all_registrations()
    yield "## Every operator that ATC registers\n"
    yield (
        f"{len(rows)} rows. ATC looks an operator up by the exact `domain::opset::op`, and takes\n"
        "the first row. `PartitionedCall` is expanded by its plugin into a subgraph. Rows of\n"
        "`experimental/` are in custom builds only; `(none)` names no opset: no model reaches it.\n"
    )
    yield _table(
        ("domain", "op", "opsets", "GE type", "source"),
        [(row.domain, row.op, row.opset_text, row.ge_type, _code(row.source)) for row in rows],
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_line(columns), "|" + "---|" * len(columns), *(_line(row) for row in rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _code(source: str) -> str:
    return f"`{source}`"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
