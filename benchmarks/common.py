"""Shared by the benchmarks: reading the data folder, rows, and running each cell in a process of its own.

Data folder: one folder per set with train.npz and test.npz, each holding `labels` (int64 N), `classes` (names) and either `images`
(uint8 [N, H, W]) or `delta` (uint8 [3, N, H, W], colour planes R-G, G, B-G as differences to the left and upper neighbour, modulo 256).
Sets used: mnist, fashion_mnist, cifar10 (private); omniglot28, cifar100_subset (public).
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dpdistill.data import LabelledImages

AUXILIARY = {"mnist": "omniglot28", "fashion_mnist": "omniglot28", "cifar10": "cifar100_subset"}


def read(folder: Path, name: str, split: str) -> LabelledImages:
    """Reads one set as [N, C, H, W] uint8."""
    path = folder / name / f"{split}.npz"
    if not path.exists():
        raise SystemExit(f"{path} is missing. --data takes a folder like this:\n{__doc__}")
    with np.load(path, allow_pickle=False) as z:
        if "images" in z:
            images = z["images"][:, None]
        else:
            planes = z["delta"].cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
            planes[::2] += planes[1]
            images = np.ascontiguousarray(planes.transpose(1, 0, 2, 3))
        names = tuple(str(c) for c in z["classes"])
        return LabelledImages(images=images, labels=z["labels"].astype(np.int64), class_names=names, source=name)


def peak_gib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_own_process(script: str, arguments: list[str]) -> dict[str, Any]:
    """Runs `script arguments` and returns the JSON object on its last line: a clean peak of memory, one thread."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def as_table(head: str, lines: list[str]) -> list[str]:
    """A Markdown table: its first line, and the others."""
    return [head, "|" + "---|" * (head.count("|") - 1), *lines]


def with_before(text: list[str], head: str, lines: list[str]) -> list[str]:
    """Ends a page with what was measured of recipes that are gone, if there is any."""
    return [*text, "", "## Recipes before, as they were measured", "", *as_table(head, lines)] if lines else text
