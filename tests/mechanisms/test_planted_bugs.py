# ruff: noqa: E501  (the table of mutants quotes source lines whole)
"""Bugs of this field's history, planted one at a time into a copy of privacy/ and mechanisms/: each must be caught by a check below.

A mutant is a source-text replacement. The copy is imported under a name of its own, so nothing real is patched. The checks are plain
functions that raise AssertionError; the clean copy passes them all. docs/pitfalls.md names the source of each bug, and what of this
field's bugs is planted elsewhere.
"""

import errno
import importlib
import logging
import math
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import dp_accounting
import mpmath
import numpy as np
import pytest
import torch
from dp_accounting import pld
from scipy.special import ndtr
from scipy.stats import binom, chi2
from torch import Tensor

import dpdistill.privacy
from dpdistill.data.images import LabelledImages
from several import check_ranks

pytestmark = pytest.mark.mutants

ROOT = Path(dpdistill.privacy.__file__).parents[1]
MODULES = ["privacy.accounting", "privacy.queries", "privacy.ledger", "privacy.guarantee"]
MODULES += [f"mechanisms.{name}" for name in ("private", "noise", "clipping", "recordwise", "vault")]
MODULES += [f"mechanisms.{name}" for name in ("features", "ensemble", "answers", "ranks")]
K, D, GRID = 3, 8, 12
C = 2**GRID


@cache
def compiled(source: bytes, name: str) -> CodeType:
    """All but one or two files of a copy are as they were in the last one: what is written the same is compiled once."""
    return compile(source, name, "exec", dont_inherit=True)


def load(folder: Path, name: str, changes: tuple[tuple[str, str, str], ...] = ()) -> SimpleNamespace:
    """Imports a copy of the core as package `name`, with (file, old, new) replaced."""
    package = folder / name
    for part in ("privacy", "mechanisms"):
        shutil.copytree(ROOT / part, package / part, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "data").mkdir()
    for file in ("__init__.py", "data/__init__.py"):
        (package / file).write_text("")
    for file in ("errors.py", "data/images.py", "data/stored.py"):
        shutil.copy(ROOT / file, package / file)
    for file, old, new in changes:
        text = (package / file).read_text()
        assert text.count(old) >= 1, f"the mutant's text is no longer in {file}: {old!r}"
        (package / file).write_text(text.replace(old, new))
    importlib.invalidate_caches()
    return SimpleNamespace(
        errors=importlib.import_module(f"{name}.errors"),
        **{module.split(".")[1]: importlib.import_module(f"{name}.{module}") for module in MODULES},
    )


class Door:
    """One run of the copied core on some records, in a folder."""

    def __init__(
        self, m: SimpleNamespace, folder: Path, records: Any, *, key: bytes | None = b"k" * 32, cap: float = 1e9
    ) -> None:
        self.m, self.path = m, folder / "ledger.jsonl"
        (folder / "vault").mkdir(parents=True, exist_ok=True)
        if key and not (folder / "vault" / "key").exists():
            (folder / "vault" / "key").write_bytes(key)
        self.ledger = m.ledger.Ledger.open(self.path, cap=(cap, 1e-5), data="toy")
        self.vault = m.vault.Vault.open(folder / "vault")
        self.handle = m.private.PrivateData(records, self.ledger, self.vault, micro_batch=4)

    def __enter__(self) -> "Door":
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.close()

    def query(self, **change: Any) -> Any:
        facts = {"name": "sum", "dim": D, "n_classes": K, "noise_multiplier": 50.0, "grid_bits": GRID}
        return self.m.queries.GaussianSum(**facts | change)

    def release(self, fn: Callable[[Tensor, Tensor], Tensor], **change: Any) -> np.ndarray:
        released: np.ndarray = self.handle.release(self.query(**change), fn).double().numpy()
        return released


def records(n: int, *, extra: tuple[float, int] | None = None) -> Any:
    """n float images [1, 2, 4], and perhaps one more with all pixels and the label given."""
    images = np.random.default_rng(1).random((n + bool(extra), 1, 2, 4)).astype(np.float32)
    labels = (np.arange(n + bool(extra)) % K).astype(np.int64)
    if extra:
        images[-1], labels[-1] = extra[0], 0
    result = LabelledImages(images=images, labels=labels, class_names=("a", "b", "c"), source="toy")
    if extra:
        result.labels[-1] = extra[1]
    return result


def silent(m: SimpleNamespace) -> None:
    m.private.rounded_gaussian = lambda n, sigma, stream: np.zeros(n, np.int64)


def flat(x: Tensor, y: Tensor) -> Tensor:
    return x.flatten(1)


def long(x: Tensor, y: Tensor) -> Tensor:
    return x.flatten(1) * 100 + 30


# --- the checks ---------------------------------------------------------------------------------------------------------------------


def check_sensitivity(m: SimpleNamespace, folder: Path) -> None:
    """One record more moves its own row by at most C, in integers; a pathological one moves nothing; a sound one is not lost."""
    noise, m.private.rounded_gaussian = m.private.rounded_gaussian, lambda n, sigma, stream: np.zeros(n, np.int64)
    try:
        cases = [(value, label) for value in (0.5, 0.0, 1.0, 1e30, math.nan, math.inf) for label in (1, K, -1)]
        for name, fn, clip in (("flat", flat, 1.0), ("long", long, 1.0), ("clip", long, 40.0), ("burst", None, 1.0)):

            def burst(x: Tensor, y: Tensor) -> Tensor:  # NaN and infinity come out of finite pixels
                return torch.where(
                    x.flatten(1) > 0.99, torch.full_like(x.flatten(1), math.inf), x.flatten(1) * 3
                ) - 0.0 * x.flatten(1)

            used = fn or burst

            def total(
                extra: tuple[float, int] | None, place: str, used: Any = used, clip: float = clip, n: int = 9
            ) -> np.ndarray:
                with Door(m, folder / place, records(n, extra=extra)) as door:
                    door.handle.check = lambda query, fn: None
                    steps = door.release(used, clip_norm=clip) * C / clip
                    assert np.allclose(steps, np.rint(steps), atol=1e-3)
                    return np.rint(steps).astype(np.int64)

            base = total(None, f"{name}-base")
            for value, label in cases:
                moved = total((value, label), f"{name}-{value}-{label}") - base
                assert (moved.astype(object) ** 2).sum() <= C**2, "more than C"
                assert not moved[[k for k in range(K) if k != label]].any(), "another class's row moved"
                if not math.isfinite(value) or not 0 <= label < K or (name == "burst" and value >= 1):
                    assert not moved.any(), "a malformed record counts"
                elif name == "long" and 0 <= label < K:
                    assert (moved.astype(float) ** 2).sum() >= (0.99 * C) ** 2, "a long vector lost its length"
    finally:
        m.private.rounded_gaussian = noise


def check_sum(m: SimpleNamespace, folder: Path) -> None:
    """Short vectors are summed as they are; half-precision, odd batches and functions that write into their input change nothing."""
    noise, m.private.rounded_gaussian = m.private.rounded_gaussian, lambda n, sigma, stream: np.zeros(n, np.int64)
    try:
        data = records(11)

        def small(x: Tensor, y: Tensor) -> Tensor:
            value = x.flatten(1) * 0.2
            y.zero_()
            return value

        with Door(m, folder / "sum", data) as door:
            seen = door.release(small)
        truth = np.zeros((K, D))
        np.add.at(truth, data.labels, data.to_unit().reshape(11, D).astype(float) * 0.2)
        assert np.abs(seen - truth).max() <= 11 / C
        with Door(m, folder / "fine", data) as door:
            query, fine = door.query(grid_bits=24), lambda x, y: x.flatten(1) * 0.01 + 0.33
            rows = m.clipping.clip_to_grid(fine(torch.from_numpy(data.to_unit()), None), 1.0, 24).numpy().astype(object)
            exact = np.zeros((K, D), object)
            np.add.at(exact, data.labels, rows)
            for size in (1, 4, 500):
                door.handle.micro_batch = size
                assert (door.handle._exact_sum(query, fine, "fine", None).astype(object) == exact).all(), "not exact"
        with Door(m, folder / "wide", data) as door:
            wide = door.release(lambda x, y: x.flatten(1).repeat(1, 500) * 900.0, dim=4000, grid_bits=24)
        truth = np.zeros((K, 4000))
        vectors = np.tile(data.to_unit().reshape(11, D).astype(float), 500)
        np.add.at(truth, data.labels, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        assert np.abs(wide - truth).max() < 1e-5
    finally:
        m.private.rounded_gaussian = noise


def check_noise_scale(m: SimpleNamespace, folder: Path) -> None:
    """σ·C on every coordinate of every row, for full and for empty batches, uncorrelated between releases."""

    def zeros(x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(len(x), 3000)

    for n, sigma, clip, q in ((9, 30.0, 2.5, 1.0), (0, 0.9, 1.0, 1.0), (9, 4.0, 0.3, 1e-9)):
        with Door(m, folder / f"{n}-{sigma}", records(n)) as door:
            facts = {"dim": 3000, "noise_multiplier": sigma, "clip_norm": clip, "grid_bits": 20, "sampling_prob": q}
            first, second = door.release(zeros, **facts), door.release(zeros, **facts)
        for drawn in (first, second):
            assert (drawn != 0).all(), "a coordinate without noise"
            assert abs(drawn.std() / (sigma * clip) - 1) < 5 * math.sqrt(0.5 / drawn.size)
            assert abs(drawn.mean()) < 5 * sigma * clip / math.sqrt(drawn.size)
            for row in drawn:
                assert abs(row.std() / (sigma * clip) - 1) < 5 * math.sqrt(0.5 / len(row))
            assert np.abs(np.corrcoef(drawn) - np.eye(K)).max() < 5 / math.sqrt(3000), "rows share noise"
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / math.sqrt(first.size), "releases share noise"


class Words:
    def __init__(self, *words: int) -> None:
        self.left = list(words)

    def words(self, n: int) -> np.ndarray:
        taken, self.left = self.left[:n], self.left[n:]
        assert len(taken) == n
        return np.array(taken, dtype=np.uint64)


def check_noise_law(m: SimpleNamespace, folder: Path) -> None:
    """The exact pmf; the words at a rounding boundary; the tail past 5.77σ; a bad σ refused; AES tested at import."""
    n, sigma = 200_000, 3.0
    draws = m.noise.rounded_gaussian(n, sigma, m.noise.Stream(bytes(range(32))))
    k = np.arange(-14, 15)
    a = np.abs(k)
    pmf = np.where(a == 0, 1 - 2 * ndtr(-0.5 / sigma), ndtr(-(a - 0.5) / sigma) - ndtr(-(a + 0.5) / sigma))
    seen = np.bincount(np.clip(draws, -14, 14) + 14, minlength=29)
    assert 1e-6 < chi2.sf(float(((seen - n * pmf) ** 2 / (n * pmf)).sum()), 28) < 1 - 1e-6
    for sigma, step in ((3.0, 4), (2.0**20, 2**20), (2.0**20, 7 * 2**20)):
        with mpmath.workprec(500):
            p = int(mpmath.erfc((step - mpmath.mpf(0.5)) / sigma / mpmath.sqrt(2)) / 2 * mpmath.mpf(2) ** 256)
        for value, expected in ((p, step), (p + 1, step - 1)):
            words = Words(value >> 192, *[(value >> shift) & (2**64 - 1) for shift in (128, 64, 0)], *[0] * 12)
            assert m.noise.rounded_gaussian(1, sigma, words).tolist() == [expected], "wrong at a boundary"
    tail = m.noise.rounded_gaussian(2, 1000.0, Words(0, 2**63 | 2**24, *[2**63] * 8))
    assert tail[0] > 9100, "the tail is cut"
    assert -7500 < tail[1] < -6500
    assert m.noise.rounded_gaussian(1, 0.1, Words(0, 0, 0, 5, *[1] * 4)).tolist() == [2], "the far tail"
    for sigma in (math.nan, 0.0, math.inf, -1.0):
        try:
            m.noise.rounded_gaussian(1, sigma, Words(1))
        except ValueError:
            continue
        raise AssertionError("noise of a bad scale was drawn")
    kept, m.noise._KNOWN_STREAM = m.noise._KNOWN_STREAM, "00" * 16
    try:
        m.noise.self_test()
    except RuntimeError:
        pass
    else:
        raise AssertionError("noise does not fail closed")
    finally:
        m.noise._KNOWN_STREAM = kept
    assert m.noise.derive(b"k", "ab", "c") != m.noise.derive(b"k", "a", "bc")


def check_noise_source(m: SimpleNamespace, folder: Path) -> None:
    """Fresh keys; noise bound to key, release and sum; never from a global generator, and the same again for the same sum."""

    def seeded(x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        return x.flatten(1)

    def one(place: str, data: Any, key: bytes | None) -> np.ndarray:
        with Door(m, folder / place, data, key=key) as door:
            return door.release(seeded)

    base = records(9)
    other = records(9)
    other.images[0, 0, 0, 0] = 1 - other.images[0, 0, 0, 0]
    first = one("a", base, b"k" * 32)
    assert (first != one("b", base, None)).all(), "another key, the same noise"
    assert (one("c", base, None) != one("d", base, None)).all(), "two fresh keys, the same noise"
    assert (first == one("e", base, b"k" * 32)).all(), "the same key and sum, other noise: a resumed run would redraw"
    difference = first - one("f", other, b"k" * 32)
    assert (np.abs(difference) > 1e-6).all(), "another sum, the same noise: the difference of two releases is a record"
    assert np.abs(difference).max() > 10
    with Door(m, folder / "two", base) as door:
        twice = door.release(flat), door.release(flat)
        assert (twice[0] != twice[1]).all(), "two releases, the same noise"


def in_a_child(work: Callable[[], bytes]) -> bytes:
    """What `work` gives in a forked child."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.write(writer, work())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read()


def check_fork(m: SimpleNamespace, folder: Path) -> None:
    """Two children of one run draw noise of their own; neither writes into the ledger that their parent holds."""

    def zeros(x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(len(x), D)

    with Door(m, folder / "f", records(9)) as door:
        held = door.handle.reserve(door.query(), 3)
        door.handle.release_reserved(held, 0, zeros)  # what state there may be is there
        drawn = [
            np.frombuffer(in_a_child(lambda i=i: door.handle.release_reserved(held, i, zeros).numpy().tobytes()), "<f4")
            for i in (1, 2)
        ]
        assert drawn[0].size == drawn[1].size == K * D
        assert not (drawn[0] == drawn[1]).any(), "two children, the same noise"
        before = door.path.read_bytes()

        def charging() -> bytes:
            try:
                door.ledger.reserve("run", door.query())
            except m.errors.LedgerError:
                return b"refused"
            return b"written"

        assert in_a_child(charging) == b"refused", "a child charged its parent's ledger"
        assert door.path.read_bytes() == before


def check_sampler(m: SimpleNamespace, folder: Path) -> None:
    """Counts through the door are binomial at q, anew for each release, whatever N is; a coin is fair to 2⁻⁵³."""
    noise, m.private.rounded_gaussian = m.private.rounded_gaussian, lambda n, sigma, stream: np.zeros(n, np.int64)
    try:
        for n, q in ((400, 0.1), (9, 0.1)):
            with Door(m, folder / f"s{n}", records(n)) as door:
                door.handle.micro_batch = 500
                query = door.query(sampling_prob=q, n_classes=1, dim=1, name="count")
                held = door.handle.reserve(query, 60)
                ones = [
                    float(door.handle.release_reserved(held, i, lambda x, y: torch.ones(len(x), 1))) for i in range(60)
                ]
            counts = np.rint(np.array(ones) * C / (C - 2))
            assert len(set(counts.tolist())) > 1, "a fixed batch size"
            if n > 100:
                statistic = float(((counts - n * q) ** 2 / (n * q * (1 - q))).sum())
                assert 1e-7 < chi2.sf(statistic, 60) < 1 - 1e-7
            assert 1e-7 < binom.cdf(int(counts.sum()), n * 60, q) < 1 - 1e-7
    finally:
        m.private.rounded_gaussian = noise
    stream = m.noise.Stream(bytes(32))
    stream.words = lambda n: np.array([2**63 - 2**11, 2**63, 2**63 + 2**11], dtype=np.uint64)
    assert stream.bernoulli(3, 0.5).tolist() == [True, False, False]
    assert stream.bernoulli(3, 0.5 + 2.0**-53).tolist() == [True, True, False]


class Spy:
    """Records that note what the ledger's file held when they were read."""

    def __init__(self, inside: Any, path: Path) -> None:
        self.inside, self.path, self.reads = inside, path, []
        self.class_names, self.value_range = inside.class_names, inside.value_range

    def __getattr__(self, name: str) -> Any:
        if name in ("images", "labels"):
            self.reads.append(self.path.read_bytes() if self.path.exists() else b"")
        return getattr(self.inside, name)


def check_ledger_first(m: SimpleNamespace, folder: Path) -> None:
    """Charged and fsynced before the first read; refused at the cap, at the first release too, with nothing read; what is charged is
    what is released; the same bytes for other data."""
    path = folder / "a" / "ledger.jsonl"
    spy = Spy(records(9), path)
    synced: list[int] = []
    folders: set[Path] = set()
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            synced.append(path.stat().st_size)
        for place in (path.parent, path.parent / "vault"):
            if place.exists() and os.path.samestat(os.fstat(descriptor), place.stat()):
                folders.add(place)

    os.fsync = noting
    try:
        with Door(m, folder / "a", spy, cap=1.0) as door:
            for sigma in (50.0, 60.0):
                spy.reads.clear()
                folders.discard(path.parent / "vault")  # each start syncs it; so has each file that is new in it
                door.release(flat, noise_multiplier=sigma)
                last = m.ledger.parse(spy.reads[0])[-1]
                assert last["type"] == "intent", "a record was read before the charge"
                assert float(last["query"]["noise_multiplier"]) == sigma
                assert len(spy.reads[0]) in synced, "a record was read before the charge was on disk"
            spy.reads.clear()
            before = path.read_bytes()
            for sigma in (1.0, 0.1):
                try:
                    door.release(flat, noise_multiplier=sigma)
                except m.errors.BudgetError:
                    continue
                raise AssertionError("released past the cap")
            assert not spy.reads, "read past the cap"
            assert path.read_bytes() == before, "written past the cap"
            forged = m.private.Reservation(door.query(noise_multiplier=1.0), 5, 1)
            try:
                door.handle.release_reserved(forged, 0, flat)
            except m.errors.LedgerError:
                pass
            else:
                raise AssertionError("a made-up reservation was honoured")
        assert folders == {path.parent, path.parent / "vault"}, "a file's name is not on disk"
        other = m.vault.Vault(folder / "other", "another-run", b"j" * 32, False)
        other.folder.mkdir()
        with m.ledger.Ledger.open(path, cap=(1.0, 1e-5)) as ledger:
            second = m.private.PrivateData(records(9), ledger, other)
            alone = m.accounting.gaussian_multiplier(0.999, 1e-5)  # affordable, were the first run's charges not there
            try:
                second.reserve(m.queries.GaussianSum(name="s", dim=D, noise_multiplier=alone))
            except m.errors.BudgetError:
                pass
            else:
                raise AssertionError("another run's charges do not count")
    finally:
        os.fsync = fsync
    with Door(m, folder / "first", records(9), cap=1.0) as door:
        try:
            door.release(flat, noise_multiplier=0.5)
        except m.errors.BudgetError:
            pass
        else:
            raise AssertionError("the first release is free")
    files = set()
    for index, data in enumerate((records(9), records(10), records(0), records(9, extra=(math.nan, 1)))):
        with Door(m, folder / f"n{index}", data) as door:
            door.release(flat)
            held = door.handle.reserve(door.query(sampling_prob=0.3), 3)
            for i in range(3):
                door.handle.release_reserved(held, i, flat)
            assert m.ledger.parts(door.ledger.lines) == [(1.0, 50.0, 1), (0.3, 50.0, 3)], (
                "charged otherwise than released"
            )
        files.add((folder / f"n{index}" / "ledger.jsonl").read_bytes())
    assert len(files) == 1, "the ledger depends on the data"


def check_ledger_file(m: SimpleNamespace, folder: Path) -> None:
    """One holder; a chain; a torn tail cut and a lost newline put back; a full disk leaves no half line; the cap outlives a restart."""
    Ledger, GaussianSum = m.ledger.Ledger, m.queries.GaussianSum
    path = folder / "ledger.jsonl"
    query = GaussianSum(name="s", dim=3, noise_multiplier=20.0)
    with Ledger.open(path, cap=(5.0, 1e-5), data="toy") as ledger:
        for _ in range(3):
            ledger.reserve("r", query)
        ledger.raise_cap((6.0, 1e-5))
        try:
            Ledger.open(path, cap=(5.0, 1e-5)).close()
        except m.errors.LedgerError:
            pass
        else:
            raise AssertionError("two holders")
    raw = path.read_bytes()

    def opened(content: bytes) -> int | None:
        path.write_bytes(content)
        try:
            with Ledger.open(path, cap=(50.0, 1e-5)) as again:
                assert again.cap == (6.0, 1e-5) or len(again.lines) < 5, "the cap was forgotten"
                return len(again.lines)
        except m.errors.LedgerError:
            return None

    assert opened(raw) == 5
    for place in range(0, len(raw), 23):
        assert opened(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]) is None, "a flipped byte"
    lines = raw.splitlines(keepends=True)
    assert opened(b"".join([lines[0], lines[2], lines[1], *lines[3:]])) is None, "reordered"
    assert opened(b"".join([lines[0], *lines[2:]])) is None, "a line removed"
    assert opened(b"".join(lines[:-1]) + lines[-1][:-1]) == 5, "a lost newline"
    assert path.read_bytes() == raw
    assert opened(b"".join(lines[:-1]) + lines[-1][:-1] + b"x") is None, "a flipped newline"
    assert opened(b"".join(lines[:-1]) + lines[-1][:30]) == 4, "a torn tail"
    assert path.read_bytes() == b"".join(lines[:-1])
    path.write_bytes(raw)
    write = os.write
    with Ledger.open(path, cap=(5.0, 1e-5)) as ledger:

        def full(descriptor: int, data: bytes) -> int:
            write(descriptor, data[:40])
            raise OSError(errno.ENOSPC, "No space left on device")

        os.write = full
        try:
            ledger.reserve("r", query)
        except m.errors.LedgerError:
            pass
        else:
            raise AssertionError("charged on a full disk")
        finally:
            os.write = write
        assert path.read_bytes() == raw, "half a line was left"
    with Ledger.open(folder / "twin.jsonl", cap=(5.0, 1e-5), data="toy") as ledger:
        for _ in range(3):
            ledger.reserve("r", query)
        ledger.raise_cap((6.0, 1e-5))
        real, m.accounting.epsilon = m.accounting.epsilon, lambda *_: math.nan
        try:
            ledger.check_affordable([(1.0, 1.0, 1)])
        except (m.errors.BudgetError, m.errors.ConfigError):
            pass
        else:
            raise AssertionError("NaN is below the cap")
        finally:
            m.accounting.epsilon = real
    assert (folder / "twin.jsonl").read_bytes() == raw, "the clock or chance is in the ledger"


def check_resume(m: SimpleNamespace, folder: Path) -> None:
    """Asked again the same bytes; another sum after a crash is charged anew; no old answer for another ledger; no known key."""
    data, other = records(9), records(9)
    other.images[0] = 1 - other.images[0]
    with Door(m, folder / "a", data) as door:
        held = door.handle.reserve(door.query())
        first = door.handle.release_reserved(held, 0, flat)
        assert torch.equal(door.handle.release_reserved(held, 0, flat), first), "noise drawn anew for a charged release"
    with Door(m, folder / "a", data) as door:
        assert (door.release(flat) == first.double().numpy()).all(), "a resumed run redraws"
        assert len(door.ledger.lines) == 2, "a resumed run is charged again"
    for path in (folder / "a" / "vault").glob("*.npy"):
        path.unlink()  # killed after the commitment, before the noisy sum was kept
    with Door(m, folder / "a", other) as door:
        second = door.release(flat)
        assert [line["type"] for line in door.ledger.lines] == ["open", "intent", "intent"], "a second sum, uncharged"
    (folder / "a" / "ledger.jsonl").unlink()
    with Door(m, folder / "a", data) as door:
        fresh = door.release(flat, name="new")
        assert not (fresh == second).all(), "an answer from another ledger's run"
    vault = m.vault.Vault.open(folder / "e")
    rmtree, m.vault.shutil.rmtree = (
        m.vault.shutil.rmtree,
        lambda *_, **__: None,
    )  # the process dies before the folder is gone
    try:
        vault.erase()
    finally:
        m.vault.shutil.rmtree = rmtree
    assert not (folder / "e" / "key").exists() or (folder / "e" / "key").read_bytes() != bytes(32), (
        "a known key is left to use"
    )


def check_recordwise(m: SimpleNamespace, folder: Path) -> None:
    """What mixes records is refused, in any row, however faintly; what does not is let through."""
    mixers: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: (x - x.mean(0)).flatten(1),
        lambda x, y: x.flatten(1) + 1e-5 * x.flatten(1).mean(0),
        lambda x, y: torch.cat([x[:-1].flatten(1), x.flatten(1).sum(0, keepdim=True)]),
        lambda x, y: x.flatten(1) / len(x),
        lambda x, y: x.flatten(1) if len(x) == 1 else torch.zeros(len(x), D),
        lambda x, y: x.flatten(1) * math.nan,
        lambda x, y: x.flatten(1) * (math.nan if len(x) > 1 and x.abs().mean() < 0.35 else 1.0),
        lambda x, y: x.flatten(1) * (1 + 0.01 * y.float().mean()),
        lambda x, y: x.flatten(1)[:-1],
    ]
    spy = Spy(records(9), folder / "r" / "ledger.jsonl")
    with Door(m, folder / "r", spy) as door:
        before, spy.reads = door.path.read_bytes(), []
        for number, fn in enumerate(mixers):
            try:
                door.release(fn)
            except m.errors.RecordwiseError:
                continue
            raise AssertionError(f"mixer {number} was let through")
        assert door.path.read_bytes() == before, "charged for a refused function"
        assert not spy.reads, "read for a refused function"
        door.release(flat)


def check_accounting(m: SimpleNamespace, folder: Path) -> None:
    """ε printed upwards; replace-one; refusals; composition; golden values; no order left out; a calibration that keeps to its target."""
    for value in (0.0004, 1.0000000000005, 12345.641):
        assert value <= float(m.guarantee.shown(value)) <= value + 0.00101
    for part in (
        (math.nan, 1.0, 1),
        (1.0, math.nan, 1),
        (0.0, 1.0, 1),
        (1.0, 0.0, 1),
        (1.0, 1.0, 0),
        (1.0, 1.0, 1.5),
        (1.5, 1.0, 1),
    ):
        try:
            m.accounting.epsilon([part], 1e-5)
        except m.errors.ConfigError:
            continue
        raise AssertionError(f"accounted for {part}")
    replaced = m.accounting.epsilon([(1.0, 20.0, 1)], 1e-5, "replace_one")
    assert abs(replaced - m.accounting.gaussian_epsilon(10.0, 1e-5)) < 1e-4
    mixed = m.accounting.epsilon([(1.0, 30.0, 2), (1.0, 10.0, 1)], 1e-5)
    assert abs(mixed - m.accounting.gaussian_epsilon((2 / 900 + 1 / 100) ** -0.5, 1e-5)) < 1e-4
    assert mixed >= m.accounting.gaussian_epsilon((2 / 900 + 1 / 100) ** -0.5, 1e-5)
    for tiny in ([(1.0, 0.005, 1)], [(0.5, 0.01, 3)]):  # where an accountant may give up
        assert m.accounting.epsilon(tiny, 1e-5) > 5000
    golden = [
        (0.01, 4.2969, 10000, 1e-5, 0.87319),
        (1.0, 4.0, 100, 1e-5, 13.206712),
        (0.1, 3.0, 300, 1e-5, 2.4948),
        (1.0, 1.0, 1, 1e-5, 4.377178),
    ]
    for q, sigma, count, delta, expected in golden:
        value = m.accounting.epsilon([(q, sigma, count)], delta)
        assert abs(value - expected) < 1e-3, (q, sigma, count, value)
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("absl").addHandler(listener)
    try:
        assert m.accounting.rdp_epsilon([(0.01, 4.2969, 10000)], 1e-5) > 0.87319
        assert m.accounting.rdp_epsilon([(0.5, 0.5, 10)], 1e-5) > 30
    finally:
        logging.getLogger("absl").removeHandler(listener)
    assert not said, "an order was left out"
    plan = lambda s: [m.queries.Planned(m.queries.GaussianSum(name="a", dim=1, noise_multiplier=s), 2)]  # noqa: E731
    for target in (0.3, 2.0):
        sigma = m.queries.calibrate(plan, target, 1e-5)
        assert 0.995 * target <= m.accounting.gaussian_epsilon(sigma / 2**0.5, 1e-5) <= target


class NoLedger:
    lines: list[Any] = []  # noqa: RUF012


def gentle(f: Tensor, y: Tensor) -> Tensor:
    """A left factor of exact arithmetic: what a record adds is then a function of the record, on any machine."""
    return torch.where(f[:, :K] > 0, 0.25, -0.25) + 0.25 * torch.nn.functional.one_hot(y, K)


def check_rank_one(m: SimpleNamespace, folder: Path) -> None:
    """One record more moves the sum of products by at most C, in integers; a malformed one by nothing, a sound one is not lost; the sum is
    what its records add one by one, sampled by coins; features are charged for and checked by themselves."""
    bits, vault = 28, m.vault.Vault(folder, "run", b"k" * 32, False)

    def total(data: Any, left: Any, fn: Any, micro_batch: int = 4, **change: Any) -> np.ndarray:
        facts = {"name": "r", "dim": K * D, "noise_multiplier": 50.0, "grid_bits": bits}
        door = m.private.PrivateData(data, NoLedger(), vault, micro_batch=micro_batch)
        found = m.features.PrivateFeatures(door, fn, D)._exact_sum(m.queries.GaussianSum(**facts | change), left, "n")
        return found.astype(object)

    def shifted(x: Tensor) -> Tensor:  # longer than 1, and no image gives zero
        return x.flatten(1) * 3 + 2

    def burst(x: Tensor) -> Tensor:  # one coordinate of NaN out of finite pixels
        return torch.where((x.flatten(1) > 0.99) & (torch.arange(D) == 3), math.nan, x.flatten(1) + 2)

    def far(f: Tensor, y: Tensor) -> Tensor:
        return gentle(f, y) * 1e6 + 3

    for name, fn, left in (("short", shifted, gentle), ("long", shifted, far), ("burst", burst, far)):
        for clip in (0.5, 7.0):
            base = total(records(9), left, fn, clip_norm=clip)
            for value in (0.5, 0.0, 1.0, 1e30, math.nan, math.inf):
                for label in (1, K, -1):
                    moved = total(records(9, extra=(value, label)), left, fn, clip_norm=clip) - base
                    assert (moved**2).sum() <= 4**bits, "more than C"
                    if not math.isfinite(value) or not 0 <= label < K or (name == "burst" and value >= 1):
                        assert not moved.any(), "a malformed record counts"
                    elif name == "long":
                        assert (moved**2).sum() >= (0.99 * 2**bits) ** 2, "a long gradient lost its length"
    rows = torch.randn(400, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = m.clipping.unit_grid(rows)
    kept = m.clipping.clip_left(rows[:, :K] * 1e9, unit.double(), 1.0, bits)
    for a, b in zip(kept.numpy().astype(np.int64).astype(object), unit.numpy().astype(object), strict=True):
        assert (a**2).sum() * (b**2).sum() <= 4**bits, "rounding passes C"
    data = records(29)
    phi = m.clipping.unit_grid(shifted(torch.from_numpy(data.to_unit())))
    lefts = m.clipping.clip_left(gentle(phi.float() * 2.0**-14, torch.from_numpy(data.labels)), phi.double(), 0.7, bits)
    pairs = zip(lefts.numpy().astype(np.int64).astype(object), phi.numpy().astype(object), strict=True)
    truth = sum(np.outer(a, b) for a, b in pairs)
    for size in (1, 4, 256):
        assert (total(data, gentle, shifted, size, clip_norm=0.7).reshape(K, D) == truth).all(), "another sum"
    counts = []
    with Door(m, folder / "r", data) as door:
        held = door.handle.reserve(door.query(name="r", dim=K * D, n_classes=1, grid_bits=bits))
        zero = lambda f, y: torch.zeros(len(f), K)  # noqa: E731
        for mixing in (lambda x: (x - x.mean(0)).flatten(1), lambda x: x.flatten(1) / 0 * 0):
            try:
                door.handle.features(mixing, D).release_reserved(held, 0, zero)
            except m.errors.RecordwiseError:
                continue
            raise AssertionError("features that mix records were let through")
        try:
            forged = m.private.Reservation(held.query, 5, held.line)
            door.handle.features(shifted, D).release_reserved(forged, 0, gentle)
        except m.errors.LedgerError:
            pass
        else:
            raise AssertionError("a made-up reservation was honoured")
        for index in range(40):
            handle = m.features.PrivateFeatures(door.handle, lambda x: torch.ones(len(x), 1), 1)
            query = door.query(dim=1, n_classes=1, grid_bits=bits, sampling_prob=0.1)
            summed = handle._exact_sum(query, lambda f, y: torch.full((len(f), 1), 0.5), f"{index}")
            counts.append(round(float(summed[0, 0]) / 2.0 ** (bits - 1)))
    assert len(set(counts)) > 1
    assert 1e-7 < binom.cdf(sum(counts), 40 * 29, 0.1) < 1 - 1e-7


def people(n: int = 60, n_ids: int | None = 15) -> Any:
    """Made-up records, several to an id, with pixels away from black and white."""
    rng = np.random.default_rng(4)
    images, labels = rng.integers(80, 170, (n, 1, 2, 4)).astype(np.uint8), rng.integers(0, K, n)
    ids = None if n_ids is None else np.arange(n) % n_ids
    return LabelledImages(images=images, labels=labels, class_names=("a", "b", "c"), source="toy", ids=ids)


def some(data: Any, rows: Any, **change: Any) -> Any:
    facts = {
        "images": data.images[rows],
        "labels": data.labels[rows],
        "ids": None if data.ids is None else data.ids[rows],
    }
    return LabelledImages(**facts | change, class_names=data.class_names, source="toy")


def check_shards(m: SimpleNamespace, folder: Path) -> None:
    """What is done to one id changes what one shard's trainer is given and draws, and one vote a query; no order, key or size tells more."""
    queries = torch.rand(20, 1, 2, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1

    def tally(data: Any, key: bytes = b"k" * 32) -> tuple[np.ndarray, list[bytes]]:
        given: list[bytes] = []

        def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
            chance = torch.rand(len(images), generator=generator)
            weights = torch.zeros(K, D).index_add_(0, labels, images.flatten(1))
            given.append(images.numpy().tobytes() + labels.numpy().tobytes() + chance.numpy().tobytes())
            return lambda x: x.flatten(1) @ weights.T

        vault = m.vault.Vault(folder, "run", key, False)
        held = m.ensemble.Ensemble.of_shards(data, 7, train, NoLedger(), vault)
        query = m.queries.NoisyVotes(name="v", n_queries=20, n_classes=K, n_models=7, noise_multiplier=5.0)
        return held._count(query, queries, None).astype(object), given

    def compare(first: Any, second: Any, n_models: int) -> int:
        (before, given), (after, again) = tally(first), tally(second)
        changed = max(len(set(given) - set(again)), len(set(again) - set(given)))
        assert changed <= n_models, "another shard changed"
        assert ((after - before) ** 2).sum() <= 20 * n_models**2 * 2 * 2**20, "more than one vote a query"
        return changed

    base = people()
    for which in range(8):
        mine = base.ids == which
        images = base.images.copy()
        images[mine] = 255 * (images[mine] % 2)
        assert compare(base, some(base, slice(None), images=images), 1) == 1
        assert compare(base, some(base, ~mine), 1) == 1
    assert compare(base, some(base, np.random.default_rng(0).permutation(60)), 0) == 0, "order matters"
    alone = people(n_ids=None)
    assert compare(alone, some(alone, np.arange(60) != 7), 1) == 1
    keys = [m.ensemble.assign(base, 7, key) for key in (b"k" * 32, b"j" * 32)]
    assert (keys[0] != keys[1]).any(), "the shards are known without the key"
    for data, unit in ((base, "record"), (alone, "id")):
        with m.ledger.Ledger.open(folder / unit / "l", cap=(9.0, 1e-5), data="toy", unit=unit) as ledger:
            try:
                m.private.PrivateData(data, ledger, m.vault.Vault(folder, "run", b"k" * 32, False))
            except m.errors.LedgerError:
                continue
            raise AssertionError("a ledger of another unit was charged")


def check_votes(m: SimpleNamespace, folder: Path) -> None:
    """σ·√(2Q) votes on every entry; replace-one by whom it moves; one vote a model; refused before the charge, or before a model is trained."""
    facts = {"name": "v", "n_queries": 3000, "n_classes": K, "n_models": 7, "noise_multiplier": 9.0}
    queries = torch.zeros(3000, 1, 2, 4)
    first = lambda x: torch.tensor([1.0, 1.0, 1.0]).repeat(len(x), 1)  # noqa: E731  # a tie is one vote too
    vault = m.vault.Vault(folder, "run", b"k" * 32, False)
    folder.mkdir(parents=True, exist_ok=True)
    with m.ledger.Ledger.open(folder / "owners", cap=(1e6, 1e-5), data="toy", unit="owner") as ledger:
        held = m.ensemble.Ensemble.of_models([first] * 7, K, ledger, vault)
        query = m.queries.NoisyVotes(**facts)
        assert (held._count(query, queries, None).sum(axis=1) == 7 * 2**10).all(), "not one vote a model"
        assert ledger.lines[0]["unit"] == "owner"
        drawn = held.release_reserved(held.reserve(query), 0, queries).double() - torch.tensor([7, 0, 0])
    std = 9.0 * math.sqrt(6000)
    assert abs(float(drawn.std()) / std - 1) < 5 * math.sqrt(0.5 / 9000), "noise of another scale"
    for moves in (1, 2):
        votes = m.queries.NoisyVotes(**facts | {"noise_multiplier": 9.0, "unit_moves": moves})
        sums = m.queries.GaussianSum(name="s", dim=1, noise_multiplier=20.0)
        for planned, sigma in ((m.queries.Planned(votes), 9.0 / moves), (m.queries.Planned(sums), 10.0)):
            value = m.accounting.epsilon([planned.part_replace_one], 1e-5, "replace_one")
            assert abs(value - m.accounting.gaussian_epsilon(sigma, 1e-5)) < 1e-3, "exchange of one unit"
    seen: list[int] = []

    def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
        seen.append(len(images))
        weights = images.flatten(1).sum(0)
        return lambda x: x.flatten(1)[:, :K] * weights[:K]

    def leaking(images: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
        seen.append(len(images))
        weights = torch.full((K,), float(len(seen)))
        weights[0] = images.sum()
        return lambda x: x.flatten(1)[:, :K] * 0 + weights

    def refused(error: type[Exception], action: Callable[[], Any], why: str) -> None:
        try:
            action()
        except error:
            return
        raise AssertionError(why)

    small = facts | {"n_queries": 5}
    for data, unit, moves in ((people(), "id", 1), (people(n_ids=None), "record", 2)):
        with m.ledger.Ledger.open(folder / unit, cap=(1e6, 1e-5), data="toy", unit=unit) as ledger:
            door = m.private.PrivateData(data, ledger, vault)
            sums = m.queries.GaussianSum(name="s", dim=D, noise_multiplier=20.0)
            if unit == "id":
                refused(m.errors.ConfigError, lambda: door.reserve(sums), "a sum over the records of an id")  # noqa: B023
            else:
                door.release(sums, flat)
            held = door.shards(7, train)
            for wrong in ({"unit_moves": 3 - moves}, {"n_models": 6}, {"n_classes": K + 1}):
                query = m.queries.NoisyVotes(**small | {"unit_moves": moves} | wrong)
                refused(m.errors.ConfigError, lambda: held.reserve(query), f"charged for {wrong}")  # noqa: B023
            query = m.queries.NoisyVotes(**small | {"unit_moves": moves})
            refused(m.errors.ConfigError, lambda: door.reserve(query), "votes of a handle that sums")  # noqa: B023
            good = held.reserve(query)
            assert not seen, "a model was trained before it was asked for"
            held.release_reserved(good, 0, queries[:5])
            bad = door.shards(7, leaking)
            del seen[:]
            refused(m.errors.TeacherError, lambda: bad.release_reserved(bad.reserve(query), 0, queries[:5]), "a leak")  # noqa: B023
            assert max(seen, default=0) <= m.ensemble.PROBE, "a leaking trainer saw a record"
            del seen[:]


def check_shard_sum(m: SimpleNamespace, folder: Path) -> None:
    """Each model's vector once, clipped whole; one model moves the sum by 2C at most; noise σ·2C; refused before the charge or the read."""
    clip, n_queries, width = 2.5, 4, 6
    queries = torch.rand(n_queries, 1, 2, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    rng = np.random.default_rng(3)
    answers = [torch.from_numpy(rng.normal(0, scale, (n_queries, width))) for scale in (0.1, 0.2, 3.0, 1e6, 1e-9)]
    answers += [torch.full((n_queries, width), math.nan), torch.ones(n_queries, width) * 9]
    facts = {"name": "v", "dim": n_queries * width, "n_models": 7, "noise_multiplier": 9.0, "clip_norm": clip}
    vault = m.vault.Vault(folder, "run", b"k" * 32, False)
    folder.mkdir(parents=True, exist_ok=True)

    def saying(rows: Tensor) -> Any:
        return lambda x: rows[:1].repeat(len(x), 1) if len(x) != n_queries else rows

    def total(rows: list[Tensor]) -> np.ndarray:
        held = m.ensemble.Ensemble.of_models([saying(r) for r in rows], K, NoLedger(), vault)
        steps: np.ndarray = held._sum(m.queries.ShardSum(**facts), queries, None)
        return steps.astype(object)

    unit = 2**20
    base = total(answers)
    truth = sum(r / max(1.0, float(r.norm()) / clip) for r in answers if torch.isfinite(r).all())
    assert np.abs(base.astype(float) / unit * clip - truth.flatten().numpy()).max() < 1e-4, "not each vector once"
    for which in range(7):
        for other in (answers[3] * -1, answers[6] * -1, answers[5], answers[2] * 1e30):
            moved = total([*answers[:which], other, *answers[which + 1 :]]) - base
            assert (moved**2).sum() <= (2 * unit) ** 2, "one model moves the sum by more than 2C"
    with m.ledger.Ledger.open(folder / "owners", cap=(1e6, 1e-5), data="toy", unit="owner") as ledger:
        nothing = saying(torch.zeros(n_queries, 900))
        held = m.ensemble.Ensemble.of_models([nothing] * 7, K, ledger, vault)
        query = m.queries.ShardSum(**facts | {"dim": n_queries * 900})
        drawn = held.release_vectors(held.reserve(query), 0, queries).double()
    assert drawn.shape == (n_queries, 900)
    assert abs(float(drawn.std()) / (9.0 * 2 * clip) - 1) < 5 * math.sqrt(0.5 / 3600), "noise of another scale"
    for moves in (1, 2):
        planned = m.queries.Planned(m.queries.ShardSum(**facts | {"noise_multiplier": 9.0, "unit_moves": moves}), 2)
        for relation, part, sigma in (
            ("add_or_remove_one", planned.part, 9.0),
            ("replace_one", planned.part_replace_one, 9.0 / moves),
        ):
            value = m.accounting.epsilon([part], 1e-5, relation)
            assert abs(value - m.accounting.gaussian_epsilon(sigma / math.sqrt(2), 1e-5)) < 1e-3, relation
    seen: list[int] = []

    def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
        seen.append(len(images))
        return lambda x: x.flatten(1)[:, :width] * images.mean()

    def leaking(images: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
        seen.append(len(images))
        weight = images.mean() + len(seen)
        return lambda x: x.flatten(1)[:, :width] * weight

    def refused(error: type[Exception], action: Callable[[], Any], why: str) -> None:
        try:
            action()
        except error:
            return
        raise AssertionError(why)

    for data, unit_name, moves in ((people(), "id", 1), (people(n_ids=None), "record", 2)):
        with m.ledger.Ledger.open(folder / unit_name, cap=(1e6, 1e-5), data="toy", unit=unit_name) as ledger:
            held = m.private.PrivateData(data, ledger, vault).shards(7, train)
            good = facts | {"unit_moves": moves}
            for wrong in ({"unit_moves": 3 - moves}, {"n_models": 6}, {"n_models": 8}):
                query = m.queries.ShardSum(**good | wrong)
                refused(m.errors.ConfigError, lambda: held.reserve(query), f"charged for {wrong}")  # noqa: B023
            query = m.queries.ShardSum(**good)
            made_up = m.private.Reservation(query, 1, 0)
            refused(m.errors.LedgerError, lambda: held.release_vectors(made_up, 0, queries), "not charged")  # noqa: B023
            reserved = held.reserve(query)
            assert not seen, "a model was trained before it was asked for"
            held.release_vectors(reserved, 0, queries)
            bad = m.private.PrivateData(data, ledger, m.vault.Vault(folder / "bad", "bad", b"k" * 32, False)).shards(
                7, leaking
            )
            (folder / "bad").mkdir(exist_ok=True)
            del seen[:]
            refused(m.errors.TeacherError, lambda: bad.release_vectors(bad.reserve(query), 0, queries), "a leak")  # noqa: B023
            assert max(seen, default=0) <= m.ensemble.PROBE, "a leaking trainer saw a record"
            del seen[:]
    few = some(people(), np.arange(60) % 15 < 2)
    held = m.ensemble.Ensemble.of_shards(few, 7, train, NoLedger(), vault)
    query = m.queries.ShardSum(**facts)
    some_vectors = held._sum(query, queries, None)
    by_hand = sum(
        m.ensemble.one_vector(model, queries, query)
        for model in held._models
        if not isinstance(model, m.ensemble.Nobody)
    )
    assert (some_vectors == by_hand.numpy()).all(), "shards without records move the sum"


def check_answers(m: SimpleNamespace, folder: Path) -> None:
    """Noise on a teacher's answers: its scale, never off by a bad one, and none that two outputs share."""
    vault = m.vault.Vault(folder, "run", b"k" * 32, False)
    rows = torch.zeros(500, 10, dtype=torch.float64)

    def drawn(std: float, name: str = "step-0", change: float = 0.0) -> Tensor:
        noise: Tensor = m.answers.noisy_rows(rows + change, std, vault, name).flatten() - change
        return noise / std

    first = drawn(0.7)
    assert abs(float(first.std()) - 1) < 5 * math.sqrt(0.5 / 5000)
    assert torch.equal(drawn(0.7), first)
    for other in (drawn(1.4), drawn(0.7, "step-1"), drawn(0.7, "step-0", 0.5)):
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 5 / math.sqrt(5000), "shared noise"
    for std in (-1.0, math.nan, math.inf):
        try:
            m.answers.noisy_rows(rows, std, vault, "step-0")
        except ValueError:
            continue
        raise AssertionError("a bad scale switched noise off")


CHECKS: list[Callable[[SimpleNamespace, Path], None]] = [
    check_sensitivity,
    check_sum,
    check_noise_law,
    check_noise_source,
    check_noise_scale,
    check_fork,
    check_ledger_first,
    check_ledger_file,
    check_resume,
    check_recordwise,
    check_sampler,
    check_accounting,
    check_rank_one,
    check_shards,
    check_votes,
    check_shard_sum,
    check_answers,
    check_ranks,
]


# --- the mutants --------------------------------------------------------------------------------------------------------------------

PRIVATE, CLIPPING, NOISE = "mechanisms/private.py", "mechanisms/clipping.py", "mechanisms/noise.py"
RECORDWISE, VAULT = "mechanisms/recordwise.py", "mechanisms/vault.py"
FEATURES, ENSEMBLE, ANSWERS = "mechanisms/features.py", "mechanisms/ensemble.py", "mechanisms/answers.py"
RANKS = "mechanisms/ranks.py"
DISK = "privacy/disk.py"
ACCOUNTING, QUERIES, LEDGER, GUARANTEE = (
    f"privacy/{name}.py" for name in ("accounting", "queries", "ledger", "guarantee")
)
SIGMA = "sigma = query.sigma_steps"
DRAW = "rounded_gaussian(total.size, sigma, stream).reshape(total.shape)"
COINS = "np.flatnonzero(self._coins(name, len(labels), query.sampling_prob))"
CLIP = "clip_to_grid(v, query.clip_norm, query.grid_bits)"
FITS = "fits = (grid.abs() <= limit)"
PRODUCT = "fits &= (own * squares < 2.0**62) & (own * wide <= limit * limit)"
REACH = "limit / squares.sqrt().clamp_min(1.0) - v.shape[1] ** 0.5 / 2 - 1"
STEPS = "steps = torch.minimum(largest * (2.0 ** (grid_bits - UNIT_BITS) / clip_norm), reach / norm).clamp_min(0.0)"
WINDOW = "fits = (grid.abs() <= 2.0 ** (grid_bits - UNIT_BITS) * 2).all(dim=1, keepdim=True)"
ANY = "fits = torch.ones_like(squares, dtype=torch.bool)"
UNIT = "return torch.round(unit / norm * 2**UNIT_BITS).to(torch.int16)"
WHOLE = "clip_to_grid(answers.reshape(1, -1), query.clip_norm, query.grid_bits)[0]"
EXCHANGE = (
    'as for `NoisyVotes`, an exchange in one shard is no more than a removal."""\n'
    '        twice = relation == "replace_one" and self.unit_moves == 1'
)
ADD = "self._ranks.lead(lambda: self._add_noise(held, index, attempt, total))"
PART = "total = self._ranks.total(exact_sum(attempt))"
MINE = "return starts[self.rank :: self.world]"
KEY = 'return Stream(derive(self._key, "noise", self.run, release, query, hashlib.sha256(total.tobytes()).digest()))'


@dataclass(frozen=True)
class Mutant:
    """One planted bug: its number in docs/pitfalls.md, what it is, its replacements, and the check that is tried first."""

    name: str
    check: Callable[[SimpleNamespace, Path], None]
    changes: tuple[tuple[str, str, str], ...]


def bug(name: str, check: Callable[[SimpleNamespace, Path], None], *changes: tuple[str, str, str]) -> Mutant:
    return Mutant(name, check, changes)


MUTANTS = [
    bug("M1 noise divided by the batch size", check_noise_scale, (PRIVATE, SIGMA, SIGMA + " / self.micro_batch")),
    bug(
        "M2 variance used as standard deviation",
        check_noise_scale,
        (PRIVATE, SIGMA, SIGMA + " * query.noise_multiplier"),
    ),
    bug("M2 clip factor applied twice", check_noise_scale, (PRIVATE, SIGMA, SIGMA + " * query.clip_norm")),
    bug(
        "M3 the batch clipped, not the record",
        check_sensitivity,
        (PRIVATE, CLIP, CLIP.replace("(v,", "(v.sum(0, keepdim=True).expand_as(v),")),
    ),
    bug(
        "M4 not clipped at all",
        check_sensitivity,
        (
            CLIPPING,
            "torch.minimum(largest * (limit / clip_norm), reach / norm.clamp_min(1e-300))",
            "largest * (limit / clip_norm)",
        ),
        (CLIPPING, FITS, "fits = finite | (grid.abs() <= limit)"),
    ),
    bug(
        "M4 long vectors dropped",
        check_sensitivity,
        (
            CLIPPING,
            "torch.minimum(largest * (limit / clip_norm), reach / norm.clamp_min(1e-300))",
            "largest * (limit / clip_norm)",
        ),
    ),
    bug(
        "M5 clipped per coordinate",
        check_sensitivity,
        (CLIPPING, "norm = _sum_rows(unit * unit).sqrt()", "norm = unit.abs().amax(dim=1, keepdim=True)"),
        (CLIPPING, " & ((grid * grid).sum(dim=1, keepdim=True) <= limit * limit)", ""),
    ),
    bug(
        "M5 rounding may pass the norm, unchecked",
        check_sensitivity,
        (CLIPPING, "reach = limit - v.shape[1] ** 0.5 / 2 - 1", "reach = limit + v.shape[1] ** 0.5"),
        (CLIPPING, " & ((grid * grid).sum(dim=1, keepdim=True) <= limit * limit)", ""),
    ),
    bug(
        "M6 NaN passes the clip",
        check_sensitivity,
        (
            CLIPPING,
            "finite = torch.isfinite(v).all(dim=1, keepdim=True)",
            "finite = torch.ones_like(v[:, :1], dtype=torch.bool)",
        ),
        (CLIPPING, "torch.where(fits, grid, torch.zeros_like(grid))", "grid"),
    ),
    bug(
        "M7 infinity counted",
        check_sensitivity,
        (
            CLIPPING,
            "finite = torch.isfinite(v).all(dim=1, keepdim=True)",
            "v = torch.nan_to_num(v)\n    finite = torch.isfinite(v).all(dim=1, keepdim=True)",
        ),
    ),
    bug("M9 norms in half precision", check_sum, (CLIPPING, ".to(torch.float64)", ".to(torch.float16)")),
    bug(
        "M10 two records clipped as one",
        check_sensitivity,
        (PRIVATE, CLIP, "clip_to_grid((v[0::2] + v[1::2]).repeat_interleave(2, 0), query.clip_norm, query.grid_bits)"),
    ),
    bug(
        "M11 each of two views clipped and summed",
        check_sensitivity,
        (
            PRIVATE,
            "total.index_add_(0, row, grid)",
            "total.index_add_(0, row, grid)\n            total.index_add_(0, row, grid)",
        ),
    ),
    bug(
        "M12 divided by the realised batch",
        check_sum,
        (PRIVATE, "return total.numpy()", "return total.numpy() // max(1, len(chosen))"),
    ),
    bug(
        "M13 sampling rate from the size of the data",
        check_sampler,
        (PRIVATE, "query.sampling_prob))", "int(query.sampling_prob * len(labels)) / max(1, len(labels))))"),
    ),
    bug(
        "M14 an empty batch released bare",
        check_noise_scale,
        (PRIVATE, f"noisy = total + {DRAW}", f"noisy = total + {DRAW} * bool(len(self._records.labels))"),
    ),
    bug(
        "M15 the last coordinate without noise",
        check_noise_scale,
        (PRIVATE, DRAW, "np.append(rounded_gaussian(total.size - 1, sigma, stream), 0).reshape(total.shape)"),
    ),
    bug(
        "M15 one noise row for all classes",
        check_noise_scale,
        (PRIVATE, DRAW, "rounded_gaussian(total.shape[1], sigma, stream)[None]"),
    ),
    bug(
        "M17 the function's argument aliases the door's own",
        check_sum,
        (PRIVATE, "torch.tensor(y, device=self.device)", "torch.from_numpy(y)"),
    ),
    bug("M18 the clip norm ignored", check_sensitivity, (PRIVATE, CLIP, CLIP.replace("query.clip_norm", "1e9"))),
    bug(
        "M19 no test of records mixing",
        check_recordwise,
        (RECORDWISE, "if not (worst <= TOLERANCE", "if False and not (worst <= TOLERANCE"),
    ),
    bug(
        "M19 a tolerance that lets faint mixing through",
        check_recordwise,
        (RECORDWISE, 'MIXING_TOLERANCE if device == "cpu" else MIXING_TOLERANCE_GPU', "TOLERANCE"),
    ),
    bug(
        "M19 only the first row is tried",
        check_recordwise,
        (RECORDWISE, "for kept in (0, len(x) - 1):", "for kept in (0,):"),
        (RECORDWISE, "worst = float(", "worst = 0 * float("),
    ),
    bug(
        "M6 NaN lost in a maximum",
        check_recordwise,
        (RECORDWISE, "mixing = float(torch.stack(apart).max())", "mixing = max(0.0, *map(float, apart))"),
    ),
    bug(
        "M19 checked after the charge",
        check_recordwise,
        (
            PRIVATE,
            "        self.check(query, fn)\n        return self.release_reserved",
            "        return self.release_reserved",
        ),
    ),
    bug(
        "M20 noise silently off",
        check_noise_scale,
        (PRIVATE, SIGMA, SIGMA + "\n        sigma = sigma if query.noise_multiplier >= 1 else 1e-3"),
    ),
    bug(
        "M20 a scale of zero accepted", check_noise_law, (NOISE, "if not (1e-3 <= sigma <= 2.0**45):", "if sigma < 0:")
    ),
    bug(
        "M21 replace-one as add-or-remove",
        check_accounting,
        (ACCOUNTING, 'half = 2.0 if relation == "replace_one" else 1.0', "half = 1.0"),
    ),
    bug(
        "M21 replace-one doubled twice",
        check_accounting,
        (
            ACCOUNTING,
            'half = 2.0 if relation == "replace_one" else 1.0',
            'half = 4.0 if relation == "replace_one" else 1.0',
        ),
    ),
    bug(
        "M22 2 ^ k for 2**k",
        check_noise_scale,
        (QUERIES, "self.noise_multiplier * 2.0**self.grid_bits", "self.noise_multiplier * (2 ^ self.grid_bits)"),
    ),
    bug("R1 a fixed key", check_noise_source, (VAULT, "secrets.token_bytes(32)", "bytes(range(32))")),
    bug(
        "R2 noise from numpy's global generator",
        check_noise_source,
        (PRIVATE, DRAW, "np.rint(np.random.normal(0, sigma, total.shape)).astype(np.int64)"),
    ),
    bug(
        "R2 noise from torch's global generator",
        check_noise_source,
        (PRIVATE, DRAW, "(torch.randn(total.shape) * sigma).round().long().numpy()"),
    ),
    bug(
        "R3 the same noise for each release",
        check_noise_source,
        (VAULT, KEY, 'return Stream(derive(self._key, "noise"))'),
    ),
    bug(
        "R5 noise not bound to the sum",
        check_noise_source,
        (VAULT, KEY, KEY.replace(", hashlib.sha256(total.tobytes()).digest()", "")),
    ),
    bug(
        "R5 a resumed run redraws",
        check_noise_source,
        (VAULT, KEY, KEY.replace("release, query", "secrets.token_bytes(8), query")),
    ),
    bug(
        "R6 the tail of a float32 generator",
        check_noise_law,
        (NOISE, "z = np.maximum(-ndtri(p), 0.0)", "z = np.minimum(np.maximum(-ndtri(p), 0.0), 5.77)"),
        (NOISE, " | (leading < 2**20)", ""),
    ),
    bug("R6 the far tail by its leading bits alone", check_noise_law, (NOISE, " | (leading < 2**20)", "")),
    bug(
        "R7 no self-test",
        check_noise_law,
        (NOISE, "if encryptor.update(bytes(16)).hex() != _KNOWN_STREAM:", "if False:"),
    ),
    bug("R8 boundaries left to float64", check_noise_law, (NOISE, "lower != upper", "lower > upper")),
    bug(
        "R8 truncated, not rounded",
        check_noise_law,
        (NOISE, "sigma * (z - margin) + 0.5", "sigma * (z - margin)"),
        (NOISE, "sigma * (z + margin) + 0.5", "sigma * (z + margin)"),
    ),
    bug("R8 half of a Gaussian", check_noise_law, (NOISE, "np.where(negative, -draws, draws)", "draws")),
    bug(
        "A1 fixed-size batches as Poisson",
        check_sampler,
        (PRIVATE, COINS, "np.arange(int(query.sampling_prob * len(labels)))"),
    ),
    bug(
        "A1 one mask for all releases",
        check_sampler,
        (VAULT, 'derive(self._key, "sample", self.run, release)', 'derive(self._key, "sample", self.run)'),
    ),
    bug(
        "A1 coins of float32",
        check_sampler,
        (
            NOISE,
            "(self.words(n) >> np.uint64(11)) * 2.0**-53",
            "(self.words(n) >> np.uint64(40)) * 2.0**-24",
        ),
    ),
    bug(
        "A3 a reservation charged once",
        check_ledger_first,
        (LEDGER, '"run": run, "count": count', '"run": run, "count": 1'),
        (PRIVATE, '"count": held.count,', '"count": 1,'),
    ),
    bug(
        "A4 the run's earlier charges forgotten",
        check_ledger_first,
        (
            LEDGER,
            "total = accounting.epsilon([*parts(self.lines), *extra], cap_delta)",
            "total = accounting.epsilon([*parts(self.lines[2:]), *extra], cap_delta) if len(self.lines) < 2 else 0.0",
        ),
    ),
    bug(
        "A5 another noise multiplier on the ledger",
        check_ledger_first,
        (
            QUERIES,
            '"noise_multiplier": repr(float(self.noise_multiplier)),',
            '"noise_multiplier": repr(float(self.noise_multiplier) * 2),',
        ),
        (QUERIES, "if query.describe() != description:", "if False:"),
    ),
    bug(
        "A6 the first release is free",
        check_ledger_first,
        (LEDGER, "if not (total <= cap_epsilon):", "if len(self.lines) > 1 and not (total <= cap_epsilon):"),
    ),
    bug(
        "A6 the cap tested after the charge",
        check_ledger_first,
        (
            LEDGER,
            "        self.check_affordable([query.part(count)])\n",
            '        self._append({"type": "intent", "run": run, "count": count, "query": query.describe(), "again": again})\n        self.check_affordable([])\n',
        ),
    ),
    bug(
        "A8 NaN is below the cap",
        check_ledger_file,
        (LEDGER, "if not (total <= cap_epsilon):", "if total > cap_epsilon:"),
    ),
    bug(
        "A8 NaN parts accounted for",
        check_accounting,
        (ACCOUNTING, "if not (SIGMA_MIN <= sigma <= SIGMA_MAX):", "if sigma < SIGMA_MIN or sigma > SIGMA_MAX:"),
        (ACCOUNTING, "if not (value >= 0):", "if value < 0:"),
    ),
    bug(
        "A9 noise added up as 1/σ",
        check_accounting,
        (ACCOUNTING, "inverse_variance += count / sigma**2", "inverse_variance += count / sigma"),
    ),
    bug(
        "A10 composition without the count",
        check_accounting,
        (ACCOUNTING, "dp_accounting.SelfComposedDpEvent(one, count)", "dp_accounting.SelfComposedDpEvent(one, 1)"),
    ),
    bug("A9 a coarse grid of losses", check_accounting, (ACCOUNTING, "DISCRETISATION = 1e-4", "DISCRETISATION = 1e-3")),
    bug(
        "A9 ε printed rounded to nearest",
        check_accounting,
        (GUARANTEE, "rounding=ROUND_CEILING", "rounding=ROUND_FLOOR"),
        (GUARANTEE, "import ROUND_CEILING", "import ROUND_FLOOR"),
    ),
    bug(
        "A11 a clean sum re-noised on each request",
        check_resume,
        (VAULT, "return np.load(path, allow_pickle=False) if path.exists() else None", "return None"),
        (VAULT, KEY, KEY.replace("release, query", "secrets.token_bytes(8), query")),
    ),
    bug(
        "A11 another sum under the same charge",
        check_resume,
        (VAULT, "return secrets.compare_digest(path.read_bytes(), commitment)", "return True"),
    ),
    bug(
        "T5 a label out of range wraps round",
        check_sensitivity,
        (PRIVATE, "y[: len(rows)] = labels[rows]", "y[: len(rows)] = labels[rows] % self.n_classes"),
    ),
    bug(
        "T5 the number of records in the ledger",
        check_ledger_first,
        (
            PRIVATE,
            "self._ledger.reserve(self._vault.run, query, count)",
            "self._ledger.reserve(self._vault.run + str(len(self._records.labels)), query, count)",
        ),
        (PRIVATE, '"run": self._vault.run,', '"type": "intent",'),
    ),
    bug(
        "L1 charged after the read",
        check_ledger_first,
        (
            PRIVATE,
            "        return self.release_reserved(self.reserve(query), 0, fn, progress=progress)",
            '        self._exact_sum(query, fn, "early", progress)\n        return self.release_reserved(self.reserve(query), 0, fn, progress=progress)',
        ),
    ),
    bug(
        "L1 a made-up reservation",
        check_ledger_first,
        (PRIVATE, "if {key: line.get(key) for key in facts} != facts:", "if False:"),
    ),
    bug(
        "L2 no fsync",
        check_ledger_first,
        (LEDGER, "            os.fsync(self._descriptor)\n        except OSError", "        except OSError"),
    ),
    bug("L4 a torn tail kept", check_ledger_file, (LEDGER, "    if raw != whole:\n", "    if False:\n")),
    bug(
        "L4 a lost newline forgets a charge",
        check_ledger_file,
        (LEDGER, '    return raw[:end] + tail + b"\\n"', "    return raw[:end]"),
    ),
    bug(
        "L4 the chain not verified",
        check_ledger_file,
        (LEDGER, 'line["hash"] == line_hash(previous, body) and canonical(line) == raw', "canonical(line) == raw"),
    ),
    bug("L5 no lock", check_ledger_file, (LEDGER, "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass")),
    bug(
        "L6 the cap of the latest caller",
        check_ledger_file,
        (
            LEDGER,
            "            return ledger\n        except BaseException as error:",
            "            ledger.raise_cap(cap)\n            return ledger\n        except BaseException as error:",
        ),
    ),
    bug(
        "L7 an answer from another ledger's run",
        check_resume,
        (PRIVATE, "release-{self._ledger.lines[line]['hash'][:32]}-{index}", "release-{line}-{index}"),
    ),
    bug(
        "L8 half a line left on a full disk",
        check_ledger_file,
        (LEDGER, "                os.ftruncate(self._descriptor, end)\n", "                pass\n"),
    ),
    bug(
        "L9 the clock in the ledger",
        check_ledger_file,
        (
            LEDGER,
            'opening = {"format": FORMAT, "data": name, "unit": unit,',
            'import time\n                opening = {"format": FORMAT, "data": name, "unit": unit + str(time.time()),',
        ),
        (LEDGER, "if self.lines and unit != self.lines[0]", "if False and unit != self.lines[0]"),
    ),
    bug(
        "M5 rank one: rounding passes C, and the product is not checked",
        check_rank_one,
        (CLIPPING, PRODUCT, "pass"),
        (CLIPPING, REACH, "limit / squares.sqrt().clamp_min(1.0) + torch.zeros_like(norm)"),
    ),
    bug(
        "M4 rank one: the left factor not clipped",
        check_rank_one,
        (CLIPPING, PRODUCT, "pass"),
        (CLIPPING, WINDOW, ANY),
        (CLIPPING, STEPS, "steps = largest * (2.0 ** (grid_bits - UNIT_BITS) / clip_norm)"),
    ),
    bug(
        "M4 rank one: the right factor not of norm 1",
        check_rank_one,
        (CLIPPING, UNIT, "return torch.round(v * 2**12).clamp(-(2**15), 2**15 - 1).to(torch.int16)"),
        (CLIPPING, PRODUCT, "pass"),
        (CLIPPING, REACH, "limit / 2.0**UNIT_BITS - v.shape[1] ** 0.5 / 2 - 1 + torch.zeros_like(norm)"),
    ),
    bug(
        "M6 rank one: rows with NaN kept",
        check_rank_one,
        (
            CLIPPING,
            "    v = torch.where(finite, v, torch.zeros_like(v))\n    unit = v / v.abs()",
            "    v = torch.nan_to_num(v, 0.0, 0.0, 0.0)\n    unit = v / v.abs()",
        ),
    ),
    bug(
        "M7 rank one: a malformed image counts as a black one",
        check_rank_one,
        (FEATURES, "grid[~torch.from_numpy(valid)] = 0", "pass"),
    ),
    bug(
        "T5 rank one: a label out of range counts",
        check_rank_one,
        (FEATURES, " & (y >= 0) & (y < private.n_classes)", ""),
    ),
    bug(
        "R9 rank one: summed in float32",
        check_rank_one,
        (
            FEATURES,
            "query.grid_bits).T @ exact).to(torch.int64)",
            "query.grid_bits).float().T @ exact.float()).to(torch.int64)",
        ),
    ),
    bug(
        "M10 rank one: the padding of a batch counts",
        check_rank_one,
        (
            FEATURES,
            "grid = torch.zeros(size, self.dim, dtype=torch.int16)",
            "grid = torch.ones(size, self.dim, dtype=torch.int16)",
        ),
    ),
    bug(
        "M19 features with batch statistics, hidden by a left factor of zero",
        check_rank_one,
        (FEATURES, "self._worst = check_recordwise(unit, shape, classes, self.dim, 1.0)", "self._worst = 0.0"),
    ),
    bug(
        "A1 rank one: all records, charged as a sample",
        check_rank_one,
        (FEATURES, "if query.sampling_prob < 1:", "if False:"),
    ),
    bug("L1 rank one: a made-up reservation", check_rank_one, (FEATURES, "door._check_charged(held, index)", "pass")),
    bug(
        "T2 shard by position",
        check_shards,
        (
            ENSEMBLE,
            "return np.fromiter(numbers, np.int64, len(records.labels))",
            "return np.arange(len(records.labels)) % n_shards",
        ),
    ),
    bug(
        "T2 shard by content though ids are there", check_shards, (ENSEMBLE, "if records.ids is not None:", "if False:")
    ),
    bug("T2 shard by a hash without a key", check_shards, (ENSEMBLE, 'derive(key, "id"', 'derive(b"public", "id"')),
    bug(
        "T1 one generator for all shards",
        check_shards,
        (ENSEMBLE, "ROUNDING_GPU = 1e-4", "ROUNDING_GPU = 1e-4\nALL = torch.Generator()"),
        (ENSEMBLE, "generator = torch.Generator().manual_seed(shard)", "generator = ALL"),
    ),
    bug(
        "T1 normalised by all shards together",
        check_shards,
        (
            ENSEMBLE,
            "x = to_unit(records.images[rows], records.value_range)",
            "x = to_unit(records.images[rows], records.value_range) - to_unit(records.images, records.value_range).mean()",
        ),
    ),
    bug(
        "T1 a shard in the order of the file",
        check_shards,
        (ENSEMBLE, "_train_one(records, _canonical(records, shards[k]), train", "_train_one(records, shards[k], train"),
    ),
    bug(
        "T3 a ledger of another unit",
        check_shards,
        (PRIVATE, 'if ledger.lines and ledger.lines[0]["unit"] != unit:', "if False:"),
    ),
    bug("T3 a sum over records charged by the id", check_votes, (PRIVATE, 'if self.unit != "record":', "if False:")),
    bug("M2 votes: √Q for √(2Q)", check_votes, (QUERIES, "math.sqrt(2 * self.n_queries)", "math.sqrt(self.n_queries)")),
    bug(
        "M2 votes: noise misses the grid",
        check_votes,
        (QUERIES, "math.sqrt(2 * self.n_queries) * self.unit_steps", "math.sqrt(2 * self.n_queries)"),
    ),
    bug(
        "M11 votes: a tie votes twice",
        check_votes,
        (
            ENSEMBLE,
            "return torch.nn.functional.one_hot(scores_of(model, queries, n_classes).argmax(dim=1), n_classes)",
            "s = scores_of(model, queries, n_classes)\n    return (s == s.amax(dim=1, keepdim=True)).long()",
        ),
    ),
    bug(
        "M21 votes: a unit that moves is taken for one that stays",
        check_votes,
        (QUERIES, 'twice = relation == "replace_one" and self.unit_moves == 1', 'twice = relation == "replace_one"'),
    ),
    bug(
        "M21 replace-one halved for sums as for votes",
        check_votes,
        (
            QUERIES,
            "return (self.sampling_prob, self.noise_multiplier, count)",
            'return (self.sampling_prob, self.noise_multiplier * (2 if relation == "replace_one" else 1), count)',
        ),
    ),
    bug(
        "T1 a trainer that is not tried out",
        check_votes,
        (ENSEMBLE, "worst = self._check(queries[:PROBE], n_columns)", "worst = 0.0"),
    ),
    bug(
        "A5 charged for votes of another number of models",
        check_votes,
        (
            ENSEMBLE,
            "facts = (query.n_classes, query.n_models, query.unit_moves)",
            "facts = (query.n_classes, self.n_models, query.unit_moves)",
        ),
    ),
    bug(
        "A4 two handles take one charged line",
        check_votes,
        (PRIVATE, "ensemble._pending = self.checks, self._pending", "_ = self.checks, self._pending"),
    ),
    # Sums of vectors of models on disjoint shards.
    bug(
        "M2 shard sum: noise for C, where a unit moves 2C",
        check_shard_sum,
        (QUERIES, "self.noise_multiplier * 2 * 2.0**self.grid_bits", "self.noise_multiplier * 2.0**self.grid_bits"),
    ),
    bug(
        "M1 shard sum: noise divided by the number of models, the sum not",
        check_shard_sum,
        (
            QUERIES,
            "self.noise_multiplier * 2 * 2.0**self.grid_bits",
            "self.noise_multiplier * 2 * 2.0**self.grid_bits / self.n_models",
        ),
    ),
    bug(
        "M4 shard sum: not clipped",
        check_shard_sum,
        (ENSEMBLE, WHOLE, "torch.round(torch.nan_to_num(answers.flatten()) * query.unit_steps).to(torch.int64)"),
    ),
    bug(
        "M5 shard sum: every answer clipped at C by itself",
        check_shard_sum,
        (ENSEMBLE, WHOLE, "clip_to_grid(answers, query.clip_norm, query.grid_bits).flatten()"),
    ),
    bug(
        "M3 shard sum: the clip norm of the sum, not of a model",
        check_shard_sum,
        (ENSEMBLE, WHOLE, "clip_to_grid(answers.reshape(1, -1), query.clip_norm * query.n_models, query.grid_bits)[0]"),
    ),
    bug(
        "M11 shard sum: one shard counted twice",
        check_shard_sum,
        (
            ENSEMBLE,
            "for model in self._trained(progress):\n            total += one_vector",
            "for model in [*self._trained(progress), self._trained(progress)[0]]:\n            total += one_vector",
        ),
    ),
    bug(
        "T1 shard sum: every model is shard 0's",
        check_shard_sum,
        (ENSEMBLE, "total += one_vector(model,", "total += one_vector(self._trained(progress)[0],"),
    ),
    bug(
        "M12 shard sum: divided by the realised number of models",
        check_shard_sum,
        (
            ENSEMBLE,
            "return total.numpy()\n\n    def _trained",
            "return total.numpy() // max(1, sum(not isinstance(m, Nobody) for m in self._trained(None)))\n\n    def _trained",
        ),
    ),
    bug(
        "M21 shard sum: a unit that moves is taken for one that stays",
        check_shard_sum,
        (QUERIES, EXCHANGE, EXCHANGE.replace(" and self.unit_moves == 1", "")),
    ),
    bug(
        "M21 shard sum: the exchange counted twice",
        check_shard_sum,
        (QUERIES, EXCHANGE, EXCHANGE.replace('relation == "replace_one" and self.unit_moves == 1', "False")),
    ),
    bug(
        "A5 charged for a sum over another number of models",
        check_shard_sum,
        (
            ENSEMBLE,
            "if (query.n_models, query.unit_moves) != (self.n_models, self.unit_moves):",
            "if query.unit_moves != self.unit_moves:",
        ),
    ),
    bug(
        "T1 shard sum: a trainer that is not tried out",
        check_shard_sum,
        (ENSEMBLE, "worst = self._check(queries[:PROBE], n_columns)", "worst = 0.0"),
    ),
    bug(
        "L1 shard sum: a made-up reservation",
        check_shard_sum,
        (
            ENSEMBLE,
            "self._check_charged(held, index)\n        self.check(query, queries)\n        return self._noisy(held, index, lambda _: self._sum",
            "self.check(query, queries)\n        return self._noisy(held, index, lambda _: self._sum",
        ),
    ),
    bug(
        "T5 shard sum: a shard without records stops the run",
        check_shard_sum,
        (ENSEMBLE, "if isinstance(model, Nobody):\n        return torch.zeros(query.dim, dtype=torch.int64)", "pass"),
    ),
    bug(
        "R5 answers: one noise at two scales",
        check_answers,
        (ANSWERS, 'f"answers {float(std)!r}".encode()', 'b"answers"'),
    ),
    bug("M20 answers: a scale below 0 switches noise off", check_answers, (ANSWERS, "if std == 0:", "if not std > 0:")),
    bug(
        "R5 an overwritten key left to use",
        check_resume,
        (VAULT, "os.replace(key, erased)", "key.write_bytes(bytes(32))"),
    ),
    # Several processes.
    bug("R3 noise on every process", check_ranks, (PRIVATE, ADD, "self._add_noise(held, index, attempt, total)")),
    bug(
        "R3 each process adds noise to its part",
        check_ranks,
        (PRIVATE, PART, PART[:-1] + " + np.rint(np.random.normal(0, 9, exact_sum(attempt).shape)).astype(np.int64))"),
    ),
    bug(
        "M13 each process tosses its own coins",
        check_ranks,
        (
            PRIVATE,
            "self._ranks.lead(lambda: self._toss(attempt, n, prob))",
            "np.packbits(np.random.random(n) < prob)",
        ),
    ),
    bug("M11 a record counted by every process", check_ranks, (RANKS, MINE, "return starts")),
    bug(
        "M11 a record counted by two processes",
        check_ranks,
        (RANKS, MINE, "return starts[max(0, self.rank - 1) :: self.world]"),
    ),
    bug(
        "M11 features by every process",
        check_ranks,
        (FEATURES, "private._ranks.mine(range(0, len(labels), self._size))", "range(0, len(labels), self._size)"),
    ),
    bug(
        "M13 features: coins of other records",
        check_ranks,
        (FEATURES, "np.flatnonzero(coins[self._own])", "np.flatnonzero(coins[: len(self._own)])"),
    ),
    bug(
        "M11 a shard votes in every process", check_ranks, (ENSEMBLE, "ranks.mine(range(n_shards))", "range(n_shards)")
    ),
    bug(
        "M11 an owner votes in every process",
        check_ranks,
        (ENSEMBLE, "ranks.mine(range(len(models)))", "range(len(models))"),
    ),
    bug("T5 a process that failed says nothing", check_ranks, (RANKS, "ranks.tell(error)", "pass")),
    bug("T5 a process that failed is not listened to", check_ranks, (RANKS, "if n_failure:", "if False:")),
    bug(
        "T5 the share of a process that failed is left out",
        check_ranks,
        (
            PRIVATE,
            PART,
            "try:\n            part = exact_sum(attempt)\n        except OSError:\n"
            "            part = np.zeros((1, 8), np.int64)\n        total = self._ranks.total(part)",
        ),
    ),
    bug(
        "L1 read while the first process still charges",
        check_ranks,
        (PRIVATE, "self._ranks.lead(lambda: next(attempts))", 'next(attempts) if self._ranks.first else ""'),
    ),
    bug(
        "M9 processes whose numbers differ",
        check_ranks,
        (PRIVATE, "self._ranks.agree(lambda: probed(placed, self.image_shape, self.n_classes))", "pass"),
    ),
    bug(
        "M11 processes whose records differ",
        check_ranks,
        (PRIVATE, "ranks.agree(lambda: _fingerprint(records))", "pass"),
    ),
    bug(
        "L1 the exact sum in every process",
        check_ranks,
        (RANKS, "dist.reduce(tensor, 0)", "dist.all_reduce(tensor)"),
        (RANKS, "return tensor.cpu().numpy() if self.first else part[:0]", "return tensor.cpu().numpy()"),
    ),
    bug(
        "M8 a vector of zeros divided by its norm",
        check_sensitivity,
        (CLIPPING, ".clamp_min(1e-300)", ""),
        (CLIPPING, FITS, "fits = ~(grid.abs() > limit)"),
        (
            CLIPPING,
            "((grid * grid).sum(dim=1, keepdim=True) <= limit * limit)",
            "~((grid * grid).sum(dim=1, keepdim=True) > limit**2)",
        ),
    ),
    bug(
        "M16 the sum computed again after the noise",
        check_noise_scale,
        (
            PRIVATE,
            "        self._vault.save(self._name(held.line, index), noisy)\n        return noisy",
            "        self._vault.save(self._name(held.line, index), noisy)\n        return total",
        ),
    ),
    bug(
        "R4 a stream that lives on in forked children",
        check_fork,
        (
            VAULT,
            KEY,
            'self._stream = getattr(self, "_stream", None) or Stream(derive(self._key, "noise", self.run))\n        return self._stream',
        ),
    ),
    bug(
        "R9 summed in float32",
        check_sum,
        (PRIVATE, "query.dim, dtype=torch.int64)", "query.dim)"),
        (PRIVATE, "total.index_add_(0, row, grid)", "total.index_add_(0, row, grid.float())"),
        (PRIVATE, "return total.numpy()", "return total.numpy().astype(np.int64)"),
    ),
    bug(
        "A2 one class drawn more often than the ledger says",
        check_sampler,
        (
            PRIVATE,
            "self._coins(name, len(labels), query.sampling_prob))",
            "self._coins(name, len(labels), query.sampling_prob) | (labels == 0))",
        ),
    ),
    bug(
        "A2 another sampling rate on the ledger",
        check_ledger_first,
        (
            QUERIES,
            '"sampling_prob": repr(float(self.sampling_prob)),',
            '"sampling_prob": repr(float(self.sampling_prob) / 2),',
        ),
        (QUERIES, "if query.describe() != description:", "if False:"),
    ),
    bug(
        "A7 an accountant that gives 0 where it gives up",
        check_accounting,
        (
            ACCOUNTING,
            "value = gaussian_epsilon(whole, delta)",
            "value = gaussian_epsilon(whole, delta) if whole > 0.02 else 0.0",
        ),
    ),
    bug(
        "A12 a charge by what the records are",
        check_ledger_first,
        (
            PRIVATE,
            "return self._ledger.reserve(self._vault.run, query, count)",
            "return self._ledger.reserve(self._vault.run, type(query)(**{**vars(query), 'noise_multiplier': query.noise_multiplier * (1 + len(self._records.labels))}), count)",
        ),
        (PRIVATE, '"query": held.query.describe(),', '"type": "intent",'),
    ),
    bug(
        "A13 δ from the number of records",
        check_ledger_first,
        (
            PRIVATE,
            "        self._records = records\n",
            "        self._records = records\n        ledger.raise_cap((ledger.cap[0], 1e-5 / (1 + len(records.labels))))\n",
        ),
    ),
    bug(
        "A14 only a run's own charges count",
        check_ledger_first,
        (
            LEDGER,
            "cap: tuple[float, float] | None = None) -> None:",
            "cap: Any = None, run: str | None = None) -> None:",
        ),
        (
            LEDGER,
            "total = accounting.epsilon([*parts(self.lines), *extra]",
            "total = accounting.epsilon([*parts(self.lines, run), *extra]",
        ),
        (
            LEDGER,
            "        self.check_affordable([query.part(count)])",
            "        self.check_affordable([query.part(count)], run=run)",
        ),
    ),
    bug(
        "A15 an order that does not converge left out",
        check_accounting,
        (ACCOUNTING, "orders = [*range(2, 65)", "orders = [1.1, 1.5, *range(2, 65)"),
    ),
    bug(
        "L3 renamed, and the folder not on disk",
        check_ledger_first,
        (
            DISK,
            "        os.replace(partial, path)\n        sync_directory(path.parent)\n",
            "        os.replace(partial, path)\n",
        ),
    ),
    bug(
        "L3 a new ledger whose name is not on disk",
        check_ledger_first,
        (LEDGER, "            sync_directories(path.parent)  # each time", "            pass  # each time"),
    ),
    bug(
        "L5 a forked child charges its parent's ledger",
        check_fork,
        (LEDGER, "if self._descriptor < 0 or self._pid != os.getpid():", "if self._descriptor < 0:"),
    ),
]


# dp-accounting is not of the copy, and has the same answer to the same question each time.
LOSS = pld.privacy_loss_distribution
KNOWN = {
    (place, name): lru_cache(maxsize=128)(getattr(place, name))
    for place, name in (
        (LOSS, "from_gaussian_mechanism"),
        (LOSS.PrivacyLossDistribution, "self_compose"),
        (dp_accounting, "get_epsilon_gaussian"),
        (dp_accounting, "get_sigma_gaussian"),
    )
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; the copies imported from it are forgotten afterwards."""
    real = SourceFileLoader.source_to_code

    def source_to_code(self: SourceFileLoader, data: Any, path: Any, **facts: Any) -> CodeType:
        planted = self.name.startswith("planted_")
        return compiled(bytes(data), Path(path).name) if planted else real(self, data, path, **facts)

    monkeypatch.setattr(SourceFileLoader, "source_to_code", source_to_code)
    for (place, name), known in KNOWN.items():
        monkeypatch.setattr(place, name, known)
    sys.path.insert(0, str(tmp_path))
    writing, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    yield tmp_path
    sys.dont_write_bytecode = writing
    sys.path.remove(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0].startswith("planted_")]:
        del sys.modules[name]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_clean_core_passes(check: Callable[[SimpleNamespace, Path], None], packages: Path) -> None:
    check(load(packages, "planted_clean"), packages / "work")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_bug_is_caught(mutant: Mutant, packages: Path) -> None:
    m = load(packages, "planted_bug", mutant.changes)
    for check in [mutant.check, *(c for c in CHECKS if c is not mutant.check)]:
        try:
            check(m, packages / check.__name__)
        except Exception:  # an AssertionError, or the mutant failing in its own way: either way a test is red
            if check is not mutant.check:
                pytest.fail(
                    f"{mutant.name}: caught by {check.__name__}, not by {mutant.check.__name__}; correct the table"
                )
            return
    pytest.fail(f"{mutant.name}: nobody noticed")


def test_there_are_enough_of_them() -> None:
    assert len({mutant.name for mutant in MUTANTS}) >= 80
    assert {check.__name__ for check in CHECKS} == {mutant.check.__name__ for mutant in MUTANTS}
