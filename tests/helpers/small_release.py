"""Tiny releases to check and to break: two classes of 8×8 images, one ledger of three charges, nothing private."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpdistill.bundle import reading
from dpdistill.bundle.diffusion_product import DiffusionProduct
from dpdistill.bundle.product import ModelProduct
from dpdistill.bundle.release import BundleFacts, write_bundle
from dpdistill.methods.base import Synthetic
from dpdistill.models import few_step
from dpdistill.models.wavelet_net import WaveletNet
from dpdistill.privacy import GaussianSum, Ledger
from dpdistill.privacy import ledger as ledgers

RUN = "run-0123456789abcdef"
NAMES = ("cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lion")
TOML = 'method = "joint"\nepsilon = 3.0\n'


def synthetic(
    classes: int = 2,
    per_class: int = 2,
    shape: tuple[int, int, int] = (1, 8, 8),
    parts: int = 1,
    soft: bool = False,
    gain: int = 1,
) -> Synthetic:
    """Made-up images in [-1, 1], class by class."""
    generator = torch.Generator().manual_seed(0)
    m = classes * per_class
    soft_labels = torch.softmax(torch.rand(m * parts**2, classes, generator=generator), dim=1) if soft else None
    images = torch.rand(m, *shape, generator=generator) * 2 - 1
    labels = torch.arange(classes).repeat_interleave(per_class)
    return Synthetic(images=images, labels=labels, soft_labels=soft_labels, parts=parts, gain=gain)


def facts(folder: Path, made: Synthetic, names: tuple[str, ...] = (), run: str = RUN, **changes: Any) -> BundleFacts:
    """The facts of a run with three charges, and its ledger in `folder`."""
    names = names or NAMES[: int(made.labels.max()) + 1]
    folder.mkdir(parents=True, exist_ok=True)
    with Ledger.open(folder / "ledger.jsonl", cap=(3, 1e-5), data="toy") as ledger:
        ledger.start("run-before", "ndpdc", "0" * 64)
        ledger.reserve("run-before", GaussianSum(name="sampled", dim=16, noise_multiplier=4.0, sampling_prob=0.1), 5)
        ledger.start(run, "joint", hashlib.sha256(TOML.encode()).hexdigest())
        ledger.reserve(run, GaussianSum(name="class sums", dim=64, n_classes=len(names), noise_multiplier=3.0))
        ledger.reserve(run, GaussianSum(name="class counts", dim=1, n_classes=len(names), noise_multiplier=20.0))
        ledger.finish(run)
    plain = BundleFacts(
        method="joint",
        run=run,
        delta=1e-5,
        class_names=names,
        image_shape=tuple(made.images.shape[1:]),
        per_class=int((made.labels == 0).sum()),
        config_toml=TOML,
        ledger_raw=(folder / "ledger.jsonl").read_bytes(),
        checks={"class sums": 1.2e-7, "class counts": 0.0},
        auxiliary="procedural",
        insecure=run.startswith("insecure-"),
        seed=7,
    )
    return BundleFacts(**{**vars(plain), **changes})


class Kit:
    """What tests do with releases."""

    synthetic = staticmethod(synthetic)
    facts = staticmethod(facts)

    @staticmethod
    def seal(folder: Path) -> None:
        """Makes the hashes hold again, as anyone can."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        (folder / "SHA256SUMS").write_bytes(reading.checksums(files))

    @staticmethod
    def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
        """Changes the certificate and seals."""
        path = folder / "certificate.json"
        certificate = json.loads(path.read_text())
        change(certificate)
        path.write_text(json.dumps(certificate, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        Kit.seal(folder)

    @staticmethod
    def chain(bodies: list[dict[str, Any]]) -> bytes:
        """A ledger of these lines whose hashes hold, as anyone can write."""
        previous, raw = "0" * 64, b""
        for body in bodies:
            body = {key: value for key, value in body.items() if key != "hash"}
            previous = ledgers.line_hash(previous, body)
            raw += ledgers.canonical({**body, "hash": previous}) + b"\n"
        return raw


def write(folder: Path, kind: str = "dataset", **changes: Any) -> Path:
    """A good release of a kind, `folder`/out: a data set, or beside it a student with its generator, or a diffusion model."""
    made = synthetic(soft=kind == "dataset")
    return write_bundle(folder / "out", made, facts(folder, made, **changes), _product(kind))


def _product(kind: str) -> Any:
    generator, names = torch.Generator().manual_seed(0), NAMES[:2]
    if kind == "model":
        student = WaveletNet((1, 8, 8), 2, width=4, groups=2, generator=generator)
        arrays = {name: value.numpy() for name, value in student.state_dict().items()}
        settings = {"architecture": "none", "latent": 2}
        return ModelProduct(
            student=arrays, config=student.config, generator={"w": np.ones((2, 3), np.float32)},
            generator_config=settings, class_names=names,
        )  # fmt: skip
    if kind == "diffusion":
        images = torch.rand(20, 1, 8, 8, generator=generator) * 2 - 1
        network = few_step.student((1, 8, 8), 2, width=8, images=images, generator=generator).eval()
        return DiffusionProduct.of(few_step.pipeline(network), names)
    return None
