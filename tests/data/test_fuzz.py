"""Mutated files: each either loads or raises InputError, and nothing else. Seeded, so that a failure repeats."""

import os

import numpy as np
import pytest

from dpdistill.data import Limits, load_images
from dpdistill.errors import InputError

N_MUTANTS = 170  # for each of the twelve kinds: 2,040 in all
SMALL = Limits(max_array_bytes=2**26)
EDGES = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x80\0\0\0", b"PK\x05\x06")


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Returns a copy with one to four random changes."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(1, len(changed))))
        kind = rng.integers(0, 6)
        if kind == 0 and changed:
            changed[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            edge = EDGES[rng.integers(0, len(EDGES))]
            changed[at : at + len(edge)] = edge
        elif kind == 2:
            changed[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 3:
            del changed[at : at + int(rng.integers(1, 9))]
        elif kind == 4 and rng.random() < 0.2:
            del changed[at:]
        else:
            source = int(rng.integers(0, max(1, len(changed))))
            changed[at : at + 16] = changed[source : source + 16]
    return bytes(changed)


def files(write, kind, root):
    """Writes a valid data set, and returns what to load and the file to mutate."""
    root.mkdir()
    if kind in ("stored", "deflated"):
        images, labels = write.toy()
        save = np.savez if kind == "stored" else np.savez_compressed
        save(root / "x.npz", images=images, labels=labels, classes=np.array(write.names))
        return root / "x.npz", root / "x.npz"
    if kind in ("parquet", "arrow"):
        return (path := getattr(write, kind)(root / f"x.{kind}")), path
    if kind == "plain parquet":
        options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
        return (path := write.parquet(root / "x.parquet", **options)), path
    if kind.startswith("idx"):
        zipped = kind.endswith("gz")
        write.idx(root, zipped=zipped)
        part = "labels-idx1" if "labels" in kind else "images-idx3"
        return root, root / f"train-{part}-ubyte{'.gz' if zipped else ''}"
    write.folder(root / "r", kind, f".{kind.lower()}", channels=3)
    return root / "r", root / "r" / "cat" / f"0.{kind.lower()}"


KINDS = ("stored", "deflated", "idx", "idx-gz", "idx-labels-gz", "PNG", "JPEG", "BMP", "WEBP")
TABLES = ("parquet", "plain parquet", "arrow")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS + TABLES)
def test_mutants(tmp_path, write, kind):
    spec, target = files(write, kind, tmp_path / "x")
    good = target.read_bytes()
    options = {"n_classes": 3} if kind.startswith("idx") else {}
    load_images(spec, limits=SMALL, **options)
    rng = np.random.default_rng(sum(kind.encode()) + int(os.environ.get("DPDISTILL_FUZZ_SEED", "0")))
    messages = []
    for _ in range(int(os.environ.get("DPDISTILL_FUZZ_MUTANTS", N_MUTANTS))):
        target.write_bytes(mutate(good, rng))
        try:
            data = load_images(spec, limits=SMALL, **options)
        except InputError as error:
            messages.append(str(error))
        else:
            assert data.images.ndim == 4
            assert len(data.images) == len(data.labels) > 0
    assert messages
    assert all(message.isprintable() for message in messages)
