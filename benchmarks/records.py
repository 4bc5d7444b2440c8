"""Benchmark of the number of records: time and peak memory from 1e3 to 1e6; writes docs/benchmarks/records.md and records.json.

  .venv/bin/python benchmarks/records.py --sizes 1000,10000,100000,1000000 --scratch DIR
  .venv/bin/python benchmarks/records.py --table            # rebuild the table from the runs so far

Made-up grey images of 28x28, written to DIR as eight Parquet shards of PNG and as an npz without compression, and removed afterwards.
Each cell runs in a process of its own (a fork, so that the imports are not paid for again), on one thread. Widths are small, so that a
million records take minutes on one core: the question here is the cost in the number of records. Cells:
  load-parquet  decoding of all images into the file of unpacked ones, and the keyed hash that finds their ledger;
  load-npz      the same from the npz, which is read in place;
  joint         one release of `joint`: means of 100 coordinates of a random network of width 4, of all records;
  dpsgd         an epoch of DP-SGD on a network of width 4 and depth 2: 16 steps at sampling rate 1/16;
  teacher       features of all records (200 public principal components), kept, and 25 sums of gradients of a linear layer;
  votes         N / 250 teachers on disjoint shards, each a ridge regression on such features, and one release of votes on 500 images.
Runs are kept in docs/benchmarks/records.runs.jsonl, one line each, and a cell that has enough is not run again.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import peak_gib
from PIL import Image
from torch import Tensor

from dpdistill.config import RunConfig
from dpdistill.data import LabelledImages, procedural_images, stored, to_unit
from dpdistill.home import default_ledger
from dpdistill.mechanisms import PrivateData, Vault, per_record_gradient
from dpdistill.methods.joint import views
from dpdistill.methods.model.votes import ShardTrainer
from dpdistill.methods.shared.linear import residuals
from dpdistill.models import ConvNet, Dsa
from dpdistill.privacy import GaussianSum, Ledger, NoisyVotes, accounting
from dpdistill.privacy import ledger as ledgers
from dpdistill.sources import load_private

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pyarrow as pa
    import pyarrow.parquet as pq

    import dpdistill.data.parquet  # noqa: F401 (before the fork: not to be paid for by a cell)

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
RUNS = DOCS / "records.runs.jsonl"
CELLS = ("load-parquet", "load-npz", "joint", "dpsgd", "teacher", "votes")
DELTA, SHAPE, CLASSES, SHARDS, STEPS = 1e-5, (1, 28, 28), 10, 8, 25
PER_SHARD, QUERIES, DIMS = 250, 500, 200


def made_up(start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Records number `start` to start + n: a light patch that says the class, and noise. All differ."""
    rng = np.random.default_rng(start)
    images = rng.integers(0, 90, (n, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, n)
    for k in range(CLASSES):
        row, column = divmod(k, 4)
        images[labels == k, 9 * row : 9 * row + 9, 7 * column : 7 * column + 7] += 150
    return images, labels


def write(folder: Path, n: int) -> None:
    """Writes n records as train.npz and as set/train-*.parquet, a part at a time."""
    per = -(-n // SHARDS)
    (folder / "set").mkdir(parents=True)
    labels = np.concatenate([made_up(start, min(per, n - start))[1] for start in range(0, n, per)])
    with zipfile.ZipFile(folder / "train.npz", "w") as archive:
        for name, array in (("labels", labels), ("classes", np.array([str(k) for k in range(CLASSES)]))):
            np.save(buffer := io.BytesIO(), array)
            archive.writestr(f"{name}.npy", buffer.getvalue())
        with archive.open("images.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (n, 28, 28)}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, n, per):
                file.write(made_up(start, min(per, n - start))[0].tobytes())
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    for shard, start in enumerate(range(0, n, per)):
        images, labels = made_up(start, min(per, n - start))
        path = folder / "set" / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"
        with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
            for at in range(0, len(images), 1000):
                cells = []
                for image in images[at : at + 1000]:
                    Image.fromarray(image).save(buffer := io.BytesIO(), "PNG", compress_level=1)
                    cells.append(buffer.getvalue())
                writer.write_table(pa.table({"image": cells, "label": labels[at : at + 1000]}, schema))


class Components:
    """Public features: leading principal components of made-up images, and a constant."""

    def __init__(self) -> None:
        x = torch.from_numpy(to_unit(procedural_images(2000, *SHAPE, 0))).flatten(1)
        self.centre = x.mean(dim=0)
        self.basis = torch.linalg.svd(x - self.centre, full_matrices=False)[2][: DIMS - 1].T.contiguous()

    def features(self, x: Tensor) -> Tensor:
        z = (x.flatten(1) - self.centre) @ self.basis
        return torch.cat([z, torch.ones(len(z), 1)], dim=1)


def one(cell: str, n: int, folder: Path) -> dict[str, Any]:
    """One cell's run. Time is of the cell alone; the peak is that of the process, loading included."""
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(dir=folder))
    os.environ["DPDISTILL_HOME"], os.environ["TMPDIR"] = str(place), str(place)
    spec = folder / ("set" if cell == "load-parquet" else "train.npz")
    config = RunConfig(data=str(spec), classes=CLASSES, out=str(place / "out"))
    generator = torch.Generator().manual_seed(0)
    before = peak_gib()

    def load() -> tuple[LabelledImages, Path]:
        records = load_private(config)
        return records, default_ledger(records)

    if cell.startswith("load"):
        seconds, cpu = timed(load)
        return row(cell, n, seconds, cpu, peak_gib(), before, 0.0, [])
    records, ledger_path = load()
    work: Callable[[PrivateData], object] = {"joint": joint, "dpsgd": dpsgd, "teacher": teacher, "votes": votes}[cell](
        n, generator
    )
    with Ledger.open(ledger_path, cap=(1e6, DELTA)) as ledger:
        private = PrivateData(records, ledger, Vault.open(place / "vault"), scratch=str(place))
        seconds, cpu = timed(lambda: work(private))
        peak = peak_gib()
        intents = [[line["query"], line["count"]] for line in ledger.lines if line["type"] == "intent"]
        epsilon = accounting.epsilon(ledgers.parts(ledger.lines), DELTA)
    return row(cell, n, seconds, cpu, peak, before, epsilon, intents)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def row(
    cell: str, n: int, seconds: float, cpu: float, peak: float, before: float, epsilon: float, intents: list[Any]
) -> dict[str, Any]:
    facts = {"cell": cell, "n": n, "epsilon": epsilon, "seconds": seconds, "cpu": cpu}
    return {**facts, "peak_gib": peak, "before_gib": before, "intents": intents}


def joint(n: int, generator: torch.Generator) -> Callable[[PrivateData], object]:
    network = ConvNet(SHAPE, CLASSES, width=4, generator=generator)
    view = views.View(network, Dsa(strategy="none"), torch.zeros(1, 4)).requires_grad_(False)
    made_up = torch.from_numpy(to_unit(procedural_images(2000, *SHAPE, 0)))
    space = views.coordinates([view], views.seen([view], made_up), 100)
    query = GaussianSum(name="joint-means", dim=101, n_classes=CLASSES, noise_multiplier=10.0)
    return lambda private: private.release(query, lambda x, y: space(x))


def dpsgd(n: int, generator: torch.Generator) -> Callable[[PrivateData], object]:
    network = ConvNet(SHAPE, CLASSES, width=4, depth=2, groups=4, generator=generator)
    dim = sum(p.numel() for p in network.parameters())
    query = GaussianSum(name="dpsgd-gradient", dim=dim, noise_multiplier=2.0, sampling_prob=1 / 16)
    gradient = per_record_gradient(network, F.cross_entropy)

    def epoch(private: PrivateData) -> None:
        held = private.reserve(query, 16)
        for step in range(16):
            private.release_reserved(held, step, gradient)

    return epoch


def teacher(n: int, generator: torch.Generator) -> Callable[[PrivateData], object]:
    components = Components()
    query = GaussianSum(
        name="teacher-gradient", dim=CLASSES * DIMS, noise_multiplier=10.0, clip_norm=0.25, grid_bits=28
    )

    def train(private: PrivateData) -> None:
        held = private.reserve(query, STEPS)
        features, weights = private.features(components.features, DIMS), torch.zeros(CLASSES, DIMS)
        for step in range(STEPS):
            weights = weights - 1e-3 * features.release_reserved(held, step, residuals(weights))

    return train


def votes(n: int, generator: torch.Generator) -> Callable[[PrivateData], object]:
    components, k = Components(), n // PER_SHARD
    query = NoisyVotes(
        name="votes", n_queries=QUERIES, n_classes=CLASSES, n_models=k, noise_multiplier=10.0, unit_moves=2
    )
    asked = components.features(torch.from_numpy(to_unit(procedural_images(QUERIES, *SHAPE, 1))))

    def vote(private: PrivateData) -> None:
        ensemble = private.shards(k, ShardTrainer(components, 0.01, CLASSES))  # type: ignore[arg-type]
        ensemble.release_reserved(ensemble.reserve(query), 0, asked)

    return vote


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what `work` does, done in a child: its peak of memory is its own."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with os.fdopen(writing, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("a cell failed; see above")
    return dict(json.loads(said))


def known() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def run(args: argparse.Namespace) -> None:
    for n in [int(size) for size in args.sizes.split(",")]:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            folder = Path(scratch) / "data"
            forked(lambda f=folder, n=n: write(f, n) or {})
            for cell in args.cells.split(","):
                repeats = 3 if n <= 10_000 else 1
                for _ in range(repeats - sum((r["cell"], r["n"]) == (cell, n) for r in known())):
                    made = forked(lambda c=cell, n=n, f=folder: one(c, n, f))
                    with RUNS.open("a") as file:
                        file.write(json.dumps(made) + "\n")
                    print(cell, n, {k: v for k, v in made.items() if k != "intents"}, flush=True)


def public(intents: list[Any]) -> str:
    """What the ledger says of a run, without the one number that is planned from a public guess: how many models vote."""
    return json.dumps([[{k: v for k, v in query.items() if k != "models"}, count] for query, count in intents])


def table() -> None:
    runs = known()
    rows = []
    for cell in CELLS:
        mine = [r for r in runs if r["cell"] == cell]
        if len({public(r["intents"]) for r in mine}) > 1 or len({round(r["epsilon"], 6) for r in mine}) > 1:
            raise SystemExit(f"{cell}: the ledger tells how many records there are")
        for n in sorted({r["n"] for r in mine}):
            some = [r for r in mine if r["n"] == n]
            cpu = [r["cpu"] for r in some]
            grown = max(r["peak_gib"] - r["before_gib"] for r in some)
            rows.append(
                {
                    "dataset": "made-up 1x28x28",
                    "method": cell,
                    "setting": f"{n} records",
                    "epsilon": round(some[0]["epsilon"], 4) or None,
                    "delta": DELTA if some[0]["intents"] else None,
                    "metric": "processor seconds",
                    "mean": round(statistics.mean(cpu), 2),
                    "std": round(statistics.stdev(cpu), 2) if len(cpu) > 1 else None,
                    "releases": len(some),
                    "seconds": round(statistics.mean(r["seconds"] for r in some), 2),
                    "peak_gib": round(max(r["peak_gib"] for r in some), 2),
                    "device": "cpu",
                    "note": f"{grown:.2f} GiB above the process before it loaded; "
                    f"{1e6 * statistics.mean(cpu) / n:.0f} µs of the processor a record",
                }
            )
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    (DOCS / "records.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    head = (DOCS / "records.head.md").read_text()
    columns = ("cell", "records", "processor seconds", "µs a record", "seconds by the clock", "peak memory, GiB")
    columns += ("of that by data and work", "ε", "runs")
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for r in rows:
        n = int(r["setting"].split()[0])
        grown = r["note"].split()[0]
        spread = f" ± {r['std']:g}" if r["std"] is not None else ""
        epsilon = "–" if r["epsilon"] is None else f"{r['epsilon']:.4f}"
        cells = (r["method"], f"{n:,}", f"{r['mean']:g}{spread}", f"{1e6 * r['mean'] / n:.0f}", f"{r['seconds']:g}")
        cells += (f"{r['peak_gib']:.2f}", grown, epsilon, str(r["releases"]))
        lines.append("| " + " | ".join(cells) + " |")
    (DOCS / "records.md").write_text(head + "\n" + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000,10000,100000,1000000")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--scratch", default=None, help="folder for the made-up data (a million records: 2 GiB)")
    parser.add_argument("--memory-mib", type=int, default=256, help="arrays up to this size are kept in memory")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stored.MEMORY_BYTES = args.memory_mib * 2**20
    if not args.table:
        run(args)
    table()


if __name__ == "__main__":
    main()
