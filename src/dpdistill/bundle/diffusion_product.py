"""A sampler as a release holds it: the folder that diffusers' `DiffusionPipeline.from_pretrained` opens. Needs neither torch nor diffusers.

K classes, C channels, S side.
"""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ReleaseError
from . import tensors

Weights = dict[str, NDArray[np.float32]]
Shapes = dict[str, tuple[int, ...]]

WRITTEN_FOR = "0.34.0"  # the oldest diffusers that the files are for; newer ones read them alike
MAX_LEVELS = 4  # of the U-Net
MAX_WIDTH = 2**12
_FIXED = {  # what all our students have in common, said in full: a later default cannot change a model
    "_class_name": "UNet2DModel",
    "_diffusers_version": WRITTEN_FOR,
    "act_fn": "silu",
    "add_attention": True,
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "norm_eps": 1e-05,
    "num_train_timesteps": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
_SCHEDULER = {  # the noise levels that every student is trained for
    "_class_name": "CMStochasticIterativeScheduler",
    "_diffusers_version": WRITTEN_FOR,
    "clip_denoised": True,
    "num_train_timesteps": 40,
    "rho": 7.0,
    "s_noise": 1.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
}
_INDEX = {
    "_class_name": "ConsistencyModelPipeline",
    "_diffusers_version": WRITTEN_FOR,
    "scheduler": ["diffusers", "CMStochasticIterativeScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


@dataclass(frozen=True, kw_only=True)
class DiffusionProduct:
    """A few-step diffusion model with its pipeline.

    Attributes:
      unet: the student's arrays, by their names in diffusers' UNet2DModel.
      config: side, channels, widths (channels per level, highest resolution first), groups, head (channels of an attention head).
      class_names: K names; the certificate holds them, since diffusers has no place for them.
    """

    KIND: ClassVar[str] = "diffusion"
    SIZES: ClassVar[dict[str, int]] = {
        "pipeline/model_index.json": 2**20,
        "pipeline/unet/config.json": 2**20,
        "pipeline/unet/diffusion_pytorch_model.safetensors": tensors.MAX_ARRAYS,
        "pipeline/scheduler/scheduler_config.json": 2**20,
    }

    unet: Weights
    config: dict[str, Any]
    class_names: tuple[str, ...]

    def files(self) -> dict[str, bytes]:
        """The four files. Raises ReleaseError where weights and config do not fit each other."""
        name = "pipeline/unet/diffusion_pytorch_model.safetensors"
        wanted = shapes(self.config, len(self.class_names))
        found = {key: array.shape for key, array in self.unet.items()}
        if found != wanted or any(array.dtype != np.float32 for array in self.unet.values()):
            raise ReleaseError(f"{name}: not the weights of its config")
        return {
            "pipeline/model_index.json": _text(_INDEX),
            "pipeline/unet/config.json": _text(self.unet_config),
            name: tensors.pack(dict(self.unet), {"format": "pt"}),
            "pipeline/scheduler/scheduler_config.json": _text(_SCHEDULER),
        }

    @property
    def unet_config(self) -> dict[str, Any]:
        """The full settings of diffusers' UNet2DModel."""
        config, levels = self.config, len(self.config["widths"])
        return {
            **_FIXED,
            "attention_head_dim": config["head"],
            "block_out_channels": list(config["widths"]),
            "down_block_types": ["DownBlock2D"] * levels,
            "in_channels": config["channels"],
            "norm_num_groups": config["groups"],
            "num_class_embeds": len(self.class_names),
            "out_channels": config["channels"],
            "sample_size": config["side"],
            "up_block_types": ["UpBlock2D"] * levels,
        }

    def describe(self) -> dict[str, Any]:
        """Size: parameters of the student."""
        return {"student_parameters": int(sum(array.size for array in self.unet.values()))}

    @classmethod
    def of(cls, pipe: Any, class_names: tuple[str, ...]) -> "DiffusionProduct":
        """The product of a pipeline in memory. Raises ReleaseError if another U-Net or scheduler is in it than the files can say."""
        settings = pipe.unet.config
        product = cls(
            unet={
                name: value.detach().cpu().float().contiguous().numpy()
                for name, value in pipe.unet.state_dict().items()
            },
            config=_own(settings),
            class_names=class_names,
        )
        for found, wanted in ((settings, product.unet_config), (pipe.scheduler.config, _SCHEDULER)):
            said = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
            if any(said[name] != value for name, value in wanted.items() if not name.startswith("_")):
                raise ReleaseError("pipeline: a model of another kind than a release holds")
        return product

    @classmethod
    def unpack(cls, files: dict[str, bytes], class_names: tuple[str, ...]) -> "DiffusionProduct":
        """Returns what `files` wrote. Raises ReleaseError on anything else."""
        name = "pipeline/unet/diffusion_pytorch_model.safetensors"
        try:
            config = _own(tensors.parse_json(files["pipeline/unet/config.json"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ReleaseError("pipeline/unet/config.json: not readable, or a field is missing") from None
        product = cls(unet=tensors.unpack(files[name], name)[0], config=config, class_names=class_names)
        for path, raw in product.files().items():
            if raw != files[path]:
                raise ReleaseError(f"{path}: not what the weights, the config and the certificate give")
        return product


def _own(settings: Any) -> dict[str, Any]:
    """Our few settings out of diffusers' many."""
    return {
        "side": settings["sample_size"],
        "channels": settings["in_channels"],
        "widths": list(settings["block_out_channels"]),
        "groups": settings["norm_num_groups"],
        "head": settings["attention_head_dim"],
    }


def _text(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def shapes(config: dict[str, Any], n_classes: int) -> Shapes:
    """Returns the name and shape of every array of a UNet2DModel with these settings, all others as in our students.

    Raises:
      ReleaseError: settings that no student has.
    """
    widths, numbers = config["widths"], [config[name] for name in ("side", "channels", "groups", "head")]
    whole = all(type(n) is int and 1 <= n <= MAX_WIDTH for n in (*numbers, *widths, n_classes))
    if not whole or not 1 <= len(widths) <= MAX_LEVELS or config["channels"] not in (1, 3):
        raise ReleaseError("pipeline/unet/config.json: not the settings of a student")
    if (
        config["side"] % 2 ** (len(widths) - 1)
        or any(n % config["groups"] for n in widths)
        or widths[-1] % config["head"]
    ):
        raise ReleaseError("pipeline/unet/config.json: sizes that do not fit each other")
    channels, first, last, emb = config["channels"], widths[0], widths[-1], 4 * widths[0]
    found: Shapes = {"class_embedding.weight": (n_classes, emb)}

    def layer(name: str, *weight: int) -> None:
        found[f"{name}.weight"] = weight
        found[f"{name}.bias"] = weight[:1]

    def block(name: str, n_in: int, n_out: int) -> None:
        layer(f"{name}.norm1", n_in)
        layer(f"{name}.conv1", n_out, n_in, 3, 3)
        layer(f"{name}.time_emb_proj", n_out, emb)
        layer(f"{name}.norm2", n_out)
        layer(f"{name}.conv2", n_out, n_out, 3, 3)
        if n_in != n_out:
            layer(f"{name}.conv_shortcut", n_out, n_in, 1, 1)

    layer("conv_in", first, channels, 3, 3)
    layer("time_embedding.linear_1", emb, first)
    layer("time_embedding.linear_2", emb, emb)
    skips, n = [first], first  # channels of the maps that the way up takes again, and of the current one
    for i, width in enumerate(widths):
        block(f"down_blocks.{i}.resnets.0", n, width)
        skips.append(n := width)
        if i + 1 < len(widths):
            layer(f"down_blocks.{i}.downsamplers.0.conv", n, n, 3, 3)
            skips.append(n)
    block("mid_block.resnets.0", last, last)
    layer("mid_block.attentions.0.group_norm", last)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        layer(f"mid_block.attentions.0.{part}", last, last)
    block("mid_block.resnets.1", last, last)
    for i, width in enumerate(reversed(widths)):
        for j in range(2):
            block(f"up_blocks.{i}.resnets.{j}", n + skips.pop(), width)
            n = width
        if i + 1 < len(widths):
            layer(f"up_blocks.{i}.upsamplers.0.conv", n, n, 3, 3)
    layer("conv_norm_out", first)
    layer("conv_out", channels, first, 3, 3)
    return found
