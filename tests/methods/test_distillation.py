"""The student is what the pipeline draws, learns from released values only, and goes on from a checkpoint with the same bytes."""

import builtins
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpdistill.errors import ConfigError
from dpdistill.methods.base import Public, Synthetic
from dpdistill.methods.diffusion.distillation import Critic, DistillationConfig, Teacher, denoised, distil, missing
from dpdistill.models import few_step
from dpdistill.workspace import FolderWorkspace

pytest.importorskip("diffusers")

SHAPE = (1, 8, 8)
PUBLIC = Public(image_shape=SHAPE, class_names=("dark", "light"), auxiliary=torch.zeros(1, *SHAPE))
TINY = DistillationConfig(
    student_width=8, student_steps=6, student_batch=8, pool=16, reuse=2, answer_steps=2, critic_width=8
)


def teacher(x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    """The expected clean image where class k is normal about 0.8·(2k - 1), with standard deviation 0.1 in every pixel."""
    s = sigma.view(-1, 1, 1, 1)
    mean = (1.6 * y.float() - 0.8).view(-1, 1, 1, 1)
    return mean + 0.01 / (0.01 + s.square()) * (x - mean)


def seeds(n: int = 16) -> Synthetic:
    labels = torch.arange(n) % 2
    noise = 0.1 * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Synthetic(images=(1.6 * labels.float() - 0.8).view(-1, 1, 1, 1) + noise, labels=labels)


def student(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Any:
    """A student whose last layer is not 0, as that of a fresh one is."""
    g = torch.Generator().manual_seed(seed)
    images = 2 * torch.rand(20, *shape, generator=g) - 1
    made = few_step.student(shape, 2, width=8, images=images, generator=g).eval()
    with torch.no_grad():
        made.proj_out_2.weight.copy_(torch.randn(made.proj_out_2.weight.shape, generator=g) * 0.1)
    return made


@pytest.mark.parametrize("steps", few_step.STEPS)
@pytest.mark.parametrize("shape", [SHAPE, (3, 12, 12)])
def test_clean_is_what_the_pipeline_computes(steps: int, shape: tuple[int, int, int]) -> None:
    model, labels = student(0, shape), torch.tensor([0, 1, 1])
    drawn = few_step.draw(few_step.pipeline(model), labels, steps, torch.Generator().manual_seed(1))
    x = normal = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    for t in range(few_step.LEVELS - 1, -1, -few_step.LEVELS // steps):
        level, following = torch.full((3,), t), t - few_step.LEVELS // steps
        with torch.no_grad():
            found = few_step.clean(model, x, level, labels)
        sigma = few_step.SIGMA[t]
        normal = ((1 + sigma**2) ** 0.5 * x - found) / sigma  # DDIM keeps the noise that the unclipped answer leaves
        x = found.clamp(-1, 1)
        if following >= 0:
            x = few_step.noisy(x, torch.full((3,), following), normal)
    assert drawn.std() > 0.01
    assert torch.allclose(drawn, few_step.decoded(x), atol=2e-5)


@pytest.mark.parametrize("steps", [0, 3, 5])
def test_other_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match="1, 2 or 4"):
        few_step.draw(None, torch.tensor([0]), steps, torch.Generator())


def test_what_is_shown_can_be_asked_for() -> None:
    x = torch.linspace(-1, 1, 101)
    assert torch.allclose(few_step.decoded(few_step.encoded(x)), x, atol=1e-6)
    assert (few_step.decoded(x) - x).abs().max() < 0.015
    assert torch.equal(few_step.decoded(torch.tensor([-9.0, 9.0])), few_step.decoded(torch.tensor([-1.0, 1.0])))


def test_the_first_layer_looks_where_images_differ() -> None:
    g = torch.Generator().manual_seed(0)
    pattern = torch.randn(4, 4, generator=g)
    images = torch.randn(50, 1, 1, 1, generator=g) * torch.tile(pattern, (2, 2)) + 0.01 * torch.randn(
        50, *SHAPE, generator=g
    )
    rows = few_step.student(SHAPE, 2, width=8, images=images, generator=g).pos_embed.proj.weight.detach()
    first = rows[0].flatten() / rows[0].norm()
    assert abs(float(first @ (pattern / pattern.norm()).flatten())) > 0.999
    assert rows[0].norm() > 10 * rows[1].norm()


def test_an_answer_beyond_white_is_as_good() -> None:
    target = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.2])
    found = missing(torch.tensor([-1.3, -0.5, 1.3, 0.5, 0.5]), target)
    assert found.tolist() == pytest.approx([0.0, 0.5 + 0.05, 0.0, -0.5 - 0.05, 0.3])


def test_weights_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (student(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(one[name], other[name])


def test_training_draws_nothing_from_the_global_generator() -> None:
    """diffusers drops labels at random in training; ours must not."""
    model = student().train()
    x, t, y = torch.randn(4, *SHAPE), torch.full((4,), 3), torch.tensor([0, 1, 0, 1])
    before = torch.get_rng_state()
    assert torch.equal(few_step.clean(model, x, t, y), few_step.clean(model, x, t, y))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(1, 7, 12), (3, 4, 4), (1, 96, 96), (1, 64, 65)])
def test_other_shapes_are_refused_with_the_way_out(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="--resize"):
        few_step.student(shape, 2, width=8, images=torch.zeros(2, *shape), generator=torch.Generator())


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 20, 20), (1, 28, 28)])
def test_shapes_that_halve_oddly_work(shape: tuple[int, int, int]) -> None:
    drawn = few_step.draw(few_step.pipeline(student(0, shape)), torch.tensor([0]), 1, torch.Generator())
    assert drawn.shape == (1, *shape)


@pytest.mark.parametrize("shape", [(1, 8, 12), (3, 30, 30), (1, 9, 9), (1, 64, 8), (3, 61, 63)])
def test_any_image_lies_at_the_upper_left_of_its_canvas(shape: tuple[int, int, int]) -> None:
    channels, side, again = few_step.canvas(shape)
    assert (channels, side) == (shape[0], again)
    assert 0 <= side - max(shape[1:]) < 4
    assert side % 4 == 0
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    whole = few_step.padded(images)
    assert whole.shape == (5, channels, side, side)
    assert torch.equal(few_step.cropped(whole, shape), images)
    assert torch.equal(whole[..., -1, : shape[2]], images[..., -1, :])  # the edges go on
    assert torch.equal(whole[..., : shape[1], -1], images[..., -1])
    assert few_step.padded(images[:0]).shape == (0, channels, side, side)


def test_a_student_of_images_that_are_no_square_learns_them(tmp_path: Path) -> None:
    """The teacher is asked about images of their own shape, and what the student draws there is as light as the teacher's."""
    shape, asked = (1, 8, 11), set[Any]()
    labels = torch.arange(16) % 2
    noise = 0.1 * torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    oblong = Synthetic(images=(1.6 * labels.float() - 0.8).view(-1, 1, 1, 1) + noise, labels=labels)

    def watched(x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        asked.add(tuple(x.shape[1:]))
        return teacher(x, sigma, y)

    config = replace(TINY, student_width=16, student_steps=150, student_batch=32, pool=64, reuse=10)
    public = replace(PUBLIC, image_shape=shape, auxiliary=torch.zeros(1, *shape))
    model = distil(Teacher(denoise=watched), oblong, public, config, FolderWorkspace(tmp_path, quiet=True))
    drawn = few_step.draw(few_step.pipeline(model), torch.tensor([0, 1] * 8), 2, torch.Generator().manual_seed(1))
    assert asked == {shape}
    means = few_step.cropped(drawn, shape).mean(dim=(1, 2, 3)).view(8, 2).mean(dim=0)
    assert means.tolist() == pytest.approx([-0.8, 0.8], abs=0.15)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'dpdistill\[diffusion\]'"):
        few_step.diffusers()


def test_the_teacher_walks_to_where_its_own_class_lies() -> None:
    noise = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(2)) * 80
    y = torch.tensor([0, 1, 0, 1])
    ends = denoised(teacher, noise, torch.full((4,), 80.0), y, steps=30)
    assert torch.allclose(ends.mean(dim=(1, 2, 3)), 1.6 * y.float() - 0.8, atol=0.1)


class Stopped(Exception):
    pass


class StoppingWorkspace(FolderWorkspace):
    """Stops before a step."""

    stop_at = -1

    def track(self, steps: Sequence[int], description: str) -> Iterator[int]:
        for step in super().track(steps, description):
            if step == self.stop_at:
                raise Stopped
            yield step


@pytest.mark.parametrize("adversarial", [0.0, 1.0])
def test_a_stopped_run_goes_on_with_the_same_bytes(adversarial: float, tmp_path: Path) -> None:
    config = DistillationConfig(**{**vars(TINY), "adversarial": adversarial, "checkpoint_steps": 2})
    whole = distil(
        Teacher(denoise=teacher), seeds(), PUBLIC, config, FolderWorkspace(tmp_path / "whole", quiet=True)
    ).state_dict()
    workspace = StoppingWorkspace(tmp_path / "stopped", quiet=True)
    workspace.stop_at = 5  # in another pool than the first
    with pytest.raises(Stopped):
        distil(Teacher(denoise=teacher), seeds(), PUBLIC, config, workspace)
    resumed = distil(
        Teacher(denoise=teacher), seeds(), PUBLIC, config, FolderWorkspace(tmp_path / "stopped", quiet=True)
    ).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("adversarial", [0.0, 1.0])
def test_one_step_draws_the_teachers_classes(
    adversarial: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    changes = {"adversarial": adversarial, "student_width": 32, "student_steps": 150, "student_lr": 5e-3}
    changes |= {"student_batch": 16, "pool": 64, "student_warmup": 10}
    config = DistillationConfig(**{**vars(TINY), **changes, "answer_steps": 6})
    made = distil(Teacher(denoise=teacher), seeds(), PUBLIC, config, FolderWorkspace(tmp_path, quiet=True))
    labels = torch.arange(20) % 2
    for steps in (1, 2):
        drawn = few_step.draw(few_step.pipeline(made), labels, steps, torch.Generator().manual_seed(3)).mean(
            dim=(1, 2, 3)
        )
        assert torch.allclose(drawn, 1.6 * labels.float() - 0.8, atol=0.25)


def test_the_critic_has_no_batch_statistics() -> None:
    critic = Critic(SHAPE, 2, width=8, generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(5, *SHAPE), torch.tensor([0, 1, 0, 1, 1])
    assert torch.allclose(critic(x, y)[:2], critic(x[:2], y[:2]), atol=1e-6)
    assert not torch.allclose(critic(x, y), critic(x, 1 - y))


@pytest.mark.parametrize("changes", [{"pool": 4}, {"from_noise": 2.0}, {"student_lr": 0.0}, {"sigma_max": 0.0}])
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DistillationConfig(**changes)
