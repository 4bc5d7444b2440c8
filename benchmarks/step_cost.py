"""What a private step of the diffusion teacher costs, part by part, beside a plain one: ratios within one run, one thread.

  .venv/bin/python benchmarks/step_cost.py --shapes 1,8,8 1,16,16 1,28,28 3,32,32 --batch 256 --multiplicity 4

Prints one JSON line for each shape: medians over --repeats, and their range, of the seconds of a plain batched backward of the same network
on as many draws (batch · multiplicity), and of a private step's parts: per-record gradients, clipping and summing, exact noise, the
record-wise check, what the vault brings to disk (a commitment to the sum, then the noisy sum), and the ledger's line, of which a run has
one for all its steps. What goes to disk (that of $TMPDIR) is timed by the clock, the rest in seconds of the processor: on a machine with
other work the share of noise, vault and ledger comes out too large, not too small. `--page` also writes the lines to
docs/benchmarks/step_cost.json.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpdistill.mechanisms import Vault
from dpdistill.mechanisms.clipping import clip_to_grid
from dpdistill.mechanisms.noise import Stream, rounded_gaussian
from dpdistill.mechanisms.recordwise import check_recordwise
from dpdistill.methods.base import Public
from dpdistill.methods.diffusion import private_denoiser
from dpdistill.models import edm
from dpdistill.privacy import Ledger
from dpdistill.sources import parse_shape

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "step_cost.json"
DISK = ("vault", "ledger_line")
STEP = ("per_record_gradients", "clip_and_sum", "noise", "check", "vault")  # what each private step does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1,28,28"], help="C,H,W each")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--multiplicity", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--page", action="store_true", help=f"write the lines to {PAGE.name} too")
    args = vars(parser.parse_args())
    page, shapes = args.pop("page"), args.pop("shapes")
    torch.set_num_threads(1)
    lines = []
    for shape in shapes:
        lines.append(json.dumps({"shape": shape, **args, **measure(shape, **args)}))
        print(lines[-1], flush=True)
    if page:
        PAGE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def measure(shape: str, batch: int, multiplicity: int, repeats: int) -> dict[str, Any]:
    """Returns seconds by part as [median, least, most], and the ratios of medians."""
    image_shape, g = parse_shape(shape), torch.Generator().manual_seed(0)
    public = Public(image_shape=image_shape, class_names=tuple("0123456789"), auxiliary=torch.empty(0, *image_shape))
    config = private_denoiser.DenoiserConfig(expected_records=60_000, expected_batch=batch, multiplicity=multiplicity)
    model = private_denoiser.network(config, public, g)
    query = private_denoiser.planned(config, public, 1.0).query
    x, y = torch.rand(batch, *image_shape, generator=g) * 2 - 1, torch.arange(batch) % 10
    fn = private_denoiser.record_gradient(model, config, g)
    clean, many = x.repeat(multiplicity, 1, 1, 1), y.repeat(multiplicity)
    noise, sigma = torch.randn(clean.shape, generator=g), torch.rand(len(clean), generator=g) + 0.1
    rows = fn(x, y)
    total = clip_to_grid(rows, 1.0, query.grid_bits).sum(dim=0, keepdim=True).numpy()
    releases = itertools.count()

    def plain() -> None:
        value = edm.loss(model, clean, noise, sigma, many, model.sigma_data).mean()
        torch.autograd.grad(value, list(model.parameters()))

    with (
        tempfile.TemporaryDirectory() as scratch,
        Ledger.open(Path(scratch) / "ledger.jsonl", cap=(1e9, 1e-5)) as ledger,
    ):
        ledger.start("run", "bench", "0" * 64)
        vault = Vault.open(Path(scratch) / "vault")

        def keep() -> None:
            name = f"release-{next(releases)}"
            vault.binds(name, total)
            vault.save(name, total)

        parts: dict[str, Callable[[], object]] = {
            "plain_backward": plain,
            "per_record_gradients": lambda: fn(x, y),
            "clip_and_sum": lambda: clip_to_grid(rows, 1.0, query.grid_bits).sum(dim=0),
            "noise": lambda: rounded_gaussian(query.dim, query.sigma_steps, Stream(b"0" * 32)),
            "check": lambda: check_recordwise(fn, image_shape, 10, query.dim, 1.0),
            "vault": keep,
            "ledger_line": lambda: ledger.reserve("run", query, 1),
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(repeats):
            for name, part in parts.items():
                clock = time.perf_counter if name in DISK else time.process_time
                begun = clock()
                part()
                seconds[name].append(clock() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    private = sum(medians[name] for name in STEP) + medians["ledger_line"] / config.steps
    kept = medians["noise"] + medians["vault"] + medians["ledger_line"] / config.steps
    return {
        "parameters": query.dim,
        **{name: [round(v, 4) for v in (medians[name], min(values), max(values))] for name, values in seconds.items()},
        "gradients_over_plain": round(medians["per_record_gradients"] / medians["plain_backward"], 2),
        "step_over_plain": round(private / medians["plain_backward"], 2),
        "noise_vault_and_ledger_share": round(kept / private, 4),
    }


if __name__ == "__main__":
    main()
