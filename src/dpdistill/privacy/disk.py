"""Writing so that it outlives a power cut. What a power cut may take is in docs/ledger.md."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .faults import point


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from within names `path`: a failed write or fsync by itself names no file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def sync_directory(path: Path) -> None:
    """Makes names in `path` survive a power cut (a file's own fsync does not cover its directory entry)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directories(path: Path) -> None:
    """`sync_directory` for a folder and for those above it in its file system: a new folder is a name in another, which may be new too."""
    path = path.resolve()
    sync_directory(path)
    while not os.path.ismount(path):
        path = path.parent
        with suppress(PermissionError):  # not ours to read, so not made by us
            sync_directory(path)


def write_atomically(path: Path, content: bytes) -> None:
    """Puts `content` at `path` wholly or not at all, also across a power cut."""
    partial = path.with_name(path.name + ".partial")
    with naming(path):
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        point("file: written beside, not yet renamed")
        os.replace(partial, path)
        sync_directory(path.parent)
    point("file: in place")


def overwrite(path: Path) -> None:
    """Puts zeros over a key, where there is one."""
    if path.exists():
        with naming(path), open(path, "r+b") as file:
            file.write(bytes(32))
            file.flush()
            os.fsync(file.fileno())
