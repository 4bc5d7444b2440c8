"""The paper's way with an opaque teacher, by itself: numbers of either width, and a stopped run that goes on."""

from pathlib import Path

import pytest
import torch

from behind_the_door import Stop, Stopping
from dpdistill.mechanisms import Vault
from dpdistill.methods.base import Public, Student
from dpdistill.methods.model import opaque
from dpdistill.workspace import FolderWorkspace

SHAPE = (1, 8, 8)
PUBLIC = Public(image_shape=SHAPE, class_names=("a", "b", "c"), auxiliary=torch.zeros(0, *SHAPE))
TEACHER = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


def run(folder: Path, bf16: bool, workspace: FolderWorkspace | None = None) -> Student:
    config = opaque.Config(
        width=4, groups=2, depth=1, steps=4, batch=8, pool=32, latent=4, generator_width=4, per_class=1, bf16=bf16,
        checkpoint_steps=2,
    )  # fmt: skip
    vault = Vault.open(folder / "vault", insecure_seed=1)
    space = workspace or FolderWorkspace(folder / "w", quiet=True)
    return opaque.run(config, PUBLIC, lambda x: x.flatten(1) @ TEACHER, 0.5, vault, space)


def test_narrow_numbers_change_the_student_a_little(tmp_path: Path) -> None:
    found = [run(tmp_path / str(bf16), bf16).model.head.weight.detach() for bf16 in (False, True)]
    assert all(weight.dtype == torch.float32 and torch.isfinite(weight).all() for weight in found)
    assert 0 < float((found[0] - found[1]).norm() / found[0].norm()) < 0.1


@pytest.mark.parametrize("n", [1, 3])
def test_resume_gives_the_same_bytes(tmp_path: Path, n: int) -> None:
    whole = run(tmp_path / "whole", bf16=True)
    with pytest.raises(Stop):
        run(tmp_path / "cut", True, Stopping(tmp_path / "cut" / "w", n))
    resumed = run(tmp_path / "cut", bf16=True)
    assert torch.equal(resumed.model.head.weight, whole.model.head.weight)
    assert torch.equal(resumed.images.images, whole.images.images)
