"""The paper's way with an opaque teacher, by itself: its update, what it learns, numbers of either width, a stopped run that goes on."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from behind_the_door import Stop, Stopping
from dpdistill.data import load_images
from dpdistill.evaluation import accuracy
from dpdistill.mechanisms import Vault
from dpdistill.methods.base import Public, Student
from dpdistill.methods.model import opaque
from dpdistill.models import precision
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


def test_narrow_numbers_change_the_student_a_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "is_fast", lambda kind: True)  # slow or not
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


def test_the_update_is_a_normalised_step_against_the_gradient_in_output_space(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    outputs, answers = (torch.randn(40, 3, generator=g) for _ in range(2))
    leaf = outputs.clone().requires_grad_()
    F.kl_div(leaf.log_softmax(dim=1), answers.log_softmax(dim=1), reduction="sum", log_target=True).backward()
    assert leaf.grad is not None
    config = opaque.Config(gamma=0.5, stability=1e-3)
    vault = Vault.open(tmp_path, insecure_seed=1)
    moved = opaque.pseudo_labels(outputs, answers, config, 0.0, vault, "quiet") - outputs
    wanted = -0.5 * leaf.grad / (leaf.grad.norm(dim=1, keepdim=True) + 1e-3)
    assert torch.allclose(moved, wanted, atol=1e-5)
    assert float(moved.norm(dim=1).max()) <= 0.5
    assert float((moved * leaf.grad).sum(dim=1).max()) < 0  # against it
    assert float(moved.norm(dim=1).min()) > 0.4  # the length says nothing of how far the answers are apart


def test_the_noise_of_a_row_is_sigma_over_the_batch(tmp_path: Path) -> None:
    outputs, answers = torch.zeros(500, 10), torch.zeros(500, 10)  # no gradient: what moves is noise
    config, vault = opaque.Config(gamma=2.0), Vault.open(tmp_path, insecure_seed=1)
    first = opaque.pseudo_labels(outputs, answers, config, 50.0, vault, "step-0")
    assert float(first.std()) == pytest.approx(2.0 * 50 / 500, rel=0.06)  # five standard errors
    assert abs(float(first.mean())) < 5 * 0.2 / 5000**0.5
    assert not torch.equal(first, opaque.pseudo_labels(outputs, answers, config, 50.0, vault, "step-1"))


def test_without_noise_a_teacher_of_digits_is_learnt(tmp_path: Path) -> None:
    train, test = load_images("digits:train"), load_images("digits:test")
    x = torch.from_numpy(train.to_unit()).flatten(1)
    targets = F.one_hot(torch.from_numpy(train.labels), 10).float() - 0.1
    weight = torch.linalg.solve(x.T @ x + torch.eye(64), x.T @ targets)

    def teacher(images: torch.Tensor) -> torch.Tensor:
        return 10 * images.flatten(1) @ weight

    public = Public(image_shape=SHAPE, class_names=test.class_names, auxiliary=torch.zeros(0, *SHAPE))
    config = opaque.Config(width=16, depth=2, steps=120, batch=128, pool=1024, noise=False, bf16=False)
    vault, space = Vault.open(tmp_path / "vault", insecure_seed=1), FolderWorkspace(tmp_path / "w", quiet=True)
    student = opaque.run(config, public, teacher, 0.0, vault, space).model
    found = teacher(torch.from_numpy(test.to_unit())).argmax(dim=1).numpy() == test.labels
    right = accuracy(student, test.images, test.labels, value_range=test.value_range)
    assert float(found.mean()) > 0.85
    assert right > 0.7, right
