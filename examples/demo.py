"""The main job on data that comes with scikit-learn: distil 1,437 private 8×8 digits at ε = 3 into 10 images per class.

Run by `make demo`. Everything lands in out/demo; running it again shows the same release without spending or training anything.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dpdistill import RunConfig, distil, verify
from dpdistill.bundle.release import read_bundle
from dpdistill.data import load_images
from dpdistill.errors import DpdistillError
from dpdistill.evaluation import Training, accuracy, evaluate, train_on_real

OUT = Path("out/demo")
PRIVATE = RunConfig(data="digits:train", out=str(OUT / "release"), ledger=str(OUT / "ledger.jsonl"), epsilon=3.0)
os.environ["DPDISTILL_HOME"] = str(OUT / "home")  # where it is noted from which records the release is
console = Console(highlight=False, soft_wrap=True)


def control() -> Path:
    """ε = 0: the same recipe behind the same door with no records in it, so the answer is noise and public data alone."""
    empty = OUT / "empty.npz"
    if not empty.exists():
        train = load_images("digits:train")
        partial = OUT / "partial.npz"  # renamed when whole, so that the demo can be stopped at any time
        np.savez(partial, images=train.images[:1] * 0, labels=train.labels[:1] * 0, classes=np.array(train.class_names))
        os.replace(partial, empty)
    return distil(RunConfig(data=str(empty), out=str(OUT / "control"), ledger=str(OUT / "control.jsonl"), epsilon=3.0))


def main() -> None:
    started = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    release = distil(PRIVATE)
    console.print(f"\n[bold]{verify(release).guarantee}[/bold]\n")
    results = OUT / "evaluation.json"
    if not results.exists():
        train, test = load_images("digits:train"), load_images("digits:test")
        training = Training(epochs=150, batch=64, width=64, depth=2, augment="crop_scale_rotate")
        real = train_on_real(train, replace(training, epochs=30), torch.Generator().manual_seed(0))
        rows = {
            "synthetic images (ε = 3)": evaluate(read_bundle(release), test, training)["mean"],
            "the real 1,437 images (not private)": accuracy(real, test.images, test.labels),
            "control: no private record (ε = 0)": evaluate(read_bundle(control()), test, training)["mean"],
        }
        partial = OUT / "partial.json"
        partial.write_text(json.dumps(rows, indent=2))
        os.replace(partial, results)
    table = Table("a classifier trained on", "accuracy on 360 test digits")
    for name, value in json.loads(results.read_text()).items():
        table.add_row(name, f"{100 * value:.1f} %")
    console.print(table)
    verdict = verify(release)
    console.print(f"verify: {'PASS' if verdict.ok else 'FAIL ' + '; '.join(verdict.problems)}")
    console.print(f"open {release / 'report.html'}   ({time.monotonic() - started:.0f} s)", markup=False)


if __name__ == "__main__":
    try:
        main()
    except DpdistillError as error:  # for one, a release that an older version left in out/demo
        sys.exit(f"demo: {error}; or begin anew with `make clean`")
