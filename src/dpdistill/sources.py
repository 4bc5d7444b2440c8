"""Where private things come from, and which ledger they are charged to: records of one person, or models of many owners.

Read, checked and handed on behind one handle; nothing here looks at what they say, and nothing is charged.
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .bundle.contents import printable_names
from .config import MAX_GIB, DiffusionConfig, ModelConfig, RunConfig
from .data import LabelledImages, Limits, check_public_range, load_images
from .errors import ConfigError, InputError, MisfitError
from .home import Contents, contents_of, default_ledger, ledger_of
from .mechanisms import Door, Ensemble, PrivateData, Ranks, Vault
from .privacy import Ledger

if TYPE_CHECKING:
    from torch import Tensor

    from .models.teachers import Teacher

NOTES = (".md", ".txt", ".json", ".py")  # what may lie beside the models of many owners


def load_private(config: RunConfig) -> LabelledImages:
    """Reads the private images as the run asks. Raises InputError where they are floats and nobody says of what range."""
    records = _read(config, config.resize, config.channels)
    if records.images.dtype != np.uint8 and config.value_low is None:
        raise InputError(
            config.data,
            "holds float images, and a file does not say what is black and what white",
            "--set value_low=0 --set value_high=1 (or 0 and 255, or -1 and 1)",
        )
    return records


def load_test(config: RunConfig, class_names: tuple[str, ...], image_shape: tuple[int, ...]) -> LabelledImages:
    """Reads public test images for a release: labels are numbered as its classes are, by their names.

    Raises:
      InputError: they are of another shape, or of a class that the release has not.
    """
    try:
        found = _read(config, config.resize, config.channels)
    except InputError as error:
        if error.reason != "does not list its classes":
            raise
        found = _read(replace(config, classes=len(class_names)), config.resize, config.channels)
    check_public_range(found)
    if found.image_shape != image_shape:
        reason = (
            f"holds images of {found.image_shape} (channels, height, width), and the release those of {image_shape}"
        )
        raise InputError(config.data, reason, "see --resize and --set channels=")
    names = printable_names(found.class_names)
    numbered = names == tuple(map(str, range(len(names)))) and not set(names) <= set(class_names)
    if numbered and len(names) <= len(class_names):  # a file without names: its numbers are the release's
        names = class_names[: len(names)]
    if strange := [name for name in names if name not in class_names]:
        hint = "name classes as the release does, by --set class_names=A,B,… or by the folders"
        raise InputError(config.data, f"has a class {strange[0]!r} that the release has not", hint)
    number = np.array([class_names.index(name) for name in names], np.int64)
    return replace(found, labels=number[found.labels], class_names=class_names)


def _read(config: RunConfig, resize: int | None, channels: int | None) -> LabelledImages:
    low, high = config.value_low, config.value_high
    return load_images(
        config.data,
        class_names=None if config.class_names is None else config.class_names.split(","),
        n_classes=config.classes,
        image_column=config.image_column,
        label_column=config.label_column,
        id_column=config.id_column if isinstance(config, ModelConfig) else None,
        split=config.split,
        value_range=(0.0, 1.0) if low is None or high is None else (low, high),
        resize=resize,
        channels=channels,
        unlabelled=isinstance(config, DiffusionConfig) and config.unlabelled,
        limits=Limits.of_gib(config.max_gib, scratch_of(config)),
    )


def scratch_of(config: RunConfig) -> str:
    """The folder for what does not fit in memory: $TMPDIR, else where the release will be. The system's own is often kept in memory."""
    named = os.environ.get("TMPDIR")
    place = Path(config.out).absolute().parent
    return named or str(next(folder for folder in (place, *place.parents) if folder.is_dir()))


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where private things come from: records of one person, or models of many owners.

    Attributes:
      unit: whose presence the ledger counts by.
      ledger: finds the file to charge (and makes a home for ledgers where there is none).
      handle: makes the one handle that a method gets.
      contents: what is private, to be hashed under a key.
      models: how many owners brought one, or 0.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    unit: str
    ledger: Callable[[], Path]
    handle: Callable[[Ledger, Vault, Ranks], Door]
    contents: Contents
    models: int = 0


def owners(config: ModelConfig, given: "Sequence[Teacher] | None" = None) -> Source:
    """The models of many owners that vote: changing everything of one owner changes one model.

    Args:
      given: them, from `models.teachers.from_callable` and each under a name of its own: one model under two names has two votes, and
        nothing here notices. None reads the files in the folder `config.teachers`, where it does.

    Raises:
      InputError: anything else lies in the folder, other than notes and hidden files; or one cannot vote beside the others.
      ConfigError: one that is given has no name.
    """
    from .models.teachers import RANGE, one_class

    found = _models_in(Path(str(config.teachers)), config) if given is None else list(given)
    if len(found) < 2:
        raise InputError(config.teachers, f"holds {len(found)} models", "voting needs one of every owner")
    first, known = found[0], dict[str, str]()
    for teacher in found:
        if not teacher.sha256:
            raise ConfigError(
                "a model that votes is known by its name: from_callable(…, name='clinic A'), another for each owner"
            )
        if (teacher.image_shape, teacher.n_classes) != (first.image_shape, first.n_classes):
            facts = f"takes images {teacher.image_shape} of {teacher.n_classes} classes"
            raise InputError(
                teacher.name, f"{facts}, and {first.name} {first.image_shape} of {first.n_classes}", "one task for all"
            )
        if teacher.sha256 in known:  # twice the votes of one owner: twice the sensitivity
            raise InputError(teacher.name, f"is the same model as {known[teacher.sha256]}", "keep one of every owner")
        known[teacher.sha256] = teacher.name
    # A few owners may have a model of one class; most of them have not, unless what they are fed is wrong.
    constant = sum(one_class(voting(teacher), first.image_shape) for teacher in found)
    if constant > len(found) / 2:
        raise InputError(
            config.teachers, f"holds {len(found)} models, and most give one class to every made-up image", RANGE
        )
    names, hashes = names_of(config, first.n_classes), sorted(t.sha256.encode() for t in found)
    return Source(
        image_shape=first.image_shape,
        class_names=names,
        unit="owner",
        ledger=lambda: named_ledger(config) if config.ledger else ledger_of(hashes),
        handle=lambda ledger, vault, ranks: Ensemble.of_models(
            [voting(t) for t in found], len(names), ledger, vault, ranks=ranks
        ),
        contents=lambda: hashes,
        models=len(found),
    )


def _models_in(folder: Path, config: ModelConfig) -> "list[Teacher]":
    """Reads a folder of models, one file of every owner."""
    from .models.teachers import check_kind

    try:
        files = sorted(path for path in folder.iterdir() if not (path.name[0] in "._" or path.suffix.lower() in NOTES))
    except OSError as error:
        raise InputError(
            folder, f"not a readable folder ({error.strerror})", "--teachers is a folder of models"
        ) from None
    for path in files:  # a model left out would be an owner left out
        check_kind(path)
    if not files:
        return []
    weights = {path for path in files if path.suffix.lower() == ".safetensors"}
    alone = replace(config, architecture=None) if weights else config  # for an ONNX file, which holds its own
    read = {path: config if path in weights else alone for path in files}
    first = read_teacher(read[files[0]], files[0])
    # Each is opened by itself and checked against the first's facts, never against another's answers.
    return [first, *(read_teacher(read[path], path, first.image_shape, first.n_classes) for path in files[1:])]


def names_of(config: ModelConfig, n_classes: int) -> tuple[str, ...]:
    """The classes' names, of models, which have none: as the person says, or their numbers. Raises ConfigError."""
    if config.class_names is None:
        return tuple(str(k) for k in range(n_classes))
    names = tuple(config.class_names.split(","))
    if len(names) != n_classes or len(set(names)) != n_classes:
        raise ConfigError(
            f"class_names: expected {n_classes} different names, as many as the model has classes, got {len(names)}"
        )
    return names


def voting(teacher: "Teacher") -> Callable[["Tensor"], "Tensor"]:
    """What an owner's model votes by. Where it fails, or answers no number on half of the images or more, its scores are NaN, which is a
    vote like another: a run that ended there would tell of that one owner's model, after the charge."""

    def scores(x: "Tensor") -> "Tensor":
        try:
            return teacher.outputs(x)
        except InputError:
            return x.new_full((len(x), teacher.n_classes), math.nan)

    return scores


def read_teacher(
    config: ModelConfig, path: Path, image_shape: tuple[int, int, int] | None = None, n_classes: int | None = None
) -> "Teacher":
    """Reads one teacher's file with the settings of the run."""
    from .models.teachers import load_teacher

    shape = image_shape or (parse_shape(config.shape) if config.shape else None)
    return load_teacher(
        path,
        architecture=config.architecture,
        image_shape=shape,
        n_classes=n_classes or config.classes,
        value_range=(config.input_low, config.input_high),
        layout=config.layout,
        outputs=config.outputs,
        mean=_numbers("mean", config.mean),
        std=_numbers("std", config.std),
    )


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """ "0.5,0.5,0.5" as numbers. Raises ConfigError unless they are one or three, finite, and those of std positive."""
    if text is None:
        return None
    try:
        found = tuple(float(number) for number in text.split(","))
    except ValueError:
        found = ()
    if len(found) not in (1, 3) or not np.isfinite(found).all() or (name == "std" and min(found) <= 0):
        raise ConfigError(f"{name} = {text[:100]!r}: expected a number for each channel, such as 0.5,0.5,0.5")
    return found


def parse_shape(text: str) -> tuple[int, int, int]:
    """ "3,32,32" as numbers. Raises ConfigError unless they are 1 or 3 channels and sides of 8 to 64."""
    try:
        channels, height, width = (int(side) for side in text.split(","))
    except ValueError:
        raise ConfigError(f"--shape {text}: expected channels,height,width such as 3,32,32") from None
    if channels not in (1, 3) or not (8 <= min(height, width) and max(height, width) <= 64):
        raise ConfigError(f"--shape {text}: expected 1 or 3 channels and sides of 8 to 64 pixels, such as 3,32,32")
    return channels, height, width


def check_apart(config: RunConfig) -> None:
    """Refuses to write into a folder that is read: charged and stopped, the run could not read it again to go on. Raises ConfigError."""
    written = {"out": [config.out, f"{Path(config.out)}.state"], "ledger": [config.ledger] if config.ledger else []}
    for option in ("data", "auxiliary", "teachers", "teacher"):
        folder = getattr(config, option, None)
        if not folder or not os.path.isdir(folder):
            continue
        for name, places in written.items():
            if any(Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder)) for place in places):
                raise ConfigError(
                    f"--{name} {getattr(config, name)} lies in --{option} {folder}, and what a run writes there spoils what it reads; "
                    f"choose a --{name} outside"
                )


def open_source(config: RunConfig, models: "Sequence[Teacher] | None" = None) -> Source:
    """Reads what is private, without looking at what it says. `models` vote in place of those in a folder."""
    check_apart(config)
    if isinstance(config, ModelConfig) and config.teachers:
        return owners(config, models)
    records = load_private(config)
    return Source(
        image_shape=records.image_shape,
        class_names=records.class_names,
        unit="id" if records.ids is not None else "record",
        ledger=lambda: _ledger_path(config, records),
        handle=lambda ledger, vault, ranks: PrivateData(
            records, ledger, vault, device=config.device, scratch=scratch_of(config), ranks=ranks
        ),
        contents=lambda: contents_of(records),
    )


def _ledger_path(config: RunConfig, records: LabelledImages) -> Path:
    """The ledger to charge. Data that is scaled or made grey is the same data: its ledger goes by the images as they are, or by 64 × 64."""
    if config.ledger is not None:
        return named_ledger(config)
    if config.resize is None and config.channels is None:
        return default_ledger(records)
    plain = replace(config, max_gib=MAX_GIB)  # for the name alone: it may be larger than what the run reads
    for resize in (None, 64):  # large images, or of several sizes, need a size
        with suppress(MisfitError):  # anything else, such as a full disk, would be another ledger and a new budget
            return default_ledger(_read(plain, resize, None))
    return default_ledger(_read(plain, 64, 3))  # mixed ones need a colour as well


def named_ledger(config: RunConfig) -> Path:
    """The ledger that --ledger names, if it lies outside what the run makes and removes."""
    path = Path(str(config.ledger))
    for place in (config.out, f"{Path(config.out)}.state"):
        if path.resolve().is_relative_to(Path(place).resolve()):
            raise ConfigError(f"--ledger {path} lies in {place}; it outlives every release, so choose a place outside")
    return path
