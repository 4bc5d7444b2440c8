"""Images without limit from a released diffusion model, or from a released student's generator: PNG class folders, .npz or Parquet.
Nothing here is private or charged.

N images, C channels, H, W size, K classes.
"""

import difflib
import hashlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from .bundle import png, verification
from .bundle.diffusion_product import DiffusionProduct
from .bundle.product import ModelProduct
from .bundle.release import generator_of, student_of
from .errors import ConfigError, InputError, ReleaseError
from .methods.base import Synthetic
from .models import few_step
from .models.student_generator import StudentGenerator
from .models.wavelet_net import WaveletNet
from .privacy.disk import sync_directory
from .workspace import passing

Pixels = NDArray[np.uint8]
FORMATS = {".npz": "npz", ".parquet": "parquet", "": "folder"}
STEPS = 2  # of a diffusion model, where nobody says
ROUNDS, ROUND = 200, 64  # a generator's tries for images of a class, and the least drawn in each
AT_ONCE = 8  # files of a folder: a disk brings many down in the time of one
MAX_MEMBER = 2**31 - 2**16  # bytes in a member of a plain zip file


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """A released diffusion model.

    Attributes:
      pipe: diffusers' DiTPipeline.
      image_shape: (C, H, W) of the images, which its pipeline draws on squares where they are none.
      class_names: K names.
      source: where it was read, for what errors say.
    """

    pipe: Any
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    source: str = "the model"

    def __call__(self, labels: torch.Tensor, steps: int, generator: torch.Generator) -> torch.Tensor:
        """Returns float32 images [B, C, H, W] in [-1, 1] of the classes `labels`."""
        drawn = few_step.draw(self.pipe, labels, steps, generator, batch=max(1, len(labels)))
        images = few_step.cropped(drawn, self.image_shape)
        if not images.isfinite().all():  # of weights that are finite, and too large
            raise ReleaseError(f"{self.source}: its model draws images that are not finite; ask for the release again")
        return images


@dataclass(frozen=True, kw_only=True)
class GeneratorDrawer:
    """A released student and its generator: what the generator draws for a class and the student takes for it.

    Attributes:
      image_shape: (C, H, W).
      class_names: K names.
      source: where it was read, for what errors say.
    """

    generator: StudentGenerator
    student: WaveletNet
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    source: str = "the model"

    @torch.no_grad()
    def __call__(self, labels: torch.Tensor, steps: int, generator: torch.Generator) -> torch.Tensor:
        """Returns float32 images [B, C, H, W] in [-1, 1] that the student takes for the classes `labels`; it draws in one step."""
        out = torch.empty(len(labels), *self.image_shape)
        for k in labels.unique().tolist():
            places, found = (labels == k).nonzero()[:, 0], torch.empty(0, *self.image_shape)
            for _ in range(ROUNDS):
                z = torch.randn(max(ROUND, len(places)), self.generator.latent, generator=generator)
                z = z.to(self.generator.first.weight.device)
                x = self.generator(z, torch.full((len(z),), k, device=z.device))
                if not x.isfinite().all():
                    raise ReleaseError(
                        f"{self.source}: its generator draws images that are not finite; ask for the release again"
                    )
                found = torch.cat([found, x[self.student(x).argmax(dim=1) == k].cpu()])
                if len(found) >= len(places):
                    break
            else:
                raise ReleaseError(
                    f"{self.source}: of {ROUNDS * len(z):,} images drawn for class {self.class_names[k]!r} its student takes {len(found)} "
                    "for it; leave it out of --classes"
                )
            out[places] = found[: len(places)]
        return out


def draw_set(
    release: str | os.PathLike[str], count: int, *, steps: int = STEPS, seed: int = 0, device: str = "cpu"
) -> Synthetic:
    """Returns about `count` samples of a release as a labelled set, as many of each class."""
    drawer = load_sampler(release, device)
    labels = torch.arange(len(drawer.class_names)).repeat_interleave(max(1, count // len(drawer.class_names)))
    generator, images = torch.Generator().manual_seed(seed), []
    with passing("sampling") as progress:
        for part in labels.split(256):
            images.append(drawer(part, steps, generator))
            progress(sum(map(len, images)) / len(labels))
    return Synthetic(images=torch.cat(images), labels=labels)


def load_sampler(release: str | os.PathLike[str], device: str = "cpu") -> Drawer | GeneratorDrawer:
    """Returns what draws the images of a release that holds together, private or not: for the promise ask `verify`.

    Args:
      device: where it draws. Its noise comes from the CPU whatever this is.

    Raises:
      ReleaseError: it is not what it says, or holds neither a diffusion model nor a generator.
      ConfigError: diffusers is not installed, and it is a diffusion model.
    """
    checked = verification.open_release(release)
    product = checked.product
    if isinstance(product, ModelProduct):
        channels, height, width = product.config["image_shape"]
        return GeneratorDrawer(
            generator=generator_of(product).to(device),
            student=student_of(product).to(device),
            image_shape=(channels, height, width),
            class_names=product.class_names,
            source=str(release),
        )
    if not isinstance(product, DiffusionProduct):
        raise ReleaseError(
            f"{release}: holds no diffusion model and no generator to sample from; `dpdistill diffusion` and `model` make one"
        )
    drawer = sampler_of(product, checked.facts.image_shape)
    drawer.pipe.to(device)
    return replace(drawer, source=str(release))


def sampler_of(product: DiffusionProduct, image_shape: tuple[int, int, int]) -> Drawer:
    """The model of checked arrays, for images of this shape."""
    settings = {name: value for name, value in product.transformer_config.items() if not name.startswith("_")}
    with torch.device("meta"):  # weights are not drawn, only loaded
        model = few_step.diffusers().DiTTransformer2DModel(**settings)
    arrays = {name: torch.tensor(array) for name, array in product.transformer.items()}
    few_step.whole(model).load_state_dict(arrays, assign=True)
    return Drawer(
        pipe=few_step.pipeline(model.eval()),
        image_shape=image_shape,
        class_names=product.class_names,
    )


def sample(
    release: str | os.PathLike[str],
    out: str | os.PathLike[str],
    count: int = 10_000,
    *,
    classes: Sequence[str] | str | None = None,
    steps: int | None = None,
    batch: int = 256,
    seed: int = 0,
    fmt: str | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> Path:
    """Writes `count` images, as many of each class (the first classes get one more where it does not divide).

    Of a student's release they are its generator's, and only those that the student takes for the class that they were drawn for.

    The same release, settings, software and device give the same images. Written beside `out`, brought to disk and renamed: there is
    never half of it, whatever fails or stops it, a power cut too.

    Args:
      out: a folder of class folders with PNG files, or a file ending in .npz or .parquet; each is read by `dpdistill dataset --data`.
      classes: names of those wanted, also as one text with commas, or their numbers from 0 where no name in the release is a number; None
        is all. Labels are numbers in the release's list of classes, whatever is wanted.
      steps: passes of a diffusion model for an image, 1, 2 (where it is None) or 4; more are slower, and not always better.
      batch: images drawn at once. Images depend on it.
      fmt: "folder", "npz" or "parquet", where the name does not say.
      device: cpu or cuda.

    Raises:
      ConfigError: a setting that is not possible.
      InputError: `out` exists or cannot be written.
      ReleaseError: as `load_sampler`.
    """
    target = Path(out)
    kind = _format(target, fmt)
    if count < 1 or batch < 1:
        raise ConfigError(f"Expected count and batch of at least 1, got {count} and {batch}.")
    if steps is not None:
        few_step.check_steps(steps)
    if os.path.lexists(target):
        raise InputError(target, "exists", "choose another --out or remove it")
    if not target.absolute().parent.is_dir():
        raise InputError(target.parent, "is no folder", "make it first")
    if target.resolve().is_relative_to(Path(release).resolve()):
        raise InputError(target, "lies in the release, which must not change", "choose another --out")
    model = load_sampler(release, device)
    if steps is not None and isinstance(model, GeneratorDrawer):
        raise ConfigError(f"{release}: a student's generator draws in one step; leave --steps out")
    passes = STEPS if steps is None else steps
    chosen = _chosen(model.class_names, classes)
    labels = np.repeat(chosen, [count // len(chosen) + (k < count % len(chosen)) for k in range(len(chosen))])

    def drawn(progress: Callable[[float], None]) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
        """Pixels [B, H, W, C] and labels [B]; a generator for each batch, so that no batch depends on another."""
        for start in range(0, len(labels), batch):
            part = labels[start : start + batch]
            images = model(torch.from_numpy(part), passes, _generator(seed, start))
            yield png.to_pixels(images.numpy()), part
            progress((start + len(part)) / len(labels))

    partial = target.with_name(target.name + ".partial")
    try:
        _remove(partial)
        with nullcontext(lambda fraction: None) if quiet else passing("sampling") as progress:
            WRITERS[kind](partial, drawn(progress), model, labels)
        os.rename(partial, target)
    except OSError as error:
        why = f"could not be written ({error.strerror or error})"
        raise InputError(target, why, "make room there or choose another --out") from None
    finally:
        with suppress(OSError):  # what the disk said first is what is said
            _remove(partial)
    return target


def _format(out: Path, fmt: str | None) -> str:
    kind = FORMATS.get(out.suffix.lower(), "") if fmt is None else fmt
    if fmt is not None and fmt not in FORMATS.values():
        raise ConfigError(f"Expected a fmt of {', '.join(FORMATS.values())}, got {fmt!r}.")
    if kind not in FORMATS.values():
        raise ConfigError(
            f"{out}: give --out a name ending in .npz or .parquet, or one without an ending for a folder of PNG files"
        )
    return kind


def _chosen(names: tuple[str, ...], wanted: Sequence[str] | str | None) -> NDArray[np.int64]:
    """Class numbers of the names or numbers wanted, in the release's order."""
    if wanted is not None and not wanted:
        raise ConfigError("Expected at least one class.")
    known = {name: k for k, name in enumerate(names)}
    by_number = not any(name.isdecimal() for name in names)  # "1" is a name or a number, never now this and now that
    if by_number:
        known |= {str(k): k for k in range(len(names))}
    if isinstance(wanted, str):
        wanted = _split(wanted, known)
    for name in wanted or ():
        if name not in known:
            near = difflib.get_close_matches(name, names, 1, 0.0)
            numbers = f"; a number of 0 to {len(names) - 1} is a class, too" if by_number else ""
            raise ConfigError(f"no class is named {name!r} in this release; the nearest is {near[0]!r}{numbers}")
    return np.array(sorted({known[name] for name in (names if wanted is None else wanted)}), np.int64)


def _split(text: str, known: Collection[str]) -> list[str]:
    """Names with commas between them; a name may have commas itself, and the longest name that fits is meant."""
    pieces, found = text.split(","), []
    while pieces:
        sizes = (n for n in range(len(pieces), 0, -1) if ",".join(pieces[:n]) in known)
        n = next(sizes, 1)
        found.append(",".join(pieces[:n]))
        pieces = pieces[n:]
    return found


def _generator(seed: int, start: int) -> torch.Generator:
    digest = hashlib.sha256(repr(("sample", seed, start)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _remove(path: Path) -> None:
    """Only a leftover of ours is ever at a `.partial` place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _on_disk(out: Path) -> Iterator[IO[bytes]]:
    """A file to be written, on disk at the end: a write that the system put off fails here and not after the renaming."""
    with open(out, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


Batches = Iterator[tuple[Pixels, NDArray[np.int64]]]
Either = Drawer | GeneratorDrawer


def _write_folder(out: Path, batches: Batches, model: Either, labels: NDArray[np.int64]) -> None:
    """out/<class>/<number>.png. A name that cannot be a folder's has other characters; the class list is the sorted folder names."""
    folders = _folder_names(model.class_names)
    digits, number = len(str(len(labels) - 1)), 0
    for name in (folders[k] for k in sorted(set(labels.tolist()))):
        (out / name).mkdir(parents=True)

    def write(number: int, image: Pixels, label: int) -> None:
        with _on_disk(out / folders[label] / f"{number:0{digits}d}.png") as file:
            file.write(png.encode(image, small=True))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for pixels, part in batches:
            list(pool.map(write, range(number, number + len(part)), pixels, part.tolist()))
            number += len(part)
    for folder in (*out.iterdir(), out):
        sync_directory(folder)


def _folder_names(names: tuple[str, ...]) -> list[str]:
    """Class names as plain folder names, all different, also where case does not count."""
    plain = ["".join(c if c.isalnum() or c in " -_.()" else "_" for c in name).strip(" .") or "_" for name in names]
    plain = [name.encode()[:200].decode(errors="ignore") for name in plain]  # no file system takes more than 255 bytes
    while len(seen := [name.casefold() for name in plain]) > len(set(seen)):  # a numbered name may be another class's
        plain = [name if seen.count(name.casefold()) == 1 else f"{name} ({k})" for k, name in enumerate(plain)]
    return plain


def _write_npz(out: Path, batches: Batches, model: Either, labels: NDArray[np.int64]) -> None:
    """images uint8 [N, H, W] or [N, H, W, 3], labels int64 [N], classes [K]: streamed, since the header holds the shape."""
    channels, height, width = model.image_shape
    shape = (len(labels), height, width) if channels == 1 else (len(labels), height, width, channels)
    if math.prod(shape) >= MAX_MEMBER:
        raise ConfigError("over 2 GiB of pixels do not fit into an .npz file; write a folder or .parquet")
    with _on_disk(out) as whole, zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(_member("images"), "w") as file:
            _npy_header(file, np.dtype(np.uint8), shape)
            for pixels, _part in batches:
                file.write(pixels.tobytes())
        for name, array in (("labels", labels), ("classes", np.array(model.class_names, "U"))):
            with archive.open(_member(name), "w") as file:
                _npy_header(file, array.dtype, array.shape)
                file.write(array.tobytes())


def _member(name: str) -> zipfile.ZipInfo:
    """A member without a clock."""
    info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def _npy_header(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)


def _write_parquet(out: Path, batches: Batches, model: Either, labels: NDArray[np.int64]) -> None:
    """A table of PNG images as a release's dataset/train.parquet, a row group for each batch."""
    names = {"names": list(model.class_names), "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": names}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        {"huggingface": json.dumps({"info": {"features": features}}, sort_keys=True)},
    )
    digits, number = len(str(len(labels) - 1)), 0
    with _on_disk(out) as file, pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for pixels, part in batches:
            images = [
                {"bytes": png.encode(image, small=True), "path": f"{number + i:0{digits}d}.png"}
                for i, image in enumerate(pixels)
            ]
            number += len(part)
            writer.write_table(pa.table({"image": images, "label": part}, schema=schema))


WRITERS: dict[str, Callable[[Path, Batches, Either, NDArray[np.int64]], None]] = {
    "folder": _write_folder,
    "npz": _write_npz,
    "parquet": _write_parquet,
}
