r"""The door itself, on the worst pair of data sets: a million draws with a record and a million without, through the real code path.

A release of many rows is as many independent experiments: in half of them, by a coin, the record is there. Its vector is far longer
than C, so that clipping is at work as well. What is measured is the integers that were released, as the vault keeps them.

Every audited kind is one charge at a σ that is worth exactly the ε under test. Two sums with opposite signs are audited as one, and their
difference is what the attacker looks at: noise used twice would be gone from it.
"""

import math
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import binom, chi2, poisson
from torch import Tensor

from ..data.images import LabelledImages
from ..mechanisms import Ensemble, PrivateData, Vault
from ..mechanisms.features import PrivateFeatures
from ..privacy import GaussianSum, Ledger, NoisyVotes, Planned, ShardSum, accounting, calibrate
from ..privacy.queries import VOTE_BITS
from . import bounds
from .result import Kernel

DRAWS = 10**6
CONFIDENCE = 0.999
LEVEL = 1e-6  # of the tests of the noise itself
_LONG = 1e3  # a record's vector before clipping, in units of C
_CAP = (1e15, 1e-5)  # made-up data: nothing to protect
_NAMES = ("here", "there")

Integers = NDArray[np.int64]
Coins = NDArray[np.bool_]


@dataclass(frozen=True)
class Drawn:
    """What the attacker has: one number an experiment, in units of the record's shift, and the noise by itself, in grid steps.

    Attributes:
      seen: [N]. Noise of standard deviation `sigma`, plus 1 where the record was there.
      included: [N], the coins.
      noise: released integers of experiments without a record; their standard deviation has to be `steps`.
    """

    seen: NDArray[np.float64]
    included: Coins
    sigma: float
    noise: Integers
    steps: float


@contextmanager
def _opened(insecure_seed: int | None) -> Iterator[tuple[Ledger, Vault]]:
    """A ledger and a vault of made-up data, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="dpdistill-audit-") as place:
        vault = Vault.open(Path(place) / "vault", insecure_seed=insecure_seed)
        with Ledger.open(Path(place) / "ledger.jsonl", cap=_CAP, data="made-up", unit="record") as ledger:
            yield ledger, vault


def _released(vault: Vault, before: set[str]) -> Integers:
    """The noisy integers that came out last."""
    (name,) = {path.stem for path in vault.folder.glob("*.npy")} - before
    before.add(name)
    noisy = vault.load(name)
    if noisy is None:
        raise RuntimeError("the door kept no noisy sum")
    return noisy


@cache
def _names(n: int) -> tuple[str, ...]:
    return tuple(map(str, range(n)))


def _records(rows: Integers, n_classes: int) -> LabelledImages:
    """One white pixel of every class in `rows`."""
    images = np.full((len(rows), 1, 1, 1), 255, np.uint8)
    return LabelledImages(images=images, labels=rows, class_names=_names(n_classes), source="made-up")


def gaussian_sum(
    sigma: float, n: int, coins: np.random.Generator, q: float = 1.0, grid_bits: int = 24, seed: int | None = None
) -> Drawn:
    """Two sums by class, each class an experiment: the record adds C to one and takes C from the other. With q < 1, one sum of a sample."""
    included = coins.permutation(2 * n) < n
    signs = (1.0, -1.0) if q == 1 else (1.0,)
    each = sigma * math.sqrt(len(signs))
    query = GaussianSum(
        name="audit", dim=1, n_classes=2 * n, noise_multiplier=each, sampling_prob=q, grid_bits=grid_bits
    )
    with _opened(seed) as (ledger, vault):
        private = PrivateData(_records(np.flatnonzero(included), 2 * n), ledger, vault, micro_batch=2**16)
        held, known, noisy = private.reserve(query, len(signs)), set[str](), []
        for index, sign in enumerate(signs):

            def fn(x: Tensor, y: Tensor, sign: float = sign) -> Tensor:
                return x.flatten(1) * (_LONG * sign)

            private.release_reserved(held, index, fn)
            noisy.append(_released(vault, known).ravel())
    seen = sum(sign * one for sign, one in zip(signs, noisy, strict=True)) / (len(signs) * query.unit_steps)
    return Drawn(seen, included, sigma, np.concatenate([one[~included] for one in noisy]), query.sigma_steps)


def rank_one_sum(
    sigma: float, n: int, coins: np.random.Generator, grid_bits: int = 30, seed: int | None = None
) -> Drawn:
    """One record of norm C spread evenly over the coordinates of one matrix: each carries C/√n, under noise of C·σ/√n."""
    side = math.isqrt(2 * n) // 2 * 2
    rows = coins.permutation(side) < side // 2
    n = side * side // 2
    query = GaussianSum(name="audit", dim=side * side, noise_multiplier=sigma / math.sqrt(n), grid_bits=grid_bits)
    weight = torch.from_numpy(rows.astype(np.float32))

    def left(features: Tensor, y: Tensor) -> Tensor:
        return features.norm(dim=1, keepdim=True) * weight * _LONG

    with _opened(seed) as (ledger, vault):
        private = PrivateData(_records(np.zeros(1, np.int64), 2), ledger, vault, micro_batch=4)
        features = PrivateFeatures(private, lambda x: x.flatten(1).expand(-1, side), side)
        features.release_reserved(private.reserve(query), 0, left)
        noisy = _released(vault, set()).ravel()
    included = np.repeat(rows, side)
    seen = noisy / (query.unit_steps / math.sqrt(n))
    return Drawn(seen, included, sigma, noisy[~included], query.sigma_steps)


def noisy_votes(sigma: float, n: int, coins: np.random.Generator, seed: int | None = None) -> Drawn:
    """Three owners' models; in half of the queries, one of them votes otherwise. Each query is an experiment, under its own share of σ."""
    queries, included = 2 * n, coins.permutation(2 * n) < n
    turned = torch.from_numpy(included.astype(np.int64))

    def models(x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 2).double()

    def switching(x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(turned[: len(x)], 2).double()

    query = NoisyVotes(
        name="audit", n_queries=queries, n_classes=2, n_models=3, noise_multiplier=sigma / math.sqrt(queries)
    )
    with tempfile.TemporaryDirectory(prefix="dpdistill-audit-") as place:
        vault = Vault.open(Path(place) / "vault", insecure_seed=seed)
        with Ledger.open(Path(place) / "ledger.jsonl", cap=_CAP, data="made-up", unit="owner") as ledger:
            ensemble = Ensemble.of_models([models, switching, models], 2, ledger, vault)
            ensemble.release_reserved(ensemble.reserve(query), 0, torch.zeros(queries, 1))
            noisy = _released(vault, set())
    # From three votes for 0 to two, and from none for 1 to one: a step of √2, seen along its own direction.
    seen = ((noisy[:, 1] - noisy[:, 0]) / 2**VOTE_BITS + 3) / 2
    still = noisy[~included] - np.array([3, 0]) * 2**VOTE_BITS
    return Drawn(seen, included, sigma, still.ravel(), query.sigma_steps)


def shard_sum(sigma: float, n: int, coins: np.random.Generator, seed: int | None = None) -> Drawn:
    """One model of three turns its vector, of norm C, about in half of its coordinates: each moves by 2C/√D, under noise of 2C·σ/√D."""
    dim, included = 2 * n, coins.permutation(2 * n) < n
    turned = torch.from_numpy(np.where(included, 1.0, -1.0))
    query = ShardSum(name="audit", dim=dim, n_models=3, noise_multiplier=sigma / math.sqrt(dim), grid_bits=24)

    def still(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 1).double()

    def switching(x: Tensor) -> Tensor:
        return turned[: len(x), None] * _LONG

    with tempfile.TemporaryDirectory(prefix="dpdistill-audit-") as place:
        vault = Vault.open(Path(place) / "vault", insecure_seed=seed)
        with Ledger.open(Path(place) / "ledger.jsonl", cap=_CAP, data="made-up", unit="owner") as ledger:
            ensemble = Ensemble.of_models([still, switching, still], 2, ledger, vault)
            ensemble.release_vectors(ensemble.reserve(query), 0, torch.zeros(dim, 1))
            noisy = _released(vault, set()).ravel()
    length = query.unit_steps / math.sqrt(dim)
    seen = (noisy / length + 1) / 2
    still_there = noisy[~included] + round(length * (1 - math.sqrt(dim) / 2 ** (query.grid_bits + 1)))
    return Drawn(seen, included, sigma, still_there, query.sigma_steps)


DRAW: dict[str, Callable[..., Drawn]] = {
    "gaussian_sum": gaussian_sum,
    "rank_one_sum": rank_one_sum,
    "noisy_votes": noisy_votes,
    "shard_sum": shard_sum,
}


def audit(
    mechanism: str,
    epsilon: float,
    delta: float,
    *,
    draws: int = DRAWS,
    q: float = 1.0,
    coins: np.random.Generator | None = None,
    seed: int | None = None,
) -> Kernel:
    """Draws one kind of release at the σ that is worth `epsilon`, and returns what that shows.

    Args:
      draws: in each world.
      q: sampling rate, of a sum by class.
      coins, seed: for tests only: what decides which experiment has the record, and the noise.
    """
    sigma = _sigma(epsilon, delta, q)
    sampled = {"q": q} if mechanism == "gaussian_sum" else {}
    drawn = DRAW[mechanism](sigma, draws, coins or np.random.default_rng(secrets.randbits(128)), seed=seed, **sampled)
    return measure(drawn, mechanism, epsilon, delta, q)


@cache
def _sigma(epsilon: float, delta: float, q: float) -> float:
    """σ of one release worth `epsilon`, and no more."""
    if q == 1:
        return accounting.gaussian_multiplier(epsilon, delta)
    return calibrate(
        lambda sigma: [Planned(GaussianSum(name="audit", dim=1, noise_multiplier=sigma, sampling_prob=q))],
        epsilon,
        delta,
    )


def measure(drawn: Drawn, mechanism: str, epsilon: float, delta: float, q: float = 1.0) -> Kernel:
    """What a million draws show of ε and of the noise."""
    threshold = bounds.best_threshold(
        drawn.sigma, len(drawn.seen) // 2, CONFIDENCE, q
    )  # from public facts: fixed before the draws
    said = drawn.seen > threshold
    inside, outside = said[drawn.included], said[~drawn.included]
    mu = bounds.joint_mu(int(inside.sum()), len(inside), int(outside.sum()), len(outside), CONFIDENCE, q)
    noise, steps = drawn.noise, math.sqrt(drawn.steps**2 + 1 / 12)  # rounding adds a twelfth
    n, squares = len(noise), float((noise.astype(np.float64) ** 2).sum()) / steps**2
    far = int((np.abs(noise) >= 4 * drawn.steps).sum())
    due = 2 * float(ndtr(-(math.ceil(4 * drawn.steps) - 0.5) / drawn.steps))
    ordered = np.sort(noise)
    equal = np.diff(np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1, append=ordered[-1] + 1)))
    pairs, chance = (
        float((equal.astype(np.float64) * (equal - 1) / 2).sum()),
        n * (n - 1) / 2 / (2 * math.sqrt(math.pi) * steps),
    )
    rare = chance < n / 8  # else most draws have an equal one, and pairs say nothing
    wrong = {
        "spread": chi2.cdf(squares, n) < LEVEL,
        "tail": binom.cdf(far, n, due) < LEVEL,
        "resolution": rare and poisson.sf(pairs - 1, chance) < LEVEL,
    }
    return Kernel(
        mechanism=mechanism,
        sampling_prob=q,
        epsilon=epsilon,
        draws=len(inside),
        lower=bounds.epsilon_of(mu, delta, q),
        spread=math.sqrt(squares / n),
        tail=far / (n * due),
        repeats=pairs / chance if rare else 0.0,
        faults=tuple(name for name, found in wrong.items() if found),
    )
