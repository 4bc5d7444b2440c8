"""The command line: verbs only. Each is the Python call of the same name; torch is imported only by those that need it."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
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
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the input, show settings, planned ε and what the ledger has left, and stop."),
]
Release = Annotated[Path, typer.Argument(help="A release folder.")]


def configured(kind: str = "RunConfig", **flags: Any) -> Any:
    """What flags, a file and `--set` say together."""
    from .. import config
    from ..config_files import read

    file, assignments = flags.pop("config"), flags.pop("assignments") or []
    return read(file, flags, assignments, getattr(config, kind))
