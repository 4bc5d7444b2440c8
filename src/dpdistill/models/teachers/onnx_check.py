"""An ONNX file taken apart before a runtime sees it: how much it holds, which operations it uses, how much work it is."""

from __future__ import annotations

import math
import re

import numpy as np

from dpdistill.data.files import no_warnings, one_error_type
from dpdistill.errors import InputError

with no_warnings():
    import onnx
    import onnx.shape_inference
from dpdistill.models.teachers.base import (
    _T,
    BATCH,
    DTYPES,
    EXPORT,
    FORBIDDEN_FIELDS,
    MAX_DEPTH,
    MAX_ELEMENTS,
    MAX_FIELDS,
    MAX_NODES,
    MAX_PACKED,
    MAX_TENSORS,
    MAX_WINDOW,
    MAX_WORK,
    OPERATIONS,
    TYPED_FIELD,
)


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
