"""Teachers from files and functions: the same answers as the model itself, and one line for everything that is not a teacher.

N images, K classes.
"""

import importlib.util
import inspect
import json
import os
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

from dpdistill.errors import InputError
from dpdistill.models.teachers import from_callable, load_teacher
from dpdistill.models.teachers.base import EXPORT, FORBIDDEN_FIELDS
from small_models import (
    CASES,
    SHAPE,
    K,
    a_convnet,
    linear,
    made,
    node,
    raw_safetensors,
    weight,
)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(model: onnx.ModelProto | bytes, name: str = "teacher.onnx") -> Path:
        path = tmp_path / name
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return path

    return write


def images(n: int = 150, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(n)) * 2 - 1


def unit(x: Tensor) -> Tensor:
    return (x + 1) / 2


# What is read


@pytest.mark.parametrize("n", ["N", None, -1, 1, 7, 64])
def test_any_batch_size(save: Callable[..., Path], n: Any) -> None:
    teacher = load_teacher(save(made(dims=(n, *SHAPE))))
    assert (teacher.name, teacher.image_shape, teacher.n_classes) == ("teacher.onnx", SHAPE, K)
    assert len(teacher.sha256) == 64
    x = images()
    rows = teacher.outputs(x)
    assert rows.dtype == torch.float32
    assert not rows.requires_grad
    torch.testing.assert_close(rows, linear(unit(x)), atol=1e-4, rtol=0)
    assert teacher.outputs(x[:0]).shape == (0, K)
    with pytest.raises(ValueError, match="3x8x8"):
        teacher.outputs(x[:, :1])


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8])
def test_any_input_type(save: Callable[..., Path], dtype: int) -> None:
    scale = numpy_helper.from_array(np.float32(1 / 255 if dtype == TensorProto.UINT8 else 1), "scale")
    nodes = [
        node("Cast", ["x"], ["c"], to=TensorProto.FLOAT),
        node("Mul", ["c", "scale"], ["u"]),
        node("Flatten", ["u"], ["f"]),
        node("Gemm", ["f", "w", "b"], ["y"]),
    ]
    path = save(made(nodes, [weight("w", 192, K), weight("b", K), scale], dtype=dtype))
    torch.testing.assert_close(load_teacher(path).outputs(images()), linear(unit(images())), atol=2e-2, rtol=0)
    if dtype == TensorProto.UINT8:
        with pytest.raises(InputError, match="8-bit"):
            load_teacher(path, mean=(0.5,))


def test_range_layout_mean_and_std(save: Callable[..., Path]) -> None:
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        node("Flatten", ["t"], ["f"]),
        node("Gemm", ["f", "w", "b"], ["y"]),
    ]
    path = save(made(nodes, dims=("N", 8, 8, 3)))
    with pytest.raises(InputError, match="--set layout=NHWC"):
        load_teacher(path, image_shape=SHAPE)
    with pytest.raises(InputError, match=r"no colours there .*--set layout=NHWC"):  # nobody names a shape
        load_teacher(path)
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
    teacher = load_teacher(path, layout="NHWC", value_range=(0, 2), mean=mean, std=std)
    x = images()
    scaled = (unit(x) * 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(teacher.outputs(x), linear(scaled), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="3 numbers in mean or std, wanted 1"):
        from_callable(linear, image_shape=(1, 8, 8), n_classes=K, mean=mean)
    for wrong in (
        {"std": (0.0,)},
        {"mean": (float("nan"),)},
        {"value_range": (1, 0)},
        {"layout": "CHW"},
        {"outputs": "x"},
    ):
        with pytest.raises(ValueError, match="Expected"):
            load_teacher(path, **wrong)


def test_probabilities_are_recognised_or_declared(save: Callable[..., Path]) -> None:
    nodes = [node("Flatten", ["x"], ["f"]), node("Gemm", ["f", "w", "b"], ["z"]), node("Softmax", ["z"], ["y"])]
    path, x = save(made(nodes)), images()
    wanted = linear(unit(x)).log_softmax(1)
    torch.testing.assert_close(load_teacher(path).outputs(x), wanted, atol=1e-3, rtol=0)
    torch.testing.assert_close(load_teacher(path, outputs="logits").outputs(x), wanted.exp(), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="not probabilities"):
        load_teacher(save(made()), outputs="probabilities")


def test_the_one_output_that_is_logits(save: Callable[..., Path]) -> None:
    nodes = [
        node("Flatten", ["x"], ["f"]),
        node("Gemm", ["f", "w", "b"], ["y"]),
        node("ArgMax", ["y"], ["label"], axis=1, keepdims=0),
    ]
    path = save(made(nodes, outputs=("label", "y")))
    torch.testing.assert_close(load_teacher(path).outputs(images()), linear(unit(images())), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="2 outputs, 2 of them"):
        load_teacher(save(made(nodes, outputs=("f", "y"))))
    with pytest.raises(InputError, match=r"returns an output \[8\] for 8 images"):
        load_teacher(save(made(nodes, outputs=("label",))))


def test_a_convnet_and_the_process_stays_as_it_was(save: Callable[..., Path]) -> None:
    resource = pytest.importorskip("resource")
    before, state = resource.getrlimit(resource.RLIMIT_AS), torch.get_rng_state()
    teacher = load_teacher(save(a_convnet()), n_classes=K, image_shape=SHAPE)
    assert teacher.outputs(images(3)).shape == (3, K)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InputError, match="returns 4 classes, wanted 10"):
        load_teacher(save(a_convnet()), n_classes=10)
    with pytest.raises(InputError, match="takes images 3x8x8, wanted 1x28x28"):
        load_teacher(save(a_convnet()), image_shape=(1, 28, 28))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


CODE = """
import torch
from torch import nn
def small():
    torch.rand(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
def broken():
    raise RuntimeError("secret")
def number():
    return 3
other = 5
"""


@pytest.fixture
def weights_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module, str]:
    module = f"teacher_code_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{module}.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch_state = torch.get_rng_state()
    network = __import__(module).small().eval()
    torch.set_rng_state(torch_state)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors", network, module


def test_safetensors_with_its_network(weights_file: tuple[Path, nn.Module, str]) -> None:
    path, network, module = weights_file
    state = torch.get_rng_state()
    teacher = load_teacher(path, architecture=f"{module}:small", image_shape=SHAPE, n_classes=K)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        torch.testing.assert_close(teacher.outputs(images()), network(unit(images())), atol=1e-5, rtol=0)
    for wrong, message in {
        "small": "not an architecture",
        f"{module}:small()": "not an architecture",
        "no_such_module:net": "not found: no_such_module",
        f"{module}:nothing": "names nothing",
        f"{module}:other": "names nothing",
        f"{module}:broken": r"fails when it is called without arguments \(RuntimeError\)",
        f"{module}:number": "returns a int",
        "torch.nn:Identity": "not of the network torch.nn:Identity: 0 tensors missing",
    }.items():
        with pytest.raises(InputError, match=message):
            load_teacher(path, architecture=wrong, image_shape=SHAPE)
    with pytest.raises(InputError, match="without their network"):
        load_teacher(path, image_shape=SHAPE)
    with pytest.raises(InputError, match="give --shape"):
        load_teacher(path, architecture=f"{module}:small")
    with pytest.raises(InputError, match="fails on images 1x28x28"):
        load_teacher(path, architecture=f"{module}:small", image_shape=(1, 28, 28))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"abc", "damaged"),
        (struct.pack("<Q", 2**60) + b"{}", "header that is too long"),
        (raw_safetensors("{"), "damaged"),
        (raw_safetensors("[" * 100_000), "damaged"),
        (raw_safetensors("{}"), "8 tensors|9 tensors"),
        (raw_safetensors('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"1234"), "two tensors"),
        (raw_safetensors('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0\0\xc0\x7f"), "not finite"),
        (raw_safetensors('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', b"1234"), "damaged"),
        (raw_safetensors(json.dumps({str(i): {} for i in range(20_001)})), "more than 20,000"),
    ],
)
def test_hostile_safetensors(
    weights_file: tuple[Path, nn.Module, str], save: Callable[..., Path], raw: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_teacher(save(raw, "x.safetensors"), architecture=f"{weights_file[2]}:small", image_shape=SHAPE)


def test_safetensors_of_another_shape_or_kind(weights_file: tuple[Path, nn.Module, str]) -> None:
    path, network, module = weights_file
    for change, message in ((torch.zeros(5), r"float32 \[5\], wanted float32 \[4\]"), (torch.zeros(4).long(), "int64")):
        save_file(network.state_dict() | {"4.bias": change}, path)
        with pytest.raises(InputError, match=message):
            load_teacher(path, architecture=f"{module}:small", image_shape=SHAPE)


# What is no teacher


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".PKL", ".ckpt", ".bin", ".h5", ".keras", ".joblib", ".exe", ""])
def test_other_files_say_how_to_export(save: Callable[..., Path], suffix: str) -> None:
    with pytest.raises(InputError, match=r"torch\.onnx\.export"):
        load_teacher(save(b"\x80\x04.", f"model{suffix}"))


def test_the_way_out_leads_to_a_file_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said about a .pt file, and about weights beside an ONNX file, is run as it stands."""
    (call,) = re.findall(r"torch\.onnx\.export\(.*?'model\.onnx'.*?\)", EXPORT)
    (argument,) = re.findall(r"\w+=\w+", FORBIDDEN_FIELDS["TensorProto", "external_data"][1])
    assert argument in call
    monkeypatch.chdir(tmp_path)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(192, K)), images(1)
    if importlib.util.find_spec("onnxscript") is None:  # the exporter needs it: then at least its arguments are real
        export: Any = inspect.signature(torch.onnx.export).bind
        eval(call, {"torch": SimpleNamespace(onnx=SimpleNamespace(export=export)), "model": model, "x": x})
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eval(call, {"torch": torch, "model": model, "x": x})
    assert os.listdir(tmp_path) == ["model.onnx"]
    taken = load_teacher("model.onnx", image_shape=SHAPE, n_classes=K)
    torch.testing.assert_close(taken.outputs(images()), model(unit(images())).detach(), atol=1e-4, rtol=0)


def test_folders_missing_files_and_devices(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"x")
    for path, message in {
        tmp_path: "SavedModel",
        tmp_path / "no.onnx": "does not exist",
        tmp_path / "a\nb.onnx": "invisible",
    }.items():
        with pytest.raises(InputError, match=message):
            load_teacher(path)
    (tmp_path / "device.onnx").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        load_teacher(tmp_path / "device.onnx")
    with open(tmp_path / "large.onnx", "wb") as file:
        file.truncate(2**29 + 1)
    with pytest.raises(InputError, match="too large"):
        load_teacher(tmp_path / "large.onnx")


def test_mixed_in_training_or_random_files(save: Callable[..., Path]) -> None:
    head = [node("Flatten", ["m"], ["f"]), node("Gemm", ["f", "w", "b"], ["y"])]
    mixing = [node("ReduceMean", ["x"], ["mean"], axes=[0]), node("Sub", ["x", "mean"], ["m"]), *head]
    with pytest.raises(InputError, match="otherwise when other images"):
        load_teacher(save(made(mixing)))
    with pytest.raises(InputError, match="otherwise when other images"):
        load_teacher(save(made(mixing, dims=(8, *SHAPE))))
    trained = a_convnet()
    trained.graph.node[1].attribute.append(helper.make_attribute("training_mode", 1))
    with pytest.raises(InputError, match="training mode"):
        load_teacher(save(trained))
    true = numpy_helper.from_array(np.array(True), "true")
    half = numpy_helper.from_array(np.float32(0.5), "half")
    dropout = [node("Dropout", ["x", "half", "true"], ["m"]), *head]
    with pytest.raises(InputError, match="two answers"):
        load_teacher(save(made(dropout, [weight("w", 192, K), weight("b", K), true, half])))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda u: linear(u) * float("nan"), "not finite"),
        (lambda u: linear(u) / 0, "not finite"),
        (lambda u: linear(u) * 0 + 1, "same answer"),
        (lambda u: linear(u)[0], r"returns \[4\] for 8 images"),
        (lambda u: linear(u)[:1], r"returns \[1, 4\] for 8 images"),
        (lambda u: linear(u)[:, :1], "returns 1 classes, wanted 4"),
        (lambda u: linear(u)[:, :0], "returns 0 classes"),
        (lambda u: linear(u).argmax(1), "returns int64"),
        (lambda u: linear(u) + torch.rand(()), "two answers"),
        (lambda u: linear(u - u.mean(0)), "otherwise when other images"),
        (lambda u: linear(u).roll(1, 0), "otherwise when other images"),
        (lambda u: u.no_such_thing, r"fails on images 3x8x8 \(AttributeError\)"),
        (lambda _: "logits", "fails on images"),
        (lambda _: None, "fails on images"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, K)), "training mode"),
    ],
)
def test_functions_that_are_no_teachers(fn: Any, message: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # else two random answers are now and then as good as one
        with pytest.raises(InputError, match=message):
            from_callable(fn, image_shape=SHAPE, n_classes=K)


def test_functions() -> None:
    for fn in (linear, lambda u: linear(u).numpy(), lambda u: linear(u).double().numpy().tolist()):
        teacher = from_callable(fn, image_shape=SHAPE, n_classes=K)
        torch.testing.assert_close(teacher.outputs(images()), linear(unit(images())))
        assert (teacher.name, teacher.sha256) == ("callable", "")
    answers = iter(range(100))
    late = from_callable(lambda u: linear(u) if next(answers) < 5 else linear(u) / 0, image_shape=SHAPE, n_classes=K)
    with pytest.raises(InputError, match="not finite"):  # also after the probe
        [late.outputs(images(2)) for _ in range(5)]

    def fails_at_times(u: Tensor) -> Tensor:
        return torch.where((u.flatten(1)[:, :1] - 0.7).abs() < 1e-5, float("nan"), linear(u))

    rare, some = from_callable(fails_at_times, image_shape=SHAPE, n_classes=K), images(4)
    some[1, 0, 0, 0] = 0.4  # which is fed as 0.7
    said = rare.outputs(some)  # an image on which it fails says nothing; the others are as they were
    assert said[1].tolist() == [0.0] * K
    torch.testing.assert_close(said[[0, 2, 3]], linear(unit(some[[0, 2, 3]])))
    for shape in ((2, 8, 8), (3, 8), (3, 224, 224)):
        with pytest.raises(InputError, match="wanted 1 or 3 channels of 8 to 64"):
            from_callable(linear, image_shape=shape, n_classes=K)  # type: ignore[arg-type]


# Hostile ONNX


@pytest.mark.parametrize("case", CASES)
def test_hostile_onnx(save: Callable[..., Path], case: str, capfd: pytest.CaptureFixture[str]) -> None:
    raw, message = CASES[case]
    with pytest.raises(InputError, match=message) as caught:
        load_teacher(save(raw))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
