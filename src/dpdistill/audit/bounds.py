r"""From what an attacker got right to a lower bound on ε. Statistics alone: no data, no mechanism.

ε epsilon, δ delta, μ of Gaussian differential privacy (1/σ of one Gaussian), m canaries, r guesses, v right ones, q sampling_prob.
A bound holds with the stated confidence over the run's own coins: it can refute a claim, and never confirm one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri
from scipy.stats import binom

from ..privacy import accounting

FRACTIONS = (
    0.02,
    0.1,
    0.3,
    1.0,
)  # of the canaries that are guessed about: fixed before any run, and paid for by Bonferroni
CONFIDENCE = 0.95
NUISANCE, SIZES, BLOCKS = (
    20,
    64,
    16,
)  # of `joint_mu`: part of the error for the size, steps of the size, blocks a standard deviation
_MU = (1e-4, 40.0)  # what μ is looked for in
_STEPS = 30  # of a bisection

Array = NDArray[np.float64]


def clopper_pearson(hits: int, n: int, error: float) -> tuple[float, float]:
    """Returns a lower and an upper bound on a probability, each wrong with probability at most `error`.

    Source: Clopper & Pearson (1934).

    >>> low, high = clopper_pearson(0, 100, 0.05)
    >>> low, round(high, 4)
    (0.0, 0.0295)
    """
    low = float(betaincinv(hits, n - hits + 1, error)) if hits else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - error)) if hits < n else 1.0
    return low, high


def two_world_mu(hits: int, n_in: int, alarms: int, n_out: int, confidence: float, q: float = 1.0) -> float:
    r"""Returns a lower bound on μ = 1/σ of a (sampled) Gaussian from an attack on two worlds, one with a record and one without.

    No test of size α against a Poisson-sampled Gaussian has a power above (1 - q)α + qΦ(Φ⁻¹(α) + μ). Clopper-Pearson bounds on size
    and power turn that round. The threshold must be fixed before these runs.

    Source: Nasr et al. (2023), "Tight Auditing of Differentially Private Machine Learning"; the trade-off curve is that of
    Dong, Roth & Su (2022), "Gaussian Differential Privacy".

    Args:
      hits: how often the attack said "in", of `n_in` runs with the record.
      alarms: how often it said so, of `n_out` runs without.
    """
    error = (1 - confidence) / 2
    power, size = clopper_pearson(hits, n_in, error)[0], clopper_pearson(alarms, n_out, error)[1]
    seen = (power - (1 - q) * size) / q
    if seen <= size or size <= 0:
        return 0.0
    return min(float(ndtri(min(seen, 1.0)) - ndtri(size)), 1e6)


def joint_mu(hits: int, n_in: int, alarms: int, n_out: int, confidence: float, q: float = 1.0) -> float:
    r"""As `two_world_mu`, and closer to the truth: one test of both counts, where two intervals each pay for the worst of their own.

    μ is refuted where, for every size α that the alarms allow, counts of power f_μ(α) and of size α lie so far apart too rarely. A part
    of the error pays for "allow" (Berger & Boos 1994). Sizes go in small steps with the worst of each, alarms in small blocks likewise:
    that only lowers the bound.

    Source: the exact test of two binomial counts by their difference (Santner & Snell 1980); the null is that of Nasr et al. (2023).
    """
    error = 1 - confidence
    spent = error / NUISANCE
    sizes = np.linspace(*clopper_pearson(alarms, n_out, spent / 2), SIZES + 1)
    counts, chances = _alarms(sizes[:-1], n_out)

    def p_value(mu: float) -> float:
        power = (1 - q) * sizes[1:] + q * ndtr(ndtri(sizes[1:]) + mu)
        return spent + float((chances * binom.sf(hits - alarms + counts - 1, n_in, power[:, None])).sum(axis=1).max())

    below, above = 0.0, _MU[1]
    if p_value(below) > error:
        return 0.0
    for _ in range(_STEPS):
        middle = (below + above) / 2
        below, above = (middle, above) if p_value(middle) <= error else (below, middle)
    return below


def _alarms(sizes: Array, n: int) -> tuple[Array, Array]:
    """Counts of alarms [A, B] for each size [A], in blocks of which each stands for its least, and their probabilities [A, B]."""
    spread = np.sqrt(n * sizes * (1 - sizes))[:, None]
    step = np.maximum(1.0, np.ceil(spread / BLOCKS))
    inner = np.round(n * sizes[:, None]) + step * np.arange(-9 * BLOCKS, 9 * BLOCKS + 1)
    edges = np.concatenate([np.zeros_like(spread), inner.clip(0, n + 1), np.full_like(spread, n + 1.0)], axis=1)
    return edges[:, :-1], np.diff(binom.cdf(edges - 1, n, sizes[:, None]), axis=1)


def two_world_epsilon(hits: int, n_in: int, alarms: int, n_out: int, delta: float, confidence: float) -> float:
    """As `two_world_mu`, for any mechanism that claims (ε, δ) and nothing more: the larger of the two directions, log((power - δ) / size).

    Source: Jagielski, Ullman & Oprea (2020), "Auditing Differentially Private Machine Learning".
    """
    error = (1 - confidence) / 4  # four bounds
    best = 0.0
    for said_in, n, wrongly, n_wrongly in ((hits, n_in, alarms, n_out), (n_out - alarms, n_out, n_in - hits, n_in)):
        power, size = clopper_pearson(said_in, n, error)[0], clopper_pearson(wrongly, n_wrongly, error)[1]
        if power > delta and size > 0:
            best = max(best, math.log((power - delta) / size))
    return best


def best_threshold(sigma: float, n: int, confidence: float, q: float = 1.0) -> float:
    """Returns the threshold, in units of the record's shift, at which n runs a world prove the most of an exact claim: a public fact."""
    candidates = np.linspace(-0.5, 1.5 + 4 * sigma, 81)

    def proved(threshold: float) -> float:
        alarms, full = ndtr(-threshold / sigma), ndtr((1 - threshold) / sigma)
        hits = (1 - q) * alarms + q * full
        return two_world_mu(round(hits * n), n, round(alarms * n), n, confidence, q)

    return float(max(candidates, key=proved))


def epsilon_of(mu: float, delta: float, q: float = 1.0) -> float:
    """ε at δ of one (sampled) Gaussian of σ = 1/μ."""
    if mu <= 0:
        return 0.0
    if q == 1 or mu > 1 / accounting.CLOSED_SIGMA:
        return accounting.gaussian_epsilon(1 / mu, delta) if mu < 100 else mu * mu / 2  # below the exact value
    return accounting.epsilon([(q, 1 / mu, 1)], delta)


def one_run_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Probability that v or more of r guesses about m canaries are right, at most, if the run is (ε, δ)-DP.

    Source: Steinke, Nasr & Jagielski (2023), "Privacy Auditing with One (1) Training Run", Theorem 5.2 and Appendix D.
    """
    right = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(v - 1, r, right))
    if delta == 0 or v == 0:
        return min(beta, 1.0)
    i = np.arange(1, v + 1)
    between = binom.sf(v - i - 1, r, right) - beta  # P[v > Bin >= v - i]
    return min(beta + 2 * m * delta * float((between / i).max()), 1.0)


@lru_cache(maxsize=2**16)
def one_run_epsilon(m: int, r: int, v: int, delta: float, error: float) -> float:
    """Returns the largest ε that v right guesses of r refute at level `error`; 0 where there is none. Source: as `one_run_p_value`."""
    if r == 0 or one_run_p_value(m, r, v, 0.0, delta) >= error:
        return 0.0
    low, high = 0.0, 1.0
    while one_run_p_value(m, r, v, high, delta) < error:
        low, high = high, 2 * high
        if high > 100:
            return low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if one_run_p_value(m, r, v, middle, delta) < error else (low, middle)
    return low


def refutes_gdp(m: int, r: int, v: int, mu: float, error: float) -> bool:
    """Whether v right guesses of r about m canaries contradict μ-GDP at level `error`.

    Source: Mahloujifar, Melis & Chaudhuri (2024), "Auditing f-Differential Privacy in One Run", Theorem 3 and its numerical form for
    abstaining adversaries; the inverse blow-up of μ-GDP is Φ(Φ⁻¹(x) - μ).
    """
    right, wrong = error * v / m, error * (r - v) / m
    for i in range(v - 1, -1, -1):
        moved = max(wrong, float(ndtr(ndtri(right) - mu)))
        if moved == wrong:
            break
        right, wrong = min(right + i / (r - i) * (moved - wrong), 1.0), moved
    return right + wrong > r / m


@lru_cache(maxsize=2**16)
def one_run_mu(m: int, r: int, v: int, error: float) -> float:
    """Returns the largest μ whose μ-GDP v right guesses of r refute at level `error`; 0 where there is none."""
    low, high = _MU
    if r == 0 or not refutes_gdp(m, r, v, low, error):
        return 0.0
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if refutes_gdp(m, r, v, middle, error) else (low, middle)
    return low


@dataclass(frozen=True)
class OneRunBounds:
    """Lower bounds on ε: `steinke` for any (ε, δ) claim; `fdp` for a claim that is a Gaussian's whole trade-off curve."""

    steinke: float
    fdp: float


def one_run(scores: Array, included: NDArray[np.bool_], delta: float, confidence: float = CONFIDENCE) -> OneRunBounds:
    """Returns the bounds from one run: for each of FRACTIONS the highest scores are guessed "in" and as many of the lowest "out".

    Args:
      scores: [m], of the canaries; higher where the release looks as if the canary had been in.
      included: [m], the coins.
    """
    m, order = len(scores), np.argsort(scores, kind="stable")
    error, steinke, mu = (1 - confidence) / len(FRACTIONS), 0.0, 0.0
    for fraction in FRACTIONS:
        half = int(fraction * m / 2)
        v = int(included[order[m - half :]].sum() + (~included[order[:half]]).sum())
        steinke = max(steinke, one_run_epsilon(m, 2 * half, v, delta, error))
        mu = max(mu, one_run_mu(m, 2 * half, v, error))
    return OneRunBounds(steinke, epsilon_of(mu, delta))


def most(m: int, delta: float, confidence: float = CONFIDENCE) -> OneRunBounds:
    """What m canaries can prove at the very most: all guesses right."""
    return one_run(np.arange(m, dtype=float), np.arange(m) >= m // 2, delta, confidence)


@lru_cache(maxsize=64)
def expected(
    mu: float, m: int, delta: float, confidence: float = CONFIDENCE, repeats: int = 200, seed: int = 0
) -> tuple[OneRunBounds, OneRunBounds]:
    """Returns the 5 % and 95 % quantiles of the bounds that the best attack on a correct implementation gets: scores N(μb, 1).

    A correct implementation gives a bound in or below that range: real canaries disturb each other.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(repeats):
        included = rng.random(m) < 0.5
        found.append(one_run(rng.standard_normal(m) + mu * included, included, delta, confidence))
    return _quantile(found, 0.05), _quantile(found, 0.95)


def _quantile(found: Sequence[OneRunBounds], share: float) -> OneRunBounds:
    return OneRunBounds(*(float(np.quantile([getattr(x, name) for x in found], share)) for name in ("steinke", "fdp")))


def mu_of(epsilon: float, delta: float) -> float:
    """μ of the Gaussian that is exactly (ε, δ)-DP."""
    return 1 / accounting.gaussian_multiplier(epsilon, delta)


def auc(inside: Array, outside: Array, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Returns the area under the ROC curve of scores of members over non-members, and its interval.

    Source: Hanley & McNeil (1982), "The Meaning and Use of the Area under a ROC Curve"; a tie counts one half.
    """
    ordered = np.sort(outside)
    below, upto = np.searchsorted(ordered, inside, "left"), np.searchsorted(ordered, inside, "right")
    value = float((below + upto).mean() / 2 / len(outside))
    a, b = value / (2 - value), 2 * value**2 / (1 + value)
    n, k = len(inside), len(outside)
    variance = (value * (1 - value) + (n - 1) * (a - value**2) + (k - 1) * (b - value**2)) / (n * k)
    reach = float(ndtri((1 + confidence) / 2)) * math.sqrt(max(variance, 0.0))
    return value, max(value - reach, 0.0), min(value + reach, 1.0)


def power_at(inside: Array, outside: Array, size: float, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Returns the share of members found where the share `size` of non-members is taken for members, and its interval."""
    kept = int(size * len(outside))  # false alarms that are allowed
    threshold = np.sort(outside)[::-1][min(kept, len(outside) - 1)]
    hits = int((inside > threshold).sum())
    return (hits / len(inside), *clopper_pearson(hits, len(inside), (1 - confidence) / 2))
