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
from .shared.bounds import check_parts
from .shared.checkpoints import resume
from .shared.matching_config import MatchingConfig


@dataclass(frozen=True, kw_only=True)
class Config(MatchingConfig):
    """Public settings; the defaults are the paper's.

    Attributes:
      steps: T, iterations and releases.
    """

    steps: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError(f"Expected steps of at least 1, got {self.steps}.")


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
