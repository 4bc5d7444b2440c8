"""From a configuration to a plan: what will be asked of the door, at what noise, and what of it is public. No record is read."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .bundle import room
from .bundle.diffusion_product import HEADS, MAX_WIDTH, WEIGHTS
from .bundle.diffusion_product import shapes as sampler_shapes
from .bundle.ledger_check import too_large
from .bundle.onnx_file import student_shapes
from .config import DiffusionConfig, ModelConfig, RunConfig
from .config_files import build, public_toml
from .data import LabelledImages, Limits, load_images, procedural_images, public_range, to_unit
from .errors import ConfigError, InputError, ReleaseError
from .methods import DIFFUSION_METHODS, METHODS, MODEL_METHODS, Method, Public
from .models import few_step
from .models.student_generator import StudentGenerator
from .privacy import Planned, accounting, calibrate
from .sources import scratch_of

N_PROCEDURAL = 4000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be asked of the door, before it opens.

    Attributes:
      epsilon, epsilon_replace_one: of the calibrated releases.
      toml: the public configuration.
      advice: what to expect, a line each.
    """

    method: Method
    settings: Any
    public: Public
    releases: list[Planned]
    noise_multiplier: float
    epsilon: float
    epsilon_replace_one: float
    toml: str
    advice: tuple[str, ...] = ()


def public_facts(config: RunConfig, image_shape: tuple[int, int, int], class_names: tuple[str, ...]) -> Public:
    """Loads or makes the auxiliary set, fitted to the private images' public shape."""
    channels, height, width = image_shape
    made_up = torch.from_numpy(to_unit(procedural_images(N_PROCEDURAL, channels, height, width, config.seed)))
    if config.auxiliary == "none":
        return Public(image_shape=image_shape, class_names=class_names, auxiliary=made_up)
    auxiliary = _load_auxiliary(config, channels, height if height == width else None)
    if auxiliary.images.shape[1:] != image_shape:
        raise ConfigError(
            f"the auxiliary images are {auxiliary.images.shape[1:]} and the private ones {image_shape} (channels, height, width); "
            "scale them alike, or all to a square by --resize"
        )
    unit = auxiliary.to_unit()
    unit = np.where(np.isfinite(unit), unit, 0).astype(np.float32)
    present, labels = np.unique(auxiliary.labels, return_inverse=True)
    return Public(
        image_shape=image_shape,
        class_names=class_names,
        auxiliary=torch.from_numpy(unit),
        procedural=made_up,
        auxiliary_labels=torch.from_numpy(labels) if len(present) > 1 else None,
    )


def auxiliary_hash(public: Public) -> str:
    """SHA-256 of the images that a person gave, and of their labels; empty for procedural ones, of which the seed says all."""
    if public.procedural is None:
        return ""
    digest = hashlib.sha256(repr(tuple(public.auxiliary.shape)).encode())
    for tensor in (public.auxiliary, public.auxiliary_labels):
        if tensor is not None:
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()


def _load_auxiliary(config: RunConfig, channels: int, resize: int | None) -> LabelledImages:
    """Public images, with labels if they have some, in the private ones' size and colour. How they are read follows from themselves."""
    limits = Limits.of_gib(config.max_gib, scratch_of(config))
    load = functools.partial(
        load_images, config.auxiliary, image_column=None, resize=resize, channels=channels, limits=limits
    )
    try:
        found = load(public_labels=True)
    except InputError:  # no labels, or none that can be read: what else is wrong, the images alone will say
        found = load(unlabelled=True)
    return dataclasses.replace(found, value_range=public_range(found))


def make_plan(
    config: RunConfig, image_shape: tuple[int, int, int], class_names: tuple[str, ...], models: int = 0
) -> Plan:
    """Calibrates the method to the asked (ε, δ): from public facts only.

    Args:
      models: how many models vote, where owners brought them.
    """
    config = with_way(config)
    known = methods_of(config)
    if config.method not in known:
        raise ConfigError(f"unknown method {config.method!r}; known: {', '.join(known)}")
    method: Any = known[config.method]
    if not hasattr(method, "plan"):
        raise ConfigError(
            f"{config.method} asks nothing of the door, so there is nothing to plan; --dry-run says what it counts"
        )
    given: dict[str, Any] = {"per_class": config.per_class}
    if isinstance(config, DiffusionConfig):
        given |= {"unit_moves": 2} if config.method == "shards" else {"expected_records": config.expected_records}
        given |= {"target_epsilon": config.epsilon} if config.method == "dpsad" else {}
    elif config.method == "votes" and isinstance(config, ModelConfig):
        given |= {"models": models or config.shards, "unit_moves": 2 if config.data and not config.id_column else 1}
        given |= {"expected_records": config.expected_records}
    for name in given:
        if name in config.settings:
            raise ConfigError(
                f"settings.{name}: {name} belongs to the run, not to the method; move it out of [settings]"
            )
    others = [item.name for item in dataclasses.fields(type(config))]
    settings = build(method.Config, {**given, **config.settings}, "settings.", others)
    check_size(config, settings, image_shape, class_names)
    public = public_facts(config, image_shape, class_names)
    sigma = calibrate(lambda value: method.plan(settings, public, value), config.epsilon, config.delta)
    releases = method.plan(settings, public, sigma)
    parts = [planned.part for planned in releases]
    exchanged = [planned.part_replace_one for planned in releases]
    for problem in too_large(parts):
        raise ConfigError(f"--epsilon {config.epsilon:g}: {problem}; ask for less")
    toml = public_toml(config, settings, sigma, auxiliary_hash(public))
    return Plan(
        method=method,
        settings=settings,
        public=public,
        releases=releases,
        noise_multiplier=sigma,
        epsilon=accounting.epsilon(parts, config.delta),
        epsilon_replace_one=accounting.epsilon(exchanged, config.delta, "replace_one"),
        toml=toml,
        advice=tuple(method.advice(settings, public, config.epsilon, config.delta))
        if hasattr(method, "advice")
        else (),
    )


def check_size(
    config: RunConfig, settings: Any, image_shape: tuple[int, int, int], class_names: tuple[str, ...]
) -> None:
    """Raises ConfigError where what is asked for cannot be made, or is more than a release may hold: before anything is charged for it."""
    room.check_names(class_names)
    k, soft = len(class_names), isinstance(config, ModelConfig)
    files = room.dataset(config.per_class * k, image_shape, k, soft)
    if isinstance(config, ModelConfig):
        files |= _student_files(settings, image_shape, k)
    if isinstance(config, DiffusionConfig):
        files |= _sampler_files(settings, image_shape, k)
    room.check_files(files)


def _student_files(settings: Any, image_shape: tuple[int, int, int], n_classes: int) -> dict[str, room.Size]:
    """The student that a `Networks` asks for, twice, and its generator. Raises ConfigError where it cannot be made."""
    config = {name: getattr(settings, name) for name in ("width", "depth", "groups")}
    try:
        shapes = student_shapes({"image_shape": list(image_shape), "n_classes": n_classes, **config})
    except ReleaseError as error:
        raise ConfigError(str(error)) from None
    student = (room.weights(shapes), "--set width= or --resize")
    latent, width = settings.latent, settings.generator_width
    generator = room.weights(StudentGenerator.shapes(image_shape, n_classes, latent=latent, width=width))
    return {
        "model/student.safetensors": student,
        "model/student.onnx": student,
        "model/generator.safetensors": (generator, "--set generator_width=, --set latent="),
    }


def _sampler_files(settings: Any, image_shape: tuple[int, int, int], n_classes: int) -> dict[str, room.Size]:
    """The student that a `DistillationConfig` asks for. Raises ConfigError where it cannot be made."""
    few_step.check(image_shape)
    channels, side, _ = few_step.canvas(image_shape)
    width = settings.token_width(image_shape)
    if width % HEADS or not HEADS <= width <= MAX_WIDTH:
        raise ConfigError(f"Expected student_width of auto or a multiple of {HEADS} up to {MAX_WIDTH}, got {width}.")
    if n_classes > MAX_WIDTH:
        raise ConfigError(f"a diffusion student knows at most {MAX_WIDTH} classes, not {n_classes:,}; merge some")
    shapes = sampler_shapes({"channels": channels, "side": side, "width": width}, n_classes)
    return {WEIGHTS: (room.weights(shapes), "--set student_width= or --resize")}


def methods_of(config: RunConfig) -> Mapping[str, Any]:
    """The methods that make what this configuration asks for."""
    if isinstance(config, ModelConfig):
        return MODEL_METHODS
    return DIFFUSION_METHODS if isinstance(config, DiffusionConfig) else METHODS


def with_way(config: RunConfig) -> RunConfig:
    """The configuration with its method named, and its shards counted."""
    if not isinstance(config, ModelConfig):
        return config
    shards = config.shards
    if shards == "auto":
        votes: Any = MODEL_METHODS["votes"]
        shards = votes.best_shards(config.expected_records, config.epsilon, config.delta)
        needed = votes.needed_models(config.epsilon, config.delta)
        if shards < needed:
            raise ConfigError(
                f"--shards auto: {config.expected_records:,} records make {shards} shards that can learn, and at ε = {config.epsilon:g} "
                f"the noise hides fewer than {needed} votes; raise ε, train a private teacher (leave --shards out), or name a number"
            )
    return dataclasses.replace(config, method=config.way, shards=shards)


def auxiliary_of(config: RunConfig) -> str:
    """Where the public images come from, as a sentence for the certificate."""
    return "procedural" if config.auxiliary == "none" else f"{Path(config.auxiliary).name}, public by the user's word"
