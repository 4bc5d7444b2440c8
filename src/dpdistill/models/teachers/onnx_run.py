"""Running a checked ONNX graph: one session, batches it can take, and a deadline.

B images in a batch, K classes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpdistill.data.files import no_warnings, one_error_type
from dpdistill.errors import InputError

with no_warnings():
    import onnxruntime
from dpdistill.models.teachers.base import (
    _T,
    BATCH,
    DTYPES,
    EXPORT,
    IMAGE_TYPES,
    MAX_SECONDS,
    Run,
    Wants,
    check_image_shape,
    show,
)
from dpdistill.models.teachers.onnx_check import check_work, parse_model


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The one input of an ONNX graph: its name, its numpy type, and its batch size if that is fixed."""

    name: str
    dtype: Any
    n: int | None


def checked_onnx(
    raw: bytes, path: object, image_shape: tuple[int, int, int] | None, wants: Wants
) -> tuple[bytes, Feed, tuple[int, int, int], Wants]:
    """Returns a file anew as it was checked, its input, the images it takes, and how it wants them."""
    model = parse_model(raw, path)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or not inputs[0].type.HasField("tensor_type"):
        raise InputError(path, f"takes {len(inputs)} inputs, wanted one: images [B, C, H, W]", EXPORT)
    kind = inputs[0].type.tensor_type
    if kind.elem_type not in IMAGE_TYPES:
        raise InputError(path, "takes images that are not float32, float16, float64 or uint8", "change its input type")
    for dim in kind.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value < 1:  # how some exporters say that a size is open
            dim.ClearField("dim_value")
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    if len(dims) != 4:
        raise InputError(path, f"takes an input of {len(dims)} dimensions, wanted 4: images [B, C, H, W]", EXPORT)
    n, declared = dims[0], (dims[1:] if wants.layout == "NCHW" else [dims[3], *dims[1:3]])
    if n is not None and not 1 <= n <= BATCH:
        raise InputError(path, f"takes batches of {n}, wanted 1 to {BATCH}", "export it with a dynamic batch")
    other = [dims[3], *dims[1:3]] if wants.layout == "NCHW" else dims[1:]
    turned = f"--set layout={'NHWC' if wants.layout == 'NCHW' else 'NCHW'}"
    if image_shape is None:
        if declared[0] not in (1, 3) and other[0] in (1, 3):
            raise InputError(path, f"takes images {show(declared)}, which have no colours there", turned)
        if None in declared:
            raise InputError(path, f"takes images {show(declared)} of open size", "give --shape C,H,W")
        image_shape = (declared[0], declared[1], declared[2])
    if any(side not in (None, asked) for side, asked in zip(declared, image_shape, strict=True)):
        hint = "change --shape, or export the model for it"
        if all(side in (None, asked) for side, asked in zip(other, image_shape, strict=True)):
            hint = turned
        raise InputError(path, f"takes images {show(declared)}, wanted {show(image_shape)}", hint)
    check_image_shape(path, image_shape, wants)
    c, h, w = image_shape
    check_work(model, inputs[0].name, [n or BATCH, *((c, h, w) if wants.layout == "NCHW" else (h, w, c))], path)
    if kind.elem_type == _T.UINT8:
        if wants.mean is not None or wants.std is not None:
            raise InputError(path, "takes 8-bit images, which have no mean and std", "leave mean and std out")
        wants = Wants(value_range=(0.0, 255.0), layout=wants.layout, outputs=wants.outputs)
    with one_error_type(path):
        feed = Feed(name=inputs[0].name, dtype=DTYPES[kind.elem_type], n=n)
        return model.SerializeToString(), feed, image_shape, wants


def onnx_run(
    raw: bytes, feed: Feed, path: object, image_shape: tuple[int, int, int], wants: Wants, n_threads: int
) -> Run:
    """Returns a function that runs a checked model on any number of images."""
    session, n, dtype = open_session(raw, path, n_threads), feed.n, feed.dtype
    names = [value.name for value in session.get_outputs()]

    def forward(x: Tensor) -> list[Any]:
        array = x.numpy()
        array = np.rint(array).astype(dtype) if dtype is np.uint8 else array.astype(dtype)
        return call(session, names, {feed.name: np.ascontiguousarray(array)}, path)

    def run(x: Tensor) -> np.ndarray:
        chunks, x = [], x.cpu()
        for part in x.split(n or BATCH):
            missing = (n or 0) - len(part)
            full = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing > 0 else part
            (answer,) = forward(full)
            if answer.ndim != 2 or len(answer) != len(full):
                wanted = f"wanted [{len(full)}, K]"
                raise InputError(
                    path, f"returns an output {list(answer.shape)} for {len(full)} images, {wanted}", EXPORT
                )
            chunks.append(answer[: len(part)])
        return np.concatenate(chunks)

    if (
        len(names) > 1
    ):  # features beside logits, or a label beside probabilities: the only [B, K] of floats is the answer
        b = n or 2
        found = forward(wants.feed(torch.zeros(b, *image_shape)))
        rows = [
            name for name, answer in zip(names, found, strict=True)
            if isinstance(answer, np.ndarray) and answer.dtype.kind == "f" and answer.ndim == 2 and len(answer) == b
        ]  # fmt: skip
        if len(rows) != 1:
            raise InputError(
                path, f"has {len(names)} outputs, {len(rows)} of them [B, K]; wanted one", "export the logits only"
            )
        names = rows
    return run


def open_session(raw: bytes, path: object, n_threads: int) -> Any:
    """Returns an onnxruntime session on the CPU. What the file says of optimisation, devices and other files is gone by now."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
    options.log_severity_level = 4
    options.use_deterministic_compute = True
    # The fusions above BASIC gain a third of the time, and one of them crashed on a mutated file.
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.graph_optimization_level = level
    options.add_session_config_entry("session.load_model_format", "ONNX")
    stop = getattr(options, "set_load_cancellation_flag", lambda _: None)  # since onnxruntime 1.22
    try:
        with deadline(lambda: stop(True)):
            providers = ["CPUExecutionProvider"]  # and no second try with others, which would print to the screen
            return onnxruntime.InferenceSession(raw, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's own types; their text quotes the file
        kind = type(error).__name__
        raise InputError(
            path, f"is not a model that onnxruntime can run ({kind})", "export it anew, with opset 17"
        ) from None


@contextmanager
def deadline(stop: Callable[[], Any]) -> Iterator[None]:
    """Calls `stop` from another thread if the block takes more than MAX_SECONDS."""
    timer = threading.Timer(MAX_SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def call(session: Any, names: list[str], feed: dict[str, np.ndarray], path: object) -> list[Any]:
    """Runs a session, for MAX_SECONDS at most: between two nodes it can be stopped."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    try:
        with deadline(lambda: setattr(options, "terminate", True)):
            return list(session.run(names, feed, options))
    except Exception as error:
        if options.terminate:
            raise InputError(
                path, f"takes more than {MAX_SECONDS:g} seconds for a batch", "use a smaller model"
            ) from None
        kind = type(error).__name__
        hint = "check that it takes these images at any batch size, or export it with a fixed batch"
        raise InputError(path, f"fails on images of the declared shape ({kind})", hint) from None


# safetensors, and the network they belong to
