"""Values of a configuration as the types that its fields are annotated with: whether they come as text, from a file or from Python."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError


def convert_fields(config: Any) -> None:
    """Gives every field of a dataclass, frozen or not, its annotated type: numpy's numbers and paths are written and compared as others.

    Raises:
      ConfigError: a value is of another type.
    """
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        object.__setattr__(config, item.name, convert(item.name, value, hints[item.name]))


def convert(name: str, value: Any, wanted: Any) -> Any:
    """`value` as the annotated type: numbers and booleans may come as text; a number has to be finite, and whole ones fit 64 bits.

    Raises:
      ConfigError: it is of another type.
    """
    if getattr(value, "ndim", None) == 0:  # a number of NumPy's or torch's
        value = value.item()
    options = (
        typing.get_args(wanted)
        if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union
        else (wanted,)
    )
    plain = value is None or isinstance(value, (str, bool, int, float))
    if type(None) in options and plain and value in (None, "none", ""):
        return None
    for option in options:
        if option is bool and plain and (isinstance(value, bool) or value in ("true", "false")):
            return value in (True, "true")
        if option is str and isinstance(value, (str, Path)) and "\0" not in str(value):  # which no path can hold
            return str(value)
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
                for choice in allowed if plain else ():
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
