"""What Parquet and Arrow tables must have in common: an image column and a label column, nothing missing in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpdistill.errors import InputError

Values = np.ndarray | list[str]  # integers, or text
Batch = tuple[list[bytes], Values, Values | None]  # encoded images; labels; ids, where they are asked for


def known_columns(names: Sequence[str]) -> str:
    """Returns the public column names, for hints."""
    return ", ".join(name[:40] for name in names[:12] if name.isprintable())


def check_column_names(path: str, names: Sequence[str], columns: tuple[str, ...]) -> None:
    """Refuses a table that has not exactly one column of each of the names."""
    for name, argument in zip(columns, ("image_column", "label_column", "id_column"), strict=False):
        if list(names).count(name) != 1:
            raise InputError(
                path, f"has not one column {name!r}", f"columns: {known_columns(names)}; --set {argument}=NAME"
            )


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
