"""docs/performance.md quotes what was measured."""

from pathlib import Path

from benchmarks.table import END, START, table

ROOT = Path(__file__).parents[1]


def test_the_table_of_the_page_is_that_of_the_results():
    inside = (ROOT / "docs/performance.md").read_text().split(START)[1].split(END)[0]
    assert inside.strip() == table().strip()
    assert {f"{case}.json" for case in ("sft", "dpo", "grpo", "sweep")} <= {
        file.name for file in (ROOT / "benchmarks/results").iterdir()
    }
