"""The promise of a release, as facts and as one sentence.

ε epsilon, δ delta. The sentence is generated from the fields and never typed by hand, so the two cannot differ.
"""

import math
from dataclasses import dataclass
from typing import Literal

Basis = Literal["proved", "attested", "paper-nominal", "none"]


def round_up(value: float, digits: int = 3) -> float:
    """Returns `value` rounded up (an ε that is printed must never be smaller than the one that was proved)."""
    if not math.isfinite(value):
        return value
    scale = 10**digits
    return math.ceil(value * scale - 1e-9) / scale


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
        if not (self.epsilon >= 0):  # also refuses NaN
            raise ValueError(f"Expected {self.epsilon=} to be at least 0.")

    def __str__(self) -> str:
        if self.basis == "none":
            return "NOT PRIVATE: this release carries no privacy guarantee for any record."
        return (
            f"Adding or removing one {self.unit} changes the probability of any outcome of this release by a factor of at most "
            f"e^{round_up(self.epsilon):g}, plus {self.delta:g} (ε = {round_up(self.epsilon):g}, δ = {self.delta:g}; exchanging one "
            f"{self.unit}: ε = {round_up(self.epsilon_replace_one):g}; all runs on this data: ε = {round_up(self.epsilon_all_runs):g})."
        )
