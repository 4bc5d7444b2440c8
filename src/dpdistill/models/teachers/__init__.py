"""A person's trained classifier, from any framework, as a black box: images in, one row of logits for each out.

Three forms: an ONNX file, a safetensors file with the code of its network, a Python callable. Nothing is unpickled. An ONNX file is
taken apart before the runtime sees it: a walk over its bytes bounds how much it may hold, a list says which operations it may use,
shape inference bounds the work, and what runs is what was checked, written anew. Then any teacher answers a few made-up images.

B images in a batch, C channels, H, W size, K classes, P images of the probe.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor, nn

from dpdistill.data.files import check_name
from dpdistill.errors import InputError
from dpdistill.models.teachers.base import (
    EXPORT,
    EXTRA_BYTES,
    RANGE,
    REFUSED,
    Run,
    Teacher,
    Wants,
    bounded_memory,
    check_image_shape,
    read_bytes,
)
from dpdistill.models.teachers.onnx_run import checked_onnx, onnx_run
from dpdistill.models.teachers.probe import one_class, probe, varied_images
from dpdistill.models.teachers.weights import network_of

__all__ = ["RANGE", "Teacher", "Wants", "check_kind", "from_callable", "load_teacher", "one_class", "varied_images"]


def check_kind(path: Path) -> None:
    """Raises InputError unless this is named as a model file that is read here is; the file is not opened."""
    suffix = path.suffix.lower()
    if path.is_dir():
        known = "is a TensorFlow SavedModel" if (path / "saved_model.pb").exists() else "is a folder"
        raise InputError(path, f"{known}, not a model file", EXPORT)
    if suffix in REFUSED:
        raise InputError(path, f"is a {suffix} file, which may run code when it is read", EXPORT)
    if suffix not in (".onnx", ".safetensors"):
        raise InputError(path, "is not a model file: wanted .onnx, or .safetensors with an architecture", EXPORT)


def load_teacher(
    spec: str | Path,
    *,
    architecture: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
    n_classes: int | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    layout: str = "NCHW",
    outputs: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    n_threads: int = 1,
) -> Teacher:
    """Reads a trained classifier from a file and probes it with made-up images. Reads no private data.

    Args:
      spec: a `.onnx` file, or a `.safetensors` file of a state_dict together with `architecture`.
      architecture: 'module:callable'; called without arguments it returns the torch network. Imported from `sys.path`, and run:
        it is your code, not part of the file.
      image_shape: (C, H, W) wanted. None takes what an ONNX file declares.
      n_classes: K wanted. None takes what the model returns.
      value_range, layout, outputs, mean, std: how the model wants its images, see `Wants`.
      n_threads: of onnxruntime.

    Raises:
      InputError: the file cannot be read, or the model is no classifier of such images. One line, with the way out.
      ValueError: an argument that is out of range whatever the file.
    """
    wants = Wants(value_range=tuple(value_range), layout=layout, outputs=outputs, mean=mean, std=std)  # type: ignore[arg-type]
    suffix, path = Path(spec).suffix.lower(), Path(spec)
    name = check_name(path)
    check_kind(path)
    if image_shape is not None:
        check_image_shape(spec, image_shape, wants)
    if suffix == ".onnx":
        if architecture is not None:
            raise InputError(spec, "needs no architecture, it holds its own", "leave --architecture out")
        raw = read_bytes(spec)
        digest = hashlib.sha256(raw).hexdigest()
        with bounded_memory(EXTRA_BYTES + 3 * len(raw)):
            raw, feed, image_shape, wants = checked_onnx(raw, spec, image_shape, wants)
            run = onnx_run(raw, feed, spec, image_shape, wants, n_threads)
            return probe(run, spec, name, image_shape, n_classes, wants, digest)
    if architecture is None:
        raise InputError(
            spec, "holds weights without their network", "give --architecture module:callable, or use ONNX"
        )
    if image_shape is None:
        raise InputError(spec, "does not say what images it takes", "give --shape C,H,W")
    raw = read_bytes(spec)
    network = network_of(architecture, raw, spec)

    def run(x: Tensor) -> Tensor:
        return network.to(x.device)(x)  # where the images are

    return probe(run, spec, name, image_shape, n_classes, wants, hashlib.sha256(raw).hexdigest())


def from_callable(
    fn: Run,
    *,
    image_shape: tuple[int, int, int],
    n_classes: int,
    value_range: tuple[float, float] = (0.0, 1.0),
    layout: str = "NCHW",
    outputs: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    name: str | None = None,
) -> Teacher:
    """Wraps a Python function as a teacher, after the same probe as for files.

    Args:
      fn: maps a float32 tensor [B, C, H, W] with pixels in `value_range` to a tensor or array [B, K], each row from its image
        alone. Called without gradients. A torch network must be in eval mode already.
      image_shape, n_classes, value_range, layout, outputs, mean, std: as in `load_teacher`.
      name: printable, and what a stopped run knows the teacher by when it goes on: another function under the same name is not noticed.
        Without one that is the classes that win on made-up images: a function that answers otherwise but has the same winners there is
        not noticed, and one whose answers are not quite the same each time (served, or on a GPU) may be taken for another at a close
        call. Give it a name then, and a new name whenever it changes.

    Raises:
      InputError: what it returns is no classifier's answer.
    """
    wants = Wants(value_range=tuple(value_range), layout=layout, outputs=outputs, mean=mean, std=std)  # type: ignore[arg-type]
    shown = check_name("callable" if name is None else name)
    known_by = "" if name is None else f"callable-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    check_image_shape(shown, image_shape, wants)
    if isinstance(fn, nn.Module) and fn.training:
        raise InputError(shown, "is a network in training mode", "call its eval() first")
    return probe(fn, shown, shown, image_shape, n_classes, wants, known_by)
