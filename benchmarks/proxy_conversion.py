"""Converts a teacher trained on public stand-ins for private data, and says what is lost: no setting is tried on private data.

  .venv/bin/python benchmarks/proxy_conversion.py --data DIR --proxy letters --set steps=500
  .venv/bin/python benchmarks/proxy_conversion.py --data DIR --proxy objects --teacher convnet --differentiable
  .venv/bin/python benchmarks/proxy_conversion.py --data DIR --proxy letters-five --teacher private --epsilon 10 --set steps=1000

Proxies as in proxy.py and proxy_teacher.py; the teacher sees their training images, the student sees none. Teachers: `linear`, softmax
regression on 500 public principal components of scattering features, with normal noise of `--noise` times the weights' spread; `convnet`,
without noise; `private`, the method whole, its mixture too, through the door, noise as large against the proxy's records as it would be
against --records of them. Prints one JSON line: settings, accuracies on the proxy's test images, agreement, core seconds of the conversion.
DIR: see common.py.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from proxy_teacher import PROXIES
from torch import Tensor

from dpdistill.config_files import build
from dpdistill.data import LabelledImages, procedural_images, to_unit
from dpdistill.evaluation import Training, train_classifier
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods.base import Public, Synthetic
from dpdistill.methods.model import teacher as private_teacher
from dpdistill.methods.model.conversion import Conversion, convert
from dpdistill.methods.shared import linear as linear_teacher
from dpdistill.models.scattering import Scattering
from dpdistill.privacy import Ledger, gaussian_multiplier
from dpdistill.workspace import FolderWorkspace


@torch.no_grad()
def linear(x: Tensor, y: Tensor, noise: float, seed: int, dims: int = 500) -> Callable[[Tensor], Tensor]:
    """Softmax regression on unit vectors of public principal components, by 60 steps of gradient descent."""
    shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    g, scattering = torch.Generator().manual_seed(seed), Scattering(shape)

    def raw(images: Tensor) -> Tensor:
        return torch.cat([scattering(batch) for batch in images.split(250)])

    public = raw(torch.from_numpy(to_unit(procedural_images(2000, *shape, seed + 5))))
    mean, spread = public.mean(dim=0), public.std(dim=0) + 1e-3
    torch.manual_seed(seed)  # pca_lowrank has no generator
    axes = torch.pca_lowrank((public - mean) / spread, dims, center=False)[2]

    def features(images: Tensor) -> Tensor:
        return F.normalize((raw(images) - mean) / spread @ axes)

    rows = torch.randperm(len(x), generator=g)[:8000]
    f, t = features(x[rows]), F.one_hot(y[rows], 10).float()
    weights, velocity = torch.zeros(dims, 10), torch.zeros(dims, 10)
    for _ in range(60):
        velocity = 0.9 * velocity - f.T @ ((f @ weights).softmax(dim=1) - t) / len(f)
        weights += 10 * velocity
    weights += noise * weights.std() * torch.randn(weights.shape, generator=g)
    return lambda images: F.normalize((scattering(images) - mean) / spread @ axes) @ weights


def convnet(x: Tensor, y: Tensor, flip: bool, seed: int) -> Callable[[Tensor], Tensor]:
    """The evaluation's classifier, trained on the real images."""
    training = Training(
        epochs=5, batch=128, width=48, bf16=True, augment="crop_scale_rotate" + ("_flip_color" if flip else "")
    )
    model = train_classifier(Synthetic(images=x, labels=y), 10, training, torch.Generator().manual_seed(seed))
    return model.requires_grad_(False)


def private(
    x: Tensor, y: Tensor, public: Public, config: private_teacher.Config, sigma: float, seed: int
) -> tuple[Callable[[Tensor], Tensor], Public]:
    """The default way's teacher, and the public facts with images of its mixture."""
    records = LabelledImages(
        images=x.numpy(), labels=y.numpy(), class_names=public.class_names, value_range=(-1, 1), source="proxy"
    )
    plan = private_teacher.plan(config, public, sigma)
    with tempfile.TemporaryDirectory() as scratch, Ledger.open(Path(scratch) / "ledger", cap=(1e12, 1e-5)) as ledger:
        handle = PrivateData(records, ledger, Vault.open(Path(scratch) / "vault"))
        workspace = FolderWorkspace(Path(scratch) / "work", seed=seed, quiet=True)
        made = linear_teacher.train(config, public, handle, plan[:2], workspace)
        if not config.share_prior:
            return made, public
        return made, private_teacher.with_mixture(config, public, handle, plan[2:], workspace)


@torch.no_grad()
def logits(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in x.split(250)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--proxy", choices=tuple(PROXIES), required=True)
    parser.add_argument("--teacher", choices=("linear", "convnet", "private"), default="linear")
    parser.add_argument("--noise", type=float, default=0.0, help="of the linear teacher's weights")
    parser.add_argument("--epsilon", type=float, default=10.0, help="of the private teacher")
    parser.add_argument("--records", type=int, default=60_000, help="that its noise is as large against")
    parser.add_argument("--differentiable", action="store_true", help="the generator may use the teacher's gradient")
    parser.add_argument("--set", action="append", default=[], help="name=value for Conversion")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = dict(item.split("=") for item in args.set)
    config = build(private_teacher.Config, given) if args.teacher == "private" else build(Conversion, given)
    x, y, xt, yt, *_ = PROXIES[args.proxy](args.data)
    shape, names = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3])), tuple(str(k) for k in range(10))
    made_up = torch.from_numpy(to_unit(procedural_images(4000, *shape, args.seed)))
    public = Public(image_shape=shape, class_names=names, auxiliary=made_up)
    teacher: Callable[[Tensor], Tensor]
    if isinstance(config, private_teacher.Config):
        sigma = gaussian_multiplier(args.epsilon, 1e-5) * len(x) / args.records
        teacher, public = private(x, y, public, config, sigma, args.seed)
    elif args.teacher == "linear":
        teacher = linear(x, y, args.noise, args.seed)
    else:
        teacher = convnet(x, y, shape[0] == 3, args.seed)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = FolderWorkspace(Path(scratch), seed=args.seed)
        student = convert(teacher, public, config, workspace, differentiable=args.differentiable).student
    seconds = time.process_time() - started
    wanted, got = logits(teacher, xt).argmax(dim=1), logits(student, xt).argmax(dim=1)
    figures = {
        "teacher_accuracy": float((wanted == yt).float().mean()),
        "student_accuracy": float((got == yt).float().mean()),
        "agreement": float((wanted == got).float().mean()),
    }
    figures = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({**vars(args), "data": "", **figures, "core_seconds": round(seconds)}))


if __name__ == "__main__":
    main()
