"""Pretraining of a denoiser on public images: ordinary steps, before the first private one. Nothing here is private.

Source: Ghalebikesabi et al. (2023), who fine-tune by DP-SGD what was trained on public images. What these show is of no account: each gets
a class at random, anew in every step, so that no class begins ahead of another.
B images of a step, K classes.
"""

import math

import torch

from ...errors import ConfigError
from ...models import edm
from ...models.denoiser import Denoiser
from ..base import Public, Workspace
from ..shared.checkpoints import restore, saved
from .private_denoiser import DenoiserConfig

BATCH, LR, EVERY = 128, 2e-3, 200  # B, Adam's rate at first, and steps between checkpoints


def check(config: DenoiserConfig, public: Public) -> None:
    """Raises ConfigError where a person asks for it and gave no images to pretrain on: those that we make up are like nobody's."""
    if config.pretrain_steps and public.procedural is None:
        raise ConfigError("pretrain_steps needs public images: give --auxiliary, or leave pretrain_steps out")


def pretrain(model: Denoiser, config: DenoiserConfig, public: Public, workspace: Workspace) -> None:
    """Trains the model, in place, on the auxiliary images, as long as `config` asks. A stopped run goes on with the same bytes."""
    steps = config.pretrain_steps
    if not steps:
        return
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    modules, optimizers = {"denoiser": model}, {"denoiser": optimizer}
    start = restore(workspace.load("pretraining"), modules, optimizers)
    for step in workspace.track(range(start, steps), "pretraining on public images"):
        g = workspace.generator("pretraining", step)
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / steps)) / 2
        x = public.auxiliary[torch.randint(len(public.auxiliary), (BATCH,), generator=g)]
        y = torch.randint(public.n_classes + 1, (BATCH,), generator=g)  # K is "any"
        uniform = torch.rand(BATCH, generator=g, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        level, noise = edm.noise_levels(uniform, config.p_mean, config.p_std), torch.randn(x.shape, generator=g)
        given = (value.to(workspace.device) for value in (x, noise, level, y))
        loss = edm.loss(model, *given, config.sigma_data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            workspace.save("pretraining", saved(step + 1, modules, optimizers))
