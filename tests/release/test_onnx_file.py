"""The student's ONNX file: the same numbers as torch, the same bytes every time, nothing but the network's own weights."""

import hashlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dpdistill.bundle.onnx_file import student_onnx
from dpdistill.errors import ReleaseError
from dpdistill.models.wavelet_net import WaveletNet

SHAPES = [(1, 28, 28), (1, 8, 8), (3, 32, 32), (1, 11, 11), (1, 12, 27), (3, 26, 23), (3, 9, 20), (1, 7, 30)]


def student(shape: tuple[int, int, int] = (1, 8, 8), groups: int = 4, **changes: Any) -> tuple[Any, ...]:
    """A student with no weight left at 0 or 1, its arrays and its config."""
    config = {"image_shape": list(shape), "n_classes": 5, "width": 8, "depth": 3, "groups": groups} | changes
    k, width, depth = config["n_classes"], config["width"], config["depth"]
    generator = torch.Generator().manual_seed(3)
    model = WaveletNet(shape, k, width=width, depth=depth, groups=groups, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, {name: value.numpy() for name, value in model.state_dict().items()}, config


def run(raw: bytes, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images})
    return logits


@pytest.mark.parametrize("groups", [8, 4, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape: tuple[int, int, int], groups: int) -> None:
    model, weights, config = student(shape, groups)
    raw = student_onnx(weights, config)
    onnx.checker.check_model(onnx.load_from_string(raw), full_check=True)
    for n in (1, 7):
        x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(n)) * 2 - 1
        with torch.no_grad():
            wanted = model(x).numpy()
        logits = run(raw, x.numpy())
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
        assert np.abs(wanted).max() > 0.1


@pytest.mark.parametrize("depth", [1, 5])
def test_any_depth(depth: int) -> None:
    model, weights, config = student((1, 12, 12), 2, depth=depth)
    x = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        np.testing.assert_allclose(run(student_onnx(weights, config), x.numpy()), model(x).numpy(), atol=1e-4)


def test_holds_the_weights_and_says_what_it_takes() -> None:
    _, weights, config = student((3, 32, 32), 4)
    raw = student_onnx(weights, config | {"class_names": ["cat", "dog", "eel", "fox", "gnu"]})
    model = onnx.load_from_string(raw)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, array in weights.items():
        if name in held:
            np.testing.assert_array_equal(held[name], array)
    assert sum(array.size for array in held.values() if array.dtype == np.float32) == (
        sum(array.size for array in weights.values()) + 2 * 4 + 3
    )
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["input_range"] == "-1 to 1"
    assert metadata["class_names"] == '["cat", "dog", "eel", "fox", "gnu"]'
    assert (model.producer_name, model.producer_version, model.doc_string) == ("dpdistill", "", "")
    (taken,), (given,) = model.graph.input, model.graph.output
    assert [dim.dim_param or dim.dim_value for dim in taken.type.tensor_type.shape.dim] == ["N", 3, 32, 32]
    assert [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim] == ["N", 5]


SCRIPT = """
import hashlib, sys
import numpy as np
from dpdistill.bundle.onnx_file import student_onnx
assert "torch" not in sys.modules
shapes = {"real": (16, 1, 11, 11), "imaginary": (16, 1, 11, 11),
          "features.0.weight": (4, 17, 3, 3), "features.0.bias": (4,), "features.1.weight": (4,), "features.1.bias": (4,),
          "head.weight": (2, 256), "head.bias": (2,)}
weights = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 64 for name, shape in shapes.items()}
if sys.argv[1] == "reversed":
    weights = dict(reversed(weights.items()))
config = {"image_shape": [1, 8, 8], "n_classes": 2, "width": 4, "depth": 1, "groups": 2, "class_names": ["a", "b"]}
print(hashlib.sha256(student_onnx(weights, config)).hexdigest())
"""


def test_same_bytes_in_every_process_without_torch() -> None:
    found = set()
    for seed, order in (("0", "straight"), ("4242", "reversed")):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", SCRIPT, order],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert found == {"3589136410c618709a8ed0107d37764f88e7374ebf8338947d3483c0a70a9736"}


def test_same_bytes_again_other_bytes_for_another_weight() -> None:
    _, weights, config = student()
    raw = student_onnx(weights, config)
    strided = {name: np.asfortranarray(array) for name, array in weights.items()}
    assert student_onnx(strided, config | {"image_shape": (1, 8, 8)}) == raw
    changed = weights | {"head.bias": weights["head.bias"] + np.float32(1e-3)}
    assert hashlib.sha256(student_onnx(changed, config)).digest() != hashlib.sha256(raw).digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head.bias": np.zeros(4, np.float32)}, r"head.bias is float32 \[4\], wanted float32 \[5\]"),
        ({"head.bias": np.zeros(5)}, "is float64"),
        ({"head.bias": np.array([0, 0, 0, 0, np.nan], np.float32)}, "not finite"),
        ({"extra": np.zeros(1, np.float32)}, "1 arrays too many"),
        ({"head.bias": None}, "lack head.bias"),
    ],
)
def test_other_weights_are_refused(changes: dict[str, Any], message: str) -> None:
    _, weights, config = student()
    weights = {name: array for name, array in (weights | changes).items() if array is not None}
    with pytest.raises(ReleaseError, match=message):
        student_onnx(weights, config)


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 0},
        {"width": True},
        {"width": 10**9},
        {"depth": 10**9},
        {"depth": 2.0},
        {"groups": 3},
        {"groups": 0},
        {"groups": None},
        {"n_classes": -1},
        {"image_shape": [2, 8, 8]},
        {"image_shape": [1, 8]},
        {"image_shape": "188"},
        {"image_shape": [1, 5, 8]},
        {"image_shape": [1, 8, 2**40]},
        {"unknown": 1},
        {"class_names": ["a"]},
        {"class_names": ["a"] * 5},
        {"class_names": ["a", "b", "c", "d", 5]},
        {"class_names": ["a", "b", "c", "d", "e\n"]},
    ],
)
def test_other_settings_are_refused(changes: dict[str, Any]) -> None:
    _, weights, config = student()
    with pytest.raises(ReleaseError, match=r"settings|image_shape|whole number|groups|class_names"):
        student_onnx(weights, config | changes)
