"""The door, played twice: on neighbouring data with everything else frozen, what comes out may differ by C and no more.

Noise is off where a sum is compared (`silent`), and sums are then exact integers: C = 1, 2¹² steps, float32 holds them all.
"""

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpdistill.data import stored
from dpdistill.data.images import LabelledImages
from dpdistill.errors import BudgetError, ConfigError, InputError, LedgerError, RecordwiseError
from dpdistill.mechanisms import PrivateData, Vault, per_record_gradient, private, recordwise
from dpdistill.mechanisms.noise import Stream, derive, rounded_gaussian
from dpdistill.mechanisms.private import Reservation
from dpdistill.mechanisms.recordwise import check_recordwise, probe
from dpdistill.privacy import GaussianSum, Ledger, NoisyVotes, Planned, accounting
from dpdistill.privacy import ledger as ledgers

K, D, GRID = 3, 16, 12
C = 2**GRID  # in grid steps
Door = Callable[..., PrivateData]
Records = Callable[..., LabelledImages]


def query(**change: Any) -> GaussianSum:
    return GaussianSum(
        **{"name": "sum", "dim": D, "n_classes": K, "noise_multiplier": 50.0, "grid_bits": GRID} | change
    )


def pixels(x: Tensor, y: Tensor) -> Tensor:
    return x.flatten(1)


def steps(released: Tensor) -> np.ndarray:
    """A silent release in grid steps, exactly."""
    scaled = released.double().numpy() * C
    assert (scaled == np.rint(scaled)).all()
    return scaled.astype(np.int64)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "rounded_gaussian", lambda n, sigma, stream: np.zeros(n, np.int64))


def with_record(records: LabelledImages, image: np.ndarray, label: int) -> LabelledImages:
    """The same data with one record more. Labels out of range get in as they would after loading: by an array changed in place."""
    labels = np.append(records.labels, 0)
    images = np.concatenate([records.images, image[None].astype(records.images.dtype)])
    more = LabelledImages(images=images, labels=labels, class_names=records.class_names, source="toy")
    more.labels[-1] = label
    return more


RNG = np.random.default_rng(3)
NEIGHBOURS = {
    "random": (RNG.random((1, 4, 4)), 1),
    "nan": (np.full((1, 4, 4), np.nan), 1),
    "one nan": (np.where(np.arange(16).reshape(1, 4, 4) == 3, np.nan, 0.5), 1),
    "inf": (np.full((1, 4, 4), np.inf), 0),
    "-inf": (np.full((1, 4, 4), -np.inf), 2),
    "huge": (np.full((1, 4, 4), 1e30), 2),
    "subnormal": (np.full((1, 4, 4), 1e-45), 2),
    "zero": (np.zeros((1, 4, 4)), 0),
    "label too big": (RNG.random((1, 4, 4)), K),
    "label far too big": (RNG.random((1, 4, 4)), 2**62),
    "label negative": (RNG.random((1, 4, 4)), -1),
}
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pixels": pixels,
    "long": lambda x, y: x.flatten(1) * 1e6 + 3.0,
    "one-hot": lambda x, y: nn.functional.one_hot(y, D).float() * 7,
    "bursting": lambda x, y: (x.flatten(1) * 1e38).exp() * 1e38,
    "sign": lambda x, y: x.flatten(1).sign(),
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("q", [1.0, 0.5])
@pytest.mark.usefixtures("silent")
def test_one_record_more_moves_its_own_row_by_at_most_c(
    neighbour: str, q: float, open_door: Door, toy_records: Records
) -> None:
    image, label = NEIGHBOURS[neighbour]
    base = toy_records(11, K, dtype="float32")
    for name, fn in FUNCTIONS.items():
        # bursting: not row-wise on the probe, for it gives infinity there; what counts is that the door bounds it all the same
        asked = query(sampling_prob=q)
        first, second = open_door(base, f"{name}-1"), open_door(with_record(base, image, label), f"{name}-2")
        if name == "bursting":
            first.check = second.check = lambda query, fn: None  # type: ignore[method-assign]
        moved = steps(second.release(asked, fn)) - steps(first.release(asked, fn))
        rows = (moved.astype(object) ** 2).sum(axis=1)
        assert rows.sum() <= C**2
        others = [k for k in range(K) if k != label]
        assert not moved[others].any()
        if "nan" in neighbour or "inf" in neighbour or "label" in neighbour:
            assert not moved.any()


@settings(max_examples=60)
@given(data=st.data(), n=st.integers(0, 9), which=st.integers(0, 8), q=st.sampled_from([1.0, 0.3]))
def test_any_neighbour(data: st.DataObject, n: int, which: int, q: float) -> None:
    """Add-or-remove of any record at the end: at most C. Exchange of any record: at most 2C. In exact integers, by the sum itself."""
    value = st.one_of(st.sampled_from([math.nan, math.inf, 1e30, -1e30, 0.0, 1.0, 1e-45]), st.floats(0, 1, width=32))
    image = np.array(data.draw(st.lists(value, min_size=16, max_size=16)), np.float32).reshape(1, 4, 4)
    label = data.draw(st.integers(-1, K))
    factor = data.draw(st.sampled_from([0.01, 1.0, 1e20]))

    def fn(x: Tensor, y: Tensor) -> Tensor:
        return x.flatten(1) * factor

    rng = np.random.default_rng(n)
    base = LabelledImages(
        images=rng.random((n, 1, 4, 4), np.float32),
        labels=rng.integers(0, K, n),
        class_names=("a", "b", "c"),
        source="toy",
    )

    class NoLedger:
        lines: list[Any] = []  # noqa: RUF012

    def total(records: LabelledImages) -> np.ndarray:
        vault = Vault(Path("/nowhere"), "run", b"k" * 32, False)
        door = PrivateData(records, NoLedger(), vault, micro_batch=4)  # type: ignore[arg-type]
        return door._exact_sum(query(sampling_prob=q), fn, "name", None).astype(object)

    moved = total(with_record(base, image, label)) - total(base)
    assert (moved**2).sum() <= C**2
    if n:
        other = with_record(base, image, 0)
        images, labels = base.images.copy(), base.labels.copy()
        images[which % n] = image[0]
        exchanged = LabelledImages(images=images, labels=labels, class_names=base.class_names, source="toy")
        exchanged.labels[which % n] = label
        assert ((total(exchanged) - total(base)) ** 2).sum() <= (2 * C) ** 2
        assert other.images.shape[0] == n + 1


@pytest.mark.usefixtures("silent")
def test_a_duplicate_and_a_rare_class(open_door: Door, toy_records: Records) -> None:
    base = toy_records(12, 2)
    base = LabelledImages(images=base.images, labels=base.labels, class_names=("a", "b", "rare"), source="toy")
    empty = steps(open_door(base, "base").release(query(), pixels))
    assert not empty[2].any()  # a class without records has a row all the same
    for label, place in ((2, "rare"), (int(base.labels[0]), "twin")):
        moved = steps(open_door(with_record(base, base.images[0], label), place).release(query(), pixels)) - empty
        assert 0 < (moved**2).sum() <= C**2


@pytest.mark.usefixtures("silent")
def test_a_sum_over_all_classes_counts_each_record_once(open_door: Door, toy_records: Records) -> None:
    records = toy_records(10, K)
    by_class = steps(open_door(records, "by class").release(query(), pixels))
    together = steps(open_door(records, "together").release(query(n_classes=1), pixels))
    assert np.array_equal(by_class.sum(axis=0, keepdims=True), together)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.usefixtures("silent")
def test_each_record_counts_in_the_row_of_its_class(n_classes: int, open_door: Door, toy_records: Records) -> None:
    records = toy_records(10, n_classes)
    released = steps(open_door(records).release(query(n_classes=n_classes), pixels))
    for label in range(n_classes):
        own = replace(
            records, images=records.images[records.labels == label], labels=records.labels[records.labels == label]
        )
        row = steps(open_door(own, f"{label}").release(query(n_classes=1), pixels))
        assert np.array_equal(released[[label]], row)


def test_what_a_malformed_record_shows_to_the_function(open_door: Door, toy_records: Records) -> None:
    """An empty place, with a label that exists: a function that failed on it would tell that there is one."""
    for n_classes in (1, K):
        base, seen = toy_records(2, n_classes, dtype="float32"), []

        def fn(x: Tensor, y: Tensor) -> Tensor:
            if len(x) == 4:  # and not the made-up images
                seen.append((x.clone(), y.clone()))  # noqa: B023
            return x.flatten(1)

        worlds = [base, *(with_record(base, *NEIGHBOURS[name]) for name in ("nan", "one nan", "inf", "label too big"))]
        for index, records in enumerate(worlds):
            open_door(records, f"{n_classes}-{index}").release(query(n_classes=1), fn)
        for x, y in seen:
            assert torch.equal(x[:2], torch.from_numpy(base.to_unit()))
            assert y.tolist() == [*base.labels, 0, 0]
            assert not x[2:].any()
        assert len(seen) == len(worlds)


@pytest.mark.usefixtures("silent")
def test_micro_batch_and_order_change_no_byte(open_door: Door, toy_records: Records) -> None:
    records = toy_records(13, K)

    def whole(x: Tensor, y: Tensor) -> Tensor:
        return torch.round(x.flatten(1) * 8) + y[:, None]

    expected = steps(open_door(records, "0").release(query(), whole))
    for size in (1, 2, 5, 12, 13, 14, 256):
        assert np.array_equal(
            steps(open_door(records, f"size {size}", micro_batch=size).release(query(), whole)), expected
        )
    order = np.random.default_rng(0).permutation(13)
    shuffled = LabelledImages(
        images=records.images[order], labels=records.labels[order], class_names=records.class_names, source="toy"
    )
    assert np.array_equal(steps(open_door(shuffled, "shuffled").release(query(), whole)), expected)


@pytest.mark.usefixtures("silent")
def test_long_vectors_go_through_fewer_at_a_time(
    open_door: Door, toy_records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 million coordinates asked for 20 GB once all of ε was charged."""
    assert 256 * 12 * 320_010 <= private.MEMORY <= 2**31  # a ConvNet of width 128 as ever
    seen: list[int] = []

    def noted(x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(x))
        return pixels(x, y)

    expected = steps(open_door(toy_records(13, K), "a", micro_batch=4).release(query(), pixels))
    for memory, size in ((12 * D * 4, 4), (12 * D * 3 + 5, 3), (1, 1)):
        monkeypatch.setattr(private, "MEMORY", memory)
        seen.clear()
        total = steps(open_door(toy_records(13, K), f"of {memory}", micro_batch=4).release(query(), noted))
        assert set(seen[-math.ceil(13 / size) :]) == {size}  # the last calls are the records', those before the check's
        assert np.array_equal(total, expected)


@pytest.mark.usefixtures("silent")
def test_a_function_that_writes_into_its_labels_moves_no_row(open_door: Door, toy_records: Records) -> None:
    """A record's row is the door's to say: were it read from the tensor that fn was given, one record could move the others' rows."""

    def meddling(x: Tensor, y: Tensor) -> Tensor:
        result = x.flatten(1).clone()
        y.fill_(0)
        x.fill_(7)
        return result

    records = toy_records(9, K)
    honest = open_door(records, "honest").release(query(), pixels)
    assert torch.equal(open_door(records, "meddling").release(query(), meddling), honest)
    assert records.labels.max() == K - 1


def batch_mean(x: Tensor, y: Tensor) -> Tensor:
    return (x - x.mean(dim=0)).flatten(1)


def faint_mean(x: Tensor, y: Tensor) -> Tensor:
    return x.flatten(1) + 1e-5 * x.flatten(1).mean(dim=0)


def nan_by_neighbour(x: Tensor, y: Tensor) -> Tensor:
    """Right in the probe's own batch and for one record; NaN among faint images."""
    return x.flatten(1) * (math.nan if len(x) > 1 and x.abs().mean() < 0.35 else 1.0)


def running() -> Callable[[Tensor, Tensor], Tensor]:
    state = [0.0]

    def fn(x: Tensor, y: Tensor) -> Tensor:
        state[0] += float(x.sum())
        return x.flatten(1) + state[0]

    return fn


class _BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(1), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


def channels_last_garbage(x: Tensor, y: Tensor) -> Tensor:
    """What a widely used per-record gradient engine does: right for one record, zeros for a batch in channels-last."""
    return x.flatten(1) if len(x) == 1 else torch.zeros(len(x), D)


MIXERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batch mean": batch_mean,
    "faint batch mean": faint_mean,
    "batch norm": lambda x, y: _BatchNorm()(x),
    "softmax over the batch": lambda x, y: x.flatten(1).softmax(dim=0),
    "sum to date": lambda x, y: x.flatten(1).cumsum(dim=0),
    "last row alone mixes": lambda x, y: torch.cat([x[:-1].flatten(1), x.flatten(1).sum(0, keepdim=True)]),
    "labels of others": lambda x, y: x.flatten(1) * (1 + y.float().mean()),
    "place in the batch": lambda x, y: x.flatten(1) * torch.arange(1, len(x) + 1)[:, None],
    "size of the batch": lambda x, y: x.flatten(1) / len(x),
    "normalised by the batch": lambda x, y: x.flatten(1) / x.norm(),
    "memory": running(),
    "nan through others": nan_by_neighbour,
    "channels-last zeros": channels_last_garbage,
    "channels-last garbage": lambda x, y: x.flatten(1).roll(1, 0) if len(x) > 1 else x.flatten(1),
    "random": lambda x, y: x.flatten(1) + torch.rand(1),
    "nan": lambda x, y: x.flatten(1) * math.nan,
    "one row short": lambda x, y: x.flatten(1)[:-1],
    "one for all": lambda x, y: x.flatten(1).sum(0, keepdim=True),
    "too wide": lambda x, y: x.flatten(1).repeat(1, 2),
    "flat": lambda x, y: x.flatten(),
    "image": lambda x, y: x,
}


@pytest.mark.parametrize("name", MIXERS)
def test_what_mixes_records_is_refused_before_anything_is_read_or_charged(
    name: str, open_door: Door, toy_records: Records, tmp_path: Path
) -> None:
    seen = Spy(toy_records(8, K))
    door = open_door(seen)
    seen.reads.clear()
    before = (tmp_path / "a" / "ledger.jsonl").read_bytes()
    with pytest.raises(RecordwiseError):
        door.release(query(), MIXERS[name])
    assert seen.reads == []
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == before


def among(factor: float, *rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Flat rows times `factor`; these rows of a batch, no others, take a 10⁻⁴ of their neighbour's difference to them."""

    def fn(x: Tensor, y: Tensor) -> Tensor:
        v = x.flatten(1) * factor
        for row in rows if len(x) > 1 else ():
            v[row] += 1e-4 * (v[row - 1] - v[row])
        return v

    return fn


@pytest.mark.parametrize(("factor", "clip_norm"), [(1.0, 1.0), (1e-4, 1e-6), (1e5, 1.0)])
@pytest.mark.parametrize("row", [0, -1])
def test_a_trace_of_another_record_in_one_place_is_seen(row: int, factor: float, clip_norm: float) -> None:
    with pytest.raises(RecordwiseError, match="other rows"):
        check_recordwise(among(factor, row), (1, 4, 4), K, 16, clip_norm)


def test_what_counts_is_the_difference_to_what_a_row_counts_for() -> None:
    assert check_recordwise(among(1e-4, 0), (1, 4, 4), K, 16, 1e3) < 1e-6  # far below the clip norm
    assert check_recordwise(among(1e5), (1, 4, 4), K, 16, 1.0) == 0

    def rounded(x: Tensor, y: Tensor) -> Tensor:
        return x.flatten(1).double() * 1e5 + (1e-2 if bool((x[0] == probe((1, 4, 4), K)[0][0]).all()) else 0.0) / 4

    assert 0 <= check_recordwise(rounded, (1, 4, 4), K, 16, 1.0) < 1e-6

    def other_kernels(x: Tensor, y: Tensor) -> Tensor:
        return x.flatten(1).double() + (len(x) > 1) * 1e-2 * x.flatten(1).norm(dim=1, keepdim=True) / 4

    assert check_recordwise(other_kernels, (1, 4, 4), K, 16, 1e-3) == pytest.approx(1e-2, rel=1e-5)


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU, for whose rounding a check allows a little more."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


@pytest.mark.parametrize(("share", "on_cpu", "on_gpu"), [(1e-6, True, True), (3e-5, False, True), (3e-4, False, False)])
def test_a_gpu_may_round_a_little_more(share: float, on_cpu: bool, on_gpu: bool) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        v = x.flatten(1).double()
        return v + share * (v.sum(dim=0, keepdim=True) - v) / len(v)

    for kind, passes in ((Tensor, on_cpu), (OnGpu, on_gpu)):

        def placed(x: Tensor, y: Tensor, kind: type[Tensor] = kind) -> Tensor:
            return fn(x, y).as_subclass(kind)

        if passes:
            assert 0 < check_recordwise(placed, (1, 4, 4), K, 16, 1.0) < 2 * share
        else:
            with pytest.raises(RecordwiseError, match="other rows"):
                check_recordwise(placed, (1, 4, 4), K, 16, 1.0)


def test_the_made_up_images_are_the_same_for_all() -> None:
    images, labels = probe((2, 32, 32), 3)
    assert images.shape == (5, 2, 32, 32)
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert (float(images.min()), float(images.max())) == (-1, 1)
    torch.manual_seed(99)
    assert torch.equal(probe((2, 32, 32), 3)[0], images)
    assert len(probe((1, 4, 4), 2, 12)[1]) == 12
    step = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    assert step[::2].max() < step[1::2].min()  # smooth and rough
    assert images.std(dim=(1, 2, 3)).min() > 0.3  # the smooth ones are not nearly grey, nor cut off at white and black
    assert (images.abs() == 1).float().mean(dim=(1, 2, 3)).max() < 0.03


def lighter_half(axis: int) -> Callable[[Tensor], Tensor]:
    """Of each image [B, C, H, W], whether its first half along an axis is lighter: 1 or 0."""

    def of(x: Tensor) -> Tensor:
        first, second = (half.flatten(1).mean(1) for half in x.chunk(2, axis))
        return (first > second).double()

    return of


LOOKED_AT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "channels": lambda x, y: lighter_half(1)(x),
    "top and bottom": lambda x, y: lighter_half(2)(x),
    "left and right": lambda x, y: lighter_half(3)(x),
    "contrast": lambda x, y: x.flatten(1).double().norm(dim=1),
    "labels": lambda x, y: y.double(),
}


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("name", LOOKED_AT)
def test_whatever_of_the_other_rows_is_looked_at_is_seen(name: str, n_classes: int) -> None:
    """The other rows differ in each of these. All that the function was tried on were images and labels that may be."""

    def fn(x: Tensor, y: Tensor) -> Tensor:
        assert (x.abs() <= 1).all()
        assert (y >= 0).all()
        assert (y < n_classes).all()
        trace = LOOKED_AT[name](x, y) * 2.0 ** torch.arange(len(x))  # each row by itself: in a mean two may cancel
        return x.flatten(1).double() + 1e-4 * trace.mean()

    # In this shape it does not help to exchange rows: the lighter channel is that of the row at the other end.
    with pytest.raises(RecordwiseError, match="other rows"):
        check_recordwise(fn, (2, 6, 6), n_classes, 72, 1.0)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(("row", "other"), [(0, 1), (0, 2), (0, 3), (0, 4), (-1, 0), (-1, 1), (-1, 2), (-1, 3)])
def test_the_label_of_any_other_row_is_seen(n_classes: int, row: int, other: int) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        rows = x.flatten(1).double()
        rows[row] += 1e-4 * y[min(other, len(y) - 1)].double()
        return rows

    with pytest.raises(RecordwiseError, match="other rows"):
        check_recordwise(fn, (1, 6, 6), n_classes, 36, 1.0)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("row", [0, -1])
def test_how_often_a_class_occurs_among_the_other_rows_is_seen(n_classes: int, row: int) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        rows = x.flatten(1).double()
        rows[row] += 1e-4 * y.double().mean()
        return rows

    with pytest.raises(RecordwiseError, match="other rows"):
        check_recordwise(fn, (1, 6, 6), n_classes, 36, 1.0)


@pytest.mark.parametrize(("off", "passes"), [(1.0, True), (1.001, False), (math.nan, False)])
def test_a_difference_at_the_tolerance_passes_and_none_above(
    off: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release may show what the door lets pass, so a verifier takes the tolerance itself, too (docs/bundle.md)."""
    monkeypatch.setattr(recordwise, "TOLERANCE", 2.0**-6)
    monkeypatch.setattr(recordwise, "MIXING_TOLERANCE", 2.0**-6)
    whole = probe((1, 4, 4), K)[0]

    def in_batches(x: Tensor) -> bool:
        return len(x) > 1

    def among_others(at: int) -> Callable[[Tensor], bool]:
        return lambda x: len(x) > 1 and torch.equal(x[at], whole[at]) and not torch.equal(x[2], whole[2])

    for other in (in_batches, among_others(0), among_others(-1)):

        def fn(x: Tensor, y: Tensor, other: Callable[[Tensor], bool] = other) -> Tensor:
            v = torch.zeros(len(x), 16, dtype=torch.float64)
            v[:, 0] = 64 + (off if other(x) else 0)
            return v

        if passes:
            assert check_recordwise(fn, (1, 4, 4), K, 16, 1.0) == (2.0**-6 if other is in_batches else 0)
        else:
            with pytest.raises(RecordwiseError, match="other rows"):
                check_recordwise(fn, (1, 4, 4), K, 16, 1.0)


def test_what_is_no_tensor_is_refused(open_door: Door, toy_records: Records) -> None:
    door = open_door(toy_records(8, K))
    with pytest.raises(RecordwiseError, match="returned ndarray, wanted a torch tensor"):
        door.release(query(), lambda x, y: x.flatten(1).numpy())
    assert [line["type"] for line in door._ledger.lines].count("intent") == 0


def test_another_shape_only_in_large_batches_is_refused(open_door: Door, toy_records: Records) -> None:
    door = open_door(toy_records(8, K), micro_batch=8)
    with pytest.raises(RecordwiseError, match="shape"):
        door.release(query(), lambda x, y: x.flatten(1) if len(x) < 6 else x.flatten(1)[:, :-1])


def test_a_pass_over_all_records_tosses_no_coin(
    open_door: Door, toy_records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = open_door(toy_records(8, K))
    monkeypatch.setattr(private.Door, "_coins", lambda *_: pytest.fail("tossed"))
    assert door.release(query(), pixels).count_nonzero()


def test_of_two_checks_the_larger_difference_is_kept(open_door: Door, toy_records: Records) -> None:
    door = open_door(toy_records(8, K))
    door.check(query(), lambda x, y: x.flatten(1) * (1 + 1e-3 * (len(x) > 1)))
    assert door.checks["sum"] == pytest.approx(1e-3, rel=1e-3)
    kept = dict(door.checks)
    door.check(query(), pixels)
    assert door.checks == kept


def test_good_functions_pass_and_their_difference_is_kept(open_door: Door, toy_records: Records) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, D))
    door = open_door(toy_records(8, K))
    door.release(query(name="net"), lambda x, y: net(x))
    door.release(query(name="last"), lambda x, y: net(x.to(memory_format=torch.channels_last)))
    assert set(door.checks) == {"net", "last"}
    assert 0 <= max(door.checks.values()) <= 1e-4


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_per_record_gradients_equal_one_backward_each(memory_format: torch.memory_format) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 5)
    )
    net = net.to(memory_format=memory_format)
    x, y = torch.randn(6, 3, 6, 6).to(memory_format=memory_format), torch.arange(6) % 5
    together = per_record_gradient(net, nn.functional.cross_entropy)(x, y)
    for i in range(6):
        net.zero_grad()
        nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        alone = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        assert torch.allclose(together[i], alone, atol=1e-6)
        assert alone.norm() > 0


@pytest.mark.parametrize("kind", ["conv", "linear", "gradient"])
@pytest.mark.parametrize("size", [32, 33])
def test_a_rows_place_in_the_batch_changes_no_bit(kind: str, size: int) -> None:
    """What docs/known-limits.md#rounding says of the builds we use. Where this fails, one record more may move the others' last bits."""
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.GroupNorm(16, 16), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(16, 16, 3), nn.Flatten()
    )
    flat = nn.Sequential(nn.Flatten(), nn.Linear(144, 50))
    gradient = per_record_gradient(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(800, 3)), nn.functional.cross_entropy
    )
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "conv": lambda x, y: net(x),
        "linear": lambda x, y: flat(x),
        "gradient": gradient,
    }
    x, y, order = torch.randn(size, 1, 12, 12), torch.arange(size) % 3, torch.randperm(size)
    with torch.no_grad():
        assert torch.equal(functions[kind](x[order], y[order]), functions[kind](x, y)[order])


def test_dp_sgd_through_the_door(open_door: Door, toy_records: Records) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, K))
    fn = per_record_gradient(net, nn.functional.cross_entropy)
    released = open_door(toy_records(8, K)).release(query(dim=16 * K + K, n_classes=1), fn)
    assert released.shape == (1, 16 * K + K)
    assert torch.isfinite(released).all()


class Spy:
    """Records that note when their pixels or labels are read, and what was on disk by then."""

    def __init__(self, records: LabelledImages, ledger: Path | None = None) -> None:
        self._inside, self.reads, self.ledger = records, [], ledger
        self.class_names, self.value_range, self.ids = records.class_names, records.value_range, None

    def _read(self, what: str) -> None:
        self.reads.append((what, self.ledger.read_bytes() if self.ledger and self.ledger.exists() else b""))

    @property
    def images(self) -> np.ndarray:
        self._read("images")
        return self._inside.images

    @property
    def labels(self) -> np.ndarray:
        self._read("labels")
        return self._inside.labels


def test_the_line_is_on_disk_before_the_first_record_is_read(
    open_door: Door, toy_records: Records, tmp_path: Path
) -> None:
    path = tmp_path / "a" / "ledger.jsonl"
    seen = Spy(toy_records(8, K), path)
    door = open_door(seen)
    for name in ("one", "two"):
        seen.reads.clear()
        door.release(query(name=name), pixels)
        first = ledgers.parse(seen.reads[0][1])
        assert first[-1]["type"] == "intent"
        assert first[-1]["query"] == query(name=name).describe()


def test_past_the_budget_nothing_is_read_or_written(open_door: Door, toy_records: Records, tmp_path: Path) -> None:
    path = tmp_path / "a" / "ledger.jsonl"
    seen = Spy(toy_records(8, K), path)
    door = open_door(seen, cap=(accounting.epsilon([query().part()], 1e-5), 1e-5))
    door.release(query(), pixels)
    seen.reads.clear()
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(BudgetError):
            door.release(query(name="more"), pixels)
        with pytest.raises(BudgetError):
            door.reserve(query(), 7)
    assert seen.reads == []
    assert path.read_bytes() == before


def test_the_ledger_does_not_depend_on_the_data(open_door: Door, toy_records: Records, tmp_path: Path) -> None:
    base = toy_records(11, K, dtype="float32")
    worlds = [base, toy_records(0, K, dtype="float32"), toy_records(300, K, dtype="float32", seed=5)]
    worlds += [with_record(base, *neighbour) for neighbour in NEIGHBOURS.values()]
    seen = set()
    for index, records in enumerate(worlds):
        door = open_door(records, f"w{index}")
        door.release(query(), pixels)
        held = door.reserve(query(name="sampled", sampling_prob=0.2), 3)
        for i in range(3):
            door.release_reserved(held, i, pixels)
        seen.add((tmp_path / f"w{index}" / "ledger.jsonl").read_bytes())
        names = sorted(path.name for path in (tmp_path / f"w{index}" / "vault").iterdir())
        seen.add(repr([name.split("-")[-1] for name in names]).encode())
    assert len(seen) == 2


def test_what_was_planned_is_what_is_charged(open_door: Door, toy_records: Records) -> None:
    plan = [
        Planned(query()),
        Planned(query(name="t", sampling_prob=0.3, noise_multiplier=20.0), 4),
        Planned(query(name="u", clip_norm=7.0)),
    ]
    door = open_door(toy_records(8, K))
    for planned in plan:
        held = door.reserve(planned.query, planned.count)
        for i in range(planned.count):
            door.release_reserved(held, i, pixels)
    lines = door._ledger.lines
    assert ledgers.parts(lines) == [planned.part for planned in plan]
    assert ledgers.spent(lines, 1e-5) == accounting.epsilon([planned.part for planned in plan], 1e-5)


@pytest.mark.parametrize("q", [1.0, 1e-9])
def test_an_empty_batch_is_noised_and_released(q: float, open_door: Door, toy_records: Records) -> None:
    released = open_door(toy_records(0 if q == 1 else 50, K)).release(query(sampling_prob=q), pixels)
    assert released.shape == (K, D)
    assert (released != 0).all()
    assert 20 < float(released.std()) < 80  # σ = 50, C = 1


def test_noise_on_every_coordinate_at_the_stated_scale(open_door: Door, toy_records: Records) -> None:
    """σ·C per coordinate, for every class and coordinate, also the last ones, also with a clip norm."""
    query_wide = query(dim=4000, n_classes=K, noise_multiplier=30.0, clip_norm=2.5, grid_bits=20)
    released = open_door(toy_records(3, K)).release(query_wide, lambda x, y: torch.zeros(len(x), 4000))
    spread = released.double()
    assert (spread != 0).all()
    assert abs(float(spread.std()) / 75 - 1) < 4.9 * math.sqrt(0.5 / 12000)
    for row in (*spread, spread[:, -500:].flatten()):
        assert abs(float(row.std()) / 75 - 1) < 4.9 * math.sqrt(0.5 / len(row))
    assert len(torch.unique(spread)) > spread.numel() - 30  # float32 lets a few values meet


def test_two_releases_have_independent_noise(open_door: Door, toy_records: Records) -> None:
    door = open_door(toy_records(6, K))
    wide = {"dim": 4000, "n_classes": 1, "grid_bits": 20}

    def zeros(x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(len(x), 4000)

    drawn = [
        door.release(query(**wide), zeros),
        door.release(query(**wide), zeros),
        door.release(query(**wide, name="b"), zeros),
    ]
    held = door.reserve(query(**wide), 2)
    drawn += [door.release_reserved(held, i, zeros) for i in (0, 1)]
    drawn += [open_door(toy_records(6, K), "b", key=b"j" * 32).release(query(**wide), zeros)]
    table = torch.cat(drawn).double()
    correlation = torch.corrcoef(table) - torch.eye(len(drawn))
    assert float(correlation.abs().max()) < 4.9 / math.sqrt(4000) * 1.1


def test_noise_is_bound_to_the_sum(open_door: Door, toy_records: Records) -> None:
    """The same key, run and line, and one pixel changed: the difference of two releases is noise, not that pixel."""
    records = toy_records(6, K)
    other = LabelledImages(
        images=records.images.copy(), labels=records.labels, class_names=records.class_names, source="toy"
    )
    other.images[0, 0, 0, 0] ^= 128
    first, second = open_door(records, "a").release(query(), pixels), open_door(other, "b").release(query(), pixels)
    assert (first != second).all()
    assert 30 < float((first - second).std()) < 150  # √2 · 50
    assert torch.equal(open_door(records, "c").release(query(), pixels), first)


def test_no_global_seed_reaches_the_noise(open_door: Door, toy_records: Records) -> None:
    """A function, or a library that it calls, reseeds every global generator before the noise is drawn: nothing changes, and with a
    fresh key nothing repeats."""

    def hostile(x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        return x.flatten(1)

    calm = open_door(toy_records(6, K), "calm").release(query(), pixels)
    assert torch.equal(open_door(toy_records(6, K), "hostile").release(query(), hostile), calm)
    assert not torch.equal(open_door(toy_records(6, K), "fresh", key=b"f" * 32).release(query(), hostile), calm)


def test_asked_again_the_same_bytes_and_nothing_read(open_door: Door, toy_records: Records, tmp_path: Path) -> None:
    seen = Spy(toy_records(8, K))
    door = open_door(seen)
    held = door.reserve(query(), 2)
    first = door.release_reserved(held, 1, pixels)
    seen.reads.clear()
    ledger = (tmp_path / "a" / "ledger.jsonl").read_bytes()
    assert torch.equal(door.release_reserved(held, 1, pixels), first)
    assert torch.equal(
        door.release_reserved(held, 1, lambda x, y: -x.flatten(1)), first
    )  # another function gets no second answer
    assert seen.reads == []
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == ledger
    for index in (-1, 2):
        with pytest.raises(ValueError, match="index"):
            door.release_reserved(held, index, pixels)


def test_a_resumed_run_reports_the_same_checks_and_reads_nothing(open_door: Door, toy_records: Records) -> None:
    """Where the answer is known, too: the certificate lists every query's check, and what mixes records is refused all the same."""

    def rounded(x: Tensor, y: Tensor) -> Tensor:
        return x.flatten(1) * (1 + 1e-3 * (len(x) > 1))

    first = open_door(toy_records(8, K))
    answer = first.release_reserved(first.reserve(query()), 0, rounded)
    seen = Spy(toy_records(8, K))
    resumed = open_door(seen)
    held = resumed.reserve(query())
    seen.reads.clear()
    with pytest.raises(RecordwiseError):
        resumed.release_reserved(held, 0, batch_mean)
    assert torch.equal(resumed.release_reserved(held, 0, rounded), answer)
    assert resumed.checks == first.checks == {"sum": pytest.approx(1e-3, rel=1e-3)}
    assert seen.reads == []


def test_a_resumed_run_must_ask_for_the_same(open_door: Door, toy_records: Records, tmp_path: Path) -> None:
    records = toy_records(8, K)
    line = open_door(records).reserve(query(), 2).line
    before = (tmp_path / "a" / "ledger.jsonl").read_bytes()
    for other, count in ((query(name="other"), 2), (query(noise_multiplier=51.0), 2), (query(), 1), (query(), 3)):
        with pytest.raises(LedgerError, match="other releases"):
            open_door(records).reserve(other, count)
    assert open_door(records).reserve(query(), 2).line == line
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == before


def test_another_sum_after_a_crash_is_another_release(open_door: Door, toy_records: Records, tmp_path: Path) -> None:
    """Each time that the sum comes out differently is charged once, in a line that says which release it repeats, and answered from there
    on. Stopped each time between the commitment and the noisy sum."""

    def resumed(seed: int, index: int) -> Tensor:
        for path in (tmp_path / "a" / "vault").glob("*.npy"):
            path.unlink()
        door = open_door(toy_records(8, K, seed=seed))
        lines.append(door._ledger.lines)
        return door.release_reserved(door.reserve(query(), 2), index, pixels)

    lines: list[Any] = []
    asked = [(seed, index) for index in (1, 0) for seed in (0, 1, 2)]
    first = [resumed(*what) for what in asked]
    for what, one in reversed([*zip(asked, first, strict=True)]):
        assert torch.equal(resumed(*what), one)
    charged = [{k: v for k, v in line.items() if k not in ("hash", "query")} for line in lines[-1][1:]]
    run = Vault.open(tmp_path / "a" / "vault").run
    again = [(2, ""), (1, "1-1"), (1, "1-1"), (1, "1-0"), (1, "1-0")]
    assert charged == [{"type": "intent", "run": run, "count": count, "again": text} for count, text in again]
    assert all(line["query"] == query().describe() for line in lines[-1][1:])
    hashes = [line["hash"][:32] for line in lines[-1]]
    bound = {path.stem for path in (tmp_path / "a" / "vault").glob("*.commitment")}
    assert bound == {f"release-{hashes[1]}-{index}" for index in (0, 1)} | {f"release-{x}-0" for x in hashes[2:]}
    assert len(torch.unique(torch.stack(first))) > 0.9 * 6 * K * D  # six noises


def test_a_release_to_the_byte(open_door: Door, toy_records: Records, tmp_path: Path) -> None:
    """By hand, from the key. A release's name, and what its noise is drawn for, are formats: a newer version that resumes a run must come
    to the same bytes."""
    door = open_door(toy_records(7, K))
    held = door.reserve(query(), 2)
    found = door.release_reserved(held, 1, pixels)
    name = f"release-{door._ledger.lines[1]['hash'][:32]}-1"
    asked = (
        b'{"classes": "3", "clip_norm": "1.0", "dim": "16", "grid_bits": "12", "mechanism": "gaussian_sum", "name": "sum", '
        b'"noise_multiplier": "50.0", "sampling_prob": "1.0"}'
    )
    total = door._exact_sum(query(), pixels, name, None)
    labels = ("noise", door._vault.run, name, asked, hashlib.sha256(total.tobytes()).digest())
    noisy = total + rounded_gaussian(K * D, 50.0 * C, Stream(derive(b"k" * 32, *labels))).reshape(K, D)
    assert np.array_equal(np.load(tmp_path / "a" / "vault" / f"{name}.npy"), noisy)
    assert torch.equal(found, torch.from_numpy(noisy / C).float())


def test_between_the_sum_and_its_commitment_a_run_can_be_killed(
    open_door: Door, toy_records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There: the charge, and nothing bound or released. test_crash.py kills there too, and looks for this point by its name."""
    passed: list[Any] = []

    def passing(name: str) -> None:
        on_disk = ledgers.parse((tmp_path / "a" / "ledger.jsonl").read_bytes())
        passed.append((name, len(on_disk), sorted(path.name for path in (tmp_path / "a" / "vault").iterdir())))

    monkeypatch.setattr(private, "point", passing)
    open_door(toy_records(7, K)).release(query(), pixels)
    assert passed == [("door: summed", 2, ["key"])]


def test_a_query_of_another_kind_is_refused(open_door: Door, toy_records: Records, tmp_path: Path) -> None:
    seen = Spy(toy_records(8, K))
    door = open_door(seen)
    votes = NoisyVotes(name="votes", n_queries=2, n_classes=K, n_models=3, noise_multiplier=5.0, unit_moves=2)
    seen.reads.clear()
    before = (tmp_path / "a" / "ledger.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="not a sum over records"):
        door.reserve(votes)
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == before
    held = Reservation(votes, 1, door._ledger.reserve(door._vault.run, votes))  # as charged by a handle on shards
    with pytest.raises(ConfigError, match="not a sum over records"):
        door.release_reserved(held, 0, pixels)
    assert seen.reads == []


def test_everything_is_computed_where_the_handle_says(open_door: Door, toy_records: Records) -> None:
    """ "meta" is another device on every machine. What comes back from there is moved by these functions themselves."""
    door, seen = open_door(toy_records(8, K)), []
    door.device = "meta"

    def fn(x: Tensor, y: Tensor) -> Tensor:
        seen.extend((x.device.type, y.device.type))
        return torch.zeros(len(x), D)

    def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        seen.extend((images.device.type, labels.device.type))
        return lambda x: torch.eye(K)[0].expand(len(x), K)

    door.release(query(), fn)
    shards = door.shards(3, train)
    asked = NoisyVotes(name="votes", n_queries=2, n_classes=K, n_models=3, noise_multiplier=5.0, unit_moves=2)
    shards.release_reserved(shards.reserve(asked), 0, torch.zeros(2, 1, 4, 4))
    assert len(seen) > 12
    assert set(seen) == {"meta"}


def test_what_does_not_fit_in_memory_goes_to_the_scratch_folder(
    toy_records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "MEMORY_BYTES", 0)
    nowhere = str(tmp_path / "nowhere")
    door = PrivateData(toy_records(8, K), Ledger.elsewhere(), Vault.elsewhere(), scratch=nowhere)
    with pytest.raises(InputError, match="nowhere"):
        door.features(lambda x: x.flatten(1), D)._features()


def noticed(records: LabelledImages) -> dict[str, list[int]]:
    """In which records a change shows in what several processes compare of them."""
    found: dict[str, list[int]] = {}
    before = private._fingerprint(records)
    for part in ("images", "labels", "ids"):
        values: Any = getattr(records, part)
        found[part] = []
        for index in range(len(values)):
            values[index] += 1
            if private._fingerprint(records) != before:
                found[part].append(index)
            values[index] -= 1
    return found


def test_what_processes_compare_of_their_records(toy_records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """All where they are few, and of more some, evenly spread; and what they are."""
    records = replace(toy_records(12, K), ids=np.arange(12))
    assert noticed(records) == {part: [*range(12)] for part in ("images", "labels", "ids")}
    monkeypatch.setattr(private, "N_COMPARED", 4)
    assert noticed(records) == {part: [0, 3, 6, 9] for part in ("images", "labels", "ids")}
    none = toy_records(0, K)
    apart = [
        records,
        replace(records, ids=None),
        replace(records, images=records.images.reshape(12, 1, 2, 8)),
        none,
        replace(none, ids=np.arange(0)),
        toy_records(0, K, dtype="float32"),
    ]
    assert len({private._fingerprint(one) for one in apart}) == len(apart)
    assert len({private._fingerprint(toy_records(n, K)) for n in range(9)}) == 9


def test_a_made_up_reservation_buys_nothing(open_door: Door, toy_records: Records) -> None:
    seen = Spy(toy_records(8, K))
    door = open_door(seen)
    held = door.reserve(query(), 2)
    seen.reads.clear()
    for forged in (
        Reservation(query(), 3, held.line),
        Reservation(query(noise_multiplier=0.01), 2, held.line),
        Reservation(query(clip_norm=1e6), 2, held.line),
        Reservation(query(), 2, 0),
        Reservation(query(), 2, -1),
        Reservation(query(), 2, 99),
    ):
        with pytest.raises(LedgerError, match="not on the ledger"):
            door.release_reserved(forged, 0, pixels)
    assert seen.reads == []


def test_another_runs_line_buys_nothing(open_door: Door, toy_records: Records, tmp_path: Path) -> None:
    door = open_door(toy_records(8, K))
    held = door.reserve(query())
    (tmp_path / "a" / "vault" / "key").write_bytes(b"other" * 6 + b"xx")
    second = open_door(toy_records(8, K))
    with pytest.raises(LedgerError, match="not on the ledger"):
        second.release_reserved(held, 0, pixels)
    second.release(query(), pixels)
    assert len(ledgers.parts(second._ledger.lines)) == 2


def test_a_second_handle_on_the_ledger_is_refused(open_door: Door, toy_records: Records, tmp_path: Path) -> None:
    open_door(toy_records(8, K))
    with pytest.raises(LedgerError, match="another run"):
        Ledger.open(tmp_path / "a" / "ledger.jsonl", cap=(1.0, 1e-5))


def test_a_vault_beside_another_ledger_gives_no_old_answer(
    open_door: Door, toy_records: Records, tmp_path: Path
) -> None:
    """State of run A with the ledger of run B: nothing matches by accident."""
    first = open_door(toy_records(8, K)).release(query(name="old"), pixels)
    (tmp_path / "a" / "ledger.jsonl").unlink()
    door = open_door(toy_records(8, K))
    assert not torch.equal(door.release(query(name="new"), pixels), first)
    assert len(ledgers.parts(door._ledger.lines)) == 1


def test_wrong_number_of_classes_or_micro_batch(open_door: Door, toy_records: Records) -> None:
    with pytest.raises(ConfigError, match="rows"):
        open_door(toy_records(8, K)).release(query(n_classes=K + 1), pixels)
    for size in (0, -4, 2**20 + 1):  # so many products of 2**30 are summed exactly in float64, and no more
        with pytest.raises(ValueError, match="micro_batch"):
            open_door(toy_records(8, K), micro_batch=size)
    assert open_door(toy_records(8, K), micro_batch=2**20).micro_batch == 2**20
    assert open_door(toy_records(8, K), micro_batch=1).micro_batch == 1


def test_a_charge_is_not_changed_and_coins_are_packed_by_eight(open_door: Door, toy_records: Records) -> None:
    held = open_door(toy_records(8, K)).reserve(query())
    for name in ("query", "count", "line"):
        with pytest.raises(FrozenInstanceError):
            setattr(held, name, getattr(held, name))
    assert private.FEW_COINS % 8 == 0
    assert 2**16 <= private.FEW_COINS <= 2**24  # eight bytes each on their way: neither many calls nor much memory


@pytest.mark.parametrize("n", [0, 1, 4, 5, 401])
@pytest.mark.parametrize("q", [1.0, 1e-9])
def test_progress_says_nothing_of_the_number_of_records(
    n: int, q: float, open_door: Door, toy_records: Records
) -> None:
    """A call for each micro-batch, with the fraction that it is, told a method how many there are; and of none, no call came at all."""
    told: list[float] = []
    door = open_door(toy_records(n, K), micro_batch=4)
    door.release(query(sampling_prob=q), pixels, progress=told.append)
    hundredths = [(part + 1) / 100 for part in range(100)]
    assert told == hundredths
    told.clear()
    held = door.reserve(query(name="rank one", n_classes=1, dim=K * D, grid_bits=24))
    features = door.features(lambda x: x.flatten(1) + 2, D, progress=told.append)
    features.release_reserved(held, 0, lambda f, y: nn.functional.one_hot(y, K).float())
    assert told == hundredths


def test_progress_is_told_as_the_pass_goes_on(open_door: Door, toy_records: Records) -> None:
    events: list[Any] = []

    def fn(x: Tensor, y: Tensor) -> Tensor:
        if len(x) == 2:
            events.append("batch")
        return x.flatten(1)

    open_door(toy_records(8, K), micro_batch=2).release(query(), fn, progress=events.append)
    quarters = [[(part + 1) / 100 for part in range(start, start + 25)] for start in (0, 25, 50, 75)]
    assert events == [event for quarter in quarters for event in ("batch", *quarter)]


def test_uint8_and_float_records_give_the_same(open_door: Door, toy_records: Records) -> None:
    rough = open_door(toy_records(9, K), "a").release(query(grid_bits=8), pixels)
    fine = open_door(toy_records(9, K, dtype="float32"), "b").release(query(grid_bits=8), pixels)
    assert torch.equal(rough, fine)


@pytest.mark.usefixtures("silent")
def test_float_pixels_count_from_their_declared_range(open_door: Door, toy_records: Records) -> None:
    base = toy_records(9, K, dtype="float32")
    doubled = replace(base, images=base.images * 2, value_range=(0.0, 2.0))
    first, second = (
        open_door(records, f"{index}").release(query(), pixels) for index, records in enumerate((base, doubled))
    )
    assert torch.equal(first, second)


def test_a_small_gradient_is_not_refused_for_its_own_rounding(open_door: Any, toy_records: Any) -> None:
    """A record that is fitted well has a tiny gradient, whose rounding is large only against itself: a long private training must not
    be refused half-way, with its budget charged."""
    door = open_door(toy_records())
    query = GaussianSum(name="gradient", dim=2, noise_multiplier=1.0, clip_norm=1.0)

    def rounded(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 1e-5 * x.flatten(1)[:, :2] + (1e-6 if len(x) > 1 else 0.0)

    door.check(query, rounded)
    small = replace(query, clip_norm=1e-5)
    with pytest.raises(RecordwiseError):  # the same difference counts where the clip is as small
        door.check(small, rounded)
