"""The promise of a release, as facts and as one sentence.

ε epsilon, δ delta. The sentence is generated from the fields and never typed by hand, so the two cannot differ.
"""

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Literal, get_args

Basis = Literal["proved", "attested", "paper-nominal", "none"]


def round_up(value: float, digits: int = 3) -> float:
    """Returns `value` rounded up (an ε that is printed must never be smaller than the one that was proved)."""
    if not math.isfinite(value):
        return value
    exact = Decimal(repr(float(value)))  # the shortest decimal that reads back as `value`: 0.3 stays 0.3
    return float(exact.quantize(Decimal(f"1e{-digits}"), rounding=ROUND_CEILING))


def shown(value: float) -> str:
    """Writes an ε, rounded up to three decimals, in full: `:g` would round 12345.641 down."""
    return f"{round_up(value):.3f}".rstrip("0").rstrip(".")


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """An (ε, δ) and what it covers.

    Attributes:
      epsilon, delta: of this run, under adding or removing one `unit`.
      epsilon_replace_one: the same run when one unit is exchanged for another.
      epsilon_all_runs: everything the data set's ledger holds, this run included.
      basis: "proved" (a proof page covers every private read), "none" (test noise: not private).
      unit: whose presence is hidden.
    """

    epsilon: float
    delta: float
    epsilon_replace_one: float
    epsilon_all_runs: float
    basis: Basis = "proved"
    unit: str = "record"

    def __post_init__(self) -> None:
        if not (0 < self.delta < 1):
            raise ValueError(f"Expected {self.delta=} in (0, 1).")
        for value in (self.epsilon, self.epsilon_replace_one, self.epsilon_all_runs):
            if not (value >= 0):  # also refuses NaN
                raise ValueError(
                    f"Expected every epsilon to be at least 0, got {self.epsilon=}, replace_one, all_runs with {value}."
                )
        if self.basis not in get_args(Basis):
            raise ValueError(f"Expected {self.basis=} to be one of {get_args(Basis)}.")

    def __str__(self) -> str:
        if self.basis == "none":
            return "NOT PRIVATE: this release carries no privacy guarantee for any record."
        if self.basis == "attested":
            return (
                f"Not proved here, attested by the teacher's supplier: adding or removing one {self.unit} of its training data changes the "
                f"probability of any outcome of its training by a factor of at most e^{shown(self.epsilon)}, plus {self.delta!r} "
                f"(ε = {shown(self.epsilon)}, δ = {self.delta!r}). Conversion read no private data and costs nothing beyond that."
            )
        claim = "" if self.basis == "proved" else f"Not proved here ({self.basis}): "
        # Who is protected by an id keeps it when all under it is exchanged; another id would be another unit more.
        exchanged = "exchanging one record" if self.unit == "record" else f"exchanging everything of one {self.unit}"
        return (
            f"{claim}Adding or removing one {self.unit} changes the probability of any outcome of this release by a factor of at most "
            f"e^{shown(self.epsilon)}, plus {self.delta!r} (ε = {shown(self.epsilon)}, δ = {self.delta!r}; {exchanged}: "
            f"ε = {shown(self.epsilon_replace_one)}; all runs on this data: ε = {shown(self.epsilon_all_runs)})."
        )
