"""Writers of small valid data sets in every format, for round trips, hostile variants and fuzzing."""

import gzip
import io
import json
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pyarrow as pa
    import pyarrow.parquet as pq

names = NAMES = ("cat", "dog", "eel")


def toy(n: int = 6, channels: int = 1, h: int = 8, w: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns smooth uint8 images [N, C, H, W] and labels [N] in 0..2; smooth, so that a lossy format stays close."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, w) + np.linspace(0, 40, h)[:, None]
    images = np.clip(ramp + rng.integers(0, 15, (n, channels, 1, 1)), 0, 255).astype(np.uint8)
    return images, np.arange(n, dtype=np.int64) % 3


def encode(image_chw: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """Returns one encoded image."""
    pixels = image_chw[0] if len(image_chw) == 1 else image_chw.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def npz(path: Path, **arrays: object) -> Path:
    """Writes an npz; without arguments a valid one."""
    images, labels = toy()
    default = {"images": images[:, 0], "labels": labels, "classes": np.array(NAMES)}
    chosen = {name: array for name, array in (default | arrays).items() if array is not None}
    np.savez_compressed(path, **chosen)
    return path


def folder(path: Path, kind: str = "PNG", extension: str = ".png", channels: int = 1) -> Path:
    """Writes a folder of class folders."""
    images, labels = toy(channels=channels)
    for name in NAMES:
        (path / name).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (path / NAMES[label] / f"{i}{extension}").write_bytes(encode(image, kind))
    return path


def idx(path: Path, prefix: str = "train", zipped: bool = False) -> Path:
    """Writes an IDX pair into a folder."""
    path.mkdir(exist_ok=True)
    images, labels = toy()
    images_bytes = struct.pack(">4B3I", 0, 0, 8, 3, len(images), 8, 8) + images.tobytes()
    labels_bytes = struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + labels.astype(np.uint8).tobytes()
    for name, data in (("images-idx3-ubyte", images_bytes), ("labels-idx1-ubyte", labels_bytes)):
        file = path / f"{prefix}-{name}{'.gz' if zipped else ''}"
        file.write_bytes(gzip.compress(data, mtime=0) if zipped else data)
    return path


def table(hf: bool = True, nested: bool = True, channels: int = 1, **columns: pa.Array) -> pa.Table:
    """Returns an Arrow table as `datasets` lays it out; `columns` replaces or adds columns."""
    images, labels = toy(channels=channels)
    cells: list[object] = [encode(image) for image in images]
    if nested:
        cells = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(cells)]
    made = pa.table({"image": cells, "label": labels} | columns)
    features = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})} if hf else None)


def parquet(path: Path, made: pa.Table | None = None, **options: object) -> Path:
    """Writes a Parquet file."""
    pq.write_table(table() if made is None else made, path, **options)
    return path


def arrow(path: Path, made: pa.Table | None = None, **options: object) -> Path:
    """Writes an Arrow stream, as `save_to_disk` does."""
    made = table() if made is None else made
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, made.schema, **options) as writer:
        writer.write_table(made)
    return path
