"""Runs a method behind the door on made-up data: shared by the tests of the baselines."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dpdistill.data.images import LabelledImages
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods.base import Public
from dpdistill.privacy import Ledger
from dpdistill.privacy import ledger as ledgers
from dpdistill.workspace import FolderWorkspace

NAMES = ("top", "bottom", "none")


class Stop(Exception):
    pass


class Stopping(FolderWorkspace):
    """Stops after n steps."""

    def __init__(self, folder: Path, n: int) -> None:
        super().__init__(folder, quiet=True)
        self.n = n

    def track(self, steps: Sequence[int], description: str) -> Iterator[int]:
        for done, step in enumerate(steps):
            if done == self.n:
                raise Stop
            yield step


def made_up_records(channels: int, side: int) -> LabelledImages:
    """Three classes: one large, one small, one with no records."""
    rng = np.random.default_rng(0)
    labels = np.array([0] * 40 + [1] * 15, np.int64)
    images = rng.integers(0, 90, (55, channels, side, side), dtype=np.uint8)
    images[labels == 0, :, : side // 2] += 150
    images[labels == 1, :, side // 2 :] += 150
    return LabelledImages(images=images, labels=labels, class_names=NAMES, source="made up")


def made_up_public(channels: int, side: int) -> Public:
    auxiliary = torch.rand(40, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Public(image_shape=(channels, side, side), class_names=NAMES, auxiliary=auxiliary)


def run_method(
    method: ModuleType,
    folder: Path,
    records: LabelledImages,
    public: Public,
    config: Any,
    workspace: FolderWorkspace | None = None,
    sigma: float = 1.0,
) -> tuple[Any, list[Any]]:
    """Runs behind the door; returns the result and the ledger's parts, which must be the planned ones."""
    plan = method.plan(config, public, sigma)
    with Ledger.open(folder / "l.jsonl", cap=(1e7, 1e-5), data="toy") as ledger:
        private = PrivateData(records, ledger, Vault.open(folder / "v", insecure_seed=1), micro_batch=64)
        result = method.run(config, public, private, plan, workspace or FolderWorkspace(folder / "w", quiet=True))
        parts = ledgers.parts(ledger.lines)
    assert parts == [planned.part for planned in plan]
    assert max(private.checks.values()) < 1e-4
    return result, parts
