"""Checks a release folder as a stranger would: no private data, no key, no torch, and no trust in whoever made it.

Files → hashes → ledger → ε → certificate, rebuilt and compared → tensors, table, pictures and pages. Each file is read
once, so what was hashed is what is checked. A hash that does not hold ends the check: what is behind it is not parsed.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..audit import result as audits
from ..errors import DpdistillError, ReleaseError, printable
from ..files import parse_toml
from ..privacy import Guarantee
from ..privacy import ledger as ledgers
from ..privacy.guarantee import shown
from ..privacy.queries import RECORDWISE_TOLERANCE
from . import certificate as certificates
from . import claims, contents, png, report, table
from .certificate import BundleFacts, Figures
from .claims import ID, expect, number
from .contents import Contents, one_line
from .ledger_check import check_ledger
from .product import PRODUCTS, Product
from .reading import check_hashes, raise_all, read_certificate, read_files

UNCHECKED = (
    "that the code was run as stated, on data in which each person has one record, or one id or owner where the promise is of those",
    "that the noise key was secret and was erased",
    "that the ledger is complete: that no release was made from this data outside it, and none was deleted",
    "who made this release: hashes show that files belong together, not whose they are",
)
_AS_MADE = "give a release folder as it was made; `dpdistill verify` says more"
_AUDIT = "that the audit was made as it says; it can refute, not confirm"
_ATTESTED = "what the supplier of the teacher says about its training, and that this teacher was used"
_OTHER_PAGES = "what README.md and report.html say: another version of dpdistill wrote them; trust certificate.json"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What checking a release found.

    Attributes:
      ok: everything that can be checked holds.
      problems: one line each; empty if and only if `ok`.
      guarantee: the recomputed promise; None unless `ok`.
      unchecked: what nobody can check from a release. A ledger shows consistency, not that its writer was honest.
    """

    ok: bool
    problems: tuple[str, ...]
    guarantee: Guarantee | None
    unchecked: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A release that is what it says, whether or not it is private."""

    certificate: dict[str, Any]
    facts: BundleFacts
    contents: Contents
    product: Product | None
    files: dict[str, bytes]
    guarantee: Guarantee
    unchecked: tuple[str, ...]


def verify(path: str | os.PathLike[str]) -> Verdict:
    """Recomputes ε from a release's ledger and checks every file. Raises nothing: what is wrong is in the verdict."""
    problems: list[str] = []
    checked = None
    try:
        checked = inspect(Path(path))
        if checked.guarantee.basis == "none":
            problems.append(_no_guarantee(checked.certificate))
    except DpdistillError as error:
        problems += str(error).split("\n")
    except Exception as error:  # a hostile folder must not get past as a crash
        problems.append(f"the release cannot be checked ({type(error).__name__})")
    ok = checked is not None and not problems
    return Verdict(
        ok=ok,
        problems=tuple(one_line(problem, 2**10) for problem in problems),
        guarantee=checked.guarantee if checked and ok else None,
        unchecked=checked.unchecked if checked else UNCHECKED,
    )


@contextmanager
def naming(root: str | os.PathLike[str]) -> Iterator[None]:
    """Makes what is wrong with a release one problem that names its folder, for those who only want to use it."""
    try:
        yield
    except DpdistillError as error:
        first, *others = str(error).split("\n")
        first = first if first.startswith(f"{printable(root)}: ") else f"{root}: {first}"
        more = f" and {len(others)} more problems" if others else ""
        raise ReleaseError(one_line(f"{first}{more} ({_AS_MADE})", 2**13)) from None
    except Exception as error:  # as in `verify`: a hostile folder must not end in a crash
        raise ReleaseError(f"{root}: the release cannot be read ({type(error).__name__}; {_AS_MADE})") from None


def open_release(root: str | os.PathLike[str]) -> Checked:
    """Returns a release if it is what it says, as `inspect`. Raises ReleaseError of one line that names the folder."""
    with naming(root):
        return inspect(Path(root))


def inspect(root: Path) -> Checked:
    """Returns a release if it is what it says. Raises ReleaseError (a problem per line) or LedgerError if not."""
    files = read_files(root)
    check_hashes(files)
    certificate = read_certificate(files["certificate.json"])
    facts, claimed = _claims(certificate, files)
    lines: list[ledgers.Line] = []
    if facts.claim is None:
        lines = ledgers.parse(facts.ledger_raw)
        raise_all(check_ledger(lines, facts))
    problems = _compare_figures(claimed, lines, facts)
    problems += _check_config(files, "config.toml", facts) + _check_config(files, "conversion.toml", facts)
    held = contents.unpack(files["dataset/synthetic.safetensors"])
    made = _product(certificate, files, facts)
    rebuilt = certificates.build(facts, claimed, held, certificate["software"], certificate["pages"], made)
    problems += [f"certificate.json: {where}" for where in differences(certificate, rebuilt)]
    problems += _check_contents(held, made, facts, lines) + _check_audit(facts, claimed)
    raise_all(problems)
    problems += _check_pictures(files, held)
    unchecked: tuple[str, ...] = UNCHECKED if facts.claim is None else (_ATTESTED, *UNCHECKED[3:])
    if facts.audit is not None:
        unchecked = (*unchecked, _AUDIT)
    if certificate["pages"] == report.fingerprint():
        pages = {"README.md": report.render_card(certificate), "report.html": report.render_report(certificate, held)}
        problems += [
            f"{name}: not the page of this certificate" for name, text in pages.items() if files[name] != text.encode()
        ]
    else:
        unchecked = (*unchecked, _OTHER_PAGES)
    raise_all(problems)
    promise = certificates.guarantee(facts, claimed)
    return Checked(
        certificate=certificate,
        facts=facts,
        contents=held,
        product=made,
        files=files,
        guarantee=promise,
        unchecked=unchecked,
    )


def _product(certificate: dict[str, Any], files: dict[str, bytes], facts: BundleFacts) -> Product | None:
    """What is released beside the images, checked; None for a data set."""
    kind = certificate["release"]["kind"]
    return None if kind == "dataset" else PRODUCTS[kind].unpack(files, facts.class_names)


def _no_guarantee(certificate: dict[str, Any]) -> str:
    if certificate["claim"] is not None:
        return f"NOT PRIVATE: {certificate['statement']}"
    return "NOT PRIVATE: the noise came from a given seed, so this release carries no guarantee"


def _claims(certificate: dict[str, Any], files: dict[str, bytes]) -> tuple[BundleFacts, Figures]:
    """What the certificate claims and nobody can derive: the rest is built anew from it."""
    try:
        release, promise, book = certificate["release"], certificate["guarantee"], certificate["ledger"]
        names = tuple(expect(name, str, "a class name") for name in expect(release["class_names"], list, "class_names"))
        shape = tuple(expect(side, int, "image_shape") for side in expect(release["image_shape"], list, "image_shape"))
        claim = claims.parse(certificate["claim"])
        if not claims.belongs(claim, release["method"]):
            raise ReleaseError("certificate.json: a claim that its method cannot make")
        insecure = {"proved": False, "attested": False, "none": claim is None}[promise["basis"]]
        checks = {name: number(text, "a check") for name, text in expect(certificate["checks"], dict, "checks").items()}
        for name, text in expect(certificate["software"], dict, "software").items():
            expect(text, str, "a version", re.fullmatch(r"[\w.+!-]{1,60}", str(text)) is not None and len(name) < 60)
        expect(certificate["pages"], str, "pages", re.fullmatch(r"[0-9a-f]{16}", str(certificate["pages"])) is not None)
        if set(certificate["software"]) != set(certificates.software()):
            raise ReleaseError("certificate.json: software lists other packages")
        auxiliary = expect(certificate["auxiliary"], str, "auxiliary")
        facts = BundleFacts(
            method=expect(release["method"], str, "method", ID.fullmatch(str(release["method"])) is not None),
            run=expect(release["run"], str, "run", ID.fullmatch(str(release["run"])) is not None),
            delta=1e-5 if promise["basis"] == "none" else number(promise["delta"], "delta"),
            class_names=names,
            image_shape=shape,  # compared with the tensors below
            per_class=expect(release["per_class"], int, "per_class"),
            config_toml=files["config.toml"].decode("utf-8"),
            ledger_raw=files.get("ledger.jsonl", b""),
            checks=checks,
            auxiliary=expect(auxiliary, str, "auxiliary", one_line(auxiliary) == auxiliary),
            insecure=insecure,
            seed=expect(release["seed"], int, "seed"),
            claim=claim,
            conversion_toml=files.get("conversion.toml", b"").decode("utf-8"),
            figures={
                expect(name, str, "a figure", ID.fullmatch(name) is not None): number(text, "a figure")
                for name, text in expect(certificate["figures"], dict, "figures").items()
            },
            audit=audits.parse(certificate["audit"]),
        )
        if isinstance(claim, claims.Nothing) and facts.delta != claim.delta:
            facts = replace(facts, delta=claim.delta)
        if facts.basis != promise["basis"]:
            raise ReleaseError("certificate.json: a basis that its claim does not give")
        if insecure or claim is not None:
            return facts, certificates.figures(facts)
        claimed = {name: promise[name] for name in ("epsilon", "epsilon_replace_one", "epsilon_all_runs")}
        claimed |= {"spent": book["spent_epsilon"], "rdp": certificate["accountant"]["rdp_epsilon"]}
        for name, text in claimed.items():
            number(text, name, shown)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReleaseError(
            f"certificate.json: a field is missing or of another kind ({type(error).__name__})"
        ) from None
    if not (0 < facts.delta < 1):
        raise ReleaseError("certificate.json: delta is not in (0, 1)")
    return facts, Figures(**claimed)


def _compare_figures(claimed: Figures, lines: list[ledgers.Line], facts: BundleFacts) -> list[str]:
    """A claimed ε may not be below the recomputed one (beyond the last bits), nor idly above it."""
    if facts.insecure or facts.claim is not None:
        return []  # rebuilt from the claim, and compared with the rest
    problems = []
    for name, value in certificates.epsilons(lines, facts.run, facts.delta).items():
        claim = float(getattr(claimed, name))
        if not (value * (1 - 1e-6) - 1e-9 <= claim <= value * 1.001 + 0.002):
            problems.append(f"certificate.json: {name} is {claim:g}, the ledger gives {shown(value)}")
    return problems


def _check_config(files: dict[str, bytes], name: str, facts: BundleFacts) -> list[str]:
    """What the settings say must not contradict the certificate; a converted release has two files of them."""
    try:
        said = parse_toml(files.get(name, b""))
    except ValueError:
        return [f"{name}: not readable"]
    wanted: dict[str, Any] = {}
    if name == "conversion.toml" or not facts.conversion_toml:
        wanted |= {"per_class": facts.per_class}
    if name == "config.toml":
        wanted |= {"method": facts.method, "seed": facts.seed}
        wanted |= {"delta": facts.delta} if facts.basis == "proved" else {}
        attested = facts.claim if isinstance(facts.claim, claims.Attested) else None
        for field in ("epsilon", "delta", "unit"):
            wanted[f"attested_{field}"] = getattr(attested, field, None)
        if not isinstance(facts.claim, claims.Nothing):
            wanted |= {"nominal_epsilon": None, "nominal_delta": None}
    other = [key for key, value in wanted.items() if key in said and said[key] != value]
    return [f"{name}: says another {key} than the certificate" for key in other]


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, as dotted paths; types count, so True is not 1."""
    if type(found) is not type(wanted):
        return [f"{where} is not what the ledger and the files give"]
    if isinstance(found, dict):
        paths = [(key, f"{where}.{key}".lstrip(".")) for key in sorted(set(found) | set(wanted))]
        lost = [
            f"{path} is {'missing' if key in wanted else 'unknown'}"
            for key, path in paths
            if (key in found) != (key in wanted)
        ]
        return lost + [
            d
            for key, path in paths
            if key in found and key in wanted
            for d in differences(found[key], wanted[key], path)
        ]
    if isinstance(found, list) and len(found) == len(wanted):
        return [
            d
            for index, pair in enumerate(zip(found, wanted, strict=True))
            for d in differences(*pair, f"{where}[{index}]")
        ]
    return [] if found == wanted else [f"{where} is not what the ledger and the files give"]


def _check_contents(held: Contents, made: Product | None, facts: BundleFacts, lines: list[ledgers.Line]) -> list[str]:
    problems = []
    if held.images.shape[1:] != facts.image_shape:
        problems.append("dataset/synthetic.safetensors: images of another shape than the certificate's")
    elif made is not None and not made.fits(facts.image_shape):
        problems.append("certificate.json: its model is of images of another shape")
    if held.class_names != facts.class_names:
        problems.append("dataset/synthetic.safetensors: other class names than the certificate's")
    elif (np.bincount(held.labels, minlength=len(facts.class_names)) != facts.per_class).any():
        problems.append(f"dataset/synthetic.safetensors: not {facts.per_class} images of every class")
    asked = {line["query"]["name"] for line in lines if line["type"] == "intent" and line["run"] == facts.run}
    problems += [
        f"certificate.json: no record-wise check of query {name!r}" for name in sorted(asked - set(facts.checks))
    ]
    problems += [f"certificate.json: a check of no query, {name!r}" for name in sorted(set(facts.checks) - asked)]
    problems += [
        f"certificate.json: the record-wise check of {name!r} failed"
        for name, x in facts.checks.items()
        if x > RECORDWISE_TOLERANCE
    ]
    return problems


def _check_audit(facts: BundleFacts, claimed: Figures) -> list[str]:
    """An audit is about this very claim, and does not contradict it. Its figures are claims."""
    if facts.audit is None:
        return []
    if (
        facts.basis != "proved"
        or audits.number(facts.audit.delta) != audits.number(facts.delta)
        or audits.number(facts.audit.epsilon) != audits.number(float(claimed.epsilon))
    ):
        return ["certificate.json: the audit is of another claim"]
    return [f"certificate.json: an audit refutes the claim: {line}" for line in facts.audit.refuted]


def _check_pictures(files: dict[str, bytes], held: Contents) -> list[str]:
    problems = []
    if not png.same(files["samples.png"], png.sheet(held.shown, held.labels, len(held.class_names))):
        problems.append("samples.png: not the images of the tensors")
    try:
        table.check(files["dataset/train.parquet"], held.pixels, held.labels, held.soft_labels, held.class_names)
    except ReleaseError as error:
        problems.append(f"dataset/train.parquet: {error}")
    return problems
