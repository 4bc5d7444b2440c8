"""What Parquet and Arrow tables must have in common: an image column and, where asked for, labels and ids, nothing missing in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpdistill.data.labels import UNLABELLED_HINT
from dpdistill.errors import InputError

Values = np.ndarray | list[str]  # integers, or text
Batch = tuple[list[bytes], Values | None, Values | None]  # encoded images; labels and ids, where they are asked for


class Columns(NamedTuple):
    """Names of the columns to read.

    Attributes:
      image: None for the only one of encoded images.
      label, ids: None where they are not read.
    """

    image: str | None
    label: str | None
    ids: str | None

    def named(self) -> tuple[str, ...]:
        """Those that have a name."""
        return tuple(name for name in self if name is not None)


def known_columns(names: Sequence[str]) -> str:
    """Returns the public column names, for hints."""
    return ", ".join(name[:40] for name in names[:12] if name.isprintable())


def check_column_names(path: str, names: Sequence[str], columns: Columns) -> None:
    """Refuses a table that has not exactly one column of each of the names."""
    for name, argument in zip(columns, ("image_column", "label_column", "id_column"), strict=True):
        if name is not None and list(names).count(name) != 1:
            hint = f"columns: {known_columns(names)}; --set {argument}=NAME"
            hint += f"; {UNLABELLED_HINT}" if argument == "label_column" else ""
            raise InputError(path, f"has not one column {name!r}", hint)


def only_images(path: str, names: Sequence[str]) -> str:
    """Returns the one of the columns of encoded images, or of several the one called `image`."""
    if "image" in names:
        return "image"
    if len(names) != 1:
        hint = f"such columns: {known_columns(names) or 'none'}; call one 'image'"
        raise InputError(path, "has not one column of encoded images, as bytes or struct<bytes, path>", hint)
    return names[0]


def no_images(path: str, names: Sequence[str], column: str) -> InputError:
    """Returns the error for an image column of another type."""
    reason = f"column {column!r} does not hold encoded images, as bytes or struct<bytes, path>"
    return InputError(path, reason, f"columns: {known_columns(names)}; --set image_column=NAME")


def no_labels(path: str, names: Sequence[str], column: str) -> InputError:
    """Returns the error for a label column of another type."""
    hint = f"columns: {known_columns(names)}; --set label_column=NAME"
    return InputError(path, f"column {column!r} does not hold labels, as integers or text", hint)


def no_ids(path: str, names: Sequence[str], column: str) -> InputError:
    """Returns the error for an id column of another type."""
    hint = f"columns: {known_columns(names)}; --id-column NAME"
    return InputError(path, f"column {column!r} does not hold ids, as integers or text", hint)


def check_nulls(path: str, missing: bool) -> None:
    """Refuses missing values."""
    if missing:
        hint = "embed the images themselves, and fill in or drop rows without a label"
        raise InputError(path, "has an image or a label that is missing, or only the path of an image", hint)
