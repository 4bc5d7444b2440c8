"""Opening files and folders that may be hostile: regular files only, no links inside folders, plain names.

Nothing here follows a link that a folder contains, blocks on a pipe, or reads a device. A link that the user names
directly is followed: that is the user's choice, not the data's.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dpdistill.data.limits import Limits
from dpdistill.errors import InputError

JUNK_NAMES = frozenset({"Thumbs.db", "desktop.ini"})  # what file managers leave behind; dot files are skipped too


@contextmanager
def one_error_type(path: object) -> Iterator[None]:
    """Turns whatever a decoder raises or warns into an InputError that quotes nothing from the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a decoder that warns has seen something it did not expect
            yield
    except InputError:
        raise
    except MemoryError:
        raise InputError(path, "needs more memory than there is", "split it, or shrink the images first") from None
    except PermissionError:
        raise InputError(path, "cannot be read: permission denied", "check its owner and mode") from None
    except FileNotFoundError:
        raise InputError(path, "does not exist", "check the spelling") from None
    except ImportError as error:
        raise InputError(path, f"needs a package that is not installed: {error.name}", "pip install it") from None
    except Exception as error:  # the text of a decoder's error may quote the file, so only its type is kept
        reason = f"is damaged or not what its name says ({type(error).__name__})"
        raise InputError(path, reason, "write or download it again, or name another") from None


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silences warnings while a package is imported: they are about its own code, not about the user's file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_name(path: str | Path) -> str:
    """Returns the last part of a path. Control, right-to-left and undecodable characters are refused."""
    name = os.path.basename(path)
    if not name.isprintable():
        raise InputError(path, "has invisible or undecodable characters in its name", "rename it")
    return name


@contextmanager
def open_regular(path: str | Path, limits: Limits, *, follow: bool = True) -> Iterator[tuple[IO[bytes], int]]:
    """Opens a regular file for reading and yields it with its size in bytes.

    Args:
      path: the file. With `follow=False` a symbolic link is refused, as for everything found inside a folder.

    Raises:
      InputError: missing, unreadable, empty, above `max_file_bytes`, or a folder, pipe, socket or device.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NONBLOCK", 0)  # or opening a pipe waits for its writer for ever
    with one_error_type(path):
        if not follow and os.path.islink(path):
            raise InputError(path, "is a symbolic link", "copy the file itself, for example with cp -L")
        descriptor = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(path, "is not a regular file", "folders, pipes, sockets and devices are not read here")
            if status.st_size == 0:
                raise InputError(path, "is empty", "copy or download it again")
            if status.st_size > limits.max_file_bytes:
                raise InputError(path, "is too large", limits.hint(limits.max_file_bytes))
        except BaseException:
            os.close(descriptor)
            raise
        with os.fdopen(descriptor, "rb") as file:
            yield file, status.st_size


def list_folder(path: str | Path, limits: Limits) -> list[os.DirEntry[str]]:
    """Returns the entries of a folder sorted by name, without dot files and other leftovers.

    Raises:
      InputError: too many entries, a symbolic link, or a name with invisible characters.
    """
    entries = []
    with one_error_type(path), os.scandir(path) as found:
        for entry in found:
            if entry.name.startswith(".") or entry.name in JUNK_NAMES:
                continue
            check_name(entry.path)
            if entry.is_symlink():
                hint = "links may lead out of the folder: copy it with its links resolved, for example with cp -rL"
                raise InputError(entry.path, "is a symbolic link", hint)
            entries.append(entry)
            if len(entries) > limits.max_files:
                raise InputError(path, f"holds more than {limits.max_files:,} entries", "use one Parquet or npz file")
    return sorted(entries, key=lambda entry: entry.name)


def read_exactly(file: IO[bytes], n_bytes: int, path: object) -> bytes:
    """Returns the next bytes of a header. A file that ends before is refused."""
    data = file.read(n_bytes)
    if len(data) != n_bytes:
        raise InputError(path, "is cut short", "copy or download it again")
    return data


def pieces(file: IO[bytes], n_bytes: int, path: object) -> Iterator[tuple[int, bytes]]:
    """Yields a stream's next bytes in pieces of 1 MiB, each with its position, and checks that the stream then ends."""
    done = 0
    while done < n_bytes:
        piece = file.read(min(2**20, n_bytes - done))
        if not piece:
            raise InputError(path, "is cut short", "copy or download it again")
        yield done, piece
        done += len(piece)
    if file.read(1):
        raise InputError(path, "holds more data than its header declares", "write it again")
