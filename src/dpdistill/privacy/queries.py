"""Public descriptions of private releases, and the noise they need. Nothing here has seen a record.

q sampling_prob, C clip_norm, σ noise_multiplier (standard deviation / C), D dim, K n_classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .accounting import Part, Relation, check_delta, check_part, epsilon, gaussian_multiplier

GRID_BITS = (8, 30)
# Of a record function, between a batch and one record at a time: what the door lets pass, a release may show.
RECORDWISE_TOLERANCE = 2e-2
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
        check_part(*self.part())
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

    @property
    def rows(self) -> int:
        return self.n_classes

    def part(self, count: int = 1, relation: Relation = "add_or_remove_one") -> Part:
        """What the accountant needs of `count` such releases. It doubles the sensitivity itself where one record is exchanged."""
        return (self.sampling_prob, self.noise_multiplier, count)

    @property
    def unit_steps(self) -> float:
        """Grid steps in a distance of 1 in the units that the sum is given in."""
        return 2.0**self.grid_bits / self.clip_norm

    @property
    def sigma_steps(self) -> float:
        """Standard deviation of the noise, in grid steps."""
        return self.noise_multiplier * 2.0**self.grid_bits

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


VOTE_BITS = 10


@dataclass(frozen=True, kw_only=True)
class NoisyVotes:
    r"""Noisy votes of models trained on disjoint shards: H + N(0, σ²·2Q I), H in N^{Q×K} counts the models that choose a class.

    What belongs to one unit (a person's id, an owner, a record) is in one shard, so whatever is done to it changes one model. That
    changes one vote in each of Q rows, by √2 at most: all of H moves by √(2Q) at most, whether a unit is added, removed or exchanged.
    Where `unit_moves` is 2, exchanging a unit touches two shards. Proof: docs/privacy/votes.md.

    Attributes:
      name: what the votes are for; goes into the ledger.
      n_queries: Q, images voted on.
      n_classes: K.
      n_models: how many vote, public.
      noise_multiplier: σ, standard deviation of the noise over √(2Q).
      unit_moves: shards that exchanging one unit touches: 1 where a unit keeps its id, 2 where its content is its id.
    """

    name: str
    n_queries: int
    n_classes: int
    n_models: int
    noise_multiplier: float
    unit_moves: int = 1

    def __post_init__(self) -> None:
        for times in (1, 2):  # `part` doubles it: a charge that could not be reported would spoil its ledger
            check_part(1.0, times * self.noise_multiplier, 1)
        numbers = (self.n_queries, self.n_classes, self.n_models, self.unit_moves)
        if not all(type(value) is int and value >= 1 for value in numbers) or self.unit_moves > 2:
            raise ConfigError(f"Expected whole numbers of at least 1, got {self}.")
        if max(self.n_queries * self.n_classes, self.n_models) > 2**40:
            raise ConfigError(f"Expected at most 2**40 votes and models, got {self}.")
        if not isinstance(self.name, str):
            raise ConfigError(f"Expected a text as name, got {self.name!r}.")
        if not (SIGMA_GRID[0] <= self.sigma_steps <= SIGMA_GRID[1]):
            raise ConfigError(
                f"Expected noise that can be drawn, got {self.noise_multiplier=} for {self.n_queries} queries."
            )

    @classmethod
    def parse(cls, description: dict[str, str]) -> "NoisyVotes":
        """Reads what `describe` wrote. Raises ValueError, KeyError or ConfigError unless it is exactly that."""
        query = cls(
            name=description["name"],
            n_queries=int(description["queries"]),
            n_classes=int(description["classes"]),
            n_models=int(description["models"]),
            noise_multiplier=float(description["noise_multiplier"]),
            unit_moves=int(description["unit_moves"]),
        )
        if query.describe() != description:
            raise ValueError("not a description in its one canonical form")
        return query

    @property
    def rows(self) -> int:
        return self.n_queries

    @property
    def dim(self) -> int:
        return self.n_classes

    def part(self, count: int = 1, relation: Relation = "add_or_remove_one") -> Part:
        """What the accountant needs of `count` such releases. It doubles sensitivity for an exchange, which here touches one shard."""
        twice = relation == "replace_one" and self.unit_moves == 1
        return (1.0, self.noise_multiplier * (2 if twice else 1), count)

    @property
    def unit_steps(self) -> float:
        """Grid steps in one vote."""
        return 2.0**VOTE_BITS

    @property
    def sigma_steps(self) -> float:
        """Standard deviation of the noise, in grid steps."""
        return self.noise_multiplier * math.sqrt(2 * self.n_queries) * self.unit_steps

    def describe(self) -> dict[str, str]:
        """Every public fact as a string, numbers in the shortest form that reads back exactly."""
        return {
            "mechanism": "noisy_votes",
            "name": self.name,
            "queries": str(self.n_queries),
            "classes": str(self.n_classes),
            "models": str(self.n_models),
            "noise_multiplier": repr(float(self.noise_multiplier)),
            "unit_moves": str(self.unit_moves),
        }


VECTOR_BITS = (8, 24)  # of a vector that is clipped whole: above, its norm is not checked exactly


@dataclass(frozen=True, kw_only=True)
class ShardSum:
    r"""A noisy sum of clipped vectors, one of each model trained on disjoint shards: S + N(0, σ²·(2C)² I), S in R^D.

    What belongs to one unit is in one shard, so whatever is done to it changes one model, and that model's vector from anywhere to
    anywhere in the ball of radius C: S moves by 2C at most, whether a unit is added, removed or exchanged. Where `unit_moves` is 2,
    exchanging a unit touches two shards: 4C. Proof: docs/privacy/shard_sum.md.

    Attributes:
      name: what the sum is for; goes into the ledger.
      dim: D, coordinates of a model's vector: of its answers to all queries of the release together.
      n_models: how many vectors are summed, public.
      noise_multiplier: σ, standard deviation of the noise over 2C.
      clip_norm: C, of a model's whole vector.
      unit_moves: shards that exchanging one unit touches; see `NoisyVotes`.
      grid_bits: C is 2**grid_bits steps of the integer grid.
    """

    name: str
    dim: int
    n_models: int
    noise_multiplier: float
    clip_norm: float = 1.0
    unit_moves: int = 1
    grid_bits: int = 20

    def __post_init__(self) -> None:
        for times in (1, 2):  # `part` doubles it: a charge that could not be reported would spoil its ledger
            check_part(1.0, times * self.noise_multiplier, 1)
        if not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise ConfigError(f"Expected a finite clip_norm > 0, got {self.clip_norm}.")
        numbers = (self.dim, self.n_models, self.unit_moves, self.grid_bits)
        if not all(type(value) is int and value >= 1 for value in numbers) or self.unit_moves > 2:
            raise ConfigError(f"Expected whole numbers of at least 1, got {self}.")
        if self.n_models > 2**38:  # int64 holds 2**62: so many vectors of 2**24 steps
            raise ConfigError(f"Expected at most 2**38 models, got {self.n_models}.")
        if not isinstance(self.name, str):
            raise ConfigError(f"Expected a text as name, got {self.name!r}.")
        if not (VECTOR_BITS[0] <= self.grid_bits <= VECTOR_BITS[1]):
            raise ConfigError(f"Expected grid_bits in {VECTOR_BITS}, got {self.grid_bits}.")
        if not (SIGMA_GRID[0] <= self.sigma_steps <= SIGMA_GRID[1]):
            raise ConfigError(f"Expected noise that can be drawn, got {self.noise_multiplier=} at {self.grid_bits=}.")
        if self.dim > 4 ** (self.grid_bits - 4):  # rounding to the grid costs sqrt(D)/2 steps: keep it under 1/32 of C
            raise ConfigError(f"{self.dim} coordinates are too many for grid_bits={self.grid_bits}; raise grid_bits.")

    @classmethod
    def parse(cls, description: dict[str, str]) -> "ShardSum":
        """Reads what `describe` wrote. Raises ValueError, KeyError or ConfigError unless it is exactly that."""
        query = cls(
            name=description["name"],
            dim=int(description["dim"]),
            n_models=int(description["models"]),
            noise_multiplier=float(description["noise_multiplier"]),
            clip_norm=float(description["clip_norm"]),
            unit_moves=int(description["unit_moves"]),
            grid_bits=int(description["grid_bits"]),
        )
        if query.describe() != description:
            raise ValueError("not a description in its one canonical form")
        return query

    @property
    def rows(self) -> int:
        return 1

    def part(self, count: int = 1, relation: Relation = "add_or_remove_one") -> Part:
        """What the accountant needs of `count` such releases: as for `NoisyVotes`, an exchange in one shard is no more than a removal."""
        twice = relation == "replace_one" and self.unit_moves == 1
        return (1.0, self.noise_multiplier * (2 if twice else 1), count)

    @property
    def unit_steps(self) -> float:
        """Grid steps in a distance of 1 in the units that the sum is given in."""
        return 2.0**self.grid_bits / self.clip_norm

    @property
    def sigma_steps(self) -> float:
        """Standard deviation of the noise, in grid steps: σ·2C."""
        return self.noise_multiplier * 2 * 2.0**self.grid_bits

    def describe(self) -> dict[str, str]:
        """Every public fact as a string, numbers in the shortest form that reads back exactly."""
        return {
            "mechanism": "shard_sum",
            "name": self.name,
            "dim": str(self.dim),
            "models": str(self.n_models),
            "noise_multiplier": repr(float(self.noise_multiplier)),
            "clip_norm": repr(float(self.clip_norm)),
            "unit_moves": str(self.unit_moves),
            "grid_bits": str(self.grid_bits),
        }


Query = GaussianSum | NoisyVotes | ShardSum


def parse_query(description: dict[str, str]) -> Query:
    """Reads what any query's `describe` wrote. Raises ValueError, KeyError or ConfigError on every other mechanism."""
    kinds: dict[str, type[GaussianSum] | type[NoisyVotes] | type[ShardSum]] = {
        "gaussian_sum": GaussianSum,
        "noisy_votes": NoisyVotes,
        "shard_sum": ShardSum,
    }
    return kinds[description["mechanism"]].parse(description)


@dataclass(frozen=True)
class Planned:
    """A release that a method will ask for, `count` times, known before any data is read."""

    query: Query
    count: int = 1

    @property
    def part(self) -> Part:
        return self.query.part(self.count)

    @property
    def part_replace_one(self) -> Part:
        return self.query.part(self.count, "replace_one")


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
    check_delta(delta)

    def cost(sigma: float) -> float:
        return epsilon([planned.part for planned in plan(sigma)], delta)

    first, mu = plan(1.0), 1 / gaussian_multiplier(target_epsilon, delta)
    parts = [planned.part for planned in first]
    weight = sum(count * (q / sigma) ** 2 for q, sigma, count in parts)
    if all(q == 1 for q, _, _ in parts):
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
        if rounds % 3 < 2 and 0 < spent and over < math.inf:
            share = min(max(math.log(2 * over / (enough + target_epsilon)) / math.log(over / spent), 0.02), 0.98)
        middle = low * (high / low) ** share
        value, rounds = cost(middle), rounds + 1
        low, over, high, spent = (low, over, middle, value) if value <= target_epsilon else (middle, value, high, spent)
    return high
