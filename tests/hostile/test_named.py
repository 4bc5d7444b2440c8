"""Every hostile input that has a name, through the command line: refused in one line, and nothing on disk has changed.

The list is in helpers/hostile.py. CPU seconds and memory of every command are bounded as well: far below what a bomb takes.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hostile
import hostile_data
import small_release
from cli_child import Cli, tree

SECONDS, MEGABYTES = 10, 1500
WHOLE = [name for name in hostile_data.LEGAL if name.startswith(("NaN", "all images"))]
TINY = "steps=4 networks=1 feature_dims=6 pixel_dims=4 components=2 pool=12 width=4"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_release.write(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def cli(release: Path) -> Iterator[Cli]:
    made = Cli(release)
    yield made
    made.close()


def test_there_are_enough_of_them() -> None:
    assert len(hostile.ALL) > 400
    assert len({id(case.make) for case in hostile.ALL.values()}) == len(hostile.ALL)


@pytest.mark.parametrize("name", hostile.ALL)
def test_it_is_refused_in_one_line_and_nothing_changes(name: str, cli: Cli, tmp_path: Path, release: Path) -> None:
    case, root = hostile.ALL[name], tmp_path / "w"
    root.mkdir()
    if name in hostile.ON_A_RELEASE:
        shutil.copytree(release, root / "r")
    words = case.make(root)
    before = tree(root)
    done = cli(*words, cwd=root, home=root / "home", file_bytes=case.file_bytes)
    after = tree(root)
    assert "Traceback" not in done.err
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("dpdistill: ")
    line = done.err.removesuffix("\n")
    assert line.isprintable(), line
    assert case.names in line
    assert case.says in line
    assert "passwd" not in line
    quoted = line.replace(str(tmp_path), "")
    assert str(hostile_data.SECRET) not in quoted
    assert len(quoted) < 700 or max(len(str(word)) for word in words) > 700  # a path is quoted at any length
    kept = {path: facts for path, facts in after.items() if Path(path) != root}
    allowed = tuple(str(root / place) for place in case.leaves)
    assert {p: f for p, f in kept.items() if not allowed or not p.startswith(allowed)} == {
        path: facts for path, facts in before.items() if Path(path) != root
    }
    assert bool(case.leaves) or after[str(root)] == before[str(root)]  # no file came and went either
    assert done.seconds < SECONDS
    assert done.peak_mb < MEGABYTES


@pytest.mark.parametrize("name", hostile_data.LEGAL)
def test_what_only_looks_odd_is_a_data_set(name: str, cli: Cli, tmp_path: Path) -> None:
    data = hostile_data.LEGAL[name](tmp_path)
    words = [
        "dataset",
        "--data",
        data,
        "--out",
        "out",
        "--per-class",
        1,
        *[w for s in (*TINY.split(), "value_low=0", "value_high=1") for w in ("--set", s)],
    ]
    whole = name in WHOLE  # the others are only looked at: each whole run takes seconds
    done = cli(*words, *([] if whole else ["--dry-run"]), cwd=tmp_path, home=tmp_path / "home")
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert "Warning" not in done.err
    if not whole:
        assert "planned: ε = " in done.out
        return
    assert done.out.startswith(
        "Adding or removing one record changes"
    )  # which it says once the release has been verified
    assert "<script" not in (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in (tmp_path / "out" / "README.md").read_text()


def test_a_command_cut_short_by_a_full_disk_goes_on_when_there_is_room(cli: Cli, tmp_path: Path) -> None:
    data = hostile_data.LEGAL["one class"](tmp_path)
    words = ["dataset", "--data", data, "--out", "out", "--per-class", 1]
    words += [w for s in TINY.split() for w in ("--set", s)]
    done = cli(*words, cwd=tmp_path, home=tmp_path / "home", file_bytes=3000)
    assert done.code == 2, done
    assert done.err.splitlines()[-1].startswith("dpdistill: ")
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
    done = cli(*words, cwd=tmp_path, home=tmp_path / "home")
    assert (done.code, done.out[:6]) == (0, "Adding")
    (ledger,) = (tmp_path / "home" / "ledgers").glob("*.jsonl")
    assert ledger.read_text().count('"type":"run"') == 1  # one run, charged once
    assert ledger.read_text().count('"type":"intent"') == 5


@pytest.mark.parametrize("name", ["npz: decompression bomb", "report: a flipped byte"])
def test_a_fresh_process_says_the_same(name: str, cli: Cli, tmp_path: Path, release: Path) -> None:
    case = hostile.ALL.get(name) or hostile.ALL[f"data: {name}"]
    if name in hostile.ON_A_RELEASE:
        shutil.copytree(release, tmp_path / "r")
    words = [os.fspath(word) if isinstance(word, Path) else str(word) for word in case.make(tmp_path)]
    command = [sys.executable, "-W", "error", "-c", "from dpdistill.cli import main; main()", *words]
    fresh = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    done = cli(*words, cwd=tmp_path, home=tmp_path / "home")
    assert (fresh.returncode, fresh.stdout, fresh.stderr) == (done.code, done.out, done.err)
    assert not re.search(r"^\s", fresh.stderr, re.MULTILINE)
