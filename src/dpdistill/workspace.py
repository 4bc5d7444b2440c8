"""Checkpoints, seeds and progress of one run, in one folder: nothing in it is private."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load as load_bytes
from safetensors.torch import save as serialise
from torch import Tensor

from .mechanisms import ALONE, Ranks
from .privacy.disk import write_atomically
from .privacy.faults import point


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=console.quiet)


@contextmanager
def passing(description: str, console: Console | None = None) -> Iterator[Callable[[float], None]]:
    """Shows a bar with time left; yields a callable to be told the fraction done."""
    with _bar(console or Console(stderr=True)) as bar:
        task = bar.add_task(description, total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)


class FolderWorkspace:
    """A `methods.base.Workspace` on disk. A stopped run finds its checkpoints in the same folder.

    Args:
      folder: for checkpoints; made if missing.
      seed: the run's public seed (privacy noise never comes from it).
      device: "cpu" or "cuda".
      quiet: shows no progress.
      checks: what the door's record-wise checks found so far (`PrivateData.checks`); kept with every checkpoint and put back, since
        a run that goes on from one does not repeat the checks of the steps before it.
      ranks: the run's processes. The first reads and writes, and shows progress; the others are given what it read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int = 0,
        device: str = "cpu",
        quiet: bool = False,
        checks: dict[str, float] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.seed, self.device, self._checks, self._ranks = folder, seed, device, checks, ranks
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
        kept = ranks.lead(lambda: _read(folder / "checks.json"))
        if checks is not None and kept is not None:
            checks.update(json.loads(kept))
        self._console = Console(stderr=True, quiet=quiet or not ranks.first)

    def generator(self, *labels: object) -> torch.Generator:
        digest = hashlib.sha256(repr((self.seed, *labels)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def track(self, steps: Sequence[int], description: str) -> Iterator[int]:
        if not steps:  # no bar of nothing
            return
        with _bar(self._console) as bar:
            yield from bar.track(steps, description=description)

    def passing(self, description: str) -> AbstractContextManager[Callable[[float], None]]:
        return passing(description, self._console)

    def load(self, name: str) -> dict[str, Tensor] | None:
        raw = self._ranks.lead(lambda: _read(self.folder / f"{name}.safetensors"))
        return None if raw is None else load_bytes(raw)

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        if not self._ranks.first:
            return
        if self._checks:  # first: there must be no checkpoint without its checks
            write_atomically(self.folder / "checks.json", json.dumps(self._checks).encode())
        # As bytes, not by `save_file`: what that raises on a full disk is no OSError.
        content = serialise({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
        write_atomically(self.folder / f"{name}.safetensors", content)
        point("workspace: checkpoint in place")


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
