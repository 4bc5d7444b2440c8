"""Public descriptions: what is refused before anything is charged, one canonical form, and calibration."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdistill.errors import ConfigError
from dpdistill.privacy import GaussianSum, NoisyVotes, Planned, accounting, calibrate, queries
from dpdistill.privacy.queries import SIGMA_GRID, WASTE, ShardSum, parse_query

BAD = [
    {"noise_multiplier": math.nan},
    {"noise_multiplier": 0},
    {"noise_multiplier": -1.0},
    {"noise_multiplier": math.inf},
    {"noise_multiplier": 2.0**40},  # more grid steps than the noise can be drawn at
    {"clip_norm": 0},
    {"clip_norm": math.nan},
    {"clip_norm": math.inf},
    {"sampling_prob": 0},
    {"sampling_prob": 1.01},
    {"sampling_prob": math.nan},
    {"sampling_prob": 1e-12},
    {"dim": 0},
    {"dim": 1.5},
    {"dim": math.nan},
    {"dim": True},
    {"n_classes": 0},
    {"n_classes": 2.0},
    {"grid_bits": 7},
    {"grid_bits": 31},
    {"grid_bits": 20.5},
    {"dim": 257, "grid_bits": 8},
    {"name": 3},
]


@pytest.mark.parametrize("change", BAD, ids=str)
def test_bad_fact_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        GaussianSum(**{"name": "s", "dim": 4, "noise_multiplier": 1.0} | change)  # type: ignore[arg-type]


_queries = st.builds(
    GaussianSum,
    name=st.text(max_size=20),
    dim=st.integers(1, 60000),
    noise_multiplier=st.floats(1e-3, 3e4),
    n_classes=st.integers(1, 1000),
    clip_norm=st.floats(1e-30, 1e30),
    sampling_prob=st.floats(1e-9, 1),
    grid_bits=st.integers(12, 30),
)


@given(_queries)
def test_description_reads_back_exactly(query: GaussianSum) -> None:
    assert GaussianSum.parse(query.describe()) == query
    assert set(map(type, query.describe().values())) == {str}


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": "1"},
        {"noise_multiplier": " 1.0"},
        {"noise_multiplier": "1_0.0"},
        {"noise_multiplier": "nan"},
        {"dim": 4},
        {"dim": "04"},
        {"mechanism": "laplace"},
        {"extra": "1"},
        {"name": 1},
        {"sampling_prob": "-1.0"},
    ],
    ids=str,
)
def test_a_description_in_any_other_form_is_refused(change: dict[str, object]) -> None:
    good = GaussianSum(name="s", dim=4, noise_multiplier=1.0).describe()
    with pytest.raises((ValueError, ConfigError)):
        GaussianSum.parse(good | change)  # type: ignore[arg-type]


def one(sigma: float) -> list[Planned]:
    return [Planned(GaussianSum(name="a", dim=1, noise_multiplier=sigma), 2)]


def uneven(sigma: float) -> list[Planned]:
    """Not in proportion to σ: one release has a noise of its own."""
    own = Planned(GaussianSum(name="a", dim=1, noise_multiplier=60.0))
    return [own, Planned(GaussianSum(name="b", dim=1, noise_multiplier=2 * sigma), 3)]


def sampled(sigma: float) -> list[Planned]:
    return [Planned(GaussianSum(name="a", dim=1, noise_multiplier=sigma, sampling_prob=0.05), 100)]


CASES = [(one, e) for e in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)] + [(uneven, e) for e in (0.1, 1.0, 100.0)]
CASES += [(sampled, e) for e in (0.1, 1.0)]


@pytest.mark.parametrize(("plan", "target"), CASES)
def test_calibrated_cost_is_at_most_the_target_and_wastes_little(plan: "type[one]", target: float) -> None:
    sigma = calibrate(plan, target, 1e-5)
    cost = accounting.epsilon([planned.part for planned in plan(sigma)], 1e-5)
    assert (1 - WASTE) * target <= cost <= target
    assert WASTE < 0.005


@settings(max_examples=10)
@given(st.floats(0.1, 100), st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_unsampled_calibration_anywhere(target: float, delta: float) -> None:
    sigma = calibrate(one, target, delta)
    assert 0.995 * target <= accounting.epsilon([p.part for p in one(sigma)], delta) <= target


@pytest.mark.parametrize("target", [0, -1, math.nan, math.inf])
def test_bad_target_is_refused(target: float) -> None:
    with pytest.raises(ConfigError):
        calibrate(one, target, 1e-5)


@pytest.mark.parametrize("delta", [0, 1, math.nan, 1e-11])
def test_bad_delta_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError):
        calibrate(one, 1.0, delta)


def test_a_plan_that_cannot_be_afforded_says_so() -> None:
    def fixed(_: float) -> list[Planned]:
        return one(0.5)

    with pytest.raises(ConfigError, match="fewer steps"):
        calibrate(fixed, 1.0, 1e-5)


# Votes: H + N(0, σ²·2Q I), where one unit moves H by √(2Q) at most.

VOTES = {"name": "v", "n_queries": 200, "n_classes": 10, "n_models": 40, "noise_multiplier": 3.0}
BAD_VOTES: list[dict[str, object]] = [
    *({"noise_multiplier": bad} for bad in (math.nan, math.inf, 0, -1.0, 6e8, 1e-9)),
    *({name: bad} for name in ("n_queries", "n_classes", "n_models") for bad in (0, -1, 1.0, True, math.nan, 2**41)),
    *({"unit_moves": bad} for bad in (0, 3, 1.0, True)),
    {"n_queries": 2**30, "n_classes": 2**11},
    {"n_queries": 10**11, "noise_multiplier": 5e8},  # more grid steps than the noise can be drawn at
    {"name": 3},
]


def votes(**change: object) -> NoisyVotes:
    return NoisyVotes(**VOTES | change)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", BAD_VOTES, ids=str)
def test_bad_fact_of_votes_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        votes(**change)


_votes = st.builds(
    NoisyVotes,
    name=st.text(max_size=20),
    n_queries=st.integers(1, 10**6),
    n_classes=st.integers(1, 1000),
    n_models=st.integers(1, 10**6),
    noise_multiplier=st.floats(1e-3, 1e4),
    unit_moves=st.integers(1, 2),
)


@given(st.one_of(_votes, _queries))
def test_any_description_reads_back_exactly(query: GaussianSum | NoisyVotes) -> None:
    assert parse_query(query.describe()) == query
    assert SIGMA_GRID[0] <= query.sigma_steps <= SIGMA_GRID[1]
    assert query.part(3) == (getattr(query, "sampling_prob", 1.0), query.noise_multiplier, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"mechanism": "gaussian_sum"},
        {"mechanism": "laplace"},
        {"noise_multiplier": "3"},
        {"queries": 200},
        {"queries": "0200"},
        {"queries": "٢"},
        {"unit_moves": "3"},
        {"extra": "1"},
        {"name": 1},
    ],
    ids=str,
)
def test_votes_described_in_any_other_form_are_refused(change: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError, ConfigError)):
        parse_query(votes().describe() | change)  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", sorted(votes().describe()))
def test_votes_with_a_field_missing_are_refused(missing: str) -> None:
    description = votes().describe()
    del description[missing]
    with pytest.raises(KeyError):
        parse_query(description)


@pytest.mark.parametrize(("epsilon", "s"), [(1.0, 3.7306), (3.0, 1.3906), (10.0, 0.4999)])
@pytest.mark.parametrize("rounds", [1, 4])
def test_the_noise_of_votes_in_closed_form(epsilon: float, s: float, rounds: int) -> None:
    """σ_votes = √(2Q)·s(ε), in votes, where Q is the number of all queries of all rounds together."""

    def plan(sigma: float) -> list[Planned]:
        return [Planned(votes(noise_multiplier=sigma * math.sqrt(rounds)), rounds)]

    query = plan(calibrate(plan, epsilon, 1e-5))[0].query
    assert query.sigma_steps / query.unit_steps == pytest.approx(math.sqrt(2 * 200 * rounds) * s, rel=2e-3)


@pytest.mark.parametrize("count", [1, 5])
def test_exchange_of_one_unit_of_votes(count: int) -> None:
    """A unit that keeps its id touches one shard: the same ε. Where its content is its id it touches two: twice the distance."""
    for moves, factor in ((1, 1.0), (2, 2.0)):
        planned = Planned(votes(unit_moves=moves, noise_multiplier=20.0), count)
        once = accounting.epsilon([planned.part], 1e-5)
        exchanged = accounting.epsilon([planned.part_replace_one], 1e-5, "replace_one")
        assert once == pytest.approx(accounting.gaussian_epsilon(20 / math.sqrt(count), 1e-5), rel=1e-3)
        assert exchanged == pytest.approx(accounting.gaussian_epsilon(20 / factor / math.sqrt(count), 1e-5), rel=1e-3)
        assert exchanged >= once


def test_votes_beside_a_sampled_sum() -> None:
    """One ledger with both: under exchange the sum counts twice, the votes of a unit that keeps its id once."""
    both = [Planned(votes(noise_multiplier=2.0)), Planned(GaussianSum(name="s", dim=1, noise_multiplier=9.0))]
    exchanged = accounting.epsilon([p.part_replace_one for p in both], 1e-5, "replace_one")
    assert exchanged == pytest.approx(accounting.gaussian_epsilon((1 / 4 + 4 / 81) ** -0.5, 1e-5), rel=1e-3)
    sampled = Planned(GaussianSum(name="s", dim=1, noise_multiplier=9.0, sampling_prob=0.2), 10)
    mixed = [both[0].part_replace_one, sampled.part_replace_one]
    value = accounting.epsilon(mixed, 1e-5, "replace_one")
    alone = accounting.epsilon([both[0].part], 1e-5)
    assert alone < value < accounting.gaussian_epsilon((1 / 4 + 40 / 81) ** -0.5, 1e-5)


# Sums over models: S + N(0, σ²·(2C)² I), where one unit moves S by 2C at most.

SHARDS = {"name": "v", "dim": 200, "n_models": 40, "noise_multiplier": 3.0, "clip_norm": 2.0}
BAD_SHARDS: list[dict[str, object]] = [
    *({"noise_multiplier": bad} for bad in (math.nan, math.inf, 0, -1.0, 6e8, 1e-9)),
    *({"clip_norm": bad} for bad in (math.nan, math.inf, 0, -1.0)),
    *({name: bad} for name in ("dim", "n_models") for bad in (0, -1, 1.0, True, math.nan, 2**41)),
    *({"unit_moves": bad} for bad in (0, 3, 1.0, True)),
    *({"grid_bits": bad} for bad in (7, 25, 20.5)),
    {"dim": 257, "grid_bits": 8},
    {"name": 3},
]


def shards(**change: object) -> ShardSum:
    return ShardSum(**SHARDS | change)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", BAD_SHARDS, ids=str)
def test_bad_fact_of_a_sum_over_models_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        shards(**change)


@given(
    st.builds(
        ShardSum,
        name=st.text(max_size=20),
        dim=st.integers(1, 60000),
        n_models=st.integers(1, 10**6),
        noise_multiplier=st.floats(1e-3, 1e4),
        clip_norm=st.floats(1e-30, 1e30),
        unit_moves=st.integers(1, 2),
        grid_bits=st.integers(12, 24),
    )
)
def test_a_sum_over_models_reads_back_exactly(query: ShardSum) -> None:
    assert parse_query(query.describe()) == query
    assert query.part(3) == (1.0, query.noise_multiplier, 3)
    assert query.sigma_steps / query.unit_steps == pytest.approx(2 * query.clip_norm * query.noise_multiplier)


@pytest.mark.parametrize(
    "change",
    [
        {"mechanism": "gaussian_sum"},
        {"noise_multiplier": "3"},
        {"models": 40},
        {"dim": "0200"},
        {"unit_moves": "3"},
        {"extra": "1"},
        {"name": 1},
        {"clip_norm": "2"},
    ],
    ids=str,
)
def test_a_sum_over_models_in_any_other_form_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError, ConfigError)):
        parse_query(shards().describe() | change)  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", sorted(shards().describe()))
def test_a_sum_over_models_with_a_field_missing_is_refused(missing: str) -> None:
    description = shards().describe()
    del description[missing]
    with pytest.raises(KeyError):
        parse_query(description)


def test_exchange_of_one_unit_of_a_sum_over_models() -> None:
    for moves, factor in ((1, 1.0), (2, 2.0)):
        planned = Planned(shards(unit_moves=moves, noise_multiplier=20.0), 5)
        once = accounting.epsilon([planned.part], 1e-5)
        exchanged = accounting.epsilon([planned.part_replace_one], 1e-5, "replace_one")
        assert once == pytest.approx(accounting.gaussian_epsilon(20 / math.sqrt(5), 1e-5), rel=1e-3)
        assert exchanged == pytest.approx(accounting.gaussian_epsilon(20 / factor / math.sqrt(5), 1e-5), rel=1e-3)


def summed(**change: object) -> GaussianSum:
    return GaussianSum(**{"name": "s", "dim": 4, "noise_multiplier": 1.0} | change)  # type: ignore[arg-type]


# At a limit, and one step beyond it.
LIMITS = [
    (summed, {"grid_bits": 8}, {"grid_bits": 7}),
    (summed, {"grid_bits": 30}, {"grid_bits": 31}),
    (summed, {"grid_bits": 8, "dim": 4**4}, {"grid_bits": 8, "dim": 4**4 + 1}),
    (
        summed,
        {"grid_bits": 30, "noise_multiplier": 2.0**15},
        {"grid_bits": 30, "noise_multiplier": 2.0**15 * (1 + 1e-9)},
    ),
    (summed, {"grid_bits": 8, "noise_multiplier": 1e-3 / 2**8}, {"grid_bits": 8, "noise_multiplier": 0.999e-3 / 2**8}),
    (summed, {"dim": 1, "n_classes": 1, "sampling_prob": 1}, {"dim": 0}),
    (votes, {"n_models": 2**40}, {"n_models": 2**40 + 1}),
    (votes, {"n_queries": 2**20, "n_classes": 2**20}, {"n_queries": 2**20, "n_classes": 2**20 + 1}),
    (
        votes,
        {"n_queries": 2**13, "noise_multiplier": 2.0**28},
        {"n_queries": 2**13, "noise_multiplier": 2.0**28 * (1 + 1e-9)},
    ),
    (votes, {"noise_multiplier": 5e8}, {"noise_multiplier": 5e8 + 1}),  # doubled, it must still be accountable
    (votes, {"n_queries": 10**6, "noise_multiplier": 1e-6}, {"n_queries": 10**6, "noise_multiplier": 0.6e-6}),
    (votes, {"n_queries": 1, "n_classes": 1, "n_models": 1}, {"n_models": 0}),
    (votes, {"unit_moves": 2}, {"unit_moves": 3}),
    (shards, {"n_models": 2**38}, {"n_models": 2**38 + 1}),
    (shards, {"grid_bits": 8, "dim": 1}, {"grid_bits": 7, "dim": 1}),
    (shards, {"grid_bits": 24}, {"grid_bits": 25}),
    (shards, {"grid_bits": 8, "dim": 4**4}, {"grid_bits": 8, "dim": 4**4 + 1}),
    (shards, {"grid_bits": 8, "noise_multiplier": 5e8}, {"grid_bits": 8, "noise_multiplier": 5e8 + 1}),
    (shards, {"grid_bits": 24, "noise_multiplier": 1e-6}, {"grid_bits": 24, "noise_multiplier": 0.6e-6}),
    (
        shards,
        {"grid_bits": 24, "noise_multiplier": 2.0**20},
        {"grid_bits": 24, "noise_multiplier": 2.0**20 * (1 + 1e-9)},
    ),
    (shards, {"grid_bits": 8, "noise_multiplier": 1e-3 / 2**9}, {"grid_bits": 8, "noise_multiplier": 0.999e-3 / 2**9}),
    (shards, {"dim": 1, "n_models": 1, "unit_moves": 2}, {"unit_moves": 3}),
]


@pytest.mark.parametrize(("make", "at", "beyond"), LIMITS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_fact_at_its_limit_is_taken_and_one_beyond_it_is_not(make: type, at: object, beyond: object) -> None:
    query = make(**at)
    assert parse_query(query.describe()) == query
    with pytest.raises(ConfigError):
        make(**beyond)


def test_what_a_query_says_of_itself() -> None:
    """The scale of the noise, in grid steps, and what the ledger gets: by hand."""
    query = GaussianSum(
        name="s", dim=5, n_classes=3, noise_multiplier=1.5, clip_norm=4.0, sampling_prob=0.25, grid_bits=12
    )
    assert (query.rows, query.dim, query.unit_steps, query.sigma_steps) == (3, 5, 1024.0, 6144.0)
    assert query.part() == query.part(1, "replace_one") == (0.25, 1.5, 1)
    facts = {"sampling_prob": "0.25", "noise_multiplier": "1.5", "clip_norm": "4.0", "grid_bits": "12"}
    assert query.describe() == {"mechanism": "gaussian_sum", "name": "s", "dim": "5", "classes": "3", **facts}
    assert GaussianSum(name="s", dim=5, noise_multiplier=1.5).describe() == {
        "mechanism": "gaussian_sum", "name": "s", "dim": "5", "classes": "1", "sampling_prob": "1.0", "noise_multiplier": "1.5",
        "clip_norm": "1.0", "grid_bits": "20",
    }  # fmt: skip
    vote = votes(n_queries=8, unit_moves=1)
    assert (vote.rows, vote.dim, vote.unit_steps, vote.sigma_steps) == (8, 10, 1024.0, 3.0 * 4 * 1024)
    assert (vote.part(2), vote.part(2, "replace_one")) == ((1.0, 3.0, 2), (1.0, 6.0, 2))
    assert (votes(unit_moves=2).part(), votes(unit_moves=2).part(1, "replace_one")) == ((1.0, 3.0, 1),) * 2
    facts = {"queries": "8", "classes": "10", "models": "40", "noise_multiplier": "3.0", "unit_moves": "1"}
    assert votes(n_queries=8).describe() == {"mechanism": "noisy_votes", "name": "v", **facts}
    vector = shards(grid_bits=12)
    assert (vector.rows, vector.dim, vector.unit_steps, vector.sigma_steps) == (1, 200, 2048.0, 3.0 * 2 * 4096)
    assert (vector.part(2), vector.part(2, "replace_one")) == ((1.0, 3.0, 2), (1.0, 6.0, 2))
    assert (shards(unit_moves=2).part(), shards(unit_moves=2).part(1, "replace_one")) == ((1.0, 3.0, 1),) * 2
    facts = {
        "dim": "200",
        "models": "40",
        "noise_multiplier": "3.0",
        "clip_norm": "2.0",
        "unit_moves": "1",
        "grid_bits": "20",
    }
    assert shards().describe() == {"mechanism": "shard_sum", "name": "v", **facts}
    plain = ShardSum(name="v", dim=2, n_models=3, noise_multiplier=1.5)
    assert (plain.clip_norm, plain.unit_moves, plain.grid_bits) == (1.0, 1, 20)
    assert NoisyVotes(name="v", n_queries=1, n_classes=2, n_models=3, noise_multiplier=1.5).unit_moves == 1
    assert plain.part() == (1.0, 1.5, 1)
    assert Planned(vote) == Planned(vote, 1)
    assert (Planned(vote, 3).part, Planned(vote, 3).part_replace_one) == ((1.0, 3.0, 3), (1.0, 6.0, 3))


@pytest.mark.parametrize("sampling_prob", [1.0, 0.05])
@pytest.mark.parametrize("power", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("scale", [1e-6, 0.3, 0.999, 1.0, 3.0, 2e4])
def test_the_search_finds_the_noise_wherever_it_is(
    scale: float, power: float, sampling_prob: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ε as another function of σ than the first guess supposes: never above the target, little below it, and soon."""
    asked: list[float] = []

    def plan(sigma: float) -> list[Planned]:
        return [Planned(summed(noise_multiplier=sigma, sampling_prob=sampling_prob), 7)]

    def cost(parts: object, delta: float) -> float:
        ((q, sigma, count),) = parts  # type: ignore[misc]
        assert (q, count, delta) == (sampling_prob, 7, 1e-5)
        asked.append(sigma)
        return (scale * at / sigma) ** power

    at = 1.0
    monkeypatch.setattr(queries, "epsilon", cost)
    at = calibrate(plan, 1.0, 1e-5) if scale == 1.0 else 9.87
    asked.clear()
    sigma = calibrate(plan, 1.0, 1e-5)
    spent = cost(plan(sigma)[0].part and [plan(sigma)[0].part], 1e-5)
    assert spent <= 1.0
    assert spent >= 1 - WASTE or sigma <= 1e-3
    assert len(asked) <= 40


def test_the_first_guess_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """σ from Σ count/σ² = μ² without sampling, and from the central limit of Poisson sampling with it."""
    asked: list[float] = []
    monkeypatch.setattr(queries, "epsilon", lambda parts, delta: (asked.append(parts[0][1]), 1.0)[1])
    mu = 1 / accounting.gaussian_multiplier(1.0, 1e-5)
    assert calibrate(lambda s: [Planned(summed(noise_multiplier=s), 9)], 1.0, 1e-5) == asked[0] == pytest.approx(3 / mu)
    asked.clear()
    plan = [Planned(summed(noise_multiplier=1.0, sampling_prob=0.02), 400)]
    calibrate(lambda s: [Planned(summed(noise_multiplier=s, sampling_prob=0.02), p.count) for p in plan], 1.0, 1e-5)
    assert asked[0] == pytest.approx(math.log1p(mu**2 / (400 * 0.02**2)) ** -0.5)


def priced(
    cost: Callable[[float], float], monkeypatch: pytest.MonkeyPatch, target: float = 1.0, sampling_prob: float = 1.0
) -> tuple[float, list[float]]:
    """σ for a plan that costs cost(σ / first guess), and every σ that was asked for. Both in units of the first guess."""
    asked: list[float] = []

    def priced_cost(parts: list[tuple[float, float, int]], delta: float) -> float:
        asked.append(parts[0][1])
        return cost(asked[-1] / asked[0])

    def plan(sigma: float) -> list[Planned]:
        return [Planned(summed(noise_multiplier=sigma, sampling_prob=sampling_prob), 7)]

    monkeypatch.setattr(queries, "epsilon", priced_cost)
    sigma = calibrate(plan, target, 1e-5)
    return sigma / asked[0], [one / asked[0] for one in asked]


ENOUGH = (1 - WASTE) * 1.0


@pytest.mark.parametrize(
    ("dearest", "dear", "cheap", "found", "asks"),
    [
        (ENOUGH, ENOUGH, ENOUGH, 0, 1),
        (1.0, 1.0, 1.0, 0, 1),
        (2.0, 2.0, ENOUGH, 1, 2),
        (2.0, 2.0, 1.0, 1, 2),
        (1.0, 0.5, 0.5, 1, 2),
        (ENOUGH, 0.5, 0.5, 1, 2),
    ],
)
def test_a_cost_of_just_the_target_or_just_enough_ends_the_search(
    dearest: float, dear: float, cheap: float, found: int, asks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target itself may be spent, and 99.9 % of it is near enough."""
    steps = [(1.0, dearest), (1.0002, dear), (math.inf, cheap)]  # up to which σ, what it costs
    sigma, asked = priced(lambda at: next(c for end, c in steps if at < end), monkeypatch)
    assert sigma == asked[found]
    assert len(asked) == asks


def test_between_too_dear_and_too_cheap_the_target_itself_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sigma, _ = priced(lambda at: 2.0 if at < 1.3 else 1.0 if at < 1.35 else 0.5, monkeypatch)
    assert 1.3 <= sigma < 1.35


@pytest.mark.parametrize("sampling_prob", [1.0, 0.05])
@pytest.mark.parametrize("away", [1.0003, 1.003, 1.0055, 1.02, 1.3, 2.2, 4.5, 9.0, 40.0])
@pytest.mark.parametrize("up", [True, False])
def test_the_search_goes_little_further_than_it_must(
    up: bool, away: float, sampling_prob: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PLD of far too small a σ takes minutes and gigabytes. No more than as far again as the way so far, nor than twice σ."""
    answer, first = away if up else 1 / away, 1.0004 if sampling_prob == 1 else 1.1
    sigma, asked = priced(lambda at: answer / at, monkeypatch, sampling_prob=sampling_prob)
    assert ENOUGH <= answer / sigma <= 1.0
    beyond = max(asked) / answer if up else answer / min(asked)
    assert beyond <= min(away * first, 2.0) * 1.001
    # Where log cost is linear in log σ, one more is asked for than the steps there, each of which is as long as all before.
    steps = math.ceil(math.log2(math.log(away) / math.log(first) + 1))
    if 1.0003 < away < 2:  # nearer, and interpolation is held to a fiftieth of the way
        assert len(asked) <= 1 + steps + 1


@pytest.mark.parametrize("target", [0.3, 3.0])
def test_a_cost_that_bends_takes_two_more(target: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second interpolation is from the first one's place, and near enough."""

    def cost(at: float) -> float:
        way = math.log(at / 1.9)
        return target * 0.9995 * math.exp(-way - 0.1 * way**2)

    _, asked = priced(cost, monkeypatch, target)
    assert [cost(one) <= target for one in asked].index(True) == len(asked) - 3


@pytest.mark.parametrize(("dear", "cheap"), [(1.5, 0.5), (1.001, 0.9), (1.5, 0.9985), (math.inf, 0.5)])
def test_every_step_of_the_search_takes_something_off_and_each_third_a_half(
    dear: float, cheap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a cost that jumps could hold up the search for ever."""
    _, asked = priced(lambda at: dear if at < 1.3 else cheap, monkeypatch)
    rising = [one >= 1.3 for one in asked].index(True)
    low, high, left = asked[rising - 1], asked[rising], []
    for one in asked[rising + 1 :]:
        left.append(math.log(high / low))
        low, high = (one, high) if one < 1.3 else (low, one)
        assert math.log(high / low) <= left[-1] * 0.9801
    assert all(later <= earlier * 0.5001 for earlier, later in zip(left, left[3:], strict=False))


def test_noise_of_up_to_a_million_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for highest, found in ((1e6 - 0.01, True), (1e6 + 0.01, False)):
        monkeypatch.setattr(queries, "gaussian_multiplier", lambda *_, at=highest: at / 1.0004)
        prices = iter([2.0, 1.0])
        monkeypatch.setattr(queries, "epsilon", lambda parts, delta, prices=prices: next(prices))
        plan = lambda sigma: [Planned(summed(noise_multiplier=min(sigma, 1.0)))]  # noqa: E731
        if found:
            assert calibrate(plan, 1.0, 1e-5) == pytest.approx(highest, rel=1e-12)
        else:
            with pytest.raises(ConfigError, match="fewer steps"):
                calibrate(plan, 1.0, 1e-5)


def test_every_kind_of_query_is_read_back() -> None:
    kinds = {type(query) for query in (summed(), votes(), shards())}
    assert (
        set(get_args(queries.Query))
        == kinds
        == {type(parse_query(x.describe())) for x in (summed(), votes(), shards())}
    )


def test_a_plan_that_no_noise_makes_cheap_or_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    for price, found in ((2.0, None), (0.5, 1e-3)):
        monkeypatch.setattr(queries, "epsilon", lambda parts, delta, e=price: (asked.append(parts[0][1]), e)[1])
        asked.clear()
        if found is None:
            with pytest.raises(ConfigError, match="fewer steps"):
                calibrate(one, 1.0, 1e-5)
            assert 5e5 < max(asked) <= 1e6
        else:
            assert 1e-4 < calibrate(one, 1.0, 1e-5) <= found
        assert len(asked) < 40


@pytest.mark.parametrize(("dear", "cheap"), [(1.5, 0.5), (math.inf, 0.5), (1.5, 0.0), (1.001, 0.9)])
def test_a_cost_that_jumps_past_the_target(dear: float, cheap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No σ costs nearly the target: the smallest that is cheap enough is found, and the search ends."""
    asked: list[float] = []
    for jump in (1e-2, 12.3, 4e4):
        asked.clear()
        monkeypatch.setattr(
            queries,
            "epsilon",
            lambda parts, delta, at=jump: (asked.append(parts[0][1]), dear if parts[0][1] < at else cheap)[1],
        )
        sigma = calibrate(one, 1.0, 1e-5)
        assert jump <= sigma < jump * (1 + 2e-6)
        assert len(asked) < 150


@pytest.mark.parametrize("query", [summed(), votes(), shards(), Planned(summed())], ids=lambda x: type(x).__name__)
def test_what_was_charged_is_not_changed_any_more(query: "GaussianSum | NoisyVotes | ShardSum | Planned") -> None:
    """And no fact is taken for another by its place: two numbers exchanged would be another sensitivity."""
    for field in fields(query):
        with pytest.raises(FrozenInstanceError):
            setattr(query, field.name, getattr(query, field.name))
    if not isinstance(query, Planned):
        with pytest.raises(TypeError):
            type(query)(*(getattr(query, field.name) for field in fields(query)))


def test_how_far_a_record_function_may_be_off_is_as_documented() -> None:
    """docs/bundle.md: a release with more is refused, here and by a second verifier."""
    assert queries.RECORDWISE_TOLERANCE == 0.02
