"""docs/pitfalls.md and the planted bugs are in step: each bug is in its row, with the check that catches it, and no row is empty."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = [
    f"{letter}{n}" for letter, last in (("M", 22), ("R", 9), ("A", 15), ("T", 9), ("L", 9)) for n in range(1, last + 1)
]
PAPERS = {  # ways that are played as they are: no bug has to be planted
    "T4 the paper's conversion": "test_the_papers_conversion_fails",
    "T4 the paper's diffusion": "test_the_papers_diffusion_fails",
}


def table() -> dict[str, dict[str, str]]:
    """By row, what is planted and what catches it."""
    rows = {}
    for line in (HERE.parent / "docs" / "pitfalls.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if re.fullmatch(r"[A-Z]\d+", cells[0]):
            assert len(cells) == 5, line
            assert cells[0] not in rows, f"{cells[0]} has two rows"
            found = [
                re.fullmatch(r"(.+) → `(\w+)`", entry)
                for entry in cells[4].split("<br>")
                if not entry.startswith("and `")
            ]
            rows[cells[0]] = {f"{cells[0]} {entry[1]}": entry[2] for entry in found if entry}
            assert len(rows[cells[0]]) == len(found), line
    return rows


def planted() -> dict[str, str]:
    """What the tests plant, by name, and what has to catch it: read from their source."""
    found = dict(PAPERS)
    core = ast.parse((HERE / "mechanisms" / "test_planted_bugs.py").read_text())
    for node in ast.walk(core):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "bug":
            name, check = node.args[0], node.args[1]
            assert isinstance(name, ast.Constant)
            assert isinstance(check, ast.Name)
            found[name.value] = check.id
    for node in ast.walk(ast.parse((HERE / "test_record_play.py").read_text())):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "LEAKS":
            assert isinstance(node.value, ast.Dict)
            found |= {
                key.value: "test_a_planted_leak_is_seen" for key in node.value.keys if isinstance(key, ast.Constant)
            }
    return found


def test_the_table_says_what_is_planted() -> None:
    rows = table()
    assert list(rows) == ROWS
    assert all(rows.values()), "a row without a planted bug"
    assert {name: check for row in rows.values() for name, check in row.items()} == planted()


def test_what_catches_them_is_there() -> None:
    defined = {
        node.name
        for name in ("mechanisms/test_planted_bugs.py", "helpers/several.py", "test_record_play.py")
        for node in ast.walk(ast.parse((HERE / name).read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert set(planted().values()) <= defined
    assert len(planted()) > 150
