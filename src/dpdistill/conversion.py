"""A model that someone brings, turned into a student: no private data is read here, so nothing is charged.

What the release may promise is what is known of the teacher: a release of ours that verifies (proved), its supplier's word (attested), or
nothing (the paper's way, which says so). Everything that can be wrong with the teacher is found before the work begins.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .bundle import BundleFacts
from .bundle.claims import Attested, Nominal
from .bundle.product import ModelProduct
from .bundle.release import restore, student_of
from .bundle.verification import open_release
from .config import ModelConfig
from .config_files import build, config_hash, public_toml
from .errors import ConfigError, InputError, ReleaseError
from .mechanisms import Vault
from .methods import MODEL_METHODS, Public, Student
from .models.teachers import RANGE, Teacher, one_class, varied_images
from .pipeline import check_alone, check_device, distil, resumable, write_result
from .planning import auxiliary_hash, auxiliary_of, check_size, public_facts
from .sources import check_apart, names_of, read_teacher
from .state import begin, check_same_run, check_target, forget, forget_rest, holds, locked
from .workspace import FolderWorkspace


@dataclass(frozen=True, kw_only=True)
class Brought:
    """A teacher, and what is known of it.

    Attributes:
      outputs: images [B, C, H, W] in [-1, 1] to logits [B, K].
      facts: of the release, as far as they come with the teacher.
      differentiable: its gradient with respect to the images may be used.
    """

    outputs: Callable[[Tensor], Tensor]
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    sha256: str
    facts: dict[str, Any]
    differentiable: bool = False


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A conversion, before the work begins.

    Attributes:
      settings: the way's `Config`.
      sigma: the paper's σ, where nothing is known of the teacher; else 0.
      public: what the way may know.
      toml: the public configuration.
      nominal: what the release will say instead of a guarantee, where nothing is known of the teacher.
    """

    brought: Brought
    settings: Any
    sigma: float
    public: Public
    toml: str
    nominal: Nominal | None


@resumable
def convert(
    config: ModelConfig,
    teacher: Teacher | Iterable[Teacher] | None = None,
    *,
    quiet: bool = False,
    insecure_seed: int | None = None,
) -> Path:
    """Makes a student model, by the way that fits what is given: private images, models that vote, or one model.

    Args:
      config: what the person decided.
      teacher: instead of a file: `models.teachers.from_callable(fn, …)`; `config.teacher` is then any name. Or one of every owner, each
        under a name of its own, instead of a folder; `config.teachers` is then any name.
      quiet: shows no progress.
      insecure_seed: for tests only: reproducible noise; the release then says NOT PRIVATE and does not verify.

    Returns:
      The release folder. Stopped, the same call goes on.

    Raises:
      DpdistillError: one line that says the way out. Nothing was charged, unless the ledger says so.
    """
    config = dataclasses.replace(config, method=config.way)
    one = teacher if isinstance(teacher, Teacher) else None
    models = None if teacher is None or one else tuple(teacher if isinstance(teacher, Iterable) else [teacher])
    if not all(isinstance(model, Teacher) for model in models or ()):
        raise ConfigError("wrap what answers as a teacher: from_callable(fn, image_shape=…, n_classes=…)")
    if one and not config.teacher:
        raise ConfigError(
            "a teacher is given beside data= or teachers=; give it a name with teacher=, and leave those out"
        )
    if models is not None and not config.teachers:
        raise ConfigError(
            "models that vote are given beside data= or teacher=; name them with teachers=, and leave those out"
        )
    if not config.teacher:
        return distil(config, models, quiet=quiet, insecure_seed=insecure_seed)
    method: Any = MODEL_METHODS[config.method]
    ready = prepare(config, one)
    brought, settings, toml = ready.brought, ready.settings, ready.toml
    out, state = Path(config.out), Path(f"{Path(config.out)}.state")
    restore(out, lambda found: _holds(found, toml))
    if os.path.lexists(out):
        forget_rest(state, toml)
        return out
    begin(state, toml)
    with locked(state):
        vault = Vault.open(state / "vault", insecure_seed=insecure_seed)
        public = ready.public
        workspace = FolderWorkspace(state / "work" / vault.run, seed=config.seed, device=config.device, quiet=quiet)
        claim: dict[str, Any] = dict(brought.facts)
        made: Student
        if ready.nominal:
            made = method.run(settings, public, brought.outputs, ready.sigma, vault, workspace)
            claim |= {"claim": ready.nominal, "delta": config.delta}
        else:
            made = method.run(settings, public, brought.outputs, workspace, brought.differentiable)
        facts = BundleFacts(
            **{
                "method": config.method,
                "run": vault.run,
                "class_names": brought.class_names,
                "image_shape": brought.image_shape,
                "per_class": config.per_class,
                "config_toml": toml,
                "checks": {},
                "auxiliary": auxiliary_of(config),
                "insecure": vault.insecure and config.method == "opaque",
                "seed": config.seed,
                "ledger_raw": b"",
                **claim,
                **({"conversion_toml": toml} if "config_toml" in claim else {}),
            }
        )
        write_result(out, made, facts)
        forget(state, vault)
    return out


def prepare(config: ModelConfig, teacher: Teacher | None = None) -> Prepared:
    """Reads the teacher and finds all that can be wrong, as `--dry-run` does. Nothing is written.

    Raises:
      DpdistillError: one line that says the way out.
    """
    config = dataclasses.replace(config, method=config.way)
    check_alone("the conversion of a teacher")
    check_device(config.device)
    check_apart(config)
    brought = bring(config, teacher)
    method: Any = MODEL_METHODS[config.method]
    settings = build(method.Config, {"per_class": config.per_class, **config.settings}, "settings.")
    check_size(config, settings, brought.image_shape, brought.class_names)
    sigma, nominal = 0.0, None
    if config.method == "opaque":
        sigma = settings.sigma(config.epsilon, config.delta)
        nominal = Nominal(
            steps=settings.steps, batch=settings.batch, sigma=sigma, delta=config.delta, teacher=brought.sha256
        )
    public = public_facts(config, brought.image_shape, brought.class_names)
    toml = f"# teacher: {brought.sha256}\n" + public_toml(config, settings, sigma, auxiliary_hash(public))
    _check_place(Path(config.out), toml)
    return Prepared(brought=brought, settings=settings, sigma=sigma, public=public, toml=toml, nominal=nominal)


def _check_place(out: Path, toml: str) -> None:
    """Refuses a place that is taken. A finished conversion of this very teacher with these settings is the answer; anything else is in the
    way."""
    if os.path.lexists(out):
        if not _holds(out, toml):
            raise ReleaseError(f"{out} exists and holds something else; choose another --out or remove it")
        return
    check_target(out)
    check_same_run(Path(f"{out}.state"), toml)


def _holds(folder: Path, toml: str) -> bool:
    return any(holds(folder / name, toml) for name in ("conversion.toml", "config.toml"))


def bring(config: ModelConfig, given: Teacher | None = None) -> Brought:
    """Reads the teacher, and what is known of it. Raises InputError or ConfigError before any work is done."""
    path = Path(str(config.teacher))
    if given is None:
        restore(path)  # a release that a stopped audit left aside
        if (path / "certificate.json").exists():
            return _certified(config, path)
        if not os.path.lexists(path):
            raise InputError(path, "no such file or folder", "--teacher is a model, or a release of ours")
    if config.way == "conversion" and config.attested_epsilon is None:
        raise ConfigError(
            f"{path}: nothing is known of how this teacher was trained. Give --attested-epsilon and --attested-delta if its supplier "
            "vouches for them, train a private teacher with --data, or go on without any guarantee for its training records with "
            "--accept-no-record-guarantee"
        )
    teacher = given or read_teacher(config, path)
    if one_class(teacher.outputs, teacher.image_shape):
        raise InputError(path, "gives one class to every made-up image", RANGE)
    facts: dict[str, Any] = {}
    if config.attested_epsilon is not None:
        epsilon, delta = float(config.attested_epsilon), float(config.attested_delta or 0)
        claim = Attested(epsilon=epsilon, delta=delta, unit=config.attested_unit, teacher=_digest(teacher))
        facts = {"claim": claim, "delta": delta}
    return Brought(
        outputs=teacher.outputs,
        image_shape=teacher.image_shape,
        class_names=names_of(config, teacher.n_classes),
        sha256=_digest(teacher),
        facts=facts,
    )


def _digest(teacher: Teacher) -> str:
    """The teacher's hash; of a Python callable without a name, the hash of the classes that win on made-up images. Its exact answers may be
    others each time, up to rounding. Another callable with the same winners is not noticed."""
    if teacher.sha256:
        return teacher.sha256
    winners_B = teacher.outputs(varied_images(teacher.image_shape)).argmax(dim=1).cpu()
    return "callable-" + hashlib.sha256(winners_B.numpy().tobytes()).hexdigest()[:32]


def _both(teacher: str, conversion: str) -> str:
    """Where the public images of a teacher and of its conversion come from: the promise rests on both being public."""
    return teacher if teacher == conversion else f"{teacher}; of the conversion: {conversion}"


def _certified(config: ModelConfig, path: Path) -> Brought:
    """A model release of ours: its guarantee goes over to the new student, if it verifies."""
    if config.accept_no_record_guarantee or config.attested_epsilon is not None:
        raise ConfigError(
            f"{path} brings its own certificate; leave --attested-epsilon and --accept-no-record-guarantee out"
        )
    source = open_release(path)
    if not isinstance(source.product, ModelProduct):
        raise InputError(path, "a release of images, not of a model", "train on its images with `dpdistill evaluate`")
    if source.guarantee.basis == "none":
        raise InputError(path, "carries no guarantee that a student could inherit", "see its report.html")
    model, origin = student_of(source.product).to(config.device), source.facts
    inherited = {
        name: getattr(origin, name)
        for name in ("method", "run", "delta", "config_toml", "ledger_raw", "checks", "claim", "seed")
    }
    inherited["auxiliary"] = _both(origin.auxiliary, auxiliary_of(config))
    return Brought(
        outputs=model,
        image_shape=origin.image_shape,
        class_names=origin.class_names,
        sha256=config_hash(source.files["SHA256SUMS"].decode()),
        facts=inherited,
        differentiable=True,
    )
