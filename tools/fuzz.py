"""A long run of mutated inputs: every reader, model, ledger and release file (tests/helpers/fuzzing.py says which and how).

python tools/fuzz.py --count 100000 --seed 1     # about as many CPU minutes as the table's mean milliseconds say
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import fuzzing

SECONDS, MEGABYTES = 10.0, 1500.0  # the most that one input may take


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", choices=fuzzing.KINDS, default=list(fuzzing.KINDS), metavar="KIND")
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="folder for offending files")
    chosen = parser.parse_args()
    tallies, bad = [], False
    for name, tally in fuzzing.run(chosen.kinds, chosen.count, chosen.seed, chosen.keep):
        tallies.append((name, tally))
        print(fuzzing.row(name, tally), flush=True)
        for violation in tally.violations:
            print(f"VIOLATION {violation}", flush=True)
        bad |= bool(tally.violations) or tally.worst > SECONDS or tally.peak_mb > MEGABYTES
    print("\n" + fuzzing.table(tallies))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
