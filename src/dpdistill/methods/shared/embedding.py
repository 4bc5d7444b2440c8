"""Mean random Fourier features of each class, from one release, and a generator fitted to them: DP-MERF's way from records to images.

Source: Harder, Adamczewski & Park (2021), "DP-MERF: Differentially Private Mean Embeddings with Random Features".
Private: one full-batch sum by class. The generator is fitted to the released sums, with no further look.
Proof: docs/privacy/gaussian_sum.md, once.
F n_frequencies, l length_scale, K classes, D pixels, B images per class and step, M images per class.

Otherwise than the paper: class counts are private, so each record's vector carries one more coordinate, `count_share`,
whose released sum counts the records; the kernel's length scale comes from public images, not from the private
ones; the generator has no batch statistics.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...mechanisms import PrivateData
from ...models.generator import Generator
from ...models.precision import autocast
from ...privacy import GaussianSum, Planned
from ..base import Public, Synthetic, Workspace
from .bounds import NORMS, RATES, check_bounds
from .checkpoints import restore, saved


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Public settings; the defaults are near the paper's for MNIST.

    Attributes:
      n_frequencies: F; the embedding has 2·F coordinates, a cosine and a sine each.
      length_scale: l of the Gaussian kernel, in units of pixels in [-1, 1]; None is the median distance between
        auxiliary images.
      count_share: coordinate that counts records; the embedding is scaled to keep the vector's norm 1.
      steps: of Adam on the generator.
      at_once: frequencies that a step of the fit looks at, in turn; 0 is all of them. Each is as random as any other, so a part of them
        says the same of a generator, with more spread, at a part of the cost.
      batch: B, generated images per class and step.
      latent, width: of the generator.
      bf16: fit the generator in bfloat16 where the device is quick in it.
      checkpoint_steps: steps between checkpoints; does not change the result.
    """

    n_frequencies: int = 5000
    length_scale: float | None = None
    count_share: float = 0.2
    steps: int = 2000
    at_once: int = 0
    batch: int = 50
    lr: float = 1e-3
    latent: int = 10
    width: int = 64
    bf16: bool = False
    checkpoint_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("n_frequencies", "steps", "batch", "latent", "width", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        if self.at_once < 0:
            raise ConfigError(f"Expected at_once of 0 (all frequencies) or more, got {self.at_once}.")
        if not (0 < self.count_share < 1):
            raise ConfigError(f"Expected count_share in (0, 1), got {self.count_share}.")
        check_bounds(self, NORMS, "length_scale")
        check_bounds(self, RATES, "lr")


def planned(name: str, config: EmbeddingConfig, public: Public, noise_multiplier: float) -> Planned:
    """The one release that `fit` asks for."""
    query = GaussianSum(
        name=f"{name}-embedding",
        dim=2 * config.n_frequencies + 1,
        n_classes=public.n_classes,
        noise_multiplier=noise_multiplier,
    )
    return Planned(query)


def median_distance(images: Tensor, generator: torch.Generator) -> float:
    """Returns the median distance between public images, from 500 of them."""
    chosen = images[torch.randperm(len(images), generator=generator)[:500]].flatten(1)
    return max(float(torch.pdist(chosen).median()), 1e-3) if len(chosen) > 1 else math.sqrt(chosen.shape[1])


def embedding(x_BCHW: Tensor, frequencies_DF: Tensor) -> Tensor:
    """Returns sqrt(1/F)·[cos(xw), sin(xw)], [B, 2F], of norm exactly 1: an approximate Gaussian kernel mean map."""
    phase = x_BCHW.flatten(1) @ frequencies_DF
    return torch.cat([phase.cos(), phase.sin()], dim=1) / frequencies_DF.shape[1] ** 0.5


def parted(embedding_BD: Tensor, frequencies_DF: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Returns embeddings by `size` frequencies each, with those frequencies: all of F, once."""
    f = frequencies_DF.shape[1]
    halves = (half.split(size, dim=1) for half in embedding_BD.split(f, dim=1))
    some = frequencies_DF.split(size, dim=1)
    return [
        (torch.cat(both, dim=1) * math.sqrt(f / w.shape[1]), w.contiguous())
        for *both, w in zip(*halves, some, strict=True)
    ]


def fit(
    name: str,
    config: EmbeddingConfig,
    query: GaussianSum,
    public: Public,
    private: PrivateData,
    workspace: Workspace,
) -> Generator:
    """Asks for the release and fits a generator to it.

    Args:
      name: of what is kept in the workspace.
    """
    device, generator = workspace.device, workspace.generator(f"{name}-kernel")
    length_scale = config.length_scale or median_distance(public.auxiliary, generator)
    n_pixels = math.prod(public.image_shape)
    frequencies = (torch.randn(n_pixels, config.n_frequencies, generator=generator) / length_scale).to(device)
    share = config.count_share
    rest = math.sqrt(1 - share**2)

    def vector(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([rest * embedding(x, frequencies), x.new_full((len(x), 1), share)], dim=1)

    with workspace.passing("embedding the records") as progress:
        total = private.release(query, vector, progress=progress).to(device)  # private
    counts = (total[:, -1:] / share).clamp_min(1.0)  # released: its noise is sigma/share records
    target = total[:, :-1] / (rest * counts)
    # A class of which too little is known would only teach noise: weight by its size, as the paper's class weights do.
    return _matched(name, config, public, target, counts / counts.sum(), frequencies, workspace)


def _matched(
    name: str,
    config: EmbeddingConfig,
    public: Public,
    target_KD: Tensor,
    weight_K1: Tensor,
    frequencies: Tensor,
    workspace: Workspace,
) -> Generator:
    """Post-processing: Adam on Σ_k weight_k·‖target_k - mean embedding of generated images of class k‖²."""
    k, device = public.n_classes, workspace.device
    model = Generator(
        public.image_shape, k, latent=config.latent, width=config.width, generator=workspace.generator(f"{name}-model")
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    modules, optimizers = {"generator": model}, {"generator": optimizer}
    start = restore(workspace.load(name), modules, optimizers)
    classes = F.one_hot(torch.arange(k).repeat_interleave(config.batch), k).float().to(device)
    parts = parted(target_KD, frequencies, config.at_once or config.n_frequencies)
    for step in workspace.track(range(start, config.steps), "fitting the generator"):
        z = torch.randn(len(classes), config.latent, generator=workspace.generator(f"{name}-step", step)).to(device)
        wanted, some = parts[step % len(parts)]
        with autocast(z.device, config.bf16):
            made = model(z, classes)
        mean = embedding(made.float(), some).view(k, config.batch, -1).mean(dim=1)
        loss = (weight_K1 * (wanted - mean).square()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == config.steps:
            workspace.save(name, saved(step + 1, modules, optimizers))
    return model.eval()


@torch.no_grad()
def draw(model: Generator, config: EmbeddingConfig, labels: Tensor, n_classes: int, workspace: Workspace) -> Synthetic:
    """Images of these classes, int64 [N], on the CPU."""
    parts = []
    for index, y in enumerate(labels.split(1000)):
        z = torch.randn(len(y), config.latent, generator=workspace.generator("embedding-draw", index))
        parts.append(model(z.to(workspace.device), F.one_hot(y, n_classes).float().to(workspace.device)).cpu())
    return Synthetic(images=torch.cat(parts), labels=labels)
