"""NDPDC, the baseline: match the noisy feature sums of one fresh random network per iteration, one step each.

Source: Zheng & Li, "Differentially Private Dataset Condensation" (NDPDC, 2023).
With `parts=2` it is the row "NDPDC + PEA" of Dosser's ablation.
Proof: docs/privacy/gaussian_sum.md, composed `steps` times.
Private: one release of clipped feature sums per iteration, Poisson-sampled. All else is post-processing.
T steps, q sampling_prob, L group_size, C clip_norm, M per_class, K classes.

Otherwise than the code published by the authors: noise comes from the door and not from the generator that the
augmentation reseeds; q is a public constant; pixels are kept in [-1, 1] at each step, which is where they are released.
"""

from dataclasses import dataclass
from functools import partial

import torch

from ..errors import ConfigError
from ..mechanisms import PrivateData
from ..models.augment import FULL_STRATEGY, Dsa
from ..models.matching import (
    FeatureMap,
    class_feature,
    matching_gradient,
    momentum_step,
    random_network,
    start_images,
)
from ..privacy import GaussianSum, Planned
from .base import Public, Synthetic, Workspace
from .shared.bounds import NORMS, RATES, check_bounds, check_parts
from .shared.checkpoints import resume


@dataclass(frozen=True, kw_only=True)
class Config:
    """Public settings; the defaults are the paper's.

    Attributes:
      per_class: M, stored images per class.
      parts: 2 stores 2x2 training images in each (PEA); 1 stores plain images.
      steps: T, iterations and releases.
      group_size: L, records of a class that a release is expected to hold: the factor in the matching target.
      expected_records_per_class: public guess of a class' size; q is group_size over it. Never taken from the data.
      sampling_prob: q itself, instead of the line above.
      clip_norm: C, in units of the network's features.
      width: channels of the random networks.
      depth: of them; None is 3, the paper's, or less on images below 16x16 (`fitting_depth`).
      augment: strategy of `Dsa`; leave out "flip" for digits. Not used where per_class is 1, as in the paper.
      class_steps: an optimiser step for each class in turn, as in Dosser; the paper takes one for all classes.
      checkpoint_steps: iterations between checkpoints; does not change the result.
    """

    per_class: int = 10
    parts: int = 1
    steps: int = 10_000
    group_size: float = 50.0
    expected_records_per_class: int | None = None
    sampling_prob: float | None = None
    clip_norm: float = 1.0
    width: int = 128
    depth: int | None = None
    augment: str = FULL_STRATEGY
    lr: float = 1.0
    momentum: float = 0.5
    class_steps: bool = False
    checkpoint_steps: int = 500

    def __post_init__(self) -> None:
        if min(self.per_class, self.parts, self.steps, self.checkpoint_steps, self.width, self.depth or 1) < 1:
            raise ConfigError("Expected per_class, parts, steps, checkpoint_steps, width and depth of at least 1.")
        if self.expected_records_per_class is not None and self.expected_records_per_class < 1:
            raise ConfigError(
                f"Expected expected_records_per_class of at least 1, or none, got {self.expected_records_per_class}."
            )
        check_bounds(self, NORMS, "group_size", "clip_norm")
        check_bounds(self, RATES, "lr")
        if not (0 <= self.momentum < 1):
            raise ConfigError(f"Expected momentum in [0, 1), got {self.momentum}.")
        try:
            Dsa(strategy=self.augment)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def rate(self) -> float:
        """q, from public numbers only."""
        if (self.sampling_prob is None) == (self.expected_records_per_class is None):
            raise ConfigError("ndpdc needs one of expected_records_per_class (a public guess) and sampling_prob.")
        if self.sampling_prob is not None:
            return self.sampling_prob
        return min(1.0, self.group_size / (self.expected_records_per_class or 1))

    @property
    def dsa(self) -> Dsa:
        return Dsa(strategy=self.augment if self.per_class > 1 else "none")


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """T sums of clipped embeddings, by class."""
    check_parts(config.parts, public.image_shape)
    network = random_network(public.image_shape, config.width, config.depth)
    query = GaussianSum(
        name="ndpdc-signal",
        dim=network.embed_dim,
        n_classes=public.n_classes,
        noise_multiplier=noise_multiplier,
        clip_norm=config.clip_norm,
        sampling_prob=config.rate,
    )
    return [Planned(query, config.steps)]


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Synthetic:
    """Optimises K·M images through T rounds of: fresh network, noisy sums, one step."""
    k, device, dsa = public.n_classes, workspace.device, config.dsa

    def drawn(step: int) -> tuple[FeatureMap, torch.Tensor]:
        generator = workspace.generator("ndpdc-network", step)
        network = random_network(public.image_shape, config.width, config.depth, generator, device)
        return FeatureMap(network=network), dsa.draw(generator, k)

    features, draws = drawn(0)
    private.check(plan[0].query, class_feature(features, dsa, draws))
    held = private.reserve(plan[0].query, plan[0].count)
    images = start_images(k, config.per_class, public.image_shape, workspace.generator("ndpdc-start"), device)
    fresh = {"images": images, "velocity": torch.zeros_like(images)}
    start, state = resume(workspace.load("ndpdc"), fresh)

    for step in workspace.track(range(start, config.steps), "NDPDC"):
        features, draws = drawn(step)
        target = private.release_reserved(held, step, class_feature(features, dsa, draws)).to(device)  # private

        gradient = partial(
            matching_gradient,
            target_KD=target,
            features=features,
            dsa=dsa,
            draws_K4=draws,
            parts=config.parts,
            group_size=config.group_size,
            clip_norm=config.clip_norm,
        )
        moved, velocity = momentum_step(
            state["images"],
            state["velocity"],
            gradient,
            lr=config.lr,
            momentum=config.momentum,
            class_steps=config.class_steps,
        )
        state = {"images": moved.clamp(-1, 1), "velocity": velocity}
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == config.steps:
            workspace.save("ndpdc", {**state, "step": torch.tensor(step + 1)})

    labels = torch.arange(k).repeat_interleave(config.per_class)
    return Synthetic(images=state["images"].flatten(0, 1).cpu(), labels=labels, parts=config.parts)
