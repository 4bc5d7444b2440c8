"""A diffusion model from private images: through the door, or the paper's own way, which no guarantee covers."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .bundle import BundleFacts
from .bundle.claims import NominalDiffusion
from .config import DiffusionConfig
from .config_files import build, public_toml
from .data import LabelledImages
from .errors import InputError, ReleaseError
from .home import Contents, contents_of
from .mechanisms import Vault
from .methods import DIFFUSION_METHODS, Public
from .models.denoiser import check_patch
from .pipeline import check_alone, check_device, distil, resumable, write_result
from .planning import auxiliary_hash, auxiliary_of, check_size, public_facts
from .sources import check_apart, load_private
from .state import begin, check_same_run, check_target, forget, forget_rest, holds, locked
from .workspace import FolderWorkspace


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run of the paper's own form, before anything is made of it.

    Attributes:
      records: PRIVATE, and read without a door.
      settings: the method's `Config`.
      sigma: the paper's σ.
      public: what the method may know.
      toml: the public configuration.
      claim: what the release will say instead of a guarantee.
    """

    records: LabelledImages
    settings: Any
    sigma: float
    public: Public
    toml: str
    claim: NominalDiffusion


@resumable
def diffuse(config: DiffusionConfig, *, quiet: bool = False, insecure_seed: int | None = None) -> Path:
    """Makes a diffusion release, or goes on where the same command was stopped.

    Args:
      config: what the person decided.
      quiet: shows no progress.
      insecure_seed: for tests only: reproducible noise; the release then says NOT PRIVATE and does not verify.

    Returns:
      The release folder.

    Raises:
      DpdistillError: one line that says the way out. Nothing was charged, unless the ledger says so.
    """
    if not config.accept_no_record_guarantee:
        return distil(config, quiet=quiet, insecure_seed=insecure_seed)
    return _paper(config, quiet, insecure_seed)


def prepare(config: DiffusionConfig) -> Prepared:
    """Reads the records for the paper's own form and finds all that can be wrong, as `--dry-run` does. Nothing is charged or written.

    Raises:
      ConfigError, InputError, ReleaseError: one line that says the way out.
    """
    check_alone("the paper's own form")
    check_device(config.device)
    check_apart(config)
    records = load_private(config)
    method: Any = DIFFUSION_METHODS["paper"]
    given = {"per_class": config.per_class, "expected_records": config.expected_records}
    settings = build(method.Config, {**given, **config.settings}, "settings.")
    check_patch(settings.patch, records.image_shape)
    check_size(config, settings, records.image_shape, records.class_names)
    sigma = settings.sigma(config.epsilon, config.delta)
    claim = NominalDiffusion(
        steps=settings.steps,
        batch=settings.batch,
        rate=settings.rate,
        dilution=settings.dilution,
        sigma=sigma,
        delta=config.delta,
    )
    public = public_facts(config, records.image_shape, records.class_names)
    toml = public_toml(config, settings, sigma, auxiliary_hash(public))
    if not len(_readable(records)[0]):  # this form hides no record, so it may say so
        raise InputError(config.data, "has no image of finite pixels and a known class", "give one that has")
    _check_place(Path(config.out), toml, partial(contents_of, records))
    return Prepared(records=records, settings=settings, sigma=sigma, public=public, toml=toml, claim=claim)


def _paper(config: DiffusionConfig, quiet: bool, insecure_seed: int | None) -> Path:
    """The paper's own form: the records are read without a door, nothing is charged, and the release says that it promises nothing."""
    ready = prepare(config)
    records, toml, public = ready.records, ready.toml, ready.public
    contents = partial(contents_of, records)
    out, state = Path(config.out), Path(f"{Path(config.out)}.state")
    if os.path.lexists(out):  # a crash left it beside its own run's state: it is done but for forgetting that
        forget_rest(state, toml, contents)
        return out
    begin(state, toml, contents)
    with locked(state):
        vault = Vault.open(state / "vault", insecure_seed=insecure_seed)
        workspace = FolderWorkspace(state / "work" / vault.run, seed=config.seed, device=config.device, quiet=quiet)
        images, labels = _readable(records)
        made = DIFFUSION_METHODS["paper"].release(ready.settings, public, images, labels, ready.sigma, vault, workspace)
        facts = BundleFacts(
            method=config.method,
            run=vault.run,
            delta=config.delta,
            class_names=records.class_names,
            image_shape=records.image_shape,
            per_class=config.per_class,
            config_toml=toml,
            ledger_raw=b"",
            checks={},
            auxiliary=auxiliary_of(config),
            insecure=vault.insecure,
            seed=config.seed,
            claim=ready.claim,
        )
        write_result(out, made, facts)
        forget(state, vault)
    return out


def _check_place(out: Path, toml: str, contents: Contents) -> None:
    """Refuses a place that is taken. A release is in the way unless it lies beside its own run's state: it does not say from which records
    it is."""
    state = Path(f"{out}.state")
    if os.path.lexists(out):
        if not state.exists() or not holds(out / "config.toml", toml):
            raise ReleaseError(f"{out} exists; choose another --out or remove it")
        return
    check_target(out)
    check_same_run(state, toml, contents)


def _readable(records: LabelledImages) -> tuple[torch.Tensor, torch.Tensor]:
    """The records that are images of a known class, as tensors."""
    unit = records.to_unit()
    good = np.isfinite(unit).all(axis=(1, 2, 3)) & (records.labels >= 0) & (records.labels < records.n_classes)
    return torch.from_numpy(unit[good].astype(np.float32)), torch.from_numpy(records.labels[good])
