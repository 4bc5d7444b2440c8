"""`joint`, ours: the whole budget on five full-batch Gaussian releases, then images fitted to them for free.

1. Mixture (private, three releases): for each class the mean, covariance and local means of its images in public pixel coordinates.
   Of grey images one release more: how often a pixel is how light, since samples of a mixture are pale.
2. Pool (free): images drawn without limit from the mixture, and public ones.
3. Means (private, one release): means of the joint features of a few random networks over each class, in a few groups of its records;
   each network sees the images under one augmentation of its own.
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
from ..shared import tones
from ..shared.bounds import DIMS, PIXEL_DIMS, RATES, check_bounds
from . import measure
from .matching import apportioned, match_pool, packed

N_PUBLIC = 6000
MOST_POOLED = 4000  # of all classes, where that leaves each 100
N_TONED = 3000  # images of all classes that show what tones the mixture has
SHARE_TONES = 0.03  # of grey images; in colour they brought nothing (docs/decisions/model.md)
VIEWS = ("none", "crop", "cutout", "rotate")  # the augmentation that each network of the means sees, in turn


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings, all public; chosen on public proxies (docs/decisions/joint.md).

    Attributes:
      per_class: M.
      parts: each stored image holds parts² training images; 0 is 2 from 16 pixels a side on, below that 1.
      gain: contrast of a training image against its part of the stored one, where parts are more than 1: what is enlarged keeps
        sharp edges. 1 is the papers' decoder.
      pixel_dims: d; at most the number of pixels.
      components: J.
      feature_dims: D.
      networks, feature_width: random ConvNets behind the feature means.
      groups: G, at most: feature means are of each class's records nearest to each of G centres. A class too small for its noise has
        fewer. 0 is 4 for grey images and 1 for colour, where it was not tried.
      share_moments, share_local, share_means: of Σ 1/σ²: step 1's moments, each of its two rounds of local means, step 3.
      share_tones: of Σ 1/σ², for the tones; the three shares above divide the rest. "auto" is 0.03 for grey images, 0 for colour.
      pool_mixture: pool images drawn for each class; fewer, down to 100, where classes are many.
      pool_public: public pool images, in all.
      pixel_prior: mass that a class's weights give its own mixture images before they are fitted; the rest is on the public
        ones. "auto" is 1 for grey images and 0 for colour, where pixel coordinates say little of what a class looks like.
      procedural: share of made-up images among the public ones; "auto" is a half for grey images and 0 for colour.
      steps, lr, width: of the fit, and of the fresh networks in it; each network serves `repeats` steps.
      flip: mirror images are of the same class (not so for digits and letters).
    """

    per_class: int = 10
    parts: int = 0
    gain: int = 8
    pixel_dims: int = 64
    components: int = 20
    feature_dims: int = 300
    networks: int = 4
    feature_width: int = 32
    groups: int = 0
    share_moments: float = 0.2
    share_local: float = 0.2
    share_means: float = 0.4
    share_tones: float | Literal["auto"] = "auto"
    pool_mixture: int = 400
    pool_public: int = 1000
    pixel_prior: float | Literal["auto"] = "auto"
    procedural: float | Literal["auto"] = "auto"
    steps: int = 800
    repeats: int = 8
    lr: float = 0.04
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
        if self.steps < 0:
            raise ConfigError(f"Expected steps of at least 0, got {self.steps}.")
        check_bounds(self, RATES, "lr")
        check_bounds(self, PIXEL_DIMS, "pixel_dims")
        check_bounds(self, DIMS, "feature_dims", "feature_width", "width")
        shares = (self.share_moments, self.share_local, self.share_means)
        if not (min(shares) > 0 and abs(self.share_moments + 2 * self.share_local + self.share_means - 1) <= 1e-6):
            raise ConfigError(f"Expected positive shares with moments + 2·local + means = 1, got {shares}.")
        if not (1 <= self.gain <= 64):
            raise ConfigError(f"Expected a gain from 1 to 64, got {self.gain}.")
        if self.share_tones != "auto" and not (0 <= self.share_tones < 1):
            raise ConfigError(f"Expected share_tones of auto or in [0, 1), got {self.share_tones}.")
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
    """Four full-batch sums, or five. Shares divide Σ 1/σ² (GDP), so all together cost what one sum with `noise_multiplier` would."""
    d, rows = _dims(config, public), public.n_classes
    toned = _share(config.share_tones, public, SHARE_TONES)
    sigma = noise_multiplier / math.sqrt(1 - toned)
    means = GaussianSum(
        name="joint-means",
        dim=_groups(config, public) * (config.feature_dims + 1),
        n_classes=rows,
        noise_multiplier=sigma / math.sqrt(config.share_means),
    )
    return [
        *mix.planned("joint", rows, d, config.components, sigma, config.share_moments, config.share_local),
        *([tones.planned("joint", public, noise_multiplier, toned)] if toned else []),
        Planned(means),
    ]


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Synthetic:
    """Returns M images per class."""
    *of_mixture, of_means = [planned.query for planned in plan]  # and of tones, if they are asked for
    open_images = _public_images(config, public, workspace)
    space = mix.pixel_space(open_images, _dims(config, public))
    fitted = mix.fit(space, config.components, private, of_mixture[:3], workspace)
    wanted = tones.fit(of_mixture[3], private, workspace) if of_mixture[3:] else None

    def draw(per_class: int, purpose: str) -> Tensor:
        return fitted.sample(per_class, workspace.generator("mixture", purpose))

    def pale(z: Tensor) -> Tensor:
        return space.images(z.flatten(0, -2), public.image_shape)

    toned = pale(draw(max(1, N_TONED // public.n_classes), "tones"))
    curve = None if wanted is None else tones.Curve.between(toned, wanted)

    def shown(z: Tensor) -> Tensor:
        return pale(z) if curve is None else curve(pale(z))

    k, m = public.n_classes, config.per_class
    parts, g = _parts(config, public), _groups(config, public)
    # 2. The pool, and what each group's weights are before anything is known of its features.
    noise = of_means.noise_multiplier
    # A group's mean may have noise of a tenth of the largest norm, within which the features lie, at the most; the counts are released.
    used = (0.1 * fitted.count / (noise * math.sqrt(config.feature_dims))).long().clamp(1, g)
    centres = mix.group_centres(fitted, used.tolist(), g, workspace.generator("groups"))
    seen = open_images[: config.pool_public]
    own = draw(min(config.pool_mixture, max(100, MOST_POOLED // k)), "pool")
    pool = torch.cat([shown(own), seen])
    mass = _share(config.pixel_prior, public, 1.0)
    prior = torch.cat([mass * _prior(own, centres), torch.full((len(seen), k * g), (1 - mass) / max(1, len(seen)))])
    # 3. Means of joint random features, of each group of each class.
    shape = public.image_shape
    fill = float(pool.amin())
    nets = []
    for i in range(config.networks):
        net = ConvNet(shape, 1, width=config.feature_width, generator=workspace.generator("network", i))
        dsa = Dsa(strategy=VIEWS[i % len(VIEWS)], fill=fill)
        view = measure.View(net, dsa, dsa.draw(workspace.generator("view", i)))
        nets.append(view.requires_grad_(False).to(workspace.device))
    z = measure.coordinates(nets, pool, config.feature_dims)

    def by_group(x: Tensor, y: Tensor) -> Tensor:
        return measure.grouped(z(x), mix.nearest_group(centres, space.coordinates(x), y), g)

    with workspace.passing("private pass over the records: feature means") as progress:
        sums = private.release(of_means, by_group, progress=progress)  # private
    # 4. The measure. The noise of a group that is not used is of no account.
    means, counts = measure.class_means(sums.view(k * g, -1), noise)
    counts = torch.where(torch.arange(g) < used[:, None], counts.view(k, g), 0.0)
    with torch.no_grad():
        features = torch.cat([z(x.to(workspace.device)).cpu() for x in pool.split(250)])
    weights = measure.signed_weights(features, prior, means, counts.flatten().clamp_min(1.0), noise)
    share = counts / counts.sum(dim=1, keepdim=True)
    # 5. The images.
    tiles = apportioned(share, m * parts**2)
    gain = config.gain if parts > 1 else 1
    start = packed(shown(_of_groups(draw(10 * m * parts**2, "start"), centres, tiles)), parts, gain)
    dsa = Dsa(strategy="color_crop_cutout_scale_rotate" + ("_flip" if config.flip else ""), fill=fill)
    images = match_pool(
        pool,
        weights.view(-1, k, g),
        share,
        tiles,
        start.view(k, m, *shape),
        parts=parts,
        gain=gain,
        steps=config.steps,
        repeats=config.repeats,
        lr=config.lr,
        width=config.width,
        dsa=dsa,
        workspace=workspace,
    )
    return Synthetic(images=images.flatten(0, 1), labels=torch.arange(k).repeat_interleave(m), parts=parts, gain=gain)


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
