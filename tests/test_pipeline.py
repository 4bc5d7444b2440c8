"""The one way through the house, on 47 made-up records: what a run leaves, refuses, charges, and lets nobody see.

N records; 12x12 images of 3 classes. Every run has its own DPDISTILL_HOME.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpdistill import home, pipeline, planning, sources
from dpdistill.bundle.verification import verify
from dpdistill.config import DiffusionConfig, ModelConfig, RunConfig
from dpdistill.config_files import read
from dpdistill.data import Limits, load_images
from dpdistill.errors import BudgetError, ConfigError, DpdistillError, InputError, LedgerError, ReleaseError
from dpdistill.mechanisms import Vault
from dpdistill.methods import METHODS, MODEL_METHODS, joint
from dpdistill.pipeline import distil
from dpdistill.planning import make_plan
from dpdistill.privacy import GaussianSum, Ledger, accounting
from dpdistill.privacy import ledger as ledgers

TINY: dict[str, dict[str, Any]] = {
    "joint": {
        "steps": 4,
        "networks": 2,
        "pool": 12,
        "feature_dims": 8,
        "pixel_dims": 6,
        "components": 2,
        "width": 8,
    },
    "dosser": {
        "sampling_steps": 3,
        "optimisation_steps": 6,
        "sampling_prob": 0.5,
        "group_size": 10,
        "subspace_dim": 4,
        "auxiliary_images": 20,
        "width": 8,
    },
    "ndpdc": {"steps": 4, "sampling_prob": 0.5, "group_size": 10, "width": 8},
    "dpmerf": {"n_frequencies": 20, "steps": 5, "batch": 4, "latent": 2, "width": 4},
}
N = 47


def save(path: Path, n: int = N, seed: int = 0, *, side: int = 12, labels: np.ndarray | None = None) -> Path:
    """n records: the first of n + 1 are the same."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3 if labels is None else labels
    images = np.stack([rng.integers(0, 90, (side, side), dtype=np.uint8) for _ in range(n)])
    images[labels == 0, : side // 2] += 150
    images[labels == 1, :, : side // 2] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images, labels=labels.astype(np.int64), classes=np.array(["top", "left", "none"]))
    return path


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder under a place, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """tiny(method="joint", **changes) -> the configuration of a run of a second, on tmp_path/data/private.npz."""
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(planning, "N_PROCEDURAL", 300)
    save(tmp_path / "data" / "private.npz")

    def make(method: str = "joint", **changes: Any) -> RunConfig:
        settings = TINY[method] | changes.pop("settings", {})
        plain = {"data": str(tmp_path / "data" / "private.npz"), "out": str(tmp_path / "out"), "per_class": 2}
        return RunConfig(**{**plain, "method": method, "settings": settings, **changes})

    return make


@pytest.mark.parametrize(("high", "white"), [(1.0, 1.0), (255.0, 255.0)])
def test_float_images_say_what_is_black_and_white(
    high: float, white: float, tmp_path: Path, tiny: Callable[..., RunConfig]
) -> None:
    """A file does not say, and pixels are private: nobody asks them."""
    images = np.linspace(0, white, 6 * 64, dtype=np.float32).reshape(6, 8, 8)
    np.savez(tmp_path / "f.npz", images=images, labels=np.arange(6) % 2, classes=np.array(["a", "b"]))
    path = str(tmp_path / "f.npz")
    with pytest.raises(InputError, match=r"what is black and what white.*--set value_low=0"):
        distil(tiny(data=path), quiet=True)
    assert not (tmp_path / "home").exists()
    unit = sources.load_private(tiny(data=path, value_low=0.0, value_high=high)).to_unit()
    assert unit.min() == -1
    assert float(np.mean(unit == 1)) < 0.01
    with pytest.raises(ConfigError, match="value_low below value_high"):
        tiny(data=path, value_low=1.0, value_high=0.0)


def test_public_float_images_beyond_their_range_are_refused(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    images = np.full((6, 8, 8), 200, np.float32)
    np.savez(tmp_path / "aux.npz", images=images, labels=np.arange(6) % 2, classes=np.array(["a", "b"]))
    with pytest.raises(InputError, match=r"beyond 0..1 .*uint8"):
        distil(tiny(auxiliary=str(tmp_path / "aux.npz")), quiet=True)
    assert not list((tmp_path / "home").rglob("*.jsonl"))


def the_ledger(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "home" / "ledgers").iterdir()
    return path


@pytest.mark.parametrize("method", METHODS)
def test_from_records_to_a_release_that_verifies(
    method: str, tmp_path: Path, tiny: Callable[..., RunConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(method)
    out = distil(config, quiet=True)
    verdict = verify(out)
    assert verdict.ok, verdict.problems
    assert 0.998 < verdict.guarantee.epsilon <= 1.001  # shown with four digits, rounded up
    assert capfd.readouterr() == ("", "")
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["release"]["per_class"] == 2
    assert certificate["release"]["class_names"] == ["top", "left", "none"]
    # The key and all that was beside the release is gone; what is left is the release, the ledger, the home's key and whose data it was.
    assert sorted(os.listdir(tmp_path)) == ["data", "home", "out"]
    assert sorted(os.listdir(tmp_path / "home")) == ["key", "ledgers", "releases"]
    assert the_ledger(tmp_path).read_bytes() == (out / "ledger.jsonl").read_bytes()
    (noted,) = (json.loads(path.read_text()) for path in (tmp_path / "home" / "releases").iterdir())
    assert not any(noted[name].encode() in (raw or b"") for name in ("key", "records") for raw in listing(out).values())
    for private in (tmp_path / "home", tmp_path / "home" / "releases", tmp_path / "home" / "key", the_ledger(tmp_path)):
        assert private.stat().st_mode & 0o077 == 0
    # The same command again: the same folder at once, nothing charged, nothing written.
    before = listing(tmp_path)
    assert distil(config, quiet=True) == out
    assert listing(tmp_path) == before


def test_no_release_names_a_path_or_the_number_of_records(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    n = 7919  # in no version, date or size of ours by chance
    save(tmp_path / "data" / "private.npz", n, side=8)
    shutil.copyfile(tmp_path / "data" / "private.npz", tmp_path / "data" / "open.npz")
    out = distil(tiny(auxiliary=str(tmp_path / "data" / "open.npz"), seed=3), quiet=True)
    for name, raw in listing(out).items():
        if raw is not None and Path(name).suffix in (".json", ".jsonl", ".toml", ".md", ".html", ""):
            text = re.sub(r"[0-9a-f]{16,}|base64,[A-Za-z0-9+/=]+", "", raw.decode())  # hashes and pixels
            for number in (str(n), f"{n:,}", str(n // 3)):  # alone: checks have many digits, and some are random
                assert not re.search(rf"(?<![\w.]){number}(?!\w)", text), (name, number)
            for hidden in (str(tmp_path), "/tmp", str(Path.home()), "private.npz"):
                assert hidden not in text, (name, hidden)
        elif raw is not None:
            assert str(tmp_path).encode() not in raw, name
            assert b"private.npz" not in raw, name
    assert "open.npz" in (out / "certificate.json").read_text()  # the auxiliary set is named, by its last name


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_public_images_need_no_labels(form: str, tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    given = np.load(save(tmp_path / "open.npz", 60, side=8))["images"]
    if form == "npz":
        np.savez(tmp_path / "bare.npz", images=given)
    else:
        (tmp_path / "bare").mkdir()
        for number, image in enumerate(given):
            Image.fromarray(image.squeeze()).save(tmp_path / "bare" / f"{number}.png")
    bare = planning.public_facts(
        tiny(auxiliary=str(tmp_path / "bare.npz" if form == "npz" else tmp_path / "bare")), (1, 8, 8), ("a",)
    )
    labelled = planning.public_facts(tiny(auxiliary=str(tmp_path / "open.npz")), (1, 8, 8), ("a",))
    assert sorted(bare.auxiliary.flatten().tolist()) == sorted(labelled.auxiliary.flatten().tolist())


def test_labels_of_public_images_are_taken_where_there_are_some(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    pixels, shown = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8), [5, 2, 2, 5, 9, 9]
    np.savez(tmp_path / "listed.npz", images=pixels, labels=shown, classes=list("abcdefghij"))
    np.savez(tmp_path / "counted.npz", images=pixels, labels=shown)
    np.savez(tmp_path / "bare.npz", images=pixels)
    np.savez(tmp_path / "odd.npz", images=pixels, labels=np.array(shown) - 3)
    np.savez(tmp_path / "endless.npz", images=pixels, labels=np.array(shown) * 10**17)
    np.savez(tmp_path / "half.npz", images=pixels, labels=np.array(shown) + 0.5)
    np.savez(tmp_path / "one.npz", images=pixels, labels=np.zeros(6, np.int64), classes=["a"])
    for number, (image, label) in enumerate(zip(pixels, shown, strict=True)):
        (tmp_path / "folders" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "folders" / str(label) / f"{number}.png")

    def found(name: str) -> planning.Public:
        return planning.public_facts(tiny(auxiliary=str(tmp_path / name)), (1, 8, 8), ("a",))

    for name, expected in (("listed.npz", [1, 0, 0, 1, 2, 2]), ("counted.npz", [1, 0, 0, 1, 2, 2])):
        labels = found(name).auxiliary_labels
        assert labels is not None
        assert (str(labels.dtype), labels.tolist()) == ("torch.int64", expected)
    in_folders = found("folders")
    assert in_folders.auxiliary_labels is not None
    assert in_folders.auxiliary_labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = (pixels[[1, 2, 0, 3, 4, 5]] / 127.5 - 1).astype(np.float32)  # by class, then by file
    np.testing.assert_allclose(in_folders.auxiliary[:, 0], expected, atol=1e-6)
    for name in ("bare.npz", "odd.npz", "endless.npz", "half.npz", "one.npz"):
        assert found(name).auxiliary_labels is None, name
    hashes = [planning.auxiliary_hash(found(name)) for name in ("bare.npz", "one.npz", "counted.npz", "listed.npz")]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
    assert planning.public_facts(tiny(), (1, 8, 8), ("a",)).auxiliary_labels is None


def test_networks_are_taught_on_given_images_alone(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[tuple[int, int, list[int]]] = []
    monkeypatch.setattr(
        joint, "teach", lambda _, x, y, steps, *__: taught.append((len(x), len(set(y.tolist())), steps))
    )
    settings = TINY["joint"] | {"networks": 6, "lessons": 8}
    distil(tiny(out=str(tmp_path / "without"), settings=settings), quiet=True)
    assert taught == []
    given = str(save(tmp_path / "open.npz", 60, side=12))
    distil(tiny(out=str(tmp_path / "with"), settings=settings, auxiliary=given, budget=9.0), quiet=True)
    assert taught == [(60, 3, [0, 0, 0, 0, 0, 2])]


def auxiliary_of(config: RunConfig, shape: tuple[int, int, int]) -> np.ndarray:
    return np.asarray(planning.public_facts(config, shape, ("a",)).auxiliary)


def test_public_images_are_made_of_the_private_ones_colour(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "mixed" / "cat").mkdir(parents=True)
    for number, image in enumerate(pixels):  # one grey, the others colour
        Image.fromarray(image if number else image[:, :, 0]).save(tmp_path / "mixed" / "cat" / f"{number}.png")
    np.savez(tmp_path / "colour.npz", images=pixels)
    np.savez(tmp_path / "grey.npz", images=pixels[:, :, :, 0])
    for channels in (1, 3):
        found = {
            name: auxiliary_of(tiny(auxiliary=str(tmp_path / name)), (channels, 8, 8))
            for name in ("mixed", "colour.npz", "grey.npz")
        }
        assert {x.shape for x in found.values()} == {(6, channels, 8, 8)}
        np.testing.assert_array_equal(found["mixed"][1:], found["colour.npz"][1:])
        np.testing.assert_array_equal(found["mixed"][0], found["grey.npz"][0])
    with pytest.raises(ConfigError, match=r"private ones \(1, 8, 10\).*--resize"):
        auxiliary_of(tiny(auxiliary=str(tmp_path / "grey.npz")), (1, 8, 10))


def test_public_images_need_no_options_of_their_own(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    """Of any column, without labels or with some that no list has, floats of either range; and what an error says can be done."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    pixels[0, 0, :2] = 0, 255
    np.savez(tmp_path / "plain.npz", images=pixels)
    np.savez(tmp_path / "odd.npz", images=pixels, labels=np.full(6, -1))
    np.savez(tmp_path / "unit.npz", images=(pixels / 127.5 - 1).astype(np.float32))
    cells = []
    for image in pixels:
        Image.fromarray(image).save(buffer := io.BytesIO(), "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": "x.png"})
    pq.write_table(pa.table({"img": cells, "caption": ["text"] * 6}), tmp_path / "x.parquet")

    def found(name: str) -> np.ndarray:
        return auxiliary_of(tiny(auxiliary=str(tmp_path / name)), (1, 8, 8))

    for name in ("odd.npz", "unit.npz", "x.parquet"):
        np.testing.assert_allclose(found(name), found("plain.npz"), atol=1e-6, err_msg=name)
    for name in ("dev", "extra"):
        shutil.copy(tmp_path / "x.parquet", tmp_path / "data" / f"{name}.parquet")
    with pytest.raises(InputError, match=r"splits found: dev, extra; name the folder or file of one"):
        found("data")
    assert found("data/dev.parquet").shape == (6, 1, 8, 8)


def test_the_cap_on_what_is_read_holds_for_public_images(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Limits] = []
    monkeypatch.setattr(planning, "load_images", lambda *_, limits, **__: read.append(limits) or load_images("digits"))
    auxiliary_of(tiny(auxiliary="x", max_gib=7), (1, 8, 8))
    assert [limits.max_array_bytes for limits in read] == [7 * 2**30]


def test_another_configuration_in_the_same_place(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    distil(tiny(), quiet=True)
    before = listing(tmp_path)
    for other in (
        tiny(seed=1),
        tiny(settings={"steps": 5}),
        tiny(epsilon=0.5),
    ):
        with pytest.raises(ReleaseError, match="choose another --out"):
            distil(other, quiet=True)
    save(tmp_path / "data" / "other.npz", seed=5)
    with pytest.raises(ReleaseError, match="other data's release"):  # a release of other records is no answer
        distil(tiny(data=str(tmp_path / "data" / "other.npz")), quiet=True)
    (tmp_path / "data" / "other.npz").unlink()
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_something_else_in_the_place(kind: str, tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")  # exists() says no, and the last step would have refused after the charge
    with pytest.raises(ReleaseError, match="exists"):
        distil(tiny(), quiet=True)
    assert not (tmp_path / "home" / "ledgers").exists()
    assert not (tmp_path / "out.state").exists()


def test_a_slash_at_the_end_of_the_place(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    """As a shell completes it. The state must not come to lie in the release's own place."""
    out = distil(tiny(out=str(tmp_path / "out") + "/"), quiet=True)
    assert verify(out).ok
    assert distil(tiny(), quiet=True) == out
    assert sorted(os.listdir(tmp_path)) == ["data", "home", "out"]


@pytest.mark.parametrize("place", ["out/ledger.jsonl", "out.state/ledger.jsonl", "out"])
def test_a_ledger_in_the_release_is_refused(place: str, tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="choose a place outside"):
        distil(tiny(ledger=str(tmp_path / place)), quiet=True)
    assert sorted(os.listdir(tmp_path)) == ["data"]


@pytest.mark.parametrize("read", ["data", "auxiliary", "link"])
@pytest.mark.parametrize("written", ["out", "ledger"])
def test_a_place_in_a_folder_that_is_read_is_refused(
    read: str, written: str, tmp_path: Path, tiny: Callable[..., RunConfig]
) -> None:
    """What is written there would make the folder unreadable to the same command, after the charge."""
    for name in ("top", "none"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((12, 12), np.uint8)).save(tmp_path / "pictures" / name / "0.png")
    (tmp_path / "link").symlink_to("pictures")
    option = "data" if read == "link" else read
    place = tmp_path / ("link" if read == "link" else "pictures")
    config = tiny(**{option: str(place), written: str(tmp_path / "pictures" / "top" / "x")})
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match=f"--{written} .* lies in --{option} .*choose a --{written} outside"):
        distil(config, quiet=True)
    with pytest.raises(ConfigError, match="lies in"):  # a dry run, too
        sources.open_source(config)
    assert listing(tmp_path) == before


def test_a_place_that_cannot_be(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --out"):
        distil(tiny(out=str(tmp_path / "file" / "out")), quiet=True)
    assert sorted(os.listdir(tmp_path)) == ["data", "file"]  # no ledger was begun for it, and no home for ledgers


def test_runs_on_the_same_data_add_up(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    first = distil(tiny(), quiet=True)
    spent = listing(tmp_path)
    # Nothing is left of it: the same records, another file, another method. The cap is what the first run asked for.
    data = save(tmp_path / "elsewhere" / "copy.npz")
    second = tiny("ndpdc", data=str(data), out=str(tmp_path / "out2"))
    with pytest.raises(BudgetError, match=r"nothing was charged \(--budget \d\.\d+ raises the cap") as error:
        distil(second, quiet=True)
    assert {k: v for k, v in listing(tmp_path).items() if not k.startswith("elsewhere")} == spent
    needed = float(re.search(r"--budget ([\d.]+)", str(error.value)).group(1))
    out = distil(dataclasses.replace(second, budget=needed), quiet=True)
    assert verify(out).ok
    lines = ledgers.parse(the_ledger(tmp_path).read_bytes())
    assert [line["type"] for line in lines].count("run") == 2
    assert [line["cap_epsilon"] for line in lines if line["type"] == "cap"] == [repr(needed)]
    both = accounting.epsilon(ledgers.parts(lines), 1e-5)
    promise = json.loads((out / "certificate.json").read_text())["guarantee"]
    assert float(promise["epsilon_all_runs"]) == pytest.approx(both, rel=1e-3)
    assert float(promise["epsilon"]) < 1.001 < both < 2
    assert both <= needed
    assert verify(first).ok  # the first release holds the ledger as it was


def test_a_budget_from_the_start_leaves_room(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    distil(tiny(budget=2.0), quiet=True)
    distil(tiny(out=str(tmp_path / "out2"), seed=1), quiet=True)
    lines = ledgers.parse(the_ledger(tmp_path).read_bytes())
    assert [line["type"] for line in lines if line["type"] != "intent"] == ["open", "run", "final", "run", "final"]


def test_the_same_records_scaled_to_another_size_have_the_same_ledger(
    tmp_path: Path, tiny: Callable[..., RunConfig]
) -> None:
    distil(tiny(resize=8), quiet=True)
    for other in (tiny(out=str(tmp_path / "b")), tiny(out=str(tmp_path / "c"), resize=16)):
        with pytest.raises(BudgetError):
            distil(other, quiet=True)
    distil(tiny(out=str(tmp_path / "d"), resize=10, budget=9.0), quiet=True)
    assert len(list((tmp_path / "home" / "ledgers").iterdir())) == 1


def test_large_images_have_one_ledger_at_every_size(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    data = str(save(tmp_path / "data" / "large.npz", side=80))
    with pytest.raises(InputError, match="80x80"):
        distil(tiny(data=data), quiet=True)
    places = {sources._ledger_path(c, sources.load_private(c)) for c in (tiny(data=data, resize=s) for s in (8, 16))}
    assert len(places) == 1


def test_images_made_grey_or_colour_have_one_ledger(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    """Whatever they are read as, of mixed colours or all grey."""
    rng = np.random.default_rng(0)
    for name, shapes in (("mixed", [(8, 8), (8, 8, 3)]), ("grey", [(8, 8), (8, 8)])):
        for number, shape in enumerate(shapes):
            (tmp_path / name / "a").mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name / "a" / f"{number}.png")
        configs = [tiny(data=str(tmp_path / name), channels=c, resize=r) for c in (1, 3) for r in (None, 8)]
        configs += [tiny(data=str(tmp_path / name))] if name == "grey" else []
        assert len({sources._ledger_path(c, sources.load_private(c)) for c in configs}) == 1


def test_a_ledger_named_as_before_is_taken_over(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    """Its name was a hash of images and labels in their order."""
    config = tiny()
    records = sources.load_private(config)
    facts = repr((records.images.shape, str(records.images.dtype))).encode()
    before = home.ledger_of([facts, records.images.tobytes(), records.labels.tobytes()])
    distil(config, quiet=True)
    now = the_ledger(tmp_path)
    spent = now.read_bytes()
    now.rename(before)
    with pytest.raises(BudgetError):
        distil(tiny(out=str(tmp_path / "second"), seed=1), quiet=True)
    assert not before.exists()
    assert now.read_bytes() == spent
    os.link(now, before)  # as a crash in the middle leaves it
    assert home.default_ledger(records) == now
    assert not before.exists()


@pytest.mark.parametrize("late", [False, True])
def test_two_ledgers_of_the_same_images_are_not_one(
    late: bool, tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of before, one for each reading of their labels; or begun by another process meanwhile. None is forgotten or written over."""
    records = sources.load_private(tiny())
    facts = repr((records.images.shape, str(records.images.dtype))).encode()
    before = home.ledger_of([facts, records.images.tobytes(), records.labels.tobytes()])
    before.parent.mkdir()
    before.write_bytes(b"one")
    now = home.default_ledger(records)
    assert now.read_bytes() == b"one"
    now.rename(before)
    link = os.link
    monkeypatch.setattr(os, "link", lambda *paths: (now.write_bytes(b"two") if late else None, link(*paths)))
    if not late:
        now.write_bytes(b"two")
    with pytest.raises(LedgerError, match=r"these images have two ledgers, .* and .*--ledger") as error:
        home.default_ledger(records)
    assert str(before) in str(error.value)
    assert (before.read_bytes(), now.read_bytes()) == (b"one", b"two")


def test_labels_names_and_order_have_no_ledger_of_their_own(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    """What the classes are called, which column holds them and how the records are sorted is a choice, and a choice buys no budget."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (6, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        (tmp_path / "f" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "f" / "ab"[number % 2] / f"{number}.png")
    cells = [{"bytes": (tmp_path / "f" / "ab"[n % 2] / f"{n}.png").read_bytes(), "path": ""} for n in range(6)]
    columns = {"image": cells, "label": [0, 1] * 3, "other": [0] * 6}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    folder, table = str(tmp_path / "f"), str(tmp_path / "t.parquet")
    configs = [tiny(data=folder), tiny(data=folder, class_names="b,a"), tiny(data=folder, class_names="a,b,c")]
    configs += [
        tiny(data=table, classes=2),
        tiny(data=table, classes=2, label_column="other"),
        tiny(data=table, classes=5),
    ]
    assert len({sources._ledger_path(c, sources.load_private(c)) for c in configs}) == 1
    np.savez(tmp_path / "twice.npz", images=pixels[[0, 0, 1, 2, 3, 4, 5]], labels=np.zeros(7, np.int64))
    twice = tiny(data=str(tmp_path / "twice.npz"), classes=1)
    assert sources._ledger_path(twice, sources.load_private(twice)) != sources._ledger_path(
        configs[0], sources.load_private(configs[0])
    )


def test_a_reading_that_fails_gives_no_other_ledger(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(resize=8)

    def load(*args: Any, resize: int | None, **others: Any) -> Any:
        if resize is None:
            raise InputError("scratch", "has no room for data that do not fit in memory", "point TMPDIR elsewhere")
        return load_images(*args, resize=resize, **others)

    records = sources.load_private(config)
    monkeypatch.setattr(sources, "load_images", load)
    with pytest.raises(InputError, match="has no room"):
        sources._ledger_path(config, records)
    assert not (tmp_path / "home").exists()


def test_scaled_images_within_a_limit_that_the_whole_ones_pass_have_the_same_ledger(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ledger is named by is read whatever its size: a limit is what a run may hold."""
    whole = sources._ledger_path(tiny(), sources.load_private(tiny()))
    scaled = tiny(resize=8)
    records = sources.load_private(scaled)

    def of_gib(gib: int, scratch: str | None = None) -> Limits:
        return Limits(max_array_bytes=N * 100 * gib, scratch=scratch)

    monkeypatch.setattr(sources.Limits, "of_gib", of_gib)
    one = dataclasses.replace(scaled, max_gib=1)
    with pytest.raises(InputError, match="--max-gib"):
        sources.load_private(dataclasses.replace(one, resize=None))
    assert sources._ledger_path(one, records) == whole


def test_other_records_have_another_ledger(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    places = set()
    for name, n, seed in (("a", N, 0), ("b", N, 1), ("c", N + 1, 0)):
        config = tiny(data=str(save(tmp_path / f"{name}.npz", n, seed)))
        places.add(home.default_ledger(sources.load_private(config)))
    assert len(places) == 3
    key = (tmp_path / "home" / "key").read_bytes()
    assert len(key) == 32
    (tmp_path / "home" / "key").write_bytes(bytes(32))  # the name is keyed: it tells nothing to whoever guesses records
    assert home.default_ledger(sources.load_private(config)) not in places


def test_an_empty_home_is_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPDISTILL_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home.home() == tmp_path / ".dpdistill"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": "none.npz"}, InputError),
        ({"data": ""}, ConfigError),
        ({"data": "torn.npz"}, InputError),
        ({"data": "labels.npz"}, InputError),
        ({"resize": 4}, InputError),
        ({"auxiliary": "none.npz"}, InputError),
        ({"method": "joined", "settings": {}}, ConfigError),
        ({"settings": {"stepz": 1}}, ConfigError),
        ({"settings": {"steps": "many"}}, ConfigError),
        ({"settings": {"networks": 0}}, ConfigError),
        ({"settings": {"pixel_dims": 1025}}, ConfigError),  # gigabytes for a micro-batch
        ({"settings": {"per_class": 3}}, ConfigError),  # else the release is refused when the budget is spent
        ({"settings": {"share_means": 0.5}}, ConfigError),
        ({"method": "ndpdc", "settings": {"sampling_prob": 2.0}}, ConfigError),
        ({"method": "ndpdc", "settings": {"sampling_prob": None}}, ConfigError),
        ({"method": "ndpdc", "settings": {"clip_norm": -1.0}}, ConfigError),
        ({"method": "ndpdc", "settings": {"parts": 13}}, ConfigError),
        ({"method": "dosser", "settings": {"parts": 13}}, ConfigError),
        ({"method": "dosser", "settings": {"clip_norm": 1e300}}, ConfigError),
        ({"method": "dosser", "settings": {"clip_norm": 1e-300}}, ConfigError),
        ({"method": "dosser", "settings": {"lr": 1e38}}, ConfigError),
        ({"method": "dosser", "settings": {"group_size": 1e300}}, ConfigError),
        ({"method": "ndpdc", "settings": {"augment": "_".join(["crop"] * 4000)}}, ConfigError),
        ({"epsilon": 900.0}, ConfigError),  # below what a run may ask for, above what a verifier adds up
        ({"device": "cuda"}, ConfigError),
    ],
    ids=str,
)
def test_what_is_wrong_is_found_before_anything_is_written(
    changes: dict[str, Any],
    error: type[DpdistillError],
    tmp_path: Path,
    tiny: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    raw = (tmp_path / "data" / "private.npz").read_bytes()
    (tmp_path / "data" / "torn.npz").write_bytes(raw[: len(raw) // 2])
    save(tmp_path / "data" / "labels.npz", labels=np.arange(N))
    before = listing(tmp_path)
    config = tiny(changes.get("method", "joint") if changes.get("method") in TINY else "joint")
    settings = {**config.settings, **changes["settings"]} if changes.get("settings") else config.settings
    with pytest.raises(error) as raised:
        distil(dataclasses.replace(config, **{**changes, "settings": settings}), quiet=True)
    assert "\n" not in str(raised.value)
    assert listing(tmp_path) == before


def stopped(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped after all its releases."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_bundle", stop)
        with pytest.raises(KeyboardInterrupt):
            distil(config, quiet=True)


def test_the_state_of_another_configuration(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tiny(), monkeypatch)
    before = listing(tmp_path)
    assert "out.state/vault/key" in before
    assert (tmp_path / "out.state").stat().st_mode & 0o077 == 0
    for other in (tiny(seed=1), tiny(settings={"steps": 5}), tiny(budget=9.0, seed=1)):
        with pytest.raises(ConfigError, match="belongs to a run with other settings"):
            distil(other, quiet=True)
    assert listing(tmp_path) == before
    (tmp_path / "out.state" / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="belongs to a run with other settings"):
        distil(tiny(), quiet=True)
    (tmp_path / "out.state" / "run.json").write_bytes(before["out.state/run.json"])
    assert verify(distil(tiny(), quiet=True)).ok
    assert the_ledger(tmp_path).read_bytes().startswith(before[str(the_ledger(tmp_path).relative_to(tmp_path))])
    assert not (tmp_path / "out.state").exists()


def two_readings(kind: str, place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two ways to read, of the same shape where they can be, that give other images, other labels or other public images."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (12, 16, 16), dtype=np.uint8)
    if kind in ("range", "size"):
        np.savez(
            place / "f.npz", images=pixels / np.float32(255), labels=np.arange(12) % 2, classes=np.array(["a", "b"])
        )
        first = {"data": str(place / "f.npz"), "value_low": 0.0, "value_high": 1.0, "resize": 16}
        return first, first | ({"value_high": 255.0} if kind == "range" else {"resize": 8})
    if kind in ("labels", "images"):
        cells = []
        for image in pixels:
            Image.fromarray(image).save(buffer := io.BytesIO(), "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": ""})
        columns = {"image": cells, "left": cells[::-1], "label": [0, 1] * 6, "other": [1, 0] * 6}
        pq.write_table(pa.table(columns), place / "t.parquet")
        first = {"data": str(place / "t.parquet"), "classes": 2, "ledger": str(place / "l.jsonl")}
        return first, first | ({"label_column": "other"} if kind == "labels" else {"image_column": "left"})
    if kind in ("names", "colour", "split"):
        for number, image in enumerate(pixels):
            folder = place / "f" / ("train", "val")[number % 2] / "ab"[number // 2 % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
        first = {"data": str(place / "f"), "split": "train", "ledger": str(place / "l.jsonl")}
        return first, first | {"names": {"class_names": "b,a"}, "colour": {"channels": 3}, "split": {"split": "val"}}[
            kind
        ]
    if kind == "auxiliary":
        for seed in (0, 1):
            save(place / str(seed) / "open.npz", 60, seed)
        return {"auxiliary": str(place / "0" / "open.npz")}, {"auxiliary": str(place / "1" / "open.npz")}
    first = {"ledger": str(place / "l.jsonl")}
    return first, first | {"data": str(save(place / "other.npz", seed=5))}


READINGS = ("range", "size", "labels", "images", "names", "colour", "split", "auxiliary", "data")


@pytest.mark.parametrize("kind", READINGS)
def test_what_is_read_otherwise_is_another_run(
    kind: str, tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a release of the one and half of the other would be no release of either; and a finished one is no answer to the other."""
    first, other = (tiny(budget=9.0, **reading) for reading in two_readings(kind, tmp_path / "data"))
    stopped(first, monkeypatch)
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match=r"other settings or other data.*another --out"):
        distil(dataclasses.replace(other, budget=19.0), quiet=True)
    assert listing(tmp_path) == before
    out = distil(first, quiet=True)
    assert verify(out).ok
    before = listing(tmp_path)
    with pytest.raises(ReleaseError, match=r"other data's release; choose another --out"):
        distil(other, quiet=True)
    assert distil(first, quiet=True) == out
    assert listing(tmp_path) == before


def test_the_same_records_from_another_file_go_on(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tiny(), monkeypatch)
    copy = tiny(data=str(save(tmp_path / "elsewhere" / "copy.npz")))
    out = distil(copy, quiet=True)
    assert verify(out).ok
    assert distil(tiny(), quiet=True) == out
    shutil.rmtree(tmp_path / "home" / "releases")  # what is not known to be of these records is no answer
    with pytest.raises(ReleaseError, match=r"as far as .*home knows"):
        distil(tiny(), quiet=True)


def test_no_place_to_note_whose_data_it_is(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(LedgerError, match="set DPDISTILL_HOME"):
        distil(tiny(ledger=str(tmp_path / "l.jsonl")), quiet=True)
    assert not (tmp_path / "l.jsonl").exists()
    assert not (tmp_path / "out.state").exists()


def killed(config: RunConfig, charges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped before its next charge, after so many."""
    reserve, made = Ledger.reserve, []

    def counted(self: Ledger, *args: Any, **more: Any) -> int:
        if len(made) == charges:
            raise KeyboardInterrupt
        made.append(args)
        return reserve(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "reserve", counted)
        with pytest.raises(KeyboardInterrupt):
            distil(config, quiet=True)


def test_a_stopped_run_that_can_be_afforded_no_more_is_charged_no_more(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run was let in while it stood still."""
    killed(tiny(), 2, monkeypatch)
    other = distil(tiny(out=str(tmp_path / "b"), epsilon=0.6, seed=1), quiet=True)
    before = listing(tmp_path)
    with pytest.raises(BudgetError, match="nothing was charged") as error:
        distil(tiny(), quiet=True)
    assert listing(tmp_path) == before
    needed = float(re.search(r"--budget ([\d.]+)", str(error.value)).group(1))
    assert verify(distil(tiny(budget=needed), quiet=True)).ok
    assert verify(other).ok


def test_a_run_whose_plan_is_charged_goes_on_below_a_lowered_cap(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tiny(), monkeypatch)
    with Ledger.open(the_ledger(tmp_path), cap=(1.0, 1e-5)) as ledger:
        ledger.raise_cap((0.5, 1e-5))
    assert verify(distil(tiny(), quiet=True)).ok


def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, caps: int = 0, kinds: int = 0) -> str:
    """A ledger whose cap was changed so often, or that holds so many sampled releases, no two alike."""
    path = tmp_path / "full.jsonl"
    with monkeypatch.context() as patch, Ledger.open(path, cap=(5.0, 1e-5)) as ledger:
        patch.setattr(Ledger, "check_affordable", lambda *_: None)
        for number in range(caps):
            ledger.raise_cap((5.0 + number % 2 + 1, 1e-5))
        ledger.start("before", "ndpdc", "0" * 64)
        for number in range(kinds):
            ledger.reserve("before", GaussianSum(name="x", dim=1, noise_multiplier=900.0 + number, sampling_prob=0.1))
        ledger.finish("before")
    return str(path)


def refused(config: RunConfig, tmp_path: Path, message: str) -> None:
    before = listing(tmp_path)
    with pytest.raises(LedgerError, match=message) as error:
        distil(config, quiet=True)
    assert "\n" not in str(error.value)
    assert listing(tmp_path) == before


def test_a_cap_that_was_changed_too_often_is_not_changed_again(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = full(tmp_path, monkeypatch, caps=64)
    refused(tiny(ledger=path, budget=9.0), tmp_path, "the cap was changed over 64 times.*leave --budget out")
    assert verify(distil(tiny(ledger=path), quiet=True)).ok
    with Ledger.open(Path(path), cap=(1.0, 1e-5)) as ledger:
        ledger.raise_cap((50.0, 1e-5))
    refused(
        tiny(ledger=path, out=str(tmp_path / "b")), tmp_path, "the cap was changed over 64 times.*nothing was charged"
    )


def test_one_kind_of_sampled_release_too_many_is_not_charged(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = full(tmp_path, monkeypatch, kinds=64)
    refused(tiny("ndpdc", ledger=path), tmp_path, "too many kinds of release.*choose another method")


def test_an_epsilon_that_the_accountants_do_not_agree_on_is_not_charged(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = full(tmp_path, monkeypatch)
    monkeypatch.setattr(accounting, "rdp_epsilon", lambda *_: 0.5)
    refused(tiny(ledger=path), tmp_path, "the accountants contradict each other")


@pytest.mark.parametrize("method", METHODS)
def test_what_was_foreseen_is_what_is_on_the_ledger(
    method: str, tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    foreseen = Ledger.foreseen
    monkeypatch.setattr(Ledger, "foreseen", lambda *args: seen.append(foreseen(*args)) or seen[-1])
    distil(tiny(method), quiet=True)

    def facts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key not in ("run", "hash")} for line in lines]

    assert facts(seen[0]) == facts(ledgers.parse(the_ledger(tmp_path).read_bytes()))


def test_soft_labels_count_among_what_a_release_holds() -> None:
    names = tuple(map(str, range(300)))
    settings = MODEL_METHODS["teacher"].Config()
    for per_class, fits in ((1000, False), (300, True)):
        config = ModelConfig(data="d", per_class=per_class)
        if fits:
            planning.check_size(config, settings, (1, 8, 8), names)
        else:
            with pytest.raises(ConfigError, match=r"synthetic.safetensors would have 4\d\d MiB.*--per-class"):
                planning.check_size(config, settings, (1, 8, 8), names)
            planning.check_size(RunConfig(data="d", per_class=per_class), None, (1, 8, 8), names)


def test_a_fit_that_diverged_loses_no_release(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    ndpdc = METHODS["ndpdc"]

    def run(*args: Any) -> Any:
        made = ndpdc.run(*args)
        return dataclasses.replace(made, images=made.images * float("nan"))

    monkeypatch.setitem(METHODS, "ndpdc", SimpleNamespace(Config=ndpdc.Config, plan=ndpdc.plan, run=run))
    with pytest.warns(RuntimeWarning, match="the fit diverged"):
        out = distil(tiny("ndpdc"), quiet=True)
    assert verify(out).ok


@pytest.mark.parametrize("lost", ["key", "seed", "ledger"])
def test_checkpoints_of_another_key_or_ledger_are_not_used(
    lost: str, tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images fitted to releases that another run or ledger was charged for must not slip into this certificate."""
    config = tiny("ndpdc", budget=9.0, ledger=str(tmp_path / "a.jsonl"))
    if lost == "seed":
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "write_bundle", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                distil(config, quiet=True, insecure_seed=1)
    else:
        stopped(config, monkeypatch)
    assert list((tmp_path / "out.state" / "work").rglob("ndpdc.safetensors"))
    if lost == "key":
        shutil.rmtree(tmp_path / "out.state" / "vault")
    if lost == "ledger":
        config = dataclasses.replace(config, ledger=str(tmp_path / "b.jsonl"))
    asked = []
    load = pipeline.FolderWorkspace.load
    monkeypatch.setattr(
        pipeline.FolderWorkspace, "load", lambda self, name: asked.append(load(self, name)) or asked[-1]
    )
    out = distil(config, quiet=True)
    assert asked == [None]
    assert verify(out).ok


def test_a_method_that_asks_for_other_than_it_planned(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    ndpdc = METHODS["ndpdc"]

    def run(config: Any, public: Any, private: Any, plan: Any, workspace: Any) -> Any:
        private.reserve(plan[0].query, 1)  # one too many
        return ndpdc.run(config, public, private, plan, workspace)

    liar = SimpleNamespace(Config=ndpdc.Config, plan=ndpdc.plan, run=run)
    monkeypatch.setitem(METHODS, "ndpdc", liar)
    with pytest.raises(LedgerError, match="other releases than it planned"):
        distil(tiny("ndpdc", budget=9.0), quiet=True)
    assert not (tmp_path / "out").exists()
    assert len(ledgers.parts(ledgers.parse(the_ledger(tmp_path).read_bytes()))) == 2  # what was charged stays charged


def test_noise_from_a_seed_says_so(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    out = distil(tiny(), quiet=True, insecure_seed=1)
    verdict = verify(out)
    assert not verdict.ok
    assert verdict.guarantee is None
    assert any("NOT PRIVATE" in problem for problem in verdict.problems)
    for name in ("README.md", "report.html"):
        assert "NOT PRIVATE" in (out / name).read_text()
    assert json.loads((out / "certificate.json").read_text())["guarantee"]["basis"] == "none"
    other = distil(tiny(out=str(tmp_path / "out2"), ledger=str(tmp_path / "l")), quiet=True, insecure_seed=1)
    same = [(f / "dataset" / "synthetic.safetensors").read_bytes() for f in (out, other)]
    # The noise is bound to the ledger line too, and another ledger has another name in its first line.
    assert same[0] != same[1]


def test_neighbours_are_told_apart_by_released_values_only(
    tmp_path: Path, tiny: Callable[..., RunConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    """N and N + 1 records, the same seed for the noise, a ledger of the same name: the same bytes in the ledger and on the terminal.

    By design random, and therefore fixed here: the run's name and key (by the seed) and the data set's name in the ledger's first line.
    """
    seen = []
    for n in (N, N + 1):
        place = tmp_path / str(n)
        data = save(place / "private.npz", n)
        Ledger.open(place / "ledger.jsonl", cap=(1.0, 1e-5), data="toy").close()
        config = tiny(data=str(data), out=str(place / "out"), ledger=str(place / "ledger.jsonl"))
        distil(config, insecure_seed=5)
        printed, logged = capfd.readouterr()
        times = re.sub(r"\d+:\d\d:\d\d", "TIME", logged)
        files = {name: raw for name, raw in listing(place).items() if name not in ("private.npz", "ledger.jsonl")}
        seen.append(((place / "ledger.jsonl").read_bytes(), printed, times, sorted(files), files["out/config.toml"]))
        certificate = json.loads(files["out/certificate.json"])
        certificate.pop("checks")  # rounding of record functions that were made from released values
        certificate["release"].pop("files")  # hashes of released values
        seen[-1] += (certificate,)
    assert "feature means" in seen[0][2]
    assert seen[0] == seen[1]
    images = [(tmp_path / str(n) / "out/dataset/synthetic.safetensors").read_bytes() for n in (N, N + 1)]
    assert len(images[0]) == len(images[1])
    assert images[0] != images[1]  # the one thing that may differ


def test_the_plan_reads_no_data(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load_images", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(planning, "load_images", lambda *_, **__: 1 / 0)
    for method in METHODS:
        plan = make_plan(tiny(method), (1, 12, 12), ("a", "b", "c"))
        assert 0.998 < plan.epsilon <= 1.0 < plan.epsilon_replace_one
        assert hashlib.sha256(plan.toml.encode()).hexdigest() == pipeline.config_hash(plan.toml)


def test_a_finished_run_whose_state_was_not_removed(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "forget", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distil(tiny(), quiet=True)
    key = tmp_path / "out.state" / "vault" / "key"
    assert key.exists()
    before = listing(tmp_path / "out"), the_ledger(tmp_path).read_bytes()
    overwritten = []
    erase = Vault.erase
    monkeypatch.setattr(Vault, "erase", lambda self: overwritten.append(self.folder / "key") or erase(self))
    distil(tiny(), quiet=True)
    assert overwritten == [key]
    assert not (tmp_path / "out.state").exists()
    assert (listing(tmp_path / "out"), the_ledger(tmp_path).read_bytes()) == before


def test_a_run_that_cannot_begin_leaves_no_cap(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing binds the next run: a first one of ε = 3 needs no --budget."""
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "begin", lambda *_: (_ for _ in ()).throw(ConfigError("cannot be written")))
        with pytest.raises(ConfigError, match="cannot be written"):
            distil(tiny("ndpdc"), quiet=True)
    assert the_ledger(tmp_path).read_bytes() == b""
    distil(tiny("ndpdc", epsilon=3.0), quiet=True)
    assert Ledger.shown(the_ledger(tmp_path), the_ledger(tmp_path).read_bytes()).cap == (3.0, 1e-5)


def test_a_dry_run_of_a_stopped_run_sees_what_others_have_spent_since(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("ndpdc")
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "start", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distil(config, quiet=True)
    assert (tmp_path / "out.state").exists()
    distil(tiny("ndpdc", out=str(tmp_path / "other")), quiet=True)
    source = sources.open_source(config)
    with pytest.raises(BudgetError, match="has spent ε = 1 of its cap 1"):
        pipeline.outlook(config, make_plan(config, source.image_shape, source.class_names), source)
    with pytest.raises(BudgetError, match="has spent ε = 1 of its cap 1"):
        distil(config, quiet=True)


def test_a_dry_run_says_what_a_run_would_meet(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place, and what its ledger has left: without a change to either."""

    def outlook(**changes: Any) -> list[str]:
        config = tiny("ndpdc", **changes)
        source = sources.open_source(config)
        plan = make_plan(config, source.image_shape, source.class_names)
        before = listing(tmp_path)
        try:
            return pipeline.outlook(config, plan, source)
        finally:
            assert listing(tmp_path) == before

    assert outlook() == ["ledger: a new one would begin, with a cap of ε = 1 at δ = 1e-05"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_result", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distil(tiny("ndpdc"), quiet=True)
    (stopped, spent) = outlook()
    assert stopped == f"release: the run that was stopped in {tmp_path}/out.state would go on"
    assert re.fullmatch(
        r"ledger: .*/home/ledgers/.*\.jsonl has spent ε = 1 of 1 at δ = 1e-05; this run would make it 1", spent
    )
    with pytest.raises(ConfigError, match="belongs to a run with other settings"):
        outlook(seed=1)
    distil(tiny("ndpdc"), quiet=True)
    assert outlook() == [f"release: {tmp_path}/out is there already; nothing would be charged"]
    with pytest.raises(ReleaseError, match="exists and holds something else"):
        outlook(seed=1)
    other = str(tmp_path / "other")
    with pytest.raises(BudgetError, match="has spent ε = 1 of its cap 1"):
        outlook(seed=1, out=other)
    (left,) = outlook(seed=1, out=other, budget=3.0)
    assert re.fullmatch(r"ledger: .* has spent ε = 1 of 3 at δ = 1e-05; this run would make it 1\.\d+", left)
    assert outlook(seed=1, out=other, ledger=other + ".jsonl") == [
        "ledger: a new one would begin, with a cap of ε = 1 at δ = 1e-05"
    ]
    for torn in (b"", b'{"cap_delta":"1e'):  # a crash within the first line, which the run would mend
        (tmp_path / "torn.jsonl").write_bytes(torn)
        assert outlook(out=other, ledger=str(tmp_path / "torn.jsonl")) == [
            "ledger: a new one would begin, with a cap of ε = 1 at δ = 1e-05"
        ]
    (tmp_path / "other.state").mkdir()  # nothing that a run left
    assert outlook(seed=1, out=other, budget=3.0) == [left]
    with Ledger.open(tmp_path / "ids.jsonl", cap=(3.0, 1e-5), unit="id") as ids:
        ids.start("r", "m", "0" * 64)
    with pytest.raises(LedgerError, match="protects each id"):
        outlook(out=other, ledger=str(tmp_path / "ids.jsonl"))
    (tmp_path / "ids.jsonl").write_bytes(b"no ledger")
    with pytest.raises(LedgerError, match=r"ids\.jsonl: not one of our ledgers"):
        outlook(out=other, ledger=str(tmp_path / "ids.jsonl"))


ALIKE: dict[str, tuple[type[RunConfig], dict[str, Any]]] = {
    "joint": (RunConfig, {"settings": TINY["joint"], "resize": 8, "value_low": 0.0, "value_high": 2.0}),
    "ndpdc": (RunConfig, {"settings": TINY["ndpdc"]}),
    "teacher": (ModelConfig, {"method": "", "settings": {"teacher_dims": 4, "teacher_steps": 2}}),
    "votes": (ModelConfig, {"method": "", "shards": 5, "id_column": "person", "settings": {"queries": 20}}),
    "dpsad": (DiffusionConfig, {"expected_records": 60, "unlabelled": True}),
    "shards": (DiffusionConfig, {"expected_records": 60, "settings": {"models": 3}}),
}


@pytest.mark.parametrize("method", ALIKE)
def test_a_release_s_configuration_makes_another_like_it(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the data anew, it resolves to itself: nothing that follows from it has to be taken out by hand."""
    monkeypatch.setattr(planning, "N_PROCEDURAL", 300)
    kind, facts = ALIKE[method]
    config = kind(**{"data": "x.npz", "epsilon": 3.0, "per_class": 2, "seed": 7, "method": method, **facts})
    plan = make_plan(config, (1, 8, 8), ("a", "b"))
    (tmp_path / "config.toml").write_text(plan.toml)
    more = {"expected_records": 60} if method == "shards" else {}  # which have no use for it, and do not keep it
    again = read(tmp_path / "config.toml", {"data": "other.npz", "out": "other", **more}, [], kind)
    assert (again.data, again.out) == ("other.npz", "other")
    assert make_plan(again, (1, 8, 8), ("a", "b")).toml == plan.toml
    changed = read(tmp_path / "config.toml", {"data": "other.npz", "epsilon": 1.0, **more}, [], kind)
    assert make_plan(changed, (1, 8, 8), ("a", "b")).noise_multiplier > plan.noise_multiplier


def test_a_refused_run_changes_no_cap_and_begins_no_ledger(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    distil(tiny("ndpdc", ledger=str(ledger), budget=9.0), quiet=True)
    before = ledger.read_bytes()
    for budget in (1.0, 1.2):
        with pytest.raises(BudgetError, match=f"of its cap {budget:g}"):
            distil(tiny("ndpdc", ledger=str(ledger), out=str(tmp_path / "b"), seed=1, budget=budget), quiet=True)
        assert ledger.read_bytes() == before
    distil(tiny("ndpdc", ledger=str(ledger), out=str(tmp_path / "b"), seed=1), quiet=True)  # the cap of before
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(LedgerError, match="set DPDISTILL_HOME"):
        distil(tiny("ndpdc", ledger=str(tmp_path / "c.jsonl"), out=str(tmp_path / "c"), seed=2), quiet=True)
    assert not (tmp_path / "c.jsonl").exists()


@pytest.mark.parametrize(
    ("released", "found", "wanted"),
    [(("a", "b", "c"), 3, [0, 1, 2]), (("1", "2", "3"), 3, [0, 1, 2]), (("0", "1", "2"), 2, [0, 1, 0])],
)
def test_numbered_test_images_are_of_the_release_s_classes(
    released: tuple[str, ...], found: int, wanted: list[int], tmp_path: Path
) -> None:
    np.savez(tmp_path / "t.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array(wanted))
    config = RunConfig(data=str(tmp_path / "t.npz"), classes=found)
    assert sources.load_test(config, released, (1, 8, 8)).labels.tolist() == wanted


def test_test_images_of_more_classes_than_the_release_has(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    with pytest.raises(InputError, match="has a class '0' that the release has not"):
        sources.load_test(RunConfig(data=str(tmp_path / "t.npz"), classes=4), ("1", "2", "3"), (1, 8, 8))
