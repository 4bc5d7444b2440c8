"""What a release without a ledger of ours rests on: a supplier's word, or nothing; and how to read claims from a certificate.

ε epsilon, δ delta, σ sigma.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ReleaseError
from ..privacy import accounting
from ..privacy.guarantee import shown as rounded_up

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LARGE_MU = 12


@dataclass(frozen=True, kw_only=True)
class Attested:
    """A teacher's guarantee by the word of whoever supplied it: repeated, never proved. There is no ledger behind it.

    Attributes:
      teacher: SHA-256 of the teacher's file, or a name for a Python callable.
    """

    KIND: ClassVar[str] = "attested"

    epsilon: float
    delta: float
    unit: str
    teacher: str

    def describe(self) -> dict[str, Any]:
        """In a form that reads back."""
        facts = {"epsilon": decimal(self.epsilon), "delta": decimal(self.delta), "unit": self.unit}
        return {"kind": self.KIND, **facts, "teacher": self.teacher}


@dataclass(frozen=True, kw_only=True)
class Nominal:
    """The paper's way with one opaque teacher: what its ε covers (one answer), and what one record costs at worst.

    Attributes:
      steps, batch, sigma: answers of `batch` queries in each of `steps` steps; each row, of norm at most 1, with noise of sigma / batch,
        as the published code adds it. 0 is no noise.
    """

    KIND: ClassVar[str] = "nominal"

    steps: int
    batch: int
    sigma: float
    delta: float
    teacher: str

    @property
    def epsilon_nominal(self) -> float:
        """ε by the paper's count: T sums of rows with noise σ, of which one row moves by 2."""
        return gaussian(2 * math.sqrt(self.steps), self.sigma, self.delta)

    @property
    def epsilon_query(self) -> float:
        """ε about the teacher's answer to one query: its row moves by 2, under the noise that the row has."""
        return gaussian(2 * self.batch, self.sigma, self.delta)

    @property
    def epsilon_worst(self) -> float:
        """ε about a training record, which can turn every row of every step."""
        return gaussian(2 * math.sqrt(self.steps * self.batch) * self.batch, self.sigma, self.delta)

    def statement(self) -> str:
        return (
            "NO differential-privacy guarantee for the teacher's training records: one of them can change every answer (worst case of this "
            f"run: ε = {rounded_up(self.epsilon_worst)}). Noise limits what the answer to one query tells (ε = "
            f"{rounded_up(self.epsilon_query)}; by the paper's count {rounded_up(self.epsilon_nominal)}; δ = {self.delta!r})."
        )

    def describe(self) -> dict[str, Any]:
        """In a form that reads back."""
        return {
            "kind": self.KIND,
            "steps": self.steps,
            "batch": self.batch,
            "sigma": decimal(self.sigma),
            "delta": decimal(self.delta),
            "teacher": self.teacher,
            "nominal_epsilon": rounded_up(self.epsilon_nominal),
            "query_level_epsilon": rounded_up(self.epsilon_query),
            "worst_case_record_epsilon": rounded_up(self.epsilon_worst),
        }


@dataclass(frozen=True, kw_only=True)
class NominalDiffusion:
    """DP-SAD as published: what its ε counts, and what one record costs by that count once noise and teacher are seen as they are.

    No figure is an upper bound for the release: the student's inputs are private, and no σ hides them (docs/privacy/dp-sad-paper.md).

    Attributes:
      steps, batch, rate: S updates of B sampled records, each record with probability `rate`.
      dilution: T, by which the paper divides its noise.
      sigma: the paper's σ; 0 is no noise.
    """

    KIND: ClassVar[str] = "nominal-diffusion"

    steps: int
    batch: int
    rate: float
    dilution: int
    sigma: float
    delta: float

    @property
    def epsilon_nominal(self) -> float:
        """ε by the paper's count: S Poisson-sampled Gaussians of noise multiplier σ."""
        return accounting.epsilon([(self.rate, self.sigma, self.steps)], self.delta) if self.sigma else math.inf

    @property
    def epsilon_diluted(self) -> float:
        """ε with the noise that is really added, σ/T, for a record that is drawn its expected number of times."""
        return gaussian(math.sqrt(self.rate * self.steps) * self.dilution, self.sigma, self.delta)

    @property
    def epsilon_contaminated(self) -> float:
        """The same, where the teacher has seen the record: then all B rows may move by 2C in every update."""
        return gaussian(2 * math.sqrt(self.batch * self.steps) * self.dilution, self.sigma, self.delta)

    def statement(self) -> str:
        return (
            "NO differential-privacy guarantee for any record: the teacher was trained on all of them without protection, and the "
            f"student saw noisy private images. By the paper's own count ε = {rounded_up(self.epsilon_nominal)}; with the noise that was "
            f"really added {rounded_up(self.epsilon_diluted)}; counting what the teacher has seen {rounded_up(self.epsilon_contaminated)} "
            f"(δ = {self.delta!r}); and no number is an upper bound."
        )

    def describe(self) -> dict[str, Any]:
        """In a form that reads back."""
        return {
            "kind": self.KIND,
            "steps": self.steps,
            "batch": self.batch,
            "rate": decimal(self.rate),
            "dilution": self.dilution,
            "sigma": decimal(self.sigma),
            "delta": decimal(self.delta),
            "nominal_epsilon": rounded_up(self.epsilon_nominal),
            "diluted_epsilon": rounded_up(self.epsilon_diluted),
            "contaminated_epsilon": rounded_up(self.epsilon_contaminated),
        }


Nothing = (Nominal, NominalDiffusion)  # claims that promise nothing
Claim = Attested | Nominal | NominalDiffusion
OF_METHOD: dict[str, type[Claim]] = {"conversion": Attested, "opaque": Nominal, "paper": NominalDiffusion}


def belongs(claim: Claim | None, method: str) -> bool:
    """Whether a release by this method can make this claim: the papers' own ways promise nothing, the others have a ledger."""
    return type(claim) is OF_METHOD.get(method, type(None))


def gaussian(moves: float, sigma: float, delta: float) -> float:
    """ε of a Gaussian of standard deviation σ whose mean moves so far: exact, or the Rényi bound where that is out of reach."""
    if not sigma:
        return math.inf
    mu = moves / sigma
    if mu > _LARGE_MU:
        return mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    return accounting.gaussian_epsilon(1 / mu, delta)


def decimal(value: float) -> str:
    """The shortest text that reads back as the same float."""
    return repr(float(value))


def expect(value: Any, kind: type, what: str, ok: bool = True) -> Any:
    """`value` if it is of the very type (True is no int) and `ok`. Raises ReleaseError."""
    if type(value) is not kind or not ok:
        raise ReleaseError(f"certificate.json: {what} is not what it has to be")
    return value


def number(text: Any, what: str, write: Callable[[float], str] = decimal) -> float:
    """A number written as `write` writes it, finite and not negative. Raises ReleaseError."""
    value = float(expect(text, str, what)) if re.fullmatch(r"[0-9.e+-]{1,30}", str(text)) else -1.0
    if not (0 <= value < float("inf")) or write(value) != text:
        raise ReleaseError(f"certificate.json: {what} is not a number of ours")
    return value


def parse(value: Any) -> Claim | None:
    """The claim of a release without a ledger. Raises ReleaseError or KeyError on one that is not ours."""
    if value is None:
        return None
    kind = expect(value, dict, "claim")["kind"]
    delta = number(value["delta"], "delta")
    if not (0 < delta < 1):
        raise ReleaseError("certificate.json: delta is not in (0, 1)")

    def whole(name: str) -> int:
        return int(expect(value[name], int, name, 1 <= value[name] <= 2**40))

    if kind == NominalDiffusion.KIND:
        rate = number(value["rate"], "rate")
        if not (0 < rate <= 1):
            raise ReleaseError("certificate.json: rate is not in (0, 1]")
        facts = {name: whole(name) for name in ("steps", "batch", "dilution")}
        return NominalDiffusion(**facts, rate=rate, sigma=_sigma(value), delta=delta)
    teacher = expect(value["teacher"], str, "teacher", ID.fullmatch(str(value["teacher"])) is not None)
    if kind == Attested.KIND:
        unit = expect(value["unit"], str, "unit", value["unit"].isascii() and value["unit"].isalpha())
        return Attested(epsilon=number(value["epsilon"], "epsilon"), delta=delta, unit=unit, teacher=teacher)
    if kind != Nominal.KIND:
        raise ReleaseError("certificate.json: a claim of no known kind")
    return Nominal(steps=whole("steps"), batch=whole("batch"), sigma=_sigma(value), delta=delta, teacher=teacher)


def _sigma(value: dict[str, Any]) -> float:
    sigma = number(value["sigma"], "sigma")
    if 0 < sigma < 1e-6:
        raise ReleaseError("certificate.json: sigma is none")
    return sigma
