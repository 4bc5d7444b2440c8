"""Where ledgers live, and the note of which records a finished release is of: `~/.dpdistill`, or $DPDISTILL_HOME.

Both go by keyed hashes of what is private: their names and contents tell nothing about it to whoever lacks the key that lies beside them.
"""

import fcntl
import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np

from .data import LabelledImages, chunks
from .errors import LedgerError
from .privacy.disk import sync_directories, write_atomically

Contents = Callable[[], Iterable[bytes | memoryview]]  # everything private that a run reads


def home() -> Path:
    """Where ledgers live when no other place is given."""
    return Path(os.environ.get("DPDISTILL_HOME") or "~/.dpdistill").expanduser()


def default_ledger(records: LabelledImages) -> Path:
    """The ledger of these very images, wherever their file lies, in whatever order and with whatever labels they are read: named by a keyed
    hash, so that the name tells nothing about them. Holds 32 bytes an image."""
    images = records.images
    digests = bytearray()
    for part in chunks(images):
        for image in part:
            digests += hashlib.sha256(np.ascontiguousarray(image).data).digest()
    in_order = np.sort(np.frombuffer(digests, "S32"))
    found = ledger_of([repr((images.shape[1:], str(images.dtype))).encode(), in_order.tobytes()])
    _take_over(records, found)
    return found


def _take_over(records: LabelledImages, name: Path) -> None:
    """Gives the ledger of these records its name of now, if it has that of before: what was spent stays spent.

    Raises:
      LedgerError: both names have one, as where the same images were read with other labels before.
    """
    facts = repr((records.images.shape, str(records.images.dtype))).encode()
    images = (np.ascontiguousarray(part).data for part in chunks(records.images))
    before = ledger_of(chain([facts], images, [np.ascontiguousarray(records.labels).data]))
    if not os.path.lexists(before):
        return
    with suppress(FileNotFoundError):  # another process was first
        try:
            os.link(before, name)  # a renaming would put it in the place of one that another process has begun
            sync_directories(name.parent)
        except FileExistsError:
            if not before.samefile(name):  # else a crash came between
                raise LedgerError(
                    f"these images have two ledgers, {before} and {name}: what a person loses is the sum of both. Name one with --ledger, "
                    "or move the first away, and no run counts what the other has spent"
                ) from None
        before.unlink()
        sync_directories(name.parent)


def ledger_of(contents: Iterable[bytes | memoryview]) -> Path:
    """The ledger that goes by these contents."""
    folder = home()
    try:
        key = _home_key(folder)
    except OSError as error:
        raise LedgerError(f"{folder}: no place for ledgers ({error.strerror}); name one with --ledger") from error
    return folder / "ledgers" / f"{keyed_hash(key, contents)[:32]}.jsonl"


def keyed_hash(key: bytes, contents: Iterable[bytes | memoryview]) -> str:
    """HMAC-SHA-256 of contents, in hex: it tells nothing about them to whoever lacks the key."""
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def contents_of(records: LabelledImages) -> Iterator[bytes | memoryview]:
    """Everything that a run reads of its records, in their order."""
    images, labels, ids = records.images, records.labels, records.ids
    facts = (
        images.shape,
        str(images.dtype),
        records.value_range,
        records.class_names,
        None if ids is None else ids.dtype.str,
    )
    yield repr(facts).encode()
    for part in chunks(images):
        yield np.ascontiguousarray(part).data
    yield labels.tobytes()
    yield b"" if ids is None else ids.tobytes()


def releases() -> Path:
    """The folder that says of which records a finished release is, made where it is missing: the release itself must not tell."""
    place = home() / "releases"
    try:
        for folder in (place.parent, place):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sync_directories(place)
    except OSError as error:
        raise LedgerError(
            f"{place}: no place to note whose data a release is of ({error.strerror}); set DPDISTILL_HOME to another, or try again"
        ) from error
    return place


def check_home() -> None:
    """Raises LedgerError where `releases` could not be made, as far as that can be told without making it."""
    place = home() / "releases"
    while not os.path.lexists(place):
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise LedgerError(
            f"{place}: no place to note whose data a release is of; set DPDISTILL_HOME to another, or try again"
        )


def _home_key(folder: Path) -> bytes:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path, descriptor = folder / "key", os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # two first runs at once: with two keys, one data set had two ledgers
        if not path.exists():
            write_atomically(path, secrets.token_bytes(32))
        return path.read_bytes()
    finally:
        os.close(descriptor)
