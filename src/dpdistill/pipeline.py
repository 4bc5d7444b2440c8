"""From a configuration to a release folder: the one way through the house.

check the input → calibrate (no data) → open the ledger → run the method behind the door → write the bundle → forget the key.
Everything that can be wrong is found before a record is read by a method and before anything is charged.
"""

import dataclasses
import functools
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import torch

from .bundle import BundleFacts, product_of, product_of_sampler, room, write_bundle
from .bundle.diffusion_product import HEADS, MAX_WIDTH, WEIGHTS
from .bundle.diffusion_product import shapes as sampler_shapes
from .bundle.ledger_check import check_foreseen, too_large
from .bundle.onnx_file import student_shapes
from .bundle.release import restore
from .bundle.verification import run_of
from .config import DiffusionConfig, ModelConfig, RunConfig, build, check_device_name, config_hash, public_toml
from .data import LabelledImages, Limits, load_images, procedural_images, public_range, to_unit
from .errors import ConfigError, InputError, LedgerError, ReleaseError, StorageError
from .files import MAX_TOML, read_small
from .mechanisms import Door, Vault, joined
from .methods import DIFFUSION_METHODS, METHODS, MODEL_METHODS, Method, Public, Sampler, Student, Synthetic
from .methods.shared.diverged import mended
from .models import few_step
from .models.student_generator import StudentGenerator
from .privacy import Ledger, Planned, accounting, calibrate
from .privacy import ledger as ledgers
from .privacy.disk import sync_directory, write_atomically
from .privacy.faults import point
from .privacy.guarantee import shown
from .sources import Contents, Source, check_home, home, keyed_hash, open_source, releases, scratch_of
from .workspace import FolderWorkspace

N_PROCEDURAL = 4000
NEW_RUN = "run-xxxxxxxxxxxxxxxx"  # stands for the name of a run that has none yet: those that have are in hex
P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be asked of the door, before it opens.

    Attributes:
      epsilon, epsilon_replace_one: of the calibrated releases.
      toml: the public configuration.
      advice: what to expect, a line each.
    """

    method: Method
    settings: Any
    public: Public
    releases: list[Planned]
    noise_multiplier: float
    epsilon: float
    epsilon_replace_one: float
    toml: str
    advice: tuple[str, ...] = ()


def public_facts(config: RunConfig, image_shape: tuple[int, int, int], class_names: tuple[str, ...]) -> Public:
    """Loads or makes the auxiliary set, fitted to the private images' public shape."""
    channels, height, width = image_shape
    made_up = torch.from_numpy(to_unit(procedural_images(N_PROCEDURAL, channels, height, width, config.seed)))
    if config.auxiliary == "none":
        return Public(image_shape=image_shape, class_names=class_names, auxiliary=made_up)
    auxiliary = _load_auxiliary(config, channels, height if height == width else None)
    if auxiliary.images.shape[1:] != image_shape:
        raise ConfigError(
            f"the auxiliary images are {auxiliary.images.shape[1:]} and the private ones {image_shape} (channels, height, width); "
            "scale them alike, or all to a square by --resize"
        )
    unit = auxiliary.to_unit()
    unit = np.where(np.isfinite(unit), unit, 0).astype(np.float32)
    present, labels = np.unique(auxiliary.labels, return_inverse=True)
    return Public(
        image_shape=image_shape,
        class_names=class_names,
        auxiliary=torch.from_numpy(unit),
        procedural=made_up,
        auxiliary_labels=torch.from_numpy(labels) if len(present) > 1 else None,
    )


def auxiliary_hash(public: Public) -> str:
    """SHA-256 of the images that a person gave, and of their labels; empty for procedural ones, of which the seed says all."""
    if public.procedural is None:
        return ""
    digest = hashlib.sha256(repr(tuple(public.auxiliary.shape)).encode())
    for tensor in (public.auxiliary, public.auxiliary_labels):
        if tensor is not None:
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()


def _load_auxiliary(config: RunConfig, channels: int, resize: int | None) -> LabelledImages:
    """Public images, with labels if they have some, in the private ones' size and colour. How they are read follows from themselves."""
    limits = Limits.of_gib(config.max_gib, scratch_of(config))
    load = functools.partial(
        load_images, config.auxiliary, image_column=None, resize=resize, channels=channels, limits=limits
    )
    try:
        found = load(public_labels=True)
    except InputError:  # no labels, or none that can be read: what else is wrong, the images alone will say
        found = load(unlabelled=True)
    return dataclasses.replace(found, value_range=public_range(found))


def make_plan(
    config: RunConfig, image_shape: tuple[int, int, int], class_names: tuple[str, ...], models: int = 0
) -> Plan:
    """Calibrates the method to the asked (ε, δ): from public facts only.

    Args:
      models: how many models vote, where owners brought them.
    """
    config = with_way(config)
    known = methods_of(config)
    if config.method not in known:
        raise ConfigError(f"unknown method {config.method!r}; known: {', '.join(known)}")
    method: Any = known[config.method]
    if not hasattr(method, "plan"):
        raise ConfigError(
            f"{config.method} asks nothing of the door, so there is nothing to plan; --dry-run says what it counts"
        )
    given: dict[str, Any] = {"per_class": config.per_class}
    if isinstance(config, DiffusionConfig):
        given |= {"unit_moves": 2} if config.method == "shards" else {"expected_records": config.expected_records}
        given |= {"target_epsilon": config.epsilon} if config.method == "dpsad" else {}
    elif config.method == "votes" and isinstance(config, ModelConfig):
        given |= {"models": models or config.shards, "unit_moves": 2 if config.data and not config.id_column else 1}
        given |= {"expected_records": config.expected_records}
    for name in given:
        if name in config.settings:
            raise ConfigError(
                f"settings.{name}: {name} belongs to the run, not to the method; move it out of [settings]"
            )
    others = [item.name for item in dataclasses.fields(type(config))]
    settings = build(method.Config, {**given, **config.settings}, "settings.", others)
    check_size(config, settings, image_shape, class_names)
    public = public_facts(config, image_shape, class_names)
    sigma = calibrate(lambda value: method.plan(settings, public, value), config.epsilon, config.delta)
    releases = method.plan(settings, public, sigma)
    parts = [planned.part for planned in releases]
    exchanged = [planned.part_replace_one for planned in releases]
    for problem in too_large(parts):
        raise ConfigError(f"--epsilon {config.epsilon:g}: {problem}; ask for less")
    toml = public_toml(config, settings, sigma, auxiliary_hash(public))
    return Plan(
        method=method,
        settings=settings,
        public=public,
        releases=releases,
        noise_multiplier=sigma,
        epsilon=accounting.epsilon(parts, config.delta),
        epsilon_replace_one=accounting.epsilon(exchanged, config.delta, "replace_one"),
        toml=toml,
        advice=tuple(method.advice(settings, public, config.epsilon, config.delta))
        if hasattr(method, "advice")
        else (),
    )


def check_size(
    config: RunConfig, settings: Any, image_shape: tuple[int, int, int], class_names: tuple[str, ...]
) -> None:
    """Raises ConfigError where what is asked for cannot be made, or is more than a release may hold: before anything is charged for it."""
    room.check_names(class_names)
    k, soft = len(class_names), isinstance(config, ModelConfig)
    files = room.dataset(config.per_class * k, image_shape, k, soft)
    if isinstance(config, ModelConfig):
        files |= _student_files(settings, image_shape, k)
    if isinstance(config, DiffusionConfig):
        files |= _sampler_files(settings, image_shape, k)
    room.check_files(files)


def _student_files(settings: Any, image_shape: tuple[int, int, int], n_classes: int) -> dict[str, room.Size]:
    """The student that a `Networks` asks for, twice, and its generator. Raises ConfigError where it cannot be made."""
    config = {name: getattr(settings, name) for name in ("width", "depth", "groups")}
    try:
        shapes = student_shapes({"image_shape": list(image_shape), "n_classes": n_classes, **config})
    except ReleaseError as error:
        raise ConfigError(str(error)) from None
    student = (room.weights(shapes), "--set width= or --resize")
    latent, width = settings.latent, settings.generator_width
    generator = room.weights(StudentGenerator.shapes(image_shape, n_classes, latent=latent, width=width))
    return {
        "model/student.safetensors": student,
        "model/student.onnx": student,
        "model/generator.safetensors": (generator, "--set generator_width=, --set latent="),
    }


def _sampler_files(settings: Any, image_shape: tuple[int, int, int], n_classes: int) -> dict[str, room.Size]:
    """The student that a `DistillationConfig` asks for. Raises ConfigError where it cannot be made."""
    few_step.check(image_shape)
    channels, side, _ = image_shape
    width = settings.token_width(image_shape)
    if width % HEADS or not HEADS <= width <= MAX_WIDTH:
        raise ConfigError(f"Expected student_width of auto or a multiple of {HEADS} up to {MAX_WIDTH}, got {width}.")
    if n_classes > MAX_WIDTH:
        raise ConfigError(f"a diffusion student knows at most {MAX_WIDTH} classes, not {n_classes:,}; merge some")
    shapes = sampler_shapes({"channels": channels, "side": side, "width": width}, n_classes)
    return {WEIGHTS: (room.weights(shapes), "--set student_width= or --resize")}


def methods_of(config: RunConfig) -> Mapping[str, Any]:
    """The methods that make what this configuration asks for."""
    if isinstance(config, ModelConfig):
        return MODEL_METHODS
    return DIFFUSION_METHODS if isinstance(config, DiffusionConfig) else METHODS


def with_way(config: RunConfig) -> RunConfig:
    """The configuration with its method named, and its shards counted."""
    if not isinstance(config, ModelConfig):
        return config
    shards = config.shards
    if shards == "auto":
        votes: Any = MODEL_METHODS["votes"]
        shards = votes.best_shards(config.expected_records, config.epsilon, config.delta)
        needed = votes.needed_models(config.epsilon, config.delta)
        if shards < needed:
            raise ConfigError(
                f"--shards auto: {config.expected_records:,} records make {shards} shards that can learn, and at ε = {config.epsilon:g} "
                f"the noise hides fewer than {needed} votes; raise ε, train a private teacher (leave --shards out), or name a number"
            )
    return dataclasses.replace(config, method=config.way, shards=shards)


def resumable(run: Callable[P, Path]) -> Callable[P, Path]:
    """Decorates a command on a configuration: what the disk refuses, somewhere in the middle, is one line that says the way out."""

    @functools.wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Path:
        try:
            return run(*args, **kwargs)
        except OSError as error:
            raise StorageError(error) from error

    return wrapped


@resumable
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
    with joined(config.device) as ranks, ExitStack() as stack:
        config = with_way(config)
        check_device(config.device)
        source = open_source(config)
        plan = make_plan(config, source.image_shape, source.class_names, source.models)
        ranks.agree(plan.toml.encode)
        held = _hold(config, plan, source, insecure_seed, stack) if ranks.first else _elsewhere()
        if ranks.lead(lambda: held is None) or held is None:
            return Path(config.out)  # it was there already
        handle = source.handle(held.ledger, held.vault, ranks)
        workspace = FolderWorkspace(
            held.work, seed=config.seed, device=config.device, quiet=quiet, checks=handle.checks, ranks=ranks
        )
        made = plan.method.run(plan.settings, plan.public, handle, plan.releases, workspace)
        if ranks.first:
            _hand_out(config, plan, source, held, handle, made)
    return Path(config.out)


@dataclass(frozen=True)
class Held:
    """What the first process of a run holds, and no other: the ledger, the noise key, and the folder for checkpoints."""

    ledger: Ledger
    vault: Vault
    work: Path


def _elsewhere() -> Held:
    return Held(Ledger.elsewhere(), Vault.elsewhere(), Path(os.devnull))


def _state(config: RunConfig) -> Path:
    return Path(f"{Path(config.out)}.state")  # of the path, not of the text: "dir/" would have it inside the release


def _hold(config: RunConfig, plan: Plan, source: Source, insecure_seed: int | None, stack: ExitStack) -> Held | None:
    """Opens the ledger until the end of `stack`, and the vault, and announces the run. None where its release is there already."""
    out, state = Path(config.out), _state(config)
    restore(out, lambda found: _same(found, plan, source))
    if _there(out, plan, source):
        forget_rest(state, plan.toml, source.contents)
        return None
    check_target(out)
    check_same_run(state, plan.toml, source.contents)
    ledger_path = source.ledger()
    check_home()  # before a ledger is begun
    cap = (config.budget or config.epsilon, config.delta)
    ledger = stack.enter_context(Ledger.open(ledger_path, cap=cap, unit=source.unit))
    vault = (
        _vault(state, plan.toml, source.contents, insecure_seed) if state.exists() else None
    )  # else later: a refused run leaves nothing behind
    left = plan.releases[len(_planned(ledger, vault.run)) :] if vault else plan.releases
    cap = ledger.cap if config.budget is None else (config.budget, ledger.cap[1])
    _check_foreseen(config, plan, ledger, vault.run if vault else NEW_RUN, left, cap, insecure_seed is not None)
    if left:  # of a run that goes on, too: another may have been let in since
        ledger.check_affordable([planned.part for planned in left], cap)
    releases()  # it is needed at the end: that it cannot be made is found out before anything is charged
    ledger.raise_cap(cap)  # last, or a refused run would leave it behind
    vault = vault or _vault(state, plan.toml, source.contents, insecure_seed)
    # Checkpoints derive from releases of one key on one ledger: with another of either, they would bring in what it did not charge.
    work = state / "work" / f"{vault.run}-{ledger.lines[0]['hash'][:16]}"
    ledger.start(vault.run, config.method, config_hash(plan.toml))
    return Held(ledger, vault, work)


def _there(out: Path, plan: Plan, source: Source) -> bool:
    """Whether the release lies there already. Raises ReleaseError where something else does."""
    if not os.path.lexists(out):
        return False
    if not _same(out, plan, source):
        raise ReleaseError(
            f"{out} exists and holds something else, a release with other settings, or, as far as {home()} knows, other data's "
            "release; choose another --out, give the options that it was made with, or remove it"
        )
    return True


def outlook(config: RunConfig, plan: Plan, source: Source) -> list[str]:
    """What a run would meet, a line each: its place, and what its ledger has left.

    Reads what the run would read, charges nothing and makes no release or ledger.

    Raises:
      DpdistillError: as the run would, before it charges anything.
    """
    check_device(config.device)
    out, state = Path(config.out), _state(config)
    if _there(out, plan, source):
        return [f"release: {out} is there already; nothing would be charged"]
    check_target(out)
    check_same_run(state, plan.toml, source.contents)
    stopped = (state / "run.json").exists()
    goes_on = [f"release: the run that was stopped in {state} would go on"] if stopped else []
    # Without a key there is no ledger yet, and asking for its name would make one.
    known = config.ledger is not None or (home() / "key").exists()
    path = source.ledger() if known else None
    there = path is not None and os.path.exists(path) and os.path.getsize(path) > 0
    ledger = Ledger.shown(path, read_small(path, ledgers.MAX_BYTES)) if path and there else None
    if ledger is None or not ledger.lines:  # a crash within its first line leaves none
        cap = config.budget or config.epsilon
        return [*goes_on, f"ledger: a new one would begin, with a cap of ε = {cap:g} at δ = {config.delta:g}"]
    ledger.check_unit(source.unit)
    cap = ledger.cap if config.budget is None else (config.budget, ledger.cap[1])
    spent = ledgers.spent(ledger.lines, cap[1])
    left = f"ledger: {path} has spent ε = {shown(spent)} of {cap[0]:g} at δ = {cap[1]:g}"
    if goes_on:  # a part of the plan may be charged already
        return [*goes_on, left]
    _check_foreseen(config, plan, ledger, NEW_RUN, plan.releases, cap, insecure=False)
    parts = [planned.part for planned in plan.releases]
    ledger.check_affordable(parts, cap)
    whole = accounting.epsilon([*ledgers.parts(ledger.lines), *parts], cap[1])
    return [f"{left}; this run would make it {shown(whole)}"]


def _vault(state: Path, toml: str, contents: Contents, insecure_seed: int | None) -> Vault:
    """The noise key of the run in a state folder, which is begun if it is new."""
    begin(state, toml, contents)
    return Vault.open(state / "vault", insecure_seed=insecure_seed)


def _planned(ledger: Ledger, run: str) -> list[ledgers.Line]:
    """What a run has been charged of its plan, in order."""
    return [line for line in ledger.intents(run) if not line["again"]]


def _check_foreseen(
    config: RunConfig,
    plan: Plan,
    ledger: Ledger,
    run: str,
    left: list[Planned],
    cap: tuple[float, float],
    insecure: bool,
) -> None:
    """Raises LedgerError where no release could be written once the run has ended: before anything of it is charged."""
    lines = ledger.foreseen(run, config.method, config_hash(plan.toml), left, cap)
    for problem in check_foreseen(lines, run, config.delta, insecure):
        way = (
            "leave --budget out"
            if cap != ledger.cap
            else "choose another method, another δ, fewer steps, or a smaller ε"
        )
        raise LedgerError(
            f"{ledger.path}: no release of this run could be verified ({problem}); nothing was charged for it; {way}"
        )


def _hand_out(config: RunConfig, plan: Plan, source: Source, held: Held, handle: Door, made: Any) -> None:
    """Writes the release, if the run asked for what it planned, and forgets the key."""
    ledger, vault = held.ledger, held.vault
    planned = [(p.query.describe(), p.count) for p in plan.releases]
    charged = [(line["query"], line["count"]) for line in _planned(ledger, vault.run)]
    if planned != charged:
        raise LedgerError("the method asked for other releases than it planned; this is a bug, and nothing was written")
    ledger.finish(vault.run)
    facts = BundleFacts(
        method=config.method,
        run=vault.run,
        delta=config.delta,
        class_names=source.class_names,
        image_shape=source.image_shape,
        per_class=config.per_class,
        config_toml=plan.toml,
        ledger_raw=ledger.path.read_bytes(),
        checks=handle.checks,
        auxiliary=auxiliary_of(config),
        insecure=vault.insecure,
        seed=config.seed,
    )
    identity = read_small(_state(config) / "run.json", MAX_TOML)
    write_atomically(releases() / f"{vault.run}.json", identity)  # first: a crash may come after the release
    write_result(Path(config.out), made, facts)
    forget(
        _state(config), vault
    )  # under the ledger's lock: the same command, given twice, must not begin in its remains


def check_alone(way: str) -> None:
    """Raises ConfigError where several processes run a way that reads nothing through the door: they would all do the same."""
    with joined() as ranks:
        if ranks.world > 1:
            raise ConfigError(
                f"{way} divides no pass over records, so more processes bring nothing; leave torchrun out"
            )


def check_device(device: str) -> None:
    """Raises ConfigError where the asked device is none, or not there."""
    check_device_name(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: this machine or this build of torch has none; leave --device out")


def auxiliary_of(config: RunConfig) -> str:
    """Where the public images come from, as a sentence for the certificate."""
    return "procedural" if config.auxiliary == "none" else f"{Path(config.auxiliary).name}, public by the user's word"


def write_result(out: Path, made: Synthetic | Student | Sampler, facts: BundleFacts) -> Path:
    """Writes what a method made, whatever came of its fit."""
    made = mended(made)
    if isinstance(made, Synthetic):
        return write_bundle(out, made, facts)
    facts = dataclasses.replace(facts, figures=made.figures)
    product = (
        product_of(made, facts.class_names)
        if isinstance(made, Student)
        else product_of_sampler(made, facts.class_names)
    )
    return write_bundle(out, made.images, facts, product)


def _identity(toml: str, contents: Contents, key: bytes) -> bytes:
    """What tells a run from others: its configuration, and a keyed hash of what is private. It stays with who runs it."""
    facts = {"config": config_hash(toml), "key": key.hex(), "records": keyed_hash(key, contents())}
    return json.dumps(facts).encode()


def _is_of(path: Path, toml: str, contents: Contents) -> bool:
    """Whether the run whose identity lies there has this configuration and these records."""
    try:
        found = read_small(path, MAX_TOML)
        key = bytes.fromhex(json.loads(found)["key"])
    except (InputError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return found == _identity(toml, contents, key)


def check_target(out: Path) -> None:
    """Refuses a place where no folder can be made, as far as that can be told without making one."""
    place = Path(f"{out}.state").absolute()
    try:
        while not os.path.lexists(place):
            with suppress(FileNotFoundError, NotADirectoryError):
                place.lstat()  # raises where its name is too long, and then it is not merely missing
            place = place.parent
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise ConfigError(f"{out}: {place} is no folder that may be written; choose another --out")


def check_same_run(state: Path, toml: str, contents: Contents = tuple) -> None:
    """Refuses to go on in a state folder that a run with another configuration, or of other records, began. Writes nothing.

    Args:
      contents: of what is private; nothing where no record is read.
    """
    path = state / "run.json"
    if os.path.lexists(path) and not _is_of(path, toml, contents):
        raise ConfigError(
            f"{state} belongs to a run with other settings or other data; finish that one with the options that it had, choose "
            "another --out, or remove the folder"
        )


def begin(state: Path, toml: str, contents: Contents = tuple) -> None:
    """Makes the state folder and says whose it is, if it is new."""
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (state / "run.json").exists():
            write_atomically(state / "run.json", _identity(toml, contents, secrets.token_bytes(32)))
    except OSError as error:
        raise ConfigError(f"{state}: cannot be written ({error.strerror}); choose another --out") from error


def _same(folder: Path, plan: Plan, source: Source) -> bool:
    """Whether this is a finished release of this configuration and these records, on a ledger that this data's goes on from: then it is
    the answer."""
    if not holds(folder / "config.toml", plan.toml) or (folder / "conversion.toml").exists():  # that has others
        return False
    ledger = source.ledger()
    try:
        mine, all_runs = (read_small(path, ledgers.MAX_BYTES) for path in (folder / "ledger.jsonl", ledger))
        known = home() / "releases" / f"{run_of(folder)}.json"
    except (InputError, ReleaseError):
        return False
    return all_runs.startswith(mine) and _is_of(known, plan.toml, source.contents)


def holds(path: Path, toml: str) -> bool:
    """Whether a file holds this configuration."""
    try:
        return read_small(path, MAX_TOML) == toml.encode()
    except InputError:
        return False


def forget_rest(state: Path, toml: str, contents: Contents = tuple) -> None:
    """After a crash between a release and `forget`: what that left. Another run's state is not touched."""
    if state.exists():
        check_same_run(state, toml, contents)
        forget(state, Vault(state / "vault", run="", key=b"", insecure=False))  # can erase, and nothing else


def forget(state: Path, vault: Vault) -> None:
    """Destroys the noise key, then everything else that the run kept beside the release."""
    sync_directory(state.absolute().parent)  # the release first: a crash may have come between its renaming and this
    point("pipeline: before the key is erased")
    vault.erase()
    for path in sorted(state.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    state.rmdir()
    point("pipeline: state removed")
