"""Public descriptions of private releases, and the noise they need. Nothing here has seen a record.

q sampling_prob, C clip_norm, σ noise_multiplier (standard deviation / C), D dim, K n_classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .accounting import Part, check_part, epsilon, gaussian_multiplier

GRID_BITS = (8, 24)
WASTE = 1e-3  # of the asked ε, at most, lest the search for σ take longer than the run
SIGMA_GRID = (1e-3, 2.0**45)  # standard deviations that `mechanisms.noise` can draw, in grid steps


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
        if not all(type(value) is int for value in (self.dim, self.n_classes, self.grid_bits)):
            raise ConfigError(f"Expected whole numbers, got {self.dim=}, {self.n_classes=}, {self.grid_bits=}.")
        if not isinstance(self.name, str):
            raise ConfigError(f"Expected a text as name, got {self.name!r}.")
        if self.dim < 1 or self.n_classes < 1:
            raise ConfigError(f"Expected dim and n_classes of at least 1, got {self.dim} and {self.n_classes}.")
        if not (GRID_BITS[0] <= self.grid_bits <= GRID_BITS[1]):
            raise ConfigError(f"Expected grid_bits in {GRID_BITS}, got {self.grid_bits}.")
        if not (
            SIGMA_GRID[0] <= self.noise_multiplier * 2**self.grid_bits <= SIGMA_GRID[1]
        ):  # before anything is charged
            raise ConfigError(
                f"Expected noise of {SIGMA_GRID[0]:g} to {SIGMA_GRID[1]:g} grid steps from {self.noise_multiplier=}."
            )
        if self.dim > 4 ** (self.grid_bits - 4):  # rounding to the grid costs sqrt(D)/2 steps: keep it under 1/32 of C
            raise ConfigError(f"{self.dim} coordinates are too many for grid_bits={self.grid_bits}; raise grid_bits.")

    @classmethod
    def parse(cls, description: dict[str, str]) -> "GaussianSum":
        """Reads what `describe` wrote. Raises ValueError, KeyError or ConfigError unless it is exactly that."""
        query = cls(
            name=description["name"],
            dim=int(description["dim"]),
            n_classes=int(description["classes"]),
            sampling_prob=float(description["sampling_prob"]),
            noise_multiplier=float(description["noise_multiplier"]),
            clip_norm=float(description["clip_norm"]),
            grid_bits=int(description["grid_bits"]),
        )
        if query.describe() != description:
            raise ValueError("not a description in its one canonical form")
        return query

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
      plan: public function from σ to the planned releases, of which none becomes less noisy as σ grows.
      target_epsilon: > 0.

    Returns:
      σ whose cost is within 0.1 % of the target, where one is.

    Raises:
      ConfigError: the target cannot be reached with σ below 1e6.
    """
    if not (0 < target_epsilon < math.inf):
        raise ConfigError(f"Expected a finite epsilon > 0, got {target_epsilon}.")
    if not (0 < delta < 1):
        raise ConfigError(f"Expected delta in (0, 1), got {delta}.")

    def cost(sigma: float) -> float:
        return epsilon([planned.part for planned in plan(sigma)], delta)

    first, mu = plan(1.0), 1 / gaussian_multiplier(target_epsilon, delta)
    weight = sum(
        planned.count * (planned.query.sampling_prob / planned.query.noise_multiplier) ** 2 for planned in first
    )
    if all(planned.query.sampling_prob == 1 for planned in first):
        high, step = math.sqrt(weight) / mu, 1.0004  # exact where all is in proportion to σ: Σ count/σ² = μ²
    else:
        high, step = (
            math.log1p(mu**2 / weight) ** -0.5,
            1.1,
        )  # near: the central limit of Poisson sampling (Bu et al. 2020)
    spent = cost(high)
    low, over = high, spent
    while spent > target_epsilon:  # too little noise
        low, over = high, spent
        high, step = high * step, min(step**2, 2.0)
        if high > 1e6:
            raise ConfigError(f"No noise makes this plan cost epsilon={target_epsilon}; take fewer steps.")
        spent = cost(high)
    enough = (1 - WASTE) * target_epsilon
    while over < enough and low > 1e-3:  # too much
        high, spent = low, over
        low, step = low / step, min(step**2, 2.0)
        over = cost(low)
    if over <= target_epsilon:
        return low
    rounds = 0
    while spent < enough and high / low > 1 + 1e-6:  # between: log ε is nearly linear in log σ
        share = 0.5
        if rounds % 3 < 2 and 0 < spent < over < math.inf:
            share = min(max(math.log(2 * over / (enough + target_epsilon)) / math.log(over / spent), 0.02), 0.98)
        middle = low * (high / low) ** share
        value, rounds = cost(middle), rounds + 1
        low, over, high, spent = (low, over, middle, value) if value <= target_epsilon else (middle, value, high, spent)
    return high
