"""What an audit found, as plain facts that go into a certificate and come back out of it, word for word. No torch.

ε epsilon, δ delta. Numbers are kept with four significant digits: they are estimates, and shown as they are kept.
"""

import dataclasses
import re
import types
import typing
from dataclasses import dataclass
from typing import Any

SAYS = "An audit can refute, not confirm."
BINS = 24  # of the histograms of canary scores
_TEXT = re.compile(r"[A-Za-z0-9 ,.:;()'/%=+_-]{0,300}")
_NUMBER = re.compile(r"-?[0-9.e+-]{1,24}")
_MOST = 100  # entries of a list


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kind of private release, drawn many times on its worst pair of data sets, at a noise that is exactly worth `epsilon`.

    Attributes:
      mechanism: its name in the ledger, or "rank_one_sum".
      draws: in each of the two worlds.
      lower: what they prove of ε.
      spread: standard deviation of the noise over the stated one.
      tail: draws beyond four standard deviations, over the expected number.
      repeats: pairs of equal draws over the expected number; 0 where too few are expected to say anything.
      faults: which of these contradict the claim.
    """

    mechanism: str
    sampling_prob: float
    epsilon: float
    draws: int
    lower: float
    spread: float
    tail: float
    repeats: float
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OneRun:
    """One run with canaries, each in by a coin, scored by the noisy sums alone.

    Attributes:
      canaries, releases: how many; canaries that were in.
      steinke, fdp: lower bounds on ε, by Steinke et al. (2023) and by Mahloujifar et al. (2024).
      expected_steinke, expected_fdp: 5 % and 95 % quantiles for the best attack on a correct implementation.
      most_steinke, most_fdp: what so many canaries prove if every guess is right.
      scores_in, scores_out: histograms of the scores over equal steps from `score_low` to `score_high`.
      null_trials, null_alarms: how often coins drawn anew, which no release has seen, gave a bound above 0 (at most 5 % are due).
      broken_steinke, broken_fdp: the same run with a tenth of its noise: the alarm that has to ring. Below 0: not run.
    """

    canaries: int
    included: int
    releases: int
    steinke: float
    fdp: float
    expected_steinke: tuple[float, ...]
    expected_fdp: tuple[float, ...]
    most_steinke: float
    most_fdp: float
    score_low: float
    score_high: float
    scores_in: tuple[int, ...]
    scores_out: tuple[int, ...]
    null_trials: int
    null_alarms: int
    broken_steinke: float = -1.0
    broken_fdp: float = -1.0

    def alarm_rings(self, epsilon: float) -> bool:
        """Whether the run with a tenth of its noise was refuted."""
        return max(self.broken_steinke, self.broken_fdp) > epsilon


@dataclass(frozen=True, kw_only=True)
class TwoWorlds:
    """The whole run, many times, on a tiny worst-case set with and without one record.

    Attributes:
      seen: what the attack looked at: "noisy sums" or "released images".
      runs: in each world, on which the bound rests; as many again chose the attack and its threshold.
      lower_gdp, lower: lower bounds on ε, for a claim that is a Gaussian's whole trade-off curve and for any (ε, δ) claim.
    """

    seen: str
    runs: int
    lower_gdp: float
    lower: float


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Who was in, guessed from the released things alone.

    Attributes:
      who: "records" or "canaries".
      attack: what the guess is made from.
      auc: area under the ROC curve, and its 95 % interval; 0.5 is a coin.
      power: share of members found at 1 % false alarms, and its 95 % interval.
      power_allowed: the most that (ε, δ) allows there.
    """

    who: str
    attack: str
    members: int
    others: int
    auc: tuple[float, ...]
    power: tuple[float, ...]
    power_allowed: float


@dataclass(frozen=True, kw_only=True)
class Audit:
    """All that was tried on one release, or on a twin of it: the same code and settings on public data.

    Attributes:
      epsilon, delta: the claim.
      confidence: of the bounds from runs; the kernel's have 99.9 %.
      twin: what data the twin run was made on; empty where there was none.
      blind: why there is no one-run audit; empty where there is one.
    """

    epsilon: float
    delta: float
    confidence: float
    twin: str
    blind: str
    kernel: tuple[Kernel, ...] = ()
    one_run: OneRun | None = None
    two_worlds: tuple[TwoWorlds, ...] = ()
    membership: tuple[Membership, ...] = ()

    @property
    def lower_bounds(self) -> list[tuple[str, float, float]]:
        """Every lower bound beside the ε that it is to be compared with: (what, bound, claim)."""
        found = [(f"kernel {k.mechanism}", k.lower, k.epsilon) for k in self.kernel]
        if self.one_run is not None:
            found += [
                ("one run, Steinke", self.one_run.steinke, self.epsilon),
                ("one run, f-DP", self.one_run.fdp, self.epsilon),
            ]
        for pair in self.two_worlds:
            found += [(f"two worlds, {pair.seen}", max(pair.lower, pair.lower_gdp), self.epsilon)]
        return found

    @property
    def refuted(self) -> list[str]:
        """What contradicts the claim, a line each."""
        lines = [
            f"{what}: ε is at least {number(bound)}, and {number(claim)} is claimed"
            for what, bound, claim in self.lower_bounds
            if not (bound <= claim)
        ]
        lines += [
            f"kernel {k.mechanism}: the {fault} of the noise is not what it has to be"
            for k in self.kernel
            for fault in k.faults
        ]
        # Three times the nominal rate is out of reach of chance at 200 trials.
        if self.one_run is not None and self.one_run.null_alarms > 0.15 * self.one_run.null_trials:
            lines.append("one run: the audit itself raises alarms on coins that nothing has seen")
        return lines

    def describe(self) -> dict[str, Any]:
        """As it stands in a certificate: numbers as decimal strings, counts as whole numbers."""
        return {"says": SAYS, **typing.cast(dict[str, Any], _plain(self))}


def number(value: float) -> str:
    """Four significant digits, in the shortest form that reads back."""
    return repr(float(f"{value:.4g}"))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return number(value) if isinstance(value, float) else value


def parse(value: Any) -> Audit | None:
    """Reads what `describe` wrote. Raises ValueError, KeyError or TypeError on anything else, also on one other byte of it."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("says") != SAYS:
        raise ValueError("not an audit of ours")
    found: Audit = _read(Audit, {key: item for key, item in value.items() if key != "says"})
    if found.describe() != value:
        raise ValueError("an audit in another form than ours")
    return found


def _read(kind: Any, value: Any) -> Any:
    """`value` as the annotated type, strictly."""
    if isinstance(kind, types.UnionType):
        return None if value is None else _read(typing.get_args(kind)[0], value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            raise ValueError("fields that are not those of an audit")
        return typing.cast(Any, kind)(**{name: _read(hint, value[name]) for name, hint in hints.items()})
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or len(value) > _MOST:
            raise ValueError("not a list of an audit")
        return tuple(_read(typing.get_args(kind)[0], item) for item in value)
    if kind is float:
        if not (isinstance(value, str) and _NUMBER.fullmatch(value)):
            raise ValueError("not a number of an audit")
        return float(value)
    if (
        type(value) is not kind
        or (kind is str and not _TEXT.fullmatch(value))
        or (kind is int and not 0 <= value < 2**53)
    ):
        raise ValueError("not a value of an audit")
    return value
