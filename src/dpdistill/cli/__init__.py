"""The command line, from what was typed to an exit code."""

import os
import sys
from typing import Any

import typer

from ..errors import DpdistillError, printable
from . import make, review
from .common import FIRST, app, console

__all__ = ["app", "console", "main", "make", "review"]
UsageError: Any = typer.BadParameter.__bases__[0]  # of click, or of the click that newer typers bring along
RESUMED = ("dataset", "model", "diffusion")  # commands that keep what was done


def main() -> None:
    """Entry point: an error a person can cause is one line on stderr and exit code 2."""
    try:
        _main()
    except SystemExit as end:
        if "WORLD_SIZE" in os.environ:
            from ..mechanisms.ranks import end_process

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
