"""A person's trained classifier, from any framework, as a black box: images in, one row of logits for each out.

Three forms: an ONNX file, a safetensors file with the code of its network, a Python callable. Nothing is unpickled. An ONNX file is
taken apart before the runtime sees it: a walk over its bytes bounds how much it may hold, a list says which operations it may use,
shape inference bounds the work, and what runs is what was checked, written anew. Then any teacher answers a few made-up images.

B images in a batch, C channels, H, W size, K classes, P images of the probe.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpdistill.data.files import check_name, no_warnings, one_error_type, open_regular
from dpdistill.data.images import check_value_range
from dpdistill.data.limits import Limits
from dpdistill.data.procedural import procedural_images
from dpdistill.errors import InputError

with no_warnings():
    import onnx
    import onnx.shape_inference
    import onnxruntime

Run = Callable[[Tensor], Any]  # what a person's model maps: images as it wants them -> an array [B, K]

MODEL_LIMITS = Limits(max_file_bytes=2**29)
BATCH = 64  # images the runtime sees at once, at most: bounds memory, and is what the checks of size assume
PROBE = 8
MAX_SECONDS = 10.0  # of the probe
MAX_FIELDS = 300_000  # wire fields of an ONNX file: each costs the parser memory, however few bytes it takes
MAX_PACKED = 2**26  # bytes of one packed list of integers, which grow eightfold when parsed
MAX_DEPTH = 16
MAX_NODES = 20_000
MAX_TENSORS = 20_000
MAX_ELEMENTS = 2**27  # of one tensor, for a batch of BATCH: 512 MiB of float32
MAX_WORK = 6 * 10**9 * BATCH  # multiplications for a batch of BATCH: above a WideResNet-28-10 on 32x32 images
MAX_WINDOW = 4096  # kernel, stride, dilation, padding
MAX_HEADER = 2**22  # bytes, of a safetensors file
EXTRA_BYTES = 2**30  # address space that loading and probing may take beyond the model's own

EXPORT = "export it to ONNX: torch.onnx.export(model.eval(), x, 'model.onnx'), or tf2onnx for Keras and TensorFlow"
REFUSED = frozenset({".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".h5", ".hdf5", ".keras", ".joblib", ".pb"})

OPERATIONS = frozenset(
    """Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape
    Conv ConvInteger ConvTranspose Cos DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Elu Equal Erf Exp Expand
    Flatten Floor Gather Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid
    HardSwish Identity InstanceNormalization LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization
    MatMul MatMulInteger Max MaxPool Mean Min Mish Mod Mul Neg Not Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear
    Range Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
    Reshape Resize Round Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum
    Tanh ThresholdedRelu Tile Transpose Trilu Unsqueeze Upsample Where Xor""".split()  # noqa: SIM905
)  # no loops, branches, sequences, strings or random numbers: what is left ends, and repeats

FORBIDDEN_FIELDS = {  # of the ONNX schema, with the way out
    ("TensorProto", "external_data"): ("keeps weights in other files", "save it as one file: save_as_external_data=False"),
    ("GraphProto", "sparse_initializer"): ("has sparse weights", "store them densely"),
    ("AttributeProto", "g"): ("has loops or branches", "export it with fixed control flow"),
    ("AttributeProto", "graphs"): ("has loops or branches", "export it with fixed control flow"),
    ("AttributeProto", "sparse_tensor"): ("has sparse weights", "store them densely"),
    ("AttributeProto", "sparse_tensors"): ("has sparse weights", "store them densely"),
    ("AttributeProto", "type_protos"): ("has attributes that are types", "export a plain classifier"),
    ("AttributeProto", "tp"): ("has attributes that are types", "export a plain classifier"),
    ("AttributeProto", "ref_attr_name"): ("defines functions of its own", "inline them: onnx.inliner.inline_local_functions"),
    ("ModelProto", "functions"): ("defines functions of its own", "inline them: onnx.inliner.inline_local_functions"),
    ("ModelProto", "training_info"): ("holds a training graph", "export it for inference"),
}  # fmt: skip

_T = onnx.TensorProto
DTYPES: dict[int, Any] = {
    _T.FLOAT: np.float32, _T.FLOAT16: np.float16, _T.DOUBLE: np.float64, _T.UINT8: np.uint8, _T.INT8: np.int8,
    _T.INT32: np.int32, _T.INT64: np.int64, _T.BOOL: np.bool_,
}  # fmt: skip
TYPED_FIELD = {  # where a tensor keeps its numbers if not in raw_data
    _T.FLOAT: "float_data", _T.DOUBLE: "double_data", _T.INT64: "int64_data", _T.FLOAT16: "int32_data",
    _T.UINT8: "int32_data", _T.INT8: "int32_data", _T.INT32: "int32_data", _T.BOOL: "int32_data",
}  # fmt: skip
IMAGE_TYPES = (_T.FLOAT, _T.FLOAT16, _T.DOUBLE, _T.UINT8)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A classifier that has passed the probe. It is not private by itself, and nothing here makes it so.

    Attributes:
      name: of its file, printable, without the folder.
      image_shape: (C, H, W) of the images it takes.
      n_classes: K.
      outputs: maps images [B, C, H, W], float32 in [-1, 1], to logits or log-probabilities [B, K], float32 on the same
        device, without a gradient. Softmax of a row is the teacher's answer. Each row depends on its image alone.
      sha256: of the file, in hex; '' for a callable.
    """

    name: str
    image_shape: tuple[int, int, int]
    n_classes: int
    outputs: Callable[[Tensor], Tensor]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Wants:
    """How a person's model wants its images, and what its rows are.

    Args:
      value_range: of its pixels. A uint8 model gets 0..255 whatever stands here.
      layout: 'NCHW' or 'NHWC'.
      outputs: 'logits' (log-probabilities are logits too), 'probabilities', or None to tell from the probe.
      mean, std: per channel, subtracted and divided by after scaling to `value_range`.
    """

    value_range: tuple[float, float] = (0.0, 1.0)
    layout: str = "NCHW"
    outputs: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_value_range(self.value_range)
        if self.layout not in ("NCHW", "NHWC"):
            raise ValueError(f"Expected {self.layout=} 'NCHW' or 'NHWC'.")
        if self.outputs not in (None, "logits", "probabilities"):
            raise ValueError(f"Expected {self.outputs=} 'logits', 'probabilities' or None.")
        for values in (self.mean, self.std):
            if values is not None and not (len(values) in (1, 3) and all(map(math.isfinite, values))):
                raise ValueError(f"Expected {self.mean=} and {self.std=} to be 1 or 3 finite numbers.")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"Expected {self.std=} to be positive.")

    def feed(self, x_BCHW: Tensor) -> Tensor:
        """Returns images in [-1, 1] as the model wants them, float32."""
        low, high = self.value_range
        x_BCHW = (x_BCHW.float() + 1) * ((high - low) / 2) + low
        for values, divide in ((self.mean, False), (self.std, True)):
            if values is not None:
                values_C11 = torch.tensor(values, dtype=torch.float32, device=x_BCHW.device).view(-1, 1, 1)
                x_BCHW = x_BCHW / values_C11 if divide else x_BCHW - values_C11
        return x_BCHW if self.layout == "NCHW" else x_BCHW.permute(0, 2, 3, 1).contiguous()


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
    if path.is_dir():
        known = "is a TensorFlow SavedModel" if (path / "saved_model.pb").exists() else "is a folder"
        raise InputError(spec, f"{known}, not a model file", EXPORT)
    if suffix in REFUSED:
        raise InputError(spec, f"is a {suffix} file, which may run code when it is read", EXPORT)
    if suffix not in (".onnx", ".safetensors"):
        raise InputError(spec, "is not a model file: wanted .onnx, or .safetensors with an architecture", EXPORT)
    if image_shape is not None:
        check_image_shape(spec, image_shape, wants)
    if suffix == ".onnx":
        if architecture is not None:
            raise InputError(spec, "needs no architecture, it holds its own", "leave architecture out")
        raw = read_bytes(spec)
        digest = hashlib.sha256(raw).hexdigest()
        with bounded_memory(EXTRA_BYTES + 3 * len(raw)):
            raw, feed, image_shape, wants = checked_onnx(raw, spec, image_shape, wants)
            run = onnx_run(raw, feed, spec, image_shape, wants, n_threads)
            return probe(run, spec, name, image_shape, n_classes, wants, digest)
    if architecture is None:
        raise InputError(spec, "holds weights without their network", "say architecture='module:callable', or use ONNX")
    if image_shape is None:
        raise InputError(spec, "does not say what images it takes", "say image_shape=(C, H, W)")
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
    name: str = "callable",
) -> Teacher:
    """Wraps a Python function as a teacher, after the same probe as for files.

    Args:
      fn: maps a float32 tensor [B, C, H, W] with pixels in `value_range` to a tensor or array [B, K], each row from its image
        alone. Called without gradients. A torch network must be in eval mode already.
      image_shape, n_classes, value_range, layout, outputs, mean, std: as in `load_teacher`.
      name: printable.

    Raises:
      InputError: what it returns is no classifier's answer.
    """
    wants = Wants(value_range=tuple(value_range), layout=layout, outputs=outputs, mean=mean, std=std)  # type: ignore[arg-type]
    check_image_shape(name, image_shape, wants)
    if isinstance(fn, nn.Module) and fn.training:
        raise InputError(name, "is a network in training mode", "call its eval() first")
    return probe(fn, name, check_name(name), image_shape, n_classes, wants, "")


def check_image_shape(source: object, image_shape: tuple[int, int, int], wants: Wants) -> None:
    """Refuses images that the library does not make, and mean and std of another number of channels."""
    low, high = MODEL_LIMITS.min_size, MODEL_LIMITS.max_size
    fits = len(image_shape) == 3 and image_shape[0] in (1, 3) and all(low <= side <= high for side in image_shape[1:])
    if not fits:
        shape = show(image_shape)
        hint = "put the resizing into the model, or train one for smaller images"
        raise InputError(source, f"takes images {shape}, wanted 1 or 3 channels of {low} to {high} pixels a side", hint)
    for values in (wants.mean, wants.std):
        if values is not None and len(values) not in (1, image_shape[0]):
            wanted = f"wanted {image_shape[0]}"
            raise InputError(source, f"has {len(values)} numbers in mean or std, {wanted}", "one for each channel")


def show(shape: Any) -> str:
    """'3x32x32'; a size that is not fixed is '?'."""
    return "x".join("?" if side is None else str(int(side)) for side in shape)


def read_bytes(path: str | Path) -> bytes:
    """Returns a regular file's bytes, at most 512 MiB."""
    with open_regular(path, MODEL_LIMITS) as (file, size), one_error_type(path):
        raw = file.read(size + 1)
        if len(raw) != size:
            raise InputError(path, "changed while it was read", "wait until it is written")
        return raw


@contextmanager
def bounded_memory(extra_bytes: int) -> Iterator[None]:
    """Lets this process's address space grow by so much, where the system can say so: what asks for more gets a MemoryError."""
    try:
        import resource

        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError):  # not Linux: the bounds on declared shapes remain
        yield
        return
    bound = pages * resource.getpagesize() + extra_bytes
    if soft != resource.RLIM_INFINITY:
        bound = min(bound, soft)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ONNX, from bytes to a checked graph


def varint(raw: memoryview, at: int, end: int) -> tuple[int, int]:
    """Returns a protobuf varint of at most ten bytes, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a varint that does not end")


def walk_wire(raw: bytes, path: object) -> None:
    """Refuses ONNX bytes that a parser would blow up on, or that hold what is not read here. Nothing is built.

    A file of 512 MiB can hold 2**28 empty nodes of two bytes each, and a parser makes an object of every one.
    """
    view, fields = memoryview(raw), 0
    todo = [(0, len(view), onnx.ModelProto.DESCRIPTOR, 0)]
    while todo:
        at, end, kind, depth = todo.pop()
        while at < end:
            fields += 1
            if fields > MAX_FIELDS:
                raise InputError(path, f"has more than {MAX_FIELDS:,} parts", "export a smaller model")
            tag, at = varint(view, at, end)
            field = kind.fields_by_number.get(tag >> 3)
            if field is not None and (kind.name, field.name) in FORBIDDEN_FIELDS:
                raise InputError(path, *FORBIDDEN_FIELDS[kind.name, field.name])
            wire = tag & 7
            if wire == 0:
                _, at = varint(view, at, end)
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
            elif wire == 2:
                length, at = varint(view, at, end)
                if field is not None and field.message_type is not None:
                    if depth == MAX_DEPTH:
                        raise InputError(path, "is nested too deeply", "export a plain classifier")
                    todo.append((at, min(at + length, end), field.message_type, depth + 1))
                elif field is not None and field.type in (3, 4, 5, 13, 14) and length > MAX_PACKED:
                    hint = "store integers as raw_data, as onnx.numpy_helper does"
                    raise InputError(path, f"has a list of integers above {MAX_PACKED:,} bytes", hint)
                at += length
            else:
                raise ValueError("a wire type that ONNX does not use")
            if at > end:
                raise ValueError("a field longer than what holds it")


def parse_model(raw: bytes, path: object) -> onnx.ModelProto:
    """Returns the model in `raw`: one graph of known operations, tensors that hold what they declare, nothing else.

    Raises:
      InputError: anything else.
    """
    with one_error_type(path):
        walk_wire(raw, path)
        model = onnx.ModelProto.FromString(raw)
    with one_error_type(path):
        model.DiscardUnknownFields()
        for field in set(model.DESCRIPTOR.fields_by_name) - {"ir_version", "opset_import", "graph"}:
            model.ClearField(field)  # producer, metadata, device settings
        versions = {opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")}
        if len(versions) != 1:
            raise InputError(path, "does not say one version of the ONNX operations", EXPORT)
        del model.opset_import[:]
        model.opset_import.add(domain="", version=versions.pop())
        check_graph(model.graph, path)
        rename(model.graph)
        return model


def rename(graph: onnx.GraphProto) -> None:
    """Gives every value a short name of ours, and drops what is not needed to run: odd names have crashed the runtime."""
    ours = {"": ""}
    for field in ("value_info", "quantization_annotation", "metadata_props", "doc_string"):
        graph.ClearField(field)  # what a file says of its inner shapes may lie
    graph.name = "teacher"
    for number, node in enumerate(graph.node):
        node.name, node.domain = f"n{number}", ""
        for field in ("doc_string", "metadata_props", "device_configurations"):
            node.ClearField(field)
        for names in (node.input, node.output):
            while names and not names[-1]:  # an absent last input crashed LayerNormalization in onnxruntime 1.31
                names.pop()
            for i, name in enumerate(names):
                names[i] = ours.setdefault(name, f"v{len(ours)}")
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = ours.setdefault(value.name, f"v{len(ours)}")


def check_graph(graph: onnx.GraphProto, path: object) -> None:
    """Refuses unknown operations, windows out of range, tensors that lie, and names that do not come from before."""
    if not 1 <= len(graph.node) <= MAX_NODES or len(graph.initializer) > MAX_TENSORS:
        raise InputError(path, f"has no nodes or more than {MAX_NODES:,}", "export a smaller model")
    known = {""}
    for tensor in graph.initializer:
        check_tensor(tensor, path)
    weights = [tensor.name for tensor in graph.initializer]
    held = frozenset(weights)
    names = weights + [value.name for value in graph.input if value.name not in held]
    for name in names:
        if name in known:
            raise InputError(path, "uses a name twice", EXPORT)
        known.add(name)
    for node in graph.node:
        op = node.op_type
        shown = op if re.fullmatch(r"[A-Za-z0-9_]{1,40}", op, re.ASCII) else "of no plain name"
        if node.domain not in ("", "ai.onnx"):
            hint = "export with standard ONNX operations only"
            raise InputError(path, f"uses an operation from outside the ONNX standard ({shown})", hint)
        if op not in OPERATIONS:
            hint = "export a plain classifier; loops, branches, sequences, text and random numbers are not run"
            raise InputError(path, f"uses an operation that is not run here ({shown})", hint)
        if node.overload or not all(name in known for name in node.input):
            raise InputError(path, "uses a value before it is computed", EXPORT)
        for name in node.output:
            if name and name in known:
                raise InputError(path, "computes a value twice", EXPORT)
            known.add(name)
        check_attributes(node, path)
    if not graph.output or not all(value.name in known and value.name for value in graph.output):
        raise InputError(path, "declares an output that is not computed", EXPORT)


def check_attributes(node: onnx.NodeProto, path: object) -> None:
    """Refuses repeated attributes, windows outside 1..4096 and layers in training mode."""
    if len({attribute.name for attribute in node.attribute}) != len(node.attribute):
        raise InputError(path, "gives a setting twice", EXPORT)
    for attribute in node.attribute:
        if not re.fullmatch(r"[a-z][A-Za-z0-9_]{0,39}", attribute.name, re.ASCII):
            raise InputError(path, "has a setting of no plain name", EXPORT)
        for tensor in (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors:
            check_tensor(tensor, path)
        values = [attribute.i, *attribute.ints]
        name = attribute.name
        if name in ("kernel_shape", "strides", "dilations", "group", "blocksize", "size", "num_groups"):
            low = 1
            values = list(attribute.ints) if attribute.ints else [attribute.i]
        elif name in ("pads", "output_padding", "output_shape"):
            low = -MAX_WINDOW if node.op_type == "Pad" else 0
        else:
            low = -(2**63)
        if low > -(2**63) and not all(low <= value <= MAX_WINDOW for value in values):
            raise InputError(path, f"has a window, group or padding outside {low}..{MAX_WINDOW}", EXPORT)
        if name == "training_mode" and attribute.i:
            hint = "export it after model.eval(), with torch.onnx.TrainingMode.EVAL"
            raise InputError(path, "was exported in training mode", hint)


def check_tensor(tensor: onnx.TensorProto, path: object) -> None:
    """Refuses a tensor of another type, or whose declared shape is not what it holds."""
    if tensor.data_type not in DTYPES:
        raise InputError(
            path, "has weights that are neither numbers nor booleans", "use float32, float16 or int8 weights"
        )
    if tensor.data_location != _T.DEFAULT or tensor.HasField("segment") or tensor.string_data:
        raise InputError(path, "keeps weights in other files", "save it as one file")
    count = math.prod(tensor.dims)
    if len(tensor.dims) > 8 or any(not 0 <= side <= 2**31 for side in tensor.dims) or count > MAX_ELEMENTS:
        raise InputError(path, f"declares a tensor of more than {MAX_ELEMENTS:,} elements", "export a smaller model")
    fields = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data")
    held = {field: len(getattr(tensor, field)) for field in fields if len(getattr(tensor, field))}
    if tensor.HasField("raw_data"):
        fits = not held and len(tensor.raw_data) == count * np.dtype(DTYPES[tensor.data_type]).itemsize
    else:
        fits = held == ({TYPED_FIELD[tensor.data_type]: count} if count else {})
    if not fits:
        raise InputError(path, "has a tensor whose data are not of its declared shape", EXPORT)


def check_work(model: onnx.ModelProto, feed: str, shape: list[int], path: object) -> None:
    """Refuses a graph whose tensors or multiplications are too many for a batch of BATCH, as far as shapes can be inferred."""
    small = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = small.graph
    graph.name = "shapes"
    graph.node.extend(model.graph.node)
    graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in model.graph.output)
    shapes: dict[str, list[int]] = {feed: shape}
    for tensor in model.graph.initializer:  # integers may be shapes and are kept; of weights only the shape matters
        shapes[tensor.name] = list(tensor.dims)
        if tensor.data_type in (_T.INT32, _T.INT64) and math.prod(tensor.dims) <= 1024:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    graph.input.append(onnx.helper.make_tensor_value_info(feed, kinds[feed], shape))
    with one_error_type(path):
        inferred = onnx.shape_inference.infer_shapes(small, data_prop=True).graph
    for value in (*inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = [dim.dim_value for dim in dims]
    work = 0
    for node in model.graph.node:
        sizes = [math.prod(shapes[name]) for name in (*node.output, *node.input[:1]) if name in shapes]
        if any(not 0 <= size <= MAX_ELEMENTS for size in sizes):
            hint = f"at most {MAX_ELEMENTS:,} for {BATCH} images: use a smaller model"
            raise InputError(path, "computes a tensor of too many elements", hint)
        factor = window(node, shapes)
        if factor is None:
            hint = "export it with a fixed batch, or simplify it, so that its shapes are known before it runs"
            raise InputError(path, f"has a {node.op_type} of a size that is not known before it runs", hint)
        work += max(sizes, default=0) * factor
        if work > MAX_WORK:
            hint = f"at most {MAX_WORK // BATCH:,} multiplications for one image: use a smaller model"
            raise InputError(path, "needs too much work", hint)


def window(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int | None:
    """Multiplications for one element that a node computes; None if they can be many and the shapes are not known."""
    op, settings = node.op_type, {attribute.name: attribute for attribute in node.attribute}
    matrix = op in ("MatMul", "MatMulInteger", "Gemm", "QLinearMatMul")
    if not matrix and "Conv" not in op:
        kernel = (
            settings["kernel_shape"].ints if op in ("AveragePool", "MaxPool") and "kernel_shape" in settings else [1]
        )
        return settings["size"].i if op == "LRN" and "size" in settings else math.prod(kernel)
    place = {"QLinearConv": 3}.get(op, 1)  # of the weights of a convolution
    known = node.input[0] in shapes and all(name in shapes for name in node.output if name)
    if not known or len(node.input) <= place:
        return None
    if matrix:
        rows = shapes[node.input[0]] or [1]
        return rows[0] if "transA" in settings and settings["transA"].i else rows[-1]
    weights = shapes.get(node.input[place])
    return None if weights is None else math.prod(weights[1:])


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
    if image_shape is None:
        if None in declared:
            raise InputError(path, f"takes images {show(declared)} of open size", "say image_shape=(C, H, W)")
        image_shape = (declared[0], declared[1], declared[2])
    if any(side not in (None, asked) for side, asked in zip(declared, image_shape, strict=True)):
        hint = "change image_shape, or export the model for it"
        other = [dims[3], *dims[1:3]] if wants.layout == "NCHW" else dims[1:]
        if all(side in (None, asked) for side, asked in zip(other, image_shape, strict=True)):
            hint = f"say layout='{'NHWC' if wants.layout == 'NCHW' else 'NCHW'}'"
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


def network_of(architecture: str, raw: bytes, path: object) -> nn.Module:
    """Returns the network with the weights of a safetensors file, strictly, in eval mode."""
    tensors = read_tensors(raw, path)
    network = build(architecture)
    state = network.state_dict()
    missing = sorted(set(state) - set(tensors))
    if missing or len(tensors) != len(state):
        extra = len(set(tensors) - set(state))
        first = f", first {missing[0]}" if missing else ""
        reason = f"is not of the network {architecture}: {len(missing)} tensors missing{first}, {extra} unknown"
        raise InputError(path, reason, "save model.state_dict() of this very network")
    with one_error_type(path):
        for name, value in state.items():
            tensor = tensors[name]
            if tensor.shape != value.shape or tensor.is_floating_point() != value.is_floating_point():
                found, wanted = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (tensor, value))
                hint = f"is {architecture} the right network?"
                raise InputError(path, f"has {name} of {found}, wanted {wanted}", hint)
        network.load_state_dict(tensors, strict=True)
    return network.eval().requires_grad_(False)


def read_tensors(raw: bytes, path: object) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file. Repeated keys, a long header and values that are not finite are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise InputError(path, "has two tensors of one name", "save it with safetensors.torch.save_file")
        return dict(pairs)

    with no_warnings():
        import safetensors.torch

    with one_error_type(path):
        (length,) = struct.unpack_from("<Q", raw)
        if length > min(MAX_HEADER, len(raw) - 8):
            raise InputError(path, "has a header that is too long", "save it with safetensors.torch.save_file")
        header = json.loads(raw[8 : 8 + length].decode("utf-8"), object_pairs_hook=unique)
        if len(header) > MAX_TENSORS:
            raise InputError(path, f"has more than {MAX_TENSORS:,} tensors", "use a smaller model")
        tensors = safetensors.torch.load(raw)
        for tensor in tensors.values():
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                raise InputError(
                    path, "has a weight that is not finite", "train it again, or take an earlier checkpoint"
                )
        return tensors


def build(architecture: str) -> nn.Module:
    """Imports 'module:callable' from `sys.path` and returns the network it makes. PyTorch's random state is left alone."""
    part = r"[A-Za-z_][A-Za-z0-9_]*"
    if not re.fullmatch(rf"{part}(\.{part})*:{part}", architecture, re.ASCII):
        raise InputError(
            architecture, "is not an architecture", "write module:callable, for example mynets:small_resnet"
        )
    module, attribute = architecture.split(":")
    with no_warnings():  # about the user's code, which is not ours to judge
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            hint = f"it is looked for on sys.path, which begins with {sys.path[:2]}; set PYTHONPATH"
            raise InputError(architecture, f"needs a module that is not found: {error.name}", hint) from None
        except (Exception, SystemExit) as error:
            reason = f"fails when it is imported ({type(error).__name__})"
            raise InputError(architecture, reason, f"try python -c 'import {module}'") from error
        make = getattr(found, attribute, None)
        if not callable(make):
            raise InputError(architecture, "names nothing that can be called", f"define {attribute} in {module}")
        try:
            with torch.random.fork_rng(devices=[]):
                network = make()
        except Exception as error:
            reason = f"fails when it is called without arguments ({type(error).__name__})"
            raise InputError(architecture, reason, "wrap it: def teacher(): return Net(n_classes=10)") from error
    if not isinstance(network, nn.Module):
        raise InputError(architecture, f"returns a {type(network).__name__}, wanted a torch.nn.Module", "")
    return network


# The probe, the same for every form


def probe_images(image_shape: tuple[int, int, int]) -> Tensor:
    """Returns made-up images [P, C, H, W] in [-1, 1]: procedural, noise, smooth, black and white. Always the same."""
    c, h, w = image_shape
    rng = np.random.default_rng(0)
    drawn = procedural_images(PROBE - 4, c, h, w, seed=0).astype(np.float32) / 127.5 - 1
    noise = rng.uniform(-1, 1, (1, c, h, w)).astype(np.float32)
    ramp = np.broadcast_to(np.linspace(-1, 1, w, dtype=np.float32), (1, c, h, w))
    flat = np.ones((1, c, h, w), np.float32)
    return torch.from_numpy(np.concatenate([drawn, noise, ramp, -flat, flat]))


def probe(
    run: Run,
    source: object,
    name: str,
    image_shape: tuple[int, int, int],
    n_classes: int | None,
    wants: Wants,
    sha256: str,
) -> Teacher:
    """Asks the model about made-up images, and returns it as a teacher if its answers are a classifier's.

    Raises:
      InputError: rows that are missing, not finite, not repeatable, not each image's own, the same for all, or of another K.
    """
    x = probe_images(image_shape)
    first = answer(run, wants.feed(x), source)
    k = first.shape[1]
    if n_classes is not None and k != n_classes:
        raise InputError(
            source, f"returns {k} classes, wanted {n_classes}", "change n_classes, or the model's last layer"
        )
    if not 2 <= k <= MODEL_LIMITS.max_classes:
        hint = "a yes-or-no model must return two columns"
        raise InputError(source, f"returns {k} classes, wanted 2 to {MODEL_LIMITS.max_classes:,}", hint)
    scale = max(float(first.abs().max()), 1e-6)
    if not same(first, answer(run, wants.feed(x), source), scale):
        hint = "switch off dropout and other randomness: model.eval()"
        raise InputError(source, "gives two answers to the same images", hint)
    for rows in (slice(0, 1), slice(3, 6)):
        if not same(first[rows], answer(run, wants.feed(x[rows]), source), scale):
            hint = "a network in training mode mixes a batch: model.eval() before export"
            raise InputError(source, "answers an image otherwise when other images are beside it", hint)
    if float((first - first[:1]).abs().max()) <= 1e-6 * scale:
        hint = "check value_range, mean and std, and that the weights are trained"
        raise InputError(source, "gives the same answer to every image", hint)
    sums = first.sum(1)
    rows_are = bool((first >= -1e-6).all()) and bool(((sums - 1).abs() <= 1e-3).all())
    if wants.outputs == "probabilities" and not rows_are:
        raise InputError(source, "returns rows that are not probabilities", "say outputs='logits'")
    log = wants.outputs == "probabilities" or (wants.outputs is None and rows_are)

    def outputs(x_BCHW: Tensor) -> Tensor:
        if tuple(x_BCHW.shape[1:]) != image_shape:
            raise ValueError(f"Expected images {show(image_shape)}, got {show(x_BCHW.shape[1:])}.")
        if not len(x_BCHW):
            return x_BCHW.new_zeros(0, k)
        rows_BK = torch.cat([answer(run, wants.feed(part), source, k) for part in x_BCHW.detach().split(BATCH)])
        return (rows_BK.clamp_min(1e-8).log() if log else rows_BK).to(x_BCHW.device)

    return Teacher(name=name, image_shape=image_shape, n_classes=k, outputs=outputs, sha256=sha256)


def same(a_BK: Tensor, b_BK: Tensor, scale: float) -> bool:
    """Whether two answers agree up to rounding, in a thousandth of the largest."""
    return a_BK.shape == b_BK.shape and float((a_BK - b_BK).abs().max()) <= 1e-3 * scale


def answer(run: Run, x: Tensor, source: object, n_classes: int | None = None) -> Tensor:
    """Returns the model's rows for a batch, [B, K] float32, finite."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a person's model may warn as it likes
            found = run(x)
            rows = found.detach() if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
    except InputError:
        raise
    except Exception as error:
        reason = f"fails on images {show(x.shape[1:])} ({type(error).__name__})"
        raise InputError(source, reason, "check image_shape and layout") from error
    if not rows.is_floating_point():
        raise InputError(source, f"returns {str(rows.dtype).removeprefix('torch.')}, wanted floats", "return logits")
    if rows.ndim != 2 or len(rows) != len(x) or n_classes not in (None, rows.shape[1]):
        wanted = f"wanted [{len(x)}, {n_classes or 'K'}]"
        raise InputError(
            source, f"returns {list(rows.shape)} for {len(x)} images, {wanted}", "one row of logits for each"
        )
    rows = rows.float()
    if not rows.isfinite().all():
        raise InputError(source, "returns values that are not finite", "check value_range, mean and std")
    return rows
