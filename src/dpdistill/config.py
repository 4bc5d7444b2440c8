"""What a person decides, from flags, TOML and `--set a=b`. Each default stands once, in a dataclass; an unknown key names the nearest.

ε epsilon, δ delta.
"""

import dataclasses
import difflib
import hashlib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .data.limits import DEFAULT_LIMITS
from .errors import ConfigError, InputError
from .files import MAX_TOML, parse_toml, read_small
from .privacy.accounting import MAX_EPSILON, MIN_DELTA

MAX_GIB = 2**20


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One release of a data set.

    Attributes:
      data: private images: .npz, folder of class folders, IDX, Parquet, a saved Hugging Face data set, or `digits`.
      out: the release folder to make.
      epsilon, delta: the guarantee asked for.
      per_class: synthetic images per class.
      method: a name in METHODS.
      auxiliary: public images in any of the forms of `data`, labels optional, or `none` for procedural ones.
      seed: of everything public (start images, augmentation). Privacy noise never comes from it.
      budget: ε that all runs on this data may cost together; where not given, what the first run asked for.
      ledger: the data set's ledger; where not given, one per data set under ~/.dpdistill (or $DPDISTILL_HOME).
      classes: number of classes, where the files do not say (the labels that occur are private).
      class_names: their names, with commas, where labels are text and the file lists no classes.
      image_column, label_column: of a table.
      split: which part of `data`, where there are several; `train`, or the only one.
      channels: 1 or 3, where images are to be made all grey or all colour.
      value_low, value_high: black and white of float images: a file does not say, and pixels are not asked.
      resize: side length in pixels to scale images to on reading.
      max_gib: most data to read, in GiB once unpacked. What does not fit in memory stays on disk.
      device: cpu or cuda.
      settings: the method's own settings, by name.
    """

    data: str
    out: str = "out/release"
    epsilon: float = 1.0
    delta: float = 1e-5
    per_class: int = 10
    method: str = "joint"
    auxiliary: str = "none"
    seed: int = 0
    budget: float | None = None
    ledger: str | None = None
    classes: int | None = None
    class_names: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    split: str | None = None
    channels: Literal[1, 3] | None = None
    value_low: float | None = None
    value_high: float | None = None
    resize: int | None = None
    max_gib: int = 4
    device: str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (1e-3 <= self.epsilon <= MAX_EPSILON):
            raise ConfigError(f"Expected epsilon of at least 0.001 and at most {MAX_EPSILON:g}, got {self.epsilon}.")
        if not (MIN_DELTA <= self.delta < 1):
            raise ConfigError(
                f"Expected delta in [{MIN_DELTA:g}, 1), got {self.delta}; below, no ε can be computed. 1e-5 is usual."
            )
        if not (1 <= self.per_class <= 1000):
            raise ConfigError(f"Expected per_class in 1..1000, got {self.per_class}.")
        if self.budget is not None and not (self.epsilon <= self.budget < math.inf):
            raise ConfigError(f"Expected a budget of at least epsilon={self.epsilon}, got {self.budget}.")
        if not (0 <= self.seed < 2**63):
            raise ConfigError(f"Expected a seed in 0..2**63 - 1, got {self.seed}.")
        if self.classes is not None and not (1 <= self.classes <= DEFAULT_LIMITS.max_classes):
            most = DEFAULT_LIMITS.max_classes
            raise ConfigError(f"Expected at least one class and at most {most:,}, got classes={self.classes}.")
        low, high = self.value_low, self.value_high
        if not (low is high is None or (low is not None and high is not None and low < high)):
            raise ConfigError(f"Expected value_low below value_high, both or neither, got {low} and {high}.")
        if not (1 <= self.max_gib <= MAX_GIB):
            raise ConfigError(f"Expected max_gib in 1..{MAX_GIB}, got {self.max_gib}.")
        check_device_name(self.device)


def check_device_name(device: str) -> None:
    """Raises ConfigError on a device that nothing here runs on."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"Expected a device of cpu or cuda, got {device!r}.")


GIVEN = ("per_class", "expected_records", "unit_moves", "target_epsilon")  # settings that a method has from its run
PLANNED = "planned"  # stands for the data of a run that is planned and not made
NOMINAL = ("opaque", "paper")  # methods whose ε is the papers' own count
WAYS = ("teacher", "votes", "conversion", "opaque")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(RunConfig):
    """One student model. What is given decides the way: `data` alone trains a private teacher, `shards` or `teachers` vote, `teacher`
    is converted as it comes.

    Attributes:
      data: private images, where a private teacher or voting teachers are to be trained from them.
      method: a name in MODEL_METHODS, or empty: the way that fits what is given.
      per_class: images of the generator to release with the student, per class.
      shards: K, disjoint shards of `data` with one voting teacher each; "auto" lets the planner choose it from `expected_records`.
      expected_records: public guess of how many records there are; never taken from the data.
      id_column: array of the .npz, or column of Parquet: whose record each is. One person is in one shard, and the guarantee is per id.
      teachers: folder with one model of every owner, to vote.
      teacher: a model (.onnx, .safetensors with `architecture`), or a release folder of ours.
      architecture: module:callable that makes the network of a .safetensors file.
      shape: channels,height,width of a teacher's images, where the file does not say.
      input_low, input_high: pixel range that a teacher expects.
      mean, std: one number for each channel, with commas, that a teacher wants subtracted and divided by after that.
      layout: order of a teacher's axes; Keras and TensorFlow export NHWC.
      outputs: of a teacher; where not given, its answers to made-up images tell.
      attested_epsilon, attested_delta, attested_unit: what the teacher's supplier says about its training.
      accept_no_record_guarantee: go on with a teacher of which nothing is known, the paper's way.
    """

    data: str = ""
    method: str = ""
    shards: int | Literal["auto"] | None = None
    expected_records: int | None = None
    id_column: str | None = None
    teachers: str | None = None
    teacher: str | None = None
    architecture: str | None = None
    shape: str | None = None
    input_low: float = 0.0
    input_high: float = 1.0
    mean: str | None = None
    std: str | None = None
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    outputs: Literal["logits", "probabilities"] | None = None
    attested_epsilon: float | None = None
    attested_delta: float | None = None
    attested_unit: str = "record"
    accept_no_record_guarantee: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("data", "teachers", "teacher") if getattr(self, name)]
        if self.data == PLANNED and len(given) > 1:
            raise ConfigError(
                "models that someone brings have to be read; `dpdistill model --dry-run` says what they cost"
            )
        if len(given) != 1:
            raise ConfigError(
                "give one of --data (private images), --teachers (a folder of models that vote), --teacher (one model)"
                + (f"; got {' and '.join('--' + name for name in given)}" if given else "")
            )
        if (self.shards is not None or self.id_column) and not self.data:
            raise ConfigError("--shards and --id-column cut --data; give the images with --data")
        if self.id_column and self.shards is None:
            raise ConfigError("--id-column needs --shards K: only voting teachers keep one person's records together")
        if self.shards == "auto" and (self.expected_records is None or self.expected_records < 240):
            raise ConfigError(
                "--shards auto plans from --expected-records, a public guess of at least 240; or name a number"
            )
        if isinstance(self.shards, int) and not (2 <= self.shards <= 100_000):
            raise ConfigError(f"Expected shards in 2..100000, got {self.shards}.")
        attested = (self.attested_epsilon, self.attested_delta)
        if any(value is not None for value in attested):
            if None in attested or not self.teacher:
                raise ConfigError("--attested-epsilon and --attested-delta go together, with --teacher")
            if not (0 < float(self.attested_epsilon or 0) <= 1e6):
                raise ConfigError(f"Expected an attested epsilon > 0 and at most 1e6, got {self.attested_epsilon}.")
            if not (MIN_DELTA <= float(self.attested_delta or 0) < 1):
                raise ConfigError(
                    f"Expected an attested delta in [{MIN_DELTA:g}, 1), got {self.attested_delta}; what is attested at a smaller one "
                    f"holds at {MIN_DELTA:g} as well"
                )
            if self.accept_no_record_guarantee:
                raise ConfigError("a teacher is attested or has no guarantee, not both")
        if not (self.attested_unit.isascii() and self.attested_unit.isalpha() and len(self.attested_unit) <= 30):
            raise ConfigError(f"Expected attested_unit as one word, such as record, got {self.attested_unit!r}.")
        if not (-1e6 < self.input_low < self.input_high < 1e6):
            raise ConfigError("Expected input_low below input_high.")
        if self.teacher and (self.budget, self.ledger) != (None, None):
            raise ConfigError("a teacher's conversion charges nothing: leave --budget and --ledger out")
        if self.way == "conversion" and (self.epsilon, self.delta) != (RunConfig.epsilon, RunConfig.delta):
            raise ConfigError("a trained teacher's ε and δ are what they are: leave --epsilon and --delta out")
        if self.method and self.method != self.way:
            raise ConfigError(f"--method {self.method}: what is given calls for {self.way}; leave --method out")

    @property
    def way(self) -> str:
        """Which of WAYS fits what is given. A release folder of ours and an attested teacher are converted alike."""
        if self.data:
            return "teacher" if self.shards is None else "votes"
        if self.teachers:
            return "votes"
        return "opaque" if self.accept_no_record_guarantee else "conversion"


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(RunConfig):
    """One diffusion model.

    Attributes:
      method: a name in DIFFUSION_METHODS.
      per_class: samples to release beside the model, per class.
      expected_records: public guess of how many records there are; never taken from the data.
      unlabelled: the images are of one class, whatever labels there are.
      accept_no_record_guarantee: with `method` paper: the paper's own form, which has none.
    """

    method: str = "dpsad"
    expected_records: int | None = None
    unlabelled: bool = False
    accept_no_record_guarantee: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.method == "paper") != self.accept_no_record_guarantee:
            raise ConfigError(
                "the paper's own form has no guarantee for any record: --method paper and --accept-no-record-guarantee go together"
            )
        if self.expected_records is None:
            raise ConfigError(
                "give --expected-records, a public guess of how many images there are: sampling is planned from it, and the "
                "exact number is private"
            )
        if self.expected_records < 1:
            raise ConfigError(f"Expected expected_records of at least 1, got {self.expected_records}.")


def _convert(name: str, value: Any, wanted: Any) -> Any:
    """`value` as the annotated type: numbers and booleans may come as text; a number has to be finite, and whole ones fit 64 bits."""
    options = (
        typing.get_args(wanted)
        if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union
        else (wanted,)
    )
    if type(None) in options and value in (None, "none", ""):
        return None
    for option in options:
        if option is bool and (isinstance(value, bool) or value in ("true", "false")):
            return value in (True, "true")
        if option is str and isinstance(value, str) and "\0" not in value:  # which no path can hold
            return value
        if option in (int, float) and not isinstance(value, bool):
            try:
                number = option(value)
                if not math.isfinite(number) or (option is int and isinstance(value, float) and value != number):
                    continue
                if option is int and not -(2**63) <= number < 2**63:
                    continue
                return number
            except (TypeError, ValueError, OverflowError):
                continue
        if typing.get_origin(option) in (tuple, typing.Literal) or option in (tuple, list):
            allowed = typing.get_args(option)
            if typing.get_origin(option) is typing.Literal:
                for choice in allowed:
                    if value == choice or str(choice) == value:
                        return choice
            elif isinstance(value, (list, tuple)):
                return tuple(value)
        if typing.get_origin(option) is not None and isinstance(value, Mapping):
            return dict(value)
    raise ConfigError(f"{name} = {_said(value)}: expected {' or '.join(map(_readable, options))}")


def _readable(option: Any) -> str:
    """A type as a message names it: of some values, those."""
    if typing.get_origin(option) is typing.Literal:
        return " or ".join(map(str, typing.get_args(option)))
    return "none" if option is type(None) else getattr(option, "__name__", str(option))


def _said(value: Any, most: int = 100) -> str:
    """A value as a message may quote it: not at any length, and Python writes no number of over 4300 digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a vast number"
    return text if len(text) <= most else text[: most - 3] + "..."


def build(kind: type[Any], values: Mapping[str, Any], where: str = "", others: Iterable[str] = ()) -> Any:
    """Returns `kind(**values)` with every value converted to its annotated type.

    Args:
      where: what stands before a key in messages.
      others: keys of another place, which an unknown one may have been meant for.

    Raises:
      ConfigError: an unknown key, with the nearest known one, or a value of another type.
    """
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            known = {name: name for name in others} | {name: where + name for name in hints}
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise ConfigError(
                f"unknown setting {where}{key[:100]}"
                + (f"; did you mean {known[near[0]]}?" if near else f"; known: {', '.join(hints)}")
            )
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        way = f"--set {missing[0]}=…" if where else f"--{missing[0].replace('_', '-')}"
        raise ConfigError(f"missing: {where}{missing[0]}; give {way}")
    return kind(**{key: _convert(where + key, value, hints[key]) for key, value in values.items()})


def read(
    file: Path | None, flags: Mapping[str, Any], assignments: list[str], kind: type[RunConfig] = RunConfig
) -> RunConfig:
    """Returns the configuration of a TOML file, overridden by flags (where not None) and by `name=value` assignments.

    The file may be a release's own config.toml: another run, on what the flags name, is then made alike.
    A bare name in an assignment, or one under `settings.`, is a setting of the method; `epsilon=2` and the like also work.
    """
    if file is None:
        return _resolve({}, flags, assignments, kind)
    try:
        values = parse_toml(read_small(file, MAX_TOML))
    except InputError as error:
        raise ConfigError(str(error)) from None
    except ValueError as error:
        raise ConfigError(f"{file}: not TOML ({error})") from None
    try:
        return _resolve(_made_alike(values), flags, assignments, kind)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _made_alike(values: dict[str, Any]) -> dict[str, Any]:
    """What `public_toml` wrote, as a person would have said it: without what follows from it. Other files are left as they are."""
    reading, settings = values.get("reading"), values.get("settings")
    if "noise_multiplier" not in values or not isinstance(reading, dict) or not isinstance(settings, dict):
        return values
    follows = ("noise_multiplier", "auxiliary_sha256", "reading")
    found = {name.removeprefix("nominal_"): value for name, value in values.items() if name not in follows} | reading
    if isinstance(settings.get("expected_records"), int):
        found["expected_records"] = settings["expected_records"]
    if values.get("method") == "votes" and "image_column" in reading:  # shards of records, and no owners' models
        found["shards"] = settings.get("models")
    given = (*GIVEN, *(["models"] if values.get("method") == "votes" else []))
    return found | {"settings": {name: value for name, value in settings.items() if name not in given}}


def _resolve(
    values: dict[str, Any], flags: Mapping[str, Any], assignments: list[str], kind: type[RunConfig]
) -> RunConfig:
    values.update({key: value for key, value in flags.items() if value is not None})
    settings = values.pop("settings", {})
    if not isinstance(settings, dict):
        raise ConfigError("settings: expected a table, such as [settings] with a line steps = 100")
    known = {f.name for f in dataclasses.fields(kind)} - {"settings"}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: expected name=value")
        name = name.removeprefix("settings.")
        target = values if name in known else settings
        target[name] = text
    return typing.cast(RunConfig, build(kind, {**values, "settings": settings}))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    text = str(value).encode("utf-8", "replace").decode()  # a file's name may hold bytes that are no text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\u{ord(match[0]):04x}", escaped) + '"'


# How what is private is read, and as what type it is written: from Python nothing converts it. The list of classes is in the certificate.
READING_IMAGES: dict[str, type] = {
    "image_column": str,
    "label_column": str,
    "id_column": str,
    "split": str,
    "unlabelled": bool,
    "channels": int,
    "resize": int,
    "value_low": float,
    "value_high": float,
}
READING_MODELS: dict[str, type] = {
    "architecture": str,
    "shape": str,
    "input_low": float,
    "input_high": float,
    "mean": str,
    "std": str,
    "layout": str,
    "outputs": str,
}


def public_toml(config: RunConfig, settings: Any, noise_multiplier: float, auxiliary_sha256: str = "") -> str:
    """Returns the configuration as it may be released: everything public that shaped the result, no path of this machine.

    Args:
      auxiliary_sha256: of the auxiliary images, where a person gave any: two sets may bear one name.

    Raises:
      ConfigError: it is longer than a release may hold.
    """
    lines = ["# The configuration of this release, as resolved. Every value is public."]
    chosen: dict[str, Any] = {"method": config.method}
    if config.method in NOMINAL:  # of a count that covers no record
        chosen |= {"nominal_epsilon": float(config.epsilon), "nominal_delta": float(config.delta)}
    elif config.method != "conversion":  # whose ε and δ are the teacher's
        chosen |= {"epsilon": float(config.epsilon), "delta": float(config.delta)}
    if isinstance(config, ModelConfig) and config.attested_epsilon is not None:
        chosen |= {
            "attested_epsilon": float(config.attested_epsilon),
            "attested_delta": float(config.attested_delta or 0),
        }
        chosen["attested_unit"] = config.attested_unit
    chosen |= {"per_class": config.per_class, "seed": config.seed, "auxiliary": Path(config.auxiliary).name}
    chosen |= {"auxiliary_sha256": auxiliary_sha256} if auxiliary_sha256 else {}
    chosen["noise_multiplier"] = noise_multiplier
    lines += [f"{name} = {_toml(value)}" for name, value in chosen.items()]
    lines += ["", "[reading]"]
    for name, kind in (READING_IMAGES if config.data else READING_MODELS).items():
        value = getattr(config, name, None)
        lines += [] if value is None else [f"{name} = {_toml(kind(value))}"]
    lines += ["", "[settings]"]
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        lines.append(f"# {item.name}: not set" if value is None else f"{item.name} = {_toml(value)}")
    text = "\n".join(lines) + "\n"
    if len(text.encode()) > MAX_TOML:
        raise ConfigError(
            f"the settings take more than the {MAX_TOML:,} bytes that a release may hold; use shorter names"
        )
    return text


def config_hash(toml: str) -> str:
    return hashlib.sha256(toml.encode()).hexdigest()
