"""From private images to a diffusion model that anyone may sample: the whole way, its errors, and the paper's form without a promise."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpdistill import diffusion, pipeline, sources
from dpdistill.bundle import verify
from dpdistill.cli.review import evaluate
from dpdistill.config import DiffusionConfig
from dpdistill.data import load_images
from dpdistill.diffusion import diffuse
from dpdistill.errors import ConfigError, DpdistillError, InputError, ReleaseError
from dpdistill.methods.diffusion import dpsad
from dpdistill.methods.shared import linear
from dpdistill.sampling import draw_set, sample
from small_sampler import NETWORK, SAMPLER

DPSGD = {"steps": 2, "expected_batch": 15, "multiplicity": 2, **NETWORK}
WAYS: dict[str, dict[str, Any]] = {
    "dpsad": {"warm_start": "mixture", "share_denoiser": 0.5, "pixel_dims": 6, "components": 2, **DPSGD, **SAMPLER},
    "dpdm": {**DPSGD, **SAMPLER},
    "shards": {"models": 3, "teacher_steps": 2, "fit_steps": 2, "queries": 4, "rounds": 1, **NETWORK, **SAMPLER},
    "paper": {"steps": 2, "batch": 8, "teacher_steps": 2, "teacher_batch": 8, **NETWORK, **SAMPLER},
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    guide = linear.Training(teacher_steps=2, teacher_dims=4)  # not of thousands of noisy numbers
    monkeypatch.setattr(dpsad, "GUIDE", guide)
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = rng.integers(0, 90, (60, 8, 8), dtype=np.uint8)
    images[labels == 0, :4] += 150
    np.savez(tmp_path / "x.npz", images=images, labels=labels, classes=np.array(["top", "none"]))

    def make(method: str = "dpsad", **more: Any) -> DiffusionConfig:
        facts: dict[str, Any] = {"data": str(tmp_path / "x.npz"), "out": str(tmp_path / "out"), "epsilon": 2.0}
        facts |= {"expected_records": 60, "per_class": 3, "settings": WAYS.get(method, {}), "method": method}
        return DiffusionConfig(**facts | {"accept_no_record_guarantee": method == "paper"} | more)

    return make


@pytest.mark.parametrize("method", ["dpsad", "dpdm", "shards"])
def test_from_records_to_samples(method: str, config: Any, tmp_path: Path) -> None:
    out = diffuse(config(method), quiet=True)
    verdict = verify(out)
    assert verdict.ok, verdict.problems
    assert verdict.guarantee is not None
    assert verdict.guarantee.basis == "proved"
    assert 1.99 < verdict.guarantee.epsilon <= 2.001
    found = json.loads((out / "certificate.json").read_text())
    assert (found["release"]["kind"], found["release"]["method"]) == ("diffusion", method)
    page = (out / "report.html").read_text()
    assert "Nearest released neighbours" in page
    assert "from_pretrained" in page
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    assert diffuse(config(method), quiet=True) == out  # done already: nothing is charged or changed
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_images_without_labels_are_of_one_class(config: Any, tmp_path: Path) -> None:
    with np.load(tmp_path / "x.npz") as held:
        np.savez(tmp_path / "y.npz", images=held["images"])
    bare = {"data": str(tmp_path / "y.npz")}
    with pytest.raises(InputError, match="--unlabelled"):
        diffuse(config(**bare), quiet=True)
    out = diffuse(config(**bare, unlabelled=True), quiet=True)
    assert verify(out).ok
    found = json.loads((out / "certificate.json").read_text())
    assert found["release"]["class_names"] == ["image"]
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for text in (page, card):
        assert not re.search(r"1 classes|per class|class-conditional|one row of each class", text)
    assert "the guarantee stays what it is" in card
    with pytest.raises(ConfigError, match="no accuracy to measure"):
        evaluate(out, data="digits")
    assert "teacher-gradient" not in found["checks"]  # a guide would have nothing to choose
    assert draw_set(out, 4).labels.tolist() == [0] * 4


@pytest.mark.parametrize("method", ["dpsad", "paper"])
def test_every_form_of_images_is_read_without_its_labels(method: str, config: Any) -> None:
    made = config(method, data="digits", unlabelled=True)
    assert sources.load_private(made).class_names == ("image",)
    assert sources.open_source(made).class_names == ("image",)


@pytest.mark.parametrize("named", [True, False])
def test_images_read_without_their_labels_have_the_same_ledger(named: bool, config: Any, tmp_path: Path) -> None:
    """Else their budget could be had twice."""
    with np.load(tmp_path / "x.npz") as held:
        np.savez(tmp_path / "y.npz", **{name: held[name] for name in held if named or name != "classes"})
    runs = [
        config(data=str(tmp_path / "y.npz"), unlabelled=bare, classes=None if named or bare else 2)
        for bare in (False, True)
    ]
    assert len({sources._ledger_path(run, sources.load_private(run)) for run in runs}) == 1


def test_a_folder_of_images_needs_no_class_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    with pytest.raises(InputError, match=r"lies beside the class folders .*--unlabelled"):
        load_images(tmp_path)
    data = load_images(tmp_path, unlabelled=True)
    assert (data.labels.tolist(), data.class_names, data.images.shape) == ([0, 0, 0], ("image",), (3, 1, 8, 8))


def test_its_samples_need_no_data_and_are_the_same_for_the_same_seed(config: Any, tmp_path: Path) -> None:
    out = diffuse(config(), quiet=True)
    (tmp_path / "x.npz").unlink()
    sample(out, tmp_path / "a.npz", count=10, quiet=True)
    sample(out, tmp_path / "b.npz", count=10, quiet=True)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["images"].shape == (10, 8, 8)
        assert (a["images"] == b["images"]).all()
        assert np.bincount(a["labels"]).tolist() == [5, 5]
    drawn = draw_set(out, 10)
    assert drawn.images.shape == (10, 1, 8, 8)
    assert torch.isfinite(drawn.images).all()


@pytest.mark.parametrize("method", ["dpsad", "paper"])
def test_a_place_in_the_folder_of_images_is_refused(method: str, config: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"lies in --data .*choose a --out outside"):
        diffuse(config(method, data=str(tmp_path / "folder"), out=str(tmp_path / "folder" / "x")), quiet=True)


def test_the_papers_form_promises_nothing_and_charges_nothing(config: Any, tmp_path: Path) -> None:
    out = diffuse(config("paper"), quiet=True)
    verdict = verify(out)
    assert not verdict.ok
    assert verdict.guarantee is None
    assert any("NO differential-privacy guarantee" in problem for problem in verdict.problems)
    assert any(problem.endswith("upper bound.") for problem in verdict.problems)  # to its end
    assert "the guarantee stays" not in (out / "README.md").read_text()
    with pytest.raises(ReleaseError, match="exists"):  # as `--dry-run` says
        diffusion.prepare(config("paper"))
    found = json.loads((out / "certificate.json").read_text())
    assert found["guarantee"]["basis"] == "none"
    assert found["guarantee"]["epsilon"] is None
    claim = found["claim"]
    assert claim["kind"] == "nominal-diffusion"
    assert float(claim["nominal_epsilon"]) <= 2.001 < 1e3 < float(claim["diluted_epsilon"])
    assert float(claim["diluted_epsilon"]) < float(claim["contaminated_epsilon"])
    assert not list(tmp_path.rglob("ledger.jsonl"))
    claim["sigma"] = "0.5"
    (out / "certificate.json").write_text(json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    assert any("certificate.json" in problem for problem in verify(out).problems)


@pytest.mark.parametrize("method", ["paper", "dpdm"])
def test_other_records_do_not_go_on_with_a_run(
    method: str, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither before nor after its release is written, where a crash comes before the run's state is removed."""
    with np.load(tmp_path / "x.npz") as held:
        np.savez(tmp_path / "y.npz", **{**held, "labels": 1 - held["labels"]})
    other = config(method, data=str(tmp_path / "y.npz"))
    for step in ("write_result", "forget"):
        with monkeypatch.context() as patch:
            patch.setattr(diffusion if method == "paper" else pipeline, step, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                diffuse(config(method), quiet=True)
        with pytest.raises((ConfigError, ReleaseError), match="other data"):
            diffuse(other, quiet=True)
    assert verify(diffuse(config(method), quiet=True)).ok == (method == "dpdm")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expected_records": None}, "--expected-records"),
        ({"accept_no_record_guarantee": True}, "go together"),
        ({"settings": {"guidance": 2.0}}, "guidance"),
        ({"settings": {"share_denoiser": 1.0}}, "share_denoiser"),
        ({"settings": {"students_steps": 1}}, "did you mean settings.student_steps"),
        ({"method": "dpsda"}, "unknown method"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_is_charged(
    change: dict[str, Any], said: str, config: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        diffuse(config(**change), quiet=True)
    assert not list(tmp_path.rglob("*.jsonl"))
    assert not (tmp_path / "out").exists()


def test_a_shape_that_the_student_cannot_have_is_refused_before_anything_is_charged(
    config: Any, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((9, 9, 70), np.uint8), labels=np.zeros(9, np.int64), classes=["a"])
    with pytest.raises(DpdistillError, match="--resize"):
        diffuse(config(), quiet=True)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("method", WAYS)
def test_images_that_are_no_squares(method: str, config: Any, tmp_path: Path) -> None:
    """They go in, and come out, as they are: in the release, from `sample`, and by what its card says to do with diffusers alone."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (60, 9, 14, 3), dtype=np.uint8), np.arange(60) % 2
    np.savez(tmp_path / "x.npz", images=images, labels=labels, classes=np.array(["top", "none"]))
    out = diffuse(config(method), quiet=True)
    assert not [problem for problem in verify(out).problems if "NOT PRIVATE" not in problem]
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["release"]["image_shape"] == [3, 9, 14]
    sample(out, tmp_path / "s.npz", count=4, quiet=True)
    with np.load(tmp_path / "s.npz") as found:
        assert found["images"].shape == (4, 9, 14, 3)
    sample(out, tmp_path / "folder", count=2, quiet=True)
    assert load_images(tmp_path / "folder").image_shape == (3, 9, 14)
    card = (out / "README.md").read_text()
    assert "14 × 9 pixels,\ncolour, at the upper left of squares of 16 × 16." in card
    assert json.loads((out / "pipeline" / "transformer" / "config.json").read_text())["sample_size"] == 16
    for text in (card, (out / "report.html").read_text()):
        assert "images = [image.crop((0, 0, 14, 9)) for image in images]" in text


def test_the_paper_s_form_twice_at_once_is_refused(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = diffusion.write_result

    def meanwhile(*given: Any) -> None:
        with pytest.raises(ConfigError, match="at work here already"):
            diffuse(config("paper"), quiet=True)
        write(*given)

    monkeypatch.setattr(diffusion, "write_result", meanwhile)
    assert diffuse(config("paper"), quiet=True) == tmp_path / "out"
    assert not (tmp_path / "out.state").exists()


def test_squares_are_not_cut(config: Any) -> None:
    out = diffuse(config(), quiet=True)
    for name in ("README.md", "report.html"):
        assert "crop" not in (out / name).read_text()
        assert "upper left" not in (out / name).read_text()


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize(("width", "said"), [(6, "multiple of 4"), (8192, "up to 4096"), (1024, "MiB that a release")])
def test_a_student_that_cannot_be_is_refused_before_anything_is_charged(
    method: str, width: int, said: str, config: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        diffuse(config(method, settings={**WAYS[method], "student_width": width}), quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz"]


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"width": 6, "heads": 4}, "heads=4 to divide width=6"),
        ({"width": 10**6}, "depth · width²"),
        ({"width": None, "heads": 10**6}, "depth · width²|expected int|heads=1000000"),
        ({"depth": 10**9}, "depth · width²"),
        ({"patch": 100_000}, "patch of at most 8"),
    ],
    ids=str,
)
def test_a_network_that_cannot_be_is_refused_before_anything_is_charged_or_written(
    method: str, sizes: dict[str, Any], said: str, config: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        diffuse(config(method, settings={**WAYS[method], **sizes}), quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz"]


def test_more_classes_than_a_student_knows_are_refused_before_anything_is_charged(config: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.zeros(9, np.int64))
    with pytest.raises(ConfigError, match="at most 4096 classes"):
        diffuse(config(classes=5000, per_class=1), quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz"]


def test_something_else_in_the_way(config: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for method in ("dpsad", "paper"):
        with pytest.raises(ReleaseError, match="exists"):
            diffuse(config(method), quiet=True)


def test_records_of_which_none_can_be_read(config: Any, tmp_path: Path) -> None:
    """The paper's form reads them itself; it ended in a traceback."""
    bad = np.full((6, 8, 8), np.nan, np.float32)
    np.savez(tmp_path / "x.npz", images=bad, labels=np.zeros(6, np.int64), classes=np.array(["a"]))
    with pytest.raises(InputError, match="no image of finite pixels"):
        diffuse(config("paper", value_low=0.0, value_high=1.0), quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz"]


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("dpdm", {"guidance": 2.0, "label_dropout": 0.0}, "label_dropout above 0"),
        ("shards", {"guidance": 2.0}, "no unconditional denoiser"),
        ("paper", {"guidance": 2.0}, "no unconditional denoiser"),
        ("dpdm", {"student_batch": 1, "spread": 0.25}, "student_batch of at least 2"),
    ],
)
def test_settings_that_would_spoil_a_student(method: str, settings: dict[str, Any], said: str, config: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        diffuse(config(method, settings={**WAYS[method], **settings}), quiet=True)
