"""ε of a list of mechanisms. All arithmetic is `dp-accounting`'s; this file groups, rounds up and cross-checks.

q sampling_prob, σ noise_multiplier. A *part* is (q, σ, count): `count` Gaussian sums of noise σ·clip over a Poisson sample of rate q.
Source: PLD (Koskela et al. 2020; Doroshenko et al. 2022); analytic Gaussian (Balle & Wang 2018).
"""

import math
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
ACCOUNTANT = "dp-accounting PLD"
_RELATIONS = {
    "add_or_remove_one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}


def check_part(q: float, sigma: float, count: int) -> None:
    """Raises ConfigError unless the part is a mechanism this file can account for (NaN never passes)."""
    if not (0 < q <= 1):
        raise ConfigError(f"Expected sampling_prob in (0, 1], got {q}.")
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ConfigError(f"Expected a finite noise_multiplier > 0, got {sigma}.")
    if not (isinstance(count, int) and count >= 1):
        raise ConfigError(f"Expected a whole count >= 1, got {count}.")


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


@lru_cache(maxsize=256)
def _pld_epsilon(parts: tuple[Part, ...], delta: float, relation: Relation, interval: float) -> float:
    accountant = pld.PLDAccountant(_RELATIONS[relation], value_discretization_interval=interval)
    return float(accountant.compose(event(parts)).get_epsilon(delta))


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
      delta: in (0, 1), given by a person, never derived from the data.
      relation: what neighbours differ in.

    Raises:
      ConfigError: a part or `delta` is out of range, or the accountants contradict each other.
    """
    if not (0 < delta < 1):
        raise ConfigError(f"Expected delta in (0, 1), got {delta}.")
    grouped = group(parts)
    if not grouped:
        return 0.0
    if relation == "replace_one" and all(q == 1 for q, _, _ in grouped):
        # dp-accounting doubles the distance itself; for a Gaussian that is exactly half the noise multiplier.
        grouped = tuple((q, sigma / 2, count) for q, sigma, count in grouped)
        relation = "add_or_remove_one"
    value = _pld_epsilon(grouped, delta, relation, DISCRETISATION)
    if not (value >= 0):  # NaN or negative: refuse rather than compare as "below the cap"
        raise ConfigError(f"The accountant returned {value} for {grouped} at delta={delta}.")
    return value
