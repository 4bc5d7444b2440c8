"""What pages say in words agrees with what the project's files and tables say."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from dpdistill.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.json")), ids=lambda path: path.name)
def test_figures_are_json_that_any_reader_takes(path: Path) -> None:
    """Python's own writes and reads NaN and Infinity, which JSON has not."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)


def test_the_install_line_brings_what_the_readme_then_uses() -> None:
    (line,) = re.findall(r"`pip install .*?`", README)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "diffusion" in extras
    assert "dpdistill diffusion" in README
    assert "'.[diffusion]'" in line


def test_the_readme_lists_the_methods_for_data_sets() -> None:
    assert re.findall(r"^\| `(\w+)`", README.split("## Methods for data sets")[1], re.MULTILINE) == list(METHODS)


def test_what_is_said_of_the_few_step_student_is_in_its_table() -> None:
    """docs/benchmarks/diffusion.md: points lost against the teacher, and times as fast."""
    page = (ROOT / "docs/benchmarks/diffusion.md").read_text().split("The student beside its teacher")[1]
    page = page.split("## Recipes before")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    head, rows = rows[0], [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    rows = [row for row in rows if row["what"] in ("", "last epoch")]  # no ablations
    assert head[2:4] == ["points of CNN accuracy lost", "times as fast"]
    lost = {grey: [float(r[head[2]]) for r in rows if (r["data"] != "cifar10") == grey] for grey in (True, False)}
    fast = [float(row[head[3]]) for row in rows]
    limits = " ".join((ROOT / "docs/known-limits.md").read_text().split())
    assert f"loses up to {max(lost[True]):.1f} points against its teacher on grey images" in limits
    assert f"and {max(lost[False]):.0f} on CIFAR-10" in limits
    assert f"The student draws {min(fast):.0f} to {max(fast):.0f} times as fast" in README


def test_how_much_faster_a_student_draws_is_what_was_timed() -> None:
    timed = json.loads((ROOT / "docs/benchmarks/sampling_cost.json").read_text())
    page = (
        (ROOT / "docs/benchmarks/diffusion.md")
        .read_text()
        .split("How much faster a student draws")[1]
        .split("Times as fast")[0]
    )
    shown = [line.split("|")[2:-1] for line in page.splitlines() if line.startswith("| ")][1:]
    kinds = ("mixture", "fine mixture", "corrected", "from scratch")
    assert len(shown) == len(kinds)
    for kind, cells in zip(kinds, shown, strict=True):
        for shape, cell in zip(("1,8,8", "1,28,28", "3,32,32"), cells, strict=True):
            found = [row for row in timed if (row["teacher"], row["shape"]) == (kind, shape)]
            ratios = [row[f"times_as_fast_in_{steps}"][0] for row in found for steps in (1, 2)]
            assert cell.strip() == (" / ".join(f"{ratio:.1f}" for ratio in ratios) or "–")


@pytest.mark.parametrize(("words", "heading"), [("How to add a method", "## Adding a method")])
def test_a_page_named_for_something_says_it(words: str, heading: str) -> None:
    (link,) = re.findall(re.escape(words) + r": \[\w+\]\(([^)]*)\)", README)
    page, _, anchor = link.partition("#")
    assert heading in (ROOT / page).read_text().splitlines()
    assert anchor == heading.removeprefix("## ").lower().replace(" ", "-")
