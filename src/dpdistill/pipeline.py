"""From a configuration to a release folder: the one way through the house.

check the input → calibrate (no data) → open the ledger → run the method behind the door → write the bundle → forget the key.
Everything that can be wrong is found before a record is read by a method and before anything is charged.
"""

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import RunConfig, build, config_hash, public_toml
from .data import LabelledImages, load_images, procedural_images, to_unit
from .errors import ConfigError, LedgerError, ReleaseError
from .mechanisms import PrivateData, Vault
from .mechanisms.vault import write_atomically
from .methods import METHODS, Method, Public
from .privacy import Ledger, Planned, accounting, calibrate
from .privacy import ledger as ledgers
from .privacy.faults import point
from .release import BundleFacts, write_bundle
from .workspace import FolderWorkspace

N_PROCEDURAL = 4000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be asked of the door, before it opens.

    Attributes:
      epsilon, epsilon_replace_one: of the calibrated releases.
      toml: the public configuration.
    """

    method: Method
    settings: Any
    public: Public
    releases: list[Planned]
    noise_multiplier: float
    epsilon: float
    epsilon_replace_one: float
    toml: str


def public_facts(config: RunConfig, image_shape: tuple[int, int, int], class_names: tuple[str, ...]) -> Public:
    """Loads or makes the auxiliary set, fitted to the private images' public shape."""
    channels, height, width = image_shape
    made_up = torch.from_numpy(to_unit(procedural_images(N_PROCEDURAL, channels, height, width, config.seed)))
    if config.auxiliary == "none":
        return Public(image_shape=image_shape, class_names=class_names, auxiliary=made_up)
    resize = height if height == width else None
    auxiliary = load_images(config.auxiliary, resize=resize)
    if auxiliary.images.shape[1:] != image_shape:
        raise ConfigError(
            f"the auxiliary images are {auxiliary.images.shape[1:]} and the private ones {image_shape} (channels, height, width)"
        )
    unit = auxiliary.to_unit()
    unit = np.where(np.isfinite(unit), unit, 0).astype(np.float32)
    return Public(
        image_shape=image_shape,
        class_names=class_names,
        auxiliary=torch.from_numpy(unit),
        auxiliary_labels=torch.from_numpy(auxiliary.labels),
        procedural=made_up,
    )


def make_plan(config: RunConfig, image_shape: tuple[int, int, int], class_names: tuple[str, ...]) -> Plan:
    """Calibrates the method to the asked (ε, δ): from public facts only."""
    if config.method not in METHODS:
        raise ConfigError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    method = METHODS[config.method]
    settings = build(method.Config, {"per_class": config.per_class, **config.settings}, "settings.")
    public = public_facts(config, image_shape, class_names)
    sigma = calibrate(lambda value: method.plan(settings, public, value), config.epsilon, config.delta)
    releases = method.plan(settings, public, sigma)
    parts = [planned.part for planned in releases]
    return Plan(
        method=method,
        settings=settings,
        public=public,
        releases=releases,
        noise_multiplier=sigma,
        epsilon=accounting.epsilon(parts, config.delta),
        epsilon_replace_one=accounting.epsilon(parts, config.delta, "replace_one"),
        toml=public_toml(config, settings, sigma),
    )


def home() -> Path:
    """Where ledgers live when no other place is given."""
    return Path(os.environ.get("DPDISTILL_HOME", "~/.dpdistill")).expanduser()


def default_ledger(records: LabelledImages) -> Path:
    """The ledger of these very records, wherever their file lies: named by a keyed hash, so that the name tells nothing about them."""
    folder = home()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key_file = folder / "key"
    if not key_file.exists():
        write_atomically(key_file, secrets.token_bytes(32))
    digest = hmac.new(key_file.read_bytes(), digestmod=hashlib.sha256)
    digest.update(repr((records.images.shape, str(records.images.dtype))).encode())
    digest.update(np.ascontiguousarray(records.images).data)
    digest.update(np.ascontiguousarray(records.labels).data)
    return folder / "ledgers" / f"{digest.hexdigest()[:32]}.jsonl"


def load_private(config: RunConfig) -> LabelledImages:
    return load_images(config.data, n_classes=config.classes, resize=config.resize)


def distil(config: RunConfig, *, quiet: bool = False, insecure_seed: int | None = None) -> Path:
    """Distils a data set into a release folder, or goes on where the same command was stopped.

    Args:
      config: what the person decided.
      quiet: shows no progress.
      insecure_seed: for tests only: reproducible noise; the release then says NOT PRIVATE and does not verify.

    Returns:
      The release folder.

    Raises:
      DpdistillError: one line that says the way out. Nothing was charged, unless the ledger says so.
    """
    out, state = Path(config.out), Path(config.out + ".state")
    records = load_private(config)
    plan = make_plan(config, records.images.shape[1:], records.class_names)
    if out.exists():
        return _already_there(out, state, plan)
    _same_run(state, plan, records)
    vault = Vault.open(state / "vault", insecure_seed=insecure_seed)
    workspace = FolderWorkspace(state / "work", seed=config.seed, device=config.device, quiet=quiet)
    ledger_path = Path(config.ledger) if config.ledger else default_ledger(records)
    with Ledger.open(ledger_path, cap=(config.budget or config.epsilon, config.delta)) as ledger:
        if config.budget is not None:
            ledger.raise_cap((config.budget, ledger.cap[1]))
        done = ledgers.parts(ledger.lines, vault.run)
        if not done:
            ledger.check_affordable([planned.part for planned in plan.releases])
        ledger.start(vault.run, config.method, config_hash(plan.toml))
        private = PrivateData(records, ledger, vault, device=config.device)
        synthetic = plan.method.run(plan.settings, plan.public, private, plan.releases, workspace)
        planned = [(p.query.describe(), p.count) for p in plan.releases]
        charged = [(line["query"], line["count"]) for line in ledger.intents(vault.run) if not line["again"]]
        if planned != charged:
            raise LedgerError(
                "the method asked for other releases than it planned; this is a bug, and nothing was written"
            )
        ledger.finish(vault.run)
        facts = BundleFacts(
            method=config.method,
            run=vault.run,
            delta=config.delta,
            class_names=records.class_names,
            image_shape=private.image_shape,
            per_class=config.per_class,
            config_toml=plan.toml,
            ledger_raw=ledger_path.read_bytes(),
            checks=private.checks,
            auxiliary="procedural"
            if config.auxiliary == "none"
            else f"{Path(config.auxiliary).name}, public by the user's word",
            insecure=vault.insecure,
            seed=config.seed,
        )
        write_bundle(out, synthetic, facts)
    _forget(state, vault)
    return out


def _same_run(state: Path, plan: Plan, records: LabelledImages) -> None:
    """Refuses to go on in a state folder that another configuration began."""
    path, mine = state / "run.json", {"config": config_hash(plan.toml)}
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except ValueError:
            theirs = None
        if theirs != mine:
            raise ConfigError(
                f"{state} belongs to a run with other settings; finish that one, choose another --out, or remove the folder"
            )
    else:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, json.dumps(mine).encode())


def _already_there(out: Path, state: Path, plan: Plan) -> Path:
    """A finished release with the same configuration is the answer; anything else is in the way."""
    try:
        same = (out / "config.toml").read_text() == plan.toml
    except (OSError, UnicodeDecodeError):
        same = False
    if not same:
        raise ReleaseError(f"{out} exists and holds something else; choose another --out or remove it")
    if state.exists():
        _forget(state, Vault.open(state / "vault"))
    return out


def _forget(state: Path, vault: Vault) -> None:
    """Destroys the noise key, then everything else that the run kept beside the release."""
    point("pipeline: before the key is erased")
    vault.erase()
    for path in sorted(state.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    state.rmdir()
    point("pipeline: state removed")
