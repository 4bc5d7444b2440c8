"""The printed promise: never smaller than what was proved, and generated from the facts."""

import math
import re
from dataclasses import FrozenInstanceError

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


SAYS = {  # the whole sentence: certificates and pages bear it, and a second verifier knows its words
    ("proved", "record"): "Adding or removing one record changes the probability of any outcome of this release by a factor of at most "
    "e^3, plus 1.23456789e-05 (ε = 3, δ = 1.23456789e-05; exchanging one record: ε = 6.1; all runs on this data: ε = 8.001).",
    ("paper-nominal", "id"): "Not proved here (paper-nominal): Adding or removing one id changes the probability of any outcome of this "
    "release by a factor of at most e^3, plus 1.23456789e-05 (ε = 3, δ = 1.23456789e-05; exchanging everything of one id: ε = 6.1; all "
    "runs on this data: ε = 8.001).",
    ("attested", "id"): "Not proved here, attested by the teacher's supplier: adding or removing one id of its training data changes the "
    "probability of any outcome of its training by a factor of at most e^3, plus 1.23456789e-05 (ε = 3, δ = 1.23456789e-05). Conversion "
    "read no private data and costs nothing beyond that.",
    ("none", "id"): "NOT PRIVATE: this release carries no privacy guarantee for any record.",
}  # fmt: skip


@pytest.mark.parametrize(("basis", "unit"), SAYS)
def test_every_sentence_in_full(basis: str, unit: str) -> None:
    assert str(_guarantee(basis=basis, unit=unit)) == SAYS[basis, unit]


def test_what_is_promised_where_nothing_is_said() -> None:
    """A proof, for one record; and no later hand can change it."""
    given = _guarantee()
    assert (given.basis, given.unit) == ("proved", "record")
    with pytest.raises(FrozenInstanceError):
        given.epsilon = 0.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Guarantee(1.0, 1e-5, 2.0, 1.0)  # type: ignore[misc]


def test_a_promise_of_zero_or_of_nothing_at_all_is_one() -> None:
    for value in (0.0, 0.5, math.inf):
        promise = _guarantee(epsilon=value, epsilon_replace_one=value, epsilon_all_runs=value, delta=0.5)
        assert str(promise).count(f"ε = {shown(value)}") == 3


def test_rounding_to_other_places() -> None:
    assert [round_up(2.34561), round_up(2.34561, 2), round_up(2.34561, 0), round_up(1234.5, -2)] == [
        2.346,
        2.35,
        3,
        1300,
    ]
    assert math.isnan(round_up(math.nan))
    assert round_up(-math.inf) == -math.inf
