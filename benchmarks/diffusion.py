"""Benchmark of private diffusion: writes docs/benchmarks/diffusion.md and diffusion.json.

  .venv/bin/python benchmarks/diffusion.py --data DIR --cells 'digits:student:1,digits:student:10' --releases 3
  .venv/bin/python benchmarks/diffusion.py --data DIR --cells 'mnist:student:1' --releases 1 --set adversarial=0
  .venv/bin/python benchmarks/diffusion.py --table            # rebuild the table from the runs so far

A cell is DATASET:SETTING:EPSILON; several are separated by commas. `digits` is bundled and needs no DIR. SETTING is
  student   `dpsad`, the default, whole: gives the rows `teacher` and `student` of one release;
  teacher   its teacher alone: what `student` gives beside the student, without the time for one;
  control   the same recipe behind the same door with no records in it (ε = 0: noise and public data alone);
  dpdm      plain DP-SGD diffusion from scratch, and its student;
  dpmerf    DP-MERF, images drawn from its generator;
  shards    shard teachers: noisy sums of their clipped vectors;
  real      the classifiers trained on the real images (not private): the upper reference.
Utility: three classifiers (softmax regression, a network with one hidden layer, a ConvNet) trained on nine tenths of the synthetic images,
each as it was after the epoch at which it was best on the other tenth; accuracy on the test images. Rows without `"epoch": "chosen"` are
of before: all synthetic images, and the last epoch. Distance: Fréchet's, between 500 public scattering components of synthetic and
of test images; precision and recall (Kynkäänniemi et al. 2019, k = 3) in the same space. Test images are used for these figures only.

`--features NET.onnx` adds Fréchet's distance between the features of a network of yours, and the file's name to the rows. NET maps images
[B, 3 or 1, H, W] in [-1, 1] to [B, D]; ours are scaled to its H and W, and grey ones repeated. Inception, 0.4 s an image on one core, of
torchvision's weights (published figures are mostly of TensorFlow's of 2015, which give others):
  python -c "import torch, torchvision
  net = torchvision.models.inception_v3(init_weights=False)
  net.load_state_dict(torch.load('inception_v3_google-0cc3c7bd.pth', weights_only=True))
  net.fc = torch.nn.Identity()
  axes = {'x': {0: 'n'}, 'y': {0: 'n'}}
  torch.onnx.export(net.eval(), torch.zeros(2, 3, 299, 299), 'inception.onnx',
                    input_names=['x'], output_names=['y'], dynamic_axes=axes, dynamo=False)"

Runs are kept in docs/benchmarks/diffusion.runs.jsonl, one line each, and a cell that has enough is not run again. DIR: see common.py.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import as_table, in_own_process, peak_gib, read, with_before
from judging import Judge, network_features

from dpdistill.config_files import build
from dpdistill.data import LabelledImages, load_images, procedural_images, to_unit
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods import DIFFUSION_METHODS, METHODS, Public, Synthetic
from dpdistill.methods.diffusion import dpsad
from dpdistill.methods.diffusion import student as student_of
from dpdistill.models import few_step
from dpdistill.privacy import Ledger, calibrate
from dpdistill.workspace import FolderWorkspace

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
RUNS = DOCS / "diffusion.runs.jsonl"
DELTA = 1e-5
DRAWN = 10_000  # images that are judged
OURS = ("student", "teacher", "control")  # settings that are `dpsad`
LAST = "last epoch"  # how samples were judged before
# In notes of recipes that are gone (docs/benchmarks/diffusion.head.md says what each was).
GONE = (
    "before tones",
    "U-Net",
    "in spite of their noise",
    "all frequencies",
    "pixel_dims=64",
    "with a guide",
    "embedding_batch",
)


def public_of(records: LabelledImages, seed: int) -> Public:
    """Procedural images only."""
    made_up = torch.from_numpy(to_unit(procedural_images(4000, *records.image_shape, seed)))
    return Public(image_shape=records.image_shape, class_names=records.class_names, auxiliary=made_up)


def both(args: argparse.Namespace, dataset: str) -> tuple[LabelledImages, LabelledImages]:
    if dataset == "digits":
        return load_images("digits:train"), load_images("digits:test")
    return read(Path(args.data), dataset, "train"), read(Path(args.data), dataset, "test")


def one(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One cell's run: its rows."""
    dataset, setting, epsilon = args.one.split(":")
    torch.set_num_threads(1)
    records, test = both(args, dataset)
    public = public_of(records, args.seed)
    judge = Judge(test, public, network_features(args.features) if args.features else None)
    rows: list[dict[str, Any]] = []
    started = time.monotonic()

    def add(name: str, made: Synthetic, **facts: Any) -> None:
        spent = time.monotonic() - started - paused[0]
        begun = time.monotonic()
        found = judge(made, args.seed)
        paused[0] += time.monotonic() - begun
        common = {"dataset": dataset, "setting": name, "epsilon": epsilon, "delta": DELTA, "unit": "record"}
        common |= {
            "seconds": spent,
            "peak_gib": peak_gib(),
            "device": args.device,
            "seed": args.seed,
            "note": args.note,
        }
        rows.append({**common, **found, "images": len(made.images), **facts})

    paused = [0.0]
    if setting == "real":
        add("real", Synthetic(images=torch.from_numpy(records.to_unit()), labels=torch.from_numpy(records.labels)))
        return rows
    given: dict[str, Any] = dict(item.partition("=")[::2] for item in args.set)
    expected = len(records.labels)  # of a benchmark's set; public
    if setting == "control":
        records = replace(records, images=records.images[:0], labels=records.labels[:0])
    method: Any = {**METHODS, **DIFFUSION_METHODS}["dpsad" if setting in OURS else setting]
    sizes = {"dpmerf": {"per_class": DRAWN // records.n_classes}, "shards": {"unit_moves": 2}}
    given |= sizes.get(setting, {"expected_records": expected})
    given |= {"target_epsilon": epsilon} if method is dpsad else {}
    settings = build(method.Config, given)
    sigma = calibrate(lambda value: method.plan(settings, public, value), float(epsilon), DELTA)
    plan = method.plan(settings, public, sigma)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        with Ledger.open(place / "ledger.jsonl", cap=(float(epsilon) * 1.001, DELTA)) as ledger:
            private = PrivateData(records, ledger, Vault.open(place / "vault"), device=args.device)
            workspace = FolderWorkspace(place / "work", seed=args.seed, device=args.device, quiet=True)
            if setting in ("student", "teacher"):
                teacher = dpsad.train(settings, public, private, plan, workspace)
                at = time.monotonic()
                drawn = student_of.samples(teacher, public, settings, workspace, DRAWN)
                add("teacher", drawn, sampling_seconds=time.monotonic() - at)
                if setting == "teacher":
                    return rows
                made = student_of.finish(teacher, public, settings.distilling(public), workspace)
            else:
                made = method.run(settings, public, private, plan, workspace)
    if isinstance(made, Synthetic):
        add(setting, made)
        return rows
    labels = torch.arange(records.n_classes).repeat_interleave(DRAWN // records.n_classes)
    for steps in steps_of(args):
        at, pipe = time.monotonic(), few_step.pipeline(made.model)
        drawn_by_student = few_step.draw(pipe, labels, steps, torch.Generator().manual_seed(args.seed))
        took = time.monotonic() - at
        facts = {"sampling_seconds": took, "steps": steps, "note": noted(args, steps)}
        add(setting, Synthetic(images=drawn_by_student, labels=labels), **facts)
    return rows


def steps_of(args: argparse.Namespace) -> list[int]:
    return [int(steps) for steps in args.steps.split(",")]


def noted(args: argparse.Namespace, steps: int) -> str:
    """The note of a student's rows: those in the usual number of steps do not say so."""
    return ", ".join(filter(None, [args.note, "" if steps == student_of.STEPS else f"steps={steps}"]))


def runs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def table() -> None:
    """Writes diffusion.json and diffusion.md from the runs so far."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs():
        note = ", ".join(filter(None, [run["note"], "" if "epoch" in run else LAST]))
        cells.setdefault((run["dataset"], float(run["epsilon"]), run["setting"], note), []).append(run)
    in_given = any("frechet_given" in run for found in cells.values() for run in found)
    gone = {cell for cell in cells if before(*cell, cells=cells)}
    rows, lines = [], {True: [], False: []}  # of recipes that are gone, and of today's
    head = "| data | ε | setting | CNN, % | spread | MLP | softmax | Fréchet |" + " Fréchet, given |" * in_given
    head += " precision | recall | releases | minutes | peak GiB | what |"
    for (dataset, epsilon, setting, note), found in sorted(cells.items()):

        def mean(name: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.mean(run[name] for run in found)

        spread = statistics.stdev(run["accuracy"] for run in found) if len(found) > 1 else None
        row = {
            "dataset": dataset,
            "method": "dpdistill",
            "setting": setting,
            "unit": "record",
            "epsilon": epsilon,
            "delta": DELTA,
            "metric": "test accuracy of a ConvNet trained on samples",
            "mean": round(mean("accuracy"), 4),
            "std": None if spread is None else round(spread, 4),
            **{name: round(mean(name), 4) for name in ("mlp", "logistic", "frechet", "precision", "recall")},
            **({"frechet_given": round(mean("frechet_given"), 4)} if "frechet_given" in found[0] else {}),
            "releases": len(found),
            "seconds": round(mean("seconds"), 1),
            "peak_gib": round(max(run["peak_gib"] for run in found), 2),
            "device": found[0]["device"],
            "note": note,
        }
        rows.append(row)
        shown = "–" if spread is None else f"± {100 * spread:.1f}"
        others = " | ".join(f"{100 * row[name]:.1f}" for name in ("mlp", "logistic"))
        distance = f" {row['frechet_given']:.1f} |" if "frechet_given" in row else " – |" * in_given
        lines[(dataset, epsilon, setting, note) in gone].append(
            f"| {dataset} | {epsilon:g} | {setting} | {100 * row['mean']:.1f} | {shown} | {others} "
            f"| {row['frechet']:.1f} |{distance} {row['precision']:.2f} | {row['recall']:.2f} | {len(found)} | {row['seconds'] / 60:.1f} "
            f"| {row['peak_gib']:.1f} | {note} |"
        )
    pairs = []
    for (dataset, epsilon, setting, note), found in sorted(cells.items()):
        of_teacher = re.sub(r"(, )?steps=\d(?=$|, last epoch)", "", note)  # one teacher, whatever its student's steps
        teachers = {run["seed"]: run for run in cells.get((dataset, epsilon, "teacher", of_teacher), [])}
        both_ways = [(teachers[run["seed"]], run) for run in found if run["seed"] in teachers]
        if (
            setting != "student"
            or (dataset, epsilon, setting, note) in gone
            or not both_ways
            or not all("sampling_seconds" in run for pair in both_ways for run in pair)
        ):
            continue
        lost = statistics.mean(teacher["accuracy"] - student["accuracy"] for teacher, student in both_ways)
        faster = statistics.mean(
            teacher["sampling_seconds"] / student["sampling_seconds"] for teacher, student in both_ways
        )
        steps = both_ways[0][1]["steps"]
        pairs.append(
            f"| {dataset} | {epsilon:g} | {100 * lost:.1f} | {faster:.1f} | {steps} | {len(both_ways)} | {note} |"
        )
    (DOCS / "diffusion.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    text = [(DOCS / "diffusion.head.md").read_text() if (DOCS / "diffusion.head.md").exists() else ""]
    text += as_table(head, lines[False])
    text += ["", "The student beside its teacher, on the releases that have both:", ""]
    text += as_table("| data | ε | points of CNN accuracy lost | times as fast | steps | releases | what |", pairs)
    (DOCS / "diffusion.md").write_text("\n".join(with_before(text, head, lines[True])) + "\n")


def before(dataset: str, epsilon: float, setting: str, note: str, cells: Container[tuple[Any, ...]]) -> bool:
    """Whether runs are of a recipe that is gone, or were judged as they are no more while others were anew."""
    anew = note.endswith(LAST) and (dataset, epsilon, setting, note.removesuffix(LAST).removesuffix(", ")) in cells
    return anew or any(name in note for name in GONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data sets (see common.py); not needed for digits")
    parser.add_argument("--cells", default="")
    parser.add_argument("--releases", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="name=value for the method's Config")
    parser.add_argument(
        "--steps",
        default=str(student_of.STEPS),
        help="of the student, for an image; of several, such as 2,1, a row each",
    )
    parser.add_argument(
        "--features", metavar="NET.onnx", help="feature network for a second Fréchet distance; see above"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.note = ", ".join([*args.set, *([f"features={Path(args.features).name}"] if args.features else [])])
    if args.one:
        print(json.dumps({"rows": one(args)}))
        return
    DOCS.mkdir(parents=True, exist_ok=True)
    todo = []
    for cell in filter(None, args.cells.split(",")):
        dataset, setting, epsilon = cell.split(":")
        sampled = setting not in ("teacher", "real", "dpmerf")  # by a student, in its steps
        key = (dataset, setting, epsilon, noted(args, steps_of(args)[0]) if sampled else args.note)
        have = {
            run["seed"]
            for run in runs()
            if "epoch" in run and (run["dataset"], run["setting"], run["epsilon"], run["note"]) == key
        }
        todo += [(cell, seed) for seed in range(args.releases) if seed not in have]
    passed = ["--data", str(args.data), "--device", args.device, "--steps", args.steps]
    passed += [word for item in args.set for word in ("--set", item)]
    passed += ["--features", args.features] if args.features else []

    def work(job: tuple[str, int]) -> None:
        cell, seed = job
        found = in_own_process(__file__, [*passed, "--one", cell, "--seed", str(seed)])["rows"]
        with RUNS.open("a") as file:
            file.writelines(json.dumps(run) + "\n" for run in found)
        for run in found:
            print(
                f"{cell} {run['setting']} seed {seed}: {100 * run['accuracy']:.2f} % at {run['seconds'] / 60:.1f} min",
                flush=True,
            )

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))
    table()


if __name__ == "__main__":
    main()
