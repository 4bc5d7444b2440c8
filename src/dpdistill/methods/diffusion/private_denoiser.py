"""The private diffusion teacher: a denoiser trained by DP-SGD, from scratch or as the correction of one that is released already.

Source: Dockhorn et al. (2023), "Differentially Private Diffusion Models", for DP-SGD with noise multiplicity; Gong et al. (2025),
DP-FETA, for the warm start.
Private: one Poisson-sampled sum of clipped per-record gradients per step. Proof: docs/privacy/gaussian_sum.md, composed `steps` times.

Why a record's vector is its own: it is a function of the record, of the released weights, and of public randomness of this step. Its
noise draws, noise levels and dropped labels are looked up in public tables by a hash of the record itself, so neither its place nor the
other records enter, and adding or removing a record leaves all other vectors as they are. The mean over K draws is taken inside the
record's loss, before clipping to C, so K costs nothing. The door draws the Poisson sample from a secret stream of its own, which the
public tables know nothing of: that is what amplification by sampling asks for.

T steps, q sampling rate, C clip_norm, K multiplicity, P parameters, B records (in `_draws` and below), D pixels of a record.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ...errors import ConfigError
from ...mechanisms import PrivateData
from ...models import edm
from ...models.denoiser import Denoiser, check_patch, check_sizes
from ...privacy import GaussianSum, Planned
from ..base import Public, Workspace
from ..shared.bounds import NORMS, RATES, SCALES, check_bounds
from ..shared.checkpoints import resume

TABLE = 2**18  # normal numbers drawn for a step: two draws of 784 share some with probability 0.6 %
# How far Adam may take a weight at random, lr · √steps: from 1 on the attention of most networks becomes so steep that rounding moves a
# record's gradient, and the door refuses it, when all steps are paid for.
WALK = 0.5
SMALL_SIDE = 12  # up to here, one patch covers the image
CHUNK_PIXELS = 2**14  # that pass through the network at once, for each draw
CHUNK_MEMORY = 2**29  # bytes of gradients that are taken at once


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Public settings.

    Memory: the door's micro-batch takes 12·P bytes a record (its gradient, then the same in whole numbers) and at most 2 GiB
    (`mechanisms.private.MEMORY`), 0.5 GiB with the defaults, where P = 158,897. Beside it `chunk` gradients, of 0.5 GiB at most where it is
    "auto", and about 1 MiB for each of the `chunk` · `multiplicity` images of 28x28 that pass through the network at once: 64 MiB. The
    door computes whole micro-batches, padded ones too: an `expected_batch` a little below a multiple of 256 wastes least.

    Attributes:
      expected_records: public guess of the number of records, all classes together; never taken from the data.
      expected_batch: B; q is expected_batch over expected_records, and the divisor of every noisy sum.
      steps: T, releases.
      multiplicity: K, noise draws averaged within a record's loss.
      clip_norm: C of a record's gradient.
      lr: of Adam on the noisy sums; falls to 0 along half a cosine.
      ema: decay of the averaged weights, which are what `train` returns; reached slowly, as (1 + t)/(10 + t).
      patch, width, depth, heads: of the network; None is by the size of the images.
      sigma_data: standard deviation of clean pixels about 0.
      p_mean, p_std: of the logarithm of the noise levels that are trained on.
      label_dropout: share of the draws whose class is "any".
      pretrain_steps: ordinary steps on the auxiliary images that a person gave, before the private ones; 0 is none.
      chunk: records whose gradients are taken at once. "auto" is 16 for images of 28x28 and larger, more for smaller ones (of 8x8 all 256
        of a micro-batch: a third of the time of 16), and fewer where P is beyond 8 million.
      checkpoint_steps: steps between checkpoints; does not change the result.
    """

    expected_records: int
    expected_batch: int = 400
    steps: int = 150
    multiplicity: int = 4
    clip_norm: float = 1.0
    lr: float = 3e-3
    ema: float = 0.98
    patch: int | None = None
    width: int | None = None
    depth: int = 3
    heads: int = 4
    sigma_data: float = 0.5
    p_mean: float = -1.2
    p_std: float = 1.2
    label_dropout: float = 0.1
    pretrain_steps: int = 0
    chunk: int | Literal["auto"] = "auto"
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        whole = ("expected_records", "expected_batch", "steps", "multiplicity", "depth", "heads")
        for name in (*whole, "chunk", "checkpoint_steps", "patch", "width"):
            value = getattr(self, name)
            if value not in (None, "auto") and value < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {value}.")
        if self.pretrain_steps < 0:
            raise ConfigError(f"Expected pretrain_steps of at least 0, got {self.pretrain_steps}.")
        check_bounds(self, NORMS, "clip_norm")
        check_bounds(self, RATES, "lr")
        if self.lr * math.sqrt(self.steps) > WALK:
            raise ConfigError(f"Expected lr · √steps of at most {WALK}, got lr={self.lr} and steps={self.steps}.")
        check_bounds(self, SCALES, "sigma_data")
        check_bounds(self, (-5.0, 5.0), "p_mean")
        check_bounds(self, (1e-3, 3.0), "p_std")
        check_sizes(width=self.width, depth=self.depth, heads=self.heads)
        if not (0 <= self.ema < 1 and 0 <= self.label_dropout <= 1):
            raise ConfigError("Expected ema in [0, 1) and label_dropout in [0, 1].")

    @property
    def rate(self) -> float:
        """q, from public numbers only."""
        return min(1.0, self.expected_batch / self.expected_records)


def network(
    config: DenoiserConfig, public: Public, generator: torch.Generator, base: nn.Module | None = None
) -> Denoiser:
    """Returns the denoiser with fresh weights, correcting `base` where there is one."""
    check_patch(config.patch, public.image_shape)
    side = max(public.image_shape[1:])
    patch = config.patch or (side if side <= SMALL_SIDE else min(8, -(-side // 4)))
    width = config.width or config.heads * -(-(32 if patch >= side else 64) // config.heads)
    return Denoiser(
        public.image_shape,
        public.n_classes,
        patch=patch,
        width=width,
        depth=config.depth,
        heads=config.heads,
        sigma_data=config.sigma_data,
        generator=generator,
        base=base,
    )


def planned(config: DenoiserConfig, public: Public, noise_multiplier: float) -> Planned:
    """T sums of clipped gradients, over all classes."""
    model = network(config, public, torch.Generator())
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    query = GaussianSum(
        name="denoiser-gradient",
        dim=n_parameters,
        noise_multiplier=noise_multiplier,
        clip_norm=config.clip_norm,
        sampling_prob=config.rate,
        grid_bits=min(24, max(20, math.ceil(math.log(n_parameters, 4)) + 4)),
    )
    return Planned(query, config.steps)


def train(
    model: Denoiser,
    config: DenoiserConfig,
    public: Public,
    private: PrivateData,
    planned: Planned,
    workspace: Workspace,
) -> Denoiser:
    """DP-SGD from the weights that `model` has; returns it with the averaged weights, which are as released as the sums are."""
    fresh = _fresh(model)
    start, state = resume(workspace.load("denoiser"), {**fresh, "mean": fresh["flat"]})
    private.check(planned.query, record_gradient(model, config, workspace.generator("denoiser-noise", 0)))
    held = private.reserve(planned.query, planned.count)
    for step in workspace.track(range(start, config.steps), "DP-SGD"):
        _write(model, state["flat"])
        gradient = record_gradient(model, config, workspace.generator("denoiser-noise", step))
        total = private.release_reserved(held, step, gradient)  # private
        # By a public constant, never by the realised batch.
        mean = total[0].to(workspace.device) / config.expected_batch
        state = {**state, **_adam(state, mean, _falling(config.lr, step, config.steps), step)}
        state["mean"] = state["flat"].lerp(state["mean"], min(config.ema, (1 + step) / (10 + step)))
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == config.steps:
            workspace.save("denoiser", {**state, "step": torch.tensor(step + 1)})
    _write(model, state["mean"])
    return model.eval()


def record_gradient(
    model: Denoiser, config: DenoiserConfig, generator: torch.Generator
) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns fn(x [B, C, H, W], y [B]) -> [B, P]: gradients of each record's loss, the mean over K noise draws of its own.

    Args:
      generator: public, of this step; the draws are made here, so that calls of `fn` agree.
    """
    draws = _draws(config, model, generator)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    n_parameters = sum(value.numel() for value in parameters.values())
    chunk = _chunk(model, n_parameters) if config.chunk == "auto" else config.chunk

    def one(weights: dict[str, Tensor], x: Tensor, y_K: Tensor, noise_K: Tensor, sigma_K: Tensor) -> Tensor:
        def denoise(noisy: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
            return functional_call(model, weights, (noisy, sigma, y))  # type: ignore[no-any-return]

        return edm.loss(denoise, x[None], noise_K, sigma_K, y_K, model.sigma_data).mean()

    gradients = vmap(grad(one), in_dims=(None, 0, 0, 0, 0))

    def fn(x: Tensor, y: Tensor) -> Tensor:
        out = x.new_empty(
            len(x), n_parameters
        )  # filled in place: touching fresh memory twice took a quarter of the time
        for start in range(0, len(x), chunk):
            some = slice(start, start + chunk)
            by_name = gradients(parameters, x[some], *draws(x[some], y[some]))
            torch.cat([by_name[name].flatten(1) for name in parameters], dim=1, out=out[some])
        return out

    return fn


def _chunk(model: Denoiser, n_parameters: int) -> int:
    """What a `chunk` of "auto" is: a power of two, so that it divides the door's micro-batch."""
    passing = max(16, CHUNK_PIXELS // math.prod(model.image_shape))
    fitting = max(1, CHUNK_MEMORY // (4 * n_parameters))
    return 1 << (min(passing, fitting).bit_length() - 1)


def _draws(
    config: DenoiserConfig, model: Denoiser, generator: torch.Generator
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Returns a function from records [B, C, H, W], [B] to their classes [B, K], noise [B, K, C, H, W] and noise levels [B, K].

    A record's pixels and label, as whole numbers, times random 64-bit numbers, added up modulo 2⁶⁴: exact in any order, so the same
    wherever the record stands. The upper bits of such a hash are uniform and pairwise independent. Equal records get equal draws.
    """
    n_draws, n_pixels = config.multiplicity, math.prod(model.image_shape)
    device = model.place.device
    table = torch.randn(TABLE + n_pixels, generator=generator).to(device)
    factors = torch.randint(-(2**63), 2**63 - 1, (n_draws + 1, n_pixels + 1), generator=generator).to(device)

    def draws(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        record = torch.cat([(x.flatten(1) * 2**15).round().to(torch.int64), y[:, None] + 1], dim=1)
        hashes = torch.stack([(record * row).sum(dim=1) for row in factors], dim=1)  # [B, K + 1]
        high, low = (hashes >> 40) & (2**24 - 1), (hashes >> 16) & (2**24 - 1)
        noise = table.unfold(0, n_pixels, 1)[high[:, :-1] % TABLE].view(len(x), n_draws, *model.image_shape)
        # One level from each K-th of the distribution: less variance than K independent ones.
        uniform = (torch.arange(n_draws, device=x.device) + (high[:, -1:].double() + 0.5) / 2**24) / n_draws
        dropped = low[:, :-1] < config.label_dropout * 2**24
        classes = torch.where(dropped, model.n_classes, y[:, None])
        return classes, noise, edm.noise_levels(uniform, config.p_mean, config.p_std)

    return draws


def _fresh(model: Denoiser) -> dict[str, Tensor]:
    """Adam's state at step 0: weights [P] and moments [P]."""
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {"flat": flat, "first": torch.zeros_like(flat), "second": torch.zeros_like(flat)}


def _adam(state: dict[str, Tensor], gradient_P: Tensor, lr: float, step: int) -> dict[str, Tensor]:
    """One step of Adam (betas 0.9 and 0.999)."""
    first = 0.9 * state["first"] + 0.1 * gradient_P
    second = 0.999 * state["second"] + 0.001 * gradient_P.square()
    scale = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
    return {
        "flat": state["flat"] - lr / (1 - 0.9 ** (step + 1)) * first / scale,
        "first": first,
        "second": second,
    }


def _falling(lr: float, step: int, steps: int) -> float:
    """Half a cosine from lr to 0."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


def _write(model: Denoiser, flat_P: Tensor) -> None:
    """Copies a flat vector into the parameters, in order."""
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter, values in zip(parameters, flat_P.split_with_sizes([p.numel() for p in parameters]), strict=True):
            parameter.copy_(values.view_as(parameter))
