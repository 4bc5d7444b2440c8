"""A sampler as a release holds it: the folder that diffusers' `DiffusionPipeline.from_pretrained` opens. Needs neither torch nor diffusers.

K classes, C channels, S side.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ReleaseError
from . import tensors

Weights = dict[str, NDArray[np.float32]]
Shapes = dict[str, tuple[int, ...]]

WRITTEN_FOR = "0.34.0"  # the oldest diffusers that the files are for; newer ones read them alike
SIDES = (8, 64)
DEPTH, HEADS = 4, 4
PATCHES = 2  # along a side
TIMES = 256  # features of a noise level, in diffusers
MAX_WIDTH = 2**12
INDEX = "pipeline/model_index.json"
CONFIG = "pipeline/transformer/config.json"
WEIGHTS = "pipeline/transformer/diffusion_pytorch_model.safetensors"
_FIXED = {  # what all our students have in common, said in full: a later default cannot change a model
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": WRITTEN_FOR,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": HEADS,
    "num_layers": DEPTH,
    "upcast_attention": False,
}
_VAE = {  # of a decoder that does nothing but what its class does to everything
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": WRITTEN_FOR,
    "act_fn": "relu",
    "force_upcast": False,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [0],
    "num_encoder_blocks": [0],
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}
_SCHEDULER = {  # the noise levels that every student is trained for, see models/few_step.py
    "_class_name": "DDIMScheduler",
    "_diffusers_version": WRITTEN_FOR,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 4,
    "prediction_type": "sample",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "trailing",
    "trained_betas": [0.05882352941176472, 0.46875, 0.8823529411764706, 0.9973441649742227],
}
_INDEX = {
    "_class_name": "DiTPipeline",
    "_diffusers_version": WRITTEN_FOR,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "transformer": ["diffusers", "DiTTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
}


@dataclass(frozen=True, kw_only=True)
class DiffusionProduct:
    """A few-step diffusion model with its pipeline.

    Attributes:
      transformer: the student's arrays, by their names in diffusers' DiTTransformer2DModel.
      config: side, channels, width (of a token).
      class_names: K names.
    """

    KIND: ClassVar[str] = "diffusion"
    SIZES: ClassVar[dict[str, int]] = {
        INDEX: 2**22,  # it names the classes
        CONFIG: 2**20,
        WEIGHTS: tensors.MAX_ARRAYS,
        "pipeline/vae/config.json": 2**20,
        "pipeline/vae/diffusion_pytorch_model.safetensors": 2**20,
        "pipeline/scheduler/scheduler_config.json": 2**20,
    }

    transformer: Weights
    config: dict[str, Any]
    class_names: tuple[str, ...]

    def files(self) -> dict[str, bytes]:
        """The six files. Raises ReleaseError where weights and config do not fit each other."""
        wanted = shapes(self.config, len(self.class_names))
        found = {key: array.shape for key, array in self.transformer.items()}
        if found != wanted or any(array.dtype != np.float32 for array in self.transformer.values()):
            raise ReleaseError(f"{WEIGHTS}: not the weights of its config")
        channels = self.config["channels"]
        return {
            INDEX: _text({**_INDEX, "id2label": _labels(self.class_names)}),
            CONFIG: _text(self.transformer_config),
            WEIGHTS: tensors.pack(dict(self.transformer), {"format": "pt"}),
            "pipeline/vae/config.json": _text(_vae_config(channels)),
            "pipeline/vae/diffusion_pytorch_model.safetensors": tensors.pack(dict(_vae(channels)), {"format": "pt"}),
            "pipeline/scheduler/scheduler_config.json": _text(_SCHEDULER),
        }

    @property
    def transformer_config(self) -> dict[str, Any]:
        """The full settings of diffusers' DiTTransformer2DModel."""
        config = self.config
        return {
            **_FIXED,
            "attention_head_dim": config["width"] // HEADS,
            "in_channels": config["channels"],
            "num_embeds_ada_norm": len(self.class_names),
            "out_channels": config["channels"],
            "patch_size": config["side"] // PATCHES,
            "sample_size": config["side"],
        }

    def fits(self, image_shape: tuple[int, ...]) -> bool:
        """Whether it draws images [C, H, W], on the smallest square for them whose side 4 divides."""
        channels, *sides = image_shape
        return (channels, side_for(max(sides))) == (self.config["channels"], self.config["side"])

    def describe(self) -> dict[str, Any]:
        """Size: parameters of the student."""
        return {"student_parameters": int(sum(array.size for array in self.transformer.values()))}

    @classmethod
    def of(cls, pipe: Any, class_names: tuple[str, ...]) -> "DiffusionProduct":
        """The product of a DiTPipeline in memory. Raises ReleaseError if something else is in it than the files can say."""
        settings = pipe.transformer.config
        product = cls(transformer=_arrays(pipe.transformer), config=_own(settings), class_names=class_names)
        channels = product.config["channels"]
        held = (
            (settings, product.transformer_config),
            (pipe.vae.config, _vae_config(channels)),
            (pipe.scheduler.config, _SCHEDULER),
        )
        other = tensors.pack(dict(_arrays(pipe.vae)), {}) != tensors.pack(dict(_vae(channels)), {})
        for found, wanted in held:
            said = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
            other |= any(said.get(name) != value for name, value in wanted.items() if not name.startswith("_"))
        if other:
            raise ReleaseError("pipeline: a model of another kind than a release holds")
        return product

    @classmethod
    def unpack(cls, files: dict[str, bytes], class_names: tuple[str, ...]) -> "DiffusionProduct":
        """Returns what `files` wrote. Raises ReleaseError on anything else."""
        try:
            config = _own(tensors.parse_json(files[CONFIG]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ReleaseError(f"{CONFIG}: not readable, or a field is missing") from None
        product = cls(transformer=tensors.unpack(files[WEIGHTS], WEIGHTS)[0], config=config, class_names=class_names)
        for path, raw in product.files().items():
            if raw != files[path]:
                raise ReleaseError(f"{path}: not what the weights, the config and the certificate give")
        return product


def _own(settings: Any) -> dict[str, Any]:
    """Our few settings out of diffusers' many."""
    return {
        "side": settings["sample_size"],
        "channels": settings["in_channels"],
        "width": HEADS * settings["attention_head_dim"],
    }


def _arrays(module: Any) -> Weights:
    """The weights of a network in memory."""
    return {name: value.detach().cpu().float().contiguous().numpy() for name, value in module.state_dict().items()}


def _text(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _labels(class_names: tuple[str, ...]) -> dict[str, str]:
    """Names for the pipeline's `get_label_ids`, which would read a comma as the end of one; those that then coincide are numbered."""
    plain = [name.replace(",", ";").strip() for name in class_names]
    seen = Counter(plain)
    return {str(k): name if seen[name] == 1 else f"{name} ({k})" for k, name in enumerate(plain)}


def _vae_config(channels: int) -> dict[str, Any]:
    """The full settings of diffusers' AutoencoderTiny, as models/few_step.py makes it."""
    sizes = dict.fromkeys(("in_channels", "latent_channels", "out_channels"), channels)
    blocks = {f"{part}_block_out_channels": [2 * channels] for part in ("decoder", "encoder")}
    return {**_VAE, **blocks, **sizes}


def _vae(channels: int) -> Weights:
    """The decoder's constant arrays, as models/few_step.py makes them: each channel by itself, its sign in two halves of a rectifier."""
    c = np.arange(channels)
    wide, narrow = np.zeros((2 * channels, channels, 3, 3), "f4"), np.zeros((channels, 2 * channels, 3, 3), "f4")
    into, out, first, last = wide.copy(), narrow.copy(), wide.copy(), narrow.copy()
    into[2 * c, c, 1, 1], into[2 * c + 1, c, 1, 1] = 1, -1
    scale = 1 / (6 * math.tanh(1 / 3))  # the pipeline's own 3·tanh(x / 3) comes before
    out[c, 2 * c, 1, 1], out[c, 2 * c + 1, 1, 1] = scale, -scale
    first[2 * c, c, 1, 1], last[c, 2 * c, 1, 1] = 2, 1
    zeros = np.zeros(2 * channels, "f4")
    return {
        "decoder.layers.0.weight": into,
        "decoder.layers.0.bias": zeros,
        "decoder.layers.2.weight": out,
        "decoder.layers.2.bias": np.full(channels, 0.5, "f4"),
        "encoder.layers.0.weight": first,
        "encoder.layers.0.bias": zeros,
        "encoder.layers.1.weight": last,
        "encoder.layers.1.bias": np.full(channels, -1, "f4"),
    }


def side_for(longer: int) -> int:
    """Of the square on which images whose longer side this is are drawn: 4 divides it."""
    return -(-longer // 4) * 4


def shapes(config: dict[str, Any], n_classes: int) -> Shapes:
    """Returns the name and shape of every array of a DiTTransformer2DModel with these settings, all others as in our students.

    Raises:
      ReleaseError: settings that no student has.
    """
    side, channels, width = (config[name] for name in ("side", "channels", "width"))
    whole = all(type(n) is int and 1 <= n <= MAX_WIDTH for n in (side, channels, width, n_classes))
    if not whole or channels not in (1, 3) or not SIDES[0] <= side <= SIDES[1]:
        raise ReleaseError(f"{CONFIG}: not the settings of a student")
    if side % 4 or width % HEADS:
        raise ReleaseError(f"{CONFIG}: sizes that do not fit each other")
    patch = side // PATCHES
    found: Shapes = {}

    def layer(name: str, *weight: int) -> None:
        found[f"{name}.weight"] = weight
        found[f"{name}.bias"] = weight[:1]

    layer("pos_embed.proj", width, channels, patch, patch)
    for i in range(DEPTH):
        block = f"transformer_blocks.{i}"
        layer(f"{block}.norm1.emb.timestep_embedder.linear_1", width, TIMES)
        layer(f"{block}.norm1.emb.timestep_embedder.linear_2", width, width)
        # diffusers' own training drops labels: its table has a row for "any", which ours does not use
        found[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = (n_classes + 1, width)
        layer(f"{block}.norm1.linear", 6 * width, width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{block}.attn1.{part}", width, width)
        layer(f"{block}.ff.net.0.proj", 4 * width, width)
        layer(f"{block}.ff.net.2", width, 4 * width)
    layer("proj_out_1", 2 * width, width)
    layer("proj_out_2", patch * patch * channels, width)
    return found
