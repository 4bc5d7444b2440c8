"""NDPDC, end to end behind the door on made-up colour images of 12x12."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpdistill.data.images import LabelledImages
from dpdistill.errors import ConfigError
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods import ndpdc
from dpdistill.methods.base import Public
from dpdistill.privacy import Ledger
from dpdistill.privacy import ledger as ledgers
from dpdistill.workspace import FolderWorkspace

CONFIG = ndpdc.Config(per_class=2, steps=7, sampling_prob=0.5, group_size=10, width=8, checkpoint_steps=2)


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


@pytest.fixture
def records() -> LabelledImages:
    """Three classes: one large, one small, one with no records."""
    rng = np.random.default_rng(0)
    labels = np.array([0] * 40 + [1] * 15, np.int64)
    images = rng.integers(0, 90, (55, 3, 12, 12), dtype=np.uint8)
    images[labels == 0, :, : 12 // 2] += 150
    images[labels == 1, :, 12 // 2 :] += 150
    return LabelledImages(images=images, labels=labels, class_names=("top", "bottom", "none"), source="made up")


@pytest.fixture
def public() -> Public:
    auxiliary = torch.rand(40, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Public(image_shape=(3, 12, 12), class_names=("top", "bottom", "none"), auxiliary=auxiliary)


def go(folder: Path, records: LabelledImages, public: Public, config, workspace=None, sigma: float = 1.0):
    """Runs behind the door; returns the result and the ledger's parts, which must be the planned ones."""
    plan = ndpdc.plan(config, public, sigma)
    with Ledger.open(folder / "l.jsonl", cap=(1e7, 1e-5), data="toy") as ledger:
        private = PrivateData(records, ledger, Vault.open(folder / "v", insecure_seed=1), micro_batch=64)
        result = ndpdc.run(config, public, private, plan, workspace or FolderWorkspace(folder / "w", quiet=True))
        parts = ledgers.parts(ledger.lines)
    assert parts == [planned.part for planned in plan]
    assert max(private.checks.values()) < 1e-4
    return result, parts


@pytest.mark.parametrize("changes", [{}, {"parts": 2}, {"class_steps": True}, {"per_class": 1}], ids=str)
def test_end_to_end(tmp_path: Path, records: LabelledImages, public: Public, changes: dict) -> None:
    config = replace(CONFIG, **changes)
    before = torch.random.get_rng_state()
    result, parts = go(tmp_path, records, public, config)
    assert result.images.shape == (3 * config.per_class, 3, 12, 12)
    assert result.images.abs().max() <= 1
    assert result.labels.tolist() == [k for k in range(3) for _ in range(config.per_class)]
    assert result.parts == config.parts
    assert parts == [(0.5, 1.0, 7)]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("n", [1, 5])
def test_resume_gives_the_same_bytes(tmp_path: Path, records: LabelledImages, public: Public, n: int) -> None:
    whole, _ = go(tmp_path / "whole", records, public, CONFIG)
    with pytest.raises(Stop):
        go(tmp_path / "cut", records, public, CONFIG, Stopping(tmp_path / "cut" / "w", n))
    resumed, _ = go(tmp_path / "cut", records, public, CONFIG)
    assert torch.equal(resumed.images, whole.images)


def test_classes_are_told_apart_with_little_noise(tmp_path: Path, records: LabelledImages, public: Public) -> None:
    config = replace(CONFIG, steps=60, sampling_prob=1.0, augment="none", group_size=40, depth=2)
    result, _ = go(tmp_path, records, public, config, sigma=0.01)
    top = result.images[:2].mean(dim=(0, 1))
    assert top[:6].mean() - top[6:].mean() > 0.1


def test_rate_is_public() -> None:
    assert replace(CONFIG, sampling_prob=None, expected_records_per_class=40).rate == 0.25
    assert replace(CONFIG, sampling_prob=None, expected_records_per_class=4).rate == 1
    for wrong in ({"sampling_prob": None}, {"expected_records_per_class": 40}):
        with pytest.raises(ConfigError, match="expected_records_per_class"):
            _ = replace(CONFIG, **wrong).rate
    with pytest.raises(ConfigError, match="momentum"):
        replace(CONFIG, momentum=1.0)
