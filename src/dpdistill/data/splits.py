"""Which part of a data set to read, when a folder holds several."""

from __future__ import annotations

import re
from collections.abc import Collection

from dpdistill.errors import InputError

KNOWN_SPLITS = frozenset({"train", "test", "val", "valid", "validation", "dev", "eval", "unsupervised", "extra"})
SHARD = re.compile(r"(?P<split>[A-Za-z0-9_.]+?)-(?P<index>\d{1,6})-of-(?P<total>\d{1,6})(-[0-9a-f]+)?", re.ASCII)


def choose_split(path: object, available: Collection[str], split: str | None) -> str:
    """Returns the split asked for; without a wish `train`, or the only one.

    Raises:
      InputError: it is not there, or there are several and none is `train`.
    """
    if split is None and "train" in available:
        return "train"
    if split is None and len(available) == 1:
        return next(iter(available))
    if split in available:
        return str(split)
    known = ", ".join(sorted(available)[:8]) or "none"
    given = "needs a split" if split is None else f"has no split {split!r}"
    raise InputError(
        path, given, f"splits found: {known}; name the folder or file of one, or of --data --set split=NAME"
    )


def group_shards(path: object, stems: Collection[str]) -> dict[str, list[str]]:
    """Returns the file stems of each split, in order.

    `train-00000-of-00002` belongs to `train`, and every shard must be there; `test` alone is a split; if neither
    pattern occurs, all files are one data set, named ''.

    Raises:
      InputError: a shard is missing, or files of a split lie beside files of none.
    """
    groups: dict[str, list[str]] = {}
    totals: dict[str, set[int]] = {}
    for stem in sorted(stems):
        match = SHARD.fullmatch(stem)
        if match is not None:
            groups.setdefault(match["split"], []).append(stem)
            totals.setdefault(match["split"], set()).add(int(match["total"]))
        else:
            groups.setdefault(stem if stem in KNOWN_SPLITS else "", []).append(stem)
    for split, total in totals.items():
        if total != {len(groups[split])}:
            raise InputError(
                path, f"has missing or extra shards of the split {split!r}", "copy or download all of them"
            )
    if "" in groups and len(groups) > 1:
        raise InputError(path, "mixes files of a split with others", "name the file itself, or move the others away")
    return groups
