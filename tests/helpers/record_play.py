"""Record, then play: one run is recorded, and each neighbouring data set is run with the very same noisy answers.

What a method makes of the same answers must be the same to the bit, so whatever differs between two runs got past the door: a step, a
shape, a log line, a file, a warning. And what the door sums may differ by the declared sensitivity and no more, which is compared in whole
numbers, before noise. Source of the idea: Re:cord-play (Cebere et al. 2026, arXiv 2602.17454).

The door stays the production one; only the source of its noise is exchanged: a played run draws the noise that turns its own sum into the
recorded answer. That is also the coupling of the proof. A record that both data sets have gets the same Poisson coin in both, by a tag that
it keeps; the record that only one of them has is always in the sample, since without it there is nothing to see.

A method in one of the registries is played by itself, with its line in TINY, or with its defaults where it has none.

N records, C channels, H, W size, K classes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

import owner_models
from dpdistill import cli, conversion, diffusion, pipeline, planning, sources
from dpdistill.config import DiffusionConfig, ModelConfig, RunConfig
from dpdistill.data import LabelledImages
from dpdistill.data.decode import resize_arrays
from dpdistill.mechanisms import Door, Ensemble, PrivateData, Vault, answers, ensemble, features, private
from dpdistill.mechanisms.noise import Stream, derive, rounded_gaussian
from dpdistill.mechanisms.recordwise import probe
from dpdistill.methods import DIFFUSION_METHODS, METHODS, MODEL_METHODS, dpsgd
from dpdistill.methods.diffusion import distillation, dpsad
from dpdistill.methods.model import conversion as model_conversion
from dpdistill.methods.model import prior, teacher
from dpdistill.methods.shared import linear, mixture
from dpdistill.methods.shared.embedding import EmbeddingConfig
from dpdistill.models import few_step, scattering
from dpdistill.models.linear import LinearTeacher
from dpdistill.privacy import Ledger, accounting
from dpdistill.workspace import FolderWorkspace

CLASSES = ("top", "left", "rare")  # of the last, the base has no record
SIDE = 8
MICRO_BATCH = 16  # of the door here; its rank-one sums take four times as many
KEY = b"k" * 32
GIVEN = ("private.npz", "owners", "run.toml")  # what a run finds in its folder


# --- what is played -----------------------------------------------------------------------------------------------------------------

STUDENT = {
    "bf16": False,
    "width": 4,
    "depth": 1,
    "groups": 2,
    "generator_width": 2,
    "latent": 2,
    "pool": 16,
    "bank": 4,
    "steps": 1,
    "batch": 8,
}
SAMPLER = {
    "bf16": False,
    "seed_images": 3,
    "sampling_steps": 1,
    "student_width": 8,
    "student_steps": 1,
    "student_batch": 2,
    "critic_width": 2,
    "pool": 2,
    "answer_steps": 1,
    "adversarial": 0.0,
}
DENOISER = {"patch": 8, "width": 4, "depth": 1, "heads": 1}
DPSGD = {"steps": 2, "expected_batch": 12, "multiplicity": 2, **DENOISER}
TINY: dict[
    str, dict[str, Any]
] = {  # a line for a method, of its settings and the run's; without one, it is played with its defaults
    "joint": {
        "steps": 2,
        "networks": 2,
        "pool": 12,
        "feature_dims": 4,
        "pixel_dims": 3,
        "components": 2,
        "width": 4,
    },
    "dosser": {
        "sampling_steps": 3,
        "optimisation_steps": 2,
        "expected_records_per_class": 8,
        "group_size": 5,
        "subspace_dim": 3,
        "auxiliary_images": 8,
        "width": 4,
    },
    "ndpdc": {"steps": 3, "expected_records_per_class": 8, "group_size": 5, "width": 4},
    "dpmerf": {"n_frequencies": 8, "steps": 2, "batch": 2, "latent": 2, "width": 2},
    "dpsgd": {"steps": 3, "expected_records": 20, "expected_batch": 12, "width": 4, "depth": 1, "groups": 2},
    "teacher": {"teacher_steps": 2, "teacher_dims": 4, "pixel_dims": 3, "components": 2, **STUDENT},
    "votes": {"shards": 5, "teacher_dims": 4, "queries": 9, "rounds": 2, **STUDENT},
    "dpsad": {
        "warm_start": "mixture",
        "share_denoiser": 0.5,
        "pixel_dims": 3,
        "components": 2,
        **DPSGD,
        "steps": 1,
        **SAMPLER,
    },
    "dpdm": {**DPSGD, **SAMPLER, "adversarial": 1.0},
    "shards": {
        "models": 5,
        "clip": 0.005,
        "teacher_steps": 1,
        "batch": 4,
        "fit_steps": 1,
        "queries": 3,
        "rounds": 2,
        **DENOISER,
        **SAMPLER,
    },
    "paper": {"steps": 2, "batch": 24, "teacher_steps": 2, "teacher_batch": 24, **DENOISER, **SAMPLER},
    "opaque": {key: value for key, value in STUDENT.items() if key != "bank"},
}


@dataclass(frozen=True)
class Pipeline:
    """One way through the house, from a file to a release.

    Attributes:
      kind: of its configuration; facts: of that, beside the settings of the method.
      by_id: the unit is an id, with all its records, and not one record.
      of_owners: it is an owner, with the one model that they bring.
    """

    method: str
    kind: type[RunConfig]
    settings: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    by_id: bool = False
    of_owners: bool = False

    @property
    def unit(self) -> str:
        return "owner" if self.of_owners else "id" if self.by_id else "record"

    def config(self) -> RunConfig:
        """Paths are relative, so that they are the same in every run: a run is played in a folder of its own."""
        facts = {"data": "private.npz", "out": "out", "ledger": "ledger.jsonl", "epsilon": 2.0, "per_class": 1}
        facts |= {"value_low": 0.0, "value_high": 1.0}
        return self.kind(**facts | {"method": self.method, "settings": dict(self.settings)} | dict(self.facts))

    def start(self, config: RunConfig) -> None:
        """What the command line calls."""
        if isinstance(config, ModelConfig):
            conversion.convert(config)
        elif isinstance(config, DiffusionConfig):
            diffusion.diffuse(config)
        else:
            pipeline.distil(config)

    def command(self) -> None:
        """The command line itself, with what it prints."""
        commands: dict[type[RunConfig], str] = {
            RunConfig: "dataset",
            ModelConfig: "model",
            DiffusionConfig: "diffusion",
        }
        given = {key: value for key, value in vars(self.config()).items() if value is not None and key != "settings"}
        lines = [*given.items(), ("[settings]", None), *self.settings.items()]
        toml = (key if value is None else f"{key} = {json.dumps(value)}" for key, value in lines)
        Path("run.toml").write_text("\n".join(toml))
        cli.app([commands[self.kind], "--config", "run.toml"], standalone_mode=False)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(dpsgd.Config):
    """That of DP-SGD, with the one field that every run has."""

    per_class: int = 1


BASELINES: dict[str, Any] = {  # behind the same door, in no registry
    "dpsgd": SimpleNamespace(Config=ClassifierConfig, plan=dpsgd.plan, run=dpsgd.run),
}


def pipelines() -> dict[str, Pipeline]:
    """All methods that ask the door, and what variants of them there are."""
    found: dict[str, Pipeline] = {}
    for kind, registry in (
        (RunConfig, {**METHODS, **BASELINES}),
        (ModelConfig, MODEL_METHODS),
        (DiffusionConfig, DIFFUSION_METHODS),
    ):
        for name, module in registry.items():
            if hasattr(module, "plan"):
                own = {item.name for item in dataclasses.fields(module.Config)}
                line = TINY.get(name, {})
                facts = {"expected_records": 20} if kind is DiffusionConfig else {}
                facts |= {key: value for key, value in line.items() if key not in own}
                found[name] = Pipeline(name, kind, {key: line[key] for key in line if key in own}, facts)
    found["votes by id"] = dataclasses.replace(
        found["votes"],
        settings={**found["votes"].settings, "rounds": 1},
        facts={**found["votes"].facts, "id_column": "ids"},
        by_id=True,
    )
    found["votes of owners"] = dataclasses.replace(
        found["votes"], facts={"data": "", "teachers": "owners"}, of_owners=True
    )
    found["dpsad without DP-SGD"] = dataclasses.replace(
        found["dpsad"], settings={**found["dpsad"].settings, "share_denoiser": 0.0}
    )
    found["dpsad by embedding"] = dataclasses.replace(
        found["dpsad"], settings={**found["dpsad"].settings, "warm_start": "embedding", "embedding_batch": 2}
    )
    found["ndpdc resized"] = dataclasses.replace(found["ndpdc"], facts={"resize": 9})
    return found


# --- data sets ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class World:
    """A private data set: images float32 [N, C, H, W]; labels, of any value, tags and ids int64 [N]."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    tags: NDArray[np.int64]
    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def plus(self, other: "World", place: int) -> "World":
        """With the other's records put in before that place."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return World(*(np.concatenate([mine[:place], new, mine[place:]]) for mine, new in pairs))

    def only(self, rows: Any) -> "World":
        return World(*(column[rows] for column in vars(self).values()))

    def readable(self) -> bool:
        """Whether a file can hold it. Others arise behind the reader: an array changed in place, a caller of the library."""
        return len(self) > 0 and bool(((self.labels >= 0) & (self.labels < len(CLASSES))).all())

    def save(self, folder: Path) -> None:
        np.savez(
            folder / "private.npz",
            images=self.images[:, 0],
            labels=self.labels,
            ids=self.ids,
            classes=np.array(CLASSES),
        )

    def records(self, by_id: bool, resize: int | None) -> LabelledImages:
        """As the reader would give it."""
        images = self.images if resize is None else resize_arrays(self.images, resize)
        ids = self.ids.copy() if by_id else None
        zeros = np.zeros(len(self), np.int64)
        made = LabelledImages(images=images.copy(), labels=zeros, class_names=CLASSES, source="private.npz", ids=ids)
        made.labels[:] = self.labels
        return made


@dataclass(frozen=True)
class Pair:
    """Two neighbours: one has a unit more than the other, or, exchanged, each has one that the other has not."""

    one: str
    other: str
    exchanged: bool = False


AROUND = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    15,
    16,
    31,
    32,
    63,
    64,
)  # n and n + 1: powers of two, batches, shards, groups
BASE = 20  # units
EXTRA = 1000  # number of the unit that one of a pair has more


def unit(number: int, by_id: bool, image: Any = None, label: int | None = None) -> World:
    """A record, or by id one to three, of which every second is the given one."""
    n = 1 + number % 3 if by_id else 1
    rng = np.random.default_rng([5, number])
    images, labels = rng.random((n, 1, SIDE, SIDE)) * 0.4, rng.integers(0, len(CLASSES) - 1, n)
    images[labels == 0, :, : SIDE // 2] += 0.5
    images[labels == 1, :, :, : SIDE // 2] += 0.5
    if label is not None:
        labels[::2] = label
    if image is not None:
        images[::2] = image
    with np.errstate(over="ignore"):
        return World(images.astype(np.float32), labels, 4 * number + np.arange(n), np.full(n, number))


def crowd(numbers: Sequence[int], by_id: bool) -> World:
    """Units one after the other, perhaps none."""
    nobody = unit(0, by_id).only(slice(0))
    return functools.reduce(lambda world, number: world.plus(unit(number, by_id), len(world)), numbers, nobody)


def odd_units(by_id: bool) -> dict[str, World]:
    """One unit more, of every kind that has ever broken a mechanism."""
    ramp = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(1, SIDE, SIDE)
    pixels = {
        "nan": np.nan,
        "one nan": np.where(ramp == 0, np.nan, ramp),
        "inf": np.inf,
        "-inf": -np.inf,
        "both infinities": np.where(ramp < 0.5, np.inf, -np.inf),
        "1e38": 1e38,
        "-1e38": -1e38,
        "1e3 among zeros": np.where(ramp == 1, 1e3, 0),
        "a little out of range": 1 + ramp,
        "largest float": np.finfo(np.float32).max,
        "zero": 0.0,
        "-zero": -0.0,
        "one": 1.0,
        "half": 0.5,
        "subnormal": 1e-45,
        "ramp": ramp,
        "checkerboard": np.indices((SIDE, SIDE)).sum(axis=0) % 2,
        "one pixel": ramp == 1,
    }
    labels = {"label too big": len(CLASSES), "label -1": -1, "label 2**62": 2**62, "label -2**63": -(2**63)}
    twin = unit(0, by_id)
    found = {name: unit(EXTRA, by_id, image, 1) for name, image in pixels.items()}
    found |= {name: unit(EXTRA, by_id, None, label) for name, label in labels.items()}
    found["rare class"] = unit(EXTRA, by_id, None, 2)
    found["nan of the rare class"] = unit(EXTRA, by_id, np.nan, 2)
    found["duplicate"] = unit(EXTRA, by_id, twin.images[0], int(twin.labels[0]))
    found["duplicate of another class"] = unit(EXTRA, by_id, twin.images[0], 2)
    return found


def drawn(number: int, by_id: bool) -> World:
    """A unit drawn at random, from a wide range of values and labels."""
    rng = np.random.default_rng([11, number])
    image = rng.random((1, SIDE, SIDE))
    kind = number % 4
    if kind == 1:
        image = rng.normal(size=image.shape) * 10.0 ** rng.integers(-44, 38)
    elif kind == 2:
        image = rng.choice([0, 1, 0.5, np.nan, np.inf, -np.inf, 1e30], image.shape, p=[0.4, 0.4, 0.16, *[0.01] * 4])
    return unit(EXTRA + number, by_id, image, int(rng.choice([0, 1, 2, -1, 3], p=[0.3, 0.3, 0.3, 0.05, 0.05])))


def neighbours_of(way: Pipeline, n_pairs: int) -> tuple[dict[str, Any], list[Pair]]:
    """The neighbourhood to play a pipeline on."""
    if not way.of_owners:
        return neighbourhood(way.by_id, n_pairs)
    worlds, pairs = owner_models.neighbourhood(n_pairs)
    return worlds, [Pair(*pair) for pair in pairs]


def neighbourhood(by_id: bool, n_pairs: int) -> tuple[dict[str, World], list[Pair]]:
    """Data sets by name, and which of them are neighbours: `n_pairs` of them, or more, by one unit more or less, and some exchanged.

    Every data set is played once, however many pairs it is in. The one that is recorded is called "base"; "shuffled" has its records.
    """
    worlds = {"base": crowd(range(BASE), by_id)}
    pairs: list[Pair] = []

    def beside(name: str, world: World, other: str = "base") -> None:
        worlds[name] = world
        pairs.append(Pair(other, name))

    for n in AROUND:
        for size in (n, n + 1):
            worlds.setdefault(f"{size}", crowd(range(size), by_id))
        pairs.append(Pair(f"{n}", f"{n + 1}"))
    places = {"end": len(worlds["base"]), "front": 0, "middle": len(worlds["base"]) // 2}
    odd = odd_units(by_id)
    for number, (name, extra) in enumerate(odd.items()):
        beside(name, worlds["base"].plus(extra, list(places.values())[number % 3]))
        if number >= 3:  # the one before it in the same place
            pairs.append(Pair(list(odd)[number - 3], name, exchanged=True))
    for place, where in places.items():
        beside(f"one at the {place}", worlds["base"].plus(unit(EXTRA, by_id), where))
    for number in (0, BASE // 2, BASE - 1):
        beside(f"without {number}", worlds["base"].only(worlds["base"].ids != number))
    for name in ("nan", "rare class"):
        beside(f"{name} alone", odd[name], "0")
    worlds["shuffled"] = worlds["base"].only(np.random.default_rng(3).permutation(len(worlds["base"])))
    same = [
        dataclasses.replace(unit(0, by_id), tags=unit(n, by_id).tags, ids=unit(n, by_id).ids) for n in range(0, 51, 3)
    ]
    for n in (MICRO_BATCH, MICRO_BATCH + 1):  # all sums as long as they get
        worlds[f"{n} alike"] = functools.reduce(lambda world, more: world.plus(more, 0), same[:n])
    pairs.append(Pair(f"{MICRO_BATCH} alike", f"{MICRO_BATCH + 1} alike"))
    number = 0
    while sum(not pair.exchanged for pair in pairs) < n_pairs:
        rng, number = np.random.default_rng([13, number]), number + 1
        other, size = "base", BASE
        if number > 10:  # another crowd for each
            size = int(rng.integers(0, 40))
            other = f"{size}"
            worlds.setdefault(other, crowd(range(size), by_id))
        mine = worlds[other]
        if size and rng.random() < 0.3:
            beside(f"random {number}", mine.only(mine.ids != rng.integers(size)), other)
        else:
            beside(f"random {number}", mine.plus(drawn(number, by_id), int(rng.integers(len(mine) + 1))), other)
    return worlds, pairs


def in_every_sample(worlds: Mapping[str, World], pairs: Sequence[Pair]) -> frozenset[int]:
    """Tags of the records that one of a pair has and the other has not."""
    both = ((set(worlds[pair.one].tags), set(worlds[pair.other].tags)) for pair in pairs)
    return frozenset(int(tag) for one, other in both for tag in one ^ other)


# --- what is recorded ---------------------------------------------------------------------------------------------------------------


@dataclass
class Tape:
    """One run, as seen from outside, and what only the harness sees.

    Attributes:
      trace: all that whoever runs it, or reads what it leaves, can tell, in order.
      sums: of each release its public description and its exact sum in grid steps, before noise.
      answers: of each release the noisy sum in grid steps.
      files: of a whole release, by name.
    """

    trace: list[tuple[Any, ...]] = field(default_factory=list)
    sums: dict[str, tuple[bytes, NDArray[np.int64]]] = field(default_factory=dict)
    answers: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def note(self, kind: str, *facts: Any) -> None:
        self.trace.append((kind, *facts))


def fingerprint(thing: Any) -> str:
    """A hash of every bit of tensors, arrays and modules, and of dataclasses, mappings and sequences of them."""
    digest = hashlib.sha256()

    def eat(part: Any) -> None:
        if isinstance(part, torch.nn.Module):
            part = {"": type(part).__name__, **part.state_dict()}
        elif dataclasses.is_dataclass(part):
            part = {"": type(part).__name__, **vars(part)}
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            digest.update(repr((part.dtype.str, part.shape)).encode() + np.ascontiguousarray(part).tobytes())
        elif isinstance(part, Mapping):
            for key, value in part.items():
                digest.update(repr(key).encode())
                eat(value)
        elif isinstance(part, (list, tuple)):
            digest.update(str(len(part)).encode())
            for value in part:
                eat(value)
        else:
            digest.update(repr(part).encode())

    eat(thing)
    return digest.hexdigest()[:16]


class Coins:
    """The Poisson sample of one release."""

    def __init__(self, tape: Tape, release: str, tags: NDArray[np.int64], forced: frozenset[int]) -> None:
        self.tape, self.release, self.tags, self.forced = tape, release, tags, forced

    def bernoulli(self, n: int, prob: float) -> NDArray[np.bool_]:
        if n != len(self.tags):
            raise ValueError(f"{n} coins for {len(self.tags)} records")
        self.tape.note("coins", self.release, float(prob).hex())
        coins = Stream(derive(KEY, "coins", self.release)).bernoulli(int(self.tags.max(initial=0)) + 1, prob)
        return coins[self.tags] | np.isin(self.tags, list(self.forced))


class Noise(Stream):
    """The stream of one release, which knows what it is for."""

    def __init__(self, release: str, query: bytes, total: NDArray[np.int64]) -> None:
        super().__init__(derive(KEY, "noise", release, query))
        self.release, self.total = release, total.ravel().copy()


class PlayedVault(Vault):
    """A vault of a fixed key, whose streams are the harness's own."""

    def __init__(self, folder: Path, tape: Tape, world: World, forced: frozenset[int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, "run-played", KEY, False)
        self.tape, self.world, self.forced = tape, world, forced

    def sampling_stream(self, release: str) -> Any:
        return Coins(self.tape, release, self.world.tags, self.forced)

    def binds(self, release: str, total: NDArray[np.int64]) -> bool:
        self.tape.note("bound", release, total.shape, total.dtype.str)
        return super().binds(release, total)

    def noise_stream(self, release: str, query: bytes, total: NDArray[np.int64]) -> Noise:
        self.tape.note("noise for", release, query)
        self.tape.sums[release] = query, total.copy()
        return Noise(release, query, total)

    def save(self, release: str, noisy: NDArray[np.int64]) -> None:
        self.tape.note("kept", release, fingerprint(noisy))
        super().save(release, noisy)


# --- the harness around a run -------------------------------------------------------------------------------------------------------

_LISTENING: list[Callable[[str, tuple[Any, ...]], None]] = []
# Of files that are removed, that they were made is noted; in what order a folder is emptied is the file system's affair.
_TOUCHING = {"os.rename": 2, "os.mkdir": 1, "os.link": 2, "os.symlink": 2, "subprocess.Popen": 2, "socket.connect": 2}
_TIMES = re.compile(r"\d+:\d\d:\d\d|-:--:--")


@functools.cache
def _listen() -> None:
    """An audit hook cannot be taken away again: there is one, and it asks who is listening."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if _LISTENING and (event == "open" or event in _TOUCHING):
            _LISTENING[-1](event, args)

    sys.addaudithook(hook)


@contextlib.contextmanager
def watched(tape: Tape) -> Iterator[None]:
    """Notes what a run leaves outside: text, log lines, warnings, files that it writes, an error, draws from global generators."""
    _listen()

    def touched(event: str, args: tuple[Any, ...]) -> None:
        if "__pycache__" in str(args[0]):  # a first import
            return
        if event != "open":
            tape.note("touched", event, *map(str, args[: _TOUCHING[event]]))
        elif args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not isinstance(args[0], int):
            tape.note("opened", str(args[0]))

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tape.note("logged", record.name, record.levelno, record.getMessage())

    lines, printed, shown, root = Lines(), io.StringIO(), io.StringIO(), logging.getLogger()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(shown))
        said = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        root.addHandler(lines)
        stack.callback(root.removeHandler, lines)
        stack.callback(root.setLevel, root.level)
        root.setLevel(logging.INFO)
        torch.manual_seed(0)
        numbers = (np.random.get_state()[2], random.getstate())  # noqa: NPY002
        _LISTENING.append(touched)
        stack.callback(_LISTENING.clear)
        try:
            yield
        except Exception as error:
            tape.note("raised", type(error).__name__, str(error))
        tape.note("global generators", fingerprint(torch.random.get_rng_state()))
        tape.note("of others", numbers == (np.random.get_state()[2], random.getstate()))  # noqa: NPY002
    tape.note("printed", printed.getvalue())
    tape.note("shown", _TIMES.sub("TIME", shown.getvalue()))
    tape.note("warned", *((warning.category.__name__, str(warning.message)) for warning in said))


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> Any:
    """Patches `owner.name` with `wrapper(real, *args)`."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def patched(*args: Any, **named: Any) -> Any:
        return wrapper(real, *args, **named)

    return mock.patch.object(owner, name, patched)


@contextlib.contextmanager
def at_the_door(tape: Tape, source: Tape | None, world: World, forced: frozenset[int]) -> Iterator[None]:
    """Notes everything that a method says to the door, and what it is told; answers as the source was answered."""

    def open_vault(folder: Path, *, insecure_seed: int | None = None) -> PlayedVault:
        return PlayedVault(folder, tape, world, forced)

    def noise(n: int, sigma: float, stream: Noise) -> NDArray[np.int64]:
        tape.note("noise", stream.release, n, float(sigma).hex())
        if source is None:
            drawn = rounded_gaussian(n, sigma, stream)
            tape.answers[stream.release] = stream.total + drawn
            return drawn
        recorded: NDArray[np.int64] = source.answers[stream.release] - stream.total
        return recorded

    def reserve(real: Any, self: Door, query: Any, count: int = 1) -> Any:
        tape.note("reserve", query.describe(), count, query.name in self.checks)
        held = real(self, query, count)
        tape.note("reserved", held.line)
        return held

    def noisy(real: Any, self: Door, held: Any, index: int, exact_sum: Any) -> torch.Tensor:
        tape.note("release", held.query.describe(), held.count, held.line, index)
        released: torch.Tensor = real(self, held, index, exact_sum)
        tape.note("released", released.shape, released.dtype, fingerprint(released))
        return released

    def recordwise(real: Any, fn: Any, shape: Any, classes: int, *facts: Any) -> float:
        with torch.no_grad():
            outputs = fingerprint(fn(*probe(shape, classes)))
        worst: float = once(lambda: real(fn, shape, classes, *facts), "check", shape, classes, facts, outputs)
        tape.note("record function", facts, outputs, worst.hex())
        return worst

    def trainer(real: Any, train: Any, queries: torch.Tensor, shape: Any, classes: int, *facts: Any) -> float:
        model = train(*probe(shape, classes), torch.Generator().manual_seed(0))
        outputs = fingerprint(model(queries))
        worst: float = once(
            lambda: real(train, queries, shape, classes, *facts), "check", shape, classes, facts, outputs
        )
        tape.note("trainer", facts, outputs, worst.hex())
        return worst

    def asked(real: Any, self: Ensemble, query: Any, queries: torch.Tensor, progress: Any) -> Any:
        tape.note("queries", fingerprint(queries))
        return real(self, query, queries, progress)

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(Vault, "open", open_vault),
            mock.patch.object(private, "rounded_gaussian", noise),
            mock.patch.object(answers, "rounded_gaussian", noise),
            mock.patch.object(sources, "PrivateData", functools.partial(PrivateData, micro_batch=MICRO_BATCH)),
            around(Door, "reserve", reserve),
            around(Door, "_noisy", noisy),
            around(private, "check_recordwise", recordwise),
            around(features, "check_recordwise", recordwise),
            around(ensemble, "check_trainer", trainer),
            around(Ensemble, "_count", asked),
            around(Ensemble, "_sum", asked),
        ):
            stack.enter_context(patch)
        yield


@contextlib.contextmanager
def at_the_desk(tape: Tape) -> Iterator[None]:
    """Notes what a method does with its workspace: purposes of generators, steps, progress, checkpoints."""

    def generator(real: Any, self: FolderWorkspace, *labels: object) -> torch.Generator:
        tape.note("generator", labels)
        return real(self, *labels)  # type: ignore[no-any-return]

    def track(real: Any, self: FolderWorkspace, steps: Sequence[int], description: str) -> Iterator[int]:
        tape.note("steps", description, steps)
        for step in real(self, steps, description):
            tape.note("step", step)
            yield step

    @contextlib.contextmanager
    def passing(real: Any, self: FolderWorkspace, description: str) -> Iterator[Callable[[float], None]]:
        tape.note("passing", description)
        with real(self, description) as tell:

            def told(fraction: float) -> None:
                tape.note("progress", fraction)
                tell(fraction)

            yield told

    def load(real: Any, self: FolderWorkspace, name: str) -> Any:
        found = real(self, name)
        tape.note("load", name, found is not None)
        return found

    def save(real: Any, self: FolderWorkspace, name: str, tensors: Any) -> None:
        tape.note("save", name, {key: (value.shape, fingerprint(value)) for key, value in tensors.items()})
        real(self, name, tensors)

    with contextlib.ExitStack() as stack:
        for wrapper in (generator, track, passing, load, save):
            stack.enter_context(around(FolderWorkspace, wrapper.__name__, wrapper))
        yield


_MADE: dict[Any, Any] = {}


def once(make: Callable[[], Any], *key: Any) -> Any:
    """What `make` gives, made the first time that the key is seen."""
    if key not in _MADE:
        _MADE[key] = make()
    return _MADE[key]


@contextlib.contextmanager
def small(whole: bool) -> Iterator[None]:
    """What is public and the same for all runs is made once, and little of it.

    Args:
      whole: the release is written, so a student must be what a release holds, and ε what it costs. Else the one is a smaller network,
        and the other, which is a function of the plan and the ledger alone, is not computed.
    """

    def make_plan(real: Any, config: RunConfig, shape: Any, names: Any, models: int = 0) -> Any:
        return once(lambda: real(config, shape, names, models), "plan", whole, repr(config), shape, names, models)

    def wavelet(real: Any, padded: list[int], *facts: Any) -> Any:
        return once(lambda: real(padded, *facts), "wavelet", tuple(padded), *facts)

    def student(shape: tuple[int, int, int], n_classes: int, **facts: Any) -> Any:
        with mock.patch.object(few_step, "DEPTH", 1):
            return few_step.student(shape, n_classes, **facts)

    def fit_public(real: Any, self: LinearTeacher, images: torch.Tensor, generator: torch.Generator) -> LinearTeacher:
        def fitted() -> dict[str, torch.Tensor]:
            return {name: value.clone() for name, value in real(self, images, generator).state_dict().items()}

        self.load_state_dict(once(fitted, "fit", self.dim, fingerprint([images, generator.get_state()])))
        return self

    def made_up(real: Any, *facts: Any) -> Any:
        return once(lambda: real(*facts), real.__name__, *facts)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (planning, "N_PROCEDURAL", 60),
            (planning, "METHODS", {**METHODS, **BASELINES}),
            (model_conversion, "N_PROBE", 8),
            (teacher, "N_DRAWN", 30),
            (mixture, "N_SAMPLES", 50),
            (dpsad, "GUIDE", linear.Training(teacher_steps=2, teacher_dims=4)),
            (dpsad, "EMBEDDING", EmbeddingConfig(n_frequencies=8, steps=2, latent=2, width=2)),
            (dpsad, "N_GENERATED", 12),
            (os, "fsync", lambda descriptor: None),  # what outlives a power cut is tested elsewhere
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        if not whole:
            stack.enter_context(mock.patch.object(distillation, "student", student))
            stack.enter_context(mock.patch.object(planning, "calibrate", return_value=6.0))
            stack.enter_context(mock.patch.object(accounting, "epsilon", return_value=1.0))
            stack.enter_context(mock.patch.object(pipeline, "check_foreseen", return_value=[]))  # it would ask for ε
        stack.enter_context(around(pipeline, "make_plan", make_plan))
        stack.enter_context(around(scattering, "_wavelet", wavelet))
        stack.enter_context(around(LinearTeacher, "fit_public", fit_public))
        for name in ("procedural_images", "figures"):
            stack.enter_context(around(prior, name, made_up))
        yield


def play(
    way: Pipeline,
    world: World,
    folder: Path,
    source: Tape | None = None,
    *,
    forced: frozenset[int] = frozenset(),
    whole: bool = False,
) -> Tape:
    """Runs a pipeline on a world, in an empty folder, from its file on.

    Args:
      source: whose answers to repeat; None records.
      forced: tags of records that are in every sample.
      whole: by the command line, and with the release. Else the run ends where a method's result and all facts about it are handed to
        the bundle, which sees nothing else; both are in the trace.
    """
    tape, config = Tape(), way.config()
    folder.mkdir(parents=True)

    def read(real: Any, *args: Any, **named: Any) -> LabelledImages:
        if world.readable():
            return real(*args, **named)  # type: ignore[no-any-return]
        return world.records(way.by_id, named.get("resize"))

    def write(real: Any, out: Path, made: Any, facts: Any) -> Path:
        tape.note("made", fingerprint(made))
        tape.note("facts", facts)
        return real(out, made, facts) if whole else out  # type: ignore[no-any-return]

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        # Outside: what is noted there of the records is keyed, and stays with who runs it.
        stack.enter_context(mock.patch.dict(os.environ, {"DPDISTILL_HOME": "../home"}))
        stack.enter_context(small(whole))
        if world.readable():
            world.save(Path())
        Ledger.open(Path("ledger.jsonl"), cap=(3.0, config.delta), data="played", unit=way.unit).close()
        stack.enter_context(around(sources, "load_images", read))
        for module in (pipeline, diffusion, conversion):
            stack.enter_context(around(module, "write_result", write))
        stack.enter_context(at_the_desk(tape))
        stack.enter_context(at_the_door(tape, source, world, forced))
        with watched(tape):
            way.command() if whole else way.start(config)
        left = sorted(str(path) for path in Path().rglob("*") if path.parts[0] not in GIVEN)
        tape.note("left", left)
        tape.note("ledger", Path("ledger.jsonl").read_bytes())
        tape.files = {name: Path(name).read_bytes() for name in left if Path(name).is_file()}
    return tape


def record(
    way: Pipeline, world: World, folder: Path, *, forced: frozenset[int] = frozenset(), whole: bool = False
) -> Tape:
    """The run whose answers are repeated. A method's first run in a process imports things, and leaves what it makes: it is not kept."""
    once(lambda: play(way, world, folder / "first", forced=forced), "first", way.method)
    return play(way, world, folder / "source", forced=forced, whole=whole)


# --- what is compared ---------------------------------------------------------------------------------------------------------------


def declared(query: bytes, exchanged: bool = False) -> tuple[int, float]:
    """What a release's public description promises: the square of the most that the sum moves by, and the noise, in grid steps.

    Written down a second time on purpose, from docs/privacy/, and not taken from `privacy.queries`.
    """
    said = json.loads(query)
    sigma = float(said["noise_multiplier"])
    twice = 2 if exchanged else 1
    if said["mechanism"] == "gaussian_sum":
        reach = 2 ** int(said["grid_bits"])
        return (twice * reach) ** 2, sigma * reach
    moved = int(said["unit_moves"]) if exchanged else 1
    if said["mechanism"] == "noisy_votes":
        queries, vote = int(said["queries"]), 2**10
        return 2 * queries * (moved * vote) ** 2, sigma * (2 * queries) ** 0.5 * vote
    if said["mechanism"] == "shard_sum":
        reach = 2 * 2 ** int(said["grid_bits"])
        return (moved * reach) ** 2, sigma * reach
    raise ValueError(f"nothing is known of {said['mechanism']}")


def told_apart(one: Tape, other: Tape) -> list[str]:
    """What whoever sees both runs can tell them apart by. Nothing is what has to be."""
    found = []
    for number, (mine, theirs) in enumerate(zip([*one.trace, ("end",)], [*other.trace, ("end",)], strict=False)):
        if mine != theirs:  # what follows may only follow from it
            found.append(f"event {number}: {str(mine)[:300]} and {str(theirs)[:300]}")
            break
    names = sorted(one.files.keys() | other.files.keys())
    return found + [f"file {name}" for name in names if one.files.get(name) != other.files.get(name)]


def moved(one: Tape, other: Tape) -> dict[str, list[int]]:
    """By how much each row of each release's sum differs between two runs: its squared L2 norm, in grid steps, exactly."""
    if one.sums.keys() != other.sums.keys():
        raise ValueError("the runs released other things")
    found = {}
    for name, (_, mine) in one.sums.items():
        theirs = other.sums[name][1]
        if mine.shape != theirs.shape:
            raise ValueError("the runs released other shapes")
        rows = zip(np.atleast_2d(mine).tolist(), np.atleast_2d(theirs).tolist(), strict=True)
        found[name] = [sum((a - b) ** 2 for a, b in zip(*row, strict=True) if a != b) for row in rows]
    return found


def moved_too_far(one: Tape, other: Tape, *, exchanged: bool = False) -> list[str]:
    """Releases that move by more than their description says; of votes, each query by itself."""
    found = []
    for name, rows in moved(one, other).items():
        query = one.sums[name][0]
        limit, far = declared(query, exchanged)[0], sum(rows)
        if json.loads(query)["mechanism"] == "noisy_votes":
            far = max(far, max(rows) * len(rows))
        if far > limit:
            found.append(f"moved {(far / limit) ** 0.5:.4g} times as far as declared: {query.decode()}")
    return found


def wrong_noise(tape: Tape) -> list[str]:
    """Releases of a recorded run whose noise is not what their description says, on every coordinate."""
    drawn = {event[1]: event[2:] for event in tape.trace if event[0] == "noise"}
    found = []
    for name, (query, total) in tape.sums.items():
        n, sigma = drawn.get(name, (0, "0x0p+0"))
        if n != total.size or abs(float.fromhex(sigma) / declared(query)[1] - 1) > 1e-12:
            found.append(f"{query.decode()}: {n} draws of {float.fromhex(sigma)}")
    return found
