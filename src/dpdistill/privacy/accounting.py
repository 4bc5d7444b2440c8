"""ε of a list of mechanisms. All arithmetic is `dp-accounting`'s; this file groups, rounds up and cross-checks.

q sampling_prob, σ noise_multiplier. A *part* is (q, σ, count): `count` Gaussian sums of noise σ·clip over a Poisson sample of rate q.
Source: PLD (Koskela et al. 2020; Doroshenko et al. 2022); analytic Gaussian (Balle & Wang 2018).
"""

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

import dp_accounting
from dp_accounting import pld, rdp

from ..errors import ConfigError

Relation = Literal["add_or_remove_one", "replace_one"]
Part = tuple[float, float, int]

DISCRETISATION = 1e-4  # trust: 1e-3 agreement with the exact value needs 1e-4 or finer
COARSE_DISCRETISATION, COARSE_EPSILON = (
    1e-3,
    20.0,
)  # above this ε the coarse step will do: pessimistic too, and affordable
CLOSED_SIGMA = 0.09  # below: no PLD (it needs minutes and gigabytes), but the closed-form bound without sampling
# Below, the 1e-15 or so that a loss distribution cuts off, and what its Fourier transforms round, is no longer small against δ: of 10⁶
# releases ε is three times too large at 1e-11, and of a single one it is infinite at 1e-16.
MIN_DELTA = 1e-10
MAX_EPSILON = 1000.0  # by Rényi DP; beyond it a loss distribution takes memory without bound and protects nobody
Q_MIN, SIGMA_MIN, SIGMA_MAX = 1e-9, 1e-6, 1e9  # q: far above the 2⁻⁵³ to which a sampling coin is exact
# Releases of one sampled mechanism. dp-accounting raises the size of a small loss distribution to this power, in whole numbers:
# seconds here, hours a little later.
MAX_SAMPLED = 10**6
ACCOUNTANT = "dp-accounting PLD"
_RELATIONS = {
    "add_or_remove_one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}


def check_part(q: float, sigma: float, count: int) -> None:
    """Raises ConfigError unless the part is a mechanism this file can account for (NaN never passes)."""
    if not (Q_MIN <= q <= 1):
        raise ConfigError(f"Expected sampling_prob in (0, 1], and at least {Q_MIN:g}, got {q}.")
    if not (SIGMA_MIN <= sigma <= SIGMA_MAX):
        raise ConfigError(
            f"Expected a finite noise_multiplier > 0, between {SIGMA_MIN:g} and {SIGMA_MAX:g}, got {sigma}."
        )
    if not (type(count) is int and 1 <= count <= 10**12):
        raise ConfigError(f"Expected a whole count >= 1, got {count!r}.")


def check_delta(delta: float) -> None:
    """Raises ConfigError unless ε can be computed at this δ (NaN never passes)."""
    if not (MIN_DELTA <= delta < 1):
        raise ConfigError(f"Expected delta in [{MIN_DELTA:g}, 1), got {delta}: below, no ε can be computed.")


def group(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Merges equal parts, and all unsampled Gaussians into one: their composition is exactly one Gaussian with Σ 1/σ² (GDP)."""
    counts: Counter[tuple[float, float]] = Counter()
    inverse_variance = 0.0
    for q, sigma, count in parts:
        check_part(q, sigma, count)
        if q == 1:
            inverse_variance += count / sigma**2
        else:
            counts[q, sigma] += count
    merged = [(q, sigma, count) for (q, sigma), count in sorted(counts.items())]
    if inverse_variance:
        merged.append((1.0, inverse_variance**-0.5, 1))
    return tuple(merged)


def event(parts: Iterable[Part]) -> dp_accounting.DpEvent:
    """Returns the composed `DpEvent` of `parts`, as given to the accountants."""
    events: list[dp_accounting.DpEvent] = []
    for q, sigma, count in group(parts):
        one: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(sigma)
        if q < 1:
            one = dp_accounting.PoissonSampledDpEvent(q, one)
        events.append(dp_accounting.SelfComposedDpEvent(one, count))
    return dp_accounting.ComposedDpEvent(events)


@lru_cache(maxsize=8)  # each may take tens of megabytes
def _pld_of_one(
    q: float, sigma: float, relation: Relation, interval: float
) -> pld.privacy_loss_distribution.PrivacyLossDistribution:
    """The loss distribution of one release: most of the work, and the same each time that a run plans, charges, writes and checks."""
    return pld.privacy_loss_distribution.from_gaussian_mechanism(
        sigma, value_discretization_interval=interval, sampling_prob=q, neighboring_relation=_RELATIONS[relation]
    )


@lru_cache(maxsize=4096)
def _pld_epsilon(parts: tuple[Part, ...], delta: float, relation: Relation) -> float:
    """ε of `parts`, as a `PLDAccountant` gives it for their `event`."""
    for interval in (COARSE_DISCRETISATION, DISCRETISATION):
        composed = pld.privacy_loss_distribution.identity(interval)
        for q, sigma, count in parts:
            composed = composed.compose(_pld_of_one(q, sigma, relation, interval).self_compose(count))
        value = float(composed.get_epsilon_for_delta(delta))
        if not (value <= COARSE_EPSILON):
            break
    return value


def rdp_epsilon(parts: Iterable[Part], delta: float) -> float:
    """ε by Rényi DP under add-or-remove: looser than PLD, and therefore a ceiling to check it by."""
    orders = [*range(2, 65), *range(68, 257, 4), 384, 512, 1024]  # whole orders: fractional ones can fail to converge
    accountant = rdp.RdpAccountant(orders, _RELATIONS["add_or_remove_one"])
    return float(accountant.compose(event(parts)).get_epsilon(delta))


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """ε of one unsampled Gaussian of noise multiplier σ, in closed form (Balle & Wang 2018, Theorem 8)."""
    return float(dp_accounting.get_epsilon_gaussian(sigma, delta))


def gaussian_multiplier(epsilon: float, delta: float) -> float:
    """The smallest σ for which one unsampled Gaussian is (ε, δ)-DP."""
    return float(dp_accounting.get_sigma_gaussian(epsilon, delta))


def epsilon(parts: Iterable[Part], delta: float, relation: Relation = "add_or_remove_one") -> float:
    """Returns ε at `delta` of all `parts` together, an upper bound by PLD.

    Args:
      parts: (sampling_prob, noise_multiplier, count) each.
      delta: from MIN_DELTA to below 1, given by a person, never derived from the data.
      relation: what neighbours differ in.

    Raises:
      ConfigError: a part, `delta` or `relation` is out of range, or the accountant's answer is no number.
    """
    check_delta(delta)
    if relation not in _RELATIONS:
        raise ConfigError(f"Expected relation to be one of {sorted(_RELATIONS)}, got {relation!r}.")
    grouped = group(parts)
    if not grouped:
        return 0.0
    smallest = min(sigma for _, sigma, _ in grouped)
    if smallest < CLOSED_SIGMA or all(q == 1 for q, _, _ in grouped):
        # Sampling only helps, so all parts unsampled bound ε from above: one Gaussian, in closed form, exact at q = 1.
        half = 2.0 if relation == "replace_one" else 1.0
        whole = sum(count / (sigma / half) ** 2 for _, sigma, count in grouped) ** -0.5
        value = gaussian_epsilon(whole, delta)
        if whole >= CLOSED_SIGMA:  # PLD may lie below the exact value by its own rounding, never the other way about
            value = max(value, _pld_epsilon(((1.0, whole, 1),), delta, "add_or_remove_one"))
    else:
        if any(count > MAX_SAMPLED for _, _, count in grouped):
            raise ConfigError(f"Expected at most {MAX_SAMPLED} releases of one sampled mechanism, got {grouped}.")
        value = _pld_epsilon(grouped, delta, relation)
    if not (value >= 0):  # NaN or negative: refuse rather than compare as "below the cap"
        raise ConfigError(f"The accountant returned {value} for {grouped} at delta={delta}.")
    return value
