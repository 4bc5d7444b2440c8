"""ε: golden values, a second implementation, monotonicity, and every trap of the accountants that we met.

q sampling_prob, σ noise_multiplier, T count, μ of a Gaussian trade-off function.
"""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from dpdistill.errors import ConfigError
from dpdistill.privacy import accounting

GOLDEN = [  # computed once by two accountants: q, σ, T, δ, ε (add-or-remove, PLD at 1e-4)
    (1.0, 1.0, 1, 1e-5, 4.377178),
    (1.0, 4.0, 100, 1e-5, 13.206712),
    (0.01, 1.0, 1000, 1e-5, 1.82824),
    (0.01, 4.2969, 10000, 1e-5, 0.87319),
    (0.05, 1.1, 1200, 1e-5, 10.19692),
    (0.1, 3.0, 300, 1e-5, 2.49480),
    (256 / 60000, 1.1, 14062, 1e-5, 2.38169),
    (0.5, 8.0, 200, 1e-5, 3.83789),
    (0.2, 2.0, 500, 1e-6, 13.900855),
    (0.001, 0.6, 20000, 1e-7, 4.451404),
]


def second_epsilon(q: float, sigma: float, count: int, delta: float, step: float = 1e-4) -> float:
    """ε by our own FFT: losses of both directions on a grid, composed, inverted by bisection."""
    worst = 0.0
    for removed in (True, False):
        edges = np.linspace(-12 * sigma - 1, 12 * sigma + 2, 400_001)
        middle = (edges[1:] + edges[:-1]) / 2
        plain, shifted = np.diff(ndtr(edges / sigma)), np.diff(ndtr((edges - 1) / sigma))
        log_ratio = np.log1p(q * np.expm1(np.clip((2 * middle - 1) / (2 * sigma**2), -700, 700)))  # mixture over plain
        mass, loss = ((1 - q) * plain + q * shifted, log_ratio) if removed else (plain, -log_ratio)
        # A cell's mass is split between the two nearest grid points so that the mean is kept: accurate to second order.
        place = loss / step
        low = np.floor(place).astype(np.int64)
        size = 2 ** math.ceil(math.log2(max(4e5, 1.3 * 2 * _reach(mass, loss, count) / step)))
        pmf = np.zeros(size)
        np.add.at(pmf, low % size, mass * (low + 1 - place))
        np.add.at(pmf, (low + 1) % size, mass * (place - low))
        composed = np.fft.irfft(np.fft.rfft(pmf) ** count, size).clip(0)
        grid = np.arange(size, dtype=np.float64)
        grid[size // 2 :] -= size
        grid *= step
        below, above = 0.0, float(grid.max())
        for _ in range(60):
            epsilon = (below + above) / 2
            over = grid > epsilon
            spent = float((composed[over] * -np.expm1(epsilon - grid[over])).sum())
            below, above = (epsilon, above) if spent > delta else (below, epsilon)
        worst = max(worst, above)
    return worst


def _reach(mass: np.ndarray, loss: np.ndarray, count: int) -> float:
    """How far the composed loss spreads: its mean plus twelve standard deviations, and the largest single loss of any weight."""
    mean = float((mass * loss).sum())
    spread = math.sqrt(max(float((mass * loss**2).sum()) - mean**2, 0.0) * count)
    return abs(mean) * count + 14 * spread + float(np.abs(loss[mass > 1e-15]).max())


@pytest.mark.parametrize(("q", "sigma", "count", "delta", "golden"), GOLDEN)
def test_golden_value_and_rdp_above_it(q: float, sigma: float, count: int, delta: float, golden: float) -> None:
    value = accounting.epsilon([(q, sigma, count)], delta)
    assert value == pytest.approx(golden, abs=1e-3)
    assert value <= accounting.rdp_epsilon([(q, sigma, count)], delta)


@pytest.mark.parametrize(("q", "sigma", "count", "delta", "golden"), [GOLDEN[i] for i in (0, 2, 4, 5, 7)])
def test_second_implementation_agrees(q: float, sigma: float, count: int, delta: float, golden: float) -> None:
    second = second_epsilon(q, sigma, count, delta)
    value = accounting.epsilon([(q, sigma, count)], delta)
    assert value == pytest.approx(second, abs=1e-3)
    assert value >= second - 1e-4  # never below it


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.0899, 0.0901, 0.1, 0.25, 0.5, 1, 3, 20, 1000, 1e5])
def test_unsampled_never_below_the_analytic_gaussian(sigma: float) -> None:
    exact = accounting.gaussian_epsilon(sigma, 1e-5)
    value = accounting.epsilon([(1, sigma, 1)], 1e-5)
    assert exact <= value <= exact + 1e-5 + 1e-6 * exact


_plan = st.tuples(st.floats(0.01, 0.6), st.floats(3, 20), st.integers(1, 60))


@settings(max_examples=10)
@given(_plan, st.floats(1.05, 2))
def test_monotone_in_count_rate_and_noise(plan: tuple[float, float, int], factor: float) -> None:
    q, sigma, count = plan
    value = accounting.epsilon([plan], 1e-5)
    slack = 1e-3  # the discretisation
    assert 0 <= value <= accounting.rdp_epsilon([plan], 1e-5) + slack
    assert accounting.epsilon([(q, sigma, int(count * factor) + 1)], 1e-5) >= value - slack
    assert accounting.epsilon([(min(q * factor, 1.0), sigma, count)], 1e-5) >= value - slack
    assert accounting.epsilon([(q, sigma * factor, count)], 1e-5) <= value + slack
    assert accounting.epsilon([plan, (1.0, 30.0, 1)], 1e-5) >= value - slack


@pytest.mark.parametrize("small", [0.0895, 0.06, 1e-3, 1e-6])
def test_tiny_noise_is_bounded_in_closed_form_and_quickly(small: float) -> None:
    """A hostile ledger must not make a verifier build a table of gigabytes, and the bound must stay above the sampled value."""
    sampled = accounting.epsilon([(0.5, small, 3)], 1e-5)
    assert sampled == accounting.epsilon([(1.0, small, 3)], 1e-5)
    assert sampled >= accounting.epsilon([(0.5, 0.0905, 1)], 1e-5)
    assert math.isfinite(sampled)


@pytest.mark.parametrize(
    ("q", "sigma", "count"),
    [(1.0, 0.5, 1), (0.001, 0.7, 10**4), (1e-4, 0.6, 10**6), (0.001, 1.0, 10**5), (0.5, 0.8, 10)],
)
def test_the_smallest_delta_still_works(q: float, sigma: float, count: int) -> None:
    """A tenth of it, and the third of these is far above what Rényi DP proves."""
    value, delta = accounting.epsilon([(q, sigma, count)], accounting.MIN_DELTA), accounting.MIN_DELTA
    assert value <= accounting.rdp_epsilon([(q, sigma, count)], delta)
    if q == 1:
        assert value == pytest.approx(accounting.gaussian_epsilon(sigma, delta), rel=1e-6)


@pytest.mark.parametrize("delta", [0, 1, -0.1, 2, math.nan, math.inf, 0.99 * accounting.MIN_DELTA, 1e-16])
def test_bad_delta_is_refused(delta: float) -> None:
    for parts in ([], [(1.0, 1.0, 1)]):
        with pytest.raises(ConfigError):
            accounting.epsilon(parts, delta)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, -math.inf, 1e200, 1e-200])
def test_bad_part_is_refused(bad: float) -> None:
    for part in ((bad, 1.0, 1), (1.0, bad, 1), (0.5, bad, 1), (1.0, 1.0, bad)):
        with pytest.raises(ConfigError):
            accounting.epsilon([part], 1e-5)


@pytest.mark.parametrize("part", [(1e-9, 1.0, 1), (1, 1e-6, 1), (0.5, 1e9, 1), (1.0, 1.0, 10**12)])
def test_a_part_at_the_limit_is_taken_and_one_beyond_it_is_not(part: accounting.Part) -> None:
    accounting.check_part(*part)
    q, sigma, count = part
    beyond = {1e-9: (0.99e-9, sigma, count), 1: (1 + 1e-12, sigma, count), 0.5: (q, 1e9 + 1, count)}
    with pytest.raises(ConfigError):
        accounting.check_part(*beyond[q])
    with pytest.raises(ConfigError):
        accounting.check_part(q, 0.99e-6, count)
    with pytest.raises(ConfigError):
        accounting.check_part(q, sigma, 10**12 + 1)


def test_equal_parts_and_all_unsampled_gaussians_are_merged() -> None:
    parts = [(1.0, 3.0, 2), (0.3, 2.0, 5), (1.0, 5.0, 1), (0.2, 2.0, 3), (1.0, 3.0, 1), (0.2, 2.0, 4), (0.2, 1.0, 1)]
    gaussian = (1.0, pytest.approx((3 / 9 + 1 / 25) ** -0.5), 1)
    assert accounting.group(parts) == ((0.2, 1.0, 1), (0.2, 2.0, 7), (0.3, 2.0, 5), gaussian)
    assert accounting.group(iter(parts[3:4])) == ((0.2, 2.0, 3),)
    one = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(2.0))
    whole = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(3.0), 1)
    composed = dp_accounting.ComposedDpEvent([dp_accounting.SelfComposedDpEvent(one, 3), whole])
    assert accounting.event([(1, 3.0, 1), (0.2, 2.0, 3)]) == composed


@pytest.mark.parametrize("count", [0, -3, 1.5, True, "1", None])
def test_bad_count_is_refused(count: object) -> None:
    with pytest.raises(ConfigError):
        accounting.epsilon([(1.0, 1.0, count)], 1e-5)  # type: ignore[list-item]


def test_a_count_that_would_take_hours_is_refused_at_once() -> None:
    """dp-accounting raises the size of a small loss distribution to the power of the count, in whole numbers."""
    for count in (10**6 + 1, 10**12):  # a million is taken: see below
        with pytest.raises(ConfigError, match="at most"):
            accounting.epsilon([(1e-4, 100.0, count)], 1e-5)
    assert accounting.epsilon([(1.0, 1e6, 10**12)], 1e-5) > 0  # without sampling it is one Gaussian


def test_the_name_that_certificates_bear() -> None:
    """Stored: a verifier builds the certificate again and compares."""
    assert accounting.ACCOUNTANT == "dp-accounting PLD"


def test_unknown_relation_is_refused() -> None:
    with pytest.raises(ConfigError, match="relation"):
        accounting.epsilon([(1.0, 1.0, 1)], 1e-5, "zero_out")  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [math.nan, -1.0])
def test_an_accountant_that_returns_no_number_is_refused(answer: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_pld_epsilon", lambda *_: answer)
    with pytest.raises(ConfigError):
        accounting.epsilon([(0.5, 1.0, 1)], 1e-5)


def test_nothing_costs_nothing() -> None:
    assert accounting.epsilon([], 1e-5) == 0


def test_grouping_equals_explicit_composition() -> None:
    """GDP: unsampled Gaussians of different σ are one Gaussian; here against dp-accounting composing each by itself."""
    parts = [(1.0, 3.0, 2), (1.0, 5.0, 1), (0.2, 2.0, 3), (1.0, 3.0, 1), (0.2, 2.0, 4)]
    explicit = pld.PLDAccountant(value_discretization_interval=1e-4)
    for q, sigma, count in parts:
        one = dp_accounting.GaussianDpEvent(sigma)
        event = one if q == 1 else dp_accounting.PoissonSampledDpEvent(q, one)
        explicit.compose(event, count)
    assert accounting.epsilon(parts, 1e-5) == pytest.approx(explicit.get_epsilon(1e-5), abs=1e-3)
    grouped = accounting.group(parts)
    assert grouped == ((0.2, 2.0, 7), (1.0, pytest.approx((3 / 9 + 1 / 25) ** -0.5), 1))
    assert accounting.epsilon(parts[::-1], 1e-5) == accounting.epsilon(parts, 1e-5)


def test_replace_one_of_a_gaussian_is_half_the_noise() -> None:
    """The trap: dp-accounting's PLD doubles the distance by itself under REPLACE_ONE, so nobody may double it again."""
    ours = accounting.epsilon([(1.0, 4.0, 1)], 1e-5, "replace_one")
    assert ours == pytest.approx(accounting.gaussian_epsilon(2.0, 1e-5), abs=1e-4)
    theirs = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE, value_discretization_interval=1e-4)
    assert ours == pytest.approx(theirs.compose(dp_accounting.GaussianDpEvent(4.0)).get_epsilon(1e-5), abs=1e-4)


def test_rdp_ignores_the_relation() -> None:
    """The other trap: RDP under REPLACE_ONE gives the add-or-remove value or refuses, so it is used for add-or-remove only."""
    event = dp_accounting.GaussianDpEvent(4.0)
    add = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    replace = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    assert add.compose(event).get_epsilon(1e-5) == replace.compose(event).get_epsilon(1e-5)  # if this fails, use it
    assert accounting.epsilon([(1.0, 4.0, 1)], 1e-5, "replace_one") > replace.get_epsilon(1e-5)


@pytest.mark.parametrize("parts", [[(0.05, 2.0, 50)], [(0.3, 4.0, 5), (1.0, 6.0, 2)]])
def test_replace_one_costs_more_and_at_most_two_removals(parts: list[accounting.Part]) -> None:
    add, replace = (accounting.epsilon(parts, 1e-5, relation) for relation in ("add_or_remove_one", "replace_one"))
    assert add < replace
    # A replacement is a removal and an addition: ε doubles at most, at δ·(1 + e^ε).
    assert replace <= 2 * accounting.epsilon(parts, 1e-5 / (1 + math.exp(add + 1)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What is asked of PLD from here on; it answers 7."""
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(accounting, "_pld_epsilon", lambda *facts: (calls.append(facts), 7.0)[1])
    return calls


def test_which_parts_are_a_matter_for_pld(asked: list[tuple[object, ...]]) -> None:
    mixed = [(0.1, 0.09, 10**6), (1.0, 2.0, 4)]  # at the smallest noise and at the most releases that PLD takes
    for relation in ("add_or_remove_one", "replace_one"):
        assert accounting.epsilon(mixed, 1e-5, relation) == 7
        assert asked.pop() == (((0.1, 0.09, 10**6), (1.0, 1.0, 1)), 1e-5, relation)
        half = 2 if relation == "replace_one" else 1
        # Unsampled: one Gaussian whose exact ε is below 7 here, as PLD's may be.
        assert accounting.epsilon([(1.0, 8.0, 4)], 1e-5, relation) == 7
        assert asked.pop() == (((1.0, pytest.approx(4.0 / half, rel=1e-12), 1),), 1e-5, "add_or_remove_one")
        assert accounting.epsilon([(1.0, 0.09 * half, 1)], 1e-5, relation) > 7
        assert asked.pop()[0] == ((1.0, pytest.approx(0.09), 1),)
        # Below, or with too little noise to sample: closed form, with all parts unsampled.
        whole = accounting.gaussian_epsilon((2 / (0.089 / half) ** 2 + 4 / (1.0 / half) ** 2) ** -0.5, 1e-5)
        assert accounting.epsilon([(0.2, 0.089, 2), (1.0, 1.0, 4)], 1e-5, relation) == pytest.approx(whole, rel=1e-12)
        assert asked == []


@pytest.mark.parametrize(
    ("coarse", "steps"),
    [(20.0, [1e-3, 1e-4]), (0.0, [1e-3, 1e-4]), (20.1, [1e-3]), (math.inf, [1e-3]), (math.nan, [1e-3])],
)
def test_the_fine_step_is_taken_wherever_it_can_be(
    coarse: float, steps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []

    class Distribution:
        def self_compose(self, count: int) -> "Distribution":
            assert count == 2
            return self

        def compose(self, other: "Distribution") -> "Distribution":
            return other

        def get_epsilon_for_delta(self, delta: float) -> float:
            assert delta == 1e-6
            return {1e-3: coarse, 1e-4: 3.0}[taken[-1]]

    def of_one(q: float, sigma: float, relation: str, interval: float) -> Distribution:
        assert (q, sigma, relation) == (0.5, 1.0, "replace_one")
        taken.append(interval)
        return Distribution()

    monkeypatch.setattr(accounting, "_pld_of_one", of_one)
    monkeypatch.setattr(pld.privacy_loss_distribution, "identity", lambda interval: Distribution())
    value = accounting._pld_epsilon.__wrapped__(((0.5, 1.0, 2),), 1e-6, "replace_one")
    assert taken == steps
    assert value == pytest.approx({1e-3: coarse, 1e-4: 3.0}[taken[-1]], nan_ok=True)


def test_the_ceiling_is_the_least_over_its_orders() -> None:
    """By definition for one unsampled Gaussian, for noise whose best order is one of these, or between two. Certificates bear it."""
    orders = [*range(2, 65), *range(68, 257, 4), 384, 512, 1024]
    for best in (0.5, 1, *range(2, 95), 100, *range(244, 270, 2), 350, 384, 400, 512, 600, 1024, 1500):
        sigma = best / math.sqrt(2 * math.log(1e5))
        by_order = [a / (2 * sigma**2) + math.log1p(-1 / a) - math.log(1e-5 * a) / (a - 1) for a in orders]
        assert accounting.rdp_epsilon([(1.0, sigma, 1)], 1e-5) == pytest.approx(min(by_order), rel=1e-12)


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize(
    "parts",
    [((0.1, 3.0, 300),), ((0.01, 1.0, 7), (0.02, 1.5, 40), (1.0, 4.0, 1)), ((1.0, 0.8, 1),)],
)
def test_it_is_the_accountants_own_answer(parts: tuple[accounting.Part, ...], relation: str) -> None:
    """Loss distributions are kept from one question to the next, so composing them is not left to the accountant."""
    steps = (accounting.COARSE_DISCRETISATION, accounting.DISCRETISATION)
    found = []
    for step in steps:
        accountant = pld.PLDAccountant(accounting._RELATIONS[relation], value_discretization_interval=step)
        found.append(accountant.compose(accounting.event(parts)).get_epsilon(1e-5))
    wanted = found[0] if found[0] > accounting.COARSE_EPSILON else found[1]
    accounting._pld_epsilon.cache_clear()
    for _ in range(2):
        assert accounting._pld_epsilon(parts, 1e-5, relation) == pytest.approx(wanted, rel=1e-9)
        assert accounting._pld_epsilon((parts[0],), 1e-6, relation) > 0  # another question in between


def test_the_limits_are_those_that_the_pages_name() -> None:
    assert (accounting.MIN_DELTA, accounting.MAX_EPSILON, accounting.MAX_SAMPLED) == (1e-10, 1000.0, 10**6)
