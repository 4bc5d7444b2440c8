r"""A private linear classifier on fixed public features, by noisy gradient descent through the door.

Source: linear classifier on scattering features (Tramèr & Boneh 2021), by noisy gradient descent (Abadi et al. 2016; full batches where
sampling_prob is 1). Proof: docs/privacy/teacher.md.
Private: one noisy count of the records and `teacher_steps` noisy sums of per-record gradients.
T teacher_steps, q sampling_prob, C clip_norm, D features, K classes, W [K, D] the classifier's weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import ConfigError
from ...mechanisms import PrivateData
from ...models.linear import LinearTeacher
from ...models.scattering import n_features
from ...privacy import GaussianSum, Planned
from ..base import Public, Workspace
from .bounds import NORMS, check_bounds

N_PUBLIC = 4000  # images of each kind, at most
COUNT_SHARE = 0.01  # of the budget, for the number of records
GRID_BITS = 28
REACHES = (1e-6, 1e5)  # beyond, logits are so long that rounding moves a record's gradient, and the door refuses it


@dataclass(frozen=True, kw_only=True)
class Training:
    """Public settings of the teacher's training.

    Attributes:
      teacher_steps: T, releases.
      sampling_prob: q of a step; 1 is the full batch.
      clip_norm: C of a record's gradient, where features have norm 1.
      reach, reach_max: how far gradient descent goes: steps of min(reach · N / s, reach_max) / T, N the released count and s the noise
        multiplier of the whole budget. More records or less noise, and it pays to go further.
      teacher_momentum: of gradient descent.
      teacher_dims: leading public principal components that the teacher has; the plan asks for sums of so many. "auto" is 2,000 for grey
        images and 500 for colour.
      narrow_dims: of these, as many are used where N / s is at most `wide_above`: the others are 0 then. Few records, or much noise, and
        more components carry more noise than they tell.
      average_above: the mean of the last half's weights is returned where N / s is above it, else the last weights.
    """

    teacher_steps: int = 40
    sampling_prob: float = 1.0
    clip_norm: float = 0.25
    reach: float = 1.0
    reach_max: float = 16_000.0
    teacher_momentum: float = 0.5
    teacher_dims: int | Literal["auto"] = "auto"
    narrow_dims: int = 500
    wide_above: float = 10_000.0
    average_above: float = 2000.0

    def __post_init__(self) -> None:
        if min(self.teacher_steps, self.narrow_dims) < 1:
            raise ConfigError("Expected teacher_steps and narrow_dims of at least 1.")
        if self.teacher_dims != "auto" and self.teacher_dims < 1:
            raise ConfigError(f"Expected teacher_dims of auto or at least 1, got {self.teacher_dims}.")
        check_bounds(self, NORMS, "clip_norm", "reach")
        check_bounds(self, REACHES, "reach_max")
        if not (0 < self.sampling_prob <= 1 and 0 <= self.teacher_momentum < 1):
            raise ConfigError("Expected sampling_prob in (0, 1] and teacher_momentum in [0, 1).")

    def dims(self, public: Public) -> int:
        """Components of the teacher, where there are so many."""
        if self.teacher_dims == "auto":
            return 2000 if public.image_shape[0] == 1 else 500
        return self.teacher_dims


def plan(config: Training, public: Public, noise_multiplier: float) -> list[Planned]:
    """One count, and T gradients; together they cost what one release of `noise_multiplier` does, where q = 1."""
    # Components and the constant, as `LinearTeacher` has them.
    dim = public.n_classes * (min(config.dims(public), n_features(public.image_shape)) + 1)
    count = GaussianSum(name="count", dim=1, noise_multiplier=noise_multiplier / math.sqrt(COUNT_SHARE))
    gradient = GaussianSum(
        name="teacher-gradient",
        dim=dim,
        noise_multiplier=noise_multiplier * math.sqrt(config.teacher_steps / (1 - COUNT_SHARE)) * config.sampling_prob,
        clip_norm=config.clip_norm,
        sampling_prob=config.sampling_prob,
        grid_bits=GRID_BITS,
    )
    return [Planned(count), Planned(gradient, config.teacher_steps)]


def train(
    config: Training, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace
) -> LinearTeacher:
    """Returns the private teacher."""
    teacher = untrained(config.dims(public), public).to(workspace.device)
    teacher.fit_public(public_images(public), workspace.generator("teacher-features"))
    private.check(plan[0].query, one_each)
    nothing = torch.zeros(public.n_classes, teacher.n_features, device=workspace.device)
    private.features(teacher.features, teacher.n_features).check(plan[1].query, residuals(nothing))
    held = [private.reserve(planned.query, planned.count) for planned in plan]
    count = max(1.0, float(private.release_reserved(held[0], 0, one_each)[0, 0]))  # private
    expected = count * config.sampling_prob  # records in a step
    certainty = count / (plan[0].query.noise_multiplier * math.sqrt(COUNT_SHARE))  # N / s
    lr = min(config.reach * certainty, config.reach_max) / config.teacher_steps
    if certainty <= config.wide_above:
        teacher.narrow(config.narrow_dims)
    with workspace.passing("features of the records") as progress:
        features = private.features(teacher.features, teacher.n_features, progress=progress)
        weights = torch.zeros(public.n_classes, teacher.n_features, device=workspace.device)
        velocity, total, kept = torch.zeros_like(weights), torch.zeros_like(weights), 0
        for step in range(config.teacher_steps):
            released = features.release_reserved(held[1], step, residuals(weights))  # private
            gradient = released.to(weights.device) / (config.clip_norm * expected)
            velocity = config.teacher_momentum * velocity + (1 - config.teacher_momentum) * gradient
            weights = weights - lr * velocity
            if 2 * step >= config.teacher_steps - 1:
                total, kept = total + weights, kept + 1
    teacher.head.weight.data.copy_(total / kept if certainty > config.average_above else weights)
    return teacher.eval()


def untrained(dims: int, public: Public) -> LinearTeacher:
    """The teacher, before its features are fitted to public images."""
    return LinearTeacher(public.image_shape, public.n_classes, dim=dims)


def public_images(public: Public) -> Tensor:
    """Auxiliary images and made-up ones, a few thousand: what public features are fitted to."""
    made_up = public.auxiliary[:0] if public.procedural is None else public.procedural
    return torch.cat([public.auxiliary[:N_PUBLIC], made_up[:N_PUBLIC]])


def one_each(x: Tensor, y: Tensor) -> Tensor:
    """Every record counts one."""
    return torch.ones(len(x), 1, device=x.device)


def residuals(weights_KD: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The left factor of cross-entropy's gradient: softmax minus the label."""

    def left(features_BD: Tensor, y_B: Tensor) -> Tensor:
        p = (features_BD @ weights_KD.T).softmax(dim=1)
        return p - torch.nn.functional.one_hot(y_B, len(weights_KD)).to(p.dtype)

    return left
