"""Small classifiers in ONNX, hostile ones, and mutants: nobody's training is needed for them.

N images, K classes.
"""

import random
import struct
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

SHAPE, K = (3, 8, 8), 4
node = helper.make_node


def weight(name: str, *shape: int, seed: int = 0) -> TensorProto:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.3
    return numpy_helper.from_array(values, name)


def whole(name: str, values: Any) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def made(
    nodes: list[Any] | None = None,
    weights: list[Any] | None = None,
    *,
    dims: Any = ("N", *SHAPE),
    dtype: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    **model: Any,
) -> onnx.ModelProto:
    """A linear classifier of 3x8x8 images, or what the arguments make of it."""
    nodes = nodes or [node("Flatten", ["x"], ["f"]), node("Gemm", ["f", "w", "b"], ["y"])]
    weights = [weight("w", 192, K), weight("b", K)] if weights is None else weights
    kinds = {"label": TensorProto.INT64, "number": TensorProto.INT32}
    given = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in outputs]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", dtype, dims)], given, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **model)


def linear(u: Tensor) -> Tensor:
    """What `made()` computes."""
    w, b = (torch.from_numpy(numpy_helper.to_array(t).copy()) for t in (weight("w", 192, K), weight("b", K)))
    return u.flatten(1) @ w + b


def a_convnet(opset: int = 17) -> onnx.ModelProto:
    """Convolution, batch norm, pooling, and a Reshape whose shape is computed: what exporters write."""
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"], pads=[1] * 4, kernel_shape=[3, 3]),
        node("BatchNormalization", ["a", "b", "b", "b", "ones"], ["c"]),
        node("Relu", ["c"], ["d"]),
        node("MaxPool", ["d"], ["e"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Shape", ["e"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "axes"], ["n1"]),
        node("Concat", ["n1", "rest"], ["to"], axis=0),
        node("Reshape", ["e", "to"], ["r"]),
        node("Gemm", ["r", "fw", "fb"], ["y"]),
    ]
    ones = numpy_helper.from_array(np.ones(6, np.float32), "ones")
    small = [whole("zero", 0), whole("axes", [0]), whole("rest", [-1])]
    return made(nodes, [weight("w", 6, 3, 3, 3), weight("b", 6), ones, weight("fw", 96, K), weight("fb", K), *small])


def a_normed() -> onnx.ModelProto:
    """Layer norm with an absent last input, which crashed onnxruntime 1.31 before absent inputs were cut off; and tiles and slices."""
    return made(
        [
            node("GlobalAveragePool", ["x"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("LayerNormalization", ["f", "s", ""], ["n"], axis=-1),
            node("Tile", ["n", "t"], ["k"]),
            node("Slice", ["k", "st", "en", "ax"], ["y"]),
        ],
        [weight("s", 3), whole("t", [1, 2]), whole("st", [1]), whole("en", [5]), whole("ax", [1])],
    )


def raw_safetensors(header: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


# --- hostile ONNX


def changed(model: onnx.ModelProto, **fields: Any) -> onnx.ModelProto:
    """A copy whose first weight has other fields."""
    tensor = model.graph.initializer[0]
    for name, value in fields.items():
        if name == "dims":
            tensor.ClearField("dims")
            tensor.dims.extend(value)
        elif name == "external_data":
            tensor.external_data.add(key="location", value="/etc/passwd")
            tensor.data_location = TensorProto.EXTERNAL
        else:
            setattr(tensor, name, value)
    return model


def followed_by(*nodes: Any, weights: tuple[Any, ...] = (), **settings: Any) -> onnx.ModelProto:
    """The classifier with nodes from its output z to y."""
    first = [node("Flatten", ["x"], ["f"]), node("Gemm", ["f", "w", "b"], ["z"])]
    return made([*first, *nodes], [weight("w", 192, K), weight("b", K), *weights], **settings)


def cases() -> dict[str, tuple[onnx.ModelProto | bytes, str]]:
    body = helper.make_graph([], "b", [], [])
    function = helper.make_function("f", "F", ["a"], ["b"], [node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 17)])
    twice = made()
    twice.graph.node[1].output[0] = "f"
    two_inputs = made()
    two_inputs.graph.input.append(helper.make_tensor_value_info("x2", TensorProto.FLOAT, [1]))
    huge = whole("to", [2**15, 2**15, 1, K])
    sized = [
        node("ReduceSum", ["z"], ["s0"], keepdims=0),
        node("Mul", ["s0", "none"], ["s1"]),
        node("Add", ["s1", "much"], ["s2"]),
        node("Cast", ["s2"], ["s3"], to=TensorProto.INT64),
        node("Unsqueeze", ["s3", "axes"], ["s4"]),
        node("ConstantOfShape", ["s4"], ["big"]),
        node("ReduceSum", ["big"], ["s5"], keepdims=0),
        node("Add", ["z", "s5"], ["y"]),
    ]
    numbers = (numpy_helper.from_array(np.float32(0), "none"), numpy_helper.from_array(np.float32(2e10), "much"))
    deep = b""
    for _ in range(40):  # graph, node, attribute, graph, ...: refused at the first graph inside
        deep = b"\x3a" + bytes([len(deep)]) + deep
    deep = b"\x3a" + bytes([len(deep)]) + deep
    square = [node("Concat", ["s4", "s4"], ["s5"], axis=0), node("ConstantOfShape", ["s5"], ["big"])]
    square = [
        *sized[:5],
        *square,
        node("MatMul", ["big", "big"], ["s6"]),
        node("ReduceSum", ["s6"], ["s7"], keepdims=0),
    ]
    side = (numbers[0], numpy_helper.from_array(np.float32(9000), "much"), whole("axes", [0]))
    return {
        "works by what it computes": (
            followed_by(*square, node("Add", ["z", "s7"], ["y"]), weights=side),
            "not known before",
        ),
        "pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "damaged"),
        "zip": (b"PK\x03\x04" + bytes(100), "damaged"),
        "cut": (made().SerializeToString()[:-100], "damaged"),
        "two-byte nodes": (b"\x3a\xc0\x84\x3d" + b"\x0a\x00" * 500_000, "more than 300,000 parts"),
        "endless varint": (b"\x08" + b"\xff" * 100, "damaged"),
        "deep": (deep, "version|nodes|damaged"),
        "no opset": (onnx.ModelProto(ir_version=8, graph=made().graph).SerializeToString(), "version"),
        "opset of the future": (made(opset=9999), "onnxruntime|damaged"),
        "external data": (changed(made(), external_data=True), "other files"),
        "declares more": (changed(made(), dims=[2**20, 100]), "not of its declared shape"),
        "declares far more": (changed(made(), dims=[2**31, 2**31]), "more than 134,217,728"),
        "declares less than none": (changed(made(), dims=[-1, 4]), "more than|declared shape"),
        "text": (changed(made(), data_type=TensorProto.STRING), "neither numbers"),
        "unknown type": (changed(made(), data_type=12345), "neither numbers|damaged"),
        "custom operation": (followed_by(node("Run", ["z"], ["y"], domain="evil")), "outside the ONNX standard"),
        "microsoft": (followed_by(node("Gelu", ["z"], ["y"], domain="com.microsoft")), "outside the ONNX standard"),
        "random": (followed_by(node("RandomNormalLike", ["z"], ["y"])), r"not run here \(RandomNormalLike\)"),
        "odd name": (followed_by(node("A\nB", ["z"], ["y"])), r"not run here \(of no plain name\)"),
        "loop": (followed_by(node("Loop", ["", "", "z"], ["y"], body=body)), "loops or branches"),
        "function": (made(functions=[function]), "functions of its own"),
        "cycle": (followed_by(node("Add", ["z", "q"], ["y"]), node("Relu", ["y"], ["q"])), "before it is computed"),
        "twice": (twice, "computes a value twice"),
        "two inputs": (two_inputs, "takes 2 inputs"),
        "vector": (made(dims=("N", 192)), "2 dimensions"),
        "text images": (made(dtype=TensorProto.INT64), "not float32"),
        "open size": (made(dims=("N", 3, "H", "W")), "3x\\?x\\? of open size"),
        "huge batch": (made(dims=(10**9, *SHAPE)), "batches of 1000000000"),
        "huge image": (made(dims=("N", 3, 4096, 4096)), "8 to 64 pixels"),
        "huge window": (
            made([node("AveragePool", ["x"], ["y"], kernel_shape=[2**40, 2**40])]),
            "window, group or padding outside 1..4096",
        ),
        "much work": (
            made(
                [
                    node("AveragePool", ["x"], ["p"], kernel_shape=[2048, 2048], pads=[2047] * 4),
                    node("GlobalAveragePool", ["p"], ["q"]),
                    node("Flatten", ["q"], ["y"]),
                ]
            ),
            "too many elements|too much work",
        ),
        "expands": (
            followed_by(
                node("Expand", ["z", "to"], ["e"]),
                node("ReduceSum", ["e", "axes"], ["y"], keepdims=0),
                weights=(huge, whole("axes", [0, 1])),
            ),
            "too many elements",
        ),
        "expands by what it computes": (followed_by(*sized, weights=(*numbers, whole("axes", [0]))), "fails on images"),
        "no rows": (
            followed_by(node("Slice", ["z", "st", "st"], ["y"]), weights=(whole("st", [0]),)),
            r"returns an output \[0, 4\]",
        ),
        "not finite": (followed_by(node("Log", ["z"], ["y"])), "not finite"),
        "constant": (followed_by(node("Sub", ["z", "z"], ["y"])), "same answer"),
        "image out": (made([node("Relu", ["x"], ["y"])]), r"returns an output \[8, 3, 8, 8\]"),
        "integers out": (
            followed_by(node("Cast", ["z"], ["number"], to=TensorProto.INT32), outputs=("number",)),
            "returns int32",
        ),
        "lies about its output": (
            followed_by(node("Cast", ["z"], ["y"], to=TensorProto.INT32)),
            "cannot be run|can run",
        ),
    }


CASES = cases()


EDGES = (0, -1, 1, 2, 3, 7, 4096, 2**31 - 1, -(2**31), 2**62, 2**63 - 1)


def mutant(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """A copy with one to three changes, half of them in the bytes, half in the graph."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for _ in range(rng.randint(1, 3)):
        changed_node, tensor = rng.choice(model.graph.node), rng.choice(model.graph.initializer)
        names = ["", "x", tensor.name, *(name for other in model.graph.node for name in other.output)]
        match rng.randrange(8):
            case 0:
                changed_node.op_type = rng.choice(
                    ("Conv", "Add", "Expand", "Softmax", "LayerNormalization", "Tile", "Slice")
                )
            case 1 if changed_node.input:
                changed_node.input[rng.randrange(len(changed_node.input))] = rng.choice(names)
            case 2:
                changed_node.input.append(rng.choice(names))
            case 3 if changed_node.input:
                changed_node.input.pop()
            case 4 if changed_node.attribute and changed_node.attribute[0].ints:
                changed_node.attribute[0].ints[0] = rng.choice(EDGES)
            case 5 if tensor.dims:
                tensor.dims[0] = rng.choice(EDGES[:6])
            case 6 if tensor.data_type == TensorProto.INT64:
                tensor.raw_data = struct.pack("<q", rng.choice(EDGES)) + tensor.raw_data[8:]
            case 7:
                model.opset_import[0].version = rng.randint(1, 24)
    raw = bytearray(model.SerializeToString())
    if rng.random() < 0.4:
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw))
            match rng.randrange(3):
                case 0:
                    raw[at] ^= 1 << rng.randrange(8)
                case 1:
                    raw[at : at + 4] = b"\xff\xff\xff\x7f"
                case 2:
                    del raw[at : at + rng.randint(1, 8)]
    return bytes(raw)
