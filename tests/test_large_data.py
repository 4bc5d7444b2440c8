"""Data larger than memory: the same release and ledger to the byte, memory that does not grow with it, and nothing left of it on disk."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpdistill import cli, home, planning, sources
from dpdistill.bundle.verification import verify
from dpdistill.config import DiffusionConfig, ModelConfig, RunConfig
from dpdistill.config_files import read
from dpdistill.conversion import convert
from dpdistill.data import StoredArray, stored
from dpdistill.diffusion import diffuse
from dpdistill.errors import ConfigError
from dpdistill.home import default_ledger
from dpdistill.mechanisms import Vault
from dpdistill.mechanisms.ensemble import assign
from dpdistill.pipeline import distil
from dpdistill.privacy import Ledger, faults
from dpdistill.sources import load_private
from small_sampler import NETWORK, SAMPLER

JOINT = {"steps": 2, "networks": 1, "feature_dims": 6, "pixel_dims": 4, "components": 2}
JOINT |= {"pool": 12, "width": 4}
NDPDC = {"steps": 3, "sampling_prob": 0.5, "group_size": 10, "width": 4}
STUDENT = {"steps": 2, "batch": 8, "width": 8, "generator_width": 4, "latent": 4, "pool": 64, "teacher_dims": 20}
DPDM = {"steps": 2, "expected_batch": 8, "multiplicity": 2, **NETWORK, **SAMPLER}
RUNS: dict[type[RunConfig], Callable[..., Path]] = {RunConfig: distil, ModelConfig: convert, DiffusionConfig: diffuse}
WAYS: dict[str, dict[str, Any]] = {
    "joint": {"method": "joint", "settings": JOINT},
    "ndpdc": {"method": "ndpdc", "settings": NDPDC},
    "teacher": {"settings": STUDENT | {"teacher_steps": 3, "components": 2}},
    "votes": {"shards": 5, "settings": STUDENT | {"queries": 40}},
    "dpdm": {"method": "dpdm", "expected_records": 47, "settings": DPDM},
}

AT = 30  # the point at which a run is killed

# Reads a set of 300 MB after a tiny one, which brings in all that is imported and kept anyway; prints by how many MiB the peak grew.
PEAK = """
import resource, sys, warnings
from pathlib import Path
import torch
from dpdistill.config import RunConfig
from dpdistill.data import StoredArray, stored
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.privacy import GaussianSum, Ledger
from dpdistill.sources import load_private
from dpdistill.home import default_ledger

torch.set_num_threads(1)
stored.MEMORY_BYTES = 2**27
place = Path(sys.argv[1])
whole = GaussianSum(name="means", dim=4, n_classes=2, noise_multiplier=40.0)
part = GaussianSum(name="sample", dim=4, n_classes=2, noise_multiplier=40.0, sampling_prob=0.3)
outer = GaussianSum(name="outer", dim=2 * 3072, noise_multiplier=40.0, grid_bits=24)

def quadrants(x, y):
    return torch.nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), 32).flatten(1)

def many(x):
    return quadrants(x, None).repeat(1, 768)

def release(spec):
    records = load_private(RunConfig(data=str(spec), classes=2, out=str(place / "out")))
    with Ledger.open(default_ledger(records), cap=(1e6, 1e-5)) as ledger:
        private = PrivateData(records, ledger, Vault.open(place / spec.stem), micro_batch=64, scratch=str(place))
        sums = [private.release(query, quadrants) for query in (whole, part)]
        if spec.suffix == ".parquet":
            held = private.reserve(outer)
            features = private.features(many, 3072)
            sums.append(features.release_reserved(held, 0, lambda phi, y: torch.nn.functional.one_hot(y, 2).float()))
            assert isinstance(records.images, StoredArray) == isinstance(features._rows, StoredArray)
    assert all(bool(total.isfinite().all()) for total in sums)
    return isinstance(records.images, StoredArray)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

assert not release(place / "small.parquet") and not release(place / "small.npz")
for name in sys.argv[2:]:
    before = peak()
    assert release(place / name)
    print(name, round(peak() - before))
"""


def write_both(place: Path, name: str, n: int) -> None:
    """Colour images [3, 64, 64] as an npz without compression, and as one row group of Parquet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyarrow as pa
        import pyarrow.parquet as pq
    rng = np.random.default_rng(0)
    some = np.kron(rng.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), np.uint8))
    labels = np.arange(n) % 2
    np.savez(place / f"{name}.npz", images=some[np.arange(n) % 50].transpose(0, 3, 1, 2), labels=labels)
    cells = []
    for image in some:
        Image.fromarray(image).save(buffer := io.BytesIO(), "PNG", compress_level=1)
        cells.append(buffer.getvalue())
    table = pa.table({"image": [cells[i % 50] for i in range(n)], "label": labels})
    pq.write_table(table, place / f"{name}.parquet", use_dictionary=False, row_group_size=n)


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    write_both(tmp_path, "small", 200)
    write_both(tmp_path, "large", 24_500)  # 301 MB of pixels, and 151 MB of features
    environment = os.environ | {"DPDISTILL_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, str(tmp_path), "large.npz", "large.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    grown = dict(line.split() for line in done.stdout.splitlines())
    assert sorted(grown) == ["large.npz", "large.parquet"]
    assert max(map(int, grown.values())) <= 120, grown


def test_a_full_disk_is_one_line_and_exit_code_two(
    tmp_path: Path, data: Path, in_files: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = in_files()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    words = ["dpdistill", "dataset", "--data", str(data), "--out", str(tmp_path / "out"), "--max-gib", "1"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == (
        f"dpdistill: {folder}: has no room for data that do not fit in memory (disk too full) "
        "(point TMPDIR at a disk with more free space)\n"
    )
    assert not (tmp_path / "home").exists()  # nothing was charged


def test_where_temporary_files_go(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config("joint", data, tmp_path / "not" / "yet")
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    assert sources.scratch_of(chosen) == "/elsewhere"
    monkeypatch.delenv("TMPDIR")  # the system's own folder may be memory
    assert sources.scratch_of(chosen) == str(tmp_path)


def test_how_much_may_be_read(data: Path) -> None:
    assert read(None, {"data": str(data), "max_gib": "16"}, []).max_gib == 16
    for bad in (0, -1, 2**21):
        with pytest.raises(ConfigError, match="max_gib"):
            RunConfig(data=str(data), max_gib=bad)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """47 made-up images [8, 8] of two classes, and a home for ledgers."""
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(planning, "N_PROCEDURAL", 60)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (47, 8, 8), dtype=np.uint8), np.arange(47) % 2
    path = tmp_path / "private.npz"
    np.savez_compressed(path, images=images, labels=labels, classes=np.array(["a", "b"]), person=np.arange(47) // 3)
    return path


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Path]:
    """in_files() -> the folder for temporary files: from now on nothing is kept in memory."""

    def switch() -> Path:
        folder = tmp_path / "temporary"
        folder.mkdir()
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr(stored, "MEMORY_BYTES", 0)
        monkeypatch.setattr(stored, "CHUNK_BYTES", 1000)
        return folder

    return switch


def config(way: str, data: Path, place: Path) -> RunConfig:
    kind = {"teacher": ModelConfig, "votes": ModelConfig, "dpdm": DiffusionConfig}.get(way, RunConfig)
    paths = {"data": str(data), "out": str(place / "out"), "ledger": str(place / "ledger.jsonl")}
    return kind(**paths, per_class=1, **WAYS[way])


def outcome(place: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in sorted(place.rglob("*"))}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_release_and_ledger_to_the_byte(
    way: str, tmp_path: Path, data: Path, in_files: Callable[[], Path]
) -> None:
    first = tmp_path / "memory"
    Vault.open(first / "out.state" / "vault")  # the key and the ledger's name are random: made once
    Ledger.open(first / "ledger.jsonl", cap=(1.0, 1e-5)).close()
    second = Path(shutil.copytree(first, tmp_path / "files"))
    run = RUNS[type(config(way, data, first))]
    run(config(way, data, first), quiet=True)
    folder = in_files()
    assert isinstance(load_private(config(way, data, second)).images, StoredArray)
    run(config(way, data, second), quiet=True)
    assert verify(second / "out").ok
    assert outcome(second) == outcome(first)
    assert os.listdir(folder) == []


def test_the_default_ledger_and_the_shards_are_the_same(
    data: Path, tmp_path: Path, in_files: Callable[[], Path]
) -> None:
    chosen = replace(config("votes", data, tmp_path), id_column="person")
    inside = load_private(chosen)
    np.save(tmp_path / "x.npy", inside.images)
    in_files()
    outside = load_private(chosen)
    mapped = replace(inside, images=np.load(tmp_path / "x.npy", mmap_mode="r"))  # from Python, a memory map will do
    facts = repr((inside.images.shape[1:], "uint8")).encode()
    whole = home.ledger_of([facts, *sorted(hashlib.sha256(image.tobytes()).digest() for image in inside.images)])
    assert default_ledger(inside) == default_ledger(outside) == default_ledger(mapped) == whole
    backwards = replace(inside, images=inside.images[::-1], labels=inside.labels * 0, ids=None)
    assert default_ledger(backwards) == whole
    for records in (inside, replace(inside, ids=None)):
        shards = assign(records, 5, b"k" * 32)
        assert sorted(set(shards)) == list(range(5))
        for images in (outside.images, mapped.images):
            np.testing.assert_array_equal(assign(replace(records, images=images), 5, b"k" * 32), shards)


@pytest.mark.parametrize("way", ["joint", "teacher"])
def test_nothing_decoded_is_left_after_a_kill(
    way: str, tmp_path: Path, data: Path, in_files: Callable[[], Path]
) -> None:
    """Killed by SIGKILL at a point where images, or features, are in a file of ours. Nobody has to clean up."""
    records = load_private(config(way, data, tmp_path))
    needles = [records.images[i].tobytes()[:32] for i in range(len(records.labels))]
    folder = in_files()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        faults._passed = 0
        os.environ |= {"DPDISTILL_KILL_AT": str(AT), "DPDISTILL_POINTS": str(tmp_path / "points")}
        try:
            run = convert if way == "teacher" else distil
            run(config(way, data, tmp_path / "run"), quiet=True)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert os.listdir(folder) == []
    passed = (tmp_path / "points").read_text().splitlines()
    assert passed.count("door: summed") > 1  # so the features, too, were there
    assert (tmp_path / "run" / "out.state").exists()
    for path in tmp_path.rglob("*"):
        if path.is_file() and path != data:
            raw = path.read_bytes()
            assert not any(needle in raw for needle in needles), path
