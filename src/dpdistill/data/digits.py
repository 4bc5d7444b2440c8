"""scikit-learn's bundled handwritten digits: 1,797 grey images of 8x8, offline, for examples and tests.

The split is public and fixed: every fifth record by position is `test` (360), the others are `train` (1,437). So both
parts come from the same writers.
"""

from __future__ import annotations

import gzip
import os
from importlib.util import find_spec

import numpy as np

from dpdistill.data.files import one_error_type
from dpdistill.data.splits import choose_split
from dpdistill.errors import InputError

NAMES = tuple("0123456789")


def read_digits(spec: str, split: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [N, 1, 8, 8], 0..16 scaled to 0..255, and labels int64 [N].

    Args:
      spec: `digits`, `digits:train` or `digits:test`.
      split: `train` or `test`; must not contradict `spec`.
    """
    _, _, named = spec.partition(":")
    if named and split and named != split:
        raise InputError(spec, f"contradicts split={split!r}", "give one of them")
    wanted = choose_split(spec, ("train", "test"), named or split)
    package = find_spec("sklearn")  # located, not imported: that would take seconds, for a file of 57 kB
    if package is None or not package.submodule_search_locations:
        raise InputError(spec, "needs scikit-learn", "pip install scikit-learn")
    path = os.path.join(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    with one_error_type(path), gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)  # 64 pixels in 0..16, then the label
    grey_NHW = np.rint(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels_N = table[:, 64]
    is_test_N = np.arange(len(labels_N)) % 5 == 0
    part_N = is_test_N if wanted == "test" else ~is_test_N
    return grey_NHW[part_N][:, None], labels_N[part_N]
