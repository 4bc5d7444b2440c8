"""What a run keeps to itself until it is done: its noise key, and the noisy sums already released.

A folder readable by the owner only, beside the release and never in it. It makes a resumed run give the same bytes: noise is a
function of the key *and of the exact sum it is added to*, so the same sum gets the same noise again, and any other sum gets noise
independent of it. `erase` destroys the key when the release is written.
"""

import hashlib
import io
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import LedgerError
from ..privacy.disk import overwrite, sync_directories, sync_directory, write_atomically
from ..privacy.faults import point
from .noise import Stream, derive


class Vault:
    """The private state of one run, in one folder.

    Attributes:
      run: public random name of the run.
      insecure: noise comes from a given seed, for tests; the release then says NOT PRIVATE.
    """

    def __init__(self, folder: Path, run: str, key: bytes, insecure: bool) -> None:
        self.folder, self.run, self._key, self.insecure = folder, run, key, insecure

    @classmethod
    def open(cls, folder: Path, *, insecure_seed: int | None = None) -> "Vault":
        """Opens the vault in `folder`, or makes it with a fresh key from the operating system."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if insecure_seed is not None:
            key = derive(b"insecure", str(insecure_seed))
            return cls(folder, "insecure-" + key.hex()[:16], key, True)
        path = folder / "key"
        overwrite(folder / "key.erased")  # a crash may have stopped `erase`
        if not path.exists():
            sync_directories(folder)  # first: a key that is there must outlive a power cut, and so must its folder
            write_atomically(path, secrets.token_bytes(32))
        sync_directory(folder)  # each time: a crash may have come between the renaming of a file and this
        key = path.read_bytes()
        if len(key) != 32 or key == bytes(32):  # all zero: overwritten, so known to everyone
            raise LedgerError(
                f"{path}: not a key; remove the folder to begin a new run (what was charged stays charged)"
            )
        return cls(folder, _name(key), key, False)

    @staticmethod
    def run_of(folder: Path) -> str | None:
        """The name of the run whose key lies in `folder`, if there is one. Changes nothing."""
        path = folder / "key"
        return _name(path.read_bytes()) if path.exists() else None

    @classmethod
    def elsewhere(cls) -> "Vault":
        """A stand-in where another process of the run holds the vault: it has no key, so it can draw neither noise nor coins."""
        return cls(Path(os.devnull), "", b"", False)

    def sampling_stream(self, release: str) -> Stream:
        """The stream that decides which records are in a release's Poisson sample."""
        return Stream(derive(self._key, "sample", self.run, release))

    def noise_stream(self, release: str, query: bytes, total: NDArray[np.int64]) -> Stream:
        """The stream of a release's noise: bound to its query and to the very sum that it protects."""
        return Stream(derive(self._key, "noise", self.run, release, query, hashlib.sha256(total.tobytes()).digest()))

    def binds(self, release: str, total: NDArray[np.int64]) -> bool:
        """Commits to the sum that a release will protect; False if another sum was committed under this name before."""
        path = self.folder / f"{release}.commitment"
        commitment = derive(self._key, "commit", self.run, release, hashlib.sha256(total.tobytes()).digest())
        if path.exists():
            return secrets.compare_digest(path.read_bytes(), commitment)
        write_atomically(path, commitment)
        return True

    def load(self, release: str) -> NDArray[np.int64] | None:
        """A noisy sum released before, in grid steps, or None."""
        path = self.folder / f"{release}.npy"
        return np.load(path, allow_pickle=False) if path.exists() else None

    def save(self, release: str, noisy: NDArray[np.int64]) -> None:
        """Keeps a noisy sum for a resumed run. It is already private: only its loss would cost anything."""
        content = io.BytesIO()
        np.save(content, noisy, allow_pickle=False)
        write_atomically(self.folder / f"{release}.npy", content.getvalue())

    def erase(self) -> None:
        """Overwrites the key and removes the folder."""
        key, erased = self.folder / "key", self.folder / "key.erased"
        if key.exists():
            os.replace(key, erased)  # first the name: a crash must never leave an overwritten, known key to be used
            sync_directory(self.folder)
            point("vault: key set aside")
        overwrite(erased)
        point("vault: key overwritten")
        self._key = b""  # and this handle can draw no more noise: `Stream` and `derive` want a key
        shutil.rmtree(self.folder, ignore_errors=True)


def _name(key: bytes) -> str:
    return "run-" + derive(key, "name").hex()[:16]
