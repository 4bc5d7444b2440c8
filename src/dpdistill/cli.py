"""The command line: verbs only. Each is the Python call of the same name; torch is imported only by those that need it."""

import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import DpdistillError, printable

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
UsageError: Any = typer.BadParameter.__bases__[0]  # of click, or of the click that newer typers bring along
PLANS = {"dataset": "RunConfig", "model": "ModelConfig", "diffusion": "DiffusionConfig"}
RESUMED = ("dataset", "model", "diffusion")  # commands that keep what was done
SAMPLES = 10_000  # drawn of a diffusion model to evaluate it
FIRST = (
    int(os.environ.get("RANK", "0")) == 0 or "WORLD_SIZE" not in os.environ
)  # of the processes that torchrun starts, only one talks
console = Console(soft_wrap=True, highlight=False, quiet=not FIRST)

Data = Annotated[
    str | None, typer.Option(help="Private images: .npz, folder of class folders, IDX, Parquet, or 'digits'.")
]
Out = Annotated[str | None, typer.Option(help="The release folder to make.")]
Epsilon = Annotated[float | None, typer.Option(help="ε asked for.")]
Delta = Annotated[float | None, typer.Option(help="δ asked for.")]
PerClass = Annotated[int | None, typer.Option(help="Synthetic images per class.")]
MethodName = Annotated[str | None, typer.Option(help="joint (ours), dosser (the paper's, sound), ndpdc, dpmerf.")]
Auxiliary = Annotated[
    str | None,
    typer.Option(
        help="Public images in any of the forms of --data (labels help where they have some), or 'none' (procedural)."
    ),
]
Classes = Annotated[int | None, typer.Option(help="Number of classes, where the files do not say.")]
Resize = Annotated[int | None, typer.Option(help="Side length in pixels to scale images to.")]
MaxGib = Annotated[
    int | None, typer.Option(help="Most data to read, in GiB once unpacked (4 by default); docs/large-data.md.")
]
Budget = Annotated[float | None, typer.Option(help="ε that all runs on this data may cost together.")]
LedgerPath = Annotated[
    str | None, typer.Option("--ledger", help="The data set's ledger; one per data set under ~/.dpdistill by default.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything public. Privacy noise never comes from it.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file with any of these settings; a release's config.toml is one.")
]
Assignments = Annotated[list[str] | None, typer.Option("--set", help="name=value, for a setting of the method.")]
Release = Annotated[Path, typer.Argument(help="A release folder.")]


def _config(kind: str = "RunConfig", **flags: Any) -> Any:
    from . import config

    file, assignments = flags.pop("config"), flags.pop("assignments") or []
    return config.read(file, flags, assignments, getattr(config, kind))


def _show_advice(plan: Any) -> None:
    for line in plan.advice:
        console.print(line, markup=False)


def _show_plan(plan: Any, config: Any, outlook: Iterable[str] = ()) -> None:
    console.print(plan.toml, markup=False)
    table = Table("release", "times", "rows × coordinates", "sampling", "noise multiplier")
    for planned in plan.releases:
        q = planned.query
        table.add_row(
            q.name, str(planned.count), f"{q.rows} × {q.dim}", f"{planned.part[0]:g}", f"{q.noise_multiplier:.4f}"
        )
    console.print(table)
    console.print(
        f"planned: ε = {plan.epsilon:.4f} at δ = {config.delta:g} (exchanging one: {plan.epsilon_replace_one:.4f})"
    )
    for line in outlook:
        console.print(line, markup=False)


def _show_range(config: Any) -> None:
    console.print(
        f"pixels: the teacher is fed {config.input_low:g} for black and {config.input_high:g} for white "
        "(--input-low, --input-high); a uint8 model gets 0 to 255"
    )


@app.command()
def plan(
    kind: Annotated[str, typer.Argument(help="Of what: dataset, model or diffusion.")] = "dataset",
    shape: Annotated[str, typer.Option(help="channels,height,width of the images.")] = "1,28,28",
    classes: Classes = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    per_class: PerClass = None,
    method: Annotated[
        str | None, typer.Option(help="joint, dosser, ndpdc or dpmerf; of a diffusion model dpsad, dpdm or shards.")
    ] = None,
    shards: Annotated[str | None, typer.Option(help="Of a model: as `model --shards`.")] = None,
    expected_records: Annotated[
        int | None, typer.Option(help="Public guess of the number of records, for a diffusion model or --shards auto.")
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Shows what a run would ask of the door and cost, without any data."""
    from .config import PLANNED
    from .errors import ConfigError
    from .pipeline import make_plan
    from .sources import parse_shape

    if kind not in PLANS:
        raise ConfigError(f"plan {kind}: expected plan {', plan '.join(PLANS)}")
    if shards is not None and kind != "model":
        raise ConfigError(f"plan {kind} has no --shards; it is of plan model")
    if expected_records is not None and kind == "dataset":
        raise ConfigError(
            "plan dataset has no --expected-records; a method that samples has --set expected_records_per_class="
        )
    chosen = _config(
        PLANS[kind],
        data=PLANNED,
        epsilon=epsilon,
        delta=delta,
        per_class=per_class,
        method=method,
        classes=classes,
        shards=shards,
        expected_records=expected_records,
        config=config,
        assignments=assignments,
    )
    names = tuple(str(k) for k in range(chosen.classes or 10))
    planned = make_plan(chosen, parse_shape(shape), names)
    _show_advice(planned)
    _show_plan(planned, chosen)


@app.command()
def dataset(
    data: Data = None,
    out: Out = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    per_class: PerClass = None,
    method: MethodName = None,
    auxiliary: Auxiliary = None,
    classes: Classes = None,
    resize: Resize = None,
    max_gib: MaxGib = None,
    budget: Budget = None,
    ledger: LedgerPath = None,
    seed: Seed = None,
    device: Device = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the input, show settings, planned ε and what the ledger has left, and stop."
        ),
    ] = False,
) -> None:
    """Distils private images into a small synthetic data set that may be handed out. Stopped, the same command goes on."""
    chosen = _config(**{name: value for name, value in locals().items() if name != "dry_run"})
    from . import pipeline, sources

    with pipeline.joined(chosen.device):
        if dry_run:
            source = sources.open_source(chosen)
            planned = pipeline.make_plan(chosen, source.image_shape, source.class_names)
            _show_plan(planned, chosen, pipeline.outlook(chosen, planned, source))
            return
        _tell(pipeline.distil(chosen))


@app.command()
def model(
    data: Data = None,
    out: Out = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    shards: Annotated[
        str | None, typer.Option(help="Train K teachers on disjoint parts of --data, and let them vote; or 'auto'.")
    ] = None,
    expected_records: Annotated[
        int | None, typer.Option(help="Public guess of the number of records, for --shards auto.")
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(
            help="Array of the .npz, or column of Parquet, that says whose record each is: the guarantee is then per id."
        ),
    ] = None,
    teachers: Annotated[str | None, typer.Option(help="Folder of models of many owners, to vote.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="One model: .onnx, .safetensors with --architecture, or a release of ours.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="module:callable that makes a .safetensors file's network.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="channels,height,width a teacher expects, where its file does not say.")
    ] = None,
    input_low: Annotated[float | None, typer.Option(help="Pixel value that a teacher takes as black.")] = None,
    input_high: Annotated[float | None, typer.Option(help="Pixel value that a teacher takes as white.")] = None,
    attested_epsilon: Annotated[
        float | None, typer.Option(help="ε of the teacher's training, by its supplier's word.")
    ] = None,
    attested_delta: Annotated[
        float | None, typer.Option(help="δ of the teacher's training, by its supplier's word.")
    ] = None,
    attested_unit: Annotated[str | None, typer.Option(help="Whose presence the supplier says is hidden.")] = None,
    accept_no_record_guarantee: Annotated[
        bool | None,
        typer.Option(
            "--accept-no-record-guarantee", help="The paper's way with an opaque teacher: no guarantee for its records."
        ),
    ] = None,
    per_class: PerClass = None,
    auxiliary: Auxiliary = None,
    classes: Classes = None,
    resize: Resize = None,
    max_gib: MaxGib = None,
    budget: Budget = None,
    ledger: LedgerPath = None,
    seed: Seed = None,
    device: Device = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the input, show settings, planned ε and what the ledger has left, and stop."
        ),
    ] = False,
) -> None:
    """Makes a private student model without showing it a private image. What is given decides the way; stopped, it goes on."""
    chosen = _config("ModelConfig", **{name: value for name, value in locals().items() if name != "dry_run"})
    from . import conversion, pipeline, sources

    with pipeline.joined(chosen.device):
        if not chosen.teacher:
            if dry_run or (chosen.way == "votes" and FIRST):
                source = sources.open_source(chosen)
                planned = pipeline.make_plan(chosen, source.image_shape, source.class_names, source.models)
                _show_advice(planned)
            if dry_run:
                _show_plan(planned, chosen, pipeline.outlook(pipeline.with_way(chosen), planned, source))
                if chosen.teachers:
                    _show_range(chosen)
                return
        elif dry_run:
            ready = conversion.prepare(chosen)
            found = ready.brought
            console.print(ready.toml, markup=False)
            console.print(
                f"way: {chosen.way}; {len(found.class_names)} classes of {found.image_shape}; nothing will be charged"
            )
            if not found.differentiable:  # a release of ours knows its own range
                _show_range(chosen)
            if ready.nominal:
                console.print(ready.nominal.statement(), markup=False)
            return
        _tell(conversion.convert(chosen))


@app.command()
def diffusion(
    data: Data = None,
    out: Out = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    expected_records: Annotated[
        int | None, typer.Option(help="Public guess of the number of records; sampling is planned from it.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="dpsad (ours), dpdm, shards, or paper (with the flag below)."),
    ] = None,
    unlabelled: Annotated[
        bool | None,
        typer.Option("--unlabelled", help="All images are of one class: labels, if there are any, are not read."),
    ] = None,
    accept_no_record_guarantee: Annotated[
        bool | None,
        typer.Option(
            "--accept-no-record-guarantee",
            help="With --method paper: its own form, which guarantees nothing for a record.",
        ),
    ] = None,
    per_class: Annotated[int | None, typer.Option(help="Samples to release beside the model, per class.")] = None,
    auxiliary: Auxiliary = None,
    classes: Classes = None,
    resize: Resize = None,
    max_gib: MaxGib = None,
    budget: Budget = None,
    ledger: LedgerPath = None,
    seed: Seed = None,
    device: Device = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the input, show settings, planned ε and what the ledger has left, and stop."
        ),
    ] = False,
) -> None:
    """Trains a private diffusion model that may be handed out and sampled without limit. Stopped, the same command goes on."""
    chosen = _config("DiffusionConfig", **{name: value for name, value in locals().items() if name != "dry_run"})
    from . import diffusion as way
    from . import pipeline, sources

    with pipeline.joined(chosen.device):
        if chosen.method != "paper":
            if dry_run or FIRST:
                source = sources.open_source(chosen)
                planned = pipeline.make_plan(chosen, source.image_shape, source.class_names)
                _show_advice(planned)
            if dry_run:
                _show_plan(planned, chosen, pipeline.outlook(chosen, planned, source))
                return
        elif dry_run:
            ready = way.prepare(chosen)
            console.print(ready.toml, markup=False)
            console.print("way: paper; no guarantee for any record; nothing will be charged")
            console.print(ready.claim.statement(), markup=False)
            return
        _tell(way.diffuse(chosen))


@app.command()
def sample(
    release: Release,
    out: Annotated[Path, typer.Option(help="A folder of PNG files by class, or a file: .npz or .parquet.")],
    count: Annotated[int, typer.Option(min=1, help="Images in all.")] = 10_000,
    classes: Annotated[
        str | None, typer.Option(help="Names of classes, or their numbers from 0, with commas; all by default.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=4, help="Of a diffusion model: passes of the network for an image, 1, 2 (by default) or 4."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same images.")] = 0,
    device: Device = None,
) -> None:
    """Samples a diffusion release, or a student's generator with the student's labels, without limit: the guarantee stays what it is."""
    from .pipeline import check_device
    from .sampling import sample as run

    device = device or "cpu"
    check_device(device)
    wanted = None if classes is None else classes.split(",")
    run(release, out, count=count, classes=wanted, steps=steps, seed=seed, device=device)
    console.print(f"{count} images: {out}", markup=False)


def _tell(folder: Path) -> None:
    if not FIRST:
        return
    from .bundle.verification import verify

    verdict = verify(folder)
    said = verdict.guarantee or " ".join(verdict.problems) or "no guarantee"
    console.print(str(said), style="bold" if verdict.guarantee else "bold red", markup=False)
    console.print(
        f"release: {folder}   page: {folder / 'report.html'}   check: dpdistill verify {shlex.quote(str(folder))}",
        markup=False,
    )


@app.command()
def verify(release: Release) -> None:
    """Recomputes ε from the release's ledger and checks every file. Exit code 0 only if all holds."""
    from .bundle.verification import verify as run

    verdict = run(release)
    for problem in verdict.problems:
        console.print(f"FAIL  {problem}", markup=False)
    if verdict.ok:
        console.print(f"PASS  {verdict.guarantee}", markup=False)
        for item in verdict.unchecked:
            console.print(f"      not checkable from a release: {item}", markup=False)
    raise typer.Exit(0 if verdict.ok else 1)


@app.command()
def audit(
    release: Annotated[Path | None, typer.Argument(help="A release folder; not needed with --kernel.")] = None,
    kernel: Annotated[
        bool, typer.Option("--kernel", help="Only the kernel: worst pairs of data sets through the door, at five ε.")
    ] = False,
    data: Annotated[
        str,
        typer.Option(
            help="Public images for the twin run, in any of the forms of `dataset --data`. Never private ones."
        ),
    ] = "digits",
    auxiliary: Auxiliary = None,
    canaries: Annotated[
        int, typer.Option(min=20, help="Noise images in the twin run, at most; and a quarter of its records.")
    ] = 500,
    two_worlds: Annotated[
        int,
        typer.Option(
            min=0, help="Whole small runs in each of two worlds, with and without one record: 1000 take minutes."
        ),
    ] = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A tenth of the draws, and no twin beyond its last noisy sum: seconds to a minute."
        ),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write what was found to.")] = None,
    device: Device = None,
) -> None:
    """Attacks the software and a release of it, and writes into the release what that proved. It can refute, not confirm.

    Exit code 0: nothing was refuted; 1: a lower bound lies above the claim, and the release is left as it was.
    """
    from .audit import run as audits
    from .audit.result import Audit
    from .bundle.release import add_audit
    from .errors import ConfigError
    from .workspace import passing

    if kernel == (release is not None):
        raise ConfigError("give a release folder, or --kernel without one")
    if json_file is not None:
        _check_outside(json_file, release or Path("-"), "--json")
    if release is None:
        draws = audits.QUICK if quick else audits.DRAWS
        rows = audits.kernels(audits.every_kind(), audits.DELTA, draws=draws, passing=passing)
        found = Audit(epsilon=0.0, delta=audits.DELTA, confidence=0.999, twin="", blind="", kernel=rows)
    else:
        found = audits.audit_release(
            release,
            data=data,
            auxiliary=auxiliary or "none",
            device=device or "cpu",
            most_canaries=canaries,
            runs=two_worlds,
            quick=quick,
            passing=passing,
            quiet=False,
        )
    _show_audit(found)
    if json_file is not None:
        json_file.write_text(json.dumps(found.describe(), indent=2, sort_keys=True) + "\n")
    if found.refuted:
        for line in found.refuted:
            console.print(f"REFUTED  {line}", style="bold red", markup=False)
        raise typer.Exit(1)
    if release is not None:
        add_audit(release, found)
        console.print(f"written into {release}: certificate, README.md and report.html", markup=False)


def _show_audit(found: Any) -> None:
    """Every bound beside its claim, and what else was seen."""
    table = Table("audit", "claimed ε", "lower bound", "expected of a correct one", "noise: spread, tail, repeats")
    for k in found.kernel:
        name = f"kernel {k.mechanism}" + ("" if k.sampling_prob == 1 else f", sampled at {k.sampling_prob:g}")
        noise = f"{k.spread:.4f}  {k.tail:.2f}  " + (f"{k.repeats:.2f}" if k.repeats else "-")
        table.add_row(name, f"{k.epsilon:g}", f"{k.lower:.3f}", "", noise)
    one = found.one_run
    if one is not None:
        for name, bound, band in (
            ("Steinke et al. 2023", one.steinke, one.expected_steinke),
            ("f-DP", one.fdp, one.expected_fdp),
        ):
            told = f"{band[0]:.2f} to {band[1]:.2f}"
            table.add_row(f"one run, {one.canaries} canaries, {name}", f"{found.epsilon:g}", f"{bound:.3f}", told, "")
    for pair in found.two_worlds:
        name = f"two worlds, {pair.runs} runs each, {pair.seen}"
        table.add_row(name, f"{found.epsilon:g}", f"{max(pair.lower, pair.lower_gdp):.3f}", "", "")
    console.print(table)
    if found.blind:
        console.print(f"no audit from one run: {found.blind}", markup=False)
    if one is not None:
        console.print(
            f"coins drawn anew: {one.null_alarms} alarms in {one.null_trials} trials (5 % or so are due by chance at the most)"
        )
        console.print(
            f"a tenth of the noise: bounds {one.broken_steinke:.2f} and {one.broken_fdp:.2f}, of {one.most_steinke:.2f} "
            f"and {one.most_fdp:.2f} that so many canaries can prove: "
            + ("the alarm rings" if one.alarm_rings(found.epsilon) else "too few canaries to notice at this ε")
        )
    for m in found.membership:
        console.print(
            f"membership of {m.who} by {m.attack}: AUC {m.auc[0]:.3f} ({m.auc[1]:.3f} to {m.auc[2]:.3f}), "
            f"{100 * m.power[0]:.1f} % found at 1 % false alarms (ε, δ allow {100 * m.power_allowed:.1f} %)",
            markup=False,
        )
    console.print("An audit can refute, not confirm.", style="bold")


@app.command()
def evaluate(
    release: Release,
    data: Annotated[str, typer.Option(help="Labelled test images, in any of the forms of `dataset --data`.")],
    out: Annotated[
        Path,
        typer.Option(help="JSON file for the result: it is about the test data, and not covered by the guarantee."),
    ] = Path("evaluation.json"),
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Training epochs (published protocol: 1000; samples of a diffusion model: 20)."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Networks to train, each from its own seed.")] = 1,
    classes: Classes = None,
    resize: Resize = None,
    max_gib: MaxGib = None,
    device: Device = None,
    reading: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="name=value, for how the images are read, as of `dataset`: label_column, class_names, value_low …",
        ),
    ] = None,
) -> None:
    """Tests a release on your images: a student as it is, synthetic images and samples by networks trained on them. It stays outside."""
    from .bundle.release import load_student, read_bundle
    from .bundle.verification import open_release
    from .errors import ConfigError
    from .evaluation import Training, accuracy, evaluate
    from .files import write_whole
    from .pipeline import check_device
    from .sources import load_test
    from .workspace import passing

    device = device or "cpu"
    check_device(device)
    _check_outside(out, release)
    facts = open_release(release).facts  # a changed one would be tested as if it were this
    chosen = _config(
        data=data, classes=classes, resize=resize, max_gib=max_gib, device=device, config=None, assignments=reading
    )
    if chosen.settings:
        raise ConfigError(f"--set {next(iter(chosen.settings))}=: evaluate knows no such reading of its images")
    test = load_test(chosen, facts.class_names, facts.image_shape)
    synthetic = read_bundle(release)
    drawn = (release / "pipeline").is_dir()
    if drawn:  # of a diffusion model the shown samples are few: draw what a person would
        from .sampling import draw_set

        synthetic = draw_set(release, SAMPLES, device=device)
    student = load_student(release).to(device) if (release / "model").is_dir() else None
    of = {"run": facts.run, "data": Path(data).name}
    if student is not None:
        right = accuracy(student, test.images, test.labels, value_range=test.value_range)
        write_whole(out, json.dumps({"mean": right, "images": len(test.images), **of}, indent=2) + "\n")
        console.print(
            f"accuracy {100 * right:.2f} %; about the test data, so not covered by the guarantee; written to {out}"
        )
        return
    epochs = 20 if drawn and epochs is None else epochs
    training = Training() if epochs is None else Training(epochs=epochs)
    with passing("training on the release") as progress:
        result = evaluate(synthetic, test, training, seeds=range(seeds), progress=progress, device=device)
    write_whole(out, json.dumps({**result, **of}, indent=2) + "\n")
    said = f"accuracy {100 * result['mean']:.2f} % ± {100 * result['std']:.2f} over {seeds} networks"
    console.print(f"{said}; about the test data, so not covered by the guarantee; written to {out}", markup=False)


@app.command()
def report(
    release: Release,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    evaluation: Annotated[Path | None, typer.Option(help="Result of `evaluate`, to be shown on the page.")] = None,
) -> None:
    """Writes the page of a release anew, with the utility you measured if you name it."""
    from .bundle.report import write_report
    from .bundle.verification import open_release
    from .errors import InputError

    found = _read_evaluation(evaluation) if evaluation else None
    if found is not None and found.get("run") != open_release(release).facts.run:
        raise InputError(evaluation, "is not of this release", "give the file that `dpdistill evaluate` wrote of it")
    write_report(release, out, found)
    console.print(f"page: {out}", markup=False)


def _check_outside(out: Path, release: Path, option: str = "--out") -> None:
    """Before the work: the result needs a folder to lie in, and must not lie in the release, which would not verify any more."""
    from .errors import InputError

    if not out.parent.is_dir() or (os.path.lexists(out) and not out.is_file()):
        raise InputError(out, "no file can be written there", f"choose another {option}")
    if out.resolve().is_relative_to(release.resolve()):
        raise InputError(out, "lies in the release, which must not change", f"choose another {option}")


def _read_evaluation(path: Path) -> Any:
    from .bundle.tensors import parse_json
    from .errors import InputError
    from .files import read_small

    hint = "give the file that `dpdistill evaluate` wrote"
    try:
        found = parse_json(read_small(path, 2**20))
    except ValueError:
        raise InputError(path, "not a readable JSON file", hint) from None
    if not isinstance(found, dict):
        raise InputError(path, "not an object of names and values", hint)
    return found


def main() -> None:
    """Entry point: an error a person can cause is one line on stderr and exit code 2."""
    try:
        _main()
    except SystemExit as end:
        if "WORLD_SIZE" in os.environ:
            from .mechanisms.ranks import end_process

            end_process(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _main() -> None:
    try:
        sys.exit(app(standalone_mode=len(sys.argv) < 2))  # typed alone, it shows its help
    except UsageError as error:
        verb = f"{error.ctx.info_name} " if error.ctx and error.ctx.parent else ""
        _say(printable(" ".join(f"{error.format_message()} (see `dpdistill {verb}--help`)".split())))
        sys.exit(2)
    except DpdistillError as error:
        _say(" ".join(str(error).split("\n")))  # its lines are printable
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        _say(printable(f"{error.filename or 'input or output'}: {error.strerror or error}"))
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # typer turns Ctrl-C into exit code 130
            raise
        goes_on = sys.argv[1:2] in ([name] for name in RESUMED)
        _say(f"stopped; the same command {'goes on from here' if goes_on else 'begins anew'}")
        sys.exit(130)


def _say(line: str) -> None:
    if FIRST:
        print(f"dpdistill: {line}", file=sys.stderr)
