"""What a person decides, from flags, TOML and `--set a=b`. Each default stands once, in a dataclass; an unknown key names the nearest.

ε epsilon, δ delta.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .config_values import convert_fields
from .data.limits import DEFAULT_LIMITS
from .errors import ConfigError
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
        convert_fields(self)
        for name in ("out", "auxiliary", *(() if isinstance(self, ModelConfig) else ("data",))):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give --{name}, or leave it out")
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
