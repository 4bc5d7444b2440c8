"""What reading a teacher shares: limits, how it wants its images, and bounds on memory.

B images in a batch, C channels, H, W size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpdistill.data.files import no_warnings, one_error_type, open_regular
from dpdistill.data.images import check_value_range
from dpdistill.data.limits import Limits
from dpdistill.errors import InputError

with no_warnings():
    import onnx
    import onnx.shape_inference


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

ONE_FILE = "external_data=False"  # of torch.onnx.export, which else keeps the weights beside the file
EXPORT = f"export it to ONNX: torch.onnx.export(model.eval(), (x,), 'model.onnx', {ONE_FILE}), or tf2onnx for Keras and TensorFlow"
RANGE = "check --input-low and --input-high (0 and 255?), --set mean=… and std=…, and that the weights are trained"
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
    ("TensorProto", "external_data"): ("keeps weights in other files", f"save it as one file: torch.onnx.export(…, {ONE_FILE})"),
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
        device, without a gradient. Softmax of a row is the teacher's answer. Each row depends on its image alone; a row that is not
        finite says nothing, all classes alike. InputError where that is half of a batch or more.
      sha256: of the file, in hex; of a callable, 'callable-' and part of that of its name, or '' where it was given none.
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
