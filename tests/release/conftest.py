"""A tiny release to check and to break: two classes of 8×8 images, one ledger of three charges, nothing private."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpdistill.bundle import verification as verifier
from dpdistill.bundle.release import BundleFacts, write_bundle
from dpdistill.methods.base import Synthetic
from dpdistill.privacy import GaussianSum, Ledger
from dpdistill.privacy import ledger as ledgers

RUN = "run-0123456789abcdef"
NAMES = ("cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lion")
TOML = 'method = "joint"\nepsilon = 3.0\n'


def synthetic(
    classes: int = 2, per_class: int = 2, shape: tuple[int, int, int] = (1, 8, 8), parts: int = 1, soft: bool = False
) -> Synthetic:
    """Made-up images in [-1, 1], class by class."""
    generator = torch.Generator().manual_seed(0)
    m = classes * per_class
    soft_labels = torch.softmax(torch.rand(m * parts**2, classes, generator=generator), dim=1) if soft else None
    images = torch.rand(m, *shape, generator=generator) * 2 - 1
    return Synthetic(
        images=images, labels=torch.arange(classes).repeat_interleave(per_class), soft_labels=soft_labels, parts=parts
    )


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
        files = {name: (folder / name).read_bytes() for name in verifier.SIZES if (folder / name).exists()}
        (folder / "SHA256SUMS").write_bytes(verifier.checksums(files))

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


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good release; read it only."""
    folder = tmp_path_factory.mktemp("pristine")
    made = synthetic()
    return write_bundle(folder / "out", made, facts(folder, made))


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A good release of one's own, to break."""
    return Path(shutil.copytree(pristine, tmp_path / "release"))
