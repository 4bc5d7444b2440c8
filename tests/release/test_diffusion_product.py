"""The pipeline folder: written and rebuilt byte for byte without torch, opened by diffusers alone, and nothing else is taken for it."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpdistill.bundle import tensors
from dpdistill.bundle.diffusion_product import DiffusionProduct, shapes
from dpdistill.errors import ReleaseError
from dpdistill.models import unet

pytest.importorskip("diffusers")

NAMES = ("cat", "dog", "eel")
WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"


def student(shape: tuple[int, int, int] = (1, 8, 8), width: int = 8) -> Any:
    g = torch.Generator().manual_seed(0)
    made = unet.student_unet(shape, len(NAMES), width=width, generator=g).eval()
    with torch.no_grad():
        made.conv_out.weight.copy_(torch.randn(made.conv_out.weight.shape, generator=g) * 0.1)
    return made


@pytest.fixture(scope="module")
def product() -> DiffusionProduct:
    return DiffusionProduct.of(unet.pipeline(student()), NAMES)


@pytest.mark.parametrize(("shape", "width"), [((1, 8, 8), 8), ((3, 20, 20), 8), ((1, 28, 28), 16), ((3, 64, 64), 24)])
def test_the_shape_table_is_diffusers(shape: tuple[int, int, int], width: int) -> None:
    made = student(shape, width)
    found = DiffusionProduct.of(unet.pipeline(made), NAMES)
    assert shapes(found.config, 3) == {name: tuple(value.shape) for name, value in made.state_dict().items()}
    said = json.loads(json.dumps({name: value for name, value in made.config.items() if name[0] != "_"}))
    assert {name: value for name, value in found.unet_config.items() if name[0] != "_"} == said


def test_files_and_unpack_are_inverse(product: DiffusionProduct) -> None:
    files = product.files()
    assert set(files) == set(DiffusionProduct.SIZES)
    back = DiffusionProduct.unpack(files, NAMES)
    assert back.files() == files
    assert back.config == product.config


def test_unpacking_needs_no_torch(product: DiffusionProduct, tmp_path: Path) -> None:
    for i, raw in enumerate(product.files().values()):
        (tmp_path / str(i)).write_bytes(raw)
    code = f"""
import sys
from pathlib import Path
from dpdistill.bundle.diffusion_product import DiffusionProduct
names = {list(product.files())!r}
DiffusionProduct.unpack({{name: Path({str(tmp_path)!r}, str(i)).read_bytes() for i, name in enumerate(names)}}, {NAMES!r})
sys.exit(any(name in sys.modules for name in ("torch", "diffusers")))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_diffusers_alone_opens_it_and_draws_the_same(
    product: DiffusionProduct, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    for name, raw in product.files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    theirs.set_progress_bar_config(disable=True)
    labels = torch.tensor([0, 1, 2, 2])
    for steps in (1, 3):
        ours = unet.draw(unet.pipeline(student()), labels, steps, torch.Generator().manual_seed(5))
        generator = torch.Generator().manual_seed(5)
        found = theirs(4, class_labels=labels, num_inference_steps=steps, generator=generator, output_type="np").images
        assert np.allclose(found.transpose(0, 3, 1, 2), (ours.numpy() + 1) / 2, atol=1e-6)
    assert theirs(2, class_labels=[0, 1]).images[0].size == (8, 8)


def broken(product: DiffusionProduct, **changes: Any) -> dict[str, bytes]:
    """The files, with these arrays added or changed, and those that are None left out."""
    arrays = {**product.unet, **changes}
    kept = {name: array for name, array in arrays.items() if array is not None}
    return {**product.files(), WEIGHTS: tensors.pack(kept, {"format": "pt"})}


def test_other_weights_are_refused(product: DiffusionProduct) -> None:
    bias, head = product.unet["conv_in.bias"], product.unet["conv_out.weight"]
    for files in (
        broken(product, more=np.zeros(1, np.float32)),
        broken(product, **{"conv_in.bias": None}),
        broken(product, **{"conv_in.bias": bias[:-1]}),
        broken(product, **{"conv_in.bias": np.zeros(bias.shape, np.int64)}),
        broken(product, **{"conv_in.bias": np.full(bias.shape, np.nan, np.float32)}),
        broken(product, **{"conv_out.weight": head.reshape(-1)}),
    ):
        with pytest.raises(ReleaseError):
            DiffusionProduct.unpack(files, NAMES)
    with pytest.raises(ReleaseError):
        DiffusionProduct.unpack(product.files(), NAMES[:2])


def test_every_flipped_byte_of_the_settings_is_refused(product: DiffusionProduct) -> None:
    """Of the weights, only the header: other numbers are another model, and the release's hashes speak of those."""
    files = product.files()
    header = 8 + int.from_bytes(files[WEIGHTS][:8], "little")
    for name, raw in files.items():
        places = range(0, header, 61) if name == WEIGHTS else range(len(raw))
        for place in places:
            flipped = bytearray(raw)
            flipped[place] ^= 1
            with pytest.raises(ReleaseError):
                DiffusionProduct.unpack({**files, name: bytes(flipped)}, NAMES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("side", 9),
        ("side", True),
        ("side", "8"),
        ("widths", []),
        ("widths", [16, 10**9]),
        ("widths", [16, 20]),
        ("channels", 2),
        ("groups", 3),
        ("head", 5),
        ("head", None),
    ],
)
def test_settings_of_no_student_are_refused(product: DiffusionProduct, field: str, value: Any) -> None:
    with pytest.raises(ReleaseError):
        shapes({**product.config, field: value}, 3)


def test_another_kind_of_pipeline_is_refused() -> None:
    from diffusers import ConsistencyModelPipeline, UNet2DModel

    good = unet.pipeline(student())
    settings = {name: value for name, value in good.unet.config.items() if name[0] != "_"}
    other = ConsistencyModelPipeline(UNet2DModel(**{**settings, "act_fn": "relu"}), good.scheduler)
    with pytest.raises(ReleaseError, match="another kind"):
        DiffusionProduct.of(other, NAMES)
