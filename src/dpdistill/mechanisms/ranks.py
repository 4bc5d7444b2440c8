r"""Several processes in one run, in lock-step: every process runs the same method, and only the passes over the records are divided.

The first process alone holds the ledger and the noise key, and it alone gets the exact sum of all parts. What it charged, drew or
released, the others are told. Sums are of integers, so W processes give the bytes that one gives. How to run it: docs/scale.md.

Every exchange begins with one word of each process: whether it failed, and what step it is at. So an error of one is an error of all, and
processes that went different ways stop. Nothing is pickled: numbers, JSON and arrays are sent as bytes.

W processes.
"""

import atexit
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from .. import errors
from ..errors import DpdistillError, RanksError

T = TypeVar("T")
LOST = "another process of this run ended; the same command, with any number of processes, goes on from here"


class Ranks:
    """The processes of a run. This class is the usual case: one process, nobody to wait for.

    Attributes:
      rank: number of this process. 0 is the first, which holds the ledger, the key and the files.
      world: W.
    """

    rank, world = 0, 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, starts: range) -> range:
        """Returns this process's share of the steps of a pass: each W-th. Every step belongs to one process."""
        return starts[self.rank :: self.world]

    def lead(self, work: Callable[[], T]) -> T:
        """Calls `work` on the first process alone, and returns there and everywhere what it gave: None, JSON, bytes or an array."""
        return work()

    def total(self, part: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the sum of all parts on the first process, and elsewhere an empty array: an exact sum is in one place only."""
        return part

    def agree(self, what: Callable[[], bytes]) -> None:
        """Raises RanksError unless `what` gives the same on all processes; one process by itself does not ask."""


ALONE = Ranks()


class Distributed(Ranks):
    """Processes that torch.distributed connects: by NCCL where they compute on GPUs, by gloo elsewhere.

    Args:
      device: "cpu" or "cuda": where tensors have to lie to be sent.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._device, self._steps = device, itertools.count()
        self.over = False  # the end, or an error, was told to all: there is nothing more to exchange
        self.lost = False  # a process is gone

    def lead(self, work: Callable[[], T]) -> T:
        if not self.first:
            told: T = _unpack(self._send(bytes(self._meet("lead")), 0))
            return told
        value = work()
        raw = _pack(value)
        self._meet("lead", n_bytes=len(raw))
        self._send(raw, 0)
        return value

    def total(self, part: NDArray[np.int64]) -> NDArray[np.int64]:
        self._meet(f"total {part.dtype} {part.shape}")
        with self._connected():
            tensor = torch.tensor(part, device=self._device)
            dist.reduce(tensor, 0)  # int64: exact in any order
        return tensor.cpu().numpy() if self.first else part[:0]

    def agree(self, what: Callable[[], bytes]) -> None:
        self._meet(hashlib.sha256(what()).hexdigest())

    def end(self) -> None:
        """Waits until all are done, or one says that it failed."""
        self._meet("end")
        self.over = True

    def tell(self, error: Exception) -> None:
        """Makes an error of this process one of all, at the next step that they take."""
        with suppress(DpdistillError):  # it comes back as what all raise; or there is nobody to tell any more
            self._meet("failed", error=error)

    def _meet(self, step: str, n_bytes: int = 0, error: Exception | None = None) -> int:
        """Exchanges a word: raises what another process failed with, and unless all are at one step. Returns the first's `n_bytes`."""
        if self.over or self.lost:
            raise RanksError(LOST)
        failure = b"" if error is None else _describe(error, self.rank)
        at = hashlib.sha256(f"{next(self._steps)} {step}".encode()).digest()[:8]
        word = torch.tensor([len(failure), n_bytes, int.from_bytes(at, signed=True)], device=self._device)
        with self._connected():
            gathered = [torch.empty_like(word) for _ in range(self.world)]
            dist.all_gather(gathered, word)
            words = torch.stack(gathered).tolist()
        for rank, (n_failure, _, _) in enumerate(words):
            if n_failure:
                told = self._send(failure if rank == self.rank else bytes(n_failure), rank)
                self.over = True
                raise _restore(told)
        if len({at for _, _, at in words}) != 1:
            self.over = True
            raise RanksError(
                "the processes of this run went different ways or computed different numbers; nothing was released. Give all of them "
                "the same command, files, software and kind of machine"
            )
        return int(words[0][1])

    def _send(self, mine: bytes, source: int) -> bytes:
        """Returns the bytes that process `source` has, at least one; the others give as many of any."""
        with self._connected():
            tensor = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self._device)
            dist.broadcast(tensor, source)
        return tensor.cpu().numpy().tobytes()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch.distributed raises when a connection breaks
            self.lost = True
            raise RanksError(LOST) from error


def _pack(value: object) -> bytes:
    if isinstance(value, np.ndarray):
        content = io.BytesIO()
        np.save(content, value, allow_pickle=False)
        return b"array" + content.getvalue()
    return b"bytes" + value if isinstance(value, bytes) else b"other" + json.dumps(value).encode()


def _unpack(raw: bytes) -> Any:
    kind, content = raw[:5], raw[5:]
    if kind == b"array":
        return np.load(io.BytesIO(content), allow_pickle=False)
    return content if kind == b"bytes" else json.loads(content)


def _describe(error: Exception, rank: int) -> bytes:
    """An error in words. Of one that is not ours only the kind is told: its text might hold a number that is private."""
    if isinstance(error, DpdistillError):
        facts = [type(error).__name__, str(error)]
    elif isinstance(error, OSError):
        facts = ["DpdistillError", f"{error.filename or 'input or output'}: {error.strerror or type(error).__name__}"]
    else:
        facts = ["RanksError", f"process {rank} of this run failed ({type(error).__name__})"]
    return json.dumps(facts).encode()


def _restore(raw: bytes) -> DpdistillError:
    kind, text = json.loads(raw)
    found = getattr(errors, kind, DpdistillError)
    plain = isinstance(found, type) and issubclass(found, DpdistillError) and found.__init__ is DpdistillError.__init__
    return found(text) if plain else DpdistillError(text)


_joined: Ranks | None = None
_connected = False  # once at least


@contextmanager
def joined(device: str = "cpu") -> Iterator[Ranks]:
    """Yields the processes of this run, as torchrun started them: what one of them raises inside, all raise, and they end together.

    Without torchrun it is one process. Inside another `joined` it is that one.
    """
    global _joined
    if _joined is not None:
        yield _joined
        return
    _joined = ranks = _join(device)
    try:
        yield ranks
        if isinstance(ranks, Distributed):
            ranks.end()
    except Exception as error:
        if isinstance(ranks, Distributed):
            ranks.tell(error)
        raise
    except BaseException:  # stopped by a person, perhaps in an exchange: the others see the connection close
        _leave(in_peace=False)
        raise
    finally:
        _joined = None
        if isinstance(ranks, Distributed) and ranks.lost:
            _leave(in_peace=False)


def _join(device: str) -> Ranks:
    global _connected
    given = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if not given or int(os.environ["WORLD_SIZE"]) < 2:
        return ALONE
    if not dist.is_initialized():
        _connected = True
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # A long wait is no error: the others wait while the first draws noise or writes the release. torchrun ends what hangs.
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
        atexit.register(_leave)
    return Distributed(device)


def end_process(code: int) -> None:
    """Ends this process, with all that it had to say said, if it was one of several; does nothing if it was alone.

    The interpreter is not taken down: torch.distributed's threads may call into it while it goes, and then a finished run ends as a
    failed one (SIGABRT, about once in ten runs).
    """
    if _connected:
        _leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _leave(in_peace: bool = True) -> None:
    """Waits for the others, so that the first has said what it has to say before torchrun sees an end, and disconnects."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            if in_peace:
                dist.barrier()
            dist.destroy_process_group()
