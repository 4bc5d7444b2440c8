"""Verbs that look at a release: is it what it says, can the door be refuted, what is it worth."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import (
    Auxiliary,
    Classes,
    Device,
    MaxGib,
    Release,
    Resize,
    app,
    configured,
    console,
)

SAMPLES = 10_000  # drawn of a diffusion model to evaluate it


@app.command()
def verify(release: Release) -> None:
    """Recomputes ε from the release's ledger and checks every file. Exit code 0 only if all holds."""
    from ..bundle.verification import verify as run

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
    from ..audit import run as audits
    from ..audit.result import Audit
    from ..bundle.release import add_audit
    from ..errors import ConfigError
    from ..workspace import passing

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
    from ..bundle.release import load_student, read_bundle
    from ..bundle.verification import open_release
    from ..errors import ConfigError
    from ..evaluation import Training, accuracy, evaluate
    from ..files import write_whole
    from ..pipeline import check_device
    from ..sources import load_test
    from ..workspace import passing

    device = device or "cpu"
    check_device(device)
    _check_outside(out, release)
    facts = open_release(release).facts  # a changed one would be tested as if it were this
    if len(facts.class_names) == 1:
        raise ConfigError(f"{release}: its images are of one class: there is no accuracy to measure")
    chosen = configured(
        data=data, classes=classes, resize=resize, max_gib=max_gib, device=device, config=None, assignments=reading
    )
    if chosen.settings:
        raise ConfigError(f"--set {next(iter(chosen.settings))}=: evaluate knows no such reading of its images")
    test = load_test(chosen, facts.class_names, facts.image_shape)
    synthetic = read_bundle(release)
    drawn = (release / "pipeline").is_dir()
    if drawn:  # of a diffusion model the shown samples are few: draw what a person would
        from ..sampling import draw_set

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
    from ..bundle.report import write_report
    from ..bundle.verification import open_release
    from ..errors import InputError

    found = read_evaluation(evaluation) if evaluation else None
    if found is not None and found.get("run") != open_release(release).facts.run:
        raise InputError(evaluation, "is not of this release", "give the file that `dpdistill evaluate` wrote of it")
    write_report(release, out, found)
    console.print(f"page: {out}", markup=False)


def _check_outside(out: Path, release: Path, option: str = "--out") -> None:
    """Before the work: the result needs a folder to lie in, and must not lie in the release, which would not verify any more."""
    from ..errors import InputError

    if not out.parent.is_dir() or (os.path.lexists(out) and not out.is_file()):
        raise InputError(out, "no file can be written there", f"choose another {option}")
    if out.resolve().is_relative_to(release.resolve()):
        raise InputError(out, "lies in the release, which must not change", f"choose another {option}")


def read_evaluation(path: Path) -> Any:
    from ..bundle.tensors import parse_json
    from ..errors import InputError
    from ..files import read_small

    hint = "give the file that `dpdistill evaluate` wrote"
    try:
        found = parse_json(read_small(path, 2**20))
    except ValueError:
        raise InputError(path, "not a readable JSON file", hint) from None
    if not isinstance(found, dict):
        raise InputError(path, "not an object of names and values", hint)
    return found
