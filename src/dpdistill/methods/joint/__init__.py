"""`joint`, ours: the whole budget on four full-batch Gaussian releases, then images fitted to them for free.

1. Mixture (private, three releases): for each class the mean, covariance and local means of its images in public pixel coordinates.
2. Pool (free): images drawn without limit from the mixture, and public ones.
3. Means (private, one release): means of the joint features of a few random networks over each class, in a few groups of its records.
4. Measure (free): signed weights over the pool that reproduce those means: targets for any network under any augmentation.
5. Images (free): a few images fitted to the targets under fresh random networks.

Every release is a `GaussianSum` of rate 1, so the budget adds up exactly: Σ 1/σ². Proof: docs/privacy/joint.md.
σ noise_multiplier, K classes, d pixel dims, D feature dims, J components, G groups, M images per class, P pool images.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import ConfigError
from ...mechanisms import PrivateData
from ...models import ConvNet, Dsa
from ...privacy import GaussianSum, Planned
from ..base import Public, Synthetic, Workspace
from ..shared import mixture as mix
from . import measure
from .matching import apportioned, match_pool, packed

N_PUBLIC = 6000


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings, all public; chosen on public proxies (docs/decisions/joint.md).

    Attributes:
      per_class: M.
      parts: each stored image holds parts² training images; 0 is 2 from 16 pixels a side on, below that 1.
      pixel_dims: d; at most the number of pixels.
      components: J.
      feature_dims: D.
      networks, feature_width: random ConvNets behind the feature means.
      groups: G, at most: feature means are of each class's records nearest to each of G centres. A class too small for its noise has
        fewer. 0 is 4 for grey images and 1 for colour, where it was not tried.
      share_moments, share_local, share_means: of Σ 1/σ²: step 1's moments, each of its two rounds of local means, step 3.
      pool_mixture: pool images drawn for each class.
      pool_public: public pool images, in all.
      pixel_prior: mass that a class's weights give its own mixture images before they are fitted; the rest is on the public
        ones. "auto" is 1 for grey images and 0 for colour, where pixel coordinates say little of what a class looks like.
      procedural: share of made-up images among the public ones; "auto" is a half for grey images and 0 for colour.
      steps, lr, width: of the fit, and of the fresh networks in it; each network serves `repeats` steps.
      flip: mirror images are of the same class (not so for digits and letters).
    """

    per_class: int = 10
    parts: int = 0
    pixel_dims: int = 64
    components: int = 20
    feature_dims: int = 300
    networks: int = 4
    feature_width: int = 32
    groups: int = 0
    share_moments: float = 0.2
    share_local: float = 0.2
    share_means: float = 0.4
    pool_mixture: int = 100
    pool_public: int = 1000
    pixel_prior: float | Literal["auto"] = "auto"
    procedural: float | Literal["auto"] = "auto"
    steps: int = 400
    repeats: int = 4
    lr: float = 0.02
    width: int = 32
    flip: bool = False

    def __post_init__(self) -> None:
        counts = ("per_class", "pixel_dims", "components", "feature_dims", "networks", "feature_width", "width")
        for name in (*counts, "pool_mixture", "pool_public", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        if self.groups < 0:
            raise ConfigError(f"Expected groups of 0 (automatic) or more, got {self.groups}.")
        if self.components > mix.N_SAMPLES:
            raise ConfigError(f"Expected components of at most {mix.N_SAMPLES}, got {self.components}.")
        if self.steps < 0 or not (0 < self.lr < math.inf):
            raise ConfigError(f"Expected steps of at least 0 and a finite lr > 0, got {self.steps} and {self.lr}.")
        shares = (self.share_moments, self.share_local, self.share_means)
        if not (min(shares) > 0 and abs(self.share_moments + 2 * self.share_local + self.share_means - 1) <= 1e-6):
            raise ConfigError(f"Expected positive shares with moments + 2·local + means = 1, got {shares}.")
        if self.parts not in (0, 1, 2):
            raise ConfigError(f"Expected parts of 0 (automatic), 1 or 2, got {self.parts}.")
        for name in ("pixel_prior", "procedural"):
            value = getattr(self, name)
            if value != "auto" and not (0 <= value <= 1):
                raise ConfigError(f"Expected {name} of auto or in [0, 1], got {value}.")
        if self.pool_mixture * 4 < self.per_class:
            raise ConfigError(f"Expected pool_mixture of at least a quarter of per_class, got {self.pool_mixture}.")


def _share(value: float | Literal["auto"], public: Public, grey: float) -> float:
    """What "auto" stands for: `grey` for grey images, 0 for colour."""
    if value != "auto":
        return float(value)
    return grey if public.image_shape[0] == 1 else 0.0


def _dims(config: Config, public: Public) -> int:
    return min(config.pixel_dims, math.prod(public.image_shape))


def _parts(config: Config, public: Public) -> int:
    return config.parts or (2 if min(public.image_shape[1:]) >= 16 else 1)


def _groups(config: Config, public: Public) -> int:
    """Never more than training images, nor components."""
    wanted = config.groups or (4 if public.image_shape[0] == 1 else 1)
    return min(wanted, config.components, config.per_class * _parts(config, public) ** 2)


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """Four full-batch sums. Shares divide Σ 1/σ² (GDP), so all together cost what one sum with `noise_multiplier` would."""
    d, rows = _dims(config, public), public.n_classes

    def ask(name: str, dim: int, share: float) -> Planned:
        return Planned(
            GaussianSum(name=name, dim=dim, n_classes=rows, noise_multiplier=noise_multiplier / math.sqrt(share))
        )

    return [
        *mix.planned("joint", rows, d, config.components, noise_multiplier, config.share_moments, config.share_local),
        ask("joint-means", _groups(config, public) * (config.feature_dims + 1), config.share_means),
    ]


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Synthetic:
    """Returns M images per class."""
    queries = [planned.query for planned in plan]
    open_images = _public_images(config, public, workspace)
    space = mix.pixel_space(open_images, _dims(config, public))
    fitted = mix.fit(space, config.components, private, queries[:3], workspace)

    def draw(per_class: int, purpose: str) -> Tensor:
        return fitted.sample(per_class, workspace.generator("mixture", purpose))

    def shown(z: Tensor) -> Tensor:
        return space.images(z.flatten(0, -2), public.image_shape)

    k, m = public.n_classes, config.per_class
    parts, g = _parts(config, public), _groups(config, public)
    # 2. The pool, and what each group's weights are before anything is known of its features.
    noise = queries[3].noise_multiplier
    # A group's mean may have noise of a tenth of the largest norm, within which the features lie, at the most; the counts are released.
    used = (0.1 * fitted.count / (noise * math.sqrt(config.feature_dims))).long().clamp(1, g)
    centres = mix.group_centres(fitted, used.tolist(), g, workspace.generator("groups"))
    seen = open_images[: config.pool_public]
    own = draw(config.pool_mixture, "pool")
    pool = torch.cat([shown(own), seen])
    mass = _share(config.pixel_prior, public, 1.0)
    prior = torch.cat([mass * _prior(own, centres), torch.full((len(seen), k * g), (1 - mass) / max(1, len(seen)))])
    # 3. Means of joint random features, of each group of each class.
    shape = public.image_shape
    nets = []
    for i in range(config.networks):
        net = ConvNet(shape, 1, width=config.feature_width, generator=workspace.generator("network", i))
        nets.append(net.requires_grad_(False).to(workspace.device))
    z = measure.coordinates(nets, pool, config.feature_dims)

    def by_group(x: Tensor, y: Tensor) -> Tensor:
        return measure.grouped(z(x), mix.nearest_group(centres, space.coordinates(x), y), g)

    with workspace.passing("private pass over the records: feature means") as progress:
        sums = private.release(queries[3], by_group, progress=progress)  # private
    # 4. The measure. The noise of a group that is not used is of no account.
    means, counts = measure.class_means(sums.view(k * g, -1), noise)
    counts = torch.where(torch.arange(g) < used[:, None], counts.view(k, g), 0.0)
    with torch.no_grad():
        features = torch.cat([z(x.to(workspace.device)).cpu() for x in pool.split(250)])
    weights = measure.signed_weights(features, prior, means, counts.flatten().clamp_min(1.0), noise)
    share = counts / counts.sum(dim=1, keepdim=True)
    # 5. The images.
    tiles = apportioned(share, m * parts**2)
    start = packed(shown(_of_groups(draw(10 * m * parts**2, "start"), centres, tiles)), parts)
    start = torch.nn.functional.interpolate(start, size=shape[1:]).view(k, m, *shape)
    dsa = Dsa(strategy="color_crop_cutout_scale_rotate" + ("_flip" if config.flip else ""), fill=float(pool.amin()))
    images = match_pool(
        pool,
        weights.view(-1, k, g),
        share,
        tiles,
        start,
        parts=parts,
        steps=config.steps,
        repeats=config.repeats,
        lr=config.lr,
        width=config.width,
        dsa=dsa,
        workspace=workspace,
    )
    return Synthetic(images=images.flatten(0, 1), labels=torch.arange(k).repeat_interleave(m), parts=parts)


def _prior(own_KND: Tensor, centres_KGD: Tensor) -> Tensor:
    """Equal weights over the images drawn for a class that fall to each of its groups; over all of them where none does: [K·N, K·G]."""
    k, n, d = own_KND.shape
    g = centres_KGD.shape[1]
    y = torch.arange(k).repeat_interleave(n)
    group = mix.nearest_group(centres_KGD, own_KND.view(-1, d), y)
    mine = torch.nn.functional.one_hot(y * g + group, k * g).float()
    anyone = torch.nn.functional.one_hot(y, k).float().repeat_interleave(g, dim=1)
    mine = torch.where(mine.sum(dim=0) > 0, mine, anyone)
    return mine / mine.sum(dim=0)


def _of_groups(drawn_KND: Tensor, centres_KGD: Tensor, wanted_KS: Tensor) -> Tensor:
    """Takes for each wanted group the next of the drawn that falls to it, else the next of any: [K, S, d]."""
    taken = []
    for row, (drawn, wanted) in enumerate(zip(drawn_KND, wanted_KS, strict=True)):
        group = mix.nearest_group(centres_KGD, drawn, torch.full((len(drawn),), row))
        for each in wanted.tolist():
            fitting = (group == each).nonzero().flatten()
            index = int(fitting[0]) if len(fitting) else int((group >= 0).nonzero()[0])
            taken.append(drawn[index])
            group[index] = -1
    return torch.stack(taken).view(len(wanted_KS), wanted_KS.shape[1], -1)


def _public_images(config: Config, public: Public, workspace: Workspace) -> Tensor:
    """Up to 6,000 public images, shuffled: the person's own and, where there are any beside them, a share of made-up ones."""
    sources, wanted = [public.auxiliary], [N_PUBLIC]
    if public.procedural is not None:
        sources, made_up = (
            [public.auxiliary, public.procedural],
            round(N_PUBLIC * _share(config.procedural, public, 0.5)),
        )
        wanted = [N_PUBLIC - made_up, made_up]
    taken = []
    for i, (source, n) in enumerate(zip(sources, wanted, strict=True)):
        taken.append(source[torch.randperm(len(source), generator=workspace.generator("public", i))[:n]])
    mixed = torch.cat(taken)
    return mixed[torch.randperm(len(mixed), generator=workspace.generator("public"))]
