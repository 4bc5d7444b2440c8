"""No setting is so large or so small that a run can only fail once its releases are paid for, and a fit that diverges is released."""

import dataclasses
import math
import typing
from typing import Any

import pytest
import torch

from dpdistill.bundle import contents
from dpdistill.config_files import build
from dpdistill.errors import ConfigError
from dpdistill.methods import DIFFUSION_METHODS, METHODS, MODEL_METHODS, Public, Student, Synthetic
from dpdistill.methods.shared import bounds
from dpdistill.methods.shared.diverged import mended
from dpdistill.models.student_generator import StudentGenerator
from dpdistill.models.wavelet_net import WaveletNet

ALL: dict[str, Any] = {**METHODS, **MODEL_METHODS, **DIFFUSION_METHODS}
NEEDED = {"models": 3, "expected_records": 100}
FREE = {  # any number does: compared with another one, or the planner refuses what no noise can be drawn for
    "cache_gib", "wide_above", "average_above", "target_epsilon", "sampling_prob", "share_moments", "share_local", "share_means",
}  # fmt: skip


def settings() -> list[tuple[str, str]]:
    """Every method with each of its settings that is a number and no whole one."""
    found = []
    for method, module in ALL.items():
        hints = typing.get_type_hints(module.Config)
        found += [(method, item.name) for item in dataclasses.fields(module.Config) if "float" in str(hints[item.name])]
    return found


@pytest.mark.parametrize(("method", "name"), [pair for pair in settings() if pair[1] not in FREE])
def test_no_number_is_without_bounds(method: str, name: str) -> None:
    for value in (1e300, 1e38, -1e7, -1e300):
        with pytest.raises(ConfigError):
            make(method, {name: value})


def make(method: str, changes: dict[str, Any]) -> Any:
    kind = ALL[method].Config
    known = {item.name for item in dataclasses.fields(kind)}
    return build(kind, {name: value for name, value in NEEDED.items() if name in known} | changes)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        pair
        for pair in settings()
        if pair[1] in ("clip_norm", "clip", "group_size", "reach", "temperature", "sigma_data")
    ],
)
def test_no_scale_is_next_to_nothing(method: str, name: str) -> None:
    for value in (0.0, 1e-300, 9e-7):
        with pytest.raises(ConfigError, match=f"{name} from"):
            make(method, {name: value})


@pytest.mark.parametrize("method", ["dpdm", "dpsad"])
def test_a_network_behind_the_door_is_not_blown_up(method: str) -> None:
    """At lr = 0.1, 150 steps were paid for, and then the door refused the gradients of a network that rounding moved."""
    make(method, {"lr": 0.03, "steps": 150})
    for change in ({"lr": 0.1, "steps": 150}, {"lr": 0.03, "steps": 400}, {"p_mean": 6.0}, {"p_std": 4.0}):
        with pytest.raises(ConfigError, match=r"lr · √steps|p_mean from|p_std from"):
            make(method, change)


@pytest.mark.parametrize("method", ["dosser", "ndpdc"])
def test_parts_fit_the_images_and_a_release(method: str) -> None:
    """Before anything is charged: `plan` comes first."""
    for shape, most in (((1, 8, 8), 8), ((1, 12, 8), 8), ((3, 64, 64), contents.MAX_PARTS)):
        public = Public(image_shape=shape, class_names=("a", "b"), auxiliary=torch.zeros(9, *shape))
        given = {"sampling_prob": 0.5, "width": 4}
        ALL[method].plan(make(method, given | {"parts": most}), public, 1.0)
        for parts in (most + 1, 64, 10**9):
            with pytest.raises(ConfigError, match=f"parts from 1 to {most}"):
                ALL[method].plan(make(method, given | {"parts": parts}), public, 1.0)
    assert bounds.MOST_PARTS == contents.MAX_PARTS


def test_a_fit_that_diverged_is_made_whole() -> None:
    images = torch.zeros(4, 1, 8, 8)
    images[0], images[1, 0, 0, 0], images[2, 0, 0, 0] = math.nan, math.inf, -7.0
    soft = torch.tensor([[0.5, 0.5], [math.nan, 1.0], [0.0, 0.0], [1.0, 0.0]])
    broken = Synthetic(images=images, labels=torch.arange(4) % 2, soft_labels=soft)
    with pytest.warns(RuntimeWarning, match="the fit diverged"):
        made = mended(broken)
    assert isinstance(made, Synthetic)
    assert made.images[0].eq(0).all()
    assert made.images.amin() == -1
    assert made.images.amax() == 1
    assert made.soft_labels is not None
    assert made.soft_labels.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]
    assert mended(made) is made


def test_weights_that_are_no_numbers_are_made_some() -> None:
    g = torch.Generator().manual_seed(0)
    model = WaveletNet((1, 8, 8), 2, width=4, groups=2, generator=g)
    images = Synthetic(images=torch.zeros(2, 1, 8, 8), labels=torch.arange(2))
    student = Student(
        model=model,
        generator=StudentGenerator((1, 8, 8), 2, latent=2, width=2, generator=g),
        images=images,
        figures={},
    )
    assert mended(student) is student
    with torch.no_grad():
        model.head.weight[0, 0], model.head.bias[0] = math.nan, -math.inf
    with pytest.warns(RuntimeWarning, match="the fit diverged"):
        made = mended(student)
    assert isinstance(made, Student)
    assert all(torch.isfinite(weight).all() for weight in made.model.state_dict().values())
    assert made.model.head.weight[0, 0] == 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13)])
def test_a_generator_has_the_weights_that_are_counted(shape: tuple[int, int, int]) -> None:
    made = StudentGenerator(shape, 5, latent=7, width=3, generator=torch.Generator().manual_seed(0))
    counted = StudentGenerator.shapes(shape, 5, latent=7, width=3)
    assert {name: tuple(weight.shape) for name, weight in made.state_dict().items()} == counted
