"""Sums of rank-one vectors: a record more or less moves them by C and no further, in exact integers, and they are the door's own sums.

B records, D features, K rows of the left factor, C clip_norm, k grid_bits. Left functions here are exact in float32 (few bits, whole
weights), so that what may differ is the mechanism and not the arithmetic of a test.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from dpdistill.data import stored
from dpdistill.data.images import LabelledImages
from dpdistill.errors import BudgetError, ConfigError, LedgerError, RecordwiseError
from dpdistill.mechanisms import PrivateData, Vault, private
from dpdistill.mechanisms import features as features_module
from dpdistill.mechanisms.clipping import clip_left, unit_grid
from dpdistill.mechanisms.features import PrivateFeatures
from dpdistill.mechanisms.private import Reservation
from dpdistill.privacy import GaussianSum, Ledger, accounting
from dpdistill.privacy import ledger as ledgers
from several import OneOfTwo

K, D, GRID = 3, 16, 28
C = 2**GRID  # in grid steps
Door = Callable[..., PrivateData]
Records = Callable[..., LabelledImages]
WILD = [math.nan, math.inf, -math.inf, 1e38, -3e38, 1e-45, 0.0, -0.0, 1e-38, 1.0, 1e300, 5e-324]


def query(**change: Any) -> GaussianSum:
    return GaussianSum(**{"name": "rank-one", "dim": K * D, "noise_multiplier": 50.0, "grid_bits": GRID} | change)


def pixels(x: Tensor) -> Tensor:
    return x.flatten(1)


def short(features: Tensor, y: Tensor) -> Tensor:
    """Left factors of norm below 1, that depend on the feature and the label by exact arithmetic."""
    sign = torch.where(features[:, :K] > 0, 0.25, -0.25)
    return sign + 0.25 * torch.nn.functional.one_hot(y, K)


def long(features: Tensor, y: Tensor) -> Tensor:
    return short(features, y) * 1e6 + 3


def exact(values: Any) -> np.ndarray:
    return np.array(values).astype(np.int64).astype(object)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "rounded_gaussian", lambda n, sigma, stream: np.zeros(n, np.int64))


class NoLedger:
    lines: list[Any] = []  # noqa: RUF012


def total(
    records: LabelledImages,
    left: Callable[[Tensor, Tensor], Tensor],
    fn: Callable[[Tensor], Tensor] = pixels,
    *,
    micro_batch: int = 4,
    dim: int = D,
    **change: Any,
) -> np.ndarray:
    """The clean sum [K, D] in grid steps, as Python's integers: noise and ledger play no part."""
    handle = PrivateFeatures(unledgered(records, micro_batch=micro_batch), fn, dim)
    found = handle._exact_sum(query(**{"dim": K * dim} | change), left, "name")
    assert (found.shape, found.dtype) == ((1, K * dim), np.int64)
    return exact(found).reshape(K, dim)


def unledgered(records: LabelledImages, **facts: Any) -> PrivateData:
    """Without a ledger: nothing can be released."""
    return PrivateData(records, NoLedger(), Vault(Path("/nowhere"), "run", b"k" * 32, False), **facts)  # type: ignore[arg-type]


def with_record(records: LabelledImages, image: np.ndarray, label: int, place: int | None = None) -> LabelledImages:
    """The same data with one record more, at the end or elsewhere."""
    at = len(records.labels) if place is None else place
    images = np.insert(records.images, at, image.astype(records.images.dtype), axis=0)
    more = LabelledImages(
        images=images, labels=np.insert(records.labels, at, 0), class_names=records.class_names, source="toy"
    )
    more.labels[at] = label
    return more


RNG = np.random.default_rng(3)
NEIGHBOURS = {
    "random": (RNG.random((1, 4, 4)), 1),
    "nan": (np.full((1, 4, 4), np.nan), 1),
    "one nan": (np.where(np.arange(16).reshape(1, 4, 4) == 3, np.nan, 0.5), 1),
    "inf": (np.full((1, 4, 4), np.inf), 0),
    "1e38": (np.full((1, 4, 4), 1e38), 2),
    "subnormal": (np.full((1, 4, 4), 1e-45), 2),
    "grey": (np.full((1, 4, 4), 0.5), 0),  # a feature of length 0
    "zero": (np.zeros((1, 4, 4)), 0),
    "label too big": (RNG.random((1, 4, 4)), K),
    "label negative": (RNG.random((1, 4, 4)), -1),
}
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels": pixels,
    "huge": lambda x: x.flatten(1) * 1e38,
    "bursting": lambda x: (x.flatten(1) * 1e3).exp() * 1e38,  # infinity and zero
    "sign": lambda x: x.flatten(1).sign(),
    "one-hot": lambda x: (x.flatten(1) == x.flatten(1).amax(dim=1, keepdim=True)).float(),
    "nan": lambda x: x.flatten(1) / 0,
}
LEFTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "short": short,
    "long": long,
    "bursting": lambda f, y: short(f, y) * 1e38 * 1e38,
    "nan": lambda f, y: torch.where(f[:, :K] > 0.2, math.nan, 1.0),
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("place", [None, 0, 5])
def test_one_record_more_moves_the_sum_by_at_most_c(neighbour: str, place: int | None, toy_records: Records) -> None:
    base = toy_records(11, K, dtype="float32")
    more = with_record(base, *NEIGHBOURS[neighbour], place)
    for fn in FEATURES.values():
        for left in LEFTS.values():
            for clip_norm in (0.5, 1e-30, 1e30):
                moved = total(more, left, fn, clip_norm=clip_norm) - total(base, left, fn, clip_norm=clip_norm)
                assert (moved**2).sum() <= C**2
                if "nan" in neighbour or "inf" in neighbour or "label" in neighbour:
                    assert not moved.any()


@settings(max_examples=80)
@given(
    data=st.data(),
    n=st.integers(0, 9),
    q=st.sampled_from([1.0, 0.3]),
    grid_bits=st.sampled_from([22, 24, 28, 30]),
    factor=st.sampled_from([0.01, 1.0, 1e20]),
)
def test_any_neighbour(data: st.DataObject, n: int, q: float, grid_bits: int, factor: float) -> None:
    """Add-or-remove: at most C. Exchange: at most 2C."""
    value = st.one_of(st.sampled_from([math.nan, math.inf, 1e30, 0.0, 1.0, 1e-45]), st.floats(0, 1, width=32))
    image = np.array(data.draw(st.lists(value, min_size=16, max_size=16)), np.float32).reshape(1, 4, 4)
    label, rng = data.draw(st.integers(-1, K)), np.random.default_rng(n)
    base = LabelledImages(
        images=rng.random((n, 1, 4, 4), np.float32),
        labels=rng.integers(0, K, n),
        class_names=("a", "b", "c"),
        source="toy",
    )

    def left(features: Tensor, y: Tensor) -> Tensor:
        return short(features, y) * factor

    facts = {"sampling_prob": q, "grid_bits": grid_bits}
    before = total(base, left, **facts)
    moved = total(with_record(base, image, label), left, **facts) - before
    assert (moved**2).sum() <= 4**grid_bits
    if n:
        other = LabelledImages(
            images=base.images.copy(), labels=base.labels.copy(), class_names=base.class_names, source="toy"
        )
        other.images[n // 2], other.labels[n // 2] = image, label
        assert ((total(other, left, **facts) - before) ** 2).sum() <= 4 * 4**grid_bits


def test_a_duplicate_moves_it_as_much_again(toy_records: Records) -> None:
    base = toy_records(8, K, dtype="float32")
    once = with_record(base, base.images[0], int(base.labels[0]))
    twice = with_record(once, base.images[0], int(base.labels[0]))
    first, second = total(once, long) - total(base, long), total(twice, long) - total(once, long)
    assert (first == second).all()
    assert 0 < (first**2).sum() <= C**2


@pytest.mark.parametrize("grid_bits", [24, 28, 30])
def test_a_long_gradient_keeps_its_length(grid_bits: int, toy_records: Records) -> None:
    empty = toy_records(0, K, dtype="float32")
    for clip_norm in (1e-9, 0.5, 7.0, 1e9):
        for seed in range(20):
            image = np.random.default_rng(seed).random((1, 4, 4))
            grown = total(
                with_record(empty, image, 1), lambda f, y: long(f, y) * 1e9, clip_norm=clip_norm, grid_bits=grid_bits
            )
            assert (0.99 * 2**grid_bits) ** 2 <= (grown**2).sum() <= 4**grid_bits


_values = st.one_of(st.sampled_from(WILD), st.floats(-10, 10), st.floats(allow_nan=True, allow_infinity=True))


@settings(max_examples=200)
@given(
    left=hnp.arrays(np.float64, (6, 5), elements=_values),
    right=hnp.arrays(np.float64, (6, 9), elements=_values),
    clip_norm=st.sampled_from([1e-30, 0.01, 1.0, 3.7, 1e30]),
    k=st.integers(8, 30),
)
def test_every_product_is_within_the_norm_exactly(
    left: np.ndarray, right: np.ndarray, clip_norm: float, k: int
) -> None:
    with np.errstate(over="ignore"):
        for kind in (np.float64, np.float32):
            unit = unit_grid(torch.from_numpy(right.astype(kind)))
            rows = clip_left(torch.from_numpy(left.astype(kind)), unit.double(), clip_norm, k)
            assert unit.dtype == torch.int16
            assert (rows == rows.round()).all()
            for a, b in zip(exact(rows.numpy()), exact(unit.numpy()), strict=True):
                assert (a**2).sum() * (b**2).sum() <= 4**k
            assert not rows[~torch.isfinite(torch.from_numpy(left.astype(kind))).all(dim=1)].any()
            assert not unit[~torch.isfinite(torch.from_numpy(right.astype(kind))).all(dim=1)].any()


@pytest.mark.parametrize("dim", [1, 2, 500, 501, 20_000])
def test_a_right_factor_has_norm_one(dim: int) -> None:
    rows = torch.randn(5, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e30
    rows[1:3] = torch.tensor([1e-320, 1e300], dtype=torch.float64)[:, None]
    norms = unit_grid(rows).double().norm(dim=1) / 2**14
    assert float((norms - 1).abs().max()) < 2**-14 * math.sqrt(dim) / 2 + 1e-9


@pytest.mark.parametrize("clip_norm", [0.3, 100.0])
@pytest.mark.usefixtures("silent")
def test_it_is_the_generic_sum_of_flattened_products(clip_norm: float, open_door: Door, toy_records: Records) -> None:
    """The same records, the same function, by the door's own way: up to the rounding of both grids."""
    records = toy_records(13, K)
    generic = query(grid_bits=24, clip_norm=clip_norm)

    def flattened(x: Tensor, y: Tensor) -> Tensor:
        unit = x.flatten(1).double() / x.flatten(1).double().norm(dim=1, keepdim=True).clamp_min(1e-30)
        return (short(unit, y).double()[:, :, None] * unit[:, None, :]).flatten(1)

    expected = open_door(records, "generic").release(generic, flattened).view(K, D)
    door = open_door(records, "fast")
    seen = door.features(pixels, D).release_reserved(door.reserve(query(clip_norm=clip_norm)), 0, short)
    assert seen.shape == (K, D)
    assert float(expected.norm()) > min(0.3 * clip_norm, 1.0)
    assert float((seen - expected).abs().max()) < 13 * 2**-13


@pytest.mark.parametrize("dim", [16, 13])
def test_micro_batch_and_order_change_no_byte(dim: int, toy_records: Records) -> None:
    records = toy_records(29, K)
    order = np.random.default_rng(0).permutation(29)
    shuffled = LabelledImages(
        images=records.images[order], labels=records.labels[order], class_names=records.class_names, source="toy"
    )

    def fn(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :dim].contiguous()

    expected = total(records, short, fn, dim=dim)
    for size in (1, 2, 5, 28, 29, 30, 256):
        assert (total(records, short, fn, dim=dim, micro_batch=size) == expected).all()
    assert (total(shuffled, short, fn, dim=dim) == expected).all()


def test_a_batch_of_a_sum_holds_no_more_than_is_exact(toy_records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    records = toy_records(29, K)
    expected = total(records, short)
    monkeypatch.setattr(features_module, "MAX_BATCH", 10)
    assert PrivateFeatures(unledgered(records, micro_batch=4), pixels, D)._size == 8
    assert (total(records, short) == expected).all()


def test_features_that_do_not_fit_in_memory_go_to_the_folder_that_was_named(
    toy_records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = toy_records(29, K)
    expected = total(records, short)
    monkeypatch.setattr(stored, "MEMORY_BYTES", 100)
    handle = PrivateFeatures(unledgered(records, scratch=str(tmp_path)), pixels, D)
    rows = handle._features()
    assert isinstance(rows, stored.StoredArray)
    assert (rows._name, rows.dtype) == (str(tmp_path), np.int16)
    assert (exact(handle._exact_sum(query(), short, "name")).reshape(K, D) == expected).all()


def malformed(n: int) -> tuple[LabelledImages, Tensor]:
    """n float images in another range than [0, 1], the second and the fourth malformed; and as a function is to see them."""
    images = np.random.default_rng(0).random((n, 1, 4, 4)).astype(np.float32) * 8 - 3
    unit = torch.from_numpy(((images.astype(np.float64) + 3) / 4 - 1).astype(np.float32))
    records = LabelledImages(
        images=images,
        labels=np.arange(n) % K,
        class_names=("a", "b", "c"),
        source="toy",
        value_range=(-3.0, 5.0),
    )
    images[1, 0, 2, 3], records.labels[3] = math.nan, -1
    unit[[1, 3]] = 0
    return records, unit


def test_features_are_taken_once_of_images_without_the_malformed(open_door: Door) -> None:
    records, unit = malformed(9)
    told: list[float] = []
    given: list[tuple[Tensor, int]] = []
    lefts: list[tuple[Tensor, Tensor]] = []

    def fn(x: Tensor) -> Tensor:
        given.append((x.clone(), len(told)))
        return pixels(x)

    def left(features: Tensor, y: Tensor) -> Tensor:
        lefts.append((features.clone(), y.clone()))
        return short(features, y)

    door = open_door(records, micro_batch=2)
    handle, held = door.features(fn, D, progress=told.append), door.reserve(query(), 2)
    for index in (0, 1):
        handle.release_reserved(held, index, left)
    passed = [(x, n_told) for x, n_told in given if len(x) == 2]  # in the check there are one or five
    assert [n_told for _, n_told in passed] == [0, 22, 44, 66, 88]  # of 100, once for both releases
    assert told == [part / 100 for part in range(1, 101)]
    x = torch.cat([x for x, _ in passed])
    assert x.dtype == torch.float32
    assert torch.allclose(x[:9], unit, atol=1e-6)
    assert not x[[1, 3, 9]].any()
    sums = [(features, y) for features, y in lefts if len(y) == 8]
    assert len(sums) == 2 * 2  # blocks of four micro-batches
    features, y = torch.cat([sums[0][0], sums[1][0]]), torch.cat([sums[0][1], sums[1][1]])
    flat = unit.flatten(1)
    assert torch.allclose(features[:9], flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-9), atol=2.0**-14)
    assert not features[9:].any()
    good = [0, 2, 4, 5, 6, 7, 8]
    assert y[good].tolist() == records.labels[good].tolist()
    assert ((y >= 0) & (y < K)).all()


def test_a_pass_over_all_records_tosses_no_coin(toy_records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private.Door, "_coins", lambda *_: pytest.fail("tossed"))
    assert total(toy_records(8, K), short).any()


def test_features_by_themselves_are_checked_once(toy_records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function of the features may be a large network; the left factor is another one at each check."""
    dims: list[int] = []
    monkeypatch.setattr(features_module, "check_recordwise", lambda *facts: (dims.append(facts[3]), 0.0)[1])
    handle = PrivateFeatures(unledgered(toy_records(4, K)), pixels, D)
    for _ in range(3):
        handle.check(query(), short)
    assert dims == [D, K * D, K * D, K * D]


def test_nobody_hears_that_there_are_no_records(toy_records: Records) -> None:
    told: list[float] = []
    PrivateFeatures(unledgered(toy_records(0, K)), pixels, D, progress=told.append)._features()
    assert told == [part / 100 for part in range(1, 101)]


def test_features_are_computed_on_the_device_that_was_named(toy_records: Records) -> None:
    """None is here: "meta" stands for one. What it holds cannot be computed with, so the sum itself is not tried."""
    places: list[str] = []

    def fn(x: Tensor) -> Tensor:
        places.append(x.device.type)
        return torch.ones(len(x), D)

    def left(features: Tensor, y: Tensor) -> Tensor:
        places.append(y.device.type)
        return torch.ones(len(features), K)

    handle = PrivateFeatures(unledgered(toy_records(20, K), device="meta"), fn, D)
    handle.check(query(), left)
    handle._features()
    assert set(places) == {"meta"}


def test_sums_are_computed_on_the_device_that_was_named(toy_records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above: all is sent there, and the sum cannot be brought back."""
    places: list[str] = []

    def left(features: Tensor, y: Tensor) -> Tensor:
        places.extend((features.device.type, y.device.type))
        return torch.empty(len(y), K, device="meta")

    class Sum:
        """Stands for what is computed there: to import the arithmetic of "meta" takes seconds."""

        @property
        def T(self) -> "Sum":
            return self

        def to(self, _: torch.dtype) -> "Sum":
            return self

        def __rmul__(self, grid: Tensor) -> Tensor:
            return grid.float()

        def __matmul__(self, right: Tensor) -> "Sum":
            places.append(right.device.type)
            return self

        def __radd__(self, total: Tensor) -> Tensor:
            return total

    monkeypatch.setattr(features_module, "clip_left", lambda *_: Sum())
    monkeypatch.setattr(features_module, "STEP", Sum())
    records = toy_records(20, K)
    handle, on_cpu = (PrivateFeatures(unledgered(records, device=name), pixels, D) for name in ("meta", "cpu"))
    handle._rows, handle._labels, handle._own = on_cpu._features(), on_cpu._labels, on_cpu._own
    with pytest.raises(NotImplementedError, match="meta"):
        handle._exact_sum(query(), left, "name")
    assert set(places) == {"meta"}


@pytest.mark.parametrize("dim", [501, 243, 37])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_records_place_changes_no_bit_of_its_left_factor(dim: int, threads: int) -> None:
    """Rows that begin on no boundary have their last bits rounded by where they begin: one record more then moved the others' steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        weights, table = torch.randn(10, dim, generator=generator), torch.randn(257, dim, generator=generator)
        seen: dict[int, Tensor] = {}

        def left(features: Tensor, y: Tensor) -> Tensor:
            return (features @ weights.T).softmax(dim=1)[:, :K] - torch.nn.functional.one_hot(y, K).float()

        def noting(features: Tensor, y: Tensor) -> Tensor:
            result = left(features, y)
            for row, answer in zip(features, result, strict=True):
                key = hash(row.numpy().tobytes())
                assert torch.equal(seen.setdefault(key, answer), answer)
            return result

        def fn(x: Tensor) -> Tensor:
            return table[(x[:, 0, 0, 0] * 127.5 + 127.5).round().long()]

        images = np.zeros((200, 1, 4, 4), np.uint8)
        images[:, 0, 0, 0] = np.arange(200)
        labels = np.zeros(200, np.int64)
        base = LabelledImages(images=images[1:], labels=labels[1:], class_names=("a", "b", "c"), source="toy")
        more = LabelledImages(images=images, labels=labels, class_names=("a", "b", "c"), source="toy")
        moved = total(more, noting, fn, micro_batch=16, dim=dim) - total(base, noting, fn, micro_batch=16, dim=dim)
        assert 0 < (moved**2).sum() <= C**2
        assert len(seen) == 201  # the rows of zeros too
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("silent")
def test_a_sampled_sum_is_over_the_coins_alone(open_door: Door, toy_records: Records) -> None:
    records, ones = toy_records(400, K), 60
    door = open_door(records, micro_batch=100)
    features = door.features(lambda x: torch.ones(len(x), 1), 1)
    held = door.reserve(query(dim=1, sampling_prob=0.1), ones)
    counts = [
        float(features.release_reserved(held, i, lambda f, y: 0.5 * torch.ones(len(f), 1))) * 2 for i in range(ones)
    ]
    assert all(abs(count - round(count)) < 1e-3 for count in counts)
    assert len(set(counts)) > 5
    spread = math.sqrt(ones * 400 * 0.1 * 0.9)
    assert abs(sum(counts) - ones * 40) < 5 * spread


def test_resumed_it_gives_the_same_bytes_and_reads_nothing(
    open_door: Door, toy_records: Records, tmp_path: Any
) -> None:
    records, passes = toy_records(9, K), []

    def counting(x: Tensor) -> Tensor:
        passes.append(len(x))
        return pixels(x)

    def run(n: int) -> list[Tensor]:
        door = open_door(records, micro_batch=64)
        held = door.reserve(query(), 2)
        features = door.features(counting, D)
        return [features.release_reserved(held, index, short) for index in range(n)]

    first = run(1)
    second = run(2)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(second[0], second[1])
    ledger = (tmp_path / "a" / "ledger.jsonl").read_bytes()
    passes.clear()
    third = run(2)
    assert torch.equal(torch.stack(second), torch.stack(third))
    assert 64 not in passes  # the check's made-up images, and no record's
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == ledger
    for path in (tmp_path / "a" / "vault").glob("*.npy"):
        path.unlink()  # killed after the commitment
    assert torch.equal(torch.stack(run(2)), torch.stack(third))
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == ledger


def test_another_sum_after_a_crash_is_charged_anew(open_door: Door, toy_records: Records, tmp_path: Any) -> None:
    door = open_door(toy_records(9, K))
    door.features(pixels, D).release_reserved(door.reserve(query()), 0, short)
    for path in (tmp_path / "a" / "vault").glob("*.npy"):
        path.unlink()
    door = open_door(toy_records(9, K, seed=1))
    door.features(pixels, D).release_reserved(door.reserve(query()), 0, short)
    assert len(ledgers.parts(door._ledger.lines)) == 2


def running() -> Callable[[Tensor], Tensor]:
    state = [0.0]

    def fn(x: Tensor) -> Tensor:
        state[0] += float(x.sum())
        return x.flatten(1) + state[0]

    return fn


FEATURE_MIXERS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch mean": lambda x: (x - x.mean(dim=0)).flatten(1),
    "batch norm": lambda x: torch.nn.functional.batch_norm(x, None, None, training=True).flatten(1),
    "sum to date": lambda x: x.flatten(1).cumsum(dim=0),
    "place": lambda x: x.flatten(1) + torch.arange(len(x))[:, None],
    "memory": running(),
    "nan": lambda x: x.flatten(1) * math.nan,
    "nan through others": lambda x: x.flatten(1) * (math.nan if len(x) > 1 and x.abs().mean() < 0.35 else 1.0),
    "tiny": lambda x: (x - x.mean(dim=0)).flatten(1) * 1e-20,
    "one row short": lambda x: x.flatten(1)[:-1],
    "too wide": lambda x: x.flatten(1).repeat(1, 2),
}
LEFT_MIXERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "labels of others": lambda f, y: short(f, y) * (1 + 0.01 * y.float().mean()),
    "mean feature": lambda f, y: short(f, y) + 1e-4 * f.mean(dim=0)[:K],
    "size of the batch": lambda f, y: short(f, y) / len(f),
    "left: nan": lambda f, y: short(f, y) * math.nan,
    "left: one for all": lambda f, y: short(f, y)[:1],
    "left: one row short": lambda f, y: short(f, y)[:-1],
    "left: too wide": lambda f, y: short(f, y).repeat(1, 2),
    "wipes the features": lambda f, y: short(f, y) * (1 + y.float().mean()) + f.zero_().sum(),
}


@pytest.mark.parametrize(
    ("name", "zero"),
    [*((name, zero) for name in FEATURE_MIXERS for zero in (False, True)), *((name, False) for name in LEFT_MIXERS)],
)
def test_what_mixes_records_is_refused_before_anything_is_read(
    name: str, zero: bool, open_door: Door, toy_records: Records
) -> None:
    """Also where the left factor is zero on made-up images, which would hide what the features do."""
    fn, left = FEATURE_MIXERS.get(name, pixels), LEFT_MIXERS.get(name, short)
    if zero:
        left = lambda f, y: torch.zeros(len(f), K)  # noqa: E731
    door = open_door(toy_records(8, K))
    held = door.reserve(query())
    door._records = None  # type: ignore[assignment]  # nothing to read: a read would be another error
    with pytest.raises(RecordwiseError):
        door.features(fn, D).release_reserved(held, 0, left)


def test_what_the_check_saw_is_relative_to_what_a_row_counts_for(open_door: Door, toy_records: Records) -> None:
    """Features by norm 1, whatever their own; their products by C. The worst is kept."""

    def fn(x: Tensor) -> Tensor:
        rows = torch.zeros(len(x), D, dtype=torch.float64)
        rows[:, 0], rows[:, 1] = 1e-6, 1e-10 * (len(x) > 1)
        return rows

    def left(features: Tensor, y: Tensor) -> Tensor:
        return torch.full((len(y), K), 0.1 + 1e-3 * (len(y) > 1))

    door = open_door(toy_records(8, K))
    handle = door.features(fn, D)
    zero, some = (lambda f, y: torch.zeros(len(f), K)), query(clip_norm=0.5)
    seen = []
    for asked, function in ((some, zero), (some, left), (some, zero), (query(name="more"), zero)):
        handle.check(asked, function)
        seen.append(door.checks[asked.name])
    assert seen == pytest.approx([1e-4, 1e-3 * K**0.5 / 0.5, 1e-3 * K**0.5 / 0.5, 1e-4], rel=1e-2)


def test_processes_agree_on_the_products(toy_records: Records) -> None:
    mine = OneOfTwo()
    handle = PrivateFeatures(unledgered(toy_records(8, K), ranks=mine), pixels, D)
    mine.agreed.clear()  # the records
    for left in (short, short, lambda f, y: short(f, y) * (1 + 2.0**-23)):
        handle.check(query(), left)
    first, again, another = mine.agreed
    assert first == again != another
    assert len(first) == 8 * 5 * K * D


def test_records_with_ids_answer_no_sums(tmp_path: Path, toy_records: Records) -> None:
    """Not even where a line of the ledger is there: an id may have many records."""
    plain = toy_records(8, K)
    records = LabelledImages(
        images=plain.images, labels=plain.labels, class_names=plain.class_names, source="toy", ids=np.arange(8) // 2
    )
    with Ledger.open(tmp_path / "l", cap=(9.0, 1e-5), data="toy", unit="id") as ledger:
        door = PrivateData(records, ledger, Vault.open(tmp_path / "v"))
        handle = door.features(pixels, D)
        line = ledger.reserve(door._vault.run, query(), 1)
        with pytest.raises(ConfigError, match="protected by their ids"):
            handle.release_reserved(Reservation(query(), 1, line), 0, short)
    assert handle._rows is None


@pytest.mark.parametrize("part", ["features", "left"])
def test_another_shape_in_the_pass_is_refused(part: str, toy_records: Records) -> None:
    """The check's made-up images are one or five; one column, or one row for all, would be taken for every one."""

    def fn(x: Tensor) -> Tensor:
        return pixels(x)[:, : 1 if part == "features" and len(x) == 4 else None]

    def left(features: Tensor, y: Tensor) -> Tensor:
        return short(features, y)[: 1 if part == "left" and len(y) == 16 else None]

    handle = PrivateFeatures(unledgered(toy_records(9, K), micro_batch=4), fn, D)
    handle.check(query(), left)
    with pytest.raises(RecordwiseError, match=r"returned shape \((4|1), (1|3)\), wanted"):
        handle._exact_sum(query(), left, "name")


def test_past_the_budget_nothing_is_read_or_written(open_door: Door, toy_records: Records, tmp_path: Any) -> None:
    door = open_door(toy_records(8, K), cap=(accounting.epsilon([query().part()], 1e-5), 1e-5))
    features = door.features(pixels, D)
    held = door.reserve(query())
    before = (tmp_path / "a" / "ledger.jsonl").read_bytes()
    with pytest.raises(BudgetError):
        door.reserve(query(name="more"))
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == before
    door._records = None  # type: ignore[assignment]
    for forged in (
        Reservation(query(noise_multiplier=0.1), 1, held.line),
        Reservation(query(), 2, held.line),
        Reservation(query(), 1, 0),
    ):
        with pytest.raises(LedgerError, match="not on the ledger"):
            features.release_reserved(forged, 0, short)
    assert features._rows is None


@pytest.mark.parametrize(
    "change", [{"dim": K * D + 1}, {"n_classes": K, "dim": D}, {"grid_bits": 19}, {"dim": 1000 * D, "grid_bits": 22}]
)
def test_a_query_that_does_not_fit_is_refused(change: Any, open_door: Door, toy_records: Records) -> None:
    door = open_door(toy_records(8, K))
    with pytest.raises(ConfigError):
        door.features(pixels, D).check(query(**change), short)


def test_rounding_costs_a_left_factor_a_32nd_at_most(open_door: Door, toy_records: Records) -> None:
    """Its 36 numbers lose sqrt(36)/2 + 1 steps of 2**7 at most."""
    features = open_door(toy_records(8, K)).features(lambda x: x.flatten(1)[:, :2], 2)
    features.check(query(dim=36 * 2, grid_bits=21), lambda f, y: torch.ones(len(f), 36))
    with pytest.raises(ConfigError, match="too coarse"):
        features.check(query(dim=37 * 2, grid_bits=21), lambda f, y: torch.ones(len(f), 37))


def test_a_fine_grid_is_for_rank_one_sums_only(open_door: Door, toy_records: Records) -> None:
    with pytest.raises(ConfigError, match="takes 24"):
        open_door(toy_records(8, K)).release(query(dim=D), lambda x, y: x.flatten(1))


def test_noise_on_every_coordinate_at_the_stated_scale(open_door: Door, toy_records: Records) -> None:
    door = open_door(toy_records(3, K))
    features = door.features(lambda x: x.flatten(1).repeat(1, 250), 4000)
    held = door.reserve(query(dim=K * 4000, noise_multiplier=30.0, clip_norm=2.5))
    released = features.release_reserved(held, 0, lambda f, y: torch.zeros(len(f), K)).double()
    assert released.shape == (K, 4000)
    assert (released != 0).all()
    for row in released:
        assert abs(float(row.std()) / 75 - 1) < 4.9 * math.sqrt(0.5 / 4000)


def test_an_empty_data_set_is_noised_and_released(open_door: Door, toy_records: Records) -> None:
    door = open_door(toy_records(0, K))
    released = door.features(pixels, D).release_reserved(door.reserve(query()), 0, short)
    assert (released != 0).all()
