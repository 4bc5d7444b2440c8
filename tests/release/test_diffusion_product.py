"""The pipeline folder: written and rebuilt byte for byte without torch, opened by diffusers alone, and nothing else is taken for it."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_release
from dpdistill import sampling
from dpdistill.bundle import tensors
from dpdistill.bundle.diffusion_product import DiffusionProduct, shapes
from dpdistill.errors import ReleaseError
from dpdistill.models import few_step

pytest.importorskip("diffusers")

NAMES = ("cat", "dog", "eel, or snake")
WEIGHTS = "pipeline/transformer/diffusion_pytorch_model.safetensors"
VAE = "pipeline/vae/diffusion_pytorch_model.safetensors"


def student(shape: tuple[int, int, int] = (1, 8, 8), width: int = 8) -> Any:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(20, *shape, generator=g) * 2 - 1
    made = few_step.student(shape, len(NAMES), width=width, images=images, generator=g).eval()
    with torch.no_grad():
        for weight in (made.proj_out_2.weight, *(block.norm1.linear.weight for block in made.transformer_blocks)):
            weight.normal_(generator=g)
    return made


@pytest.fixture(scope="module")
def product() -> DiffusionProduct:
    return DiffusionProduct.of(few_step.pipeline(student()), NAMES)


def plain(config: Any) -> Any:
    """Settings as JSON has them, without notes of diffusers' own and what it finds from another setting, yet warns of in a file."""
    own = {name: value for name, value in config.items() if name[0] != "_" and name != "block_out_channels"}
    return json.loads(json.dumps(own))


@pytest.mark.parametrize(("shape", "width"), [((1, 8, 8), 8), ((3, 20, 20), 4), ((1, 28, 28), 16), ((3, 32, 32), 24)])
def test_the_files_are_diffusers(shape: tuple[int, int, int], width: int) -> None:
    """Names, shapes and every setting: a new version of diffusers that adds one is seen here."""
    pipe = few_step.pipeline(student(shape, width))
    found = DiffusionProduct.of(pipe, NAMES)
    arrays = {name: tuple(value.shape) for name, value in pipe.transformer.state_dict().items()}
    assert shapes(found.config, 3) == arrays
    files = found.files()
    for part, name in (("transformer", "config"), ("vae", "config"), ("scheduler", "scheduler_config")):
        said = json.loads(files[f"pipeline/{part}/{name}.json"])
        assert plain(said) == plain(getattr(pipe, part).config)
        assert said["_class_name"] == type(getattr(pipe, part)).__name__
    decoder, wanted = tensors.unpack(files[VAE])[0], few_step.decoder(shape[0]).state_dict()
    assert set(decoder) == set(wanted)
    assert all(np.array_equal(decoder[name], value.numpy()) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("a, b", "c"), {"0": "a; b", "1": "c"}),
        (("a,b", "a;b", "c"), {"0": "a;b (0)", "1": "a;b (1)", "2": "c"}),
        (("a,", "a,b", "a;b", "a;b (1)"), {"0": "a;", "1": "a;b (1)", "2": "a;b (2)", "3": "a;b (1)"}),
    ],
)
def test_names_stand_for_their_numbers(names: tuple[str, ...], labels: dict[str, str]) -> None:
    made = few_step.student(
        (1, 8, 8), len(names), width=4, images=torch.zeros(1, 1, 8, 8), generator=torch.Generator().manual_seed(0)
    )
    files = DiffusionProduct.of(few_step.pipeline(made), names).files()
    assert json.loads(files["pipeline/model_index.json"])["id2label"] == labels
    assert DiffusionProduct.unpack(files, names).files() == files


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


def test_images_fit_the_square_that_is_just_large_enough(product: DiffusionProduct) -> None:
    assert all(product.fits(shape) for shape in ((1, 8, 8), (1, 5, 8), (1, 6, 5)))
    assert not any(product.fits(shape) for shape in ((3, 8, 8), (1, 9, 8), (1, 4, 4)))
    for shape in ((1, 8, 9), (3, 30, 30), (1, 61, 8)):
        made = few_step.student(
            shape, 3, width=4, images=torch.zeros(2, *few_step.canvas(shape)), generator=torch.Generator()
        )
        assert DiffusionProduct.of(few_step.pipeline(made), NAMES).fits(shape)


@pytest.mark.parametrize(("shape", "refused"), [((1, 8, 8), False), ((1, 12, 12), True), ((3, 8, 8), True)])
def test_a_model_of_other_images_than_the_certificate_says_is_refused(
    shape: tuple[int, int, int], refused: bool, tmp_path: Path
) -> None:
    made = small_release.synthetic()
    known = replace(small_release.facts(tmp_path, made), class_names=("a", "b"))
    pipe = few_step.pipeline(
        few_step.student(shape, 2, width=4, images=torch.zeros(2, *shape), generator=torch.Generator())
    )
    with pytest.raises(ReleaseError, match="its model is of images of another shape") if refused else nullcontext():
        small_release.write_bundle(tmp_path / "out", made, known, product=DiffusionProduct.of(pipe, known.class_names))


ALONE = """
import socket, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline

def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")

socket.socket = refuse
pipe = DiffusionPipeline.from_pretrained("pipeline")
assert type(pipe).__name__ == "DiTPipeline" and not pipe.transformer.training
labels, made = pipe.get_label_ids(["cat", "dog", "eel; or snake", "eel; or snake"]), {}
assert labels == [0, 1, 2, 2]
for steps in (1, 2, 4):
    generator = torch.Generator().manual_seed(5)
    call = {"guidance_scale": 1, "num_inference_steps": steps, "generator": generator}
    made[str(steps)] = pipe(class_labels=labels, output_type="np", **call).images
assert pipe(class_labels=[0, 1], **call).images[0].size == (8, 8)
assert not any(name.startswith("dpdistill") for name in sys.modules)
np.savez("images.npz", **made)
"""


def test_diffusers_alone_opens_it_and_draws_the_same(product: DiffusionProduct, tmp_path: Path) -> None:
    for name, raw in product.files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    subprocess.run([sys.executable, "-W", "error", "-c", ALONE], check=True, cwd=tmp_path)
    labels, drawn = torch.tensor([0, 1, 2, 2]), []
    with np.load(tmp_path / "images.npz") as theirs:
        for steps in (1, 2, 4):
            ours = few_step.draw(few_step.pipeline(student()), labels, steps, torch.Generator().manual_seed(5)).numpy()
            assert np.allclose(theirs[str(steps)].transpose(0, 3, 1, 2), (ours + 1) / 2, atol=1e-6)
            read = sampling.sampler_of(product, (1, 8, 8))(labels, steps, torch.Generator().manual_seed(5)).numpy()
            assert np.array_equal(read, ours)
            drawn.append(ours)
    assert all(part.std() > 0.1 for part in drawn)  # or the comparison would say nothing
    assert not np.allclose(drawn[0], drawn[1], atol=0.1)
    assert not np.allclose(drawn[1], drawn[2], atol=0.1)


def broken(product: DiffusionProduct, **changes: Any) -> dict[str, bytes]:
    """The files, with these arrays added or changed, and those that are None left out."""
    arrays = {**product.transformer, **changes}
    kept = {name: array for name, array in arrays.items() if array is not None}
    return {**product.files(), WEIGHTS: tensors.pack(kept, {"format": "pt"})}


def test_other_weights_are_refused(product: DiffusionProduct) -> None:
    bias, head = product.transformer["pos_embed.proj.bias"], product.transformer["proj_out_2.weight"]
    for files in (
        broken(product, more=np.zeros(1, np.float32)),
        broken(product, **{"pos_embed.proj.bias": None}),
        broken(product, **{"pos_embed.proj.bias": bias[:-1]}),
        broken(product, **{"pos_embed.proj.bias": np.zeros(bias.shape, np.int64)}),
        broken(product, **{"pos_embed.proj.bias": np.full(bias.shape, np.nan, np.float32)}),
        broken(product, **{"proj_out_2.weight": head.reshape(-1)}),
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
        places = range(0, header, 61) if name == WEIGHTS else range(0, len(raw), 7 if name == VAE else 1)
        for place in places:
            flipped = bytearray(raw)
            flipped[place] ^= 1
            with pytest.raises(ReleaseError):
                DiffusionProduct.unpack({**files, name: bytes(flipped)}, NAMES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("side", 10),
        ("side", 4),
        ("side", 68),
        ("side", True),
        ("side", "8"),
        ("width", 10),
        ("width", 0),
        ("width", 2**12 + 4),
        ("width", [8]),
        ("width", 8.0),
        ("channels", 2),
        ("channels", None),
    ],
)
def test_settings_of_no_student_are_refused(product: DiffusionProduct, field: str, value: Any) -> None:
    with pytest.raises(ReleaseError, match=r"not the settings of a student|do not fit each other"):
        shapes({**product.config, field: value}, 3)


@pytest.mark.parametrize("classes", [0, 2**12 + 1])
def test_as_many_classes_as_no_student_has_are_refused(product: DiffusionProduct, classes: int) -> None:
    with pytest.raises(ReleaseError, match="not the settings of a student"):
        shapes(product.config, classes)


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler", "weights of the vae"])
def test_another_kind_of_pipeline_is_refused(part: str) -> None:
    pipe = few_step.pipeline(student())
    change = {"transformer": {"norm_eps": 1e-3}, "vae": {"scaling_factor": 2.0}, "scheduler": {"clip_sample": False}}
    if part in change:
        old = getattr(pipe, part)
        setattr(pipe, part, type(old)(**{**plain(old.config), **change[part]}))
    if part == "vae":
        pipe.vae.load_state_dict(few_step.decoder(1).state_dict())
    if part == "weights of the vae":
        with torch.no_grad():
            pipe.vae.decoder.layers[2].bias.zero_()
    with pytest.raises(ReleaseError, match="another kind"):
        DiffusionProduct.of(pipe, NAMES)
