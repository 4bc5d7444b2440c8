"""W processes make the release and the ledger that one makes, to the byte: whole runs, killed ones and refused ones.

Runs are forked processes that torch.distributed connects; one test goes by torchrun itself. The key and the ledger are made first, and
copied to each place: both are random by design.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpdistill import pipeline, planning, sources
from dpdistill.bundle.verification import verify
from dpdistill.config import DiffusionConfig, ModelConfig, RunConfig
from dpdistill.conversion import convert
from dpdistill.diffusion import diffuse
from dpdistill.errors import BudgetError, ConfigError, LedgerError
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods.diffusion import dpsad
from dpdistill.methods.shared import linear
from dpdistill.methods.shared.embedding import EmbeddingConfig
from dpdistill.privacy import GaussianSum, Ledger, accounting, faults
from several import several
from small_sampler import NETWORK, SAMPLER

N_RECORDS = 37  # ten micro-batches of four, the last not full; three batches of rank-one vectors
JOINT = {
    "steps": 3,
    "networks": 2,
    "pool": 12,
    "feature_dims": 6,
    "pixel_dims": 4,
    "components": 2,
    "width": 4,
}
DOSSER = {"sampling_steps": 6, "optimisation_steps": 2, "sampling_prob": 0.15, "group_size": 10, "width": 4} | {
    "subspace_dim": 2,
    "auxiliary_images": 8,
    "checkpoint_steps": 1,
}
NDPDC = {"steps": 6, "sampling_prob": 0.15, "group_size": 10, "width": 4, "checkpoint_steps": 1}
STUDENT = {"steps": 3, "batch": 16, "width": 8, "generator_width": 4, "latent": 4, "pool": 64, "teacher_dims": 20}
# Of six Poisson samples hardly ever all fall into equal shares.
DPSGD = {"steps": 6, "expected_batch": 6, "multiplicity": 2, **NETWORK, **SAMPLER}
WARM = {"pixel_dims": 4, "components": 2}
ACCOUNTING = {name: lru_cache(getattr(accounting, name)) for name in ("_pld_epsilon", "gaussian_epsilon")}
WAYS: dict[str, dict[str, Any]] = {
    "joint": {"settings": JOINT},
    "dosser": {"settings": DOSSER},
    "ndpdc": {"settings": NDPDC},
    "teacher": {"settings": STUDENT | {"teacher_steps": 3, "pixel_dims": 4, "components": 2}},
    "votes": {"settings": STUDENT | {"queries": 40}, "shards": 5},
    "dpdm": {"settings": DPSGD},
    "dpsad": {"settings": SAMPLER | WARM | {"warm_start": "mixture", "share_denoiser": 0.0}},  # its DP-SGD is dpdm's
    "dpsad by embedding": {"settings": SAMPLER | WARM | {"warm_start": "embedding", "embedding_batch": 2}},
    "shards": {"settings": {"models": 4, "teacher_steps": 2, "fit_steps": 2, "queries": 4, **NETWORK, **SAMPLER}},
}


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """begun(name) -> the place of a run that has its key and its ledger, the same in all places, and nothing else."""
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(planning, "N_PROCEDURAL", 40)
    monkeypatch.setattr(sources, "PrivateData", partial(PrivateData, micro_batch=4))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(planning, "calibrate", lambda *_: 1.0)  # the same accounting a dozen times over
    monkeypatch.setattr(dpsad, "GUIDE", linear.Training(teacher_steps=2, teacher_dims=4))
    small = EmbeddingConfig(n_frequencies=8, steps=4, at_once=3, latent=2, width=2, bf16=True, checkpoint_steps=2)
    monkeypatch.setattr(dpsad, "EMBEDDING", small)
    monkeypatch.setattr(dpsad, "N_GENERATED", 12)
    for name, cached in ACCOUNTING.items():
        monkeypatch.setattr(accounting, name, cached)
    torch.set_num_threads(1)
    save(tmp_path / "private.npz", N_RECORDS)
    first = tmp_path / "first"
    Vault.open(first / "out.state" / "vault")
    Ledger.open(first / "ledger.jsonl", cap=(100.0, 1e-5)).close()

    def copy(name: str) -> Path:
        return Path(shutil.copytree(first, tmp_path / name))

    return copy


def save(path: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 90, (n, 8, 8), dtype=np.uint8), np.arange(n) % 2
    images[labels == 0, :4] += 150
    np.savez(path, images=images, labels=labels, classes=np.array(["top", "none"]))


def run(way: str, place: Path) -> None:
    """One whole run, in this process or with the others that the environment names."""
    facts: dict[str, Any] = {
        "data": str(place.parent / "private.npz"),
        "out": str(place / "out"),
        "ledger": str(place / "ledger.jsonl"),
        "per_class": 1,
        **WAYS[way],
    }
    if way in ("joint", "dosser", "ndpdc"):
        pipeline.distil(RunConfig(**facts, method=way), quiet=True)
    elif way in ("teacher", "votes"):
        convert(ModelConfig(**facts), quiet=True)
    else:
        method = way.partition(" ")[0]
        diffuse(DiffusionConfig(**facts, method=method, expected_records=N_RECORDS), quiet=True)


def outcome(place: Path) -> dict[str, bytes | None]:
    """Every file and folder of a run's place: the release, the ledger, and nothing else."""
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in sorted(place.rglob("*"))}


@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_processes_makes_the_same_release(
    way: str, begun: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = begun("whole")
    batches: list[int] = []
    mine = sources.Ranks.mine
    monkeypatch.setattr(
        sources.Ranks, "mine", lambda self, starts: (batches.append(len(starts)), mine(self, starts))[1]
    )
    run(way, whole)
    expected = outcome(whole)
    assert verify(whole / "out").ok
    assert sorted(name for name in expected if "/" not in name) == ["ledger.jsonl", "out"]
    for world in (2, 3) if way == "joint" else (3,):
        place = begun(f"w{world}")
        assert several(world, lambda _, place=place: run(way, place), tmp_path / f"log{world}") == [0] * world
        assert outcome(place) == expected, [key for key in expected if outcome(place).get(key) != expected[key]]
    uneven = [n for n in batches if n % 3]
    assert uneven, "every process had as much"
    assert way not in ("dosser", "ndpdc", "dpdm") or min(batches) < 3, "no process had an empty batch"


def as_command(*arguments: str) -> None:
    """The command line, in a process whose environment says which it is."""
    sys.argv = ["dpdistill", *arguments]
    for name in [name for name in sys.modules if name.startswith("dpdistill.cli")]:
        del sys.modules[name]
    importlib.import_module("dpdistill.cli").main()


def command(place: Path, *more: str) -> list[str]:
    paths = {"--data": place.parent / "private.npz", "--out": place / "out", "--ledger": place / "ledger.jsonl"}
    settings = [f"--set={name}={value}" for name, value in JOINT.items()]
    return ["dataset", *(str(x) for pair in paths.items() for x in pair), "--per-class=1", *settings, *more]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_and_another_number_goes_on(
    victim: int, begun: Callable[[str], Path], tmp_path: Path
) -> None:
    whole, place, log = begun("whole"), begun("killed"), tmp_path / "log"
    run("joint", whole)

    def killed(rank: int) -> None:
        faults._passed = 0
        if rank == victim:
            os.environ["DPDISTILL_KILL_AT"] = "20" if victim == 0 else "3"  # in the third pass, or about there
        as_command(*command(place))

    codes = several(3, killed, log)
    assert codes == [-signal.SIGKILL if rank == victim else 2 for rank in range(3)]
    assert not (place / "out").exists()
    said = (log / "0.err").read_text()
    assert victim == 0 or "another process of this run ended" in said.splitlines()[-1]
    assert not any((log / f"{rank}.{kind}").read_text() for rank in (1, 2) for kind in ("out", "err"))
    done = sum(path.suffix == ".npy" for path in (place / "out.state" / "vault").iterdir())
    assert 0 < done < 4
    assert several(2, lambda _: run("joint", place), log) == [0, 0]
    assert outcome(place) == outcome(whole)


def test_a_refused_budget_ends_all_with_one_line(begun: Callable[[str], Path], tmp_path: Path) -> None:
    place, log = begun("refused"), tmp_path / "log"
    shutil.rmtree(place / "out.state")
    (place / "ledger.jsonl").unlink()
    Ledger.open(place / "ledger.jsonl", cap=(1.0, 1e-5)).close()
    assert several(3, lambda _: as_command(*command(place)), log) == [2, 2, 2]
    said = {path.name: path.read_text() for path in log.iterdir() if path.stat().st_size}
    assert list(said) == ["0.err"], said
    (line,) = said["0.err"].splitlines()
    assert line.startswith("dpdistill: the ledger of this data has spent")
    assert sorted(os.listdir(place)) == ["ledger.jsonl"]


def test_a_file_that_one_process_cannot_read_ends_all(begun: Callable[[str], Path], tmp_path: Path) -> None:
    place, log = begun("unread"), tmp_path / "log"

    def work(rank: int) -> None:
        as_command(*command(place, *(["--data=/nowhere.npz"] if rank == 1 else [])))

    assert several(2, work, log) == [2, 2]
    assert (log / "0.err").read_text().startswith("dpdistill: /nowhere.npz: ")
    assert (log / "1.err").read_text() == ""
    assert b"intent" not in (place / "ledger.jsonl").read_bytes()


def test_other_settings_in_one_process_are_refused(begun: Callable[[str], Path], tmp_path: Path) -> None:
    place, log = begun("apart"), tmp_path / "log"
    assert several(2, lambda rank: as_command(*command(place, f"--seed={rank}")), log) == [2, 2]
    assert "the processes of this run went different ways" in (log / "0.err").read_text()
    assert b"intent" not in (place / "ledger.jsonl").read_bytes()


def test_a_way_that_divides_nothing_is_for_one_process(begun: Callable[[str], Path], tmp_path: Path) -> None:
    def work(rank: int) -> str:
        facts = {"data": str(tmp_path / "private.npz"), "out": str(tmp_path / "out"), "expected_records": 9}
        with pytest.raises(ConfigError, match="leave torchrun out"):
            diffuse(DiffusionConfig(**facts, method="paper", accept_no_record_guarantee=True), quiet=True)
        return "refused"

    assert several(2, work, tmp_path / "log") == ["refused"] * 2


def test_the_others_hold_neither_key_nor_ledger(tmp_path: Path) -> None:
    ledger, vault = Ledger.elsewhere(), Vault.elsewhere()
    query = GaussianSum(name="s", dim=1, noise_multiplier=1.0)
    with pytest.raises(LedgerError, match="closed"):
        ledger.start("run", "method", "config")
    with pytest.raises((LedgerError, BudgetError, StopIteration)):
        ledger.reserve("run", query)
    for draw in (lambda: vault.sampling_stream("r"), lambda: vault.noise_stream("r", b"", np.zeros(1, np.int64))):
        with pytest.raises(ValueError, match="Expected a key"):
            draw()


def test_torchrun_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes by the launcher that people use: only the first talks, and the release is one process's.

    What goes wrong while an interpreter is taken down, as it did in torch.distributed's threads, is nothing that a run may fail by.
    """
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import atexit, os\nif 'RANK' in os.environ: atexit.register(os.abort)\n")
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    save(tmp_path / "private.npz", 300)  # two micro-batches
    first = tmp_path / "one"
    Vault.open(first / "out.state" / "vault")
    Ledger.open(first / "ledger.jsonl", cap=(100.0, 1e-5)).close()
    shutil.copytree(first, tmp_path / "two")
    run("joint", first)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "dpdistill"]
    done = subprocess.run(
        [sys.executable, "-W", "error", *launch, *command(tmp_path / "two")],
        env=os.environ | {"PYTHONPATH": f"{Path(pipeline.__file__).parents[1]}:{site}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "two") == outcome(first)
    assert done.stdout.count("release: ") == 1
    assert done.stderr.count("fitting images") == 1
