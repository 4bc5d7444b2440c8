"""kill -9 at every numbered point of a whole `distil` run: the same call gives the same release and ledger, to the byte.

Runs are forked children, so that none pays for an import; they die by SIGKILL, which nothing can catch. The key and the ledger are
made first, and copied to each place: both are random by design. Points of one process are counted from its own start.
"""

import os
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpdistill import pipeline
from dpdistill.bundle.verification import verify
from dpdistill.config import RunConfig
from dpdistill.mechanisms import Vault
from dpdistill.methods import joint
from dpdistill.pipeline import distil
from dpdistill.privacy import Ledger, accounting, faults, queries

# Two checkpoints of the fit, both in the middle of what one network serves.
JOINT = {
    "steps": 7,
    "repeats": 3,
    "networks": 1,
    "feature_width": 4,
    "feature_dims": 6,
    "pixel_dims": 4,
    "components": 2,
    "pool_mixture": 4,
    "pool_public": 12,
    "width": 4,
}
NDPDC = {"steps": 3, "sampling_prob": 0.5, "group_size": 10, "width": 4, "checkpoint_steps": 1}


def child(work: Callable[[], object], *, kill_at: int = 0, points: Path | None = None) -> int:
    """Runs work() in a fork; returns 0 where it ended well, -9 where it was killed, 1 where it raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            faults._passed = 0
            os.environ["DPDISTILL_KILL_AT"] = str(kill_at)
            if points:
                os.environ["DPDISTILL_POINTS"] = str(points)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """begun(name) -> the place of a run that has its key and its ledger, the same in all places, and nothing else."""
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pipeline, "N_PROCEDURAL", 40)
    monkeypatch.setattr(joint, "match_pool", partial(joint.match_pool, save_every=2))
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process loses nothing that it wrote; a power cut would
    for place in (accounting, queries):  # the same arithmetic a hundred times over
        monkeypatch.setattr(place, "gaussian_multiplier", lru_cache(accounting.gaussian_multiplier))
    monkeypatch.setattr(accounting, "gaussian_epsilon", lru_cache(accounting.gaussian_epsilon))
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (13, 8, 8), dtype=np.uint8), np.arange(13) % 2
    np.savez(tmp_path / "private.npz", images=images, labels=labels, classes=np.array(["a", "b"]))
    first = tmp_path / "first"
    Vault.open(first / "out.state" / "vault")
    Ledger.open(first / "ledger.jsonl", cap=(1.0, 1e-5)).close()

    def copy(name: str) -> Path:
        return Path(shutil.copytree(first, tmp_path / name))

    return copy


def config(place: Path, settings: dict[str, Any], method: str = "joint") -> RunConfig:
    paths = {
        "data": str(place.parent / "private.npz"),
        "out": str(place / "out"),
        "ledger": str(place / "ledger.jsonl"),
    }
    return RunConfig(**paths, per_class=1, method=method, settings=settings)


def outcome(place: Path) -> dict[str, bytes | None]:
    """Every file and folder of a run's place: the release, the ledger, and nothing else."""
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in sorted(place.rglob("*"))}


def kill_everywhere(
    begun: Callable[[str], Path], plain: Callable[[Path], RunConfig], rooms: tuple[str, ...] = ("",)
) -> list[str]:
    """Kills a run at each of its points, in turn, and compares what the same call then makes. Returns all points' names.

    Args:
      rooms: only points whose names begin so.
    """
    whole = begun("whole")
    distil(plain(whole), quiet=True)  # here, so that the children find everything imported and computed
    expected = outcome(whole)
    assert verify(whole / "out").ok
    assert sorted(name for name in expected if "/" not in name) == ["ledger.jsonl", "out"]
    again = begun("again")
    assert child(lambda: distil(plain(again), quiet=True), points=again.parent / "points") == 0
    assert outcome(again) == expected
    names = (again.parent / "points").read_text().splitlines()
    for number, name in enumerate(names, start=1):
        if not name.startswith(rooms):
            continue
        place = begun(f"k{number}")
        assert child(lambda p=place: distil(plain(p), quiet=True), kill_at=number) == -signal.SIGKILL, name
        if (place / "out").exists():  # there is never half of one
            assert verify(place / "out").ok, name
        distil(plain(place), quiet=True)
        found = outcome(place)
        assert found == expected, (name, [key for key in expected if found.get(key) != expected[key]])
        shutil.rmtree(place)
    return names


def test_killed_at_every_point_and_resumed(begun: Callable[[str], Path]) -> None:
    names = kill_everywhere(begun, lambda place: config(place, JOINT))
    assert names.count("door: summed") == 4
    assert names.count("workspace: checkpoint in place") == 3
    assert names.count("ledger: line on disk") == 6  # run, four charges, final
    for room in ("ledger: ", "vault: ", "door: ", "workspace: ", "release: ", "pipeline: "):
        assert any(name.startswith(room) for name in names)
    assert names[-1] == "pipeline: state removed"


def test_poisson_samples_and_reservations_too(begun: Callable[[str], Path]) -> None:
    rooms = ("ledger: ", "door: ", "workspace: ")  # the rest is the same for every method
    names = kill_everywhere(begun, lambda place: config(place, NDPDC, "ndpdc"), rooms)
    assert names.count("ledger: line on disk") == 3  # run, one charge for all, final
    assert names.count("door: summed") == 3


def test_killed_again_and_again(begun: Callable[[str], Path]) -> None:
    """One run that dies again and again, each time a little later than it began."""
    whole, often = begun("whole"), begun("often")
    distil(config(whole, JOINT), quiet=True)
    for _ in range(20):
        if child(lambda: distil(config(often, JOINT), quiet=True), kill_at=17) == 0:
            break
    assert child(lambda: distil(config(often, JOINT), quiet=True)) == 0
    assert outcome(often) == outcome(whole)


def test_killed_and_the_budget_is_raised(begun: Callable[[str], Path]) -> None:
    """The cap is a decision of its own: a resumed run with another budget goes on, and charges nothing twice."""
    place = begun("raised")
    assert child(lambda: distil(config(place, JOINT), quiet=True), kill_at=30) == -signal.SIGKILL
    distil(replace(config(place, JOINT), budget=2.0), quiet=True)
    lines = (place / "ledger.jsonl").read_text().splitlines()
    assert sum('"type":"intent"' in line for line in lines) == 4
    assert verify(place / "out").ok
