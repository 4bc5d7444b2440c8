"""`joint`, ours: the whole budget on five full-batch Gaussian releases, then images fitted to them for free.

1. Mixture (private, three releases): for each class the mean, covariance and local means of its images in public pixel coordinates.
   Of grey images one release more: how often a pixel is how light, since samples of a mixture are pale.
2. Views (free): a few networks, random ones and some that were taught on public images, each of which sees images under one augmentation
   of its own; and the axes along which images drawn without limit from the mixture, and public ones, differ there.
3. Means (private, one release): of what the views see of each class, along those axes.
4. Target (free): what the mixture says of each view, put right by what the means say, as far as their noise lets one trust them.
5. Images (free): a few images fitted to the target, a view at a time.

Every release is a `GaussianSum` of rate 1, so the budget adds up exactly: Σ 1/σ². Proof: docs/privacy/joint.md.
σ noise_multiplier, K classes, d pixel dims, N views, D feature dims, J components, M images per class.
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
from .matching import match, packed
from .teaching import lesson_of, lessons, teach
from .views import coordinates, evened, random_views, read, seen, trusted

N_PUBLIC = 6000
N_TONED = 3000  # images of all classes that show what tones the mixture has
MEMORY = 2**33  # bytes that the features of the pool may take: a run must not end for want of memory once it has paid
SHARE_TONES = 0.03  # of grey images; in colour they brought nothing (docs/decisions/model.md)


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
      networks, width: N views, ConvNets of this width. Each of them takes a pass over the records.
      lessons: steps that the most taught of these get on the person's own public images, if there are any; some get a quarter of it, and
        some none.
      feature_dims: D, of all views together; at most the number of their features.
      pool: images of all classes, drawn from the mixture, that show what views make of images; and a third as many public ones.
      share_moments, share_local, share_means: of Σ 1/σ²: step 1's moments, each of its two rounds of local means, step 3.
      share_tones: of Σ 1/σ², for the tones; the three shares above divide the rest. "auto" is 0.03 for grey images, 0 for colour.
      procedural: share of made-up images among the public ones; "auto" is a half for grey images and 0 for colour.
      steps, lr: of the fit.
      flip: mirror images are of the same class (not so for digits and letters).
    """

    per_class: int = 10
    parts: int = 0
    gain: int = 8
    pixel_dims: int = 64
    components: int = 20
    networks: int = 16
    width: int = 32
    lessons: int = 800
    feature_dims: int = 1000
    pool: int = 3000
    share_moments: float = 0.2
    share_local: float = 0.2
    share_means: float = 0.4
    share_tones: float | Literal["auto"] = "auto"
    procedural: float | Literal["auto"] = "auto"
    steps: int = 800
    lr: float = 0.04
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("per_class", "pixel_dims", "components", "networks", "width", "feature_dims", "pool"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        if self.components > mix.N_SAMPLES:
            raise ConfigError(f"Expected components of at most {mix.N_SAMPLES}, got {self.components}.")
        for name in ("steps", "lessons"):
            if getattr(self, name) < 0:
                raise ConfigError(f"Expected {name} of at least 0, got {getattr(self, name)}.")
        check_bounds(self, RATES, "lr")
        check_bounds(self, PIXEL_DIMS, "pixel_dims")
        check_bounds(self, DIMS, "width", "feature_dims")
        shares = (self.share_moments, self.share_local, self.share_means)
        if not (min(shares) > 0 and abs(self.share_moments + 2 * self.share_local + self.share_means - 1) <= 1e-6):
            raise ConfigError(f"Expected positive shares with moments + 2·local + means = 1, got {shares}.")
        if not (1 <= self.gain <= 64):
            raise ConfigError(f"Expected a gain from 1 to 64, got {self.gain}.")
        if self.share_tones != "auto" and not (0 <= self.share_tones < 1):
            raise ConfigError(f"Expected share_tones of auto or in [0, 1), got {self.share_tones}.")
        if self.parts not in (0, 1, 2):
            raise ConfigError(f"Expected parts of 0 (automatic), 1 or 2, got {self.parts}.")
        if self.procedural != "auto" and not (0 <= self.procedural <= 1):
            raise ConfigError(f"Expected procedural of auto or in [0, 1], got {self.procedural}.")


def _share(value: float | Literal["auto"], public: Public, grey: float) -> float:
    """What "auto" stands for: `grey` for grey images, 0 for colour."""
    if value != "auto":
        return float(value)
    return grey if public.image_shape[0] == 1 else 0.0


def _dims(config: Config, public: Public) -> int:
    return min(config.pixel_dims, math.prod(public.image_shape))


def _parts(config: Config, public: Public) -> int:
    return config.parts or (2 if min(public.image_shape[1:]) >= 16 else 1)


def _feature_dims(config: Config, public: Public) -> int:
    """No more than features of all views."""
    features = config.networks * ConvNet(public.image_shape, 1, width=config.width).embed_dim
    pool = max(config.pool, public.n_classes) + config.pool // 3
    if 4 * features * pool > MEMORY:
        raise ConfigError(
            f"{features:,} features of {pool:,} images take more than 8 GiB; take fewer networks, less width or a smaller pool."
        )
    return min(config.feature_dims, features)


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """Four full-batch sums, or five. Shares divide Σ 1/σ² (GDP), so all together cost what one sum with `noise_multiplier` would."""
    d, rows = _dims(config, public), public.n_classes
    toned = _share(config.share_tones, public, SHARE_TONES)
    sigma = noise_multiplier / math.sqrt(1 - toned)
    means = GaussianSum(
        name="joint-means",
        dim=_feature_dims(config, public) + 1,
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

    k, m, shape, dims = public.n_classes, config.per_class, public.image_shape, _feature_dims(config, public)
    parts = _parts(config, public)
    gain = config.gain if parts > 1 else 1
    # 2. Views, and the axes along which images differ in these.
    reference = shown(draw(max(1, config.pool // k), "reference"))
    flip = "_flip" if config.flip else ""
    dsa = Dsa(strategy="color_crop_cutout_scale_rotate" + flip, fill=float(reference.amin()))
    views = random_views(config.networks, shape, config.width, dsa, workspace)
    if public.procedural is not None:  # made-up ones alone bring a point or nothing, and take as long as all the rest
        steps = lessons(len(views), len(dsa.operations), config.lessons)
        teach(views, *lesson_of(public, open_images), steps, dsa, workspace)
    features = evened(views, seen(views, torch.cat([reference, open_images[: config.pool // 3]])))
    z = coordinates(views, features, dims)

    # 3. Means of each class.
    with workspace.passing("private pass over the records: feature means") as progress:
        sums = private.release(of_means, lambda x, y: z(x), progress=progress)  # private
    # 4. The target.
    expected = features[: len(reference)]
    means, spread = read(sums, of_means.noise_multiplier)
    away = means - z.of(expected).view(k, -1, dims).mean(dim=1)
    target = expected.view(k, -1, expected.shape[1]).mean(dim=1) + z.lifted(trusted(away, spread))
    # 5. The images.
    start = packed(shown(draw(m * parts**2, "start")), parts, gain)
    images = match(
        views,
        target.view(k, config.networks, -1),
        start.view(k, m, *shape),
        parts=parts,
        gain=gain,
        steps=config.steps,
        lr=config.lr,
        workspace=workspace,
    )
    return Synthetic(images=images.flatten(0, 1), labels=torch.arange(k).repeat_interleave(m), parts=parts, gain=gain)


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
