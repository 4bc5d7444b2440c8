"""Sampling a release: every format is read back, images are the seed's, and what cannot be done is refused in one line before the work."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpdistill import sampling
from dpdistill.bundle.diffusion_product import DiffusionProduct
from dpdistill.bundle.product import ModelProduct
from dpdistill.bundle.release import product_of, student_of
from dpdistill.data import load_images
from dpdistill.errors import ConfigError, DpdistillError, InputError, ReleaseError
from dpdistill.methods.base import Student, Synthetic
from dpdistill.models import few_step
from dpdistill.models.student_generator import StudentGenerator
from dpdistill.models.wavelet_net import WaveletNet

pytest.importorskip("diffusers")

NAMES = ("cat", "dog", "a/b")


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a checked release holds; the check has tests of its own."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(20, request.param, 8, 8, generator=g) * 2 - 1
    made = few_step.student((request.param, 8, 8), 3, width=8, images=images, generator=g).eval()
    with torch.no_grad():
        made.proj_out_2.weight.normal_(generator=g)
    product, facts = (
        DiffusionProduct.of(few_step.pipeline(made), NAMES),
        SimpleNamespace(image_shape=(request.param, 8, 8)),
    )
    checked = SimpleNamespace(product=product, facts=facts)
    monkeypatch.setattr(sampling.verification, "open_release", lambda path: checked)
    return Path("release")


def test_every_format_is_read_back_with_the_same_images(release: Path, tmp_path: Path) -> None:
    read = {}
    for name in ("out.npz", "out.parquet", "folder"):
        out = sampling.sample(release, tmp_path / name, 8, steps=1, batch=3, seed=4, quiet=True)
        assert out == tmp_path / name
        read[name] = load_images(str(out))
    npz, parquet, folder = read.values()
    assert np.array_equal(npz.images, parquet.images)
    assert np.array_equal(npz.labels, parquet.labels)
    assert npz.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert npz.class_names == parquet.class_names == NAMES
    assert folder.class_names == ("a_b", "cat", "dog")
    assert np.array_equal(folder.images[:2], npz.images[6:])
    assert {path.name for path in tmp_path.iterdir()} == set(read)


def test_the_seed_decides_and_the_file_has_no_clock(release: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sampling.sample(release, tmp_path / f"{name}.npz", 4, steps=2, seed=seed, quiet=True)
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_classes_may_be_chosen(release: Path, tmp_path: Path) -> None:
    sampling.sample(release, tmp_path / "x.npz", 4, classes=["dog", "cat"], steps=1, quiet=True)
    found = load_images(str(tmp_path / "x.npz"))
    assert found.labels.tolist() == [0, 0, 1, 1]
    sampling.sample(release, tmp_path / "x", 2, classes=["a/b"], steps=1, fmt="folder", quiet=True)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a_b"]
    sampling.sample(release, tmp_path / "y.npz", 4, classes=["2", "cat"], steps=1, quiet=True)
    assert load_images(str(tmp_path / "y.npz")).labels.tolist() == [0, 0, 2, 2]


def test_a_number_is_a_class_only_where_no_name_is_a_number() -> None:
    assert sampling._chosen(("one, two", "three"), ["0"]).tolist() == [0]
    assert sampling._chosen(("3", "5"), ["5"]).tolist() == [1]
    with pytest.raises(ConfigError, match="no class is named '0'"):
        sampling._chosen(("3", "5"), ["0"])
    with pytest.raises(ConfigError, match="no class is named '2'"):
        sampling._chosen(("one, two", "three"), ["2"])


def test_a_name_may_have_commas() -> None:
    names = ("red", "red, dark", "1", "2, 3")
    for text, wanted in (("red, dark", [1]), ("red,red, dark", [0, 1]), ("2, 3,1", [2, 3]), ("red", [0])):
        assert sampling._chosen(names, text).tolist() == wanted
    with pytest.raises(ConfigError, match="no class is named 'blue'"):
        sampling._chosen(names, "red,blue")
    with pytest.raises(ConfigError, match="a number of 0 to 1 is a class, too"):
        sampling._chosen(("a", "b"), "c")


def test_the_device_is_where_it_draws(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(few_step.diffusers().DiTPipeline, "to", lambda self, device: asked.append(device))
    sampling.sample(release, tmp_path / "x.npz", 2, steps=1, device="cuda", quiet=True)
    sampling.draw_set(release, 2, device="cuda")
    assert asked == ["cuda", "cuda"]


WRONG: dict[str, tuple[dict[str, Any], type[DpdistillError], str]] = {
    "none": ({"count": 0}, ConfigError, "at least 1"),
    "no step": ({"steps": 0}, ConfigError, "steps of 1, 2 or 4"),
    "three steps": ({"steps": 3}, ConfigError, "steps of 1, 2 or 4"),
    "a class": ({"classes": ["dig"]}, ConfigError, "the nearest is 'dog'"),
    "no class": ({"classes": []}, ConfigError, "at least one class"),
    "a format": ({"fmt": "tar"}, ConfigError, "fmt of npz, parquet, folder"),
    "an ending": ({"out": "x.tar"}, ConfigError, "x.tar: give --out a name ending in .npz or .parquet, or one without"),
    "a parent": ({"out": "no/x.npz"}, InputError, "is no folder"),
    "a place": ({"out": "taken"}, InputError, "exists"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_in_one_line(case: str, release: Path, tmp_path: Path) -> None:
    changes, kind, text = WRONG[case]
    (tmp_path / "taken").mkdir()
    with pytest.raises(kind) as error:
        sampling.sample(
            release, **{"count": 2, "quiet": True, **changes, "out": tmp_path / changes.get("out", "x.npz")}
        )
    assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("inside", ["x.npz", "pipeline/x"])
def test_nothing_is_put_into_the_release(inside: str, release: Path, tmp_path: Path) -> None:
    (tmp_path / release / "pipeline").mkdir(parents=True)
    with pytest.raises(InputError, match="lies in the release"):
        sampling.sample(tmp_path / release, out=tmp_path / release / inside, count=2, quiet=True)
    assert [path.name for path in (tmp_path / release).rglob("*")] == ["pipeline"]


def test_steps_are_refused_before_a_release_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps of 1, 2 or 4"):
        sampling.sample(tmp_path / "nowhere", tmp_path / "x.npz", 2, steps=3, quiet=True)


def test_a_release_without_a_sampler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.verification, "open_release", lambda path: SimpleNamespace(product=None))
    with pytest.raises(ReleaseError, match="no diffusion model"):
        sampling.sample("release", tmp_path / "x.npz", 1)


@pytest.mark.parametrize("name", ["x.npz", "x.parquet", "x"])
def test_a_model_whose_numbers_run_over_is_refused_in_one_line(
    name: str, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite weights may give images that are not: found by the fuzzer."""
    checked = sampling.verification.open_release(release)
    product = checked.product
    huge = {key: np.full_like(array, 3e38) for key, array in product.transformer.items()}
    broken = SimpleNamespace(product=replace(product, transformer=huge), facts=checked.facts)
    monkeypatch.setattr(sampling.verification, "open_release", lambda path: broken)
    for draw in (
        lambda: sampling.sample(release, tmp_path / name, 4, quiet=True),
        lambda: sampling.draw_set(release, 4),
    ):
        with pytest.raises(ReleaseError, match="not finite") as error:
            draw()
        assert str(error.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch) -> ModelProduct:
    """A model release: a generator as it was drawn, of images higher than wide, and a student that has learnt to tell its classes."""
    generator = StudentGenerator((1, 12, 8), 3, latent=2, width=4, generator=torch.Generator().manual_seed(0)).eval()
    net = WaveletNet((1, 12, 8), 3, width=8, groups=4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for seed in range(30):
        images, labels = generator.sample(64, torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    plain = Synthetic(images=torch.zeros(0), labels=torch.zeros(0))
    product = product_of(Student(model=net.eval(), generator=generator, images=plain, figures={}), NAMES)
    monkeypatch.setattr(sampling.verification, "open_release", lambda path: SimpleNamespace(product=product))
    return product


def test_a_students_generator_draws_what_the_student_takes_for_the_class(student: ModelProduct, tmp_path: Path) -> None:
    read = {}
    for name in ("out.npz", "out.parquet", "folder"):
        sampling.sample("release", tmp_path / name, 80, batch=30, seed=4, quiet=True)
        read[name] = load_images(str(tmp_path / name))
    npz, parquet, folder = read.values()
    assert npz.images.shape == (80, 1, 12, 8)
    assert np.array_equal(npz.images, parquet.images)
    assert np.array_equal(npz.labels, parquet.labels)
    assert np.array_equal(npz.labels, np.repeat([0, 1, 2], [27, 27, 26]))
    assert np.array_equal(folder.images[:26], npz.images[54:])
    drawer = sampling.load_sampler("release")
    x = drawer(torch.tensor([2, 0, 0, 1]), 1, torch.Generator().manual_seed(0))
    assert student_of(student)(x).argmax(dim=1).tolist() == [2, 0, 0, 1]
    assert len(x.flatten(1).unique(dim=0)) == 4
    sampling.sample("release", tmp_path / "again.npz", 80, batch=30, seed=4, quiet=True)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "out.npz").read_bytes()
    sampling.sample("release", tmp_path / "dogs.npz", 3, classes=["dog"], quiet=True)
    assert load_images(str(tmp_path / "dogs.npz")).labels.tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match="leave --steps out"):
        sampling.sample("release", tmp_path / "x.npz", 3, steps=2, quiet=True)


def test_a_class_that_the_generator_hardly_draws_is_refused(student: ModelProduct, tmp_path: Path) -> None:
    student.student["head.bias"][1] -= 1e6
    with pytest.raises(ReleaseError, match=r"of 12,800 images drawn for class 'dog' its student takes 0 .*--classes"):
        sampling.sample("release", tmp_path / "x", 6, quiet=True)
    assert list(tmp_path.iterdir()) == []
    sampling.sample("release", tmp_path / "x", 4, classes=["cat", "a/b"], quiet=True)


@pytest.mark.parametrize("change", [{"latent": 3}, {"width": 10**9}, {"latent": 2.0}, {"image_shape": [1, 8, 8]}])
def test_a_generator_of_other_settings_is_refused_before_it_is_made(
    change: dict[str, Any], student: ModelProduct, tmp_path: Path
) -> None:
    student.generator_config.update(change)
    with pytest.raises(ReleaseError, match="not the weights of its config"):
        sampling.sample("release", tmp_path / "x", 6, quiet=True)


def test_a_generator_whose_numbers_run_over_is_refused(student: ModelProduct, tmp_path: Path) -> None:
    student.generator["first.weight"][:] = 3e38
    with pytest.raises(ReleaseError, match="not finite"):
        sampling.sample("release", tmp_path / "x", 6, quiet=True)


def test_nothing_is_left_of_a_failed_run(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sampling.png, "encode", fail)
    with pytest.raises(InputError, match="No space left"):
        sampling.sample(release, tmp_path / "x", 2, steps=1, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_classes_are_all_different_and_may_be_made(tmp_path: Path) -> None:
    from dpdistill.sampling import _folder_names

    names = ("a", "A", "a (0)", "A (1)", "猫" * 90, "猫" * 89 + "犬")
    found = _folder_names(names)
    assert len({name.casefold() for name in found}) == len(names)
    for name in found:
        (tmp_path / name).mkdir()
