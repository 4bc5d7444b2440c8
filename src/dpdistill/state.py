"""The folder beside a release while its run lasts: whose it is, so that a stopped run goes on with its own bytes, and how it ends.

It holds the noise key, so it is refused to every other run, and erased when the release is written.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .config import RunConfig
from .config_files import config_hash
from .errors import ConfigError, InputError
from .files import MAX_TOML, read_small
from .home import Contents, keyed_hash
from .mechanisms import Vault
from .privacy.disk import sync_directory, write_atomically
from .privacy.faults import point


def state_of(config: RunConfig) -> Path:
    """The folder of the run that makes `config.out`."""
    return Path(f"{Path(config.out)}.state")  # of the path, not of the text: "dir/" would have it inside the release


def identity(toml: str, contents: Contents, key: bytes) -> bytes:
    """What tells a run from others: its configuration, and a keyed hash of what is private. It stays with who runs it."""
    facts = {"config": config_hash(toml), "key": key.hex(), "records": keyed_hash(key, contents())}
    return json.dumps(facts).encode()


def is_of(path: Path, toml: str, contents: Contents) -> bool:
    """Whether the run whose identity lies there has this configuration and these records."""
    try:
        found = read_small(path, MAX_TOML)
        key = bytes.fromhex(json.loads(found)["key"])
    except (InputError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return found == identity(toml, contents, key)


def check_target(out: Path) -> None:
    """Refuses a place where no folder can be made, as far as that can be told without making one."""
    place = Path(f"{out}.state").absolute()
    try:
        while not os.path.lexists(place):
            with suppress(FileNotFoundError, NotADirectoryError):
                place.lstat()  # raises where its name is too long, and then it is not merely missing
            place = place.parent
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise ConfigError(f"{out}: {place} is no folder that may be written; choose another --out")


def check_same_run(state: Path, toml: str, contents: Contents = tuple) -> None:
    """Refuses to go on in a state folder that a run with another configuration, or of other records, began. Writes nothing.

    Args:
      contents: of what is private; nothing where no record is read.
    """
    path = state / "run.json"
    if os.path.lexists(path) and not is_of(path, toml, contents):
        raise ConfigError(
            f"{state} belongs to a run with other settings or other data; finish that one with the options that it had, choose "
            "another --out, or remove the folder"
        )


def begin(state: Path, toml: str, contents: Contents = tuple) -> None:
    """Makes the state folder and says whose it is, if it is new."""
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (state / "run.json").exists():
            write_atomically(state / "run.json", identity(toml, contents, secrets.token_bytes(32)))
    except OSError as error:
        raise ConfigError(f"{state}: cannot be written ({error.strerror}); choose another --out") from error


@contextmanager
def locked(state: Path) -> Iterator[None]:
    """Holds a folder that `begin` made, for a run without a ledger to hold. Raises ConfigError where the same command is at work in it."""
    with open(state / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{state}: the same command is at work here already; wait for it, or choose another --out"
            ) from None
        yield


def holds(path: Path, toml: str) -> bool:
    """Whether a file holds this configuration."""
    try:
        return read_small(path, MAX_TOML) == toml.encode()
    except InputError:
        return False


def forget_rest(state: Path, toml: str, contents: Contents = tuple) -> None:
    """After a crash between a release and `forget`: what that left. Another run's state is not touched."""
    if state.exists():
        check_same_run(state, toml, contents)
        forget(state, Vault(state / "vault", run="", key=b"", insecure=False))  # can erase, and nothing else


def forget(state: Path, vault: Vault) -> None:
    """Destroys the noise key, then everything else that the run kept beside the release."""
    sync_directory(state.absolute().parent)  # the release first: a crash may have come between its renaming and this
    point("state: before the key is erased")
    vault.erase()
    for path in sorted(state.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    state.rmdir()
    point("state: removed")
