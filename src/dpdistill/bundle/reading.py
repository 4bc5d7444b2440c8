"""The files of a release, read as a stranger's: only those that belong, only as many bytes as they may have, and as their checksums say."""

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ReleaseError, printable
from ..files import MAX_TOML
from ..privacy import ledger as ledgers
from . import certificate as certificates
from .claims import ID, expect
from .contents import one_line
from .product import PRODUCTS
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
MORE: dict[str, int] = {  # where a release was converted from another, and what the products have
    "conversion.toml": MAX_TOML,
    **{name: size for kind in PRODUCTS.values() for name, size in kind.SIZES.items()},
}


def raise_all(problems: list[str]) -> None:
    """Raises ReleaseError of a line for each problem, if there are any."""
    if problems:
        raise ReleaseError("\n".join(one_line(problem) for problem in problems[:20]))


def read_files(root: Path) -> dict[str, bytes]:
    """Returns every file of a release. Raises ReleaseError on one too many, too few or too large, a link, a device."""
    sizes = SIZES | MORE
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
    raise_all(_foreign(found - set(sizes)))
    if "certificate.json" not in found:
        raise ReleaseError("certificate.json: missing")
    wanted = _files_of(read_file(root, "certificate.json"))
    found |= {folder for folder in set(folders) - _folders(wanted) if os.path.lexists(root / folder)}
    problems = _foreign(found - wanted)
    problems += [f"{name}: missing" for name in sorted(wanted - found)]
    raise_all(problems)
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
        pass  # `read_certificate` says what is wrong
    return wanted


def read_file(root: Path, name: str) -> bytes:
    """Returns one file of a release. Raises ReleaseError on a link, a device, or more bytes than it may have."""
    limit = (SIZES | MORE)[name]
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
        run = read_certificate(read_file(root, "certificate.json"))["release"]["run"]
    except (KeyError, TypeError):
        raise ReleaseError("certificate.json: names no run") from None
    return str(expect(run, str, "run", ID.fullmatch(str(run)) is not None))


def checksums(files: dict[str, bytes]) -> bytes:
    """The one way to write SHA256SUMS: every other file, in order, as `sha256sum -c` reads it."""
    hashes = {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items() if name != "SHA256SUMS"}
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()


def check_hashes(files: dict[str, bytes]) -> None:
    """Raises ReleaseError unless SHA256SUMS is what `checksums` says of the other files."""
    wanted, found = checksums(files).splitlines(), files["SHA256SUMS"].splitlines()
    if checksums(files) != files["SHA256SUMS"]:
        changed = [line.split(b"  ")[1].decode() for line in wanted if line not in found]
        raise_all(
            [f"{name}: its hash is not the one in SHA256SUMS" for name in changed]
            or ["SHA256SUMS: lines that are not ours"]
        )


def read_certificate(raw: bytes) -> dict[str, Any]:
    """Returns a certificate of our format, in its one canonical form; whether it is true is not checked. Raises ReleaseError."""
    try:
        certificate = parse_json(raw)
        if not isinstance(certificate, dict) or certificate.get("format") != certificates.FORMAT:
            raise ReleaseError(f"certificate.json: not of format {certificates.FORMAT}")
        if certificates.write(certificate) != raw:
            raise ReleaseError("certificate.json: not in its canonical form")
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"certificate.json: not readable ({error})") from None
    return certificate
