"""Ten thousand mutated inputs of every kind, each refused in one line or loaded. A long run: tools/fuzz.py --count 100000."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fuzzing

TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"
SLOW = [name for name in fuzzing.KINDS if "sealed" in name or name == "sampler"]  # a tenth of a second each
QUICK = [name for name in fuzzing.KINDS if name not in SLOW]


def fuzz(folder: Path, *words: object, program: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", program] if program else [TOOL]), "--keep", folder / "kept", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kinds", "count"), [(QUICK, 9950), (SLOW, 50)], ids=["quick", "slow"])
def test_mutants(kinds: list[str], count: int, tmp_path: Path) -> None:
    done = fuzz(tmp_path, "--count", count, "--seed", 0, "--kinds", *kinds)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = dict(re.findall(r"^(.{28}) +\d+ +(\d+) ", done.stdout, re.MULTILINE))
    refused = {name.strip(): int(number) for name, number in rows.items()}
    assert set(refused) == {*kinds, "all"}
    assert all(refused.values())
    total = int(re.search(r"^all +(\d+)", done.stdout, re.MULTILINE)[1])
    assert total > 0.97 * count  # a few mutants are what they were before


BROKEN = """
import sys
sys.path.insert(0, {helpers!r})
sys.path.insert(0, {tools!r})
import os, fuzzing, fuzz
fuzzing.KINDS["toml"] = fuzzing.Kind(make=lambda root: fuzzing.Subject(targets=[fuzzing.toml(root).targets[0]], use=lambda: {fault}))
sys.exit(fuzz.main())
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [("1 / 0", "ZeroDivisionError"), ("os.abort()", "exit -6"), ("print('x' * 3, file=sys.stderr)", "xxx")],
)
def test_a_fault_is_found_and_its_file_is_kept(fault: str, said: str, tmp_path: Path) -> None:
    program = BROKEN.format(helpers=str(Path(fuzzing.__file__).parent), tools=str(TOOL.parent), fault=fault)
    done = fuzz(tmp_path, "--count", 3, "--kinds", "toml", program=program)
    assert done.returncode == 1
    assert said in done.stdout
    assert [path for path in (tmp_path / "kept").iterdir() if path.name != "now"]


def test_an_input_depends_on_its_number_alone() -> None:
    good = bytes(range(256)) * 4
    for words in (False, True):
        first, again = (fuzzing.mutate(good, np.random.default_rng([1, 2, 3]), words) for _ in range(2))
        assert first == again != good
