"""The baseline of shard teachers: what is planned is what is charged, no record in a query, and a student that learns without noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpdistill.data.images import LabelledImages
from dpdistill.errors import ConfigError
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods import Public
from dpdistill.methods.diffusion import shard_teachers
from dpdistill.privacy import Ledger, accounting
from dpdistill.privacy import ledger as ledgers
from dpdistill.workspace import FolderWorkspace

SHAPE, NAMES = (1, 8, 8), ("top", "left")
PUBLIC = Public(image_shape=SHAPE, class_names=NAMES, auxiliary=torch.zeros(1, *SHAPE))
TINY = {"models": 3, "teacher_steps": 15, "fit_steps": 30, "width": 16, "depth": 1, "queries": 14, "per_class": 6}
TINY |= {
    "seed_images": 40,
    "student_width": 8,
    "student_steps": 2,
    "student_batch": 8,
    "critic_width": 4,
    "pool": 8,
    "answer_steps": 2,
}


def config(**change: Any) -> shard_teachers.Config:
    return shard_teachers.Config(**TINY | change)


def records(n: int = 60) -> LabelledImages:
    """Images that are bright at the top, or at the left; one id for every three."""
    images = np.full((n, *SHAPE), 20, np.uint8)
    labels = np.arange(n) % 2
    images[labels == 0, :, :4] = 230
    images[labels == 1, :, :, :4] = 230
    return LabelledImages(images=images, labels=labels, class_names=NAMES, source="made up", ids=np.arange(n) // 3)


def run(settings: shard_teachers.Config, sigma: float, folder: Path, data: LabelledImages) -> tuple[Any, Any, Any]:
    with Ledger.open(folder / "ledger", cap=(1e9, 1e-5), data="toy", unit="id") as ledger:
        vault = Vault.open(folder / "vault")
        private = PrivateData(data, ledger, vault)
        plan = shard_teachers.plan(settings, PUBLIC, sigma)
        workspace = FolderWorkspace(folder / "work", quiet=True)
        made = shard_teachers.run(settings, PUBLIC, private, plan, workspace).images
        return made, plan, ledgers.parts(ledger.lines, vault.run)


def test_what_is_planned_is_what_is_charged_and_a_resumed_run_gives_the_same_images(tmp_path: Path) -> None:
    made, plan, charged = run(config(), 1.0, tmp_path, records())
    assert charged == [planned.part for planned in plan]
    assert accounting.epsilon(charged, 1e-5) == pytest.approx(accounting.gaussian_epsilon(1.0, 1e-5), rel=1e-3)
    assert made.images.shape == (12, *SHAPE)
    assert made.labels.bincount().tolist() == [6, 6]
    assert torch.isfinite(made.images).all()
    again, _, same = run(config(), 1.0, tmp_path, records())
    assert torch.equal(again.images, made.images)
    assert same == charged


def test_with_hardly_any_noise_the_classes_are_learnt(tmp_path: Path) -> None:
    settings = config(
        clip=1.0, queries=40, fit_steps=250, teacher_steps=100, student_steps=300, student_batch=32, pool=64
    )
    made, _, _ = run(settings, 0.002, tmp_path, records())
    top, left = made.images[:, 0, :4, 4:].mean(dim=(1, 2)), made.images[:, 0, 4:, :4].mean(dim=(1, 2))
    assert ((top > left) == (made.labels == 0)).double().mean() > 0.9


def test_with_much_noise_and_no_records_it_still_ends(tmp_path: Path) -> None:
    made, _, charged = run(config(rounds=1), 30.0, tmp_path, records(0))
    assert torch.isfinite(made.images).all()
    assert charged == [(1.0, 30.0, 1)]


@pytest.mark.parametrize("change", [{"models": 0}, {"clip": 0.0}, {"sigma_min": 20.0}, {"queries": 0}], ids=str)
def test_bad_settings_are_refused(change: Any) -> None:
    with pytest.raises(ConfigError):
        config(**change)
