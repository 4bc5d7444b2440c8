"""Public descriptions of private releases, and the noise they need. Nothing here has seen a record.

q sampling_prob, C clip_norm, σ noise_multiplier (standard deviation / C), D dim, K n_classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .accounting import Part, check_part, epsilon, gaussian_multiplier

GRID_BITS = (8, 24)


@dataclass(frozen=True, kw_only=True)
class GaussianSum:
    r"""A noisy sum of clipped per-record vectors, one row per class: S + N(0, σ²C² I), S in R^{K×D}.

    Each record in the Poisson sample (rate q) adds a vector of L2 norm at most C to the row of its own class, so adding or
    removing one record moves S by at most C, and exchanging one by at most 2C. Proof: docs/privacy/gaussian_sum.md.

    Attributes:
      name: what the sum is for; goes into the ledger.
      dim: D, coordinates per class.
      n_classes: K rows; 1 for a sum over all records whatever their label.
      grid_bits: C is 2**grid_bits steps of the integer grid.
    """

    name: str
    dim: int
    noise_multiplier: float
    n_classes: int = 1
    clip_norm: float = 1.0
    sampling_prob: float = 1.0
    grid_bits: int = 20

    def __post_init__(self) -> None:
        check_part(self.sampling_prob, self.noise_multiplier, 1)
        if not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise ConfigError(f"Expected a finite clip_norm > 0, got {self.clip_norm}.")
        if self.dim < 1 or self.n_classes < 1:
            raise ConfigError(f"Expected dim and n_classes of at least 1, got {self.dim} and {self.n_classes}.")
        if not (GRID_BITS[0] <= self.grid_bits <= GRID_BITS[1]):
            raise ConfigError(f"Expected grid_bits in {GRID_BITS}, got {self.grid_bits}.")
        if self.dim > 4 ** (self.grid_bits - 4):  # rounding to the grid costs sqrt(D)/2 steps: keep it under 1/32 of C
            raise ConfigError(f"{self.dim} coordinates are too many for grid_bits={self.grid_bits}; raise grid_bits.")

    def part(self, count: int = 1) -> Part:
        """What the accountant needs of `count` such releases."""
        return (self.sampling_prob, self.noise_multiplier, count)

    def describe(self) -> dict[str, str]:
        """Every public fact as a string, numbers in the shortest form that reads back exactly."""
        return {
            "mechanism": "gaussian_sum",
            "name": self.name,
            "dim": str(self.dim),
            "classes": str(self.n_classes),
            "sampling_prob": repr(float(self.sampling_prob)),
            "noise_multiplier": repr(float(self.noise_multiplier)),
            "clip_norm": repr(float(self.clip_norm)),
            "grid_bits": str(self.grid_bits),
        }


@dataclass(frozen=True)
class Planned:
    """A release that a method will ask for, `count` times, known before any data is read."""

    query: GaussianSum
    count: int = 1

    @property
    def part(self) -> Part:
        return self.query.part(self.count)


def calibrate(plan: Callable[[float], Sequence[Planned]], target_epsilon: float, delta: float) -> float:
    """Returns a noise multiplier σ for which `plan(σ)` costs at most `target_epsilon` at `delta` (add-or-remove, PLD).

    Args:
      plan: public function from σ to the planned releases, less private as σ falls.
      target_epsilon: > 0.

    Returns:
      σ, at most 0.1 % above the smallest that fits.

    Raises:
      ConfigError: the target cannot be reached with σ below 1e6.
    """
    if not (0 < target_epsilon < math.inf):
        raise ConfigError(f"Expected a finite epsilon > 0, got {target_epsilon}.")
    if not (0 < delta < 1):
        raise ConfigError(f"Expected delta in (0, 1), got {delta}.")

    def cost(sigma: float) -> float:
        return epsilon([planned.part for planned in plan(sigma)], delta)

    unsampled = all(planned.query.sampling_prob == 1 for planned in plan(1.0))
    low = high = gaussian_multiplier(target_epsilon, delta)
    if unsampled:  # Σ count/σ² scales as 1/σ²: solve in closed form, then let PLD have the last word
        low = high = high * sum(p.count / p.query.noise_multiplier**2 for p in plan(1.0)) ** 0.5
        low *= 0.9999
    while cost(high) > target_epsilon:
        low, high = high, high * (1.0005 if unsampled else 2)
        if high > 1e6:
            raise ConfigError(f"No noise makes this plan cost epsilon={target_epsilon}; take fewer steps.")
    if not unsampled:
        while low > 1e-3 and cost(low) <= target_epsilon:
            low, high = low / 2, low
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if cost(middle) <= target_epsilon else (middle, high)
    return high
