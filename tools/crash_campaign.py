"""Breaks every command on purpose and prints what came of it: `python tools/crash_campaign.py --campaigns 200`.

Every fault at every call that changes the disk, then random ones one after another. Exit code 1 where a promise did not hold.
What is broken and what has to hold: docs/ledger.md, "What was broken on purpose".
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

import torch
from rich.console import Console
from rich.table import Table

from crash_cases import NAMES, cases
from crash_harness import KINDS, Study, Violation


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument(
        "--faults", nargs="*", default=list(KINDS), choices=KINDS, metavar="KIND", help=", ".join(KINDS)
    )
    parser.add_argument(
        "--campaigns", type=int, default=200, help="random multi-crash campaigns, in turn over the methods"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the campaigns, and of what an unsynced write leaves")
    parser.add_argument("--variants", type=int, default=2, help="random outcomes of each power cut, beside the worst")
    parser.add_argument("--every", type=int, default=1, help="take one of so many faults")
    parser.add_argument("--work", type=Path, help="folder to work in, best in memory; a temporary one by default")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    torch.set_num_threads(1)
    problems: list[str] = []
    campaigns: dict[str, Counter[str]] = {name: Counter() for name in given.methods}
    table = Table("method", "points", "calls", *given.faults, "campaigns", "crashes in them", "not held")
    seeds = range(given.seed, given.seed + given.variants)
    with tempfile.TemporaryDirectory(dir=given.work) as folder, cases(Path(folder) / "inputs") as make:
        for place, name in enumerate(given.methods):
            study, began, failed = Study(make(name), Path(folder) / name), time.monotonic(), len(problems)
            for number, attempt in enumerate(study.attempts(given.faults, seeds)):
                if number % given.every == 0:
                    try:
                        attempt()
                    except Violation as problem:
                        problems.append(str(problem))
                        print(f"VIOLATION  {problem}", flush=True)
                if number % 100 == 0:
                    print(f"{name}: fault {number}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            met = campaigns[name]
            for number in range(place, given.campaigns, len(given.methods)):
                try:
                    met.update(study.campaign(given.seed * given.campaigns + number), campaigns=1)
                except Violation as problem:
                    problems.append(str(problem))
                    print(f"VIOLATION  {problem}", flush=True)
            print(f"{name}: done, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            tried = (study.counts.get(kind, [0, 0]) for kind in given.faults)
            table.add_row(
                *(name, str(len(study.points)), str(len(study.calls))),
                *(f"{count} ({states})" for count, states in tried),
                *(str(met.pop("campaigns", 0)), str(met.total()), str(len(problems) - failed)),
            )
            print("ROW", *table_row(table), sep="\t", flush=True)
    Console(width=200).print(table)
    print("of each fault: how often it was tried (in brackets the different states that were recovered from)")
    return 1 if problems else 0


def table_row(table: Table) -> list[str]:
    """The last row, for a log that may be cut off."""
    return [list(column.cells)[-1] for column in table.columns]


if __name__ == "__main__":
    sys.exit(main())
