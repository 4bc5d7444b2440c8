"""DP-SGD on the classifier itself: the upper reference, which releases a model and no data set.

Source: Abadi et al. (2016). Proof: docs/privacy/gaussian_sum.md, composed `steps` times.
Private: one Poisson-sampled sum of clipped per-record gradients per step. The optimiser is post-processing.
T steps, q sampling_prob, C clip_norm, B expected batch (public), P parameters, K classes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..mechanisms import PrivateData, per_record_gradient
from ..models.convnet import ConvNet
from ..privacy import GaussianSum, Planned
from .base import Public, Workspace
from .shared.bounds import NORMS, RATES, check_bounds
from .shared.checkpoints import resume


@dataclass(frozen=True, kw_only=True)
class Config:
    """Public settings.

    Memory: the door takes the gradients of one micro-batch at a time, about 60·P bytes a record in the gradients and in
    clipping, on top of the network's activations. At width 32 on 28x28 images (P = 24,138), 64 records take 0.2 GiB.
    Give `PrivateData` a smaller `micro_batch` than its 256 for wide networks (32 at width 128, where P = 320,010).

    Attributes:
      expected_records: public guess of the number of records, all classes together; never taken from the data.
      expected_batch: B; q is expected_batch over expected_records, and the divisor of every noisy sum.
      steps: T, releases.
      clip_norm: C of a record's gradient.
      optimizer: sgd with `momentum`, or adam.
      width, depth, groups: of the ConvNet; few groups, since instance norm loses much on small maps.
      checkpoint_steps: steps between checkpoints; does not change the result.
    """

    expected_records: int
    expected_batch: int = 256
    steps: int = 500
    clip_norm: float = 1.0
    optimizer: Literal["sgd", "adam"] = "adam"
    lr: float = 2e-3
    momentum: float = 0.9
    width: int = 32
    depth: int = 3
    groups: int = 4
    checkpoint_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("expected_records", "expected_batch", "steps", "width", "depth", "groups", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        if self.width % self.groups:
            raise ConfigError(f"Expected groups={self.groups} to divide width={self.width}.")
        check_bounds(self, NORMS, "clip_norm")
        check_bounds(self, RATES, "lr")
        if not (0 <= self.momentum < 1):
            raise ConfigError(f"Expected momentum in [0, 1), got {self.momentum}.")

    @property
    def rate(self) -> float:
        """q, from public numbers only."""
        return min(1.0, self.expected_batch / self.expected_records)

    def network(self, public: Public, generator: torch.Generator | None = None) -> ConvNet:
        """The classifier, with fresh weights."""
        return ConvNet(
            public.image_shape,
            public.n_classes,
            width=self.width,
            depth=self.depth,
            groups=self.groups,
            generator=generator,
        )


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """T sums of clipped gradients, over all classes."""
    n_parameters = sum(parameter.numel() for parameter in config.network(public).parameters())
    query = GaussianSum(
        name="dpsgd-gradient",
        dim=n_parameters,
        noise_multiplier=noise_multiplier,
        clip_norm=config.clip_norm,
        sampling_prob=config.rate,
        grid_bits=max(20, math.ceil(math.log(n_parameters, 4)) + 4),
    )
    return [Planned(query, config.steps)]


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> ConvNet:
    """Returns the trained classifier."""
    model = config.network(public, workspace.generator("dpsgd-model")).to(workspace.device)
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    start, state = resume(
        workspace.load("dpsgd"), {"flat": flat, "first": torch.zeros_like(flat), "second": torch.zeros_like(flat)}
    )
    _write(parameters, state["flat"])
    gradient = per_record_gradient(model, F.cross_entropy)
    private.check(plan[0].query, gradient)
    held = private.reserve(plan[0].query, plan[0].count)
    for step in workspace.track(range(start, config.steps), "DP-SGD"):
        total = private.release_reserved(held, step, gradient)  # private
        mean = total[0].to(flat.device) / config.expected_batch  # by a public constant, never by the realised batch
        state = _update(config, state, mean, step)
        _write(parameters, state["flat"])
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == config.steps:
            workspace.save("dpsgd", {**state, "step": torch.tensor(step + 1)})
    return model.eval()


def _update(config: Config, state: dict[str, Tensor], gradient_P: Tensor, step: int) -> dict[str, Tensor]:
    """One step of SGD with momentum, or of Adam (betas 0.9 and 0.999)."""
    if config.optimizer == "sgd":
        first = config.momentum * state["first"] + gradient_P
        return {**state, "first": first, "flat": state["flat"] - config.lr * first}
    first = 0.9 * state["first"] + 0.1 * gradient_P
    second = 0.999 * state["second"] + 0.001 * gradient_P.square()
    scale = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
    return {
        "first": first,
        "second": second,
        "flat": state["flat"] - config.lr * (first / (1 - 0.9 ** (step + 1))) / scale,
    }


def _write(parameters: list[torch.nn.Parameter], flat_P: Tensor) -> None:
    """Copies a flat vector into the parameters, in order."""
    with torch.no_grad():
        for parameter, values in zip(parameters, flat_P.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(values.view_as(parameter))
