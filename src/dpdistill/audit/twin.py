"""A twin of a release: the same method, settings, ε and δ through the same code, on public data. It costs nobody's budget.

An audit of the private run itself would need canaries among the private records. The twin tests what can be wrong in code and settings, and
says nothing about what a person did to the private data.
"""

import dataclasses
import tempfile
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import DiffusionConfig, ModelConfig, RunConfig
from ..data import LabelledImages, check_public_range, load_images
from ..errors import ConfigError, InputError
from ..mechanisms import Vault
from ..methods import Sampler, Student, Synthetic
from ..planning import Plan, make_plan, with_way
from ..privacy import Ledger
from ..workspace import FolderWorkspace
from .one_run import Enough, Told, Witness, canaries

HELD_OUT = 5  # every fifth record is nobody's member
FEWEST = 100  # records, so that twenty canaries are a quarter of who is not held out
_OF_THE_RUN = ("per_class", "expected_records", "target_epsilon", "models", "unit_moves")
_CAP = 1e15  # public data

Made = Synthetic | Student | Sampler


def configuration(certificate: dict[str, Any], toml: str, data: str, auxiliary: str, device: str) -> RunConfig:
    """The release's configuration, for other data.

    Raises:
      ConfigError: the release read no private record through the door.
    """
    values = tomllib.loads(toml)
    found, kind = values["settings"], certificate["release"]["kind"]
    settings = {name: value for name, value in found.items() if name not in _OF_THE_RUN}
    common: dict[str, Any] = {name: values[name] for name in ("epsilon", "delta", "per_class", "seed")}
    common |= {"data": data, "auxiliary": auxiliary, "settings": settings, "device": device}
    if kind == "dataset":
        return RunConfig(**common, method=values["method"])
    if kind == "model":
        return ModelConfig(**common, shards=found.get("models"))
    records = found.get("expected_records") or 1  # `shards` has none, and does not use it
    if values["method"] == "shards":
        common["settings"] = settings | {"models": found["models"]}
    return DiffusionConfig(**common, method=values["method"], expected_records=records)


def public_records(data: str, image_shape: Sequence[int]) -> LabelledImages:
    """Public images, scaled and coloured to another set's shape where theirs differs."""
    records = load_images(data)
    check_public_range(records)
    if len(records.labels) < FEWEST:
        raise InputError(data, f"an audit needs at least {FEWEST} public records", "--data digits has enough")
    if records.image_shape == tuple(image_shape):
        return records
    channels, height, width = image_shape
    x = torch.nan_to_num(torch.from_numpy(records.to_unit()))
    x = torch.nn.functional.interpolate(x, size=(height, width), mode="bilinear", antialias=True).clamp(-1, 1)
    x = x.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1) if x.shape[1] != channels else x
    pixels = np.rint((x.numpy() + 1) * 127.5).astype(np.uint8)
    return dataclasses.replace(records, images=pixels, value_range=(0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A twin run, ready to be made.

    Attributes:
      records: who was in for sure.
      others: public records that were not.
      canaries, included: noise images and their coins.
    """

    config: RunConfig
    plan: Plan
    records: LabelledImages
    others: LabelledImages
    canaries: LabelledImages
    included: NDArray[np.bool_]

    @classmethod
    def of(cls, config: RunConfig, records: LabelledImages, most_canaries: int, coins: np.random.Generator) -> "Twin":
        """Holds records out, makes canaries, draws coins, and calibrates. Raises ConfigError where there are too few records."""
        config = with_way(config)
        out = np.arange(len(records.labels)) % HELD_OUT == 0
        kept = _some(records, ~out)
        m = min(most_canaries, len(kept.labels) // 4)
        if m < 20:
            raise ConfigError(
                f"{config.data}: an audit needs at least {FEWEST} public records; --data digits has enough"
            )
        made = canaries(kept, m, coins)
        plan = make_plan(config, records.image_shape, records.class_names)
        return cls(
            config=config,
            plan=plan,
            records=kept,
            others=_some(records, out),
            canaries=made,
            included=coins.random(m) < 0.5,
        )

    @property
    def releases(self) -> int:
        return sum(planned.count for planned in self.plan.releases)

    def run(
        self, *, noise: float = 1.0, whole: bool = True, seed: int | None = None, quiet: bool = False
    ) -> tuple[Told, Made | None]:
        """Makes the run. Returns what the noisy sums told of the canaries, and what came out (None where it stopped after the last sum).

        Args:
          noise: what the planned noise is multiplied by: 1, or less for the broken control.
          whole: go on to the result.
          seed: for tests only: noise that repeats.
        """
        method, settings, public = self.plan.method, self.plan.settings, self.plan.public
        releases = self.plan.releases
        if noise != 1:
            releases = [_scaled(planned, noise) for planned in releases]
        with tempfile.TemporaryDirectory(prefix="dpdistill-audit-") as place:
            vault = Vault.open(Path(place) / "vault", insecure_seed=seed)
            with Ledger.open(Path(place) / "ledger.jsonl", cap=(_CAP, self.config.delta), data="twin") as ledger:
                stop = None if whole else self.releases
                witness = Witness(
                    self.records,
                    self.canaries,
                    self.included,
                    ledger,
                    vault,
                    device=self.config.device,
                    stop_after=stop,
                )
                workspace = FolderWorkspace(
                    Path(place) / "work",
                    seed=self.config.seed,
                    device=self.config.device,
                    quiet=quiet,
                    checks=witness.checks,
                )
                made: Made | None = None
                with suppress(Enough):
                    made = method.run(settings, public, witness, releases, workspace)
        return witness.told, made


def _scaled(planned: Any, noise: float) -> Any:
    query = planned.query
    return dataclasses.replace(
        planned, query=dataclasses.replace(query, noise_multiplier=query.noise_multiplier * noise)
    )


def _some(records: LabelledImages, chosen: NDArray[np.bool_]) -> LabelledImages:
    return dataclasses.replace(records, images=records.images[chosen], labels=records.labels[chosen], ids=None)
