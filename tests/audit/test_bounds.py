"""The statistics, against published numbers, against scipy, and against simulation: a bound that is wrong too often is worse than none."""

import math

import numpy as np
import pytest
from scipy.stats import beta, binom, norm

from dpdistill.audit import bounds

DELTA = 1e-5


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (200_123, 10**6)])
def test_clopper_pearson_is_scipys(hits: int, n: int) -> None:
    low, high = bounds.clopper_pearson(hits, n, 0.02)
    assert low == pytest.approx(0.0 if hits == 0 else beta.ppf(0.02, hits, n - hits + 1), rel=1e-9)
    assert high == pytest.approx(1.0 if hits == n else beta.ppf(0.98, hits + 1, n - hits), rel=1e-9)


def test_the_p_value_is_that_of_the_papers_listing() -> None:
    """Steinke et al. (2023), Appendix D, as a loop over i."""

    def listing(m: int, r: int, v: int, eps: float, delta: float) -> float:
        q = 1 / (1 + math.exp(-eps))
        pmf = [math.comb(r, j) * q**j * (1 - q) ** (r - j) for j in range(r + 1)]
        total, alpha = 0.0, 0.0
        for i in range(1, v + 1):
            total += pmf[v - i]
            alpha = max(alpha, total / i)
        return min(1.0, sum(pmf[v:]) + alpha * delta * 2 * m)

    for m, r, v, eps, delta in ((100, 100, 80, 1.0, 1e-5), (500, 50, 50, 3.0, 1e-3), (40, 10, 6, 0.0, 1e-2)):
        assert bounds.one_run_p_value(m, r, v, eps, delta) == pytest.approx(listing(m, r, v, eps, delta), rel=1e-9)


def test_pure_dp_without_delta_is_the_binomial_tail() -> None:
    """100 right of 100 at 95 %: p^100 = 0.05, so ε = log(p / (1 - p)) = 3.493."""
    assert bounds.one_run_epsilon(100, 100, 100, 0.0, 0.05) == pytest.approx(3.493, abs=1e-3)


def test_gdp_with_all_guesses_right() -> None:
    """m of m right refute μ-GDP where even the best guesser, right with Φ(μ/2) each, does so with probability below the level."""
    mu = bounds.one_run_mu(100, 100, 100, 0.05)
    ideal = 2 * norm.ppf(0.05 ** (1 / 100))  # no sound procedure can do better; the published one is loose here
    assert 0.4 * ideal < mu <= ideal


@pytest.mark.parametrize("of", [bounds.one_run_mu, lambda m, r, v, e: bounds.one_run_epsilon(m, r, v, DELTA, e)])
def test_monotone(of: object) -> None:
    found = [of(200, 100, v, 0.01) for v in range(40, 101, 4)]  # type: ignore[operator]
    assert found == sorted(found)
    assert found[0] == 0.0
    assert found[-1] > 1.0
    assert of(200, 100, 90, 0.001) < of(200, 100, 90, 0.05)  # type: ignore[operator]


# Medians over 3 to 15 repetitions, by an independent implementation: ε, m, Steinke bound, f-DP bound; each to within 0.2 or so.
KNOWN = [
    (1, 500, 0.02, 0.02),
    (2, 500, 0.44, 0.67),
    (4, 500, 1.00, 1.49),
    (8, 500, 2.4, 3.5),
    (4, 250, 1.15, 1.66),
    (8, 1000, 2.7, 4.1),
]


@pytest.mark.parametrize(("epsilon", "m", "steinke", "fdp"), KNOWN)
def test_the_ideal_attack_gets_what_it_is_known_to_get(epsilon: float, m: int, steinke: float, fdp: float) -> None:
    low, high = bounds.expected(bounds.mu_of(epsilon, DELTA), m, DELTA, repeats=40)
    assert low.steinke - 0.2 <= steinke <= high.steinke + 0.2
    assert low.fdp - 0.2 <= fdp <= high.fdp + 0.2
    assert high.steinke < epsilon
    assert high.fdp < epsilon


def test_a_bound_above_the_truth_is_rarer_than_it_says() -> None:
    """Level 5 %, the best attack: 300 runs at the very μ give an alarm now and then, and the bounds come near."""
    rng, mu, m = np.random.default_rng(3), 1.5, 200
    truth, alarms, best = bounds.epsilon_of(mu, DELTA), 0, 0.0
    for _ in range(300):
        b = rng.random(m) < 0.5
        found = bounds.one_run(rng.standard_normal(m) + mu * b, b, DELTA)
        alarms += max(found.steinke, found.fdp) > truth
        best = max(best, found.fdp)
    assert alarms <= 15
    assert best > 0.5 * truth


def test_null_scores_give_alarms_as_rarely_as_they_should() -> None:
    """Scores that know nothing, coins drawn anew 200 times: bounds above 0 in at most 5 % + 3 standard deviations."""
    rng = np.random.default_rng(7)
    scores = rng.standard_normal(300)
    found = [bounds.one_run(scores, rng.random(300) < 0.5, DELTA) for _ in range(200)]
    assert sum(x.steinke > 0 or x.fdp > 0 for x in found) <= 19
    assert max(x.steinke for x in found) < 1.0  # and no alarm against a claim of 1


def test_two_worlds() -> None:
    """Counts of the exact mechanism at its own μ: never above it, and near it."""
    n, mu = 10**6, 0.5
    hits, alarms = round(n * norm.cdf(mu / 2)), round(n * norm.cdf(-mu / 2))
    found = bounds.two_world_mu(hits, n, alarms, n, 0.999)
    assert 0.97 * mu < found < mu
    assert bounds.two_world_mu(alarms, n, alarms, n, 0.999) == 0.0
    assert bounds.two_world_mu(n, n, 0, n, 0.999) > 8
    sampled = [round(n * (0.9 * norm.cdf(-1.5) + 0.1 * norm.cdf(-1.5 + mu))), n, round(n * norm.cdf(-1.5)), n]
    assert 0.7 * mu < bounds.two_world_mu(*sampled, 0.999, q=0.1) < mu  # type: ignore[arg-type]
    assert bounds.two_world_epsilon(900, 1000, 100, 1000, 0.0, 0.95) < math.log(9)
    assert bounds.two_world_epsilon(900, 1000, 100, 1000, 0.0, 0.95) > 0.8 * math.log(9)
    assert bounds.two_world_epsilon(900, 1000, 100, 1000, 0.5, 0.95) < 0.8 * math.log(9)
    # The other direction: rarely "out" when in, often when out.
    assert bounds.two_world_epsilon(995, 1000, 500, 1000, 0.0, 0.95) > math.log(20)


@pytest.mark.parametrize("q", [1.0, 0.25])
def test_the_joint_bound_is_wrong_as_rarely_as_it_says(q: float) -> None:
    """Every outcome of a few runs, at the exact power and many sizes: how likely those are whose bound lies above the truth."""
    n, mu, confidence = 9, 0.8, 0.8
    bound = {(x, y): bounds.joint_mu(x, n, y, n, confidence, q) for x in range(n + 1) for y in range(n + 1)}
    assert max(bound.values()) > 3 * mu  # so that it can be wrong
    worst = 0.0
    for size in np.linspace(0.01, 0.99, 99):
        power = (1 - q) * size + q * norm.cdf(norm.ppf(size) + mu)
        hits, alarms = binom.pmf(np.arange(n + 1), n, power), binom.pmf(np.arange(n + 1), n, size)
        worst = max(worst, sum(hits[x] * alarms[y] for (x, y), found in bound.items() if found > mu))
    assert 0.02 < worst <= 1 - confidence


@pytest.mark.parametrize(("q", "mu", "size", "least"), [(1.0, 0.1422, 0.464, 0.95), (0.25, 0.3655, 0.223, 0.935)])
def test_the_joint_bound_pays_once_for_chance(q: float, mu: float, size: float, least: float) -> None:
    """At ε = 0.5, a million runs, 99.9 %: what the normal law allows of two counts, to 1 %, and more than two intervals give."""
    n = 10**6
    power = (1 - q) * size + q * norm.cdf(norm.ppf(size) + mu)
    slope = q * norm.pdf(norm.ppf(size) + mu)
    counts = round(power * n), n, round(size * n), n
    found = bounds.joint_mu(*counts, 0.999, q)
    ideal = mu - norm.isf(0.001) * math.sqrt((power * (1 - power) + size * (1 - size)) / n) / slope
    assert ideal - 0.01 * mu < found < ideal
    assert found > least * mu > bounds.two_world_mu(*counts, 0.999, q)
    assert bounds.joint_mu(counts[2], n, counts[2], n, 0.999, q) == 0.0
    assert bounds.joint_mu(n, n, 0, n, 0.999, q) > 5


def test_roc() -> None:
    inside, outside = np.array([3.0, 2.0, 2.0]), np.array([1.0, 2.0])
    assert bounds.auc(inside, outside)[0] == pytest.approx((2 + 1.5 + 1.5) / 6)
    rng = np.random.default_rng(0)
    _, low, high = bounds.auc(rng.standard_normal(4000) + 1, rng.standard_normal(4000))
    assert low < norm.cdf(1 / math.sqrt(2)) < high
    assert high - low < 0.03
    power, low, high = bounds.power_at(rng.standard_normal(4000) + 1, rng.standard_normal(4000), 0.01)
    assert low < norm.cdf(1 - norm.ppf(0.99)) < high
    assert low < power < high
