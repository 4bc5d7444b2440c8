"""The few-step student that a diffusion teacher is distilled into: diffusers' DiTTransformer2DModel, used as its DiTPipeline does.

Four tokens, each a quarter of the image, and one decoder without weights of its own. Turning noise into an image is a map of the whole
square: convolutions, which do the same everywhere, learnt it ten times slower (docs/decisions/diffusion.md). Nothing here is private.
Source: Peebles & Xie (2023) for the network; Song et al. (2021), DDIM, as diffusers' DDIMScheduler computes it.
B images, N images, C channels, H, W size, S side of the canvas, K classes, t noise level.
"""

import importlib.util
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .axes import principal_axes

MISSING = "this needs diffusers: pip install 'dpdistill[diffusion]'"
SIDES = (8, 64)
SIGMA = (0.25, 1.0, 4.0, 80.0)  # noise of level t, in units of clean images
LEVELS = len(SIGMA)
STEPS = (1, 2, 4)  # passes that visit levels 3; 3 and 1; all
DEPTH, HEADS = 4, 4
PATCHES = 2  # along a side
FIRST = 3.0  # length of the first layer's strongest direction
BOUND = math.tanh(1 / 3)  # diffusers' AutoencoderTiny passes 3·tanh(x / 3) on


def student(
    image_shape: tuple[int, int, int], n_classes: int, *, width: int, images: Tensor, generator: torch.Generator
) -> Any:
    """Returns a DiTTransformer2DModel in training mode, which answers 0.

    Args:
      image_shape: (C, H, W), sides of 8 to 64.
      width: of a token, a multiple of 4.
      images: [N, C, S, S], on the canvas; the first layer looks along the principal directions of their quarters, the strongest most.
      generator: of the other weights, a CPU one. The global random state is left alone.

    Raises:
      ConfigError: another shape or width, or diffusers is not installed.
    """
    channels, side, _ = canvas(image_shape)
    if width < HEADS or width % HEADS:
        raise ConfigError(f"Expected a width that is a multiple of {HEADS}, got {width}.")
    patch = side // PATCHES
    with torch.device("meta"):  # no weights yet: diffusers would draw them from the global random state
        found = diffusers().DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=width // HEADS,
            in_channels=channels,
            out_channels=channels,
            num_layers=DEPTH,
            sample_size=side,
            patch_size=patch,
            num_embeds_ada_norm=n_classes,
        )
    model = whole(found)
    _init(model, generator)
    with torch.no_grad():
        parts = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [N, C, 2, 2, patch, patch]
        parts_ND = parts.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * patch * patch)
        parts_ND = parts_ND - parts_ND.mean(dim=0)
        directions, variances = principal_axes(parts_ND, width)
        rows = (directions * (variances / variances[0].clamp_min(1e-12)).sqrt() * FIRST).T
        first = model.pos_embed.proj
        first.weight[: len(rows)] = rows.view(-1, *first.weight.shape[1:])
        first.bias.zero_()
    return model.train()


def whole(model: Any) -> Any:
    """Gives a model from the meta device what is no weight: positions, and no random loss of labels in training."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    model.to_empty(device="cpu")
    table = get_2d_sincos_pos_embed(
        model.inner_dim, PATCHES, base_size=PATCHES, interpolation_scale=1, output_type="pt"
    )
    model.pos_embed.pos_embed = table.float().unsqueeze(0)
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0
    return model


def canvas(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns (C, S, S) of the square on which images (C, H, W) are drawn: DiTPipeline knows no other form, and quarters that are halved
    want a side that 4 divides. Raises ConfigError on images that no student draws."""
    channels, *sides = image_shape
    if not SIDES[0] <= min(sides) <= max(sides) <= SIDES[1]:
        raise ConfigError(
            f"a diffusion student draws images with sides of {SIDES[0]} to {SIDES[1]} pixels, not {sides[0]}x{sides[1]}; see --resize"
        )
    side = -(-max(sides) // 4) * 4
    return channels, side, side


def padded(images: Tensor) -> Tensor:
    """Returns images [N, C, H, W] on their canvas, [N, C, S, S]: at the upper left; below and at the right their edges go on."""
    _, channels, height, width = images.shape
    side = canvas((channels, height, width))[1]
    return F.pad(images, (0, side - width, 0, side - height), mode="replicate")


def cropped(images: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Returns [N, C, H, W] of images on their canvas, [N, C, S, S]."""
    return images[:, :, : image_shape[1], : image_shape[2]]


def check(image_shape: tuple[int, int, int]) -> None:
    """Raises ConfigError where no student can be made, without the seconds that importing diffusers takes: before anything is spent."""
    canvas(image_shape)
    if importlib.util.find_spec("diffusers") is None:
        raise ConfigError(MISSING)


def check_steps(steps: int) -> None:
    """Raises ConfigError on a number of steps that a student cannot take."""
    if steps not in STEPS:
        raise ConfigError(f"Expected steps of 1, 2 or 4, got {steps}.")


def diffusers() -> Any:
    """The module diffusers. Raises ConfigError where it is not installed. Nothing here lets it look for files elsewhere."""
    try:
        import diffusers as module
    except ImportError:
        raise ConfigError(MISSING) from None
    return module


@torch.no_grad()
def _init(model: nn.Module, generator: torch.Generator) -> None:
    """PyTorch's usual uniform weights from `generator`; blocks that pass on what they get, and a last layer of 0."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            silent = name.endswith("norm1.linear") or name.startswith("proj_out")
            bound = 0.0 if silent else module.weight[0].numel() ** -0.5
            for weight in (module.weight, module.bias):
                if weight is not None:
                    weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * bound)
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator))


def noisy(x: Tensor, t: Tensor, normal: Tensor) -> Tensor:
    """Returns what the student is asked about, (x + σ_t · normal) / √(1 + σ_t²). All [B, C, S, S], t int64 [B]."""
    sigma = torch.tensor(SIGMA)[t].view(-1, 1, 1, 1)
    return (x + sigma * normal) / (1 + sigma.square()).sqrt()


def clean(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Returns the model's answer [B, C, S, S], before the scheduler clips it to [-1, 1].

    Args:
      x: float32 [B, C, S, S], from `noisy`.
      t: int64 [B] below LEVELS.
      y: int64 [B] below K.
    """
    answer: Tensor = model(x, timestep=t, class_labels=y, return_dict=False)[0]
    return answer.float()


def decoded(x: Tensor) -> Tensor:
    """Returns the images in [-1, 1] that the pipeline shows for answers x: clipped, and bent a little by its decoder (by 0.014 at most)."""
    return torch.tanh(x.clamp(-1, 1) / 3) / BOUND


def encoded(images: Tensor) -> Tensor:
    """Returns the answers in [-1, 1] for which the pipeline shows `images`."""
    return 3 * torch.atanh(images.clamp(-1, 1) * BOUND)


def scheduler() -> Any:
    """DDIM over our levels, for a model that answers with clean images."""
    kept = [1 / (1 + sigma**2) for sigma in SIGMA]
    return diffusers().DDIMScheduler(
        num_train_timesteps=LEVELS,
        trained_betas=[1 - kept[0], *(1 - after / before for before, after in itertools.pairwise(kept))],
        prediction_type="sample",
        timestep_spacing="trailing",
    )


@torch.no_grad()
def decoder(channels: int) -> Any:
    """An AutoencoderTiny that does nothing but what its class does to everything, `decoded`: the pipeline must have one."""
    with torch.device("meta"):  # nothing is drawn from the global random state
        model = diffusers().AutoencoderTiny(
            in_channels=channels,
            out_channels=channels,
            latent_channels=channels,
            encoder_block_out_channels=(2 * channels,),
            decoder_block_out_channels=(2 * channels,),
            num_encoder_blocks=(0,),
            num_decoder_blocks=(0,),
        )
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.zero_()
    into, _, out = model.decoder.layers  # a rectifier lies between
    first, last = model.encoder.layers
    for c in range(channels):
        into.weight[2 * c, c, 1, 1], into.weight[2 * c + 1, c, 1, 1] = 1, -1
        out.weight[c, 2 * c, 1, 1], out.weight[c, 2 * c + 1, 1, 1] = 1 / (6 * BOUND), -1 / (6 * BOUND)
        out.bias[c] = 0.5
        first.weight[2 * c, c, 1, 1] = 2
        last.weight[c, 2 * c, 1, 1], last.bias[c] = 1, -1
    return model.eval()


def pipeline(model: Any, class_names: tuple[str, ...] = ()) -> Any:
    """Returns the DiTPipeline of a student: what a release holds. It shows no progress of its own."""
    found = diffusers().DiTPipeline(
        transformer=model,
        vae=decoder(model.config.in_channels),
        scheduler=scheduler(),
        id2label=dict(enumerate(class_names)),  # save_pretrained loses them; a release keeps them
    )
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipe: Any, labels: Tensor, steps: int, generator: torch.Generator, batch: int = 256) -> Tensor:
    """Returns float32 images [B, C, S, S] in [-1, 1] of the classes `labels`, on the CPU.

    Args:
      pipe: from `pipeline`, or from diffusers' `from_pretrained`.
      steps: passes of the network for an image, see STEPS.
      generator: a CPU one; images depend on it, on `batch`, and on nothing else.

    Raises:
      ConfigError: another number of steps.
    """
    check_steps(steps)
    parts = []
    for y in labels.split(batch):
        made = pipe(
            class_labels=y.tolist(),
            guidance_scale=1.0,  # the pipeline's own default asks for a class "any", which students do not know
            num_inference_steps=steps,
            generator=generator,
            output_type="np",
        )
        parts.append(torch.from_numpy(made.images).permute(0, 3, 1, 2))
    return (2 * torch.cat(parts).float() - 1).clamp(-1, 1)
