"""Ten thousand mutated inputs of every kind, each refused in one line or loaded. A long run: tools/fuzz.py --count 100000."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fuzzing

COUNT = 10_000
TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"


def fuzz(folder: Path, *words: object, program: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", program] if program else [TOOL]), "--keep", folder / "kept", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
def test_mutants(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "--count", COUNT, "--seed", 0)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = re.findall(r"^(.{28}) +(\d+) +(\d+) ", done.stdout, re.MULTILINE)
    refused = {name.strip(): int(number) for name, _, number in rows}
    assert set(refused) == {*fuzzing.KINDS, "all"}
    assert all(refused.values())
    assert int(rows[-1][1]) > 0.97 * COUNT  # a few mutants are what they were before


BROKEN = """
import sys
sys.path.insert(0, {helpers!r})
sys.path.insert(0, {tools!r})
import os, time, fuzzing, fuzz

def fail():
    1 / 0

def broken(use):
    return fuzzing.Kind(make=lambda root: fuzzing.Subject(targets=[fuzzing.toml(root).targets[0]], use=use))

fuzzing.HANGS = 1
for name, use in dict(figures=fail, ledger=os.abort, arrays=lambda: time.sleep(9)).items():
    fuzzing.KINDS[name] = broken(use)
sys.exit(fuzz.main())
"""


def test_a_fault_a_crash_and_a_hang_are_found_and_their_files_kept(tmp_path: Path) -> None:
    program = BROKEN.format(helpers=str(Path(fuzzing.__file__).parent), tools=str(TOOL.parent))
    done = fuzz(tmp_path, "--count", 3, "--kinds", "figures", "ledger", "arrays", program=program)
    assert done.returncode == 1
    for said in ("ZeroDivisionError", "exit -6", "exit -14"):
        assert said in done.stdout
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert kept == ["arrays 0 crashed", "figures 0", "ledger 0 crashed", "now"]


def test_an_input_depends_on_its_number_alone() -> None:
    good = bytes(range(256)) * 4
    for words in (False, True):
        first, again = (fuzzing.mutate(good, np.random.default_rng([1, 2, 3]), words) for _ in range(2))
        assert first == again != good
