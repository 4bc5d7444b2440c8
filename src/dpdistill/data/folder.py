"""A folder of class folders: root/cat/1.png, root/dog/2.jpg, … The class list is the sorted folder names.

A class folder may be empty: the class list is public and must not change when one record is removed. Files are read in
sorted order. Dot files and leftovers of file managers are skipped; anything else that is no image is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpdistill.data.decode import EXTENSIONS, decode_image
from dpdistill.data.files import list_folder, one_error_type, open_regular
from dpdistill.data.labels import UNLABELLED_HINT
from dpdistill.data.limits import Limits
from dpdistill.data.splits import choose_split
from dpdistill.data.stack import stack_images
from dpdistill.data.stored import Images
from dpdistill.errors import InputError

SPLITS = ("train", "test", "val", "valid", "validation")


def split_folder(root: str | Path, split: str | None, limits: Limits, unlabelled: bool = False) -> str:
    """Returns the folder that holds the class folders: `root`, or root/train if that holds folders in turn.

    Where images need no class folders, root/train is a part, too, if `root` holds only parts, or if it is asked for.
    """
    folders = [entry for entry in list_folder(root, limits) if entry.is_dir(follow_symlinks=False)]
    only_parts = all(entry.name in SPLITS for entry in folders)
    splits = {}
    for entry in folders:
        if entry.name in SPLITS or entry.name == split:
            inside = list_folder(entry.path, limits)
            bare = unlabelled and (only_parts or entry.name == split)
            if bare or (inside and all(child.is_dir(follow_symlinks=False) for child in inside)):
                splits[entry.name] = entry.path
    if not splits and split is None:
        return os.fspath(root)
    return splits[choose_split(root, splits, split)]


def read_folder(
    root: str | Path,
    *,
    split: str | None,
    class_names: Sequence[str] | None,
    resize: int | None,
    channels: int | None,
    limits: Limits,
    unlabelled: bool = False,
) -> tuple[Images, np.ndarray | None, list[str] | None]:
    """Reads images, labels and class names.

    Args:
      class_names: their order, and classes without a folder; every folder must be in it. None: sorted folder names.
      unlabelled: reads every image, in class folders or not.

    Returns:
      uint8 [N, C, H, W], and int64 [N] and K names, or None where labels are not read.

    Raises:
      InputError: the first file that cannot be used, or a layout that is not root/class/image.
    """
    root = split_folder(root, split, limits, unlabelled)
    folders = list_folder(root, limits)
    if unlabelled:
        every: list[str] = []
        for entry in folders:
            every += image_files(entry.path, limits) if entry.is_dir() else [image_file(entry)]
        return stacked(root, every, resize, channels, limits), None, None
    for entry in folders:
        if not entry.is_dir(follow_symlinks=False):
            raise InputError(
                entry.path,
                "lies beside the class folders",
                f"put each image in a folder named by its class; {UNLABELLED_HINT}",
            )
    names = [entry.name for entry in folders] if class_names is None else list(class_names)
    files: list[str] = []
    labels: list[int] = []
    for entry in folders:
        if entry.name not in names:
            raise InputError(entry.path, "is a class that class_names does not list", "add it, or move the folder away")
        found = image_files(entry.path, limits)
        files += found
        labels += [names.index(entry.name)] * len(found)
    return stacked(root, files, resize, channels, limits), np.array(labels, np.int64), names


def stacked(root: str | Path, files: list[str], resize: int | None, channels: int | None, limits: Limits) -> Images:
    """Returns the images of these files, uint8 [N, C, H, W]."""
    if not files:
        raise InputError(root, "holds no images", "put PNG, JPEG, BMP or WebP files in one folder for each class")
    decoded = ((path, read_image(path, resize, limits)) for path in files)
    with one_error_type(root):
        return stack_images(root, decoded, len(files), limits, channels)


def image_files(folder: str, limits: Limits) -> list[str]:
    """Returns the paths of the images of one class."""
    paths: list[str] = []
    for entry in list_folder(folder, limits):
        if entry.is_dir(follow_symlinks=False):
            hint = "if the classes lie deeper, name the folder above them, or of --data --set split=NAME"
            raise InputError(entry.path, "is a folder inside a class folder", hint)
        paths.append(image_file(entry))
    return paths


def image_file(entry: os.DirEntry[str]) -> str:
    """Returns the path of an image, told by its name."""
    if os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
        raise InputError(entry.path, "is not named .png, .jpg, .jpeg, .bmp or .webp", "move it away or convert it")
    return entry.path


def read_image(path: str, resize: int | None, limits: Limits) -> np.ndarray:
    """Returns the pixels [C, H, W] of one file."""
    with open_regular(path, limits, follow=False) as (file, size):
        if size > limits.max_image_bytes:
            raise InputError(path, f"is larger than {limits.max_image_bytes:,} bytes", "shrink it first")
        return decode_image(file.read(size), path, limits, resize)
