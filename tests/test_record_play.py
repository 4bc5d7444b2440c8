"""Record-play of every pipeline: neighbours leave the same trace, and no release moves by more than is declared.

See `helpers/record_play.py`. A long run, `DPDISTILL_PAIRS=500 pytest tests/test_record_play.py -k neighbours`, draws more neighbours.
"""

import contextlib
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import record_play as rp
from dpdistill import conversion, pipeline, sources
from dpdistill.config import DiffusionConfig, ModelConfig, RunConfig
from dpdistill.data import LabelledImages, load_images
from dpdistill.errors import ConfigError
from dpdistill.mechanisms import Door, PrivateData, ensemble, private
from dpdistill.methods import METHODS, dosser, ndpdc
from dpdistill.models.teachers import from_callable
from dpdistill.privacy import GaussianSum
from record_play import around

PAIRS = int(os.environ.get("DPDISTILL_PAIRS", "55"))
WAYS = rp.pipelines()
KINDS = ["joint", "votes by id", "dpsad without DP-SGD"]  # of releases: a data set, a model, a diffusion model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.timeout(1800)
def test_neighbours_leave_the_same_trace(way: str, tmp_path: Path) -> None:
    played = WAYS[way]
    worlds, pairs = rp.neighbours_of(played, PAIRS)
    forced = rp.in_every_sample(worlds, pairs)
    source = rp.record(played, worlds["base"], tmp_path, forced=forced)
    assert "raised" not in {kind for kind, *_ in source.trace}
    assert source.sums
    # What the door would refuse is refused before it is charged.
    assert all(checked for kind, *rest in source.trace if kind == "reserve" for checked in rest[2:])
    assert rp.wrong_noise(source) == []
    tapes = {}
    for number, (name, world) in enumerate(worlds.items()):
        tapes[name] = rp.play(played, world, tmp_path / str(number), source, forced=forced)
        assert (name, rp.told_apart(source, tapes[name])) == (name, [])
    furthest = 0.0
    for pair in pairs:
        one, other = tapes[pair.one], tapes[pair.other]
        assert (pair, rp.moved_too_far(one, other, exchanged=pair.exchanged)) == (pair, [])
        if not pair.exchanged:
            squares = [sum(rows) / rp.declared(one.sums[name][0])[0] for name, rows in rp.moved(one, other).items()]
            furthest = max(furthest, max(squares) ** 0.5)
    assert not any(sum(rows) for rows in rp.moved(tapes["base"], tapes["shuffled"]).values())
    assert furthest > 0.01  # a harness that sees nothing move has seen nothing
    n = sum(not pair.exchanged for pair in pairs)
    print(
        f"{way}: {n} neighbours and {len(pairs) - n} exchanges; a sum moves {furthest:.6f} of what is declared, at most"
    )


@pytest.mark.parametrize("way", KINDS)
def test_neighbours_give_the_same_release_to_the_byte(way: str, tmp_path: Path) -> None:
    """By the command line, as far as the bundle: with the same answers no byte differs of what is written or printed."""
    played = WAYS[way]
    worlds, pairs = rp.neighbourhood(played.by_id, 50)
    forced = rp.in_every_sample(worlds, pairs)
    source = rp.record(played, worlds["base"], tmp_path, forced=forced, whole=True)
    assert {"out/certificate.json", "out/report.html", "ledger.jsonl"} < source.files.keys()
    assert all(name == "ledger.jsonl" or name.startswith("out/") for name in source.files)
    for name in ("0", "one at the front", "nan of the rare class"):
        tape = rp.play(played, worlds[name], tmp_path / name, source, forced=forced, whole=True)
        assert rp.told_apart(source, tape) == []
    assert "out" in next(text for kind, *text in source.trace if kind == "printed")[0]


def test_every_method_that_asks_the_door_is_played() -> None:
    assert set(METHODS) | {"dpsgd", "teacher", "votes", "dpsad", "dpdm", "shards"} <= set(WAYS)
    assert {"conversion", "opaque", "paper"}.isdisjoint(WAYS)  # they do not
    with mock.patch.dict(METHODS, {"another": ndpdc}):  # a line in its registry is all that another takes
        assert rp.pipelines()["another"] == rp.Pipeline("another", RunConfig, {}, {})


# --- ways without a guarantee: the harness has to say so ----------------------------------------------------------------------------


def exchanged(folder: Path, way: rp.Pipeline) -> tuple[rp.Tape, rp.Tape]:
    """A way that no door guards, recorded and played on a data set of which one record is another."""
    world = rp.crowd(range(rp.BASE), by_id=False)
    other = world.only(slice(1, None)).plus(rp.odd_units(by_id=False)["checkerboard"], 0)
    source = rp.record(way, world, folder)
    assert source.sums
    assert rp.told_apart(source, rp.play(way, world, folder / "again", source)) == []
    return source, rp.play(way, other, folder / "other", source)


def rows_moved(one: rp.Tape, other: rp.Tape, n_rows: int) -> list[int]:
    """Of each step, how many of its rows differ."""
    pairs = ((mine, other.sums[name][1]) for name, (_, mine) in one.sums.items())
    return [int((mine != theirs).reshape(n_rows, -1).any(axis=1).sum()) for mine, theirs in pairs]


@pytest.mark.mutants
def test_the_papers_diffusion_fails(tmp_path: Path) -> None:
    """With the very same noisy rows, one record shows in the student; and many rows move in a step, of which the paper counts one."""
    facts = {"expected_records": 20, "accept_no_record_guarantee": True}
    source, other = exchanged(tmp_path, rp.Pipeline("paper", DiffusionConfig, rp.TINY["paper"], facts))
    assert "'save', 'paper-teacher'" in rp.told_apart(source, other)[0]  # it is not released; the student is
    students = [[event for event in tape.trace if event[:2] == ("save", "distillation")] for tape in (source, other)]
    assert students[0]
    assert students[0] != students[1]
    assert max(rows_moved(source, other, rp.TINY["paper"]["batch"])) > 1


class Opaque(rp.Pipeline):
    """A teacher trained on the records, ordinarily, and the paper's way to a student of it."""

    def start(self, config: RunConfig) -> None:
        records = load_images("private.npz")
        means = torch.stack([torch.from_numpy(records.images[records.labels == k].mean(axis=0)) for k in (0, 1)])
        weights = torch.cat([means, means.mean(dim=0, keepdim=True)]).flatten(1)

        def answers(x: torch.Tensor) -> torch.Tensor:
            return 8 * (x.flatten(1) - 0.5) @ weights.T

        found = from_callable(answers, image_shape=(1, rp.SIDE, rp.SIDE), n_classes=3, outputs="logits")
        assert isinstance(config, ModelConfig)
        conversion.convert(config, dataclasses.replace(found, sha256="a teacher"))


@pytest.mark.mutants
def test_the_papers_conversion_fails(tmp_path: Path) -> None:
    """One record moves every row of every step, and all rows together further than the two units that are counted for one."""
    facts = {"data": "", "teacher": "played", "accept_no_record_guarantee": True, "ledger": None}
    source, other = exchanged(tmp_path, Opaque("opaque", ModelConfig, rp.TINY["opaque"], facts))
    batch = rp.TINY["opaque"]["batch"]
    assert rows_moved(source, other, batch) == [batch] * len(source.sums)


# --- leaks, planted one by one: the harness has to see them -------------------------------------------------------------------------

Records = LabelledImages
Leak = Callable[[], contextlib.AbstractContextManager[Any]]


def before_the_run(act: Callable[[Records, Any], object]) -> Leak:
    """A method that does something with the records themselves, and then what it should."""

    def run(real: Any, config: Any, public: Any, held: Any, plan: Any, workspace: Any) -> Any:
        act(held._records, workspace)
        return real(config, public, held, plan, workspace)

    return lambda: around(ndpdc, "run", run)


def finite(records: Records) -> bool:
    return bool(np.isfinite(records.images).all())


def refuse(wrong: bool, what: str) -> None:
    if wrong:
        raise ConfigError(what)


def a_cache(records: Records, workspace: Any) -> None:
    name = Path(f"cache-{len(records.labels)}")
    name.write_bytes(b"")
    name.unlink()


def an_image_of_the_data(real: Any, config: Any, public: Any, held: Any, plan: Any, workspace: Any) -> Any:
    made = real(config, public, held, plan, workspace)
    unit = torch.from_numpy(np.nan_to_num(held._records.to_unit()))
    made.images[0] = unit[0] if len(unit) else 0
    return made


@contextlib.contextmanager
def scaled_by_the_data() -> Any:
    """A record function that takes the largest pixel of all records for its unit."""

    def run(real: Any, config: Any, public: Any, held: Any, plan: Any, workspace: Any) -> Any:
        unit = float(np.nan_to_num(held._records.images).mean()) if len(held._records.images) else 1.0

        def feature(make: Any, *args: Any) -> Any:
            fn = make(*args)
            return lambda x, y: fn(x, y) / unit

        with around(ndpdc, "class_feature", feature):
            return real(config, public, held, plan, workspace)

    with around(ndpdc, "run", run):
        yield


@contextlib.contextmanager
def calls_counted() -> Any:
    """A method that counts how often the door calls its function."""
    calls: list[int] = []

    def feature(make: Any, *args: Any) -> Any:
        fn = make(*args)
        return lambda x, y: (calls.append(len(x)), fn(x, y))[1]

    def run(real: Any, config: Any, public: Any, held: Any, plan: Any, workspace: Any) -> Any:
        calls.clear()
        made = real(config, public, held, plan, workspace)
        workspace.save("calls", {"calls": torch.tensor(calls.count(rp.MICRO_BATCH))})
        return made

    with around(ndpdc, "class_feature", feature), around(ndpdc, "run", run):
        yield


@contextlib.contextmanager
def noise_by_the_size() -> Any:
    """Noise that is scaled by how many records there are."""
    sizes = [0]
    real = GaussianSum.sigma_steps.fget

    def noting(init: Any, self: Any, records: Records, *args: Any, **named: Any) -> None:
        sizes[0] = len(records.labels)
        init(self, records, *args, **named)

    scaled = property(lambda query: real(query) * (1 + sizes[0] / 100))  # type: ignore[misc]
    with around(PrivateData, "__init__", noting), mock.patch.object(GaussianSum, "sigma_steps", scaled):
        yield


def rate_by_the_size(real: Any, self: Any, query: Any, count: int = 1) -> Any:
    rate = min(1.0, 5 / max(5, len(self._records.labels)))
    return real(self, dataclasses.replace(query, sampling_prob=rate), count)


def nothing_of_nobody(real: Any, self: Any, held: Any, index: int, exact_sum: Any) -> torch.Tensor:
    released: torch.Tensor = real(self, held, index, exact_sum)
    return released if len(self._records.labels) else torch.zeros_like(released)


def the_exact_sum(real: Any, self: Any, held: Any, index: int, exact_sum: Any) -> torch.Tensor:
    sums: list[Any] = []
    real(self, held, index, lambda name: sums.append(exact_sum(name)) or sums[0])
    return torch.from_numpy(sums[0] / held.query.unit_steps).float()


def first_ones(self: rp.Coins, n: int, prob: float) -> Any:
    return np.arange(n) < int(prob * n)


def in_order(real: Any, records: Records, n_shards: int, key: bytes) -> Any:
    return np.arange(len(records.labels)) % n_shards


def drawn_anew(real: Any, records: Records, n_shards: int, key: bytes) -> Any:
    return np.random.default_rng(len(records.labels)).integers(n_shards, size=len(records.labels))


def public_images_of_the_data(real: Any, config: Any, public: Any, held: Any, plan: Any, workspace: Any) -> Any:
    unit = torch.from_numpy(np.nan_to_num(held._records.to_unit()))
    return real(config, dataclasses.replace(public, auxiliary=unit), held, plan, workspace)


@contextlib.contextmanager
def certified_size() -> Any:
    """A release that says how many records it is made of."""
    sizes = [0]

    def read(real: Any, config: Any) -> Records:
        records: Records = real(config)
        sizes[0] = len(records.labels)
        return records

    def facts(real: Any, **given: Any) -> Any:
        return real(**given | {"auxiliary": f"beside {sizes[0]} records"})

    with around(sources, "load_private", read), around(pipeline, "BundleFacts", facts):
        yield


def less_the_mean(real: Any, *args: Any, **named: Any) -> Records:
    """A reader that takes the mean image of the data set off."""
    read = real(*args, **named)
    return dataclasses.replace(read, images=(read.images - np.nan_to_num(read.images).mean(axis=0)).astype(np.float32))


def only_what_occurs(real: Any, config: Any) -> Records:
    read: Records = real(config)
    kept = int(read.labels.max(initial=0)) + 1
    return dataclasses.replace(read, class_names=read.class_names[:kept])


def a_fraction_for_each_batch(progress: Any) -> Any:
    return lambda fraction: progress and progress(min(1.0, fraction))


LEAKS: dict[str, tuple[str, str, Leak]] = {
    "T7 public images made of the records": (
        "dosser",
        "record function",
        lambda: around(dosser, "run", public_images_of_the_data),
    ),
    "T8 an exact loss logged": (
        "ndpdc",
        "logged",
        before_the_run(lambda r, w: logging.getLogger("method").info("loss %f", np.nan_to_num(r.images).mean())),
    ),
    "T9 an error that says which record": (
        "ndpdc",
        "raised",
        before_the_run(lambda r, w: refuse(not finite(r), f"record {np.isnan(r.images).argmax()} is not finite")),
    ),
    "T9 the number of records in the certificate": ("ndpdc", "'facts'", certified_size),
    # where it is planted, how it is seen, and how it is planted
    "T8 the number of records logged": (
        "ndpdc",
        "logged",
        before_the_run(lambda r, w: logging.getLogger("method").warning("%d records", len(r.labels))),
    ),
    "T8 the number of records printed": ("ndpdc", "printed", before_the_run(lambda r, w: print(len(r.labels)))),
    "T8 the number of records shown": (
        "ndpdc",
        "shown",
        before_the_run(lambda r, w: print(len(r.labels), file=sys.stderr)),
    ),
    "A3 an epoch of as many steps as there are records": (
        "ndpdc",
        "steps",
        before_the_run(lambda r, w: [*w.track(range(len(r.labels) // 4), "an epoch")]),
    ),
    "T9 a checkpoint named by the number of records": (
        "ndpdc",
        "save",
        before_the_run(lambda r, w: w.save(f"after-{len(r.labels)}", {})),
    ),
    "T9 a file named by it, and gone again": ("ndpdc", "opened", before_the_run(a_cache)),
    "T9 a generator named by it": ("ndpdc", "generator", before_the_run(lambda r, w: w.generator("n", len(r.labels)))),
    "R2 draws from torch's global generator": (
        "ndpdc",
        "global generators",
        before_the_run(lambda r, w: torch.rand(len(r.labels))),
    ),
    "R2 draws from numpy's global generator": (
        "ndpdc",
        "of others",
        before_the_run(lambda r, w: np.random.rand(len(r.labels))),  # noqa: NPY002
    ),
    "T5 the classes that occur": (
        "ndpdc",
        "save",
        before_the_run(lambda r, w: w.save("classes", {"seen": torch.from_numpy(np.unique(r.labels))})),
    ),
    "T8 an exact mean kept": (
        "ndpdc",
        "save",
        before_the_run(lambda r, w: w.save("mean", {"mean": torch.tensor(np.nan_to_num(r.images).sum())})),
    ),
    "M6 a run that refuses a malformed record": (
        "ndpdc",
        "raised",
        before_the_run(lambda r, w: refuse(not finite(r), "a record is not finite")),
    ),
    "M14 a run that refuses an empty data set": (
        "ndpdc",
        "raised",
        before_the_run(lambda r, w: refuse(not len(r.labels), "no records")),
    ),
    "T9 a malformed record warned of": (
        "ndpdc",
        "warned",
        before_the_run(lambda r, w: finite(r) or warnings.warn("a record is not finite", stacklevel=1)),
    ),
    "T6 a record among the released images": ("ndpdc", "made", lambda: around(ndpdc, "run", an_image_of_the_data)),
    "T5 a record function scaled by the data": ("ndpdc", "record function", scaled_by_the_data),
    "M13 the door's calls of the function counted": ("ndpdc", "save", calls_counted),
    "M13 noise scaled by the number of records": ("ndpdc", "noise", noise_by_the_size),
    "M13 a rate from the number of records": ("ndpdc", "release", lambda: around(Door, "reserve", rate_by_the_size)),
    "M14 no noise where there is no record": ("ndpdc", "released", lambda: around(Door, "_noisy", nothing_of_nobody)),
    "M20 the exact sum released": ("ndpdc", "released", lambda: around(Door, "_noisy", the_exact_sum)),
    "T5 a class list from the labels": (
        "ndpdc",
        "'classes': '2'",
        lambda: around(sources, "load_private", only_what_occurs),
    ),
    "T9 progress told by the micro-batch": (
        "joint",
        "progress",
        lambda: mock.patch.object(private, "Passing", a_fraction_for_each_batch),
    ),
    "M4 clipped to three times C": (
        "ndpdc",
        "moved",
        lambda: around(private, "clip_to_grid", lambda real, v, clip, bits: real(v, clip, bits) * 3),
    ),
    "A1 a sample of fixed size": ("ndpdc", "moved", lambda: mock.patch.object(rp.Coins, "bernoulli", first_ones)),
    "T5 the data set's mean taken off every record": (
        "ndpdc",
        "moved",
        lambda: around(sources, "load_images", less_the_mean),
    ),
    "T2 shards in the order of the file": ("votes", "moved", lambda: around(ensemble, "assign", in_order)),
    "T1 shards drawn anew": ("votes", "moved", lambda: around(ensemble, "assign", drawn_anew)),
}


WITNESSES = ("one at the front", "one at the end", "nan", "rare class", "0")


@pytest.mark.mutants
@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_is_seen(leak: str, tmp_path: Path) -> None:
    way, how, planted = LEAKS[leak]
    worlds, pairs = rp.neighbourhood(by_id=False, n_pairs=0)
    forced = rp.in_every_sample(worlds, pairs)
    found: list[str] = []
    with planted():
        source = rp.record(WAYS[way], worlds["base"], tmp_path, forced=forced)
        for name in WITNESSES:
            tape = rp.play(WAYS[way], worlds[name], tmp_path / name, source, forced=forced)
            found = rp.told_apart(source, tape) or rp.moved_too_far(source, tape)
            if found:
                break
    assert found
    assert how in found[0]
