"""What a release promises, as a document: built from a ledger and a few claims, and rebuilt by whoever checks it.

A certificate is a pure function `build(facts, figures, contents, software)`. `verify` reads the claims back out of it,
builds it again, and any difference is a problem: no field can be added, left out or reworded. Format: docs/bundle.md.

ε epsilon, δ delta, M synthetic images, K classes.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..audit.result import Audit
from ..errors import ConfigError, ReleaseError
from ..privacy import Guarantee, accounting
from ..privacy import ledger as ledgers
from ..privacy.guarantee import Basis
from ..privacy.guarantee import shown as rounded_up
from . import claims
from .claims import Attested, Claim, decimal
from .contents import Contents
from .product import Product

FORMAT = "dpdistill-certificate-1"
IMAGES = "dataset/synthetic.safetensors"  # the table and the picture are made of it, and compared with it

ASSUMPTIONS = {
    "code": "The software named here was run as it was published, on hardware that computes what it is told to.",
    "csprng": "AES-256 in counter mode cannot be told from randomness, and the operating system's key from chance.",
    "key-erased": "The noise key was erased when this release was written, and nobody kept a copy of it.",
    "ledger-complete": "The ledger holds every private release ever made from this data; none is elsewhere or deleted.",
    "public-inputs": "Auxiliary images, class names, image size and settings were chosen without the private records.",
    "rounding": "The rounding of a record's vector does not depend on the other records (docs/known-limits.md).",
    "side-channels": "Nobody watched time, memory or power while it ran.",
}
UNIT_ASSUMPTIONS = {
    "one-record": "Each person is in one record. For a person in k records, ε is k times as large and δ grows as well.",
    "one-unit": "A person's records are under one id, or with one owner. For a person under k, ε is k times as large and δ grows as well.",
}
MODEL_ASSUMPTIONS = {
    "attested": "What the teacher's supplier says about how it was trained is true; nobody checked it here.",
    "disjoint": "Models of shards or owners share nothing private: no normalisation, hyperparameter or early stopping from pooled data.",
}
LIMITS = (  # what it does not cover
    "What is true of a whole class or of the whole data set: showing that is what the release is for.",
    "The class names, the image size, the number of synthetic images, and every setting: these are public.",
    "Anything beside the files of this release: accuracy measured on private test data is not private.",
    "Whether the input could be read at all: a file that cannot be decoded stops a run before it begins.",
    "How good, or how fair, a model is that comes of it.",
)


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """What a release says about its run, beside the images.

    Attributes:
      method, run: the method's name and the run's id in the ledger.
      delta: δ that ε is given at.
      class_names: K names.
      image_shape: (C, H, W).
      per_class: synthetic images per class.
      config_toml: the public configuration; the ledger's `run` line holds its SHA-256.
      ledger_raw: the data set's whole ledger, after the run's `final` line.
      checks: for each query name the largest relative difference that the record-wise check saw.
      auxiliary: one sentence on where the public images come from.
      insecure: the noise came from a given seed: the release says NOT PRIVATE.
      seed: of everything public.
      claim: what a release without a ledger of ours rests on; then `ledger_raw` is empty and `run` only a name.
      conversion_toml: settings of a conversion that came after the run; empty where there was none.
      figures: numbers from public or released things only, to be shown, such as how often teacher and student agree.
      audit: what attacks on it, or on a twin of it, found; None where there were none.
    """

    method: str
    run: str
    delta: float
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    per_class: int
    config_toml: str
    ledger_raw: bytes = field(repr=False)
    checks: dict[str, float]
    auxiliary: str
    insecure: bool
    seed: int
    claim: Claim | None = None
    conversion_toml: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    audit: Audit | None = None

    @property
    def basis(self) -> Basis:
        if self.insecure or isinstance(self.claim, claims.Nothing):
            return "none"
        return "attested" if self.claim else "proved"

    @property
    def unit(self) -> str:
        """Whose presence is hidden."""
        if self.claim is not None:
            return self.claim.unit if isinstance(self.claim, Attested) else "record"
        return str(ledgers.parse(self.ledger_raw)[0]["unit"])


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Every ε of a certificate, rounded up to 1e-3, as decimal strings. `spent` is all runs at the cap's own δ."""

    epsilon: str
    epsilon_replace_one: str
    epsilon_all_runs: str
    spent: str
    rdp: str


NO_FIGURES = Figures(epsilon="inf", epsilon_replace_one="inf", epsilon_all_runs="inf", spent="inf", rdp="inf")


def epsilons(lines: list[ledgers.Line], run: str, delta: float) -> dict[str, float]:
    """Computes every ε, by the names of `Figures`, from the ledger's lines and from nothing else.

    Raises:
      ReleaseError: an ε is infinite, or the two accountants contradict each other.
    """
    try:
        mine = ledgers.parts(lines, run)
        values = {
            "epsilon": ledgers.spent(lines, delta, run),
            "epsilon_replace_one": ledgers.spent(lines, delta, run, "replace_one"),
            "epsilon_all_runs": ledgers.spent(lines, delta),
            "spent": ledgers.spent(lines, cap(lines)[1]),
            "rdp": accounting.rdp_epsilon(mine, delta) if mine else 0.0,
        }
    except (ConfigError, ArithmeticError, ValueError, MemoryError) as error:
        raise ReleaseError(f"ε cannot be computed from the ledger ({error})") from None
    if not all(math.isfinite(value) for value in values.values()):
        raise ReleaseError(f"ε is not finite at delta={delta}")
    # RDP is the looser of the two: PLD above it is a fault of one of them. Below this σ a looser closed form is used.
    by_pld = all(sigma >= accounting.CLOSED_SIGMA for _, sigma, _ in accounting.group(mine))
    if by_pld and values["epsilon"] > values["rdp"] * 1.001 + 1e-3:
        raise ReleaseError(f"the accountants contradict each other: PLD {values['epsilon']}, RDP {values['rdp']}")
    return values


def figures(facts: BundleFacts) -> Figures:
    """What a new certificate shows; nothing for a release that is not private."""
    if isinstance(facts.claim, Attested):
        # Nothing is known of other runs, and group privacy for two is no figure at the same δ.
        return dataclasses.replace(NO_FIGURES, epsilon=rounded_up(facts.claim.epsilon))
    if facts.basis == "none":
        return NO_FIGURES
    values = epsilons(ledgers.parse(facts.ledger_raw), facts.run, facts.delta)
    return Figures(**{name: rounded_up(value) for name, value in values.items()})


def cap(lines: list[ledgers.Line]) -> tuple[float, float]:
    """(ε, δ) that all runs together may cost, after `lines`."""
    last = next(line for line in reversed(lines) if line["type"] in ("open", "cap"))
    return float(last["cap_epsilon"]), float(last["cap_delta"])


def software() -> dict[str, str]:
    """Versions of what made a release. Read from package metadata, so that torch is not imported."""
    versions = {"python": platform.python_version()}
    for package in ("dpdistill", "dp-accounting", "numpy", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def guarantee(facts: BundleFacts, found: Figures) -> Guarantee:
    """The promise as an object."""
    return Guarantee(
        epsilon=float(found.epsilon),
        delta=facts.delta,
        epsilon_replace_one=float(found.epsilon_replace_one),
        epsilon_all_runs=float(found.epsilon_all_runs),
        basis=facts.basis,
        unit=facts.unit,
    )


def statement(facts: BundleFacts, found: Figures) -> str:
    """The promise as a sentence: generated, never typed."""
    if isinstance(facts.claim, claims.Nothing):  # which promises nothing, wherever its noise came from
        return facts.claim.statement()
    return str(guarantee(facts, found))


def _discretisation() -> str:
    """How fine the accountant's steps are, and where it does without."""
    return (
        f"{accounting.DISCRETISATION:g}; {accounting.COARSE_DISCRETISATION:g} where ε is above "
        f"{accounting.COARSE_EPSILON:g}; closed form without sampling where a noise multiplier is below "
        f"{accounting.CLOSED_SIGMA:g}"
    )


def _mechanisms(lines: list[ledgers.Line], run: str) -> list[dict[str, Any]]:
    """The run's releases: equal ones in one entry, in a fixed order."""
    counts: Counter[str] = Counter()
    for line in lines:
        if line["type"] == "intent" and line["run"] == run:
            counts[json.dumps(line["query"], sort_keys=True)] += line["count"]
    return [{**json.loads(query), "count": count} for query, count in sorted(counts.items())]


def shape(mechanism: dict[str, Any]) -> tuple[int, int]:
    """Rows and coordinates of a release: classes × dimensions of a sum, queries × classes of votes, one vector of a sum over models."""
    if mechanism["mechanism"] == "shard_sum":
        return 1, int(mechanism["dim"])
    votes = mechanism["mechanism"] == "noisy_votes"
    rows, columns = ("queries", "classes") if votes else ("classes", "dim")
    return int(mechanism[rows]), int(mechanism[columns])


def _randomness(mechanisms: list[dict[str, Any]], insecure: bool) -> dict[str, Any]:
    coordinates = sum(math.prod(shape(m)) * m["count"] for m in mechanisms)
    distance = math.nextafter(coordinates * 2.0**-127, math.inf) if coordinates else 0.0
    return {
        "source": "a given seed, for tests: anyone can draw the same noise"
        if insecure
        else "AES-256-CTR, keyed by the operating system and bound to the sum it protects",
        "numerics": "exact",
        "coordinates": coordinates,
        "distance_to_ideal": decimal(distance),
        "note": "Gaussian noise rounded to integers; distance_to_ideal (2^-127 per coordinate) adds to delta.",
    }


def build(
    facts: BundleFacts,
    found: Figures,
    contents: Contents,
    versions: dict[str, str],
    pages: str,
    product: Product | None = None,
) -> dict[str, Any]:
    """Returns the certificate as a JSON object.

    Args:
      found: from `figures`, or read from a certificate under check.
      versions: from `software`, or read from a certificate under check.
      pages: fingerprint of the templates that wrote README.md and report.html.
      product: what is released beside the images.
    """
    basis, lines = facts.basis, [] if facts.claim else ledgers.parse(facts.ledger_raw)
    mechanisms = _mechanisms(lines, facts.run)
    kept = basis != "none"

    def shown(value: str) -> str | None:  # a release that is not private shows no ε that could be taken for a promise
        return value if kept and value != "inf" else None

    made = {} if product is None else product.describe()
    files = {IMAGES: contents.pack(), **({} if product is None else product.files())}
    if facts.conversion_toml:
        made["conversion_sha256"] = hashlib.sha256(facts.conversion_toml.encode()).hexdigest()
    return {
        "format": FORMAT,
        "release": {
            "kind": "dataset" if product is None else product.KIND,
            "method": facts.method,
            "run": facts.run,
            "class_names": list(facts.class_names),
            "image_shape": list(facts.image_shape),
            "per_class": facts.per_class,
            "images": len(contents.images),
            "parts": contents.parts,
            "gain": contents.gain,
            "soft_labels": contents.soft_labels is not None,
            "training_images": len(contents.images) * contents.parts**2,
            "seed": facts.seed,
            "config_sha256": hashlib.sha256(facts.config_toml.encode()).hexdigest(),
            "files": {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()},
            **made,
        },
        "guarantee": {
            "basis": basis,
            "epsilon": shown(found.epsilon),
            "delta": shown(decimal(facts.delta)),
            "unit": facts.unit,
            "relation": lines[0]["relation"] if lines else "add_or_remove_one",
            "epsilon_replace_one": shown(found.epsilon_replace_one),
            "epsilon_all_runs": shown(found.epsilon_all_runs),
        },
        "statement": statement(facts, found),
        "limits": list(LIMITS) if kept else [],
        "assumptions": _assumptions(facts, mechanisms) if kept else [],
        "mechanisms": mechanisms,
        "claim": facts.claim.describe() if facts.claim else None,
        "figures": {name: decimal(value) for name, value in facts.figures.items()},
        "accountant": _accountant(versions, shown(found.rdp)) if lines else None,
        "randomness": _randomness(mechanisms, facts.insecure) if lines else None,
        "checks": {name: decimal(value) for name, value in facts.checks.items()},
        "auxiliary": facts.auxiliary,
        "audit": facts.audit.describe() if facts.audit else None,
        "ledger": _book(facts, lines, shown, found.spent) if lines else None,
        "software": versions,
        "pages": pages,
    }


def _assumptions(facts: BundleFacts, mechanisms: list[dict[str, Any]]) -> list[dict[str, str]]:
    unit = "one-record" if facts.unit == "record" else "one-unit"
    texts = ASSUMPTIONS | {unit: UNIT_ASSUMPTIONS[unit]}
    if facts.claim is not None:
        texts = {key: texts[key] for key in ("code", "public-inputs")}
        texts["attested"] = MODEL_ASSUMPTIONS["attested"]
    if any(mechanism["mechanism"] in ("noisy_votes", "shard_sum") for mechanism in mechanisms):
        texts["disjoint"] = MODEL_ASSUMPTIONS["disjoint"]
    return [{"id": key, "text": text} for key, text in sorted(texts.items())]


def _accountant(versions: dict[str, str], rdp: str | None) -> dict[str, Any]:
    return {
        "name": accounting.ACCOUNTANT,
        "version": versions["dp-accounting"],
        "discretisation": _discretisation(),
        "rdp_epsilon": rdp,
    }


def _book(
    facts: BundleFacts, lines: list[ledgers.Line], shown: Callable[[str], str | None], spent: str
) -> dict[str, Any]:
    cap_epsilon, cap_delta = cap(lines)
    return {
        "data": lines[0]["data"],
        "head": lines[-1]["hash"],
        "lines": len(lines),
        "sha256": hashlib.sha256(facts.ledger_raw).hexdigest(),
        "cap_epsilon": shown(decimal(cap_epsilon)),
        "cap_delta": shown(decimal(cap_delta)),
        "spent_epsilon": shown(spent),
    }


def write(certificate: dict[str, Any]) -> bytes:
    """The one way to write a certificate: sorted keys, indented, UTF-8, no NaN."""
    return (json.dumps(certificate, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
