"""Benchmark of dataset distillation: writes docs/benchmarks/dataset.md and dataset.json.

  .venv/bin/python benchmarks/dataset.py --data DIR --cells 'fashion_mnist:joint:10:1' --releases 3
  .venv/bin/python benchmarks/dataset.py --data DIR --table            # rebuild the table from the runs so far

A cell is DATASET:METHOD:IMAGES_PER_CLASS:EPSILON; several are separated by commas. METHOD is joint, dosser, ndpdc, dpsgd, or
`auxiliary`, the control at ε = 0: `joint` behind the same door with no records in it. Every release draws its own noise and its own
public seed. Runs are kept in docs/benchmarks/dataset.runs.jsonl, one line each, and a cell that has enough is not run again.
DIR: see common.py.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import AUXILIARY, as_table, in_own_process, peak_gib, read, with_before

from dpdistill.config_files import build
from dpdistill.data import LabelledImages, procedural_images, to_unit
from dpdistill.evaluation import Training, accuracy, evaluate
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.mechanisms import private as private_module
from dpdistill.methods import METHODS, Public
from dpdistill.methods import dpsgd as dpsgd_method
from dpdistill.methods import joint as joint_module
from dpdistill.models.precision import is_fast
from dpdistill.privacy import Ledger, calibrate
from dpdistill.workspace import FolderWorkspace

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
RUNS = DOCS / "dataset.runs.jsonl"
DELTA = 1e-5
# What the literature prints (accuracy in %, ε = 1, δ = 1e-5): (method, dataset, images per class) -> value. Their ε is not a record-level
# guarantee of the released code (docs/privacy/dosser.md).
PUBLISHED = {
    "Dosser (ICCV 2025)": {"mnist": (95.3, 96.4), "fashion_mnist": (81.6, 81.8), "cifar10": (44.2, 49.1)},
    "Dosser + PEA": {"mnist": (96.4, 96.7), "fashion_mnist": (80.1, 83.1), "cifar10": (50.6, 52.3)},
    "NDPDC": {"mnist": (93.1, 94.1), "fashion_mnist": (77.7, 78.8), "cifar10": (39.4, 42.3)},
    "PSG": {"mnist": (78.6, None), "fashion_mnist": (68.5, None), "cifar10": (33.6, None)},
    "DP-MERF": {"mnist": (75.0, 84.4), "fashion_mnist": (65.5, 71.3), "cifar10": (None, None)},
    "matching without privacy": {"mnist": (97.8, 99.2), "fashion_mnist": (84.6, 88.7), "cifar10": (52.1, 60.6)},
}
TARGETS = {"mnist": (97.0, 97.5), "fashion_mnist": (83.0, 85.0), "cifar10": (52.0, 55.0)}
# Settings of the rivals that fit two cores; the published ones are the defaults of their Config.
QUICK = {
    "dosser": {"sampling_steps": 100, "optimisation_steps": 500, "subspace_dim": 300, "width": 32, "parts": 2},
    "ndpdc": {"steps": 400, "width": 32, "parts": 2},
}


def cut_down(method: str) -> list[str]:
    """The settings of a rival that are not its published ones, as a note; parts of 2 are PEA."""
    return [f"{name}={value}" for name, value in QUICK.get(method, {}).items()]


def public_of(folder: Path, dataset: str, records: LabelledImages, seed: int) -> Public:
    auxiliary = read(folder, AUXILIARY[dataset], "train")
    return Public(
        image_shape=records.image_shape,
        class_names=records.class_names,
        auxiliary=torch.from_numpy(auxiliary.to_unit()),
        procedural=torch.from_numpy(to_unit(procedural_images(4000, *records.image_shape, seed))),
        auxiliary_labels=torch.from_numpy(auxiliary.labels),
    )


class Stopwatch:
    """Adds up the seconds spent in a few functions: where the time goes, and what exactness costs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started

        setattr(owner, name, timed)


def one(args: argparse.Namespace) -> dict[str, Any]:
    """One release and its evaluation: the row of one run."""
    dataset, name, per_class, epsilon = args.one.split(":")
    torch.set_num_threads(1)
    folder = Path(args.data)
    records, test = read(folder, dataset, "train"), read(folder, dataset, "test")
    ours = name in ("joint", "auxiliary")
    method = dpsgd_method if name == "dpsgd" else METHODS["joint" if ours else name]
    given: dict[str, Any] = {} if name == "dpsgd" else {"per_class": int(per_class)}
    if ours and dataset != "mnist":
        given["flip"] = True
    if name in ("dosser", "ndpdc"):
        given |= {"expected_records_per_class": 5000 if dataset == "cifar10" else 6000}
    if name == "dpsgd":
        given |= {"expected_records": 50_000 if dataset == "cifar10" else 60_000}
    for item in args.set:
        key, _, value = item.partition("=")
        given[key] = value
    settings = build(method.Config, {**given, **({} if args.full else QUICK.get(name, {}))})
    public = public_of(folder, dataset, records, args.seed)
    target = float(epsilon) if float(epsilon) > 0 else 1.0
    sigma = calibrate(lambda value: method.plan(settings, public, value), target, DELTA)
    plan = method.plan(settings, public, sigma)
    if name == "auxiliary":
        records = LabelledImages(
            images=records.images[:0], labels=records.labels[:0], class_names=records.class_names, source="none"
        )
    watch = Stopwatch()
    for owner, function in (
        (private_module, "clip_to_grid"),
        (private_module, "rounded_gaussian"),
        (Ledger, "_append"),
    ):
        watch.watch(owner, function, "door")
    watch.watch(PrivateData, "release_reserved", "private passes, door included")
    watch.watch(joint_module, "match", "fit")
    watch.watch(joint_module, "teach", "lessons")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        with Ledger.open(place / "ledger.jsonl", cap=(target * 1.001, DELTA)) as ledger:
            private = PrivateData(
                records,
                ledger,
                Vault.open(place / "vault"),
                micro_batch=64 if name == "dpsgd" else 256,
                device=args.device,
            )
            workspace = FolderWorkspace(place / "work", seed=args.seed, device=args.device, quiet=True)
            result = method.run(settings, public, private, plan, workspace)
    seconds, peak = time.monotonic() - started, peak_gib()
    augment = "color_crop_cutout_scale_rotate" + ("" if dataset == "mnist" else "_flip")
    training = Training(epochs=args.epochs, batch=args.batch, augment=augment, bf16=args.bf16)
    if name == "dpsgd":
        value, protocol = accuracy(result, test.images, test.labels), "the private classifier itself"
    else:
        value = evaluate(result, test, training, seeds=(args.seed,), device=args.device)["mean"]
        quick = args.bf16 and is_fast(args.device)
        protocol = f"ConvNet-3 width 128, {args.epochs} epochs of batch {args.batch}" + (", bf16" if quick else "")
    return {
        "dataset": dataset,
        "method": name,
        "setting": per_class,
        "epsilon": 0.0 if name == "auxiliary" else float(epsilon),
        "delta": DELTA,
        "accuracy": value,
        "seconds": seconds,
        "total_seconds": time.monotonic() - started,
        "peak_gib": peak,
        "device": args.device,
        "note": ", ".join([protocol, *args.set, *([] if args.full else cut_down(name))]),
        "seed": args.seed,
        "profile": {part: round(value, 2) for part, value in watch.seconds.items()},
    }


def runs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def table() -> None:
    """Writes dataset.json and dataset.md from the runs so far."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs():
        cells.setdefault((run["dataset"], run["method"], run["setting"], run["epsilon"], run["note"]), []).append(run)
    rows = []
    for (dataset, method, setting, epsilon, note), found in sorted(cells.items(), key=str):
        values = [run["accuracy"] for run in found]
        rows.append(
            {
                "dataset": dataset,
                "method": method,
                "setting": setting,
                "epsilon": epsilon,
                "delta": DELTA,
                "metric": "test accuracy",
                "mean": round(statistics.mean(values), 4),
                "std": round(statistics.stdev(values), 4) if len(values) > 1 else None,
                "releases": len(values),
                "seconds": round(statistics.mean(run["seconds"] for run in found), 1),
                "peak_gib": round(max(run["peak_gib"] for run in found), 2),
                "device": found[0]["device"],
                "note": note,
            }
        )
    (DOCS / "dataset.json").write_text(json.dumps(rows + published_rows(), indent=1, allow_nan=False) + "\n")
    head = "| data | images per class | ε | method | accuracy, % | spread | releases | minutes to the images | peak GiB | evaluation |"
    lines: dict[bool, list[str]] = {True: [], False: []}  # of recipes that are gone, and of today's
    for row in sorted(rows, key=lambda r: (r["dataset"], int(r["setting"]), r["epsilon"], r["method"])):
        spread = f"± {100 * row['std']:.1f}" if row["std"] is not None else "–"
        where = f"| {row['dataset']} | {row['setting']} | {row['epsilon']:g} | {row['method']} "
        what = f"| {100 * row['mean']:.1f} | {spread} | {row['releases']} | {row['seconds'] / 60:.1f} | {row['peak_gib']:.1f} "
        lines[before(row)].append(where + what + f"| {row['note']} |")

    def show(pair: tuple[float | None, float | None]) -> str:
        return " / ".join("–" if v is None else f"{v:.1f}" for v in pair)

    published = [
        f"| {name} | {show(figures['mnist'])} | {show(figures['fashion_mnist'])} | {show(figures['cifar10'])} |"
        for name, figures in [*PUBLISHED.items(), ("**ours, at least**", TARGETS)]
    ]
    text = [(DOCS / "dataset.head.md").read_text() if (DOCS / "dataset.head.md").exists() else ""]
    text += as_table(head, lines[False])
    text += ["", "Published, ε = 1 (10 / 50 images per class), and the aim of this project:", ""]
    text += as_table("| method | MNIST | Fashion-MNIST | CIFAR-10 |", published)
    text += [
        "",
        "Where the time goes, in seconds. `door` is clipping, exact noise and ledger together; `rest` is what is not",
    ]
    text += ["timed by itself: the rivals' optimisation, axes, and lessons where they are not.", ""]
    text += as_table(
        "| data | method | images per class | runs | to the images | private passes | door | its share | lessons | fit | rest |",
        profile_lines(),
    )
    (DOCS / "dataset.md").write_text("\n".join(with_before(text, head, lines[True])) + "\n")


def published_rows() -> list[dict[str, Any]]:
    """What the literature prints, as rows: without releases, seconds and memory of ours."""
    unknown = {"std": None, "releases": None, "seconds": None, "peak_gib": None, "device": None, "note": "published"}
    return [
        {
            "dataset": dataset,
            "method": method,
            "setting": per_class,
            "epsilon": None if method == "matching without privacy" else 1.0,
            "delta": None if method == "matching without privacy" else DELTA,
            "metric": "test accuracy",
            "mean": round(value / 100, 4),
            **unknown,
        }
        for method, figures in PUBLISHED.items()
        for dataset, values in figures.items()
        for per_class, value in zip(("10", "50"), values, strict=True)
        if value is not None
    ]


def before(run: dict[str, Any]) -> bool:
    """Whether a run, or a row, is of a recipe that is gone: its note says so after a semicolon."""
    return ";" in run["note"]


def profile_lines() -> list[str]:
    """The mean of each cell's runs of today's recipes: of those that timed the lessons, if any did."""
    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs():
        if run.get("profile") and not before(run):
            cells.setdefault((run["dataset"], run["method"], run["setting"]), []).append(run)
    lines = []
    for (dataset, method, setting), every in sorted(cells.items()):
        found = [run for run in every if "lessons" in run["profile"]] or every

        def mean(part: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.mean(run["profile"].get(part, 0.0) for run in found)

        seconds, door = statistics.mean(run["seconds"] for run in found), mean("door")
        passes, lessons, fit = (mean(part) for part in ("private passes, door included", "lessons", "fit"))
        rest = seconds - passes - lessons - fit
        lines.append(
            f"| {dataset} | {method} | {setting} | {len(found)} | {seconds:.0f} | {passes:.0f} | {door:.1f} "
            f"| {100 * door / seconds:.1f} % | {f'{lessons:.0f}' if lessons else '–'} | {fit:.0f} | {rest:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data sets (see common.py)")
    parser.add_argument("--cells", default="")
    parser.add_argument("--releases", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1000, help="of the evaluation; the published protocol has 1000")
    parser.add_argument("--batch", type=int, default=256, help="of the evaluation; the published protocol has 256")
    parser.add_argument("--bf16", action="store_true", help="evaluate in bfloat16 where the device is quick in it")
    parser.add_argument("--full", action="store_true", help="rivals with their published settings (a GPU, or days)")
    parser.add_argument("--set", action="append", default=[], help="name=value for the method's Config")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args)))
        return
    DOCS.mkdir(parents=True, exist_ok=True)
    todo = []
    for cell in filter(None, args.cells.split(",")):
        dataset, name, per_class, epsilon = cell.split(":")
        key = (dataset, name, per_class, 0.0 if name == "auxiliary" else float(epsilon))
        now = [run for run in runs() if not before(run)]
        have = {run["seed"] for run in now if (run["dataset"], run["method"], run["setting"], run["epsilon"]) == key}
        todo += [(cell, seed) for seed in range(args.releases) if seed not in have]
    passed = [
        "--data",
        str(args.data),
        "--epochs",
        str(args.epochs),
        "--batch",
        str(args.batch),
        "--device",
        args.device,
    ]
    passed += ["--bf16"] * args.bf16 + ["--full"] * args.full + [word for item in args.set for word in ("--set", item)]

    def work(job: tuple[str, int]) -> None:
        cell, seed = job
        run = in_own_process(__file__, [*passed, "--one", cell, "--seed", str(seed)])
        with RUNS.open("a") as file:
            file.write(json.dumps(run) + "\n")
        print(f"{cell} seed {seed}: {100 * run['accuracy']:.2f} % in {run['total_seconds'] / 60:.1f} min", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))
    table()


if __name__ == "__main__":
    main()
