"""The page made from the tables."""

from pathlib import Path

from omforge.lowering import docs
from omforge.lowering.air_legality import AIR_RULE_IDS
from omforge.lowering.ge_inference import sizes_by_value
from omforge.lowering.legality import ALL_RULES
from omforge.lowering.legalize.choices import CHOICES
from omforge.lowering.llm_ops import llm_ops
from omforge.lowering.plugins import all_plugin_facts
from omforge.lowering.target import TARGETS, all_registrations

PAGE = Path(__file__).parents[2] / "docs" / "what-omforge-knows-about-atc.md"


def test_the_page_is_not_stale() -> None:
    assert PAGE.read_text(encoding="utf-8") == docs.page(), "the tables have changed: run make docs"


def test_the_page_has_all_of_every_table(tmp_path: Path) -> None:
    docs.write(tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert all(soc in page for soc in TARGETS)
    assert all(f"| `{name}` |" in page for name in (*ALL_RULES, *AIR_RULE_IDS))
    assert all(f"### {name}\n" in page for name in llm_ops())
    assert all(f"| {choice.op} | {choice.form} |" in page for choice in CHOICES)
    assert all(
        f"| {row.op} | {row.opset_text} | {row.ge_type} |" in page for row in all_registrations()
    )
    assert len(all_registrations()) == 356
    assert all(f"| {fact.op} |" in page and fact.why in page for fact in all_plugin_facts())
    assert all(f"| {op} |" in page for op in sizes_by_value())


def test_every_row_of_a_table_has_its_columns() -> None:
    width = 0
    for line in docs.page().replace("\\|", "").splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        width = width or line.count("|")
        assert line.count("|") == width, line


def test_what_is_inferred_is_among_the_uncertain() -> None:
    section = docs.page().partition("## What is uncertain")[2].partition("\n## ")[0]
    for name, rule in (*ALL_RULES.items(), *AIR_RULE_IDS.items()):
        assert (f"`--allow {name}`" in section) == (rule.certainty == "inferred")
