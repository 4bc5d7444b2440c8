"""The data-free conversion: a student agrees with its teacher, and a stopped run goes on to the same weights.

B images, K classes.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpdistill.data import load_images
from dpdistill.errors import ConfigError
from dpdistill.methods.base import Public
from dpdistill.methods.model.conversion import Conversion, Converted, convert, distance
from dpdistill.methods.model.prior import Prior, vary
from dpdistill.models.convnet import HalfSize
from dpdistill.models.muon import orthogonal
from dpdistill.models.student_generator import StudentGenerator
from dpdistill.workspace import FolderWorkspace

SHAPE = (1, 8, 8)
PUBLIC = Public(image_shape=SHAPE, class_names=tuple("0123456789"), auxiliary=torch.zeros(0, *SHAPE))
SMALL = Conversion(
    width=8,
    groups=2,
    steps=6,
    batch=8,
    pool=32,
    latent=4,
    generator_width=4,
    generator_every=2,
    past_every=2,
    bf16=False,
)


class Stopped(Exception):
    """The run was stopped."""


class Interrupted(FolderWorkspace):
    """Stops after the first checkpoint."""

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        super().save(name, tensors)
        raise Stopped


class NoGradient(torch.autograd.Function):
    """The identity, of which no one may take the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise AssertionError("backpropagated through the teacher")


def digits(split: str) -> tuple[Tensor, Tensor]:
    data = load_images(f"digits:{split}")
    return torch.from_numpy(data.to_unit()), torch.from_numpy(data.labels)


def linear_teacher() -> Callable[[Tensor], Tensor]:
    """Least squares on pixels without their mean and contrast: fixed, and right about digits."""

    def features(x_BCHW: Tensor) -> Tensor:
        return F.layer_norm(x_BCHW.flatten(1), (64,), eps=1e-2)

    x, y = digits("train")
    phi = features(x).double()
    weights = torch.linalg.solve(phi.T @ phi + 100 * torch.eye(64), phi.T @ F.one_hot(y, 10).double()).float()
    return lambda x_BCHW: features(NoGradient.apply(x_BCHW)) @ weights


def projection(x_BCHW: Tensor) -> Tensor:
    """A made-up teacher with a gradient."""
    return x_BCHW.flatten(1) @ torch.randn(64, 10, generator=torch.Generator().manual_seed(5))


def weights(converted: Converted) -> list[Tensor]:
    return [*converted.student.parameters(), *converted.generator.parameters()]


def test_student_agrees_with_a_teacher_that_is_never_backpropagated_through(tmp_path: Path) -> None:
    teacher = linear_teacher()
    config = dataclasses.replace(
        SMALL, width=32, depth=1, groups=1, steps=700, batch=64, matrix_lr=0.05, lr=5e-3, warmup=20, ema=0.98, pool=1024
    )
    converted = convert(teacher, PUBLIC, config, FolderWorkspace(tmp_path, quiet=True))
    x, y = digits("test")
    with torch.no_grad():
        wanted, got = teacher(x).argmax(dim=1), converted.student(x).argmax(dim=1)
    assert (wanted == y).float().mean() > 0.9  # a teacher worth asking
    assert (wanted == got).float().mean() > 0.9


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, differentiable: bool) -> None:
    config = dataclasses.replace(SMALL, checkpoint_steps=3)
    whole = convert(
        projection, PUBLIC, config, FolderWorkspace(tmp_path / "a", quiet=True), differentiable=differentiable
    )
    with pytest.raises(Stopped):
        convert(projection, PUBLIC, config, Interrupted(tmp_path / "b", quiet=True), differentiable=differentiable)
    assert int(FolderWorkspace(tmp_path / "b").load("conversion")["step"]) == 3
    resumed = convert(
        projection, PUBLIC, config, FolderWorkspace(tmp_path / "b", quiet=True), differentiable=differentiable
    )
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    # Nor does it matter when checkpoints are written.
    again = convert(
        projection, PUBLIC, SMALL, FolderWorkspace(tmp_path / "c", quiet=True), differentiable=differentiable
    )
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 13)])
def test_images_are_finite_and_in_range(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    images = StudentGenerator(shape, 3, latent=4, width=4, generator=g)
    with torch.no_grad():
        for parameter in images.parameters():
            parameter.mul_(100)  # however wild the weights
    x, classes = images.sample(7, g)
    assert x.shape == (7, *shape)
    assert set(classes.tolist()) <= {0, 1, 2}
    public = Public(image_shape=shape, class_names=("a", "b", "c"), auxiliary=torch.zeros(0, *shape))
    prior = Prior(SMALL, public, FolderWorkspace(tmp_path, quiet=True)).batch(5, 7)
    for y in (x, prior, vary(x, 1.0, g), vary(prior, 1.0, g)):
        assert y.shape == (7, *shape)
        assert y.isfinite().all()
        assert y.abs().max() <= 1


def test_one_image_does_not_depend_on_the_others() -> None:
    g = torch.Generator().manual_seed(0)
    images = StudentGenerator(SHAPE, 10, generator=g)
    z, classes = images.draw(5, g)
    assert torch.allclose(images(z, classes)[2:3], images(z[2:3], classes[2:3]), atol=1e-6)


@pytest.mark.parametrize("loss", ["l1", "l2", "smooth", "kl"])
def test_losses_ignore_what_all_logits_share_and_vanish_at_the_target(loss: Any) -> None:
    config = Conversion(loss=loss)
    target = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    target = target - target.mean(dim=1, keepdim=True)
    assert distance(target + 3, target, config).item() == pytest.approx(0, abs=1e-6)
    assert distance(-target, target, config).item() > 0.1


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 3)])
def test_half_size_is_average_pooling(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(HalfSize()(x), F.avg_pool2d(x, 2), atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 9), (16, 144), (8, 8)])
def test_orthogonal_moves_all_directions_alike(shape: tuple[int, int]) -> None:
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, after = torch.linalg.svdvals(m), torch.linalg.svdvals(orthogonal(m))
    assert before.max() / before.min() > after.max() / after.min()
    assert after.min() > 0.3
    assert after.max() < 1.3
    assert not orthogonal(torch.zeros(shape)).any()


def test_settings_are_checked() -> None:
    for wrong in (
        {"steps": 0},
        {"generated": 1.5},
        {"lr": 0.0},
        {"prior": "none"},
        {"figures": 2.0},
        {"given": -0.1},
        {"temperature": float("nan")},
    ):
        with pytest.raises(ConfigError):
            Conversion(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "given_share", "wanted"), [(1, "auto", 48), (3, "auto", 32), (1, 0.25, 16)])
def test_public_images_that_a_person_gave_are_a_share_of_what_is_asked(
    tmp_path: Path, channels: int, given_share: Any, wanted: int
) -> None:
    workspace = FolderWorkspace(tmp_path, quiet=True)
    given = torch.full((3, channels, 8, 8), 0.125)
    made_up = torch.zeros(5, channels, 8, 8)
    config = Conversion(pool=64, vary=0.0, given=given_share)
    names = ("a", "b")
    public = Public(image_shape=(channels, 8, 8), class_names=names, auxiliary=given, procedural=made_up)
    pool = Prior(config, public, workspace).first(64)
    assert int((pool == 0.125).flatten(1).all(dim=1).sum()) == wanted
    none = Public(image_shape=(channels, 8, 8), class_names=names, auxiliary=given)
    assert not (Prior(config, none, workspace).first(64) == 0.125).flatten(1).all(dim=1).any()
