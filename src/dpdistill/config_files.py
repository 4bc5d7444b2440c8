"""Configurations as files and on the command line: read with clear errors, and written without a path of the person's machine."""

import dataclasses
import difflib
import hashlib
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .config import GIVEN, NOMINAL, ModelConfig, RunConfig
from .config_values import convert
from .errors import ConfigError, InputError
from .files import MAX_TOML, parse_toml, read_small


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
    return kind(**{key: convert(where + key, value, hints[key]) for key, value in values.items()})


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


# How what is private is read. The list of classes is in the certificate.
READING_IMAGES = (
    "image_column",
    "label_column",
    "id_column",
    "split",
    "unlabelled",
    "channels",
    "resize",
    "value_low",
    "value_high",
)
READING_MODELS = ("architecture", "shape", "input_low", "input_high", "mean", "std", "layout", "outputs")


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
        chosen |= {"nominal_epsilon": config.epsilon, "nominal_delta": config.delta}
    elif config.method != "conversion":  # whose ε and δ are the teacher's
        chosen |= {"epsilon": config.epsilon, "delta": config.delta}
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
    for name in READING_IMAGES if config.data else READING_MODELS:
        value = getattr(config, name, None)
        lines += [] if value is None else [f"{name} = {_toml(value)}"]
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
