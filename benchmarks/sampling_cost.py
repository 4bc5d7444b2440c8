"""How much faster a diffusion student draws than its teachers: ratios within one run, one thread, in seconds of the processor.

  .venv/bin/python benchmarks/sampling_cost.py --shapes 1,8,8 1,28,28 3,32,32 --repeats 5 --page

Prints one JSON line for each shape and kind of teacher: medians over --repeats of the seconds for --count images, and of the ratios to a
student of the default width in 1, 2 and 4 steps, each with its range; a repeat times all of them in turn. Numbers in the networks are made
up: what they are does not change how long they take. Kinds of teacher, each as the method samples it:
  mixture        `dpsad` at ε = 1 on ordinary sets: a mixture in 64 coordinates, and the guide that chooses one of three samples
  fine mixture   `dpsad` at ε = 10 there: a mixture in 256 coordinates, without a guide
  corrected      `dpsad` with `share_denoiser` above 0: the first, its denoiser corrected by a network of DP-SGD
  from scratch   `dpdm`: a network alone
`--page` also writes the lines to docs/benchmarks/sampling_cost.json.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dpdistill.data import procedural_images, to_unit
from dpdistill.methods.base import Public
from dpdistill.methods.diffusion import dpdm, dpsad, private_denoiser
from dpdistill.methods.diffusion.distillation import Teacher
from dpdistill.methods.diffusion.student import samples
from dpdistill.methods.shared.mixture import DIMS, FINE_DIMS
from dpdistill.models import few_step
from dpdistill.models.linear import LinearTeacher
from dpdistill.models.mixture_denoiser import MixtureDenoiser
from dpdistill.sources import parse_shape
from dpdistill.workspace import FolderWorkspace

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "sampling_cost.json"
N_CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1,28,28"], help="C,H,W each")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--page", action="store_true", help=f"write the lines to {PAGE.name} too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for shape in args.shapes:
        for found in measure(shape, args.count, args.repeats):
            lines.append(json.dumps({"shape": shape, "count": args.count, "repeats": args.repeats, **found}))
            print(lines[-1], flush=True)
    if args.page:
        PAGE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def measure(shape: str, count: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yields, for each kind of teacher, seconds and ratios as [median, least, most]."""
    image_shape, g = parse_shape(shape), torch.Generator().manual_seed(0)
    made_up = torch.from_numpy(to_unit(procedural_images(1000, *image_shape, 0)))
    public = Public(image_shape=image_shape, class_names=tuple("0123456789"), auxiliary=made_up)
    config = dpsad.Config(expected_records=60_000)
    labels = torch.arange(N_CLASSES).repeat_interleave(-(-count // N_CLASSES))
    student = few_step.student(
        image_shape, N_CLASSES, width=config.token_width(image_shape), images=few_step.padded(made_up), generator=g
    )
    pipe = few_step.pipeline(student.eval())

    def draws(steps: int) -> Callable[[], object]:
        return lambda: few_step.draw(pipe, labels, steps, torch.Generator().manual_seed(0))

    by_student = {steps: draws(steps) for steps in few_step.STEPS}
    with tempfile.TemporaryDirectory() as scratch:
        workspace = FolderWorkspace(Path(scratch), quiet=True)
        for kind, teacher in teachers(public).items():

            def by_teacher(teacher: Teacher = teacher) -> object:
                with torch.no_grad():
                    return samples(teacher, public, config, workspace, count)

            seconds: dict[Any, list[float]] = {"teacher": [], **{steps: [] for steps in by_student}}
            for draw in (by_teacher, *by_student.values()):  # once before it counts
                draw()
            for _ in range(repeats):
                for name, draw in (("teacher", by_teacher), *by_student.items()):
                    begun = time.process_time()
                    draw()
                    seconds[name].append(time.process_time() - begun)
            ratios = {
                f"times_as_fast_in_{steps}": [a / b for a, b in zip(seconds["teacher"], seconds[steps], strict=True)]
                for steps in by_student
            }
            yield {"teacher": kind, "seconds": spread(seconds["teacher"], 3)} | {
                name: spread(values, 1) for name, values in ratios.items()
            }


def teachers(public: Public) -> dict[str, Teacher]:
    """Every kind of teacher that there is room for, with made-up numbers in it."""
    g, pixels = torch.Generator().manual_seed(0), math.prod(public.image_shape)

    def mixture(dims: int) -> MixtureDenoiser:
        d, j = min(dims, pixels), dpsad.Config(expected_records=1).components
        basis = torch.linalg.qr(torch.randn(pixels, d, generator=g))[0]
        means, weights = torch.randn(N_CLASSES, j, d, generator=g), torch.full((N_CLASSES, j), 1 / j)
        return MixtureDenoiser(torch.zeros(pixels), basis, means, weights, torch.eye(d).repeat(N_CLASSES, 1, 1))

    guide = LinearTeacher(public.image_shape, public.n_classes)
    guide.fit_public(public.auxiliary, g)
    coarse = mixture(DIMS)
    corrected = private_denoiser.network(dpsad.Config(expected_records=60_000), public, g, coarse)
    scratch = private_denoiser.network(dpdm.Config(expected_records=60_000), public, g)
    found = {"mixture": Teacher(denoise=coarse, guide=guide)}
    if pixels >= FINE_DIMS:
        found["fine mixture"] = Teacher(denoise=mixture(FINE_DIMS))
    return found | {
        "corrected": Teacher(denoise=corrected.eval(), guide=guide),
        "from scratch": Teacher(denoise=scratch.eval()),
    }


def spread(values: list[float], digits: int) -> list[float]:
    return [round(value, digits) for value in (statistics.median(values), min(values), max(values))]


if __name__ == "__main__":
    main()
