"""The class list and the labels: the first is public and declared, the second must fit it.

A label that does not fit is a fault of the file, found before any budget is spent. Which record has it, and what it
says, is never printed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpdistill.data.limits import Limits
from dpdistill.errors import InputError

WHY_DECLARED = "the set of labels present is private, so the class list must be public knowledge"

ONE_CLASS = ("image",)  # of images without labels
UNLABELLED_HINT = "for a diffusion model of images without labels, --unlabelled"


def check_names(path: object, names: Sequence[object], limits: Limits) -> tuple[str, ...]:
    """Returns a class list. Empty, repeated, overlong or unprintable names are refused."""
    if not 1 <= len(names) <= limits.max_classes:
        raise InputError(path, f"needs a list of 1 to {limits.max_classes:,} class names", "name every class")
    checked = tuple(name for name in names if isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable())
    if len(checked) != len(names):
        raise InputError(path, "has a class name that is not 1 to 200 printable characters", "rename the class")
    if len(set(checked)) != len(checked):
        raise InputError(path, "has two classes of the same name", "rename one")
    return checked


def resolve_classes(
    path: object,
    in_file: Sequence[object] | None,
    class_names: Sequence[str] | None,
    n_classes: int | None,
    limits: Limits,
) -> tuple[str, ...]:
    """Returns the class list from what the file declares and what the user declares; they must not contradict.

    Args:
      in_file: names that the file or folder declares, or None.
      class_names: names that the user declares, or None.
      n_classes: the number that the user declares, or None. Alone, it names the classes '0', '1', ….

    Raises:
      InputError: nobody declares the classes, or two declarations differ.
    """
    if isinstance(class_names, str):
        raise InputError(path, "class_names is one string", "give a list of names")
    if in_file is None and class_names is None:
        if n_classes is None:
            raise InputError(
                path,
                "does not list its classes",
                f"give --classes K, or --set class_names=A,B,…: {WHY_DECLARED}",
            )
        if not isinstance(n_classes, int) or not 1 <= n_classes <= limits.max_classes:
            raise InputError(
                path, f"n_classes must be a whole number in 1..{limits.max_classes}", "choose another --classes"
            )
        return tuple(str(k) for k in range(n_classes))
    given = None if class_names is None else check_names(path, class_names, limits)
    names = given if in_file is None else check_names(path, in_file, limits)
    if names is None or (given is not None and given != names):
        raise InputError(path, "lists other classes than class_names", "leave class_names out, or give the same names")
    if n_classes is not None and n_classes != len(names):
        raise InputError(path, f"lists {len(names)} classes, and {n_classes} were asked for", "leave --classes out")
    return names


def check_labels(path: object, labels: np.ndarray, n_images: int, n_classes: int) -> np.ndarray:
    """Returns labels as int64 [N] in 0..K-1.

    Args:
      labels: [N], any integer dtype, or floats that are whole numbers.

    Raises:
      InputError: not one whole number in 0..K-1 for each image. The message names no label, record or count.
    """
    if labels.ndim != 1:
        raise InputError(path, "needs one label for each image, as an array [N]", "turn one-hot rows into numbers")
    if labels.dtype.kind not in "iuf":
        raise InputError(path, "labels must be whole numbers", "store the position of each label in the class list")
    if len(labels) != n_images:
        raise InputError(path, "has not the same number of images and labels", "save one label for each image")
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.trunc(labels)):  # NaN differs from itself
        raise InputError(path, "labels must be whole numbers", "store them as int64")
    if len(labels) and not (labels.min() >= 0 and labels.max() < n_classes):
        hint = f"labels are 0..{n_classes - 1}; check --classes, and whether they count from 0"
        raise InputError(path, "has a label outside the class list", hint)
    return labels.astype(np.int64)
