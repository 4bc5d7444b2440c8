"""The small student that a diffusion teacher is distilled into: diffusers' UNet2DModel, used as its ConsistencyModelPipeline does.

Source: consistency models (Song et al. 2023), Appendix C, as diffusers' CMStochasticIterativeScheduler computes them. Nothing here is
private.
B images, C channels, S side, K classes, σ noise level.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

MISSING = "this needs diffusers: pip install 'dpdistill[diffusion]'"
SIDES = (8, 64)
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA, RHO = 0.002, 80.0, 0.5, 7.0
LEVELS = 40  # noise levels of the scheduler; n steps visit levels 0, LEVELS // n, 2·(LEVELS // n), …
GROUPS = 8  # of the norms
HEAD = 32  # channels of an attention head


def student_unet(image_shape: tuple[int, int, int], n_classes: int, *, width: int, generator: torch.Generator) -> Any:
    """Returns a UNet2DModel in training mode: two levels for sides up to 16, else three, with attention at the lowest.

    Args:
      image_shape: (C, S, S), S in 8 … 64 and divisible by 4, since the pipeline draws squares and a level halves the side.
      width: channels at full size where there are three levels, a multiple of 8; they double with every level.
      generator: of the weights, a CPU one. The global random state is left alone.

    Raises:
      ConfigError: another shape or width, or diffusers is not installed.
    """
    channels, side = check_shape(image_shape)
    if width < GROUPS or width % GROUPS:
        raise ConfigError(f"Expected a width that is a multiple of {GROUPS}, got {width}.")
    widths = (2 * width, 4 * width) if side <= 16 else (width, 2 * width, 4 * width)
    with torch.device("meta"):  # no weights yet: diffusers would draw them from the global random state
        unet = diffusers().UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            layers_per_block=1,
            norm_num_groups=GROUPS,
            attention_head_dim=HEAD,
            num_class_embeds=n_classes,
        )
    unet.to_empty(device="cpu")
    _init(unet, generator)
    return unet.train()


def check_shape(image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Returns (C, S). Raises ConfigError on a shape that no student can have."""
    channels, height, width = image_shape
    if height != width or height % 4 or not SIDES[0] <= height <= SIDES[1]:
        near = min(max(SIDES[0], 4 * round(max(height, width) / 4)), SIDES[1])
        raise ConfigError(
            f"a diffusion student draws squares whose side is in {SIDES[0]} to {SIDES[1]} and divisible by 4, "
            f"not {height}x{width}; see --resize {near}"
        )
    return channels, height


def check(image_shape: tuple[int, int, int]) -> None:
    """Raises ConfigError where no student can be made, without the seconds that importing diffusers takes: before anything is spent."""
    check_shape(image_shape)
    if importlib.util.find_spec("diffusers") is None:
        raise ConfigError(MISSING)


def diffusers() -> Any:
    """The module diffusers. Raises ConfigError where it is not installed. Nothing here lets it look for files elsewhere."""
    try:
        import diffusers as module
    except ImportError:
        raise ConfigError(MISSING) from None
    return module


@torch.no_grad()
def _init(unet: nn.Module, generator: torch.Generator) -> None:
    """PyTorch's usual uniform weights from `generator`; a network that starts as c_skip·x, since its last layer is 0."""
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 0.0 if name == "conv_out" else module.weight[0].numel() ** -0.5
            for weight in (module.weight, module.bias):
                if weight is not None:
                    weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * bound)
        elif isinstance(module, nn.GroupNorm):
            module.weight.fill_(1)
            module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator))


def level(index: Tensor) -> Tensor:
    """Returns σ [B] of the scheduler's levels 0 (σ_max) … LEVELS - 1 (σ_min); float64. Karras et al. (2022), Eq. 5."""
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return (high + index.double() / (LEVELS - 1) * (low - high)) ** RHO


def clean(unet: nn.Module, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    """Returns f(x, σ, y), the clean images [B, C, S, S] as the pipeline computes them, before it clips them to [-1, 1].

    Args:
      x: float32 [B, C, S, S], clean + σ · normal.
      sigma: [B].
      y: int64 [B] below K.
    """
    s = sigma.float().view(-1, 1, 1, 1)
    total = (s.square() + SIGMA_DATA**2).sqrt()
    output = unet(x / total, 250 * sigma.log(), class_labels=y, return_dict=False)[0]
    # Appendix C: at σ_min the image is returned as it is. c_out's denominator has σ, c_skip's σ - σ_min.
    skip = SIGMA_DATA**2 / ((s - SIGMA_MIN).square() + SIGMA_DATA**2)
    return skip * x + (s - SIGMA_MIN) * SIGMA_DATA / total * output.float()


def pipeline(unet: nn.Module) -> Any:
    """Returns the ConsistencyModelPipeline of a student: what a release holds. It shows no progress of its own."""
    module = diffusers()
    scheduler = module.CMStochasticIterativeScheduler(
        num_train_timesteps=LEVELS, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=SIGMA_DATA, rho=RHO
    )
    found = module.ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipe: Any, labels: Tensor, steps: int, generator: torch.Generator, batch: int = 256) -> Tensor:
    """Returns float32 images [B, C, S, S] in [-1, 1] of the classes `labels`, on the CPU.

    Args:
      pipe: from `pipeline`, or from diffusers' `from_pretrained`.
      steps: passes of the network for an image, 1 … LEVELS.
      generator: a CPU one; images depend on it, on `batch`, and on nothing else.
    """
    if not 1 <= steps <= LEVELS:
        raise ConfigError(f"Expected steps in 1 to {LEVELS}, got {steps}.")
    parts = [
        pipe(len(y), class_labels=y, num_inference_steps=steps, generator=generator, output_type="pt").images
        for y in labels.split(batch)
    ]
    return (2 * torch.cat(parts).cpu() - 1).clamp(-1, 1)
