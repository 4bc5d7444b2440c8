"""What more processes bring: the private passes at several numbers of processes, and a paper estimate for many GPUs.

  .venv/bin/python benchmarks/scale.py --ranks 1 2 --repeats 5

Each part goes through the door, in processes that torchrun starts with one thread each: features of all records, one full-batch sum of
rank-one gradients, one step of DP-SGD, and the teachers of shards. The numbers of processes take turns, so that a busy machine troubles
all alike. Appends to docs/benchmarks/scale.runs.jsonl and writes docs/benchmarks/scale.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpdistill.data import LabelledImages, procedural_images, to_unit
from dpdistill.mechanisms import PrivateData, Vault, joined
from dpdistill.mechanisms.ensemble import assign
from dpdistill.mechanisms.noise import Stream, rounded_gaussian
from dpdistill.methods import DIFFUSION_METHODS, METHODS, MODEL_METHODS, Public
from dpdistill.methods.diffusion import private_denoiser, shard_teachers
from dpdistill.methods.shared import linear
from dpdistill.privacy import GaussianSum, Ledger

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
RUNS, PAGE = DOCS / "scale.runs.jsonl", DOCS / "scale.md"
CROWDED = 1.1  # seconds by the clock for each of the processor, above which others had their share
SHAPE, CLASSES = (1, 28, 28), 10
PARTS = {
    "features": "features of {n} records (scattering)",
    "rank_one": "one full-batch sum of rank-one gradients over {n} features",
    "dp_sgd": "one DP-SGD step: about {batch} records in micro-batches of {micro_batch}",
    "shards": "teachers of {shards} shards",
}
GPUS, N_RECORDS = 64, 10**9
# Assumptions of the estimate, none of them measured by us: to be replaced by figures of your machines.
ASSUMED = {
    "features": (5e4, "records a second and GPU through the scattering features"),
    "rank_one": (1e7, "records a second and GPU through a sum of rank-one gradients"),
    "joint": (5e4, "records a second and GPU through a full-batch pass of `joint`"),
    "dp_sgd": (2e3, "records a second and GPU through per-record gradients of a denoiser"),
    "network": (5e9, "bytes a second between machines"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--records", type=int, default=6144)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=16, help="of the DP-SGD step")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    if not args.page:
        measured = [{"ranks": w, "parts": launch(w)} for _ in range(args.repeats) for w in args.ranks]
        facts = {name: value for name, value in vars(args).items() if name not in ("worker", "page")}
        line = {**facts, "cores": os.cpu_count(), "load": os.getloadavg()[1], "runs": measured, "serial": serial()}
        with RUNS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    PAGE.write_text(page(json.loads(RUNS.read_text().splitlines()[-1])))


def launch(world: int) -> dict[str, list[list[float]]]:
    """Runs this script in `world` processes; returns for each part [wall, CPU] seconds of every process."""
    with tempfile.TemporaryDirectory() as scratch:
        start = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", *sys.argv, "--worker", scratch]
        subprocess.run([sys.executable, *start], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        found = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(world)]
    return {part: [each[part] for each in found] for part in PARTS}


def worker(args: argparse.Namespace) -> None:
    """One of the processes: every part once, through the door."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images = procedural_images(args.records, *SHAPE, seed=1)
    names = tuple(str(k) for k in range(CLASSES))
    labels = rng.integers(0, CLASSES, args.records)
    records = LabelledImages(images=images, labels=labels, class_names=names, source="made up")
    public = Public(
        image_shape=SHAPE, class_names=names, auxiliary=torch.from_numpy(to_unit(procedural_images(2000, *SHAPE, 2)))
    )
    seconds: dict[str, list[float]] = {}
    with joined() as ranks:
        if ranks.first:
            ledger = Ledger.open(args.worker / "ledger", cap=(1e9, 1e-5), data="bench")
            vault = Vault.open(args.worker / "vault", insecure_seed=0)  # the same sample each time
            ledger.check_affordable = lambda *_: None  # type: ignore[method-assign]  # what it costs is not what we time
        else:
            ledger, vault = Ledger.elsewhere(), Vault.elsewhere()

        def timed(part: str, work: Callable[[], Any]) -> None:
            ranks.agree(part.encode)  # all begin together
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            seconds[part] = [time.perf_counter() - wall, time.process_time() - cpu]

        private = PrivateData(records, ledger, vault, ranks=ranks)
        small = PrivateData(records, ledger, vault, micro_batch=args.micro_batch, ranks=ranks)
        teacher = linear.untrained(500, public)
        teacher.fit_public(public.auxiliary, torch.Generator().manual_seed(0))
        weights = torch.zeros(CLASSES, teacher.n_features)
        rank_one = GaussianSum(name="g", dim=weights.numel(), noise_multiplier=1.0, grid_bits=linear.GRID_BITS)
        held = private.reserve(rank_one, 2)
        features = private.features(teacher.features, teacher.n_features)
        timed("features", lambda: features.release_reserved(held, 0, linear.residuals(weights)))
        timed("rank_one", lambda: features.release_reserved(held, 1, linear.residuals(weights)))

        config = private_denoiser.DenoiserConfig(expected_records=args.records, expected_batch=args.batch)
        model = private_denoiser.network(config, public, torch.Generator().manual_seed(0))
        gradient = private_denoiser.record_gradient(model, config, torch.Generator().manual_seed(1))
        step = small.reserve(private_denoiser.planned(config, public, 1.0).query, 2)
        small.release_reserved(step, 0, gradient)  # the first is slower than those after it
        timed("dp_sgd", lambda: small.release_reserved(step, 1, gradient))

        options = shard_teachers.Config(models=args.shards, unit_moves=2, teacher_steps=30)
        ensemble = private.shards(args.shards, shard_teachers.ShardTeacher(options, SHAPE, CLASSES))
        asked = ensemble.reserve(shard_teachers.plan(options, public, 1.0)[0].query)
        student = shard_teachers.network(options, SHAPE, CLASSES, torch.Generator().manual_seed(0))
        x, sigma, y = shard_teachers.queries(
            options, student, SHAPE, CLASSES, 0, "cpu", torch.Generator().manual_seed(2)
        )
        packed = shard_teachers.pack(x, x, sigma, y)
        timed("shards", lambda: ensemble.release_vectors(asked, 0, packed))
        (args.worker / f"{ranks.rank}.json").write_text(json.dumps(seconds))
        if ranks.first:
            ledger.close()


def serial() -> dict[str, float]:
    """Nanoseconds of what the first process does alone: a coin, a number of noise, a record's shard."""

    def each(work: Callable[[], object], n: int) -> float:
        times = []
        for _ in range(5):
            begun = time.process_time()
            work()
            times.append(time.process_time() - begun)
        return min(times) / n * 1e9

    coins, noise = Stream(b"0" * 32), Stream(b"1" * 32)
    records = LabelledImages(
        images=procedural_images(2000, *SHAPE, seed=0),
        labels=np.zeros(2000, np.int64),
        class_names=("a",),
        source="made up",
    )
    return {
        "coin": each(lambda: np.packbits(coins.bernoulli(10**6, 1e-3)), 10**6),
        "noise": each(lambda: rounded_gaussian(10**6, 2.0**20, noise), 10**6),
        "shard": each(lambda: assign(records, 100, b"k" * 32), 2000),
    }


# --- the page -----------------------------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def free(run: dict[str, list[list[float]]]) -> bool:
    """Whether every process had a core to itself: the clock is hardly ahead of the process that works most."""
    wall, cpu = (sum(max(each[i] for each in run[part]) for part in PARTS) for i in (0, 1))
    return wall <= CROWDED * cpu


def page(line: dict[str, Any]) -> str:
    by_world: dict[int, list[dict[str, list[list[float]]]]] = {w: [] for w in line["ranks"]}
    for run in line["runs"]:
        by_world[run["ranks"]].append(run["parts"])
    many = max(by_world)
    alone = [k for k in range(line["repeats"]) if all(free(runs[k]) for runs in by_world.values())]
    clocked = alone or range(line["repeats"])
    rows = []
    for part, title in PARTS.items():
        one = by_world[1]
        wall = [one[k][part][0][0] for k in clocked]
        own = [a[part][0][1] for a in one]
        more = by_world[many]
        pairs = list(zip(one, more, strict=True))
        by_wall = [one[k][part][0][0] / more[k][part][0][0] for k in clocked]
        slowest = [a[part][0][1] / max(cpu for _, cpu in b[part]) for a, b in pairs]
        extra = [sum(cpu for _, cpu in b[part]) / a[part][0][1] for a, b in pairs]
        cells = [title.format(**line, n=line["records"]), spread(wall), spread(own), spread(by_wall), spread(slowest)]
        rows.append("| " + " | ".join([*cells, spread(extra)]) + " |")
    command = (
        f".venv/bin/python benchmarks/scale.py --ranks {' '.join(map(str, line['ranks']))} --repeats {line['repeats']} "
        f"--records {line['records']} --batch {line['batch']} --micro-batch {line['micro_batch']} --shards {line['shards']}"
    )
    said = f"In {len(alone)} of {line['repeats']} pairs of runs each process had a core to itself (the clock at most {CROWDED} times the\n"
    said += "CPU seconds of the process that works most)" + "; what is said by the clock is of these alone." * bool(
        alone
    )
    said += ", so what is said by the clock says little." * (not alone)
    return f"""# Benchmark: processes

How a run is divided, and what is not: [docs/scale.md](../scale.md). Written by `benchmarks/scale.py`.

```
{command}
```

One machine of {line["cores"]} shared cores, gloo, one thread a process; the load of five minutes was {line["load"]:.1f} at the end.
{said}
By CPU of the slowest: CPU seconds of one process over those of the slowest of {many}; ideal is {many}. The last column is all CPU seconds
together over those of one process, ideally 1. Medians, and their range.

| part | seconds, 1 process | CPU seconds, 1 process | by the clock, 1 over {many} | by CPU of the slowest | all CPU, {many} over 1 |
|---|---|---|---|---|---|
{chr(10).join(rows)}

A rank-one sum of so few records is mostly what does not divide: the check of its functions, the noise, and the exchanges.

{estimate(line["serial"])}"""


def estimate(serial: dict[str, float]) -> str:
    facts = Public(image_shape=SHAPE, class_names=tuple("0123456789"), auxiliary=torch.zeros(1, *SHAPE))
    joint = METHODS["joint"].plan(METHODS["joint"].Config(), facts, 1.0)
    teacher = MODEL_METHODS["teacher"].plan(MODEL_METHODS["teacher"].Config(), facts, 1.0)
    dpdm = DIFFUSION_METHODS["dpdm"]
    steps, batch = 2000, 4096
    denoiser = dpdm.plan(dpdm.Config(expected_records=N_RECORDS, expected_batch=batch, steps=steps), facts, 1.0)
    rate = {name: value for name, (value, _) in ASSUMED.items()}

    def exchange(planned: list[Any]) -> tuple[float, float]:
        """Bytes reduced in all, and seconds of noise on the first process."""
        numbers = sum(p.count * p.query.rows * p.query.dim for p in planned)
        return 8.0 * numbers, numbers * serial["noise"] * 1e-9

    def row(name: str, planned: list[Any], passes: str, private: float, coins: float = 0.0) -> str:
        n_bytes, noise = exchange(planned)
        count = sum(p.count for p in planned)
        cells = [name, str(count), f"{n_bytes / count / 1e6:.2f} MB", passes, f"{private:,.0f} s", f"{coins:,.0f} s"]
        return "| " + " | ".join([*cells, f"{noise:,.1f} s", f"{2 * n_bytes / rate['network']:,.1f} s"]) + " |"

    full = N_RECORDS / GPUS
    gradients = next(p for p in teacher if p.count > 1).count
    sums = len(joint)
    n_features = MODEL_METHODS["teacher"].Config().dims(facts) + 1  # and the constant
    rows = [
        row("`joint`", joint, f"{sums} · N/(W·r), r = {rate['joint']:,.0f}", sums * full / rate["joint"]),
        row(
            "`teacher`",
            teacher,
            f"1 · N/(W·{rate['features']:,.0f}) + {gradients} · N/(W·{rate['rank_one']:,.0f}) + 4 · N/(W·{rate['joint']:,.0f})",
            full / rate["features"] + gradients * full / rate["rank_one"] + 4 * full / rate["joint"],
        ),
        row(
            f"`dpdm`, T = {steps}, B = {batch}",
            denoiser,
            f"T · ⌈B/(256·W)⌉ · 256/{rate['dp_sgd']:,.0f}",
            steps * -(-batch // (256 * GPUS)) * 256 / rate["dp_sgd"],
            steps * N_RECORDS * serial["coin"] * 1e-9,
        ),
    ]
    assumed = "\n".join(f"- {value:,.0f} {what}" for value, what in ASSUMED.values())
    return f"""## Paper estimate: {GPUS} GPUs, 10⁹ records

Nobody has run this. N = 10⁹ grey images of 28 × 28 and ten classes, W = {GPUS}, default settings but where named. Assumptions, to be
replaced by what your machines do:

{assumed}

Measured in the same run, on one core: {serial["coin"]:.1f} ns a coin, {serial["noise"]:.0f} ns a number of noise,
{serial["shard"] / 1e3:.1f} µs a record to find its shard.

| run | releases | reduced, each | private passes | they take | coins (first process) | noise (first process) | reduce and broadcast |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

A release reduces 8 bytes for each of its rows × coordinates, however many records there are, and sends as many back. Kept features take
N · {n_features} · 2 / W bytes = {N_RECORDS * n_features * 2 / GPUS / 1e9:.1f} GB in each process.

What this says: full-batch passes divide by W and hardly talk. DP-SGD at such N does not: all N coins of a step are tossed by the
first process, which takes longer than the step, and a sample of {batch:,} is {batch // 256} micro-batches of 256, so that at most
{batch // 256} processes have one. A shard for each of 10⁹ records takes the first process {N_RECORDS * serial["shard"] / 3.6e12:.1f} h.
Coins could be tossed by every process for its own records (a counter-mode stream can be entered anywhere) if all were given that
stream's key; that is not done.
"""


if __name__ == "__main__":
    main()
