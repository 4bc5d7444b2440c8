"""The student as an ONNX graph, written byte for byte the same every time. Needs numpy and onnx only.

A verifier rebuilds the bytes from the weights and compares, so everything in the file follows from the arguments: no date, no
version of a library, no order of a dictionary. The graph is `models.wavelet_net.WaveletNet`, in operations every runtime has (opset 17).

N images, C channels, H, W size, D features, G groups, K classes.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import ReleaseError

IR_VERSION, OPSET = 8, 17
EPSILON = 1e-5  # of torch.nn.GroupNorm
# As `models.wavelet_net` has them, which needs torch.
WAVELETS, REACH, ROOM, LEAST, GAIN, FLOOR = 16, 5, 12, 8, 3.0, 1e-4
MAX_SIDE, MAX_WIDTH, MAX_DEPTH, MAX_CLASSES = 1024, 4096, 16, 10_000
MAX_WEIGHTS = 2**27  # elements in all: protobuf ends at 2 GiB

Array = NDArray[Any]


def student_onnx(weights: dict[str, Array], config: dict[str, Any]) -> bytes:
    """Returns an ONNX file that computes what `WaveletNet` computes: `images` float32 [N, C, H, W] in [-1, 1] to `logits` [N, K].

    The same arguments give the same bytes, in any process. N is free.

    Args:
      weights: the float32 arrays of `WaveletNet.state_dict()`, by name.
      config: `image_shape` [C, H, W], `n_classes`, `width`, `depth`, `groups`, as `WaveletNet` takes them;
        and `class_names`, K strings, if they shall be in the metadata.

    Raises:
      ReleaseError: a setting out of range, or weights that are not this network's: a name, a shape, a type, a value not finite.
    """
    image_shape, n_classes, width, depth, groups, names = _settings(config)
    layers, wanted = _layers(image_shape, width, depth)[0], student_shapes(config)
    _check_weights(weights, wanted)

    model = onnx.ModelProto(ir_version=IR_VERSION, producer_name="dpdistill")
    model.opset_import.add(domain="", version=OPSET)
    graph = model.graph
    graph.name = "student"
    norms = {f"{layer['norm']}.{part}" for layer in layers for part in ("weight", "bias")}
    for name in sorted(set(wanted) - norms):
        graph.initializer.append(_tensor(name, weights[name]))
    for name, value in (("floor", FLOOR), ("gain", GAIN), ("one", 1.0)):
        graph.initializer.append(_tensor(f"front.{name}", np.array(value, np.float32)))
    graph.initializer.append(_tensor("front.pads", np.array([0, 0, REACH, REACH] * 2, np.int64)))
    # InstanceNormalization without a scale of its own; GroupNorm's scale is per channel and comes after
    graph.initializer.append(_tensor("norm.ones", np.ones(groups, np.float32)))
    graph.initializer.append(_tensor("norm.zeros", np.zeros(groups, np.float32)))
    graph.initializer.append(_tensor("norm.grouped", np.array([0, groups, -1], np.int64)))  # 0 keeps N

    x = _moduli(graph, "images", image_shape)
    for number, layer in enumerate(layers):
        conv, norm, channels = layer["conv"], layer["norm"], layer["channels"]
        x = _node(
            graph, "Conv", f"block{number}.conv", x, f"{conv}.weight", f"{conv}.bias",
            kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1], dilations=[1, 1], group=1,
        )  # fmt: skip
        shape, scale, shift = f"{norm}.shape", f"{norm}.scale", f"{norm}.shift"
        graph.initializer.append(_tensor(shape, np.array([0, channels, *layer["size"]], np.int64)))
        graph.initializer.append(_tensor(scale, weights[f"{norm}.weight"].reshape(channels, 1, 1)))
        graph.initializer.append(_tensor(shift, weights[f"{norm}.bias"].reshape(channels, 1, 1)))
        x = _node(graph, "Reshape", f"block{number}.group", x, "norm.grouped")
        ones, zeros = "norm.ones", "norm.zeros"
        x = _node(graph, "InstanceNormalization", f"block{number}.norm", x, ones, zeros, epsilon=EPSILON)
        x = _node(graph, "Reshape", f"block{number}.ungroup", x, shape)
        x = _node(graph, "Mul", f"block{number}.scale", x, scale)
        x = _node(graph, "Add", f"block{number}.shift", x, shift)
        x = _node(graph, "Relu", f"block{number}.relu", x)
        if layer["pooled"]:
            x = _halved(graph, f"block{number}.pool", x)
    x = _node(graph, "Flatten", "flatten", x, axis=1)
    _node(graph, "Gemm", "logits", x, "head.weight", "head.bias", transB=1)

    _declare(graph.input.add(), "images", ["N", *image_shape])
    _declare(graph.output.add(), "logits", ["N", n_classes])
    metadata = {"input_range": "-1 to 1", "input_layout": "NCHW", "output": "logits"}
    if names is not None:
        metadata["class_names"] = json.dumps(names)
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])
    return model.SerializeToString(deterministic=True)


def student_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all arrays of a student, by name. `config` and errors as `student_onnx` has them."""
    image_shape, n_classes, width, depth, _, _ = _settings(config)
    layers, features = _layers(image_shape, width, depth)
    shapes = _front(image_shape[0]) | {name: shape for layer in layers for name, shape in layer["weights"].items()}
    return shapes | {"head.weight": (n_classes, features), "head.bias": (n_classes,)}


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _settings(config: dict[str, Any]) -> tuple[tuple[int, int, int], int, int, int, int, list[str] | None]:
    """Returns image_shape, n_classes, width, depth, groups and class_names. The config may come from a stranger's release."""
    known = {"image_shape", "n_classes", "width", "depth", "groups"}
    if not known <= set(config) or set(config) - known - {"class_names"}:
        raise ReleaseError(f"the student's settings are not {', '.join(sorted(known))}")
    shape, k, width, depth, groups = (config[name] for name in ("image_shape", "n_classes", "width", "depth", "groups"))
    if not (isinstance(shape, list | tuple) and len(shape) == 3 and shape[0] in (1, 3)):
        raise ReleaseError("the student's image_shape is not [1 or 3, H, W]")
    if not all(_whole(side, low, MAX_SIDE) for side, low in zip(shape, (1, REACH + 1, REACH + 1), strict=True)):
        raise ReleaseError(f"the student's image_shape is not of sides {REACH + 1} to {MAX_SIDE}")
    limits = {"n_classes": (k, MAX_CLASSES), "width": (width, MAX_WIDTH), "depth": (depth, MAX_DEPTH)}
    for name, (value, most) in limits.items():
        if not _whole(value, 1, most):
            raise ReleaseError(f"the student's {name} is not a whole number from 1 to {most}")
    if not _whole(groups, 1, width) or width % groups:
        raise ReleaseError("the student's groups do not divide its width")
    names = config.get("class_names")
    if names is not None:
        if not isinstance(names, list | tuple) or len(names) != k:
            raise ReleaseError(f"the student's class_names are not {k} names")
        names = list(names)
        if not all(isinstance(name, str) and name.isprintable() for name in names) or len(set(names)) != k:
            raise ReleaseError("the student's class_names are not different printable names")
    return (shape[0], shape[1], shape[2]), k, width, depth, groups, names


def _front(channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the fixed filters."""
    filters = (channels * WAVELETS, 1, 2 * REACH + 1, 2 * REACH + 1)
    colours: dict[str, tuple[int, ...]] = {"colours": (3, 3, 1, 1)} if channels == 3 else {}
    return colours | {"real": filters, "imaginary": filters}


def _moduli(graph: onnx.GraphProto, x: str, image_shape: tuple[int, int, int]) -> str:
    """Adds `WaveletNet.moduli`, and returns the name of what it gives."""
    channels, *size = image_shape

    def conv(name: str, x: str, weight: str, side: int) -> str:
        plain = {"pads": [0] * 4, "strides": [1, 1], "dilations": [1, 1]}
        group = 1 if weight == "colours" else channels
        return _node(graph, "Conv", f"front.{name}", x, weight, kernel_shape=[side, side], group=group, **plain)

    if channels == 3:
        x = conv("opponent", x, "colours", 1)
    mirrored = _node(graph, "Pad", "front.mirrored", x, "front.pads", mode="reflect")
    squares = []
    for part in ("real", "imaginary"):
        found = conv(part, mirrored, part, 2 * REACH + 1)
        squares.append(_node(graph, "Mul", f"front.{part}.squared", found, found))
    power = _node(graph, "Add", "front.power", *squares)
    modulus = _node(graph, "Sqrt", "front.modulus", _node(graph, "Add", "front.floored", power, "front.floor"))
    raised = _node(
        graph, "Add", "front.raised", _node(graph, "Mul", "front.scaled", modulus, "front.gain"), "front.one"
    )
    both = _node(graph, "Concat", "front.both", x, _node(graph, "Log", "front.log", raised), axis=1)
    return _halved(graph, "front.pool", both) if _has_room(size) else both


def _has_room(size: list[int]) -> bool:
    """Whether a map of this size is halved."""
    return min(size) >= LEAST and max(size) >= ROOM


def _halved(graph: onnx.GraphProto, name: str, x: str) -> str:
    return _node(graph, "AveragePool", name, x, kernel_shape=[2, 2], strides=[2, 2])


def _layers(image_shape: tuple[int, int, int], width: int, depth: int) -> tuple[list[dict[str, Any]], int]:
    """Returns the convolutions as `WaveletNet` lays them out, and the number of features D."""
    size = list(image_shape[1:])
    size = [side // 2 for side in size] if _has_room(size) else size
    n_in, index = image_shape[0] * (1 + WAVELETS), 0  # index in WaveletNet.features
    layers: list[dict[str, Any]] = []
    for number in range(depth):
        n_out, pooled = (width, _has_room(size)) if number == 0 else (2 * width, False)
        conv, norm = f"features.{index}", f"features.{index + 1}"
        shapes: dict[str, tuple[int, ...]] = {f"{conv}.weight": (n_out, n_in, 3, 3)}
        shapes |= dict.fromkeys((f"{conv}.bias", f"{norm}.weight", f"{norm}.bias"), (n_out,))
        layer = {"conv": conv, "norm": norm, "channels": n_out, "size": tuple(size), "pooled": pooled}
        layers.append({**layer, "weights": shapes})
        index += 3 + (number == 0)  # the first has a layer that halves, or does nothing
        size = [side // 2 for side in size] if pooled else size
        n_in = n_out
    return layers, n_in * size[0] * size[1]


def _check_weights(weights: dict[str, Array], wanted: dict[str, tuple[int, ...]]) -> None:
    """Refuses weights that are not exactly the network's, without quoting a name from the file."""
    if set(weights) != set(wanted):
        missing = sorted(set(wanted) - set(weights))
        reason = f"lack {missing[0]}" if missing else f"hold {len(set(weights) - set(wanted))} arrays too many"
        raise ReleaseError(f"the student's weights {reason}")
    for name in sorted(wanted):
        array = weights[name]
        if array.dtype != np.float32 or array.shape != wanted[name]:
            found = f"{array.dtype} {list(array.shape)}"
            raise ReleaseError(f"the student's {name} is {found}, wanted float32 {list(wanted[name])}")
        if not np.isfinite(array).all():
            raise ReleaseError(f"the student's {name} holds a value that is not finite")
    if sum(array.size for array in weights.values()) > MAX_WEIGHTS:
        raise ReleaseError(f"the student has more than {MAX_WEIGHTS:,} weights")


def _tensor(name: str, array: Array) -> onnx.TensorProto:
    """Returns a float32 or int64 initializer, little-endian."""
    kind = {"f": onnx.TensorProto.FLOAT, "i": onnx.TensorProto.INT64}[array.dtype.kind]
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return onnx.TensorProto(name=name, data_type=kind, dims=list(array.shape), raw_data=little.tobytes())


def _node(graph: onnx.GraphProto, op: str, name: str, *inputs: str, **attributes: Any) -> str:
    """Adds a node whose one output bears its name, and returns that name. Attributes stand in the order of their names."""
    node = graph.node.add(op_type=op, name=name, input=inputs, output=[name])
    node.attribute.extend(_attributes(attributes))
    return name


def _attributes(values: dict[str, Any]) -> Iterator[onnx.AttributeProto]:
    for name in sorted(values):
        value = values[name]
        if isinstance(value, float):
            yield onnx.AttributeProto(name=name, type=onnx.AttributeProto.FLOAT, f=value)
        elif isinstance(value, int):
            yield onnx.AttributeProto(name=name, type=onnx.AttributeProto.INT, i=value)
        elif isinstance(value, str):
            yield onnx.AttributeProto(name=name, type=onnx.AttributeProto.STRING, s=value.encode())
        else:
            yield onnx.AttributeProto(name=name, type=onnx.AttributeProto.INTS, ints=value)


def _declare(value: onnx.ValueInfoProto, name: str, dims: list[Any]) -> None:
    """Fills in a float32 input or output; a dimension given by name is free."""
    value.name = name
    value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for dim in dims:
        if isinstance(dim, str):
            value.type.tensor_type.shape.dim.add(dim_param=dim)
        else:
            value.type.tensor_type.shape.dim.add(dim_value=dim)
