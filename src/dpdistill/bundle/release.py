"""Writes and reads a release folder. What it must hold to be believed is in `verify`; the format in docs/bundle.md.

A release is written beside its place, checked as a stranger would, and renamed: there is never half of one. Its bytes
are a function of the arguments and the installed software (no clock, no name of this machine), so a resumed run writes
the same.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..audit.result import Audit
from ..errors import ReleaseError
from ..privacy.disk import sync_directories, sync_directory
from ..privacy.faults import point
from . import certificate as certificates
from . import contents, png, reading, report, table, verification
from .certificate import BundleFacts
from .contents import Contents, one_line, printable_names
from .diffusion_product import DiffusionProduct
from .product import ModelProduct, Product, Weights

if TYPE_CHECKING:
    import torch

    from ..methods.base import Sampler, Student, Synthetic
    from ..models.student_generator import StudentGenerator
    from ..models.wavelet_net import WaveletNet

__all__ = ["BundleFacts", "load_student", "product_of", "product_of_sampler", "read_bundle", "restore", "write_bundle"]


def write_bundle(out: Path, synthetic: "Synthetic", facts: BundleFacts, product: Product | None = None) -> Path:
    """Writes a release, wholly or not at all.

    Args:
      out: the folder to make. A `<out>.partial` beside it, left by a crash, is replaced.
      synthetic: the images; class names are made printable.
      product: what is released beside them.
      facts: the rest. The ledger must hold the run's `final` line, and its `run` line the SHA-256 of `config_toml`.

    Returns:
      `out`.

    Raises:
      ReleaseError: `out` exists, the images are not what a release holds, or the result would not verify. Nothing is
        left at `out`.
    """
    if os.path.lexists(out):
        raise ReleaseError(f"{out} exists; choose another --out or remove it")
    point("release: before the folder")
    files = bundle_files(synthetic, facts, product)
    partial = out.with_name(out.name + ".partial")
    try:
        _write_checked(partial, files)
        os.rename(partial, out)
        point("release: renamed")
        sync_directories(out.absolute().parent)
    except OSError as error:
        raise ReleaseError(
            f"{out}: the release could not be written ({error.strerror}); the run's state is kept, try again"
        ) from error
    point("release: in place")
    return out


def _write_checked(partial: Path, files: dict[str, bytes]) -> None:
    """Writes a release beside its place, and checks it as a stranger would."""
    _fresh(partial)
    for name, raw in files.items():
        _write(partial / name, raw)
    for folder in (*(path for path in sorted(partial.rglob("*"), reverse=True) if path.is_dir()), partial):
        sync_directory(folder)
    point("release: written beside, not yet checked")
    verification.inspect(partial)
    point("release: checked, not yet renamed")


def restore(path: Path, wanted: Callable[[Path], bool] = lambda _: True) -> None:
    """Puts a release back where a crash of `audit` left it aside, as `<path>.before`, and nothing in its place.

    Args:
      wanted: whether that folder is the release that is looked for: another one, which somebody named so, is left alone.
    """
    before = reading.aside(path)
    if not os.path.lexists(path) and os.path.isfile(before / "certificate.json") and wanted(before):
        os.rename(before, path)


def check_aside(path: Path, names: set[str]) -> None:
    """Raises ReleaseError where `<path>.before` is not what a stopped audit left: it would be removed.

    Args:
      names: files of the release.
    """
    before = reading.aside(path)
    found = [place for place in before.rglob("*") if place.is_symlink() or not place.is_dir()]
    left = all(str(place.relative_to(before)) in names for place in found) and before.is_dir()
    if os.path.lexists(before) and (before.is_symlink() or not left):
        raise ReleaseError(f"{before} is in the way: an audit keeps the old release there for a moment; move it away")


def add_audit(path: Path, audit: Audit) -> None:
    """Puts an audit into a release: certificate, pages and hashes are written anew, everything else stays as it is.

    The new folder is written beside, checked, and swapped in; the old one is `<path>.before` for that moment. Where a crash comes between,
    `restore` puts it back.

    Raises:
      ReleaseError: the release does not verify, before or with the audit, or cannot be written. Then it is as it was.
    """
    path = Path(os.path.realpath(path))  # "." has no name to put something beside, and a link is not what it leads to
    partial, before = path.with_name(path.name + ".partial"), reading.aside(path)
    checked = verification.open_release(path)
    check_aside(path, set(checked.files))
    certificate = {**checked.certificate, "audit": audit.describe(), "pages": report.fingerprint()}
    files = {
        **checked.files,
        "README.md": report.render_card(certificate).encode(),
        "report.html": report.render_report(certificate, checked.contents).encode(),
        "certificate.json": certificates.write(certificate),
    }
    files["SHA256SUMS"] = reading.checksums(files)
    try:
        _write_checked(partial, files)
        if before.exists():
            shutil.rmtree(before)
        os.rename(path, before)
        point("release: old one aside")
        os.rename(partial, path)
        sync_directory(path.absolute().parent)
        shutil.rmtree(before)
    except OSError as error:
        with suppress(OSError):  # a disk that refuses this as well: the next audit does it
            restore(path)
        raise ReleaseError(
            f"{path}: the audit could not be written into it ({error.strerror}); the release is kept, try again"
        ) from error


def bundle_files(synthetic: "Synthetic", facts: BundleFacts, product: Product | None = None) -> dict[str, bytes]:
    """Returns every file of a release by its path, SHA256SUMS last."""
    if facts.class_names != printable_names(facts.class_names) or facts.auxiliary != one_line(facts.auxiliary):
        names = printable_names(facts.class_names)
        facts = BundleFacts(**{**vars(facts), "class_names": names, "auxiliary": one_line(facts.auxiliary)})
    held = from_torch(synthetic, facts.class_names)
    found = certificates.figures(facts)
    pages = report.fingerprint()
    certificate = certificates.build(facts, found, held, certificates.software(), pages, product)
    files = {
        **({} if facts.claim else {"ledger.jsonl": facts.ledger_raw}),
        **({"conversion.toml": facts.conversion_toml.encode()} if facts.conversion_toml else {}),
        **({} if product is None else product.files()),
        "config.toml": facts.config_toml.encode(),
        "dataset/synthetic.safetensors": held.pack(),
        "dataset/train.parquet": table.write(held.pixels, held.labels, held.soft_labels, held.class_names),
        "samples.png": png.encode(png.sheet(held.shown, held.labels, len(held.class_names)), small=True),
        "README.md": report.render_card(certificate).encode(),
        "report.html": report.render_report(certificate, held).encode(),
        "certificate.json": certificates.write(certificate),
    }
    files["SHA256SUMS"] = reading.checksums(files)
    return files


def _fresh(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
    (folder / "dataset").mkdir(parents=True)
    point("release: folder made")


def _write(path: Path, raw: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    point(f"release: {path.name} written")


def from_torch(synthetic: "Synthetic", class_names: tuple[str, ...]) -> Contents:
    """Returns a method's tensors as checked arrays. Raises ReleaseError on what no release may hold."""
    soft = synthetic.soft_labels
    return Contents(
        images=synthetic.images.detach().cpu().contiguous().numpy(),
        labels=synthetic.labels.detach().cpu().contiguous().numpy(),
        soft_labels=None if soft is None else soft.detach().cpu().contiguous().numpy(),
        parts=synthetic.parts,
        gain=synthetic.gain,
        class_names=class_names,
    )


def product_of(student: "Student", class_names: tuple[str, ...]) -> ModelProduct:
    """Returns a method's student and generator as checked arrays."""

    def arrays(module: "torch.nn.Module") -> Weights:
        return {name: value.detach().cpu().float().contiguous().numpy() for name, value in module.state_dict().items()}

    return ModelProduct(
        student=arrays(student.model),
        config=student.model.config,
        generator=arrays(student.generator),
        generator_config=student.generator.config,
        class_names=printable_names(class_names),
    )


def product_of_sampler(sampler: "Sampler", class_names: tuple[str, ...]) -> DiffusionProduct:
    """Returns a method's diffusion model as the files of its pipeline."""
    from ..models import few_step

    return DiffusionProduct.of(few_step.pipeline(sampler.model), printable_names(class_names))


def load_student(path: str | os.PathLike[str]) -> "WaveletNet":
    """Returns the student of a release as a torch module: images [B, C, H, W] in [-1, 1] to logits [B, K].

    Raises:
      ReleaseError: the release is not what it says, or holds no model. One without a guarantee is read as well: ask `verify`.
    """
    product = verification.open_release(path).product
    if not isinstance(product, ModelProduct):
        raise ReleaseError(f"{path}: a release of images, not of a model; see `read_bundle`")
    return student_of(product)


def student_of(product: ModelProduct) -> "WaveletNet":
    """The network of checked arrays."""
    import torch

    from ..models.wavelet_net import WaveletNet

    config = product.config
    channels, height, width = config["image_shape"]
    model = WaveletNet(
        (channels, height, width),
        config["n_classes"],
        width=config["width"],
        depth=config["depth"],
        groups=config["groups"],
    )
    model.load_state_dict({name: torch.tensor(array) for name, array in product.student.items()})
    return model.eval()


def generator_of(product: ModelProduct) -> "StudentGenerator":
    """The image generator of checked arrays. Raises ReleaseError where its weights are not of its settings: nothing is made before."""
    import torch

    from ..models.student_generator import StudentGenerator

    try:
        config = product.generator_config
        (channels, height, width), sizes = config["image_shape"], (config["latent"], config["width"])
        same = (list(config["image_shape"]), config["n_classes"]) == (
            product.config["image_shape"],
            product.config["n_classes"],
        )
        if not (same and all(type(size) is int and size >= 1 for size in sizes)):
            raise ValueError
        given = {"latent": sizes[0], "width": sizes[1]}
        shape, n_classes = (channels, height, width), config["n_classes"]
        wanted = StudentGenerator.shapes(shape, n_classes, **given)
        if wanted != {name: array.shape for name, array in product.generator.items()}:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ReleaseError("model/generator.safetensors: not the weights of its config") from None
    model = StudentGenerator(shape, n_classes, **given, generator=torch.Generator())
    model.load_state_dict({name: torch.tensor(array) for name, array in product.generator.items()})
    return model.eval()


def read_bundle(path: str | os.PathLike[str]) -> "Synthetic":
    """Returns the distilled data set of a release, private or not. Reads the tensors only; `verify` checks the promise.

    Raises:
      ReleaseError: there is no such file, it is too large, or it does not hold finite images in [-1, 1] with labels.
    """
    import torch

    from ..methods.base import Synthetic

    with verification.naming(path):
        held = contents.unpack(reading.read_file(Path(path), "dataset/synthetic.safetensors"))

    def tensor(array: object) -> torch.Tensor:
        return torch.tensor(array)  # a copy: the array is a read-only view of the file's bytes

    return Synthetic(
        images=tensor(held.images),
        labels=tensor(held.labels),
        soft_labels=None if held.soft_labels is None else tensor(held.soft_labels),
        parts=held.parts,
        gain=held.gain,
    )
