"""Fixtures for all tests: toy private data behind a door, and deterministic property tests.

B records in a batch, N private records, D coordinates, K classes.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from dpdistill.data.images import LabelledImages
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.privacy import Ledger
from dpdistill.privacy.faults import point

settings.register_profile(
    "here",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("here")
# A plain `pytest` is as `make test`: tests fork, and a pool of threads does not outlive a fork, so its user would wait for ever.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
# That fsync is called, when and on what is tested; no test cuts the power, and some would mostly wait for a disk.
os.fsync = os.fstat  # which refuses too what is no open file
for _name in ("DPDISTILL_KILL_AT", "DPDISTILL_POINTS"):
    os.environ.pop(_name, None)
assert callable(point)


def toy(n: int = 12, n_classes: int = 3, *, dtype: str = "uint8", seed: int = 0) -> LabelledImages:
    """n made-up images [1, 4, 4] with labels that go round the classes."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 1, 4, 4)).astype(np.uint8)
    if dtype == "float32":
        images = (images / 255).astype(np.float32)
    labels = (np.arange(n) % n_classes).astype(np.int64)
    names = tuple(f"class {k}" for k in range(n_classes))
    return LabelledImages(images=images, labels=labels, class_names=names, source="toy")


@pytest.fixture
def toy_records() -> Callable[..., LabelledImages]:
    return toy


@pytest.fixture
def open_door(tmp_path: Path) -> Iterator[Callable[..., PrivateData]]:
    """open_door(records, place="a", key=..., cap=..., micro_batch=...) -> a handle; the same place again resumes the run."""
    held: dict[str, Ledger] = {}

    def build(
        records: LabelledImages,
        place: str = "a",
        *,
        key: bytes = b"k" * 32,
        cap: tuple[float, float] = (1e6, 1e-5),
        micro_batch: int = 4,
    ) -> PrivateData:
        if place in held:
            held.pop(place).close()
        vault = tmp_path / place / "vault"
        if not vault.exists():
            vault.mkdir(parents=True)
            (vault / "key").write_bytes(key)
        held[place] = Ledger.open(tmp_path / place / "ledger.jsonl", cap=cap, data="toy")
        return PrivateData(records, held[place], Vault.open(vault), micro_batch=micro_batch)

    yield build
    for ledger in held.values():
        ledger.close()
