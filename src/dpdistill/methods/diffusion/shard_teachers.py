"""A baseline: many small denoisers on disjoint shards teach one student. Sound by any unit that stays in a shard; weak for single records.

Source: the closest sound relative of DP-SAD's teacher and student, after PATE (Papernot et al. 2018) and G-PATE (Long et al. 2021): a
teacher for each shard, inputs that no private image enters, and the teachers' pull on the student's images summed with noise.
Private: `rounds` releases of a sum over shards. Proof: docs/privacy/shard_sum.md. The student is post-processing.

A teacher's vector is how it would change the student's answers: the gradient of L_dis in the student's images, but for a factor. It is
zero where they agree, so it stays in a small ball.

K models, Q queries of a round, R rounds, D pixels, c classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigError
from ...mechanisms import PrivateData
from ...mechanisms.ensemble import Model
from ...models import edm, few_step
from ...models.denoiser import Denoiser, check_patch, check_sizes
from ...privacy import Planned, ShardSum, gaussian_multiplier
from ..base import Public, Sampler, Workspace
from ..shared.bounds import NORMS, RATES, SCALES, check_bounds
from .distillation import DistillationConfig, Teacher
from .student import finish


@dataclass(frozen=True, kw_only=True)
class Config(DistillationConfig):
    """Public settings. What one round costs is its clip norm, and that grows with √(Q·D): ask little.

    Attributes:
      models: K, shards.
      unit_moves: shards that exchanging one unit touches; see `ShardSum`.
      rounds: R. From the second on the queries come from the student so far.
      queries: Q of a round.
      clip: C over √(Q·D): a root mean square of pixels.
      teacher_steps, batch, lr: of a shard's teacher.
      fit_steps: of the denoiser that learns from them, in each round; it is what the student is distilled from.
      width, depth, patch, heads, sigma_data: of all denoisers.
      sigma_min, sigma_max: noise levels of the queries, evenly in the logarithm; sampling starts from the upper.
      per_class: samples that are released beside the model.
      seed_images: samples of the denoiser that the student starts from, in all.
      sampling_steps: calls of the student for an image.
    """

    models: int = 100
    unit_moves: int = 1
    rounds: int = 2
    queries: int = 40
    clip: float = 0.3
    teacher_steps: int = 200
    batch: int = 64
    lr: float = 2e-3
    fit_steps: int = 300
    width: int = 64
    depth: int = 2
    patch: int = 8
    heads: int = 4
    sigma_data: float = 0.5
    sigma_min: float = 0.5
    sigma_max: float = 10.0
    per_class: int = 10
    seed_images: int = 2000
    sampling_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance != 1:
            raise ConfigError("This method has no unconditional denoiser: leave guidance out.")
        whole = ("models", "rounds", "queries", "teacher_steps", "batch", "fit_steps", "width", "depth", "patch")
        for name in (*whole, "heads", "per_class", "seed_images", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        check_sizes(width=self.width, depth=self.depth, heads=self.heads)
        check_bounds(self, NORMS, "clip")
        check_bounds(self, RATES, "lr")
        check_bounds(self, SCALES, "sigma_data")
        if not 0.002 < self.sigma_min < self.sigma_max:
            raise ConfigError("Expected 0.002 < sigma_min < sigma_max.")


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """R sums over shards."""
    few_step.check(public.image_shape)
    check_patch(config.patch, public.image_shape)
    dim = config.queries * math.prod(public.image_shape)
    query = ShardSum(
        name="shard-teachers",
        dim=dim,
        n_models=config.models,
        noise_multiplier=noise_multiplier * math.sqrt(config.rounds),
        clip_norm=config.clip * math.sqrt(dim),
        unit_moves=config.unit_moves,
        grid_bits=max(20, math.ceil(math.log(dim, 4)) + 4),
    )
    return [Planned(query, config.rounds)]


def advice(config: Config, public: Public, epsilon: float, delta: float) -> list[str]:
    """What to expect, before anything is spent. docs/privacy/shard_sum.md#what-it-is-good-for."""
    dim = config.queries * math.prod(public.image_shape)
    longer = 2 * gaussian_multiplier(epsilon, delta) * math.sqrt(config.rounds * dim) / config.models
    return [
        f"the noise of a round is {longer:.1f} times as long as what {config.models} models that agree say together",
        "a baseline: for the same noise a sum over single images (the default's, --method dpsad) is better by twice the images of a model",
    ]


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Sampler:
    """R times: the student's own noisy samples, the shards' noisy pull on its answers, and a fit to both; then its samples."""
    device, shape = workspace.device, public.image_shape
    student = network(config, shape, public.n_classes, workspace.generator("shards-student")).to(device)
    ensemble = private.shards(config.models, ShardTeacher(config, shape, public.n_classes))
    asked: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for index in range(config.rounds):
        g = workspace.generator("shards-queries", index)
        x, sigma, y = queries(config, student, shape, public.n_classes, index, device, g)
        with torch.no_grad():
            own = student(x, sigma, y)
        packed = pack(x, own, sigma, y).cpu()
        if index == 0:
            ensemble.check(plan[0].query, packed)
            held = ensemble.reserve(plan[0].query, plan[0].count)
        with workspace.passing("teachers of the shards") as progress:
            pulled = ensemble.release_vectors(held, index, packed, progress=progress)  # private
        # By K, a public constant, though some shards may be empty.
        asked.append((x, sigma, y, own + pulled.to(device).view_as(own) / config.models))
        fit(student, config, [torch.cat(part) for part in zip(*asked, strict=True)], workspace, index)
    return finish(Teacher(denoise=student), public, config, workspace)


def network(config: Config, shape: tuple[int, int, int], n_classes: int, generator: torch.Generator) -> Denoiser:
    """A small denoiser, for a shard or for the student."""
    return Denoiser(
        shape,
        n_classes,
        patch=config.patch,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        sigma_data=config.sigma_data,
        generator=generator,
    )


def queries(
    config: Config,
    student: Denoiser,
    shape: tuple[int, int, int],
    n_classes: int,
    index: int,
    device: str,
    g: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Q noisy images, levels and classes: of pure noise in the first round, then of the student's own samples. No record enters."""
    y = (torch.arange(config.queries) % n_classes).to(device)
    share = torch.rand(config.queries, generator=g)
    sigma = (config.sigma_min * (config.sigma_max / config.sigma_min) ** share).to(device)
    clean = sample(config, student, y, shape, g) if index else torch.zeros(config.queries, *shape, device=device)
    return clean + sigma.view(-1, 1, 1, 1) * torch.randn(clean.shape, generator=g).to(device), sigma, y


def sample(config: Config, student: Denoiser, y: Tensor, shape: tuple[int, int, int], g: torch.Generator) -> Tensor:
    """The student's images of classes y, in [-1, 1]."""
    return edm.sample(student, y, shape, steps=config.sampling_steps, generator=g, sigma_max=config.sigma_max)


def pack(x: Tensor, own: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    """Queries as rows [Q, 2·D + 2]: noisy image, the student's answer, level, class."""
    return torch.cat([x.flatten(1), own.flatten(1), sigma[:, None], y[:, None].float()], dim=1)


def fit(student: Denoiser, config: Config, asked: list[Tensor], workspace: Workspace, index: int) -> None:
    """Trains the student, in place, on what was released so far: any number of passes is free."""
    x, sigma, y, target = asked
    g = workspace.generator("shards-fit", index)

    def loss() -> Tensor:
        rows = torch.randint(len(x), (config.batch,), generator=g)
        return weighted(student(x[rows], sigma[rows], y[rows]) - target[rows], sigma[rows], config.sigma_data)

    descend(student, loss, config.fit_steps, config.lr)


def weighted(error: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Mean squared error of denoised images over 1 / c_out² (Karras et al. 2022, Table 1): all levels count alike."""
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    return (weight * error.square().flatten(1).mean(dim=1)).mean()


def descend(model: Denoiser, loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    """Adam, its rate falling along half a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


class ShardTeacher:
    """Trains one shard's denoiser, from the shard and its own generator alone. Its model maps packed queries to pulls [Q, D]."""

    def __init__(self, config: Config, shape: tuple[int, int, int], n_classes: int) -> None:
        self.config, self.shape, self.n_classes = config, shape, n_classes

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        config = self.config
        teacher = network(config, self.shape, self.n_classes, generator).to(images.device)

        def loss() -> Tensor:
            rows = torch.randint(len(images), (config.batch,), generator=generator)
            uniform = torch.rand(config.batch, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            sigma = edm.noise_levels(uniform, 0.0, 1.2).to(images.device)
            noise = torch.randn(images[rows].shape, generator=generator).to(images.device)
            return edm.loss(teacher, images[rows], noise, sigma, labels[rows], config.sigma_data).mean()

        descend(teacher, loss, config.teacher_steps, config.lr)
        teacher.requires_grad_(False).eval()

        def pull(packed: Tensor) -> Tensor:
            x, own, sigma, y = packed.to(images.device).split(
                [math.prod(self.shape), math.prod(self.shape), 1, 1], dim=1
            )
            answer = teacher(x.view(-1, *self.shape), sigma[:, 0], y[:, 0].round().long())
            return answer.flatten(1) - own

        return pull
