"""The ConvNet of the dataset-distillation literature: random feature map, classifier under test, and DP-SGD model.

Source: Gidaris & Komodakis (2018), as used by Zhao & Bilen (2021) and Dosser (ICCV 2025). Nothing here is private.
Every layer treats records alone: normalisation is within one image, there are no batch statistics.
B images, C channels, H, W size, D features, K classes.
"""

import torch
from torch import Tensor, nn

from .default_weights import draw_weights


class ConvNet(nn.Module):
    """`depth` blocks of [3x3 convolution, GroupNorm, ReLU, 2x2 average pooling], then a linear head.

    Grey 28x28 images are padded to 32x32 by the first convolution. A map is pooled while both sides are at least 2, and
    blocks end with a map of 1x1 (a normalised 1x1 map would be constant): 8x8 images have room for three.

    Args:
      image_shape: (C, H, W).
      n_classes: K.
      width: channels of every block.
      depth: blocks at most.
      groups: of GroupNorm; None is `width` groups, which is instance norm, as in the papers.
      generator: for the weights, see `init_`; None is one of seed 0. The global random state is left alone.

    Attributes:
      config: what it was made with, for a file.
      embed_dim: D, length of an embedding: 2048 for 32x32 images at width 128 and depth 3.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_classes: int,
        *,
        width: int = 128,
        depth: int = 3,
        groups: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        channels, *size = image_shape
        if min(size) < 2 or width < 1 or depth < 1 or n_classes < 1:
            raise ValueError(f"Expected {image_shape=} of at least 2x2, and {width=}, {depth=}, {n_classes=} >= 1.")
        if width % (groups or width):
            raise ValueError(f"Expected {groups=} to divide {width=}.")
        blocks: list[nn.Module] = []
        for block in range(depth):
            if block and max(size) == 1:
                break
            padding = 3 if block == 0 and image_shape == (1, 28, 28) else 1
            size = [side + 2 * padding - 2 for side in size]
            blocks.append(nn.utils.skip_init(nn.Conv2d, channels, width, 3, padding=padding))
            blocks += [nn.GroupNorm(groups or width, width), nn.ReLU()]
            if min(size) >= 2:
                blocks.append(nn.AvgPool2d(2))
                size = [side // 2 for side in size]
            channels = width
        self.image_shape, self.n_classes = image_shape, n_classes
        self.config = {
            "image_shape": list(image_shape),
            "n_classes": n_classes,
            "width": width,
            "depth": depth,
            "groups": groups,
        }
        self.embed_dim: int = width * size[0] * size[1]
        self.features = nn.Sequential(*blocks)
        self.head = nn.utils.skip_init(nn.Linear, self.embed_dim, n_classes)
        self.init_(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> "ConvNet":
        """Draws all weights anew from PyTorch's default distributions, U(±1/sqrt(fan_in)), and returns the network.

        Args:
          generator: a CPU generator: the same numbers whatever device the network is on.
        """
        draw_weights(self, generator)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        return self

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Returns the features before the head, [B, D]."""
        return self.features(x_BCHW).flatten(1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns logits [B, K]."""
        return self.head(self.embed(x_BCHW))


class HalfSize(nn.Module):
    """Average pooling of 2x2, in sums of slices: the same function as `nn.AvgPool2d(2)`, four times as fast in bfloat16."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h, w = (side // 2 * 2 for side in x_BCHW.shape[2:])
        x = x_BCHW[..., 0:h:2, :] + x_BCHW[..., 1:h:2, :]
        return (x[..., 0:w:2] + x[..., 1:w:2]) * 0.25


def quick_pooling(model: ConvNet) -> ConvNet:
    """Swaps a network's pooling for `HalfSize`, in place, and returns it."""
    for index, module in enumerate(model.features):
        if isinstance(module, nn.AvgPool2d):
            model.features[index] = HalfSize()
    return model
