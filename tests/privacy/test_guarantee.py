"""The printed promise: never smaller than what was proved, and generated from the facts."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpdistill.privacy import Guarantee
from dpdistill.privacy.guarantee import round_up, shown


@given(st.floats(0, 1e12))
def test_rounding_never_shrinks(value: float) -> None:
    assert value <= round_up(value) <= value + 0.001 * (1 + 1e-9) + value * 1e-12
    assert float(shown(value)) >= value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.3, "0.3"),
        (1.0000000000005, "1.001"),
        (12345.641, "12345.641"),
        (1000.0014, "1000.002"),
        (3, "3"),
        (math.inf, "inf"),
        (0, "0"),
    ],
)
def test_shown(value: float, text: str) -> None:
    assert shown(value) == text


def _guarantee(**facts: object) -> Guarantee:
    return Guarantee(
        **{"epsilon": 2.99999, "delta": 1.23456789e-5, "epsilon_replace_one": 6.1, "epsilon_all_runs": 8.0004} | facts
    )  # type: ignore[arg-type]


def test_sentence_holds_every_figure_rounded_up() -> None:
    sentence = str(_guarantee())
    assert re.findall(r"ε = ([0-9.]*[0-9])", sentence) == ["3", "6.1", "8.001"]
    assert "e^3," in sentence
    assert "1.23456789e-05" in sentence  # a δ that is shortened may be a smaller δ


def test_only_a_proof_is_stated_without_reserve() -> None:
    assert str(_guarantee()).startswith("Adding or removing")
    assert "NOT PRIVATE" in str(_guarantee(basis="none"))
    assert "ε" not in str(_guarantee(basis="none"))
    for basis in ("attested", "paper-nominal"):
        assert "Not proved here" in str(_guarantee(basis=basis))
    with pytest.raises(ValueError, match="basis"):
        _guarantee(basis="trust me")


@pytest.mark.parametrize("field", ["epsilon", "epsilon_replace_one", "epsilon_all_runs"])
@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_no_figure_that_is_no_number(field: str, bad: float) -> None:
    with pytest.raises(ValueError):
        _guarantee(**{field: bad})


@pytest.mark.parametrize("delta", [0, 1, math.nan, -1])
def test_delta_in_range(delta: float) -> None:
    with pytest.raises(ValueError):
        _guarantee(delta=delta)


@pytest.mark.parametrize("unit", ["record", "id", "owner"])
def test_an_exchange_is_of_what_the_unit_holds(unit: str) -> None:
    """An id stays when all under it is exchanged: one id for another would be two changes, and cost more."""
    text = str(_guarantee(unit=unit))
    assert ("exchanging one record:" in text) == (unit == "record")
    assert (f"exchanging everything of one {unit}:" in text) == (unit != "record")
