"""Verbs that make something: a plan, a release of each kind, samples of one."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import (
    FIRST,
    Assignments,
    Auxiliary,
    Budget,
    Classes,
    ConfigFile,
    Data,
    Delta,
    Device,
    DryRun,
    Epsilon,
    LedgerPath,
    MaxGib,
    MethodName,
    Out,
    PerClass,
    Release,
    Resize,
    Seed,
    app,
    configured,
    console,
)

PLANS = {"dataset": "RunConfig", "model": "ModelConfig", "diffusion": "DiffusionConfig"}


def _show_advice(plan: Any) -> None:
    for line in plan.advice:
        console.print(line, markup=False)


def _show_plan(plan: Any, config: Any, outlook: Iterable[str] = ()) -> None:
    from ..privacy.guarantee import shown

    console.print(plan.toml, markup=False)
    table = Table("release", "times", "rows × coordinates", "sampling", "noise multiplier")
    for planned in plan.releases:
        q = planned.query
        table.add_row(
            q.name, str(planned.count), f"{q.rows} × {q.dim}", f"{planned.part[0]:g}", f"{q.noise_multiplier:.4f}"
        )
    console.print(table)
    console.print(
        f"planned: ε = {shown(plan.epsilon)} at δ = {config.delta!r} (exchanging one: {shown(plan.epsilon_replace_one)})"
    )
    if plan.public.procedural is not None:  # the person's own public images
        labels = "no labels" if plan.public.auxiliary_labels is None else "their labels"
        console.print(f"auxiliary: {len(plan.public.auxiliary):,} public images and {labels} were read", markup=False)
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
    from ..config import PLANNED
    from ..errors import ConfigError
    from ..planning import make_plan
    from ..sources import parse_shape

    if kind not in PLANS:
        raise ConfigError(f"plan {kind}: expected plan {', plan '.join(PLANS)}")
    if shards is not None and kind != "model":
        raise ConfigError(f"plan {kind} has no --shards; it is of plan model")
    if expected_records is not None and kind == "dataset":
        raise ConfigError(
            "plan dataset has no --expected-records; a method that samples has --set expected_records_per_class="
        )
    chosen = configured(
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
    dry_run: DryRun = False,
) -> None:
    """Distils private images into a small synthetic data set that may be handed out. Stopped, the same command goes on."""
    chosen = configured(**{name: value for name, value in locals().items() if name != "dry_run"})
    from .. import pipeline, planning, sources

    with pipeline.joined(chosen.device):
        if dry_run:
            source = sources.open_source(chosen)
            planned = planning.make_plan(chosen, source.image_shape, source.class_names)
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
    dry_run: DryRun = False,
) -> None:
    """Makes a private student model without showing it a private image. What is given decides the way; stopped, it goes on."""
    chosen = configured("ModelConfig", **{name: value for name, value in locals().items() if name != "dry_run"})
    from .. import conversion, pipeline, planning, sources

    with pipeline.joined(chosen.device):
        if not chosen.teacher:
            if dry_run or (chosen.way == "votes" and FIRST):
                source = sources.open_source(chosen)
                planned = planning.make_plan(chosen, source.image_shape, source.class_names, source.models)
                _show_advice(planned)
            if dry_run:
                _show_plan(planned, chosen, pipeline.outlook(planning.with_way(chosen), planned, source))
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
        made = conversion.convert(chosen)
        if chosen.teachers or (chosen.teacher and not (Path(chosen.teacher) / "certificate.json").exists()):
            _show_range(chosen)
        _tell(made)


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
    dry_run: DryRun = False,
) -> None:
    """Trains a private diffusion model that may be handed out and sampled without limit. Stopped, the same command goes on."""
    chosen = configured("DiffusionConfig", **{name: value for name, value in locals().items() if name != "dry_run"})
    from .. import diffusion as way
    from .. import pipeline, planning, sources

    with pipeline.joined(chosen.device):
        if chosen.method != "paper":
            if dry_run or FIRST:
                source = sources.open_source(chosen)
                planned = planning.make_plan(chosen, source.image_shape, source.class_names)
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
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")] = 0,
    device: Device = None,
) -> None:
    """Samples a diffusion release, or a student's generator with the student's labels, without limit: the guarantee stays what it is."""
    from ..pipeline import check_device
    from ..sampling import sample as run

    device = device or "cpu"
    check_device(device)
    run(release, out, count=count, classes=classes, steps=steps, seed=seed, device=device)
    console.print(f"{count} images: {out}", markup=False)


def _tell(folder: Path) -> None:
    if not FIRST:
        return
    from ..bundle.verification import verify

    verdict = verify(folder)
    said = verdict.guarantee or " ".join(verdict.problems) or "no guarantee"
    console.print(str(said), style="bold" if verdict.guarantee else "bold red", markup=False)
    console.print(
        f"release: {folder}   page: {folder / 'report.html'}   check: dpdistill verify {shlex.quote(str(folder))}",
        markup=False,
    )
