"""Checks a release folder as a stranger would: no private data, no key, no torch, and no trust in whoever made it.

Files → hashes → ledger → ε → certificate, rebuilt and compared → tensors, table, pictures and pages. Each file is read
once, so what was hashed is what is checked. A hash that does not hold ends the check: what is behind it is not parsed.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..audit import result as audits
from ..errors import DpdistillError, ReleaseError, printable
from ..files import MAX_TOML, parse_toml
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
from .tensors import MAX_ARRAYS, parse_json

SIZES = {  # the only files of a data set's release, and the most bytes each may have; a `Product` has more
    "SHA256SUMS": 2**16,
    "certificate.json": 2**22,
    "config.toml": MAX_TOML,
    "ledger.jsonl": ledgers.MAX_BYTES,
    "README.md": 2**22,
    "report.html": 2**27,
    "samples.png": 2**27,
    "dataset/synthetic.safetensors": MAX_ARRAYS,
    "dataset/train.parquet": MAX_ARRAYS,
}
MAX_RELEASE = 2**29  # bytes of all files together: they are held in memory while they are compared
UNCHECKED = (
    "that the code was run as stated, on data in which each person has one record, or one id or owner where the promise is of those",
    "that the noise key was secret and was erased",
    "that the ledger is complete: that no release was made from this data outside it, and none was deleted",
    "who made this release: hashes show that files belong together, not whose they are",
)
_MORE: dict[str, int] = {"conversion.toml": MAX_TOML}  # where a release was converted from another
for _kind in PRODUCTS.values():
    _MORE |= _kind.SIZES
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
        problems=tuple(one_line(problem) for problem in problems),
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
    _check_hashes(files)
    certificate = _read_certificate(files["certificate.json"])
    facts, claimed = _claims(certificate, files)
    lines: list[ledgers.Line] = []
    if facts.claim is None:
        lines = ledgers.parse(facts.ledger_raw)
        _raise(check_ledger(lines, facts))
    problems = _compare_figures(claimed, lines, facts)
    problems += _check_config(files, "config.toml", facts) + _check_config(files, "conversion.toml", facts)
    held = contents.unpack(files["dataset/synthetic.safetensors"])
    made = _product(certificate, files, facts)
    rebuilt = certificates.build(facts, claimed, held, certificate["software"], certificate["pages"], made)
    problems += [f"certificate.json: {where}" for where in differences(certificate, rebuilt)]
    problems += _check_contents(held, facts, lines) + _check_audit(facts, claimed)
    _raise(problems)
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
    _raise(problems)
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


def _raise(problems: list[str]) -> None:
    if problems:
        raise ReleaseError("\n".join(one_line(problem) for problem in problems[:20]))


def read_files(root: Path) -> dict[str, bytes]:
    """Returns every file of a release. Raises ReleaseError on one too many, too few or too large, a link, a device."""
    sizes = SIZES | _MORE
    folders = sorted(_folders(sizes))  # an outer one comes before those within it
    found: set[str] = set()
    try:
        for folder in ("", *folders):
            if folder and not _is_folder(root, folder):
                continue
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}".lstrip("/")
                    if name in folders and entry.is_dir(follow_symlinks=False):
                        continue
                    found.add(name)
                    if len(found) > 100:
                        raise ReleaseError(
                            f"{printable(root)} holds over 100 files; a release has at most {len(sizes)}"
                        )
    except OSError as error:
        left = os.path.isdir(aside(root)) and not os.path.lexists(root)
        hint = "; a stopped audit left it as .before beside: `dpdistill audit` again puts it back" if left else ""
        raise ReleaseError(f"{printable(root)}: not a release folder ({error.strerror}){hint}") from None
    _raise(_foreign(found - set(sizes)))
    if "certificate.json" not in found:
        raise ReleaseError("certificate.json: missing")
    wanted = _files_of(read_file(root, "certificate.json"))
    found |= {folder for folder in set(folders) - _folders(wanted) if os.path.lexists(root / folder)}
    problems = _foreign(found - wanted)
    problems += [f"{name}: missing" for name in sorted(wanted - found)]
    _raise(problems)
    if sum((root / name).lstat().st_size for name in wanted) > MAX_RELEASE:
        raise ReleaseError(f"{printable(root)}: more than {MAX_RELEASE:,} bytes, so not a release of ours")
    return {name: read_file(root, name) for name in sorted(wanted)}


def _foreign(names: Iterable[str]) -> list[str]:
    return [f"{name}: not a file of a release; take it out" for name in sorted(names)]


def aside(root: Path) -> Path:
    """Where a release lies for the moment in which an audited one takes its place."""
    return Path(f"{os.path.abspath(root)}.before")


def _folders(names: Iterable[str]) -> set[str]:
    """All folders that these files lie in, at any depth."""
    return {str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}


def _is_folder(root: Path, folder: str) -> bool:
    """Whether a folder of a release is one, and no link at any depth."""
    places = [root / part for part in (*reversed(PurePosixPath(folder).parents), folder) if str(part) != "."]
    return all(place.is_dir() and not place.is_symlink() for place in places)


def _files_of(raw: bytes) -> set[str]:
    """The names of the files that a certificate's kind of release has; those of a data set if it cannot be read."""
    wanted = set(SIZES)
    try:
        certificate = parse_json(raw)
        if certificate["release"]["kind"] in PRODUCTS:
            wanted |= set(PRODUCTS[certificate["release"]["kind"]].SIZES)
        if "conversion_sha256" in certificate["release"]:
            wanted.add("conversion.toml")
        if certificate["claim"] is not None:
            wanted.discard("ledger.jsonl")
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # `_read_certificate` says what is wrong
    return wanted


def read_file(root: Path, name: str) -> bytes:
    """Returns one file of a release. Raises ReleaseError on a link, a device, or more bytes than it may have."""
    limit = (SIZES | _MORE)[name]
    try:
        # No link is followed, and a pipe does not block.
        with open(os.open(root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ReleaseError(f"{name}: not a plain file")
            if status.st_size > limit:  # before reading: a sparse file is as large as it likes
                raise ReleaseError(f"{name}: larger than {limit} bytes")
            raw = file.read(limit + 1)
    except OSError as error:
        raise ReleaseError(f"{name}: not a readable plain file ({error.strerror})") from None
    if len(raw) > limit:
        raise ReleaseError(f"{name}: larger than {limit} bytes")
    return raw


def run_of(root: Path) -> str:
    """The run that a release says it is of; whether that is true is not checked. Raises ReleaseError where it says none."""
    try:
        run = _read_certificate(read_file(root, "certificate.json"))["release"]["run"]
    except (KeyError, TypeError):
        raise ReleaseError("certificate.json: names no run") from None
    return str(expect(run, str, "run", ID.fullmatch(str(run)) is not None))


def checksums(files: dict[str, bytes]) -> bytes:
    """The one way to write SHA256SUMS: every other file, in order, as `sha256sum -c` reads it."""
    hashes = {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items() if name != "SHA256SUMS"}
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()


def _check_hashes(files: dict[str, bytes]) -> None:
    wanted, found = checksums(files).splitlines(), files["SHA256SUMS"].splitlines()
    if checksums(files) != files["SHA256SUMS"]:
        changed = [line.split(b"  ")[1].decode() for line in wanted if line not in found]
        _raise(
            [f"{name}: its hash is not the one in SHA256SUMS" for name in changed]
            or ["SHA256SUMS: lines that are not ours"]
        )


def _read_certificate(raw: bytes) -> dict[str, Any]:
    try:
        certificate = parse_json(raw)
        if not isinstance(certificate, dict) or certificate.get("format") != certificates.FORMAT:
            raise ReleaseError(f"certificate.json: not of format {certificates.FORMAT}")
        if certificates.write(certificate) != raw:
            raise ReleaseError("certificate.json: not in its canonical form")
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"certificate.json: not readable ({error})") from None
    return certificate


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


def _check_contents(held: Contents, facts: BundleFacts, lines: list[ledgers.Line]) -> list[str]:
    problems = []
    if held.images.shape[1:] != facts.image_shape:
        problems.append("dataset/synthetic.safetensors: images of another shape than the certificate's")
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
