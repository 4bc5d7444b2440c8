"""Small files that a person names: settings and figures. Read with a limit and never from a pipe; written whole or not at all."""

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from .data.files import one_error_type, open_regular
from .data.limits import Limits
from .errors import InputError

MAX_TOML = 2**14  # bytes: the parser takes time and memory by the square of a dotted key


def read_small(path: str | os.PathLike[str], most: int) -> bytes:
    """Returns a regular file's bytes. Raises InputError: missing, empty, unreadable, a folder, pipe or device, or above `most` bytes."""
    with open_regular(Path(path), Limits(max_file_bytes=most)) as (file, _), one_error_type(path):
        return file.read(most)


def parse_toml(raw: bytes) -> dict[str, Any]:
    """Returns the TOML in `raw`. Raises ValueError with a reason."""
    if len(raw) > MAX_TOML:
        raise ValueError(f"longer than {MAX_TOML:,} bytes")
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file through a neighbour that is renamed, so that there is never half of it, and nothing is left of a failure.

    Raises:
      InputError: it cannot be written, or something other than a regular file lies there: a device must not be replaced.
    """
    target = Path(os.path.realpath(path))
    partial = target.parent / f"{target.name}.partial"
    try:
        if os.path.lexists(target) and not stat.S_ISREG(target.lstat().st_mode):
            raise InputError(path, "is no regular file, so it cannot be written", "choose another --out")
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror})", "choose another --out") from None
