"""Poisson sampling: the rate to 2⁻⁵³, the law of the batch size, independence between records and between releases."""

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom, chi2

from dpdistill.data.images import LabelledImages
from dpdistill.mechanisms import PrivateData, private
from dpdistill.mechanisms.noise import Stream, derive
from dpdistill.privacy import GaussianSum

ALPHA = 1e-6


def coins(name: str, n: int, q: float) -> NDArray[np.bool_]:
    return Stream(hashlib.sha256(name.encode()).digest()).bernoulli(n, q)


class Words(Stream):
    def __init__(self, *words: int) -> None:
        self.left = np.array(words, dtype=np.uint64)

    def words(self, n: int) -> NDArray[np.uint64]:
        return self.left[:n]


@pytest.mark.parametrize("q", [2.0**-53, 0.25, 0.1, 1 / 3, 1e-9, 1 - 2.0**-53])
def test_the_threshold_is_exact(q: float) -> None:
    """True for exactly ceil(q·2⁵³) of the 2⁵³ values of a coin; a float32 uniform could not tell q from q·(1 + 1e-7)."""
    edge = math.ceil(q * 2**53)
    coin = Words((edge - 1) << 11 | 2047, min(edge, 2**53 - 1) << 11, 0).bernoulli(3, q)
    assert coin.tolist() == [True, edge == 2**53, True]
    assert abs(edge / 2**53 - q) <= 2.0**-53


@pytest.mark.parametrize("q", [0.001, 0.05, 0.5, 0.99])
def test_inclusion_rate(q: float) -> None:
    n = 1_000_000
    hits = int(coins(f"rate {q}", n, q).sum())
    assert ALPHA / 2 < binom.cdf(hits, n, q)
    assert ALPHA / 2 < binom.sf(hits - 1, n, q)


def test_batch_sizes_are_binomial_and_independent() -> None:
    """2,000 releases of 200 records: sizes by chi-square, each record's count, and no correlation from one release to the next."""
    n, releases, q = 200, 2000, 0.1
    key = bytes(range(32))
    chosen = np.stack([Stream(derive(key, "sample", "run", f"release-{i}")).bernoulli(n, q) for i in range(releases)])
    sizes = chosen.sum(axis=1)
    assert len(set(sizes.tolist())) > 10  # a fixed batch size would be another mechanism
    k = np.arange(n + 1)
    expected = releases * binom.pmf(k, n, q)
    seen = np.bincount(sizes, minlength=n + 1)
    big = expected >= 10
    statistic = float(((seen[big] - expected[big]) ** 2 / expected[big]).sum())
    assert chi2.sf(statistic, int(big.sum())) > ALPHA
    per_record = chosen.sum(axis=0)
    assert chi2.sf(float(((per_record - releases * q) ** 2 / (releases * q * (1 - q))).sum()), n) > ALPHA
    assert chi2.cdf(float(((per_record - releases * q) ** 2 / (releases * q * (1 - q))).sum()), n) > ALPHA
    both = int((chosen[1:] & chosen[:-1]).sum())
    expected_both, trials = n * (releases - 1) * q * q, n * (releases - 1)
    assert abs(both - expected_both) < 5 * math.sqrt(trials * q * q)
    pairs = int((chosen[:, 1:] & chosen[:, :-1]).sum())
    assert abs(pairs - releases * (n - 1) * q * q) < 5 * math.sqrt(releases * (n - 1) * q * q)


def test_the_door_samples_at_the_query_rate_anew_each_time(
    open_door: Callable[..., PrivateData], toy_records: Callable[..., LabelledImages]
) -> None:
    """Read through the door itself: 40 reserved releases that count records, with noise too small to hide the count."""
    n, q, releases = 500, 0.2, 40
    records = toy_records(n)
    door = open_door(records, cap=(1e15, 1e-5), micro_batch=500)
    query = GaussianSum(name="count", dim=1, noise_multiplier=1e-4, sampling_prob=q, grid_bits=12)
    held = door.reserve(query, releases)
    sizes = [float(door.release_reserved(held, i, lambda x, y: torch.ones(len(x), 1))) for i in range(releases)]
    counts = np.rint(np.array(sizes) * 4096 / 4094)  # a vector of norm C is shortened by the room for rounding
    assert len(set(counts.tolist())) > 8
    assert abs(counts.sum() - n * q * releases) < 5 * math.sqrt(n * q * (1 - q) * releases)
    z = ((counts - n * q) ** 2 / (n * q * (1 - q))).sum()
    assert ALPHA < chi2.sf(z, releases) < 1 - ALPHA


@pytest.mark.parametrize("n", [0, 1, 8, 21, 24])
def test_coins_tossed_a_few_at_a_time_are_the_streams(
    n: int,
    open_door: Callable[..., PrivateData],
    toy_records: Callable[..., LabelledImages],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle = open_door(toy_records())
    monkeypatch.setattr(private, "FEW_COINS", 8)
    found = handle._coins("release", n, 0.4)
    assert found.tolist() == handle._vault.sampling_stream("release").bernoulli(n, 0.4).tolist()
    assert len(found) == n
    tossed = Stream(derive(b"k" * 32, "sample", handle._vault.run, "release")).bernoulli(n, 0.4)
    assert handle._toss("release", n, 0.4).tobytes() == np.packbits(tossed).tobytes()  # what travels is as long as that


@pytest.mark.parametrize("n", [0, 1, 8, 9, 16])
def test_the_stream_is_asked_once_for_every_eight_and_once_for_none(
    n: int,
    open_door: Callable[..., PrivateData],
    toy_records: Callable[..., LabelledImages],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run without records does what a run with one does."""
    handle, asked, toss = open_door(toy_records()), [], Stream.bernoulli
    monkeypatch.setattr(private, "FEW_COINS", 8)
    monkeypatch.setattr(Stream, "bernoulli", lambda self, n, q: (asked.append(n), toss(self, n, q))[1])
    handle._toss("release", n, 0.4)
    assert asked == {0: [0], 1: [1], 8: [8], 9: [8, 1], 16: [8, 8]}[n]
