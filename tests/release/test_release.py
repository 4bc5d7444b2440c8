"""A release is written whole or not at all, the same bytes every time, and the ecosystem loads it."""

import io
import json
import os
import platform
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import small_release
from dpdistill.bundle import contents, png, release, room, table, tensors
from dpdistill.bundle.reading import SIZES
from dpdistill.bundle.release import read_bundle, write_bundle
from dpdistill.bundle.verification import verify
from dpdistill.errors import ConfigError, ReleaseError


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"parts": 2, "soft": True},
        {"parts": 2, "gain": 8},
        {"shape": (3, 12, 10), "classes": 3},
        {"classes": 10, "per_class": 1, "soft": True},
    ],
    ids=str,
)
def test_a_release_verifies_and_reads_back(kit: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    made = kit.synthetic(**options)
    out = write_bundle(tmp_path / "out", made, kit.facts(tmp_path, made))
    verdict = verify(out)
    assert verdict.ok, verdict.problems
    assert verdict.guarantee is not None
    back = read_bundle(out)
    assert torch.equal(back.images, made.images)
    assert torch.equal(back.labels, made.labels)
    assert back.parts == made.parts
    assert (back.soft_labels is None) == (made.soft_labels is None)
    if made.soft_labels is not None:
        assert torch.equal(back.soft_labels, made.soft_labels)
    assert set(all_bytes(out)) == set(SIZES)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["dataset", "model", "diffusion"])
def test_no_release_is_larger_than_was_counted(kind: str, kit: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"classes": 10, "per_class": 30, "soft": kind == "model"}
    made = kit.synthetic(**options)
    if kind == "dataset":
        out = write_bundle(tmp_path / "out", made, kit.facts(tmp_path, made))
        counted = room.dataset(300, (1, 8, 8), 10, soft=False)
    else:
        out = small_release.write(tmp_path, kind)
        counted = room.dataset(4, (1, 8, 8), 2, soft=kind == "model")
    sizes = {name: len(raw) for name, raw in all_bytes(out).items()}
    assert all(sizes[name] <= counted[name][0] for name in counted)
    assert sum(sizes[name] for name in ("README.md", "report.html", "samples.png")) < room.PAGES
    soft = kit.synthetic(**options | {"soft": True})
    held = release.from_torch(soft, tuple(map(str, range(10))))
    counted = room.dataset(300, (1, 8, 8), 10, soft=True)
    assert len(held.pack()) <= counted["dataset/synthetic.safetensors"][0]
    raw = table.write(held.pixels, held.labels, held.soft_labels, held.class_names)
    assert len(raw) <= counted["dataset/train.parquet"][0]
    assert len(raw) + tensors.MAX_HEADER > held.soft_labels.nbytes  # it is no idle bound


def test_class_names_are_counted_as_they_are_written() -> None:
    room.check_names(tuple(f"class {k}" for k in range(10_000)))
    long = tuple(f"{k:04d}" + 80 * "é" for k in range(2400))  # 84 characters each, in 15 bytes of a header's JSON
    with pytest.raises(ConfigError, match=r"2,400 class names .* choose shorter ones"):
        room.check_names(long)
    with pytest.raises(ConfigError, match="choose shorter ones"):
        room.check_names(tuple(f"{k:04d}" + 80 * "<" for k in range(10_000)))  # five times as long on a card
    for names in (
        long[:1500],
        tuple(f"{k:04d}" + 86 * '"' for k in range(1500)),
        tuple(f"{k:080d}" for k in range(9999)),
    ):
        room.check_names(names)
        shape = len(names), 1, 8, 8
        held = contents.Contents(
            images=np.zeros(shape, np.float32), labels=np.arange(len(names)), soft_labels=None, parts=1, gain=1, class_names=names
        )  # fmt: skip
        assert contents.unpack(held.pack()).class_names == names


@given(
    st.lists(
        st.sampled_from(["x", " x", "x ", "x (0)", "x (1)", "x (4)", "", "class 1", "y" * 99 + "ab", "y" * 99 + "ac"])
    )
)
def test_printable_names_are_all_different(names: list[str]) -> None:
    """Those of other classes are not given once more: `Contents` would refuse that after the charge."""
    found = contents.printable_names(tuple(names))
    assert len(set(found)) == len(found) == len(names)
    assert contents.printable_names(found) == found


def test_the_bytes_depend_on_the_arguments_alone(kit: Any, pristine: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[3], sys.argv[1]; import conftest as kit\n"
        "from dpdistill.bundle.release import write_bundle\n"
        "made, place = kit.synthetic(), Path(sys.argv[2])\n"
        "write_bundle(place / 'elsewhere', made, kit.facts(place, made))"
    )
    helpers = str(Path(__file__).parents[1] / "helpers")
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path), helpers], check=True, env=environment
    )
    assert all_bytes(tmp_path / "elsewhere") == all_bytes(pristine)


def test_nothing_of_this_machine_is_in_a_release(pristine: Path) -> None:
    for name, raw in all_bytes(pristine).items():
        for secret in (str(pristine.parent), str(Path.home()) + "/", platform.node()):
            assert secret.encode() not in raw, (name, secret)


def test_an_existing_place_is_never_touched(kit: Any, pristine: Path, tmp_path: Path) -> None:
    made = kit.synthetic()
    known = kit.facts(tmp_path, made)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for name in ("dangling", "empty"):
        with pytest.raises(ReleaseError, match="choose another --out"):
            write_bundle(tmp_path / name, made, known)
    assert not list((tmp_path / "empty").iterdir())


class Crash(BaseException):
    """Stands for kill -9: nothing may catch it."""


def test_a_crash_at_any_point_leaves_all_or_nothing(
    kit: Any, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kit.synthetic()
    known = kit.facts(tmp_path, made)
    names: list[str] = []
    monkeypatch.setattr(release, "point", names.append)
    write_bundle(tmp_path / "whole", made, known)
    assert len(names) > 12
    for index, name in enumerate(names):
        passed: list[str] = []

        def point(name: str, at: int = index, passed: list[str] = passed) -> None:
            passed.append(name)
            if len(passed) == at + 1:
                raise Crash(name)

        out = tmp_path / f"out{index}"
        monkeypatch.setattr(release, "point", point)
        with pytest.raises(Crash):
            write_bundle(out, made, known)
        if out.exists():
            assert name in ("release: renamed", "release: in place")
        else:
            monkeypatch.setattr(release, "point", lambda _: None)
            write_bundle(out, made, known)
        assert all_bytes(out) == all_bytes(pristine), name
        assert not out.with_name(out.name + ".partial").exists()


def test_a_full_disk_is_one_line(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    made = kit.synthetic()
    known = kit.facts(tmp_path, made)
    monkeypatch.setattr(release.os, "fsync", full)
    with pytest.raises(ReleaseError, match="No space left"):
        write_bundle(tmp_path / "out", made, known)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": torch.full((4, 1, 8, 8), float("nan"))}, "outside"),
        ({"images": torch.full((4, 1, 8, 8), 1.5)}, "outside"),
        ({"images": torch.zeros(4, 2, 8, 8)}, "wanted float32"),
        ({"images": torch.zeros(4, 1, 8, 8, dtype=torch.float64)}, "wanted float32"),
        ({"images": torch.zeros(4, 3, 8, 8)}, "another shape"),
        ({"labels": torch.tensor([0, 0, 1, 2])}, "class numbers"),
        ({"labels": torch.tensor([0, 1, 1, 1])}, "images of every class"),
        ({"labels": torch.tensor([0, 0, 1])}, "class numbers"),
        ({"soft_labels": torch.full((4, 2), 0.4)}, "probabilities"),
        ({"soft_labels": torch.full((4, 3), 1 / 3)}, "soft labels are"),
        ({"parts": 9}, "cannot hold"),
        ({"gain": 0}, "0 times the contrast"),
        ({"gain": 65}, "65 times the contrast"),
    ],
)
def test_what_no_method_may_return_is_refused(kit: Any, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    made = kit.synthetic()
    with pytest.raises(ReleaseError, match=reason):
        write_bundle(tmp_path / "out", replace(made, **change), kit.facts(tmp_path, made))
    assert not (tmp_path / "out").exists()


def test_a_run_that_did_not_end_is_not_released(kit: Any, tmp_path: Path) -> None:
    made = kit.synthetic()
    known = kit.facts(tmp_path, made)
    cut = known.ledger_raw[: known.ledger_raw[:-1].rfind(b"\n") + 1]
    with pytest.raises(ReleaseError, match="did not end"):
        write_bundle(tmp_path / "out", made, replace(known, ledger_raw=cut))


def test_class_names_from_anywhere_become_printable_and_different(kit: Any, tmp_path: Path) -> None:
    made = kit.synthetic(classes=4)
    names = ("caf\u202egnp\n", "caf\u202fgnp", "", "x" * 500)
    out = write_bundle(tmp_path / "out", made, kit.facts(tmp_path, made, names, auxiliary="a\nb"))
    assert verify(out).ok
    shown = json.loads((out / "certificate.json").read_text())["release"]["class_names"]
    assert all(name.isprintable() and 0 < len(name) <= 100 for name in shown)
    assert len(set(shown)) == 4


# --- what the ecosystem sees


def test_safetensors_reads_it(pristine: Path, kit: Any) -> None:
    data = load_file(pristine / "dataset" / "synthetic.safetensors")
    assert torch.equal(data["images"], kit.synthetic().images)
    assert data["labels"].dtype == torch.int64


def test_datasets_reads_it_with_class_names(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("HF_HOME"):
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    made = kit.synthetic(shape=(3, 8, 8), parts=2, soft=True)
    out = write_bundle(tmp_path / "out", made, kit.facts(tmp_path, made))
    cache = str(tmp_path / "cache")
    by_file = datasets.load_dataset(
        "parquet", data_files=str(out / "dataset" / "train.parquet"), split="train", cache_dir=cache
    )
    by_folder = datasets.load_dataset(str(out), split="train", cache_dir=cache)
    for loaded in (by_file, by_folder):
        assert loaded.features["label"].names == ["cat", "dog"]
        assert loaded["label"][:] == made.labels.tolist()
        pixels = np.stack([np.asarray(row["image"]) for row in loaded])
        assert (pixels == png.to_pixels(made.images.numpy())).all()
        assert np.allclose(np.array(loaded["soft_labels"][:]).reshape(-1, 2), made.soft_labels)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gain": 3},
        {"parts": 2, "gain": 8},
        {"parts": 2, "soft": True, "shape": (3, 9, 9)},
        {"parts": 3, "shape": (1, 10, 10), "gain": 2},
    ],
    ids=str,
)
def test_the_cards_own_code_runs(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    made = kit.synthetic(**options)
    out = write_bundle(tmp_path / "out", made, kit.facts(tmp_path, made))
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(out)
    scope: dict[str, Any] = {}
    exec(blocks[1], scope)
    assert torch.equal(scope["data"]["images"], made.images)
    exec(blocks[2].replace("range(1000)", "range(2)"), scope)
    assert torch.equal(scope["images"], made.training_images())
    assert len(scope["labels"]) == len(scope["images"])


def test_the_cards_front_matter_is_yaml(pristine: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    front = yaml.safe_load((pristine / "README.md").read_text().split("---\n")[1])
    assert front["configs"][0]["data_files"][0]["path"] == "dataset/train.parquet"
    assert front["size_categories"] == ["n<1K"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("small", [True, False])
def test_png_is_what_pillow_reads(channels: int, small: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 150, channels), dtype=np.uint8)
    raw = png.encode(pixels, small=small)
    with Image.open(io.BytesIO(raw)) as image:
        assert (np.asarray(image).reshape(pixels.shape) == pixels).all()
    assert png.same(raw, pixels)
    pixels[0, 0, 0] ^= 1
    assert not png.same(raw, pixels)


def test_the_sample_sheet_has_a_row_per_class(kit: Any, tmp_path: Path) -> None:
    made = kit.synthetic(classes=3, per_class=12)
    sheet = png.sheet(png.to_pixels(made.images.numpy()), made.labels.numpy(), 3)
    assert sheet.shape == (3 * 52 + 4, 10 * 52 + 4, 1)  # 8×8 images six times as large, four pixels apart


# --- malformed tensors


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _one(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]", extra: str = "") -> bytes:
    return f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}{extra}}}'.encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**21) + b" " * 2**21,
        _safetensors(b"[]"),
        _safetensors(b"{" + b"\xff" + b"}"),
        _safetensors(b"[" * 100_000),
        _safetensors(_one(), b"\0" * 7),
        _safetensors(_one(), b"\0" * 9),
        _safetensors(_one(offsets="[4,12]"), b"\0" * 12),
        _safetensors(_one(shape="[3]"), b"\0" * 8),
        _safetensors(_one(shape="[-2]"), b"\0" * 8),
        _safetensors(_one(shape="[true,2]"), b"\0" * 8),
        _safetensors(_one(shape="[1e0]"), b"\0" * 8),
        _safetensors(_one(shape="[4611686018427387904,4611686018427387904]"), b"\0" * 8),
        _safetensors(_one(dtype="F64", shape="[1]"), b"\0" * 8),
        _safetensors(_one(), np.array([0, np.inf], "<f4").tobytes()),
        _safetensors(_one(), np.array([np.nan, 0], "<f4").tobytes()),
        _safetensors(_one(extra=',"a":1'), b"\0" * 8),
        _safetensors(_one(extra=',"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'), b"\0" * 8),
        _safetensors(_one(extra=',"__metadata__":{"x":1}'), b"\0" * 8),
        _safetensors(
            json.dumps({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(65)}).encode()
        ),
    ],
    ids=range(22),
)
def test_malformed_tensors_are_refused(bundle: Path, raw: bytes) -> None:
    (bundle / "dataset" / "synthetic.safetensors").write_bytes(raw)
    with pytest.raises(ReleaseError, match=r"synthetic\.safetensors"):
        read_bundle(bundle)


def test_other_well_formed_tensors_are_refused(bundle: Path) -> None:
    path = bundle / "dataset" / "synthetic.safetensors"
    arrays, metadata = tensors.unpack(path.read_bytes())
    wrong = ({"note": "x"}, {"parts": "x"}, {"gain": "08"}, {"gain": "x"}, {"class_names": "[1]"})
    for changed in (*({**metadata, **each} for each in wrong), {}):
        path.write_bytes(tensors.pack(arrays, changed))
        with pytest.raises(ReleaseError):
            read_bundle(bundle)
    path.write_bytes(tensors.pack({**arrays, "weights": arrays["images"]}, metadata))
    with pytest.raises(ReleaseError, match="something beside"):
        read_bundle(bundle)


def test_a_missing_release_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="not a readable plain file"):
        read_bundle(tmp_path)


def test_packing_is_stable(kit: Any) -> None:
    made = release.from_torch(kit.synthetic(soft=True), ("a", "b"))
    assert contents.unpack(made.pack()).pack() == made.pack()
