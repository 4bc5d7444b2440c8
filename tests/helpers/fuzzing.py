"""Mutated input of every kind that is read: each loads, or is refused in one printable line that names the file and says the way out, and
nothing is written.

One registry for the tests (tests/hostile/test_fuzz.py) and for long runs (tools/fuzz.py). Input number i of a kind depends on the
seed, the kind and i alone. Inputs are tried in forked children, so that a crash of a C++ reader is found, and blamed on the file
that it was reading.
"""

import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import onnx
import torch
from safetensors.torch import save_file

import cli_child
import small_files
import small_models
import small_release
from dpdistill import cli, config_files, sampling
from dpdistill.bundle import contents, report
from dpdistill.bundle.release import read_bundle
from dpdistill.bundle.verification import verify
from dpdistill.data import Limits, load_images
from dpdistill.errors import DpdistillError
from dpdistill.models.teachers import load_teacher
from dpdistill.privacy import Ledger, accounting

SMALL = Limits(max_array_bytes=2**26)
EDGES = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x80\0\0\0", b"PK\x05\x06")
WORDS = (  # of JSON, TOML and our own files
    b"NaN", b"-Infinity", b"1e400", b"9" * 5000, b"0x" + b"F" * 5000, b"[" * 2000, b'{"a":' * 2000, b"null", b"true", b'"', b"\\u0000",
    b"\\ud800", b"\x1b[2J", "\u202e".encode(), b"\n", b"\r\n", b"\xef\xbb\xbf", b"-1", b"0", b"[]", b"{}", b",", b'"seed": 1,',
    b"a.a.a.a = 1\n", b"1979-05-27", b"4294967296", b"18446744073709551616", b"__metadata__", b"<script>",
)  # fmt: skip
NUMBERS = (np.nan, np.inf, 3.4e38, -3.4e38, 1e20, 1e4, 1e-45, -0.0)  # of weights
ADDRESS_SPACE = 2**33
BATCH = 500
HANGS = 60  # seconds for an input, after which its child is ended and the file blamed


def mutate(data: bytes, rng: np.random.Generator, words: bool = False) -> bytes:
    """Returns a copy with one to four random changes; with `words`, some of them are words that a text format gives a meaning."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(1, len(changed))))
        kind = rng.integers(0, 8 if words else 6)
        if kind == 0 and changed:
            changed[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            edge = EDGES[rng.integers(0, len(EDGES))]
            changed[at : at + len(edge)] = edge
        elif kind == 2:
            changed[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 3:
            del changed[at : at + int(rng.integers(1, 9))]
        elif kind == 4 and rng.random() < 0.2:
            del changed[at:]
        elif kind >= 6:
            word = WORDS[rng.integers(0, len(WORDS))]
            changed[at : at + int(rng.integers(0, 9))] = word
        else:
            source = int(rng.integers(0, max(1, len(changed))))
            changed[at : at + 16] = changed[source : source + 16]
    return bytes(changed)


Change = Callable[[bytes, np.random.Generator], bytes]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A valid input, made in a folder.

    Attributes:
      targets: the files of which one at a time is mutated.
      use: reads it: True if it loads; False if a verdict says no; raises DpdistillError where it is refused.
      change: makes a mutant of a file's bytes.
      after: what follows once a mutant is written: hashes are made to hold again, say.
    """

    targets: list[Path]
    use: Callable[[], bool]
    change: Change = mutate
    after: Callable[[], object] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How to make a valid input in an empty folder, and how large its part of all inputs is."""

    make: Callable[[Path], Subject]
    share: float = 1.0


def worded(data: bytes, rng: np.random.Generator) -> bytes:
    return mutate(data, rng, words=True)


# --- data sets


def _data(kind: str, root: Path) -> tuple[Path, Path]:
    """Writes a valid data set, and returns what to load and the file to mutate."""
    if kind in ("npz stored", "npz deflated"):
        images, labels = small_files.toy()
        save = np.savez if kind == "npz stored" else np.savez_compressed
        save(root / "x.npz", images=images, labels=labels, classes=np.array(small_files.NAMES))
        return root / "x.npz", root / "x.npz"
    if kind == "parquet plain":
        options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
        return (path := small_files.parquet(root / "x.parquet", **options)), path
    if kind in ("parquet", "arrow"):
        return (path := getattr(small_files, kind)(root / f"x.{kind}")), path
    if kind.startswith("idx"):
        zipped = kind.endswith("gz")
        small_files.idx(root, zipped=zipped)
        part = "labels-idx1" if "labels" in kind else "images-idx3"
        return root, root / f"train-{part}-ubyte{'.gz' if zipped else ''}"
    small_files.folder(root / "r", kind.upper(), f".{kind}", channels=3)
    return root / "r", root / "r" / "cat" / f"0.{kind}"


def data(kind: str) -> Kind:
    def make(root: Path) -> Subject:
        spec, target = _data(kind, root)
        options: dict[str, Any] = {"n_classes": 3} if kind.startswith("idx") else {}

        def use() -> bool:
            found = load_images(spec, limits=SMALL, **options)
            assert found.images.ndim == 4
            assert len(found.images) == len(found.labels) > 0
            return True

        return Subject(targets=[target], use=use)

    return Kind(make=make, share=2.0)


def folder_names(root: Path) -> Subject:
    """A folder of images, to which an entry with a mutant of a name is added: a file, a folder, a link or a pipe."""
    folder = small_files.folder(root / "r")
    seed, good = root / "name", (folder / "cat" / "0.png").read_bytes()
    seed.write_bytes(b"x1.png")

    def use() -> bool:
        name = seed.read_bytes().replace(b"\0", b"").replace(b"/", b"")
        place = Path(os.fsdecode(bytes(folder / "dog" if len(name) % 2 else folder) + b"/" + name))
        makers = (
            lambda: place.write_bytes(good),
            place.mkdir,
            lambda: place.symlink_to("/etc"),
            lambda: os.mkfifo(place),
        )
        if name in (b"", b".", b"..") or len(name) > 255 or os.path.lexists(place):
            return False
        makers[crc32(name) % 4]()
        try:
            return load_images(folder, limits=SMALL) is not None
        finally:
            place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()

    return Subject(targets=[seed], use=use)


# --- models


def onnx_graph(base: Callable[[], onnx.ModelProto]) -> Kind:
    def change(raw: bytes, rng: np.random.Generator) -> bytes:
        return small_models.mutant(onnx.ModelProto.FromString(raw), random.Random(int(rng.integers(2**32))))

    def make(root: Path) -> Subject:
        path = root / "t.onnx"
        path.write_bytes(base().SerializeToString())
        return Subject(targets=[path], use=lambda: load_teacher(path, image_shape=(3, 8, 8)) is not None, change=change)

    return Kind(make=make)


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3), torch.nn.BatchNorm1d(3))


def safetensors(root: Path) -> Subject:
    path = root / "t.safetensors"
    save_file(network().state_dict(), path)

    def use() -> bool:
        return load_teacher(path, architecture="fuzzing:network", image_shape=(1, 8, 8)) is not None

    return Subject(targets=[path], use=use, change=worded)


# --- settings, ledgers, figures


def toml(root: Path) -> Subject:
    path = root / "c.toml"
    text = 'data = "x.npz"\nout = "o"\nepsilon = 2.0\ndelta = 1e-5\nper_class = 10\nseed = 3\nresize = 8\n'
    text += "[settings]\nsteps = 5\nwidth = 4\n"
    path.write_text(text)
    return Subject(targets=[path], use=lambda: config_files.read(path, {}, []) is not None, change=worded)


def ledger(root: Path) -> Subject:
    path = root / "ledger.jsonl"
    made = small_release.synthetic()
    small_release.facts(root, made)
    good = path.read_bytes()

    def use() -> bool:
        before = path.read_bytes()
        try:
            Ledger.open(path, cap=(3, 1e-5)).close()
        except DpdistillError:
            assert path.read_bytes() == before, "a refused ledger was changed"
            raise
        whole = before[: before.rfind(b"\n") + 1]  # behind it lies what a crash may leave
        assert good.startswith(whole), "a ledger that nobody wrote was opened"
        assert whole or not before or before.startswith(b'{"cap_delta":"'[: len(before)]), "another file was cut"
        return True

    return Subject(targets=[path], use=use, change=worded)


def figures(root: Path) -> Subject:
    path = root / "e.json"
    path.write_text(
        json.dumps({"mean": 0.76, "std": 0.004, "accuracies": [0.7, 0.8], "training": {"epochs": 3}}, indent=2)
    )

    def use() -> bool:
        found = cli.review.read_evaluation(path)
        report._figures(found), report._accuracy(found)
        return True

    return Subject(targets=[path], use=use, change=worded)


# --- releases


def release(kind: str, sealed: bool, share: float = 1.0) -> Kind:
    """A release of a kind, every file in turn; `sealed`: with hashes that hold again, as anyone can write them."""

    def make(root: Path) -> Subject:
        folder = small_release.write(root, kind)
        free = (
            {"certificate.json"} if sealed else set()
        )  # holds claims that nobody can check: seed, versions, values of checks

        def use() -> bool:
            verdict = verify(folder)
            assert verdict.ok == (not verdict.problems)
            assert all(problem.isprintable() for problem in verdict.problems)
            assert free or not verdict.ok, "a tampered release passed"
            return verdict.ok

        assert verify(folder).ok
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and (not sealed or p.name != "SHA256SUMS")]
        after = (lambda: small_release.Kit.seal(folder)) if sealed else (lambda: None)
        return Subject(targets=files, use=use, change=worded, after=after)

    return Kind(make=make, share=share)


def arrays(root: Path) -> Subject:
    path = root / "dataset" / "synthetic.safetensors"
    path.parent.mkdir()
    path.write_bytes(contents.Contents(**vars(_contents())).pack())
    return Subject(targets=[path], use=lambda: read_bundle(root) is not None, change=worded)


def _contents() -> Any:
    made = small_release.synthetic(soft=True)
    return contents.Contents(
        images=made.images.numpy(),
        labels=made.labels.numpy(),
        soft_labels=made.soft_labels.numpy(),
        parts=1,
        gain=1,
        class_names=("a", "b"),
    )


def weighted(data: bytes, rng: np.random.Generator) -> bytes:
    """A mutant of a file; of tensors mostly one with other numbers, so that they are not only read but used."""
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin >= len(data) or data[8:9] != b"{" or rng.random() < 0.3:
        return worded(data, rng)
    numbers = np.frombuffer(data[begin:], "<f4").copy()
    some = rng.integers(0, len(numbers), rng.integers(1, 5)) if rng.random() < 0.7 else slice(None)
    numbers[some] = NUMBERS[rng.integers(0, len(NUMBERS))]
    return data[:begin] + numbers.tobytes()


def sampler(root: Path) -> Subject:
    """A release to sample from, as anyone can seal it: two images are drawn, and are images, or nothing is there."""
    folder, out = small_release.write(root, "diffusion"), root / "drawn.npz"
    files = sorted(p for p in (folder / "pipeline").rglob("*") if p.is_file())

    def use() -> bool:
        try:
            sampling.sample(folder, out, 2, steps=1, quiet=True)
        except DpdistillError:
            assert not list(root.glob("drawn*")), "a refused run left files"
            raise
        assert len(load_images(out).labels) == 2
        out.unlink()
        return not list(root.glob("drawn*"))

    return Subject(targets=files, use=use, change=weighted, after=lambda: small_release.Kit.seal(folder))


DATA = (
    "npz stored",
    "npz deflated",
    "idx",
    "idx-gz",
    "idx-labels-gz",
    "png",
    "jpeg",
    "bmp",
    "webp",
    "parquet",
    "parquet plain",
    "arrow",
)
KINDS: dict[str, Kind] = {
    **{kind: data(kind) for kind in DATA},
    "names in a folder": Kind(make=folder_names),
    "onnx": onnx_graph(small_models.a_convnet),
    "onnx normed": onnx_graph(small_models.a_normed),
    "safetensors": Kind(make=safetensors),
    "toml": Kind(make=toml, share=2.0),
    "ledger": Kind(make=ledger),
    "figures": Kind(make=figures),
    "arrays": Kind(make=arrays),
    **{f"release {kind}": release(kind, False) for kind in ("dataset", "model", "diffusion")},
    **{f"release {kind}, sealed": release(kind, True, 0.1) for kind in ("dataset", "model", "diffusion")},
    "sampler": Kind(make=sampler, share=0.05),
}  # fmt: skip


@dataclass
class Tally:
    """What came of the inputs of a kind."""

    inputs: int = 0
    refused: int = 0
    loaded: int = 0
    seconds: float = 0.0
    worst: float = 0.0
    peak_mb: float = 0.0
    violations: list[str] = field(default_factory=list)


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file in a folder."""
    places = (Path(folder, name) for folder, _, files in os.walk(root) for name in files)
    return {str(place): (status.st_size, status.st_mtime_ns) for place in places for status in [place.lstat()]}


def _refused(subject: Subject, root: Path) -> bool:
    """Whether the input is refused, in the form that it must be. Raises whatever else came of it."""
    before = listing(root)
    try:
        return not subject.use()
    except DpdistillError as error:
        line, hint = str(error), getattr(error, "hint", None)
    assert line.isprintable(), f"not printable: {line!r}"
    assert 0 < len(line) < 5000, "too long a line"
    assert str(root) in line, f"does not say which file: {line}"
    assert hint is None or (hint and line.endswith(f" ({hint})")), f"no way out: {line}"
    assert listing(root) == before, "a refused input left or changed files"
    return True


def _batch(subject: Subject, root: Path, name: str, seed: int, numbers: range, keep: Path) -> int:
    """In a child: tries inputs, and prints a tally as JSON. A bad one is kept under its kind and number."""
    resource = cli_child.resource
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))
    good = {path: path.read_bytes() for path in subject.targets}
    tally = Tally()
    for number in numbers:
        rng = np.random.default_rng([seed, crc32(name.encode()), number])
        path = subject.targets[number % len(subject.targets)]
        mutant = subject.change(good[path], rng)
        if mutant == good[path]:
            continue
        path.write_bytes(mutant)
        subject.after()
        (keep / "now").write_text(f"{name} {number} {path}")
        signal.alarm(HANGS)
        began = time.process_time()  # of this process: what others do on the machine is not the input's fault
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a warning would be a second line on a person's screen
                refused = _refused(subject, root)
            tally.refused, tally.loaded = tally.refused + refused, tally.loaded + (not refused)
        except BaseException:
            (keep / f"{name} {number}").write_bytes(mutant)
            tally.violations.append(f"{name} {number} ({path.name}): {traceback.format_exc(limit=-4)}")
        took = time.process_time() - began
        signal.alarm(0)
        tally.inputs, tally.seconds, tally.worst = tally.inputs + 1, tally.seconds + took, max(tally.worst, took)
        if path.exists() or path.parent.exists():
            path.write_bytes(good[path])
    print(json.dumps(vars(tally)))
    return 0


def _once(work: Callable[[Any, float], float]) -> Callable[[Any, float], float]:
    """`work`, done once for the same parts and δ: most mutants leave the ledger alone, and its ceiling takes longer than all else."""
    known: dict[tuple[Any, float], float] = {}

    def kept(parts: Any, delta: float) -> float:
        key = (tuple(parts), delta)
        if key not in known:
            known[key] = work(key[0], delta)
        return known[key]

    return kept


def run(names: list[str], count: int, seed: int, keep: Path) -> Iterator[tuple[str, Tally]]:
    """Yields a tally for each kind; `count` inputs in all, by the kinds' shares."""
    warnings.simplefilter(
        "ignore", DeprecationWarning
    )  # of forking: nothing but the imports has happened in this process
    keep.mkdir(parents=True, exist_ok=True)
    accounting.rdp_epsilon = _once(accounting.rdp_epsilon)
    whole = sum(KINDS[name].share for name in names)
    for name in names:
        total = Tally()
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            subject = KINDS[name].make(root)
            n_inputs = max(1, round(count * KINDS[name].share / whole))
            for start in range(0, n_inputs, BATCH):
                numbers = range(start, min(start + BATCH, n_inputs))
                clean = {path: path.read_bytes() for path in subject.targets}
                batch = functools.partial(_batch, subject, root, name, seed, numbers, keep)
                done = cli_child.forked(batch, BATCH * HANGS)
                total.peak_mb = max(total.peak_mb, done.peak_mb)
                if done.code != 0 or done.err:
                    blamed = (keep / "now").read_text()
                    kept = keep / f"{blamed.split(' /')[0]} crashed"
                    shutil.copy(blamed[blamed.index(" /") + 1 :], kept)
                    total.violations.append(f"{kept}: exit {done.code} {done.err[-2000:]}")
                    for path, good in clean.items():
                        path.write_bytes(good)
                    total.inputs += len(numbers)
                    continue
                part = json.loads(done.out)
                for key in ("inputs", "refused", "loaded", "seconds"):
                    setattr(total, key, getattr(total, key) + part[key])
                total.worst = max(total.worst, part["worst"])
                total.violations += part["violations"]
        yield name, total


def table(tallies: list[tuple[str, Tally]]) -> str:
    """The tallies as text, with their sum."""
    rows = [f"{'kind':28} {'inputs':>8} {'refused':>8} {'loaded':>8} {'worst s':>8} {'mean ms':>8} {'peak MB':>8}"]
    every = Tally()
    for name, tally in tallies:
        rows.append(row(name, tally))
        for key in ("inputs", "refused", "loaded", "seconds"):
            setattr(every, key, getattr(every, key) + getattr(tally, key))
        every.worst, every.peak_mb = max(every.worst, tally.worst), max(every.peak_mb, tally.peak_mb)
    return "\n".join([*rows, row("all", every)])


def row(name: str, tally: Tally) -> str:
    mean = 1000 * tally.seconds / max(1, tally.inputs)
    counts = f"{tally.inputs:8} {tally.refused:8} {tally.loaded:8}"
    return f"{name:28} {counts} {tally.worst:8.2f} {mean:8.2f} {tally.peak_mb:8.0f}"


sys.modules.setdefault("fuzzing", sys.modules[__name__])  # `fuzzing:network` is an architecture
