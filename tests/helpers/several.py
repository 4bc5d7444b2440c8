"""Runs work in several forked processes that torch.distributed connects as torchrun would, and checks what the door does in them.

Forks, so that none pays for an import. A run that hangs is ended and reported.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpdistill.data.images import LabelledImages
from dpdistill.mechanisms.ranks import Ranks

PATIENCE = 120  # seconds; only a deadlock takes so long


def several(world: int, work: Callable[[int], Any], folder: Path, patience: float = PATIENCE) -> list[Any]:
    """Returns what work(rank) gave in each of `world` processes, as JSON carries it; or the exit code, where it gave nothing.

    Each writes its output into `folder`, as RANK.out and RANK.err.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [_forked(rank, world, port, work, folder) for rank in range(world)]
    codes: dict[int, int] = {}
    end = time.monotonic() + patience
    while len(codes) < world:
        for rank, pid in enumerate(pids):
            if rank not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            raise AssertionError(f"the processes wait for one another; ended: {codes}")
        time.sleep(0.02)
    results = [folder / f"{rank}.json" for rank in range(world)]
    return [json.loads(path.read_text()) if path.exists() else codes[rank] for rank, path in enumerate(results)]


def _forked(rank: int, world: int, port: int, work: Callable[[int], Any], folder: Path) -> int:
    (folder / f"{rank}.json").unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in facts.items()})
        for number, name in ((1, "out"), (2, "err")):
            descriptor = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        found = work(rank)
        if found is not None:
            (folder / f"{rank}.json").write_text(json.dumps(found))
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class OneOfTwo(Ranks):
    """One process of two, without the other: does its share, and notes what both have to agree on."""

    world = 2

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.agreed = rank, []  # type: tuple[int, list[bytes]]

    def agree(self, what: Callable[[], bytes]) -> None:
        self.agreed.append(what())


# --- what the door keeps in several processes ---------------------------------------------------------------------------------------

N_RECORDS, MICRO_BATCH, CLASSES, SHARDS = 37, 4, 3, 5


def made_up(n: int = N_RECORDS, seed: int = 0) -> LabelledImages:
    rng = np.random.default_rng(seed)
    images = rng.integers(80, 170, (n, 1, 2, 4)).astype(np.uint8)
    return LabelledImages(images=images, labels=np.arange(n) % CLASSES, class_names=("a", "b", "c"), source="toy")


def flat(x: Tensor, y: Tensor) -> Tensor:
    return x.flatten(1)


class Place:
    """One run's folder, with the core `m` (a copied one, or the real)."""

    def __init__(self, m: SimpleNamespace, folder: Path) -> None:
        self.m, self.folder = m, folder

    def handle(self, ranks: Any, data: LabelledImages, cap: float = 1e9) -> Any:
        m, folder = self.m, self.folder
        if not ranks.first:
            ledger, vault = m.ledger.Ledger.elsewhere(), m.vault.Vault.elsewhere()
        else:
            (folder / "vault").mkdir(parents=True, exist_ok=True)
            (folder / "vault" / "key").write_bytes(b"k" * 32)
            ledger = self.ledger = m.ledger.Ledger.open(folder / "ledger", cap=(cap, 1e-5), data="toy")
            if cap > 1e6:
                ledger.check_affordable = lambda *_: None  # what releases cost takes longer to compute than they do
            vault = m.vault.Vault.open(folder / "vault")
        return m.private.PrivateData(data, ledger, vault, micro_batch=MICRO_BATCH, ranks=ranks)

    def close(self, ranks: Any) -> None:
        if ranks.first:
            self.ledger.close()

    def charged(self) -> int:
        path = self.folder / "ledger"
        return path.read_bytes().count(b'"intent"') if path.exists() else 0


def every_release(place: Place, ranks: Any) -> list[str]:
    """All kinds of releases behind the door, as text: full and sampled sums, of features too, votes and vectors of shards."""
    m = place.m
    handle = place.handle(ranks, made_up())

    def ask(kind: str = "GaussianSum", **facts: Any) -> Any:
        return getattr(m.queries, kind)(noise_multiplier=2.0, **facts)

    def left(f: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(y, CLASSES).float() - f[:, :CLASSES].softmax(1)

    def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
        weights = torch.zeros(CLASSES, 8).index_add_(0, labels, images.flatten(1))
        return lambda x: x.flatten(1) @ weights.T

    queries = torch.rand(6, 1, 2, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    found = [handle.release(ask(name="all", dim=8, n_classes=CLASSES, grid_bits=12), flat)]
    sampled = handle.reserve(ask(name="some", dim=8, sampling_prob=0.15, grid_bits=12), 3)
    found += [handle.release_reserved(sampled, index, flat) for index in range(3)]
    features = handle.features(lambda x: x.flatten(1) + 0.1, 8)
    for prob in (1.0, 0.3):
        held = handle.reserve(ask(name=f"rank-one-{prob}", dim=24, grid_bits=28, sampling_prob=prob))
        found.append(features.release_reserved(held, 0, left))
    shards = handle.shards(SHARDS, train)
    facts = {"n_models": SHARDS, "unit_moves": 2}
    held = shards.reserve(ask("NoisyVotes", name="votes", n_queries=6, n_classes=CLASSES, **facts))
    found.append(shards.release_reserved(held, 0, queries))
    held = shards.reserve(ask("ShardSum", name="vectors", dim=18, clip_norm=1.0, grid_bits=20, **facts))
    found.append(shards.release_vectors(held, 0, queries))
    place.close(ranks)
    return [tensor.numpy().tobytes().hex() for tensor in found]


def models_of_owners(place: Place, ranks: Any) -> list[list[int]]:
    """The exact votes of seven models: a model votes in one process."""
    m = place.m
    models = [lambda x, k=k: torch.eye(CLASSES)[k % CLASSES].repeat(len(x), 1) for k in range(7)]
    nothing = m.ledger.Ledger.elsewhere(), m.vault.Vault.elsewhere()
    held = m.ensemble.Ensemble.of_models(models, CLASSES, *nothing, ranks=ranks)
    query = m.queries.NoisyVotes(name="v", n_queries=2, n_classes=CLASSES, n_models=7, noise_multiplier=1.0)
    total = ranks.total(held._count(query, torch.zeros(2, 1, 2, 4), None) >> 10)
    assert len(total) == 2 * ranks.first, "an exact sum left the first process"
    found: list[list[int]] = ranks.lead(total.tolist)
    return found


def failing(place: Place, ranks: Any) -> None:
    """The second process fails in its share of a pass, where the others do not."""

    def fn(x: Tensor, y: Tensor) -> Tensor:
        if ranks.rank == 1 and len(x) == MICRO_BATCH:
            raise OSError(5, "Input/output error", "disk of one")
        return x.flatten(1)

    handle = place.handle(ranks, made_up())
    handle.release(place.m.queries.GaussianSum(name="s", dim=8, noise_multiplier=1.0, grid_bits=12), fn)


def too_dear(place: Place, ranks: Any) -> None:
    handle = place.handle(ranks, made_up(), cap=0.1)
    handle.release(place.m.queries.GaussianSum(name="s", dim=8, noise_multiplier=1.0, grid_bits=12), seen(place, 1))


def other_numbers(place: Place, ranks: Any) -> None:
    """The record function has another last bit in the third process, as on another kind of machine."""

    def fn(x: Tensor, y: Tensor) -> Tensor:
        return seen(place, 1)(x, y) * (1 + 2.0**-23 * (ranks.rank == 2))

    handle = place.handle(ranks, made_up())
    handle.release(place.m.queries.GaussianSum(name="s", dim=8, noise_multiplier=1.0, grid_bits=12), fn)


def other_records(place: Place, ranks: Any) -> None:
    data = made_up()
    order = np.roll(np.arange(N_RECORDS), int(ranks.rank == 2))  # the same, in another order: one would count twice
    data = LabelledImages(
        images=data.images[order], labels=data.labels[order], class_names=data.class_names, source="toy"
    )
    handle = place.handle(ranks, data)
    handle.release(place.m.queries.GaussianSum(name="s", dim=8, noise_multiplier=1.0, grid_bits=12), seen(place, 1))


def seen(place: Place, charges: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A record function that insists on so many charges on disk before it is given a record."""

    def fn(x: Tensor, y: Tensor) -> Tensor:
        if len(x) == MICRO_BATCH:
            assert place.charged() >= charges, "a record was read before its charge was on disk"
        return x.flatten(1)

    return fn


def charged_again(place: Place, ranks: Any) -> str:
    """Resumed with other records, it charges anew, slowly: nobody reads for the new sum before that."""
    query = place.m.queries.GaussianSum(name="s", dim=8, noise_multiplier=1.0, grid_bits=12)
    first = place.handle(ranks, made_up())
    first.release(query, seen(place, 1))
    if ranks.first:
        for path in (place.folder / "vault").glob("*.npy"):
            path.unlink()  # as if it had been stopped between the commitment and the noise
        place.ledger.close()
    handle = place.handle(ranks, made_up(seed=1))
    passes: list[int] = []
    if ranks.first:
        append = place.ledger._append
        place.ledger._append = lambda body: (time.sleep(0.2), append(body))[1]

    def fn(x: Tensor, y: Tensor) -> Tensor:
        if len(x) == MICRO_BATCH:
            passes.append(place.charged())
        return x.flatten(1)

    handle.release(query, fn)
    place.close(ranks)
    share = len(range(ranks.rank, -(-N_RECORDS // MICRO_BATCH), ranks.world))
    assert passes == [1] * share + [2] * share, passes
    return "charged again"


def attempted(m: SimpleNamespace, folder: Path, rank: int) -> dict[str, Any]:
    """All scenarios in turn, in one process of several."""
    found: dict[str, Any] = {}
    for scenario in (every_release, models_of_owners, charged_again, too_dear, other_numbers, other_records, failing):
        place = Place(m, folder / scenario.__name__)
        try:
            with m.ranks.joined() as ranks:
                found[scenario.__name__] = scenario(place, ranks)
        except Exception as error:
            found[scenario.__name__] = [type(error).__name__, str(error)]
    return found


def check_ranks(m: SimpleNamespace, folder: Path) -> None:
    """W processes release what one does, to the byte; what stops one stops all, with the same words; no record is read before its charge,
    nor by two; nothing is noised where one failed."""
    alone = Place(m, folder / "alone")
    with m.ranks.joined() as ranks:
        expected = every_release(alone, ranks)
    three = several(3, lambda rank: attempted(m, folder / "three", rank), folder / "three")
    for found in three:
        assert isinstance(found, dict), "a process ended without a word"
        assert found["every_release"] == expected, "other bytes than one process gives"
        assert found["models_of_owners"] == [[3, 2, 2]] * 2, found["models_of_owners"]
        assert found["charged_again"] == "charged again", found["charged_again"]
        assert found["too_dear"][0] == "BudgetError", found["too_dear"]
        assert found["too_dear"] == three[0]["too_dear"], "another error than the first process has"
        for name in ("other_numbers", "other_records"):
            assert found[name][0] == "RanksError", found[name]
            assert "different" in found[name][1], found[name]
    told = ["DpdistillError", "disk of one: Input/output error"]
    assert [found["failing"] for found in (three[0], three[2])] == [told, told], three[0]["failing"]
    assert three[1]["failing"][0] == "OSError"
    assert (folder / "three" / "every_release" / "ledger").read_bytes() == (folder / "alone" / "ledger").read_bytes()
    assert Place(m, folder / "three" / "too_dear").charged() == 0
    for name in ("failing", "other_numbers", "other_records", "too_dear"):
        kept = {path.name for path in (folder / "three" / name / "vault").iterdir()}
        assert kept == {"key"}, f"{name}: a sum was bound or noised"
