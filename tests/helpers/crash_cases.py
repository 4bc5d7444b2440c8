"""The commands that `crash_harness` breaks: every method at its smallest, and `toy`, the cheapest whole way from records to a release.

N records, C channels, H, W size, K classes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from crash_harness import Case, quick
from dpdistill import planning
from dpdistill.audit import run as attacks
from dpdistill.bundle.onnx_file import student_onnx
from dpdistill.bundle.release import add_audit
from dpdistill.config import DiffusionConfig, ModelConfig, RunConfig
from dpdistill.conversion import convert
from dpdistill.diffusion import diffuse
from dpdistill.methods import METHODS, Synthetic, joint
from dpdistill.methods.diffusion import dpsad
from dpdistill.methods.shared import linear
from dpdistill.methods.shared.embedding import EmbeddingConfig
from dpdistill.models.wavelet_net import WaveletNet
from dpdistill.pipeline import distil
from dpdistill.privacy import GaussianSum, NoisyVotes, Planned

NETWORK = {"patch": 4, "width": 8, "depth": 1, "heads": 2}
STUDENT = {
    "seed_images": 12,
    "sampling_steps": 2,
    "student_width": 8,
    "student_steps": 2,
    "student_batch": 4,
    "critic_width": 4,
    "pool": 8,
    "answer_steps": 2,
    "checkpoint_steps": 1,
}
DPSGD = {"steps": 2, "expected_batch": 7, "multiplicity": 2, **NETWORK, **STUDENT}
CONVERSION = {"steps": 2, "batch": 8, "width": 4, "groups": 4, "generator_width": 4, "latent": 4, "pool": 16}
CONVERSION |= {"checkpoint_steps": 1}
DATASET: dict[str, dict[str, Any]] = {
    "toy": {},
    "joint": {
        "steps": 7,
        "networks": 6,  # one of which is taught
        "lessons": 8,
        "pool": 12,
        "feature_dims": 6,
        "pixel_dims": 4,
        "components": 2,
        "width": 4,
    },
    "dosser": {
        "sampling_steps": 2,
        "optimisation_steps": 2,
        "sampling_prob": 0.5,
        "group_size": 4,
        "subspace_dim": 2,
        "auxiliary_images": 8,
        "width": 4,
        "checkpoint_steps": 1,
    },
    "ndpdc": {"steps": 2, "sampling_prob": 0.5, "group_size": 4, "width": 4, "checkpoint_steps": 1},
    "dpmerf": {"n_frequencies": 8, "steps": 2, "batch": 2, "latent": 2, "width": 2, "checkpoint_steps": 1},
}
MODEL: dict[str, dict[str, Any]] = {
    "teacher": {"settings": CONVERSION | {"teacher_dims": 4, "teacher_steps": 2}},
    "votes": {"shards": 3, "settings": CONVERSION | {"teacher_dims": 4, "queries": 6}},
    "votes-by-id": {"shards": 3, "id_column": "person", "settings": CONVERSION | {"teacher_dims": 4, "queries": 6}},
    "votes-of-owners": {"teachers": "owners", "settings": CONVERSION | {"teacher_dims": 4, "queries": 6}},
    "attested": {"teacher": "owners/0.onnx", "attested_epsilon": 1.0, "attested_delta": 1e-5, "settings": CONVERSION},
    "opaque": {"teacher": "owners/0.onnx", "accept_no_record_guarantee": True, "settings": CONVERSION},
}
DIFFUSION: dict[str, dict[str, Any]] = {
    "dpsad": {"settings": {**DPSGD, "warm_start": "mixture", "share_denoiser": 0.5, "pixel_dims": 4, "components": 2}},
    "dpsad-embedded": {
        "settings": {**STUDENT, "warm_start": "embedding", "embedding_batch": 2, "pixel_dims": 4, "components": 2}
    },
    "dpdm": {"settings": DPSGD},
    "shards": {
        "settings": {"models": 2, "teacher_steps": 1, "fit_steps": 1, "queries": 2, "rounds": 2, **NETWORK, **STUDENT}
    },
    "paper": {
        "settings": {"steps": 2, "batch": 4, "teacher_steps": 1, "teacher_batch": 4, **NETWORK, **STUDENT},
        "accept_no_record_guarantee": True,
    },
}
NAMES = (*DATASET, "audit", *MODEL, *DIFFUSION)
UNPROVED = ("opaque", "paper")


@dataclass(frozen=True, kw_only=True)
class _ToyConfig:
    per_class: int = 1


def _toy_plan(config: _ToyConfig, public: Any, noise_multiplier: float) -> list[Planned]:
    full = GaussianSum(name="full", dim=64, n_classes=2, noise_multiplier=2 * noise_multiplier, grid_bits=12)
    part = GaussianSum(name="part", dim=64, noise_multiplier=2 * noise_multiplier, grid_bits=12)
    return [Planned(full), Planned(part, 2)]


def _toy_run(config: _ToyConfig, public: Any, private: Any, plan: list[Planned], workspace: Any) -> Synthetic:
    """Noisy sums shown as images: one release, two that were reserved at once, and a checkpoint between them."""
    means = private.release(plan[0].query, flat)
    saved = workspace.load("toy")
    held = private.reserve(plan[1].query, 2)
    if saved is None:
        saved = {"first": private.release_reserved(held, 0, flat)}
        workspace.save("toy", saved)
    images = means + saved["first"] + private.release_reserved(held, 1, flat)
    return Synthetic(images=images.tanh().view(2, *public.image_shape), labels=torch.arange(2))


def flat(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


TOY = SimpleNamespace(Config=_ToyConfig, plan=_toy_plan, run=_toy_run)


def audit_blindly(release: Path) -> None:
    """`dpdistill audit` as far as the disk sees it: without the attacks, which write nothing."""
    query = NoisyVotes(name="votes", n_queries=1, n_classes=2, n_models=2, noise_multiplier=1.0)  # nothing to run from
    blind = SimpleNamespace(plan=SimpleNamespace(releases=[Planned(query)]))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(attacks, "kernels", return_value=()))
        stack.enter_context(mock.patch.object(attacks, "public_records"))
        stack.enter_context(mock.patch.object(attacks.Twin, "of", return_value=blind))
        add_audit(release, attacks.audit_release(release, quick=True, seed=0))


def make_inputs(folder: Path) -> None:
    """26 images [8, 8] of two classes, of people with two each; and models of three owners."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (26, 8, 8), dtype=np.uint8), np.arange(26) % 2
    facts = {"classes": np.array(["a", "b"]), "person": np.arange(26) // 2}
    np.savez(folder / "private.npz", images=images, labels=labels, **facts)
    (folder / "owners").mkdir()
    for owner in range(3):
        model = WaveletNet((1, 8, 8), 2, width=4, groups=4, generator=torch.Generator().manual_seed(owner))
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
        (folder / "owners" / f"{owner}.onnx").write_bytes(student_onnx(weights, model.config))


def case(name: str, inputs: Path) -> Case:
    """The command of this name on the inputs in this folder."""
    data = str(inputs / "private.npz")

    def start(place: Path) -> object:
        common: dict[str, Any] = {"out": str(place / "out"), "per_class": 1}
        if name == "audit":
            return audit_blindly(distil(RunConfig(**common, data=data, method="toy"), quiet=True))
        if name in DATASET:
            common["auxiliary"] = "digits:test" if name == "joint" else "none"
            return distil(RunConfig(**common, data=data, method=name, settings=DATASET[name]), quiet=True)
        if name in MODEL:
            given = {key: str(inputs / MODEL[name][key]) for key in ("teacher", "teachers") if key in MODEL[name]}
            return convert(
                ModelConfig(**{**common, **({} if given else {"data": data}), **MODEL[name], **given}), quiet=True
            )
        facts = {"data": data, "epsilon": 2.0, "expected_records": 26, "method": name.partition("-")[0]}
        return diffuse(DiffusionConfig(**common, **facts, **DIFFUSION[name]), quiet=True)

    return Case(name, start, name not in UNPROVED, inputs, repeats=name != "paper")


@contextmanager
def cases(folder: Path) -> Iterator[Callable[[str], Case]]:
    """cases(folder) as make: make(name) -> the command of this name, its inputs in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    make_inputs(folder)
    with ExitStack() as stack:
        stack.enter_context(quick())
        stack.enter_context(mock.patch.dict(METHODS, {"toy": TOY}))
        stack.enter_context(mock.patch.object(planning, "N_PROCEDURAL", 40))
        stack.enter_context(mock.patch.object(joint, "match", partial(joint.match, save_every=2)))
        stack.enter_context(mock.patch.object(dpsad, "GUIDE", linear.Training(teacher_steps=2, teacher_dims=4)))
        small = EmbeddingConfig(n_frequencies=8, steps=4, at_once=3, latent=2, width=2, bf16=True, checkpoint_steps=2)
        stack.enter_context(mock.patch.object(dpsad, "EMBEDDING", small))
        stack.enter_context(mock.patch.object(dpsad, "N_GENERATED", 12))
        yield lambda name: case(name, folder)
