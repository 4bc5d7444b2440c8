"""`joint` (thin first version; being replaced)."""

from dataclasses import dataclass

import torch

from ..mechanisms import PrivateData
from ..models.convnet import ConvNet
from ..privacy import GaussianSum, Planned
from .base import Public, Synthetic, Workspace


@dataclass(frozen=True, kw_only=True)
class Config:
    per_class: int = 10
    networks: int = 3
    width: int = 32
    dims: int = 200
    steps: int = 200
    lr: float = 0.05


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    return [
        Planned(
            GaussianSum(
                name="joint", dim=config.dims + 1, n_classes=public.n_classes, noise_multiplier=noise_multiplier
            )
        )
    ]


def run(
    config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace
) -> Synthetic:
    nets = []
    for i in range(config.networks):
        net = ConvNet(public.image_shape, public.n_classes, width=config.width)
        net.init_(workspace.generator("net", i))
        nets.append(net.requires_grad_(False))

    def embed(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([net.embed(x) for net in nets], 1)

    aux = torch.cat([embed(x) for x in public.auxiliary[:2000].split(256)])
    mean = aux.mean(0)
    _, s, v = torch.linalg.svd(aux - mean, full_matrices=False)
    basis = v[: config.dims].T
    scale = float(((aux - mean) @ basis).norm(dim=1).quantile(0.75))

    def features(x: torch.Tensor) -> torch.Tensor:
        f = (embed(x) - mean) @ basis / scale
        pad = torch.zeros(len(f), config.dims - f.shape[1])
        return torch.cat([f, pad], 1)

    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([features(x), torch.full((len(x), 1), 0.2)], 1)

    with workspace.passing("private pass") as progress:
        total = private.release(plan[0].query, fn, progress=progress)
    target = total[:, :-1] / (total[:, -1:] / 0.2).clamp_min(10)

    k, m = public.n_classes, config.per_class
    generator = workspace.generator("start")
    images = (0.3 * torch.randn(k * m, *public.image_shape, generator=generator)).requires_grad_()
    opt = torch.optim.Adam([images], lr=config.lr)
    for _ in workspace.track(range(config.steps), "optimising images"):
        opt.zero_grad()
        f = features(images).view(k, m, -1).mean(1)
        loss = ((f - target) ** 2).sum()
        loss.backward()
        opt.step()
        with torch.no_grad():
            images.clamp_(-1, 1)
    return Synthetic(images=images.detach(), labels=torch.arange(k).repeat_interleave(m))
