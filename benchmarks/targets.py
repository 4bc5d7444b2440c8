"""How far `joint`'s target is from the truth, by what is released of the views: on public stand-ins, with the noise of ε = 1.

  .venv/bin/python benchmarks/targets.py --data DIR --proxy hundred-grey

A row of output is a way to release the class means of N views: all their features, or D axes, evened out or not, with the noise
filtered or not. Its figure is the squared error of the class contrasts in these views, relative to the contrasts. `mixture` is what is
expected with no such release. Not through the door, but for the mixture: the noise is drawn here. DIR and proxies: see proxy.py.
"""

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from proxy import PROXIES
from torch import Tensor

from dpdistill.data import LabelledImages, procedural_images, to_unit
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods import Public
from dpdistill.methods.joint import Config, views
from dpdistill.methods.joint.teaching import lesson_of, lessons, teach
from dpdistill.methods.shared import mixture as mix
from dpdistill.models import Dsa
from dpdistill.privacy import GaussianSum, Ledger, gaussian_multiplier
from dpdistill.workspace import FolderWorkspace

K = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--proxy", choices=tuple(PROXIES), required=True)
    parser.add_argument("--networks", type=int, default=16)
    parser.add_argument("--lessons", type=int, default=Config().lessons, help="0: random networks alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y, _, _, auxiliary, auxiliary_labels, scale = PROXIES[args.proxy](args.data)
    shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    sigma, g = gaussian_multiplier(1.0, 1e-5) * scale, torch.Generator().manual_seed(0)
    config, names = Config(), tuple(map(str, range(K)))
    open_images = auxiliary[torch.randperm(len(auxiliary), generator=g)[:3000]]
    if shape[0] == 1:
        open_images = torch.cat([open_images, torch.from_numpy(to_unit(procedural_images(3000, *shape, 0)))])
    space = mix.pixel_space(open_images, config.pixel_dims)
    private = LabelledImages(images=x.numpy(), labels=y.numpy(), class_names=names, value_range=(-1, 1), source="proxy")
    with tempfile.TemporaryDirectory() as scratch, Ledger.open(Path(scratch) / "ledger", cap=(1e12, 1e-5)) as ledger:
        handle = PrivateData(private, ledger, Vault.open(Path(scratch) / "vault"))
        workspace = FolderWorkspace(Path(scratch) / "work", quiet=True)
        asked = mix.planned("joint", K, config.pixel_dims, config.components, sigma, 0.2, 0.2)
        queries = [planned.query for planned in asked if isinstance(planned.query, GaussianSum)]
        fitted = mix.fit(space, config.components, handle, queries, workspace)
        own = fitted.sample(config.pool // K, g).flatten(0, 1)
        reference = torch.cat([space.images(own, shape), open_images[: config.pool // 3]])
        strategy = "color_crop_cutout_scale_rotate" + ("" if args.proxy == "letters" else "_flip")
        dsa = Dsa(strategy=strategy, fill=float(reference.amin()))
        several = views.random_views(args.networks, shape, config.width, dsa, workspace)
        public = Public(image_shape=shape, class_names=names, auxiliary=auxiliary, auxiliary_labels=auxiliary_labels)
        steps = lessons(len(several), len(dsa.operations), args.lessons)
        teach(several, *lesson_of(public, open_images), steps, dsa, workspace)
    features, seen = views.evened(several, views.seen(several, reference)), views.seen(several, x)
    noise, count = sigma / math.sqrt(config.share_means), torch.bincount(y)
    of_mixture = torch.arange(K).repeat_interleave(config.pool // K)

    def means(rows: Tensor, of: Tensor) -> Tensor:
        return torch.stack([rows[of == k].mean(dim=0) for k in range(K)])

    truth, expected = means(seen, y), means(features[: len(own)], of_mixture)

    def error(target: Tensor) -> str:
        true, found = (t - t.mean(dim=0) for t in (truth, target))
        return f"{float((found - true).square().sum() / true.square().sum()):.3f}"

    print(f"mixture: {error(expected)}")
    radius = (features - features.mean(dim=0)).norm(dim=1).quantile(0.8)
    print(f"all features: {error(truth + torch.randn(truth.shape, generator=g) * noise * radius / count[:, None])}")
    for dims in (100, 300, 1000, 3000):
        evened = views.coordinates(several, features, dims)
        plain = (evened.scale > 0).float()
        radius = ((features - evened.centre) @ (evened.axes * plain)).norm(dim=1).quantile(0.8)
        for what, z in (("evened out", evened), ("as they are", replace(evened, scale=plain / radius))):
            spread = noise / views.UNIT / count
            mine = means(z.of(seen), y)
            found = mine + torch.randn(mine.shape, generator=g) * spread[:, None]
            prior = means(z.of(features[: len(own)]), of_mixture)
            figures = [views.trusted(found - prior, spread), found - prior, mine - prior]
            said = [error(expected + z.lifted(each)) for each in figures]
            print(
                f"{dims} axes {what}: filtered {said[0]}, not filtered {said[1]}, without noise {said[2]}", flush=True
            )


if __name__ == "__main__":
    main()
