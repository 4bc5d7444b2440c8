"""kill -9 at every numbered point of a run: resumed from the same folder, it gives the same ledger and the same arrays, to the byte.

Each run is a forked child, so that none pays for an import; the child dies by SIGKILL, which nothing can catch.
"""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crash_harness import forked
from dpdistill.data.images import LabelledImages
from dpdistill.errors import BudgetError, LedgerError
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.privacy import GaussianSum, Ledger, accounting, faults
from dpdistill.privacy import ledger as ledgers

Records = Callable[..., LabelledImages]
FULL = GaussianSum(name="full", dim=16, n_classes=3, noise_multiplier=50.0, grid_bits=12)
POISSON = GaussianSum(name="steps", dim=16, noise_multiplier=50.0, sampling_prob=0.5, grid_bits=12)
CAP = (accounting.epsilon([FULL.part(2), POISSON.part(3)], 1e-5), 1e-5)


def pixels(x: Tensor, y: Tensor) -> Tensor:
    return x.flatten(1)


def run(folder: Path, records: LabelledImages, cap: tuple[float, float] = CAP) -> None:
    """Three requests of a method: a full-batch release, three reserved Poisson releases, another full-batch one."""
    vault = Vault.open(folder / "vault")
    with Ledger.open(folder / "ledger.jsonl", cap=cap, data="toy") as ledger:
        ledger.start(vault.run, "toy", "config")
        door = PrivateData(records, ledger, vault, micro_batch=4)
        arrays = [door.release(FULL, pixels)]
        held = door.reserve(POISSON, 3)
        arrays += [door.release_reserved(held, i, pixels) for i in range(3)]
        arrays.append(door.release(FULL, lambda x, y: -x.flatten(1)))
        ledger.finish(vault.run)
    np.savez(folder / "out.npz", *[array.numpy() for array in arrays])


def child(work: Callable[[], None], *, kill_at: int = 0, points: Path | None = None) -> int:
    """Runs work() in a fork, to be killed at a numbered point."""

    def to_be_killed() -> None:
        torch.set_num_threads(1)
        faults._passed = 0
        os.environ["DPDISTILL_KILL_AT"] = str(kill_at)
        if points:
            os.environ["DPDISTILL_POINTS"] = str(points)
        work()

    return forked(to_be_killed)


def began(folder: Path) -> Path:
    """A run's folder with the one initial key."""
    (folder / "vault").mkdir(parents=True)
    (folder / "vault" / "key").write_bytes(b"K" * 32)
    return folder


def outcome(folder: Path) -> tuple[bytes, list[bytes]]:
    with np.load(folder / "out.npz", allow_pickle=False) as arrays:
        return (folder / "ledger.jsonl").read_bytes(), [arrays[name].tobytes() for name in arrays.files]


@pytest.fixture
def whole(tmp_path: Path, toy_records: Records) -> tuple[tuple[bytes, list[bytes]], list[str]]:
    """The uninterrupted run, and the names of the points that it passed."""
    folder, names = began(tmp_path / "whole"), tmp_path / "points"
    assert child(lambda: run(folder, toy_records(9)), points=names) == 0
    return outcome(folder), names.read_text().splitlines()


def test_killed_at_every_point_and_resumed(
    whole: tuple[tuple[bytes, list[bytes]], list[str]], tmp_path: Path, toy_records: Records
) -> None:
    expected, points = whole
    assert len(points) >= 40
    assert len(set(expected[1])) == 5
    for number in range(1, len(points) + 1):
        folder = began(tmp_path / f"k{number}")
        assert child(lambda f=folder: run(f, toy_records(9)), kill_at=number) == -signal.SIGKILL
        assert child(lambda f=folder: run(f, toy_records(9))) == 0, points[number - 1]
        assert outcome(folder) == expected, points[number - 1]
        shutil.rmtree(folder)


def test_killed_again_and_again(
    whole: tuple[tuple[bytes, list[bytes]], list[str]], tmp_path: Path, toy_records: Records
) -> None:
    expected, _ = whole
    rng = random.Random(5)
    for campaign in range(4):
        folder = began(tmp_path / f"c{campaign}")
        for _ in range(60):
            if child(lambda f=folder: run(f, toy_records(9)), kill_at=rng.randint(1, 9)) == 0:
                break
        else:
            assert child(lambda f=folder: run(f, toy_records(9))) == 0
        assert outcome(folder) == expected


def test_a_line_torn_by_the_crash(
    whole: tuple[tuple[bytes, list[bytes]], list[str]], tmp_path: Path, toy_records: Records
) -> None:
    """The process dies inside write(): the first, a middle or all but the last byte of a line is in the file."""
    expected, _ = whole
    for line in range(len(expected[0].splitlines())):
        for share in (0.0, 0.5, 1.0):
            folder = began(tmp_path / f"t{line}-{share}")

            def torn(f: Path = folder, line: int = line, share: float = share) -> None:
                write, calls = os.write, [0]

                def dying(descriptor: int, data: bytes) -> int:
                    if calls[0] == line:
                        write(descriptor, data[: max(1, int(share * (len(data) - 2)))])
                        os.kill(os.getpid(), signal.SIGKILL)
                    calls[0] += 1
                    return write(descriptor, data)

                os.write = dying
                run(f, toy_records(9))

            assert child(torn) == -signal.SIGKILL
            assert child(lambda f=folder: run(f, toy_records(9))) == 0
            assert outcome(folder) == expected


@pytest.mark.parametrize("room", ["wide", "tight"])
def test_another_sum_on_resume_is_charged_anew(
    room: str, whole: tuple[tuple[bytes, list[bytes]], list[str]], tmp_path: Path, toy_records: Records
) -> None:
    """Killed after the noise was bound to one sum; resumed on other data: a second intent, other noise, or a refusal."""
    expected, points = whole
    bound = points.index("door: summed") + 1 + 2  # the commitment is in place, the noisy sum is not
    folder = began(tmp_path / "changed")
    cap = (CAP[0] * 3, CAP[1]) if room == "wide" else CAP
    assert child(lambda: run(folder, toy_records(9), cap), kill_at=bound) == -signal.SIGKILL
    assert len(list((folder / "vault").glob("*.commitment"))) == 1
    other = toy_records(9)
    other.images[0] ^= 1
    if room == "tight":
        with pytest.raises(BudgetError):
            run(folder, other, cap)  # the plan fitted exactly: there is no room for the repeat and the rest
        return
    assert child(lambda: run(folder, other, cap), kill_at=6) == -signal.SIGKILL  # and again in the middle of that
    run(folder, other, cap)
    lines = ledgers.parse((folder / "ledger.jsonl").read_bytes())
    intents = [line for line in lines if line["type"] == "intent"]
    assert [line["again"] for line in intents] == ["", "2-0", "", ""]
    assert intents[1]["query"] == intents[0]["query"]
    assert ledgers.spent(lines, 1e-5) > CAP[0]
    noises = [np.frombuffer(raw, np.float32) for raw in (expected[1][0], outcome(folder)[1][0])]
    assert (noises[0] != noises[1]).all()
    before = outcome(folder)
    run(folder, other, cap)  # finished runs repeat themselves for free
    assert outcome(folder) == before


def test_a_resumed_run_must_ask_for_the_same(tmp_path: Path, toy_records: Records) -> None:
    folder = began(tmp_path / "asks")
    assert child(lambda: run(folder, toy_records(9)), kill_at=12) == -signal.SIGKILL
    with Ledger.open(folder / "ledger.jsonl", cap=CAP) as ledger:
        door = PrivateData(toy_records(9), ledger, Vault.open(folder / "vault"))
        before = (folder / "ledger.jsonl").read_bytes()
        with pytest.raises(LedgerError, match="other releases"):
            door.release(POISSON, pixels)
        assert (folder / "ledger.jsonl").read_bytes() == before


def test_without_the_key_a_new_run_is_charged_in_full(tmp_path: Path, toy_records: Records) -> None:
    folder = began(tmp_path / "lost")
    assert child(lambda: run(folder, toy_records(9)), kill_at=20) == -signal.SIGKILL
    shutil.rmtree(folder / "vault")
    spent = ledgers.parts(ledgers.parse((folder / "ledger.jsonl").read_bytes()))
    with pytest.raises(BudgetError):
        run(folder, toy_records(9))
    with Ledger.open(folder / "ledger.jsonl", cap=CAP) as ledger:
        ledger.raise_cap((CAP[0] * 3, CAP[1]))
    run(folder, toy_records(9))
    lines = ledgers.parse((folder / "ledger.jsonl").read_bytes())
    assert ledgers.parts(lines) == [*spent, FULL.part(), POISSON.part(3), FULL.part()]
