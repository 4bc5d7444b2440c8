"""Imports point one way, the door's inside is touched by nobody else, and no data becomes code. Read from the source, and run once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dpdistill.privacy

ROOT = Path(dpdistill.privacy.__file__).parents[1]
FILES = sorted(ROOT.rglob("*.py"))
TOPS = {"bundle", "evaluation", "audit", "pipeline", "planning", "state", "workspace", "config", "config_files", "cli"}
TOPS |= {"sources", "home", "conversion", "sampling"}


def module_of(path: Path) -> str:
    """ "methods.dosser" for methods/dosser.py, "methods" for methods/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Dotted names inside dpdistill that a file imports, at the top or in a function; names from a package count as modules too."""
    package = ["dpdistill", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            found |= {".".join(base)} | {".".join([*base, alias.name]) for alias in node.names}
    return {name.removeprefix("dpdistill").lstrip(".") for name in found if name.split(".")[0] == "dpdistill"}


def top_of(name: str) -> str:
    return name.split(".")[0]


ALLOWED = {  # by package: what its files may import of ours
    "privacy": {"privacy", "errors"},
    "mechanisms": {"mechanisms", "privacy", "data", "errors"},
    "data": {"data", "errors"},
    "models": {"models", "data", "errors"},
}


def direction_faults(path: Path) -> list[str]:
    """What a file imports against the direction."""
    me = module_of(path)
    mine, names = top_of(me), {name for name in imports_of(path) if name}
    faults = []
    for name in sorted(names):
        top = top_of(name)
        if mine in ALLOWED and top not in ALLOWED[mine]:
            faults.append(f"{me} imports {name}")
        sibling = (
            me != "methods"
            and top == "methods"
            and name.split(".")[1:2] not in ([], ["base"], ["shared"], me.split(".")[1:2])
        )
        if mine == "methods" and (top in TOPS or sibling):
            faults.append(f"{me} imports {name}")
        if top == "cli" and mine not in ("cli", "__main__"):
            faults.append(f"{me} imports {name}")
    return faults


def test_imports_point_one_way() -> None:
    assert len(FILES) > 20
    assert [fault for path in FILES for fault in direction_faults(path)] == []


def test_the_direction_test_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("privacy", "methods", "data"):
        (tmp_path / package).mkdir()
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for place, text in {
        "privacy/x.py": "from ..mechanisms import noise",
        "privacy/y.py": "def f():\n    import dpdistill.methods.joint",
        "methods/x.py": "from .joint import Config",
        "methods/y.py": "from . import joint",
        "methods/z.py": "from .. import bundle",
        "data/x.py": "from ..privacy.ledger import Ledger",
        "pipeline.py": "from .cli import main",
    }.items():
        (tmp_path / place).write_text(text)
        assert direction_faults(tmp_path / place), place
    (tmp_path / "methods" / "good.py").write_text("from .base import Public\nfrom ..mechanisms import PrivateData")
    assert not direction_faults(tmp_path / "methods" / "good.py")


def test_privacy_imports_no_torch() -> None:
    code = "import sys, dpdistill.privacy, dpdistill.privacy.ledger; sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], env={"PYTHONPATH": str(ROOT.parent)}, check=False)
    assert run.returncode == 0


INSIDE = {"_records", "_ledger", "_vault", "_pending", "_exact_sum", "_attempts", "_check_charged", "_name", "_key"}
INSIDE |= {"_noisy", "_rows", "_features", "_models", "_make", "_count", "_charge", "_coins", "_toss", "_add_noise"}


def test_nobody_else_looks_behind_the_door() -> None:
    """Not even by getattr: the names themselves occur nowhere outside mechanisms/ and data/ as attributes of another object."""
    faults = []
    for path in FILES:
        if top_of(module_of(path)) == "mechanisms":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            own = (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("self", "cls")
            )
            if isinstance(node, ast.Attribute) and node.attr in INSIDE and not own:
                faults.append(f"{path.name}:{node.lineno} .{node.attr}")
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in INSIDE:
                faults.append(f"{path.name}:{node.lineno} {node.value!r}")
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("__dict__", "__getstate__")
                and top_of(module_of(path)) == "methods"
            ):
                faults.append(f"{path.name}:{node.lineno} .{node.attr}")
    assert faults == []


def test_only_the_door_draws_noise_and_reads_records() -> None:
    """Nothing outside mechanisms/ imports its noise, its clipping, or the reservation that stands for a charge."""
    for path in FILES:
        if top_of(module_of(path)) not in ("mechanisms", ""):
            names = imports_of(path)
            assert not {n for n in names if n.startswith(("mechanisms.noise", "mechanisms.clipping"))}, path


CALLS = {  # dotted calls that turn data into code, or tie noise to a global seed
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "joblib.load",
    "torch.manual_seed",
    "torch.seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "random.seed",
    "np.random.seed",
    "numpy.random.seed",
    "os.system",
}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "random", "yaml"}


def code_faults(source: str) -> list[str]:
    """Calls and imports in a source text that must not be in the package."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            legacy = name.startswith(("np.random.", "numpy.random.")) and name.split(".")[-1] not in (
                "default_rng",
                "Generator",
                "PCG64",
            )
            if name in CALLS or legacy:
                faults.append(f"{node.lineno}: {name}")
            if name in ("np.load", "numpy.load") and not any(
                k.arg == "allow_pickle" and isinstance(k.value, ast.Constant) and k.value.value is False
                for k in node.keywords
            ):
                faults.append(f"{node.lineno}: {name} without allow_pickle=False")
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        faults += [f"{node.lineno}: import {name}" for name in imported if name.split(".")[0] in MODULES]  # type: ignore[attr-defined]
    return faults


def test_no_code_from_data_and_no_global_seed() -> None:
    assert {str(path): code_faults(path.read_text()) for path in FILES if code_faults(path.read_text())} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(f)",
        "eval('1')",
        "np.random.normal(3)",
        "np.load(f)",
        "torch.manual_seed(0)",
    ],
)
def test_the_code_test_sees_it(source: str) -> None:
    assert code_faults(source)


def test_noise_and_coins_come_from_the_stream_alone() -> None:
    """The door's files name no generator of torch or numpy; the probe of made-up images has one of its own."""
    for name in ("private.py", "noise.py", "vault.py", "clipping.py", "gradients.py", "features.py", "answers.py"):
        source = (ROOT / "mechanisms" / name).read_text()
        for word in ("randn", "torch.rand", "torch.normal", "np.random", "default_rng", "Generator"):
            assert word not in source, (name, word)
