"""Dosser, the paper's recipe made sound: draw all noisy signals first, then optimise images against them freely.

Source: Dosser (ICCV 2025, arXiv 2508.01749), section 3. DOS = decoupled
optimisation and sampling, SER = subspace error reduction, PEA = parts.
Proof: docs/privacy/gaussian_sum.md, composed `sampling_steps` times.
Private: `sampling_steps` Poisson-sampled sums of clipped features, by class. The second stage reads released sums only.
T_s sampling_steps, T_o optimisation_steps, q sampling_prob, L group_size, C clip_norm, p subspace_dim, M per_class,
K classes, D features.

Otherwise than the published code (section 2.2 there): the noise of a signal is drawn once, by the door, when the signal
is (the code caches clean sums and draws noise at each step); augmentation has generators of its own (the code reseeds
the one that noise comes from); q and L are public constants (the code divides by private class counts); sigma is
calibrated to the number of releases. Pixels are kept in [-1, 1] at each step, which is where they are released.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..errors import ConfigError
from ..mechanisms import PrivateData
from ..models.matching import (
    FeatureMap,
    class_feature,
    leading_subspace,
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
    """Public settings; the defaults are the paper's, for which see also `quick`.

    Attributes:
      separate: DOS. False takes one step for each signal, in order, and `optimisation_steps` is not used (as NDPDC).
      subspace: SER. False matches raw features, neither centred nor projected.
      sampling_steps: T_s, releases.
      optimisation_steps: T_o, each on a signal drawn uniformly.
      subspace_dim: p at most; never more than the features, or than the auxiliary images less one.
      auxiliary_images: how many of the auxiliary images the subspaces are computed from, at most.
      ema: decay of the running mean of the images, which is what is released.
      cache_gib: memory for subspaces kept from the first stage, D·p·2 bytes each (4 MB at the defaults); what does not
        fit is recomputed from the network's public seed when it is needed. Does not change the result.
    """

    separate: bool = True
    subspace: bool = True
    sampling_steps: int = 1000
    optimisation_steps: int = 200_000
    subspace_dim: int = 1000
    auxiliary_images: int = 1000
    ema: float = 0.99
    class_steps: bool = True
    cache_gib: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sampling_steps", "optimisation_steps", "subspace_dim", "auxiliary_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        if not (0 <= self.ema < 1):
            raise ConfigError(f"Expected ema in [0, 1), got {self.ema}.")

    @classmethod
    def quick(cls, **settings: object) -> "Config":
        """A recipe for minutes on a CPU: 50 signals, 1,000 steps, 200 directions, networks of width 64.

        Args:
          settings: any field; give `expected_records_per_class` or `sampling_prob`.
        """
        base = cls(sampling_steps=50, optimisation_steps=1000, subspace_dim=200, auxiliary_images=400, width=64)
        return replace(base, **settings)  # type: ignore[arg-type]


def signal_dim(config: Config, public: Public) -> int:
    """Coordinates of a signal, by class: p, or D without SER."""
    features = random_network(public.image_shape, config.width, config.depth).embed_dim
    if not config.subspace:
        return features
    directions = min(config.subspace_dim, features, min(config.auxiliary_images, len(public.auxiliary)) - 1)
    if directions < 1:
        raise ConfigError("dosser's subspace needs at least two auxiliary images; give more, or set subspace=false.")
    return directions


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """T_s sums of clipped features, by class."""
    check_parts(config.parts, public.image_shape)
    query = GaussianSum(
        name="dosser-signal",
        dim=signal_dim(config, public),
        n_classes=public.n_classes,
        noise_multiplier=noise_multiplier,
        clip_norm=config.clip_norm,
        sampling_prob=config.rate,
    )
    return [Planned(query, config.sampling_steps)]


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Synthetic:
    """Draws the signals, then optimises the images."""
    look = Views(config, public, workspace)
    signals = draw_signals(private, plan[0], look, workspace)
    images = optimise(config, public, signals, look, workspace)
    labels = torch.arange(public.n_classes).repeat_interleave(config.per_class)
    return Synthetic(images=images.flatten(0, 1).cpu(), labels=labels, parts=config.parts)


class Views:
    """The public half of each signal: its feature map and its augmentation, from the run's seed and the signal's
    number."""

    def __init__(self, config: Config, public: Public, workspace: Workspace) -> None:
        self._config, self._public, self._workspace, self.dsa = config, public, workspace, config.dsa
        order = torch.randperm(len(public.auxiliary), generator=workspace.generator("dosser-auxiliary"))
        self._auxiliary = public.auxiliary[order[: config.auxiliary_images]].to(workspace.device)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._free_bytes = config.cache_gib * 2**30

    def features(self, index: int) -> FeatureMap:
        """The network of signal `index`, with its subspace where SER is on."""
        config, device = self._config, self._workspace.device
        generator = self._workspace.generator("dosser-network", index)
        network = random_network(self._public.image_shape, config.width, config.depth, generator, device)
        if not config.subspace:
            return FeatureMap(network=network)
        if index not in self._kept:
            dim = signal_dim(config, self._public)
            mean, basis = leading_subspace(network, self._auxiliary, dim)
            cost = mean.nbytes + basis.nbytes
            if cost > self._free_bytes:
                return FeatureMap(network=network, mean=mean, basis=basis)
            self._kept[index] = mean, basis
            self._free_bytes -= cost
        mean, basis = self._kept[index]
        return FeatureMap(network=network, mean=mean, basis=basis)

    def draws(self, index: int) -> Tensor:
        """The augmentation of signal `index`, one draw for each class: [K, 4]."""
        generator = self._workspace.generator("dosser-augment", index)
        return self.dsa.draw(generator, self._public.n_classes)


def draw_signals(private: PrivateData, planned: Planned, look: Views, workspace: Workspace) -> Tensor:
    """The sampling stage: T_s noisy sums, [T_s, K, p]. A resumed run gets those it drew before from the door."""

    def feature(index: int) -> Callable[[Tensor, Tensor], Tensor]:
        return class_feature(look.features(index), look.dsa, look.draws(index))

    private.check(planned.query, feature(0))
    held = private.reserve(planned.query, planned.count)
    signals = torch.empty(planned.count, planned.query.n_classes, planned.query.dim)
    for index in workspace.track(range(planned.count), "drawing signals"):
        signals[index] = private.release_reserved(held, index, feature(index))  # private
    return signals


def optimise(config: Config, public: Public, signals: Tensor, look: Views, workspace: Workspace) -> Tensor:
    """The optimisation stage, all post-processing: returns the running mean of the images, [K, M, C, H, W]."""
    k = public.n_classes
    images = start_images(
        k, config.per_class, public.image_shape, workspace.generator("dosser-start"), workspace.device
    )
    fresh = {"images": images, "velocity": torch.zeros_like(images), "mean": images.clone()}
    start, state = resume(workspace.load("dosser"), fresh)
    order: Sequence[int] = range(len(signals))  # DOS off: each signal once
    if config.separate:
        generator = workspace.generator("dosser-order")
        order = torch.randint(len(signals), (config.optimisation_steps,), generator=generator).tolist()

    for step in workspace.track(range(start, len(order)), "optimising images"):
        index = order[step]
        gradient: Callable[[Tensor], Tensor] = partial(
            matching_gradient,
            target_KD=signals[index].to(images.device),
            features=look.features(index),
            dsa=look.dsa,
            draws_K4=look.draws(index),
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
        moved = moved.clamp(-1, 1)
        mean = config.ema * state["mean"] + (1 - config.ema) * moved
        state = {"images": moved, "velocity": velocity, "mean": mean}
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == len(order):
            workspace.save("dosser", {**state, "step": torch.tensor(step + 1)})
    return state["mean"]
