"""Benchmark of model conversion: writes docs/benchmarks/model.md and model.json.

  .venv/bin/python benchmarks/model.py --data DIR --cells 'mnist:private-teacher:1' --releases 3
  .venv/bin/python benchmarks/model.py --data DIR --cells 'mnist:teacher:1,mnist:teacher:3' --releases 3
  .venv/bin/python benchmarks/model.py --data DIR --table            # rebuild the table from the runs so far

A cell is DATASET:SETTING:EPSILON; several are separated by commas. SETTING is
  teacher          the private teacher itself (many releases in one process: its features are computed once; EPSILON may be 1+3+10);
  private-teacher  teacher and student of one release, the student without a real image (`--set share_prior=0`:
                   nor one of the released mixture);
  votes            shard teachers that vote (--shards K; --by-id for one shard per id), and the student of what they say;
  opaque           the paper's way with a teacher trained without privacy: EPSILON is its nominal ε (status none), `inf` is without
                   noise (and null in model.json);
  data-free        conversion of that same teacher without any noise and without its data: the data-free literature's setting.
Runs are kept in docs/benchmarks/model.runs.jsonl, one line each, and a cell that has enough is not run again. Students see procedural
images, their generator's, and those of a mixture that was released with a private teacher: no real image. DIR: see common.py. --cache
keeps the non-private teachers between runs.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import as_table, in_own_process, peak_gib, read, with_before
from safetensors.torch import load_file, save_file

from dpdistill.config_files import build
from dpdistill.data import LabelledImages, procedural_images, to_unit
from dpdistill.evaluation import Training, accuracy, train_on_real
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods import MODEL_METHODS, Public
from dpdistill.methods.model import votes as votes_method
from dpdistill.methods.shared import linear
from dpdistill.models import ConvNet
from dpdistill.models.linear import LinearTeacher
from dpdistill.privacy import Ledger, calibrate
from dpdistill.workspace import FolderWorkspace

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
RUNS = DOCS / "model.runs.jsonl"
DELTA = 1e-5
EVENED = " with evened scores"  # rows without it are of before
WAYS = {
    "teacher": "teacher",
    "private-teacher": "teacher",
    "votes": "votes",
    "opaque": "opaque",
    "data-free": "conversion",
}


def public_of(records: LabelledImages, seed: int) -> Public:
    """Procedural images only."""
    made_up = torch.from_numpy(to_unit(procedural_images(4000, *records.image_shape, seed)))
    return Public(image_shape=records.image_shape, class_names=records.class_names, auxiliary=made_up)


def with_ids(folder: Path, dataset: str, records: LabelledImages) -> LabelledImages:
    with np.load(folder / dataset / "train.npz", allow_pickle=False) as z:
        return replace(records, ids=z["groups"])


def row(args: argparse.Namespace, setting: str, epsilon: str, **facts: Any) -> dict[str, Any]:
    dataset = args.one.split(":")[0]
    unit = "id" if args.by_id else "record"
    return {"dataset": dataset, "setting": setting, "epsilon": epsilon, "delta": DELTA, "unit": unit, **facts}


def one(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One cell's run: the rows of its releases."""
    dataset, setting, epsilon = args.one.split(":")
    torch.set_num_threads(1)
    folder = Path(args.data)
    records, test = read(folder, dataset, "train"), read(folder, dataset, "test")
    started = time.monotonic()

    def score(model: Any) -> float:
        return accuracy(model.to("cpu"), test.images, test.labels)

    def done(**facts: Any) -> dict[str, Any]:
        common = {
            "seconds": time.monotonic() - started,
            "peak_gib": peak_gib(),
            "device": args.device,
            "seed": args.seed,
        }
        return row(args, setting, epsilon, **common, **facts)

    if setting in ("opaque", "data-free"):
        return [done(**opaque(args, records, score, epsilon, setting))]
    if setting == "votes" and args.by_id:
        records = with_ids(folder, dataset, records)
    method, settings = method_of(args, setting)
    asked: dict[str, Any] = {}
    inner = method.convert

    def watched(teacher: Any, *rest: Any, **options: Any) -> Any:
        asked["teacher"], asked["seconds"] = teacher, time.monotonic() - started
        return inner(teacher, *rest, **options)

    method.convert = watched
    rows = []
    shared: dict[Any, Any] = {}
    alone = setting == "teacher"
    releases = [(eps, seed) for eps in epsilon.split("+") for seed in range(args.releases)] if alone else []
    for epsilon, seed in releases or [(epsilon, args.seed)]:  # noqa: B020
        public = public_of(records, 0 if setting == "teacher" else seed)  # the same features, computed once
        sigma = calibrate(lambda value, p=public: method.plan(settings, p, value), float(epsilon), DELTA)
        plan = method.plan(settings, public, sigma)
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            unit = "id" if args.by_id else "record"
            with Ledger.open(place / "ledger.jsonl", cap=(float(epsilon) * 1.001, DELTA), unit=unit) as ledger:
                vault = Vault.open(place / "vault")
                private = PrivateData(records, ledger, vault, device=args.device)
                workspace = FolderWorkspace(
                    place / "work", seed=0 if setting == "teacher" else seed, device=args.device, quiet=True
                )
                if setting == "teacher":
                    share_features(private, shared)
                    model = linear.train(settings, public, private, plan[:2], workspace)
                    held = shared[in_use(model)]
                    if "test" not in held:
                        held["test"] = votes_method.embed(model, torch.from_numpy(test.to_unit()), args.device)
                    chosen = model.cpu().head(held["test"]).argmax(dim=1).numpy()
                    note = described(settings, public)
                    rows.append(done(accuracy=float((chosen == test.labels).mean()), note=note) | {"seed": seed})
                    continue
                made = method.run(settings, public, private, plan, workspace)
        student = f"WaveletNet-{settings.depth} width {settings.width}, {settings.steps} steps of {settings.batch}"
        if setting == "private-teacher" and settings.share_prior:
            student += "; mixture among its images" + (", in the records' tones" if records.image_shape[0] == 1 else "")
        if setting == "private-teacher":
            student += f"; teacher {described(settings, public)}"
        if setting == "votes":
            student += f"; {args.shards} shards{EVENED}, {settings.rounds} x {settings.queries} queries"
        facts = {
            "accuracy": score(made.model),
            "teacher_accuracy": score(asked["teacher"]),
            "teacher_seconds": asked["seconds"],
        }
        agreement = {name: value for name, value in made.figures.items() if name.startswith("agreement")}
        rows.append(done(note=student, **facts, **agreement))
    return rows


def method_of(args: argparse.Namespace, setting: str, **extra: Any) -> tuple[Any, Any]:
    """The way behind a setting, and its Config as the command line asks for it."""
    given: dict[str, Any] = dict(item.partition("=")[::2] for item in args.set)
    if setting == "votes":
        extra |= {"models": args.shards, "unit_moves": 1 if args.by_id else 2}
    if setting == "teacher":  # by itself: the whole budget is its own
        given = {"share_prior": "0", **given}
    method: Any = MODEL_METHODS[WAYS[setting]]
    return method, build(method.Config, given | extra)


def described(settings: linear.Training, public: Public) -> str:
    """The private teacher in words."""
    return f"linear on {settings.dims(public)} components, {settings.teacher_steps} steps"


def in_use(model: LinearTeacher) -> int:
    """Components that were not left out."""
    return int(model.projection.any(dim=0).sum())


def share_features(private: PrivateData, shared: dict[Any, Any]) -> None:
    """Features of the same records under the same public map are the same: computed once for many releases of a benchmark."""
    inner, fit = private.features, LinearTeacher.fit_public

    def fitted(model: LinearTeacher, images: Any, generator: Any) -> LinearTeacher:
        if "map" not in shared:
            fit(model, images, generator)
            shared["map"] = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(shared["map"])
        torch.nn.init.zeros_(model.head.weight)
        return model

    if "map" not in shared:
        LinearTeacher.fit_public = fitted  # type: ignore[method-assign]

    def features(fn: Any, dim: int, **options: Any) -> Any:
        made, held = inner(fn, dim, **options), shared.setdefault(in_use(fn.__self__), {})
        if "rows" in held:
            made._rows, made._labels = held["rows"], held["labels"]
        else:
            made._features()
            held["rows"], held["labels"] = made._rows, made._labels
        return made

    private.features = features  # type: ignore[method-assign]


def opaque(args: argparse.Namespace, records: LabelledImages, score: Any, epsilon: str, setting: str) -> dict[str, Any]:
    """A teacher without privacy, converted the paper's way, or freely."""
    public = public_of(records, args.seed)
    teacher = non_private(args, records)
    method, settings = method_of(args, setting, **({"noise": epsilon != "inf"} if setting == "opaque" else {}))
    with tempfile.TemporaryDirectory() as scratch:
        workspace = FolderWorkspace(Path(scratch) / "work", seed=args.seed, device=args.device, quiet=True)
        if setting == "opaque":
            sigma = settings.sigma(float(epsilon), DELTA)
            made = method.run(settings, public, teacher, sigma, Vault.open(Path(scratch) / "vault"), workspace)
        else:
            made = method.run(settings, public, teacher, workspace, True)
    note = f"WaveletNet-{settings.depth} width {settings.width}, {settings.steps} steps of {settings.batch}"
    return {"accuracy": score(made.model), "teacher_accuracy": score(teacher), "note": note}


def non_private(args: argparse.Namespace, records: LabelledImages) -> ConvNet:
    """A ConvNet trained on the real records; kept in --cache."""
    path = Path(args.cache or tempfile.gettempdir()) / f"{records.source}-{args.teacher_epochs}.safetensors"
    model = ConvNet(records.image_shape, records.n_classes, width=64)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval().to(args.device)
    augment = "crop" if records.source == "mnist" else "crop_flip"
    training = Training(epochs=args.teacher_epochs, batch=128, lr=0.05, width=64, augment=augment, bf16=True)
    model = train_on_real(records, training, torch.Generator().manual_seed(0), device=args.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, path)
    return model


def runs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def of_today(run: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether a run was made by the settings of now, as far as its note says: older ones stay in the table as they are."""
    if run["setting"] != "teacher" and not str(run["note"]).startswith("WaveletNet"):
        return False
    _, settings = method_of(args, run["setting"])
    if run["setting"] != "teacher" and f", {settings.steps} steps of {settings.batch}" not in run["note"]:
        return False
    if run["setting"] == "votes":
        return EVENED in run["note"]
    if run["setting"] not in ("teacher", "private-teacher"):
        return True
    return str(run["note"]).endswith(f"components, {settings.teacher_steps} steps")


def before(row: dict[str, Any]) -> bool:
    """Whether a row is of a teacher, a student or a vote that is gone, as far as its note says."""
    note = row["note"]
    of_teacher = row["setting"] in ("teacher", "private-teacher") and "components" not in note
    of_student = row["setting"] != "teacher" and not note.startswith("WaveletNet")
    of_vote = row["setting"] == "votes" and EVENED not in note
    return of_teacher or of_student or of_vote or (row["setting"] == "opaque" and ", 500 steps" in note)


def done_before(dataset: str, epsilons: str, args: argparse.Namespace) -> bool:
    """Whether all releases of the teacher are there, for every ε."""
    made = [run for run in runs() if of_today(run, args)]
    found = [(r["epsilon"], r["seed"]) for r in made if (r["dataset"], r["setting"]) == (dataset, "teacher")]
    return all((epsilon, seed) in found for epsilon in epsilons.split("+") for seed in range(args.releases))


def table() -> None:
    """Writes model.json and model.md from the runs so far."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs():
        cells.setdefault((run["dataset"], run["setting"], run["unit"], float(run["epsilon"]), run["note"]), []).append(
            run
        )
    rows = []
    for (dataset, setting, unit, epsilon, note), found in sorted(cells.items(), key=str):
        values = [run["accuracy"] for run in found]
        teachers = [run["teacher_accuracy"] for run in found if "teacher_accuracy" in run]
        rows.append(
            {
                "dataset": dataset,
                "method": "dpdistill",
                "setting": setting,
                "unit": unit,
                "epsilon": epsilon,
                "delta": DELTA,
                "metric": "test accuracy",
                "mean": round(statistics.mean(values), 4),
                "std": round(statistics.stdev(values), 4) if len(values) > 1 else None,
                "teacher_mean": round(statistics.mean(teachers), 4) if teachers else None,
                "releases": len(values),
                "seconds": round(statistics.mean(run["seconds"] for run in found), 1),
                "peak_gib": round(max(run["peak_gib"] for run in found), 2),
                "device": found[0]["device"],
                "note": note,
            }
        )
    finite = [
        {**row, "epsilon": row["epsilon"] if math.isfinite(row["epsilon"]) else None} for row in rows
    ]  # JSON has no ∞
    (DOCS / "model.json").write_text(json.dumps(finite, indent=1, allow_nan=False) + "\n")
    head = (
        "| data | setting | ε | per | teacher, % | student, % | spread | loss | releases | minutes | peak GiB | what |"
    )
    lines: dict[bool, list[str]] = {True: [], False: []}  # of recipes that are gone, and of today's
    for r in sorted(rows, key=lambda r: (r["dataset"], r["setting"], r["unit"], r["epsilon"])):
        spread = f"± {100 * r['std']:.1f}" if r["std"] is not None else "–"
        alone = r["setting"] == "teacher"
        teacher = r["mean"] if alone else r["teacher_mean"]
        shown = ["–" if value is None else f"{100 * value:.1f}" for value in (teacher, None if alone else r["mean"])]
        loss = "–" if alone or teacher is None else f"{100 * (teacher - r['mean']):.1f}"
        lines[before(r)].append(
            f"| {r['dataset']} | {r['setting']} | {r['epsilon']:g} | {r['unit']} | {shown[0]} | {shown[1]} | {spread} | {loss} "
            f"| {r['releases']} | {r['seconds'] / 60:.1f} | {r['peak_gib']:.1f} | {r['note']} |"
        )
    text = [(DOCS / "model.head.md").read_text() if (DOCS / "model.head.md").exists() else ""]
    text += as_table(head, lines[False])
    (DOCS / "model.md").write_text("\n".join(with_before(text, head, lines[True])) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data sets (see common.py)")
    parser.add_argument("--cells", default="")
    parser.add_argument("--releases", type=int, default=3)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--by-id", action="store_true", help="shards by the array `groups` of train.npz")
    parser.add_argument("--set", action="append", default=[], help="name=value for the way's Config")
    parser.add_argument("--teacher-epochs", type=int, default=10, help="of the non-private teacher")
    parser.add_argument("--cache", help="folder that keeps non-private teachers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps({"rows": one(args)}))
        return
    DOCS.mkdir(parents=True, exist_ok=True)
    todo = []
    for cell in filter(None, args.cells.split(",")):
        dataset, setting, epsilon = cell.split(":")
        key = (dataset, setting, epsilon, "id" if args.by_id else "record")
        made = [run for run in runs() if of_today(run, args)]
        have = {run["seed"] for run in made if (run["dataset"], run["setting"], run["epsilon"], run["unit"]) == key}
        if setting == "teacher":
            have = set(range(args.releases)) if done_before(dataset, epsilon, args) else set()
        wanted = [seed for seed in range(args.releases) if seed not in have]
        todo += [(cell, seed) for seed in (wanted[:1] if setting == "teacher" else wanted)]
    passed = [
        "--data",
        str(args.data),
        "--releases",
        str(args.releases),
        "--shards",
        str(args.shards),
        "--device",
        args.device,
    ]
    passed += ["--teacher-epochs", str(args.teacher_epochs)] + (["--cache", args.cache] if args.cache else [])
    passed += ["--by-id"] * args.by_id + [word for item in args.set for word in ("--set", item)]

    def work(job: tuple[str, int]) -> None:
        cell, seed = job
        found = in_own_process(__file__, [*passed, "--one", cell, "--seed", str(seed)])["rows"]
        with RUNS.open("a") as file:
            file.writelines(json.dumps(run) + "\n" for run in found)
        for run in found:
            print(
                f"{cell} seed {run['seed']}: {100 * run['accuracy']:.2f} % in {run['seconds'] / 60:.1f} min", flush=True
            )

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))
    table()


if __name__ == "__main__":
    main()
