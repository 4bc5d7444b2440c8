"""Public descriptions: what is refused before anything is charged, one canonical form, and calibration."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdistill.errors import ConfigError
from dpdistill.privacy import GaussianSum, Planned, accounting, calibrate
from dpdistill.privacy.queries import WASTE

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
    {"grid_bits": 25},
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
    noise_multiplier=st.floats(1e-3, 1e6),
    n_classes=st.integers(1, 1000),
    clip_norm=st.floats(1e-30, 1e30),
    sampling_prob=st.floats(1e-9, 1),
    grid_bits=st.integers(12, 24),
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


@pytest.mark.parametrize("delta", [0, 1, math.nan])
def test_bad_delta_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError):
        calibrate(one, 1.0, delta)


def test_a_plan_that_cannot_be_afforded_says_so() -> None:
    def fixed(_: float) -> list[Planned]:
        return one(0.5)

    with pytest.raises(ConfigError, match="fewer steps"):
        calibrate(fixed, 1.0, 1e-5)
